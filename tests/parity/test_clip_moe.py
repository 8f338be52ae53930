"""CLIP-MoE against tensors recorded from the authors' code: outputs, gradients, losses, two processes, conversions."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

import mmoe
from mmoe.surgery import HostedMoE
from zoo.clip_moe.convert import from_original, pack_block, stretch_positions, to_original, upcycle
from zoo.clip_moe.model import ClipMoE
from zoo.hosts.clip import make_tokenizer

FAMILY = "clip_moe"


def token_major(rows: Tensor, samples: int) -> Tensor:
    """Rows sample by sample -> rows token by token, as the authors flatten."""
    return rows.unflatten(0, (samples, -1)).transpose(0, 1).flatten(0, 1)


def gates(model: ClipMoE) -> dict[str, nn.Parameter]:
    """Router matrices under the authors' names."""
    named = {n.removeprefix("clip."): p for n, p in model.named_parameters() if ".router." in n}
    return {name.replace(".mlp.router.", ".gate."): p for name, p in named.items()}


def build(recording) -> ClipMoE:
    config, state = from_original(recording.take_all("model", "w."), top_k=recording.config["top_k"])
    model = ClipMoE(config)
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".router." in name)
    return model


@pytest.fixture(scope="module")
def model(recording) -> ClipMoE:
    return build(recording)


def cases(recording) -> list[int]:
    return list(range(len(recording.config["blocks"])))


def build_block(recording, index: int) -> ResidualAttentionBlock:
    case = recording.config["blocks"][index]
    weights = recording.take_all("moe_block", f"block{index}.w.")
    packed = pack_block({f"b.{name}": value for name, value in weights.items()}, "b")
    width, experts = case["d"], case["E"]
    block = ResidualAttentionBlock(width, case["heads"], act_layer=QuickGELU)
    hidden = packed["experts.up_proj"].shape[1]
    block.mlp = HostedMoE(
        mmoe.TopKRouter(width, experts, top_k=case["k"]), mmoe.FFNExperts(width, hidden, experts, act="quick_gelu")
    )
    state = {name: value for name, value in weights.items() if "experts." not in name and "gate." not in name}
    block.load_state_dict({**state, **{f"mlp.{name}": value for name, value in packed.items()}})
    return block


def run_block(recording, index: int) -> None:
    case = recording.config["blocks"][index]
    block, samples = build_block(recording, index), case["N"]

    def check(name: str, value: Tensor) -> None:
        recording.check("moe_block", f"block{index}.{name}", value)

    x = recording.take("moe_block", f"block{index}.in.x").requires_grad_()
    mask = recording.take("moe_block", f"block{index}.attn_mask") if case["mask"] else None
    seen: dict[str, Tensor] = {}
    block.ln_2.register_forward_hook(lambda m, args, out: seen.update(after_attn=args[0], ln2=out))
    block.mlp.register_forward_hook(lambda m, args, out: seen.update(delta=out))
    with mmoe.trace(block) as routing:
        y = block(x.transpose(0, 1), attn_mask=mask).transpose(0, 1)
    aux = mmoe.balance_loss(routing, pool=True)
    loss = (y * recording.take("moe_block", f"block{index}.loss.coef")).sum() + 0.7 * aux
    loss.backward()
    check("mid.after_attn", seen["after_attn"].transpose(0, 1))
    check("mid.ln2", seen["ln2"].transpose(0, 1))
    check("out.moe_delta", seen["delta"].transpose(0, 1))
    check("out.y", y)
    check("out.router_logits", token_major(routing[0].logits, samples))
    check("out.topk_index", token_major(routing[0].experts, samples))
    check("out.topk_weight", token_major(routing[0].weights, samples))
    check("out.aux", aux)
    check("loss.value", loss)
    check("grad.x", x.grad)
    check("grad.ln_2.weight", block.ln_2.weight.grad)
    check("grad.gate.weight", block.mlp.router.weight.grad)
    check("grad.experts.0.c_fc.weight", block.mlp.experts.up_proj.grad[0])
    check("grad.experts.0.c_proj.bias", block.mlp.experts.down_bias.grad[0])
    with torch.no_grad():
        block.attn.in_proj_bias.zero_()
        block.attn.out_proj.bias.zero_()
        probe = recording.take("moe_block", f"block{index}.eps_probe.x")
        probe_mask = None if mask is None else mask[: len(probe), : len(probe)]
        check("eps_probe.y", block(probe.transpose(0, 1), attn_mask=probe_mask).transpose(0, 1))


def test_every_block(recording):
    for index in cases(recording):
        run_block(recording, index)


def test_balance_loss(recording):
    logits = recording.take("moe_block", "aux.stacked_logits")
    top_k = recording.config["top_k"]
    layers = [mmoe.TopKRouter(1, logits.shape[-1], top_k=top_k).select(layer) for layer in logits]
    recording.check("moe_block", "aux.value", mmoe.balance_loss(layers, pool=True))
    uniform = [mmoe.TopKRouter(1, logits.shape[-1], top_k=top_k).select(torch.zeros_like(layer)) for layer in logits]
    recording.check("moe_block", "aux.value_uniform", mmoe.balance_loss(uniform, pool=True))


