"""Uni-MoE against tensors recorded from the authors' code."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Blip2QFormerConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import mmoe
from mmoe import (
    Context,
    GatedFFNExperts,
    GShardRouter,
    LoRAGatedFFNExperts,
    MoE,
    Routing,
    TopKRouter,
    WithNullExperts,
)
from mmoe.losses import balance_loss
from mmoe.routers.dynamic import DynamicRouter, explore, sparse_mixer
from tests.parity.conftest import Recording
from train.data.grouping import grouped_batches
from zoo.hosts import beats
from zoo.hosts.beats import BEATs, BEATsConfig
from zoo.hosts.chat import VICUNA, encode
from zoo.hosts.connectors import QFormerResampler, WhisperResampler, projector
from zoo.hosts.decoder import PROJECTIONS, add_mixtures, chosen_layers, mixtures_of, pack_ffns
from zoo.hosts.splice import clips, splice
from zoo.uni_moe import codec, losses
from zoo.uni_moe.config import UniMoEConfig
from zoo.uni_moe.convert import convert_names, to_original
from zoo.uni_moe.model import UniMoE

FAMILY = "uni_moe"
BLOCKS = ("dcmoe_block", "unimoe_audio_block")
ROUTERS = ("dcmoe_router", "unimoe_audio_router")
CASES = ("eval", "train", "train_weighted", "topk", "nomask", "drop_probs", "drop_position")
LEFT_OUT = {
    "gate_top2_8e:drop_det.combine": "places are not numbered here; weights by expert are compared",
    "gate_top2_8e:drop_det.dispatch": "the same",
    "gate_top2_8e:nodrop_det.combine": "the same",
    "gate_top2_8e:nodrop_det.dispatch": "the same",
    "gate_top2_8e:nodrop_sample.combine": "the same",
    "gate_top2_8e:nodrop_sample.dispatch": "the same",
    "gate_top2_8e:nodrop_sample.logits_after": "theirs leaves noise in the logits",
    "dcmoe_router:overflow.": "theirs takes more experts than there are",
    "unimoe_audio_router:overflow.": "the same",
    "codec_delay:pad": "no code here is padding",
    "speech_connector:decoder.embed_tokens.weight": "never run",
}
ROUTED = "dynamic_real_moe.deepspeed_moe.experts.deepspeed_experts"


# ---- encoders and connectors ----


def test_image_connector(recording: Recording) -> None:
    file, sizes = "vision_connector", recording.config["v1"]["clip"]
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
    tower.load_state_dict(recording.take_all(file, "tower.vision_model."))
    weights = recording.take_all(file, "projector.")
    connector = projector("mlp2x_gelu", sizes["hidden_size"], len(weights["2.bias"]))
    connector.load_state_dict(weights)
    with torch.no_grad():
        states = tower(recording.take(file, "pixel_values"), output_hidden_states=True).hidden_states
        selected = states[-2][:, 1:]
        recording.check(file, "n_hidden_states", torch.tensor(len(states)))
        recording.check(file, "selected", selected)
        recording.check(file, "projected", connector(selected))


def test_speech_connector(recording: Recording) -> None:
    file, config = "speech_connector", WhisperConfig(**recording.config["v1"]["whisper"], pad_token_id=0)
    encoder = WhisperEncoder(config).eval()
    encoder.load_state_dict(recording.take_all(file, "encoder."))
    queries = recording.take(file, "query_tokens")[0]
    projection = recording.take_all(file, "projector.")
    resampler = WhisperResampler(config, len(queries), len(projection["bias"])).eval()
    decoder = recording.take_all(file, "decoder.")
    del decoder["embed_tokens.weight"]
    state = {f"decoder.{name}": value for name, value in decoder.items()}
    state |= {f"projector.{name}": value for name, value in projection.items()}
    resampler.load_state_dict({"queries": queries, **state})
    with torch.no_grad():
        features = encoder(recording.take(file, "input_features")).last_hidden_state
        recording.check(file, "encoder_output", features)
        read = resampler.read(queries.expand(len(features), -1, -1), features)
        recording.check(file, "decoder_output", read)
        recording.check(file, "aligned", resampler(features))


def test_audio_connector(recording: Recording) -> None:
    file, theirs = "audio_connector", recording.config["v1"]["beats"]
    config = BEATsConfig(
        patch_size=theirs["input_patch_size"],
        embed_dim=theirs["embed_dim"],
        width=theirs["encoder_embed_dim"],
        ffn_dim=theirs["encoder_ffn_embed_dim"],
        layers=theirs["encoder_layers"],
        heads=theirs["encoder_attention_heads"],
        conv_pos=theirs["conv_pos"],
        conv_pos_groups=theirs["conv_pos_groups"],
        buckets=theirs["num_buckets"],
        max_distance=theirs["max_distance"],
    )
    encoder = BEATs(config).eval()
    encoder.load_state_dict(beats.from_original(recording.take_all(file, "beats.")))
    waveform, padding = recording.take(file, "waveform"), recording.take(file, "sample_padding_mask").bool()
    mels = beats.log_mels(waveform)
    fbank = recording.take(file, "fbank")
    whole = torch.tensor([int((~row).sum()) // 160 - 3 for row in padding])  # frames without a padding sample
    for row, count in enumerate(whole):
        torch.testing.assert_close(mels[row, :count], fbank[row, :count], atol=1e-4, rtol=1e-4)
    recording.compared.add(f"{file}:fbank")
    queries, projection = recording.take(file, "query_tokens")[0], recording.take_all(file, "projector.")
    sizes = {**recording.config["v1"]["qf"], "hidden_size": queries.shape[1], "encoder_hidden_size": config.width}
    resampler = QFormerResampler(Blip2QFormerConfig(**sizes), len(queries), len(projection["bias"])).eval()
    state = {f"qformer.{name}": value for name, value in recording.take_all(file, "qformer.").items()}
    state |= {f"projector.{name}": value for name, value in projection.items()}
    resampler.load_state_dict({"queries": queries, **state})
    with torch.no_grad():
        recording.check(file, "encoder_output_nomask", encoder(fbank), tolerance=1e-4)
        features = encoder(fbank, padding)
        recording.check(file, "encoder_output", features, tolerance=1e-4)
        masked = beats.reduce_mask(beats.reduce_mask(padding, fbank.shape[1]), features.shape[1])
        recording.check(file, "patch_padding_mask", masked)
        expected = recording.take(file, "encoder_output")
        read = resampler.read(queries.expand(len(expected), -1, -1), expected)
        recording.check(file, "qformer_output", read)
        recording.check(file, "aligned", resampler(expected))


# ---- the splice ----

IMAGE, SOUND, VIDEO = -200, -300, -400


def blocks(recording: Recording, file: str, sound: str) -> dict[int, list[list[Tensor]]]:
    """Features of each sample by placeholder: images and videos where a row has one, sounds clip by clip."""
    found = {}
    for placeholder, kind in ((IMAGE, "image"), (VIDEO, "video")):
        there = recording.take(file, f"{kind}_mask").bool()
        rows = recording.take(file, f"{kind}_embeds")
        found[placeholder] = [[row] if one else [] for row, one in zip(rows, there, strict=True)]
    numbers = recording.take(file, "features_mask")
    rows = recording.take(file, f"{sound}_embeds")
    found[SOUND] = [clips(row, told) for row, told in zip(rows, numbers, strict=True)]
    return found


@pytest.mark.parametrize(("file", "sound"), [("splice_audio", "audio"), ("e2e_speech", "speech")])
def test_splice(recording: Recording, file: str, sound: str) -> None:
    table = recording.take(file, "embed_tokens" if file == "splice_audio" else "weight.model.embed_tokens.weight")
    found = splice(
        recording.take(file, "input_ids"),
        lambda ids: torch.nn.functional.embedding(ids, table),
        blocks(recording, file, sound),
        recording.take(file, "attention_mask"),
        recording.take(file, "labels"),
    )
    recording.check(file, "out_embeds", found.embeds)
    recording.check(file, "out_attention_mask", found.mask)
    recording.check(file, "out_labels", found.labels)


# ---- text, order of samples, codes of sound ----


class Toy:
    """The tokenizer of the recorded texts: </s> is 2, any other sign its number plus 10."""

    bos_token_id = 1

    def __call__(self, text: str, **options: bool) -> dict[str, list]:
        spans = [match.span() for match in re.finditer("</s>|.", text, re.DOTALL)]
        ids = [2 if end - begin == 4 else ord(text[begin]) + 10 for begin, end in spans]
        return {"input_ids": ids, "offset_mapping": spans}


def test_text(recording: Recording) -> None:
    told = recording.json("text")
    words = {"<image>": IMAGE, "<audio>": SOUND, "<video>": VIDEO}
    for one in told["prompts"]:
        assert encode(Toy(), [(one["prompt"], False)], words)[0] == one["input_ids"]
    turns = [turn["value"] for turn in told["training"]["conversation"]]
    assert VICUNA.prompt(turns) == told["training"]["prompt"]
    ids, labels = encode(Toy(), VICUNA.parts(turns), words)
    assert (ids, labels) == (told["training"]["input_ids"], told["training"]["labels"])
    assert VICUNA.prompt(["<image>\nQ"], reply=True) == told["generation_prompt"]


def test_order_of_samples(recording: Recording) -> None:
    file = "modality_sampler"
    types, lengths = (recording.take(file, name).tolist() for name in ("types", "lengths"))
    sizes = (int(recording.take(file, name)) for name in ("batch_size", "world_size"))
    order = torch.Generator().manual_seed(int(recording.take(file, "torch_manual_seed")))
    steps = grouped_batches(types, lengths, *sizes, order, drop_last=True)
    recording.check(file, "indices", torch.tensor([sample for step in steps for part in step for sample in part]))


def test_codes_of_sound(recording: Recording) -> None:
    file = "codec_delay"
    codes, bos = recording.take(file, "codes"), int(recording.take(file, "bos"))
    delays = recording.take(file, "delay_pattern").tolist()
    late = codec.delayed(codes, delays, bos)
    recording.check(file, "delayed", late)
    again = codec.undelayed(late, delays)
    assert torch.equal(again, codes[:, : again.shape[1]])
    assert torch.equal(again, recording.files[file]["reverted"][:, : again.shape[1]])
    recording.compared.add(f"{file}:reverted")
    known, steps = codec.prefill([recording.take(file, "prompt0"), None], delays, bos)
    recording.check(file, "prefill_delayed", known)
    recording.check(file, "prefill_steps", steps)


# ---- layers of the first version and of the one with 8 experts ----


def test_layer(recording: Recording) -> None:
    file = "moe_layer_v1"
    sizes = recording.config["v1"]["moe"]
    experts = GatedFFNExperts(sizes["hidden"], sizes["inter"], sizes["E"])
    moe = MoE(TopKRouter(sizes["hidden"], sizes["E"], top_k=sizes["k"], weights="softmax_topk"), experts)
    weights = recording.take_all(file, "weight.")
    state = {f"experts.{name}": value for name, value in packed(weights, "experts", sizes["E"]).items()}
    moe.load_state_dict({"router.weight": weights["gate.weight"], **state})
    x, routing, out = run_layer(recording, file, moe)
    check_layer(recording, file, moe, x, routing, out, (out * recording.take(file, "upstream")).sum())
    for expert in range(sizes["E"]):
        gate_up = dict(zip(("gate", "up"), experts.gate_up_proj.grad[expert].chunk(2), strict=True))
        for kind, grad in {**gate_up, "down": experts.down_proj.grad[expert]}.items():
            recording.check(file, f"grad.experts.{expert}.{kind}_proj.weight", grad)


def test_layer_of_8_experts(recording: Recording) -> None:
    file = "moe_layer_8e"
    sizes = recording.config["v2"]["moe8"]
    weights = recording.take_all(file, "weight.")
    rank = len(weights["experts.0.down_proj_lora_A.weight"])
    alpha = float(recording.take(file, "lora_scaling")) * rank
    experts = LoRAGatedFFNExperts(sizes["hidden"], sizes["inter"], sizes["E"], rank=rank, alpha=alpha)
    moe = MoE(TopKRouter(sizes["hidden"], sizes["E"], top_k=sizes["k"], weights="softmax_topk"), experts)

    def stack(name: str) -> Tensor:
        return torch.stack([weights[f"experts.{expert}.{name}.weight"] for expert in range(sizes["E"])])

    state = packed(weights, "experts", sizes["E"])
    state |= {"gate_up_a": torch.cat([stack("gate_proj_lora_A"), stack("up_proj_lora_A")], 1)}
    state |= {f"{kind}_b": stack(f"{kind}_proj_lora_B") for kind in ("gate", "up", "down")}
    state |= {"down_a": stack("down_proj_lora_A")}
    named = {f"experts.{name}": value for name, value in state.items()}
    moe.load_state_dict({"router.weight": weights["gate.weight"], **named})
    x, routing, out = run_layer(recording, file, moe)
    l_aux = balance_loss(routing, choices="first")
    recording.check(file, "l_aux", l_aux)
    loss = (out * recording.take(file, "upstream")).sum() + 0.5 * l_aux
    check_layer(recording, file, moe, x, routing, out, loss)
    for expert in range(sizes["E"]):
        gate_a, up_a = experts.gate_up_a.grad[expert].chunk(2)
        found = {"gate_proj_lora_A": gate_a, "up_proj_lora_A": up_a, "down_proj_lora_A": experts.down_a.grad[expert]}
        found |= {f"{kind}_proj_lora_B": getattr(experts, f"{kind}_b").grad[expert] for kind in ("gate", "up", "down")}
        for name, grad in found.items():
            recording.check(file, f"grad.experts.{expert}.{name}.weight", grad)
    merged = MoE(moe.router, experts.merged())
    torch.testing.assert_close(merged(x), out, atol=1e-5, rtol=1e-4)


def run_layer(recording: Recording, file: str, moe: MoE) -> tuple[Tensor, Routing, Tensor]:
    x = recording.take(file, "input").clone().requires_grad_()
    with mmoe.trace(moe) as trace:
        out = moe(x)
    return x, trace[0], out


def check_layer(
    recording: Recording, file: str, moe: MoE, x: Tensor, routing: Routing, out: Tensor, loss: Tensor
) -> None:
    loss.backward()
    found = {"output": out, "loss": loss, "router_logits": routing.logits, "topk_indices": routing.experts}
    found |= {"topk_weights": routing.weights, "grad.input": x.grad, "grad.gate.weight": moe.router.weight.grad}
    for name, value in found.items():
        recording.check(file, name, value)


@pytest.mark.parametrize("case", ["nodrop_det", "nodrop_sample", "drop_det"])
def test_gate_of_8_experts(recording: Recording, case: str) -> None:
    file = "gate_top2_8e"
    logits = recording.take(file, "logits")
    router = GShardRouter(4, logits.shape[1], capacity_factor=1.0 if case.startswith("drop") else None)
    routing = router.choose(logits, noise=recording.take(file, "noise") if "sample" in case else None)
    recording.check(file, f"{case}.token_expert_weight", routing.dense_weights())
    recording.check(file, f"{case}.expert_counts", (routing.undropped or routing).counts())
    recording.check(file, f"{case}.l_aux", routing.losses["balance"])
    if "sample" not in case:  # where theirs leaves the noise in the logits
        recording.check(file, f"{case}.logits_after", routing.logits)


def test_losses_of_8_experts(recording: Recording) -> None:
    file, told = "aux_losses_8e", recording.config["aux_losses_8e"]
    logits = recording.take(file, "gate_logits").clone().requires_grad_()
    modality = torch.zeros(told["B"], told["T"], dtype=torch.long)
    numbers = {"image": losses.IMAGE, "audio": losses.SPEECH, "video": losses.VIDEO}
    for name, number in numbers.items():
        for sample, spans in enumerate(told["spans"][name]):
            for begin, end in spans:
                modality[sample, begin:end] = number
    nothing = torch.zeros(told["B"] * told["T"], 1)
    routings = [
        Routing(experts=nothing.long(), weights=nothing, num_experts=told["E"], logits=layer) for layer in logits
    ]
    experts = {number: told[f"{name}_expert_indices"] for name, number in numbers.items()}
    hidden, head = recording.take(file, "hidden"), recording.take(file, "lm_head")
    shifted = (hidden @ head.t())[:, :-1].flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(shifted, recording.take(file, "labels")[:, 1:].flatten())
    parts = {
        "balance": told["aux_balance_loss_coef"] * recording.take(file, "layer_l_aux").sum(),
        "multimodal": told["aux_multimodal_loss_coef"] * losses.modality_loss(routings, modality, experts),
        "kl": told["aux_kl_loss_coef"] * losses.divergence_loss(routings, modality),
    }
    recording.check(file, "loss.ce", plain)
    for name, value in parts.items():
        recording.check(file, f"loss.{name}", plain + value)
    whole = plain + sum(parts.values())
    recording.check(file, "loss.all", whole)
    whole.backward()
    recording.check(file, "grad.gate_logits", logits.grad)


# ---- the language model ----


def build_llm(recording: Recording, weights: dict[str, Tensor], layers: list[int]) -> LlamaForCausalLM:
    sizes = recording.config["v1"]["llm"]
    options = {name: value for name, value in sizes.items() if not name.startswith("num_experts")}
    model = LlamaForCausalLM(LlamaConfig(**options)).eval()
    add_mixtures(
        model, layers, sizes["num_experts"], top_k=sizes["num_experts_per_tok"], router="topk:weights=softmax_topk"
    )
    state = {name: value for name, value in weights.items() if ".mlp.experts." not in name}
    state = {name.replace(".mlp.gate.weight", ".mlp.router.weight"): value for name, value in state.items()}
    for layer in layers:
        place = f"model.layers.{layer}.mlp.experts"
        for name, value in packed(weights, place, sizes["num_experts"]).items():
            state[f"{place}.{name}"] = value
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("file", ["llama_moe_speech", "llama_moe_audio"])
def test_language_model(recording: Recording, file: str) -> None:
    depth = recording.config["v1"]["llm"]["num_hidden_layers"]
    layers = chosen_layers("all" if file.endswith("speech") else "even", depth)
    recording.check(file, "moe_layers", torch.tensor([int(layer in layers) for layer in range(depth)]))
    model = build_llm(recording, recording.take_all(file, "weight."), layers)
    embeds = recording.take(file, "inputs_embeds").clone().requires_grad_()
    with mmoe.trace(model) as trace:
        out = model(
            inputs_embeds=embeds,
            attention_mask=recording.take(file, "attention_mask"),
            labels=recording.take(file, "labels"),
            output_hidden_states=True,
        )
    out.loss.backward()
    recording.check(file, "loss", out.loss)
    recording.check(file, "logits", out.logits)
    recording.check(file, "grad.inputs_embeds", embeds.grad)
    for number, states in enumerate(out.hidden_states):
        recording.check(file, f"hidden_state.{number}", states)
    assert [*mixtures_of(model)] == layers
    for routing, (layer, moe) in zip(trace, mixtures_of(model).items(), strict=True):
        recording.check(file, f"router_logits.layer{layer}", routing.logits)
        recording.check(file, f"grad.model.layers.{layer}.mlp.gate.weight", moe.router.weight.grad)


# ---- the whole model ----


def build_model(recording: Recording) -> UniMoE:
    v1 = recording.config["v1"]
    llm, clip, whisper = v1["llm"], v1["clip"], v1["whisper"]
    config = UniMoEConfig(
        vocab_size=llm["vocab_size"],
        width=llm["hidden_size"],
        layers=llm["num_hidden_layers"],
        heads=llm["num_attention_heads"],
        kv_heads=llm["num_key_value_heads"],
        ffn_dim=llm["intermediate_size"],
        positions=llm["max_position_embeddings"],
        norm_eps=llm["rms_norm_eps"],
        num_experts=llm["num_experts"],
        top_k=llm["num_experts_per_tok"],
        vision={
            "width": clip["hidden_size"],
            "layers": clip["num_hidden_layers"],
            "heads": clip["num_attention_heads"],
            "ffn_dim": clip["intermediate_size"],
            "image_size": clip["image_size"],
            "patch_size": clip["patch_size"],
        },
        speech={
            "width": whisper["d_model"],
            "layers": whisper["encoder_layers"],
            "heads": whisper["encoder_attention_heads"],
            "ffn_dim": whisper["encoder_ffn_dim"],
            "resampler_layers": whisper["decoder_layers"],
            "mels": whisper["num_mel_bins"],
            "positions": whisper["max_source_positions"],
            "words": whisper["max_target_positions"],
        },
        sound=None,
        queries=v1["queries"],
        route_padding=True,
    )
    model = UniMoE(config).eval()
    theirs = recording.take_all("e2e_speech", "weight.")
    images, sounds = "model.vision_tower.vision_tower.", "model.audio_tower.audio_tower."
    theirs |= {images + n: v for n, v in recording.take_all("vision_connector", "tower.").items()}
    theirs |= {sounds + n: v for n, v in recording.take_all("speech_connector", "encoder.").items()}
    model.load_state_dict(convert_names(theirs))
    return model


def media(recording: Recording, rows: slice = slice(None)) -> dict[str, Any]:
    file = "e2e_speech"
    there = {kind: recording.take(file, f"{kind}_mask").bool()[rows] for kind in ("image", "video")}
    numbers = recording.take(file, "features_mask")[rows]
    counts = [torch.unique_consecutive(row[row > 0], return_counts=True)[1] for row in numbers]
    return {
        "images": recording.take(file, "images")[rows][there["image"]],
        "videos": recording.take(file, "videos")[rows][there["video"]],
        "speech": recording.take(file, "input_features")[rows][numbers > 0],
        "speech_chunks": torch.cat(counts).tolist(),
    }


def test_whole_model(recording: Recording) -> None:
    file, model = "e2e_speech", build_model(recording)
    with torch.no_grad():
        recording.check(file, "image_embeds", model.vision(recording.take(file, "images")))
        recording.check(file, "video_embeds", model.vision.of_videos(recording.take(file, "videos")))
        chunks = recording.take(file, "input_features")
        recording.check(file, "speech_embeds", model.speech(chunks.flatten(0, 1)).unflatten(0, chunks.shape[:2]))
    told = [recording.take(file, name) for name in ("input_ids", "attention_mask", "labels")]
    out = model(*told, **media(recording))
    recording.check(file, "out_embeds", out.spliced.embeds)
    recording.check(file, "out_attention_mask", out.spliced.mask)
    recording.check(file, "out_labels", out.spliced.labels)
    recording.check(file, "logits", out.logits, tolerance=2e-5)
    recording.check(file, "loss", out.loss)
    out.loss.backward()
    grads = to_original({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name in recording.files[file]:
        if name.startswith("grad."):
            recording.check(file, name, grads[name.removeprefix("grad.")])


def test_inference(recording: Recording) -> None:
    file, model = "e2e_speech_infer", build_model(recording)
    with torch.no_grad():
        out = model(recording.take(file, "input_ids"), **media(recording, slice(0, 1)))
    recording.check(file, "out_embeds", out.spliced.embeds)
    recording.check(file, "logits", out.logits, tolerance=2e-5)


# ---- the dynamic-capacity block ----


def packed(weights: dict[str, Tensor], place: str, count: int) -> dict[str, Tensor]:
    """Experts of the authors' layout as packed ones."""
    ffns = [{name: weights[f"{place}.{number}.{name}.weight"] for name in PROJECTIONS} for number in range(count)]
    return pack_ffns(ffns)


