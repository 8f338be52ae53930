"""Files of llama.cpp and CTranslate2: written here by their formats, and the real ones where they are."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from mmoe.errors import CorruptFile, MissingExtra, Refused
from zoo.runtimes import gguf_tokenizer, is_ctranslate2
from zoo.state import read_state

# ---- GGUF ----


def write_gguf(path: Path, words: list[str] | None = None, split: str = "smollm", kind: str = "gpt2") -> np.ndarray:
    """A GGUF file with a matrix of 4 bits, one in fp32, and a tokenizer of bytes and one merge."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    few = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("blk.0.ffn_up.weight", few, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("output_norm.weight", values[0])
    if words is not None:
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre(split)
        writer.add_token_list(words)
        writer.add_token_types([3 if word.startswith("<|") else 1 for word in words])
        writer.add_token_merges(["H i"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_gguf(tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "a.gguf")
    state = read_state(tmp_path / "a.gguf")
    assert {name: value.shape for name, value in state.items()} == {
        "blk.0.ffn_up.weight": (4, 64),
        "output_norm.weight": (64,),
    }
    assert state["output_norm.weight"].equal(torch.from_numpy(values[0]))
    assert state["blk.0.ffn_up.weight"].dtype == torch.float32
    step = (values.max() - values.min()) / 15
    assert (state["blk.0.ffn_up.weight"] - torch.from_numpy(values)).abs().max() < step


WORDS = ["<|im_start|>", "<|im_end|>", "H", "i", "Hi", "1", "2", "Ġ"]


def test_the_tokenizer_of_a_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", WORDS)
    words = Tokenizer.from_str(gguf_tokenizer(tmp_path / "a.gguf"))
    assert words.encode("<|im_start|>Hi 12<|im_end|>").ids == [0, 4, 7, 5, 6, 1]
    assert words.decode([0, 4, 7, 5, 6, 1], skip_special_tokens=False) == "<|im_start|>Hi 12<|im_end|>"


def test_tokenizers_of_other_kinds(tmp_path: Path) -> None:
    write_gguf(tmp_path / "none.gguf")
    with pytest.raises(CorruptFile, match=r"it has no 'tokenizer\.ggml\.model'"):
        gguf_tokenizer(tmp_path / "none.gguf")
    for name, options in (("pieces", {"kind": "llama"}), ("words", {"split": "qwen2"})):
        write_gguf(tmp_path / f"{name}.gguf", WORDS, **options)
        with pytest.raises(Refused, match="known are gpt2 with smollm"):
            gguf_tokenizer(tmp_path / f"{name}.gguf")


def test_a_damaged_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", WORDS)
    whole = (tmp_path / "a.gguf").read_bytes()
    for cut in (b"GGUF", whole[: len(whole) // 2], b"<html>", whole[:-64]):
        (tmp_path / "a.gguf").write_bytes(cut)
        with pytest.raises(CorruptFile, match="cannot read the weights file"):
            read_state(tmp_path / "a.gguf")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for reads in (read_state, gguf_tokenizer):
        with pytest.raises(MissingExtra, match=r"pip install 'mmoe\[pretrained\]'"):
            reads(tmp_path / "a.gguf")


@pytest.mark.slow
def test_smollm2(pretrained: Any) -> None:
    pytest.importorskip("gguf")
    state = read_state(pretrained("smollm2"))
    assert len(state) == 272 and state["token_embd.weight"].shape == (49152, 576)
    words = Tokenizer.from_str(gguf_tokenizer(pretrained("smollm2")))
    text = "<|im_start|>user\nWhy is 1024 = 2**10, naïve?  <|im_end|>"
    assert words.encode(text).tokens[:3] == ["<|im_start|>", "user", "Ċ"]
    assert words.decode(words.encode(text).ids, skip_special_tokens=False) == text


# ---- CTranslate2 ----

TENSORS = {
    "encoder/conv1/weight": np.arange(12, dtype=np.float16).reshape(2, 3, 2),
    "encoder/norm/gamma": np.ones(2, dtype=np.float32),
    "encoder/num_heads": np.array(6, dtype=np.int16),
}
NUMBERS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def model_bin(tensors: dict[str, np.ndarray], version: int = 6) -> bytes:
    """A model.bin by its format."""
    found = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, value in tensors.items():
        found += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        found += struct.pack("<BI", NUMBERS[value.dtype.name], value.nbytes) + value.tobytes()
    return found + struct.pack("<I", 1) + text("again") + text("encoder/norm/gamma")


def test_model_bin(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(model_bin(TENSORS))
    state = read_state(path)
    assert state.keys() == {*TENSORS, "again"} and state["again"] is state["encoder/norm/gamma"]
    for name, value in TENSORS.items():
        assert state[name].equal(torch.from_numpy(value))


def test_a_torch_file_may_be_called_model_bin(tmp_path: Path) -> None:
    for old in (True, False):
        torch.save({"a": torch.ones(2)}, tmp_path / "model.bin", _use_new_zipfile_serialization=not old)
        assert not is_ctranslate2(tmp_path / "model.bin")
        assert read_state(tmp_path / "model.bin")["a"].sum() == 2


def test_a_model_bin_that_is_not_read(tmp_path: Path) -> None:
    path, whole = tmp_path / "model.bin", model_bin(TENSORS)
    path.write_bytes(whole[:-50])
    with pytest.raises(CorruptFile, match="bytes too early"):
        read_state(path)
    path.write_bytes(model_bin(TENSORS, version=3))
    with pytest.raises(Refused, match="it is of version 3 of the format; read is 6"):
        read_state(path)
    path.write_bytes(model_bin({"a/weight": np.ones((2, 2), dtype=np.int8)}))
    with pytest.raises(Refused, match="a/weight is quantised to int8"):
        read_state(path)


@pytest.mark.slow
def test_whisper(pretrained: Any) -> None:
    state = read_state(pretrained("whisper"))
    assert state["encoder/position_encodings/encodings"].shape == (1500, 384)
    assert state["decoder/projection/weight"] is state["decoder/embeddings/weight"]