def test_features_and_routing(recording, model):
    model.eval()
    image, text = recording.take("model", "in.image"), recording.take("model", "in.text_long")
    samples = len(image)
    with torch.no_grad(), mmoe.trace(model.clip) as routing:
        out = model(image, text)
    recording.check("model", "eval.image_features", out.image_features)
    recording.check("model", "eval.text_features", out.text_features)
    recording.check("model", "eval.logits_per_image", out.logits_per_image)
    assert torch.equal(out.logits_per_text, out.logits_per_image.t())
    towers = {"image": routing.select("visual.*"), "text": routing.select("transformer.*")}
    for name, layers in towers.items():
        stacked = torch.stack([token_major(layer.logits, samples) for layer in layers])
        recording.check("model", f"eval.{name}_router_logits", stacked)
        recording.check("model", f"eval.{name}_aux", mmoe.balance_loss(layers, pool=True))
    short = recording.take("model", "in.text_short")
    with torch.no_grad():
        recording.check("model", "eval.text_short_features", model.encode_text(short))


@pytest.mark.parametrize("case", ["train_long", "train_short"])
def test_training_loss_and_router_gradients(recording, model, case):
    model.train()
    model.zero_grad()
    short = recording.take("model", "in.text_short") if case == "train_short" else None
    out = model(
        recording.take("model", "in.image"), recording.take("model", "in.text_long"), text_short=short, return_loss=True
    )
    out.loss.backward()
    zero = torch.zeros(1)
    recording.check("model", f"{case}.total", out.loss)
    recording.check("model", f"{case}.itc_long", out.losses["contrastive"])
    recording.check("model", f"{case}.itc_short", out.losses.get("contrastive_short", zero))
    recording.check("model", f"{case}.aux_image", out.losses["balance_image"])
    recording.check("model", f"{case}.aux_text_long", out.losses["balance_text"])
    recording.check("model", f"{case}.aux_text_short", out.losses.get("balance_short", zero))
    for name, gate in gates(model).items():
        recording.check("model", f"{case}.grad.{name}", gate.grad)


def test_cut_texts_have_the_same_features(recording, model):
    cut = ClipMoE(replace(model.config, route_padding=False)).eval()
    cut.load_state_dict(model.state_dict())
    text = recording.take("model", "in.text_long")
    with torch.no_grad(), mmoe.trace(cut) as routing:
        recording.check("model", "eval.text_features", cut.encode_text(text))
    assert int(routing[0].n_used().sum()) == int((text.argmax(-1) + 1).sum()) * model.config.top_k


def test_trainable_parameters_are_the_gates(recording, model):
    assert sorted(gates(model)) == sorted(recording.config["trainable_under_lock_except_gate"])