def build_block(recording: Recording, file: str, case: str) -> MoE:
    sizes, common = recording.config["v2"]["dc"], recording.config["v2"]["dc_common"]
    real, null, shared = (sizes[f"mlp_{kind}_expert_num"] for kind in ("dynamic", "dynamic_null", "fixed"))
    dim, count = sizes["hidden_size"], real + null + shared
    router = DynamicRouter(
        dim,
        count,
        num_null=null,
        num_shared=shared,
        top_p=None if case == "topk" else sizes["mlp_dynamic_top_p"],
        top_k=sizes["mlp_dynamic_top_k"],
        eps=common["router_jitter_noise"],
        drop={"drop_probs": "probs", "drop_position": "position"}.get(case),
        capacity_factor=recording.config[f"{file.removesuffix('_block')}.{case}.capacity_factor"],
        min_capacity=common["min_capacity"],
        padding_as_released=True,
    )
    widths = sizes["dynamic_intermediate_size"], sizes["shared_intermediate_size"]
    options = {"num_null": null, "num_shared": shared, "shared_dim": widths[1], "real": "gated_ffn"}
    block = MoE(router, WithNullExperts(dim, widths[0], count, **options))
    weights = recording.take_all(file, "weight.")
    state = {"router.weight": weights["gate.weight"]}
    state |= {f"experts.real.{name}": value for name, value in packed(weights, ROUTED, real).items()}
    state |= {f"experts.side.{name}": value for name, value in packed(weights, "fixed_real_moe", shared).items()}
    block.load_state_dict(state)
    return block.train("train" in case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("file", BLOCKS)
def test_dynamic_block(recording: Recording, file: str, case: str) -> None:
    block = build_block(recording, file, case)
    x = recording.take(file, "input").clone().requires_grad_()
    context = Context(valid=None if case == "nomask" else recording.take(file, "attention_mask").bool())
    if case == "train_weighted":
        context.row_weights = recording.take(file, "aux_balance_weight").float()
    with mmoe.trace(block) as trace:
        out = block(x, context)
    (routing,) = trace
    loss = (out * recording.take(file, "upstream")).sum() + 0.025 * routing.losses["balance"]
    loss.backward()
    block.router.drop = None
    alone = block.router(x.detach().flatten(0, 1))
    recording.check(file, f"{case}.dynamic_top_k", alone.n_used() - block.router.num_shared)
    used = torch.nn.functional.one_hot(routing.experts, block.num_experts + 1).sum(1)[:, :-1]
    found = {
        "output": out,
        "loss": loss,
        "aux_loss": routing.losses["balance"],
        "router_logits": routing.logits,
        "expert_mask": used,
        "global_weight": routing.dense_weights(),
        "grad.input": x.grad,
        "grad.gate": block.router.weight.grad,
    }
    for name, value in found.items():
        recording.check(file, f"{case}.{name}", value)


@pytest.mark.parametrize("file", ROUTERS)
def test_choice_of_experts(recording: Recording, file: str) -> None:
    logits = recording.take(file, "logits")
    experts, weights = sparse_mixer(logits, 0.01)
    picks = recording.files[file]["selected"].shape[1]
    recording.check(file, "selected", experts[:, :picks])
    recording.check(file, "multiplier", weights[:, :picks])
    for name in recording.files[file]:
        if name.startswith("num_experts.top_p_"):
            router = DynamicRouter(8, logits.shape[1], top_p=float(name.rpartition("_")[2]))
            recording.check(file, name, router.select(logits).n_used())
    everything = DynamicRouter(8, logits.shape[1], top_p=1.0).select(logits).n_used()
    assert (everything <= logits.shape[1]).all() and (everything > 0).all()


def test_exploring_choice_of_experts(recording: Recording) -> None:
    file = "unimoe_audio_router"
    logits = recording.take(file, "logits").clone().requires_grad_()
    noise, chance = (recording.take(file, f"train.{name}") for name in ("gumbel", "uniform"))
    eps = float(recording.take(file, "train.jitter_eps"))
    experts, weights = explore(logits, len(noise), eps, noise, chance)
    recording.check(file, "train.selected", experts)
    recording.check(file, "train.multiplier", weights)
    (weights * recording.take(file, "train.upstream")).sum().backward()
    recording.check(file, "train.grad.logits", logits.grad)


def test_nothing_was_left_out(recording: Recording, whole_module: None) -> None:
    known = [name for name in recording.untouched() if not name.startswith(tuple(LEFT_OUT))]
    assert known == []
    assert {*recording.files, "text"} == {name.split(":")[0] for name in recording.compared}
