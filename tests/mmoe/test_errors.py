"""The texts of user errors are part of the interface: they are pinned here."""

from __future__ import annotations

import pickle

import pytest

from mmoe import errors
from mmoe.errors import MmoeError, UnknownModel, did_you_mean, nearest

MODELS = ["earth_adapter_tiny", "clip_moe_tiny", "clip_moe_vit_l14", "uni_moe_tiny"]


def test_message_has_three_lines() -> None:
    error = UnknownModel("no model named 'clip_moe_l4'", did_you_mean("clip_moe_l4", MODELS), "mmoe list 'clip_moe*'")
    assert str(error) == (
        "no model named 'clip_moe_l4'\n  did you mean: clip_moe_vit_l14, clip_moe_tiny\n  try: mmoe list 'clip_moe*'"
    )


def test_every_line_of_a_long_reason_is_indented() -> None:
    error = errors.LoadMismatch("cannot load 'a.pt'", "2 keys are missing:\n  x\n  y", "zoo.load('a', False)")
    assert str(error).splitlines()[1:] == ["  2 keys are missing:", "    x", "    y", "  try: zoo.load('a', False)"]


def test_as_dict_is_what_json_prints() -> None:
    error = errors.BadInput("cannot read 'cat.png'", "no such file", "ls")
    assert error.as_dict() == {
        "type": "BadInput",
        "asked": "cannot read 'cat.png'",
        "wrong": "no such file",
        "fix": "ls",
        "message": "cannot read 'cat.png'\n  no such file\n  try: ls",
    }


ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, MmoeError)]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_errors_cross_a_process_border(kind: type[MmoeError]) -> None:
    error = kind("asked", "wrong", "fix")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and again.as_dict() == error.as_dict()
    assert kind.__name__ in errors.__all__


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("clip_moe_l4", "clip_moe_vit_l14"),
        ("CLIP-MoE-tiny", "clip_moe_tiny"),
        ("clipmoetiny", "clip_moe_tiny"),
        ("earth", "earth_adapter_tiny"),
        ("vit_l14", "clip_moe_vit_l14"),
    ],
)
def test_nearest_finds_what_was_meant(name: str, first: str) -> None:
    assert nearest(name, MODELS)[0] == first


def test_nearest_keeps_quiet_when_nothing_is_near() -> None:
    assert nearest("qwerty", MODELS) == []
    assert nearest("", MODELS) == []
    assert nearest("a", []) == []
    assert len(nearest("moe", [f"moe_{i}" for i in range(9)], n=2)) == 2


def test_did_you_mean_lists_what_is_known_otherwise() -> None:
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"
    assert did_you_mean("zzz", [f"n{i}" for i in range(10)]) == "known: n0, n1, n2, n3, n4, n5, n6, n7 and 2 more"
    assert did_you_mean("zzz", []) == "none are known"