def _rank(rank: int, world: int, meeting: str, model: ClipMoE, batch: list[Tensor], results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    out = model.train()(*batch, return_loss=True)
    out.loss.backward()
    own = {name: gate.grad.clone() for name, gate in gates(model).items()}
    for gate in gates(model).values():
        dist.all_reduce(gate.grad)
        gate.grad /= world
    mean = {name: gate.grad for name, gate in gates(model).items()}
    losses = {name: value.detach() for name, value in out.losses.items()}
    results.put((rank, out.loss.item(), {k: v.item() for k, v in losses.items()}, _plain(own), _plain(mean)))
    dist.destroy_process_group()


def _plain(tensors: dict[str, Tensor]) -> dict[str, list]:
    return {name: value.tolist() for name, value in tensors.items()}


def test_two_processes(recording, tmp_path):
    names = [name.split(".")[0] for name in recording.files["ddp2"] if name.endswith(".rows")]
    context = mp.get_context("spawn")
    results, workers = context.Queue(), []
    for rank in range(len(names)):
        start, stop = recording.take("ddp2", f"rank{rank}.rows").tolist()
        batch = [recording.take("model", name)[start:stop] for name in ("in.image", "in.text_long")]
        arguments = (rank, len(names), str(tmp_path / "meeting"), build(recording), batch, results)
        workers.append(context.Process(target=_rank, args=arguments))
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    for rank, total, losses, own, mean in found:
        recording.check("ddp2", f"rank{rank}.total", torch.tensor(total))
        recording.check("ddp2", f"rank{rank}.itc_long", torch.tensor(losses["contrastive"]))
        recording.check("ddp2", f"rank{rank}.aux_image", torch.tensor(losses["balance_image"]))
        recording.check("ddp2", f"rank{rank}.aux_text_long", torch.tensor(losses["balance_text"]))
        for name, gradient in own.items():
            recording.check("ddp2", f"rank{rank}.grad.{name}", torch.tensor(gradient))
        for name, gradient in mean.items():
            recording.check("ddp2", f"ddp_mean.grad.{name}", torch.tensor(gradient))


def dense_stages(recording) -> list[dict[str, Tensor]]:
    """Dense checkpoints; the later ones hold the MLPs only, everything else is the first one's."""
    count = recording.config["dmu"]["experts"]
    first = recording.take_all("dmu", "dense0.")
    return [{**first, **recording.take_all("dmu", f"dense{stage}.")} for stage in range(count)]


def as_dense(state: dict[str, Tensor]) -> ClipMoE:
    config, converted = from_original(state)
    model = ClipMoE(config)
    model.load_state_dict(converted)
    return model


def digest(value: Tensor) -> str:
    return hashlib.sha256(value.float().contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("kind", ["mcl", "upcycle"])
def test_assembled_state_dicts(recording, kind, rounded):
    stages, settings = dense_stages(recording), recording.config["dmu" if kind == "mcl" else "up"]
    dense = as_dense(stages[0])
    sources = [as_dense(stage).state_dict() for stage in stages] if kind == "mcl" else None
    model = upcycle(
        dense, settings["experts"], moe_layers=settings["moe_layers"], sources=sources, round_to_half=rounded
    )
    produced, expected = to_original(model.state_dict()), recording.json("dmu_expected")[kind]
    assert set(produced) == set(expected)
    for name, entry in expected.items():
        assert list(produced[name].shape) == entry["shape"], name
        if entry["source"] is not None:
            wanted = entry["sha256_fp32" if rounded else "sha256_fp32_unrounded"]
            assert digest(produced[name]) == wanted, name


def test_assembled_model_runs_alike(recording):
    stages, settings = dense_stages(recording), recording.config["dmu"]
    sources = [as_dense(stage).state_dict() for stage in stages]
    model = upcycle(
        as_dense(stages[0]),
        top_k=settings["top_k"],
        moe_layers=settings["moe_layers"],
        sources=sources,
        round_to_half=True,
    )
    for name, value in recording.take_all("dmu", "mcl_gate.").items():
        gates(model)[name].data.copy_(value)
    with torch.no_grad():
        image, text = recording.take("dmu", "mcl_run.image"), recording.take("dmu", "mcl_run.text")
        recording.check("dmu", "mcl_run.image_features", model.encode_image(image))
        recording.check("dmu", "mcl_run.text_features", model.encode_text(text))


@pytest.mark.parametrize("half_math", [True, False])
def test_stretched_positions(recording, half_math):
    (short,) = (name for name in recording.files["text_pos"] if name.startswith("in."))
    table = recording.take("text_pos", short)
    result = stretch_positions(table, half_math=half_math)
    how = "as_released_fp16_math" if half_math else "fp32_math"
    recording.check("text_pos", f"out.positional_embedding_{len(result)}_{how}", result)


def test_tokenizer(recording):
    recorded = recording.json("tokenizer")
    tokenizer = make_tokenizer(49408, recorded["context_length"])
    ids = tokenizer([item["text"] for item in recorded["items"]])
    assert ids.shape == (len(recorded["items"]), recorded["context_length"])
    for row, item in zip(ids.tolist(), recorded["items"], strict=True):
        assert row == item["ids"] + [0] * (recorded["context_length"] - len(item["ids"])), item["text"]


def test_round_trip_is_bit_exact(recording):
    original = recording.take_all("model", "w.")
    back = to_original(from_original(original)[1])
    assert set(back) == set(original)
    assert all(torch.equal(back[name], original[name]) for name in original)


def negate_gate(block: ResidualAttentionBlock) -> None:
    block.mlp.router.weight.data.neg_()


MUTANTS = {
    "no renormalisation": lambda block: setattr(block.mlp.router, "weights", "raw"),
    "exact gelu": lambda block: setattr(block.mlp.experts, "act", nn.functional.gelu),
    "epsilon 1e-6": lambda block: setattr(block.ln_2, "eps", 1e-6),
    "other experts": negate_gate,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_blocks_are_caught(recording, monkeypatch, mutant):
    honest = build_block

    def mutated(recording, index):
        block = honest(recording, index)
        MUTANTS[mutant](block)
        return block

    monkeypatch.setitem(globals(), "build_block", mutated)
    with pytest.raises(AssertionError):
        run_block(recording, 0)


WRONG_OPTIONS = OrderedDict(
    split_at_21={"position_split": 21},
    no_smoothing={"label_smoothing": 0.0},
    full_text_weight={"text_balance_scale": 1.0},
    balance_per_layer={"balance_pooled": False},
)


@pytest.mark.parametrize("option", WRONG_OPTIONS)
def test_wrong_options_are_caught(recording, model, option):
    wrong = ClipMoE(replace(model.config, **WRONG_OPTIONS[option])).eval()
    wrong.load_state_dict(model.state_dict())
    batch = recording.take("model", "in.image"), recording.take("model", "in.text_long")
    with torch.no_grad():
        loss = wrong(*batch, return_loss=True).loss.item()
    assert not math.isclose(loss, recording.files["model"]["train_long.total"].item(), rel_tol=1e-6)


def test_nothing_was_left_out(recording, whole_module):
    assert recording.untouched() == []
    assert {"tokenizer", "dmu_expected"} <= recording.compared
