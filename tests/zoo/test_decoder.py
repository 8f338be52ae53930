"""Mixtures inside language models of transformers: which layers, which hosts, and generation with their cache."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import mmoe
from mmoe.errors import BadOverride, LoadMismatch, Refused
from zoo.hosts.connectors import projector
from zoo.hosts.decoder import add_mixtures, blocks_of, chosen_layers, mixtures_of, pack_ffns

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 64}


@pytest.fixture(params=[(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)], ids=["llama", "qwen2"])
def host(request: pytest.FixtureRequest):
    config, model = request.param
    return model(config(**SIZES)).eval()


def test_chosen_blocks_become_mixtures(host) -> None:
    dense = {number: block.mlp for number, block in enumerate(blocks_of(host))}
    add_mixtures(host, chosen_layers("even", 4), 3, top_k=1)
    assert {*mixtures_of(host)} == {0, 2} and blocks_of(host)[1].mlp is dense[1]
    with mmoe.trace(host) as trace:
        host(torch.randint(0, 60, (2, 7)))
    assert [routing.counts().sum().item() for routing in trace] == [14, 14]


def test_copies_of_a_block_compute_what_it_did(host) -> None:
    ids = torch.randint(0, 60, (2, 7))
    before = host(ids).logits
    ffns = [
        {name.removesuffix(".weight"): value for name, value in b.mlp.state_dict().items()} for b in blocks_of(host)
    ]
    add_mixtures(host, range(4), 3)
    for number, moe in mixtures_of(host).items():
        moe.experts.load_state_dict(pack_ffns([ffns[number]] * 3))
    torch.testing.assert_close(host(ids).logits, before, atol=1e-5, rtol=1e-4)


def test_experts_are_put_together_from_blocks_alone(host) -> None:
    ffns = []
    for number in range(3):
        own = {name: value.clone() for name, value in host.state_dict().items() if ".mlp." in name}
        ffns.append({name: value + number if "up_proj" in name else value for name, value in own.items()})
    mixed, report = mmoe.assemble_experts(host, ffns, top_k=1, layers=["model.layers.1.mlp", "model.layers.3.mlp"])
    assert {*mixtures_of(mixed)} == {1, 3} and len(report.sites) == 2
    for number, moe in mixtures_of(mixed).items():
        up = host.model.layers[number].mlp.up_proj.weight
        for expert, packed in enumerate(moe.experts.gate_up_proj):
            torch.testing.assert_close(packed[len(up) :], up + expert)
    assert mixed.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, pad_token_id=0).shape == (1, 6)
    del ffns[2]["model.layers.3.mlp.down_proj.weight"]
    with pytest.raises(LoadMismatch):
        mmoe.assemble_experts(host, ffns)


def test_cached_steps_agree_with_the_whole(host) -> None:
    add_mixtures(host, range(4), 3)
    ids = torch.randint(0, 60, (1, 9))
    with torch.no_grad():
        whole = host(ids).logits
        first = host(ids[:, :5], use_cache=True)
        cache, parts = first.past_key_values, [first.logits]
        for place in range(5, 9):
            step = host(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache, parts = step.past_key_values, [*parts, step.logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    made = host.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(made, host.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0))


def test_hosts_without_such_blocks_are_refused(host) -> None:
    other = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    with pytest.raises(Refused, match="put experts into a GPT2LMHeadModel"):
        add_mixtures(other, [0], 2)
    add_mixtures(host, [0], 2)
    with pytest.raises(Refused, match="put experts into block 0\n  it has a MoE"):
        add_mixtures(host, [0], 2)


@pytest.mark.parametrize("which", ["odd", 0, [4], [-1]])
def test_layers_that_there_are_not(which) -> None:
    with pytest.raises(BadOverride):
        chosen_layers(which, 4)


@pytest.mark.parametrize("kind", ["mlp0x", "gelu", ""])
def test_projections_that_there_are_not(kind: str) -> None:
    with pytest.raises(BadOverride, match="it is linear, identity, or mlp2x_gelu"):
        projector(kind, 4, 8)
