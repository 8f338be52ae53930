"""Names and specs of routers and experts; the texts of errors are pinned."""

from __future__ import annotations

import pytest

import mmoe
from mmoe import GatedFFNExperts, TopKRouter, build_experts, build_router
from mmoe.errors import BadOverride, UnknownName
from mmoe.registry import Registry, experts, parse_spec, routers


class TestBuild:
    def test_by_name_with_defaults(self) -> None:
        router = build_router("topk", dim=8, num_experts=4)
        assert isinstance(router, TopKRouter) and router.num_experts == 4 and router.weight.shape == (4, 8)

    def test_options_in_the_spec_win(self) -> None:
        router = build_router("topk:top_k=3,score=sigmoid,scale=2.5", dim=8, num_experts=4, top_k=1)
        assert (router.top_k, router.score, router.scale) == (3, "sigmoid", 2.5)

    @pytest.mark.parametrize("size", ["dim", "num_experts"])
    def test_sizes_belong_to_the_model(self, size: str) -> None:
        with pytest.raises(BadOverride, match=f"'{size}' is not an option of the router 'topk'\n  it takes: top_k, sc"):
            build_router(f"topk:{size}=3", dim=8, num_experts=4)
        with pytest.raises(BadOverride, match="'num_experts' is not an option of the router 'fixed'\n  it takes no op"):
            build_router("fixed:num_experts=3", num_experts=4)
        assert build_router({"name": "topk", "dim": 8, "num_experts": 3}).num_experts == 3

    def test_by_mapping(self) -> None:
        built = build_experts({"name": "gated_ffn", "bias": True}, dim=8, hidden_dim=4, num_experts=2)
        assert isinstance(built, GatedFFNExperts) and built.gate_up_bias is not None

    def test_a_mapping_is_left_as_it_was(self) -> None:
        spec = {"name": "topk", "top_k": 1}
        build_router(spec, dim=8, num_experts=4)
        assert spec == {"name": "topk", "top_k": 1}

    def test_defaults_that_a_class_does_not_take_are_dropped(self) -> None:
        assert build_router("fixed", dim=8, num_experts=4, top_k=2).num_experts == 4

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("true", True),
            ("False", False),
            ("none", None),
            ("null", None),
            ("3", 3),
            ("-1", -1),
            ("0.5", 0.5),
            ("1e-3", 0.001),
            ("gelu", "gelu"),
        ],
    )
    def test_values_are_read_as_what_they_look_like(self, text: str, value: object) -> None:
        parsed = parse_spec(f"x:a={text}, b=1")
        assert parsed == {"name": "x", "a": value, "b": 1} and type(parsed["a"]) is type(value)


class TestErrors:
    @pytest.mark.parametrize(
        ("spec", "text"),
        [
            ("top_k", "no router named 'top_k'\n  did you mean: topk\n  try: mmoe list --kind routers"),
            (
                "topk:topk=1",
                "'topk' is not an option of the router 'topk'\n  did you mean: top_k\n  try: topk:top_k=...",
            ),
            (
                "fixed:zzz=1",
                "'zzz' is not an option of the router 'fixed'\n  it takes no options\n  try: fixed",
            ),
            (
                "topk:top_k",
                "'top_k' in 'topk:top_k' is no option\n  options are written key=value\n  try: topk:top_k=VALUE",
            ),
        ],
    )
    def test_of_routers(self, spec: str, text: str) -> None:
        with pytest.raises((UnknownName, BadOverride)) as error:
            build_router(spec, dim=8, num_experts=4)
        assert str(error.value) == text

    def test_unknown_name_without_a_near_one(self) -> None:
        with pytest.raises(UnknownName) as error:
            build_router("zzz")
        known = ", ".join(mmoe.list_routers()[:8])
        assert str(error.value).startswith(f"no router named 'zzz'\n  known: {known}")

    def test_of_experts(self) -> None:
        with pytest.raises(UnknownName) as error:
            build_experts("gated-fn")
        assert str(error.value).splitlines()[:2] == [
            "no expert named 'gated-fn'",
            "  did you mean: gated_ffn, lora_gated_ffn",
        ]

    def test_without_sizes(self) -> None:
        with pytest.raises(BadOverride) as error:
            mmoe.build_router("topk")
        assert str(error.value) == (
            "the router 'topk' without dim, num_experts\n  its sizes are needed\n"
            "  try: build_router('topk', dim=..., num_experts=...)"
        )
        with pytest.raises(BadOverride, match="the expert 'ffn' without hidden_dim, num_experts"):
            mmoe.build_experts("ffn", dim=8)

    @pytest.mark.parametrize("spec", [None, 5, ["topk"]])
    def test_what_is_no_spec(self, spec: object) -> None:
        with pytest.raises(BadOverride, match="a spec is a name or a mapping with a name"):
            mmoe.build_router(spec, dim=8, num_experts=4)  # type: ignore[arg-type]  # wrong on purpose

    def test_a_mapping_without_a_name(self) -> None:
        with pytest.raises(BadOverride) as error:
            build_router({"top_k": 1})
        assert (
            str(error.value)
            == "no 'name' in {'top_k': 1}\n  a spec is a name or a mapping with a name\n  try: topk:top_k=1"
        )


class TestRegistry:
    def test_a_name_can_be_given_once(self) -> None:
        registry = Registry("thing", "mmoe.routers")
        registry.register("a")(dict)
        with pytest.raises(ValueError, match="thing 'a' is registered already: dict"):
            registry.register("a")(list)
        assert registry.get("a") is dict

    def test_registering_gives_the_class_back(self) -> None:
        assert Registry("thing", "mmoe.routers").register("a")(dict) is dict

    def test_lists_are_sorted_and_buildable(self) -> None:
        assert mmoe.list_routers() == sorted(mmoe.list_routers()) == routers.names()
        assert mmoe.list_experts() == sorted(mmoe.list_experts()) == experts.names()
        assert {"dense", "expert_choice", "fixed", "topk"} <= set(mmoe.list_routers())
        assert {"ffn", "gated_ffn", "with_null"} <= set(mmoe.list_experts())

    def test_every_class_says_what_it_is(self) -> None:
        for registry in (routers, experts):
            assert all((registry.get(name).__doc__ or "").strip() for name in registry.names())


def test_every_public_name_is_there() -> None:
    assert [name for name in mmoe.__all__ if not hasattr(mmoe, name)] == []
    with pytest.raises(AttributeError, match="module 'mmoe' has no attribute 'TopKRoutr'"):
        mmoe.TopKRoutr  # noqa: B018  # looking it up is the test
