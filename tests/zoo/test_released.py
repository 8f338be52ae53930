"""Checkpoints as they are released: shards, adapters of peft, parts that were trained whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import zoo
from mmoe.errors import BadInput, CorruptFile, LoadMismatch
from tests.zoo.test_uni_moe import SPEECH, VISION, build, theirs
from zoo.released import plain_names, read_released

State = dict[str, torch.Tensor]
GATES, ALIGNER, PROJECTOR = "mlp.gate.", ("mm_audio_aligner", "query_tokens"), "mm_projector"


@pytest.fixture(autouse=True)
def _two_cards() -> None:
    """All of them here, where the folder's fixture leaves two."""


@pytest.fixture
def release(tmp_path: Path) -> tuple[Path, Path, Any]:
    """A model, and its checkpoint as a base in shards and a folder of what was trained on it."""
    model = build(sound=None)
    state = {name: value.clone() for name, value in theirs(model).items()}
    base, tuned = tmp_path / "speech-base", tmp_path / "speech-e2"
    base.mkdir()
    tuned.mkdir()
    generator = torch.Generator().manual_seed(0)
    adapters: State = {}
    for name, value in state.items():
        if name.endswith("_proj.weight") and ".layers." in name and "tower" not in name and "aligner" not in name:
            lora = {
                "A": torch.randn(2, value.shape[1], generator=generator),
                "B": torch.randn(len(value), 2, generator=generator),
            }
            adapters |= {f"base_model.model.{name[:-7]}.lora_{half}.weight": one for half, one in lora.items()}
            state[name] = value - 4 / 2 * lora["B"] @ lora["A"]
    parts: dict[str, State] = {"mlp_gates.bin": {}, "mm_audio_aligner.bin": {}, "non_lora_trainables.bin": {}}
    for name, value in state.items():
        kind = GATES in name, any(word in name for word in ALIGNER), PROJECTOR in name
        if any(kind):
            parts[list(parts)[kind.index(True)]][f"base_model.model.{name}"] = value
            state[name] = torch.zeros_like(value)
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: state[name].contiguous() for name in own}, base / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, part in {**parts, "adapter_model.bin": adapters}.items():
        assert part, file
        torch.save(part, tuned / file)
    (tuned / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    return base, tuned, model


def test_a_base_and_what_was_trained_on_it_are_the_whole_model(release: tuple[Path, Path, Any]) -> None:
    base, tuned, model = release
    whole, found = theirs(model), read_released([str(base), str(tuned)])
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_the_command_line_takes_a_base_and_what_stands_over_it(
    run: Any, release: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    base, tuned, model = release
    sizes = [f"vision={json.dumps(VISION)}", f"speech={json.dumps(SPEECH)}", "heads=4", "sound=null", "top_k=2"]
    options = [word for size in sizes for word in ("--set", size)]
    command = ["convert", "from-original", "uni_moe", str(base), "--over", str(tuned), "--out", str(tmp_path / "out")]
    done = run(*command, *options)
    assert done.code == 0, done.err
    ids = torch.tensor([[1, 2, 3, 4]])
    again = zoo.load(tmp_path / "out", device="cpu")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_adapters_without_their_base_are_told(release: tuple[Path, Path, Any]) -> None:
    base, tuned, _ = release
    with pytest.raises(LoadMismatch, match=r"there is no model\..*(?s:.*)BASE --over ADAPTERS"):
        read_released([str(tuned)])
    (tuned / "adapter_config.json").write_text("{}")
    with pytest.raises(CorruptFile, match="has no lora_alpha"):
        read_released([str(base), str(tuned)])
    (tuned / "adapter_config.json").unlink()
    with pytest.raises(BadInput, match=r"adapter_config\.json"):
        read_released([str(base), str(tuned)])


def test_folders_that_are_not_whole(release: tuple[Path, Path, Any], tmp_path: Path) -> None:
    base, _, _ = release
    (base / "model-2.safetensors").unlink()
    with pytest.raises(CorruptFile, match=r"model-2\.safetensors is missing"):
        read_released([str(base)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="it has no file that ends in"):
        read_released([str(tmp_path / "empty")])


def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.zeros(1)}, outside)
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CorruptFile, match=r"outside\.safetensors is missing"):
        read_released([str(folder)])


def test_of_two_formats_the_safe_one_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"step": 3}, tmp_path / "training_args.bin")
    assert read_released([str(tmp_path)])["a"] == 1


def test_names_that_need_no_change_stay() -> None:
    names = {"model.norm.weight": 0, "lm_head.weight": 1, "model.layers.0.mlp.gate.weight": 2}
    assert plain_names(names) == names  # type: ignore[arg-type, comparison-overlap]  # numbers in place of tensors
