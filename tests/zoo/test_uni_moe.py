"""Uni-MoE: media in the place of their words, generation with a cache, and checkpoints of the authors."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor

import mmoe
import zoo
from mmoe.errors import BadInput, BadOverride, CorruptFile, LoadMismatch, Refused
from zoo import routes
from zoo.hosts.beats import log_mels
from zoo.hosts.decoder import mixtures_of
from zoo.uni_moe.config import MODALITIES, UniMoEConfig
from zoo.uni_moe.convert import convert_names, from_original, to_original
from zoo.uni_moe.model import PLACEHOLDERS, UniMoE
from zoo.views import TokenView

SIZES: dict[str, Any] = {"vocab_size": 60, "width": 32, "layers": 3, "heads": 4, "ffn_dim": 48, "positions": 128}
SIZES |= {"num_experts": 3, "queries": 4}
VISION = {"width": 16, "layers": 2, "heads": 2, "ffn_dim": 24, "image_size": 28, "patch_size": 14}
SPEECH = {
    "width": 16,
    "layers": 1,
    "heads": 2,
    "ffn_dim": 24,
    "resampler_layers": 1,
    "mels": 80,
    "positions": 20,
    "words": 8,
}
SOUND = {"embed_dim": 8, "width": 16, "ffn_dim": 24, "layers": 1, "heads": 2, "conv_pos": 8, "conv_pos_groups": 4}
SOUND |= {"buckets": 16, "max_distance": 40, "resampler_width": 16, "resampler_layers": 2, "resampler_heads": 2}
SOUND |= {"resampler_ffn_dim": 24}
IMAGE, SPOKEN, VIDEO, HEARD = PLACEHOLDERS.values()


@pytest.fixture(autouse=True)
def _two_cards() -> None:
    """The family's own cards, where the folder's fixture leaves two of another one."""


def build(**options: Any) -> UniMoE:
    torch.manual_seed(0)
    return UniMoE(UniMoEConfig(**{**SIZES, "vision": VISION, "speech": SPEECH, "sound": SOUND, **options})).eval()


@pytest.fixture
def model() -> UniMoE:
    return build()


@pytest.fixture
def media() -> dict[str, Any]:
    """One of each for ["<image> <speech>", "<sound> <video>"], with two chunks of speech."""
    return {
        "images": torch.randn(1, 3, 28, 28),
        "speech": torch.randn(2, 80, 40),
        "speech_chunks": [2],
        "sounds": log_mels(torch.randn(1, 16_000)),
        "videos": [torch.randn(3, 3, 28, 28)],
    }


IDS = torch.tensor([[5, IMAGE, 6, SPOKEN, 7], [8, HEARD, 9, VIDEO, 10]])


def test_one_model_reads_all_modalities(model: UniMoE, media: dict[str, Any]) -> None:
    with mmoe.trace(model) as routing:
        out = model(IDS, labels=IDS, **media)
    kinds = out.spliced.modality
    assert kinds[0].tolist() == [0, *[1] * 4, 0, *[2] * 8, 0] and kinds[1].tolist() == [
        0,
        *[4] * 4,
        0,
        *[3] * 4,
        0,
        *[-1] * 4,
    ]
    assert out.logits.shape == (2, 15, 60) and out.loss.isfinite()
    assert routing[0].context.modality.tolist() == kinds.flatten().tolist()
    assert (routing[0].n_used()[kinds.flatten() == -1] == 0).all(), "padding is not routed"


def test_a_branch_alone_gives_what_the_whole_model_gives(model: UniMoE, media: dict[str, Any]) -> None:
    one = build(vision=None, sound=None)
    own = one.state_dict().keys()
    one.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})
    ids = torch.tensor([[5, SPOKEN, 7]])
    given = {name: media[name] for name in ("speech", "speech_chunks")}
    torch.testing.assert_close(one(ids, **given).logits, model(ids, **given).logits)
    with pytest.raises(BadInput, match="give vision to this uni_moe\n  it was built without that branch"):
        one(torch.tensor([[IMAGE]]), images=media["images"])


def test_a_video_is_the_mean_of_its_frames(model: UniMoE) -> None:
    frames = torch.randn(5, 3, 28, 28)
    torch.testing.assert_close(model.vision_of(frames), model.vision(frames).mean(0))
    still = frames[:1].expand(4, -1, -1, -1)
    torch.testing.assert_close(model.vision_of(still), model.vision(frames[:1])[0], atol=1e-5, rtol=1e-4)


def test_padding_on_either_side_changes_nothing(model: UniMoE, media: dict[str, Any]) -> None:
    given = {"images": media["images"]}
    alone = model(torch.tensor([[5, IMAGE, 7]]), **given).logits[0]
    right = model(
        torch.tensor([[5, IMAGE, 7, 0, 0], [1, 2, 3, 4, 5]]), torch.tensor([[1, 1, 1, 0, 0], [1] * 5]), **given
    )
    left = model(
        torch.tensor([[0, 0, 5, IMAGE, 7], [1, 2, 3, 4, 5]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), **given
    )
    for out in (right, left):
        torch.testing.assert_close(out.logits[0][out.spliced.mask[0]], alone, atol=1e-5, rtol=1e-4)


def test_generation_goes_on_with_a_cache(model: UniMoE, media: dict[str, Any]) -> None:
    ids, given = torch.tensor([[5, IMAGE, 7]]), {"images": media["images"]}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 59}
    made = model.generate(ids, media=given, **options)
    again = ids
    for _ in range(made.shape[1]):
        with torch.no_grad():
            best = model(again, **given).logits[:, -1].argmax(-1, keepdim=True)
        again = torch.cat([again, best], 1)
    assert made.tolist() == again[:, 3:].tolist()
    calls = []
    model.vision.register_forward_hook(lambda *_: calls.append(1))
    model.generate(ids, media=given, **options)
    assert len(calls) == 1, "encoded once"
    rows = torch.tensor([[5, IMAGE, 7], [0, 5, 7]])
    batch = model.generate(rows, torch.tensor([[1, 1, 1], [0, 1, 1]]), media=given, **options)
    assert batch[0].tolist() == made[0].tolist()
    assert batch[1].tolist() == model.generate(torch.tensor([[5, 7]]), **options)[0].tolist()


def test_encoders_are_frozen_and_connectors_learn(model: UniMoE, media: dict[str, Any]) -> None:
    model(IDS, labels=IDS.clamp(min=0), **media).loss.backward()
    grads = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert not any(".encoder." in name and "qformer" not in name for name in grads)
    for name in ("vision.projector.0.weight", "speech.resampler.queries", "sound.resampler.queries"):
        assert name in grads
    assert "llm.model.layers.0.mlp.router.weight" in grads


def test_the_balance_loss_counts_where_its_coefficient_is_above_0(media: dict[str, Any]) -> None:
    plain, balanced = build(), build(balance_coef=0.5)
    balanced.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 60, (2, 9))
    a, b = plain(ids, labels=ids), balanced(ids, labels=ids)
    torch.testing.assert_close(b.loss, a.loss + 0.5 * b.losses["balance"])


def test_a_router_with_a_balance_loss_of_its_own_is_trained_with_it() -> None:
    router = {"name": "dynamic", "num_null": 1, "num_shared": 1, "drop": "probs", "min_capacity": 1}
    experts = {"name": "with_null", "num_null": 1, "num_shared": 1, "real": "gated_ffn"}
    model = build(balance_coef=0.5, num_experts=5, router=router, experts=experts)
    ids, weights = torch.randint(0, 60, (2, 9)), torch.rand(2, 9)
    for context in (mmoe.Context(), mmoe.Context(row_weights=weights)):
        with mmoe.with_context(model.llm, context), mmoe.trace(model) as routing:
            found = model(ids, labels=ids).losses["balance"]
        torch.testing.assert_close(found, torch.stack([one.losses["balance"] for one in routing]).mean())
    assert routing[0].context.row_weights is not None, "rows weigh"


def test_facts_say_where_active_parameters_are_an_upper_bound() -> None:
    moe, few = build(router="dynamic").facts()["moe"], build(router="dynamic:top_p=none").facts()["moe"]
    assert (moe["at_most"], moe["top_k"]) == (True, 3) and "at_most" not in few and few["top_k"] == 2


def test_a_router_by_modality_has_a_layer_for_each(media: dict[str, Any]) -> None:
    model = build(router="by_modality")
    assert all(len(moe.router.modality_weight) == len(MODALITIES) for moe in mixtures_of(model.llm).values())
    with mmoe.trace(model) as before:
        kinds = model(IDS, **media).spliced.modality.flatten()
    with torch.no_grad():
        mixtures_of(model.llm)[0].router.modality_weight[4].neg_()
    with mmoe.trace(model) as after:
        model(IDS, **media)
    moved = (before[0].logits != after[0].logits).any(-1)
    assert moved[kinds == 4].all() and not moved[kinds != 4].any(), "sounds do not share the layer of text"
    assert build(router="by_modality:modalities=4", sound=None).config.gate["modalities"] == 4
    with pytest.raises(BadOverride, match=r"modalities=4\n  sound is modality 4 \(from 0\) and would share"):
        build(router="by_modality:modalities=4")


def test_losses_of_modalities(media: dict[str, Any]) -> None:
    plain = build()
    options = {"modality_coef": 0.5, "modality_experts": {"image": [0]}, "divergence_coef": 0.25}
    tied = build(**options)
    tied.load_state_dict(plain.state_dict())
    a, b = (model(IDS, labels=IDS.clamp(min=0), **media) for model in (plain, tied))
    assert b.losses.keys() == {"next_token", "modality", "divergence"}
    torch.testing.assert_close(b.loss, a.loss + 0.5 * b.losses["modality"] + 0.25 * b.losses["divergence"])
    optimizer = torch.optim.SGD([p for n, p in tied.named_parameters() if "router" in n], lr=3.0)

    def share() -> float:
        with mmoe.trace(tied) as routing:
            kinds = tied(IDS, **media).spliced.modality.flatten()
        return routing[0].logits.softmax(-1)[kinds == 1, 0].mean().item()

    before = share()
    for _ in range(10):
        optimizer.zero_grad()
        tied(IDS, labels=IDS.clamp(min=0), **media).losses["modality"].backward()
        optimizer.step()
    assert share() > before + 0.1, "tokens of images go to their expert"


@pytest.mark.parametrize(
    ("ids", "given", "told"),
    [
        ([[5, IMAGE]], {}, "the texts have 1 of <image>, and there are 0 to put there"),
        ([[5, 6]], {"images": torch.zeros(1, 3, 28, 28)}, "the texts have 0 of <image>, and there are 1"),
        ([[SPOKEN]], {"speech": torch.zeros(2, 80, 40)}, "the texts have 1 of <speech>, and there are 2"),
        ([[5, -7]], {}, "has placeholders -7 without features"),
    ],
)
def test_media_that_do_not_fit(model: UniMoE, ids: list[list[int]], given: dict[str, Tensor], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        model(torch.tensor(ids), **given)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"heads": 5}, "5 heads, 5 for keys, in a width of 32"),
        ({"kv_heads": 3}, "4 heads, 3 for keys"),
        ({"moe_layers": "odd"}, "moe_layers='odd'"),
        ({"vision": {"size": 3}}, "vision with 'size'"),
        ({"speech": {"layers": 0}}, "speech.layers=0"),
        ({"projector": "mlp"}, "projector='mlp'"),
        ({"num_experts": -1}, "num_experts=-1"),
        ({"modality_coef": 0.1}, "modality_coef=0.1\n  no modality has experts of its own"),
        ({"modality_experts": {"images": [0]}}, "modality_experts of 'images'\n  did you mean: image"),
        ({"modality_experts": {"image": [3]}}, "an expert of image=3"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], told: str) -> None:
    with pytest.raises(BadOverride) as error:
        build(**options)
    assert told in str(error.value)


@pytest.fixture
def talking(tmp_path: Path) -> UniMoE:
    """A model with a tokenizer of single letters."""
    letters = {sign: number for number, sign in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", *string.printable])}
    words = Tokenizer(WordLevel(letters, unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex(r"<\|im_(start|end)\|>|."), "isolated")
    words.decoder = Fuse()
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    words.save(str(tmp_path / "tokenizer.json"))
    options = {"vocab_size": len(letters), "tokenizer": str(tmp_path / "tokenizer.json"), "template": "chatml"}
    return build(**options, positions=512, speech={**SPEECH, "positions": 50})


def given() -> dict[str, Any]:
    picture = Image.new("RGB", (40, 30), (200, 30, 30))
    return {"image": picture, "video": [[picture] * 3], "speech": np.zeros(20_000), "sound": np.zeros(8_000)}


def test_media_stand_before_the_words(talking: UniMoE) -> None:
    batch = talking.preprocess("Hi", **given())
    ids = batch["input_ids"][0].tolist()
    assert [one for one in ids if one < 0] == [IMAGE, SPOKEN, VIDEO, HEARD]
    assert batch["speech"].shape == (2, 80, 100) and batch["speech_chunks"] == [2]
    own = talking.preprocess("Hi <image> there", image=given()["image"])["input_ids"][0].tolist()
    assert own.index(IMAGE) > own.index(talking.tokenizer.convert_tokens_to_ids("H"))
    out = talking(**batch)
    counts = out.spliced.modality.flatten().bincount().tolist()
    assert counts[1:] == [4, 8, 4, 4]


def test_a_reply_is_what_the_loss_counts(talking: UniMoE) -> None:
    batch = talking.preprocess(["Hi", "Ho"], reply=False)
    counted = [one for one in batch["labels"][0].tolist() if one >= 0]
    assert talking.tokenizer.decode(counted).split("<|im_end|>")[0] == "Ho"
    assert talking(**batch).loss.isfinite()


def test_it_talks(talking: UniMoE) -> None:
    reply = talking.predict("What is it?", max_new_tokens=5, **given())
    assert reply.tokens <= 5 and isinstance(str(reply), str)
    assert "".join(talking.stream("What is it?", max_new_tokens=5, **given())).strip() == reply.text
    assert talking.predict(["Hi", "Ho", "And now?"], max_new_tokens=2).tokens <= 2


def test_media_alone_are_a_question(talking: UniMoE) -> None:
    picture, spoken = given()["image"], given()["speech"]
    assert talking.predict(image=picture, max_new_tokens=4) == talking.predict(
        "What is this?", image=picture, max_new_tokens=4
    )
    assert talking.predict(audio=spoken, max_new_tokens=4) == talking.predict(
        "What is said?", speech=spoken, max_new_tokens=4
    )


def test_how_likely_replies_are(talking: UniMoE) -> None:
    replies = ["a fox", "Ho", "a"]
    found, tokens = talking.reply_likelihoods(replies, **given())
    for reply, likelihood, count in zip(replies, found, tokens, strict=True):
        batch = talking.preprocess(["What is this?", reply], **given(), reply=False)
        assert count == (batch["labels"] >= 0).sum()
        torch.testing.assert_close(likelihood, -talking(**batch).loss.detach() * count)
    with pytest.raises(BadInput, match="there are none"):
        talking.reply_likelihoods([])
    with pytest.raises(BadInput, match="'smell' is no medium"):
        talking.reply_likelihoods(["a"], smell=1)


def test_a_stream_that_is_dropped_stops_writing(talking: UniMoE) -> None:
    steps = []
    talking.llm.lm_head.register_forward_hook(lambda *_: steps.append(1))
    words = talking.stream("Hi", max_new_tokens=200)
    next(words)
    words.close()
    written = len(steps)
    assert written < 150
    assert talking.predict("Hi", max_new_tokens=1).tokens == 1 and len(steps) == written + 1, "nothing goes on"


def test_a_saved_model_talks_alone(talking: UniMoE, tmp_path: Path) -> None:
    talking.predict("Hi", max_new_tokens=1)
    told = talking.preprocessing
    assert "im_start" in told["tokenizer"]
    again = build(**{**vars(talking.config), "tokenizer": None})
    with pytest.raises(Refused, match="the model has no tokenizer"):
        again.predict("Hi")
    again.load_state_dict(talking.state_dict())
    again.preprocessing = told
    assert again.predict("Hi", max_new_tokens=4) == talking.predict("Hi", max_new_tokens=4)


def samples() -> list[dict[str, Any]]:
    told = given()
    return [
        {"image": told["image"], "text": "A red square.", "seed": 1},
        {"audio": told["speech"], "text": "Nothing."},
        {"turns": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "image": None},
        {"turns": ["<sound>\nWell?", "Silence."], "sound": told["sound"], "seed": 4},
    ]


def test_samples_of_all_kinds_are_one_batch(talking: UniMoE) -> None:
    batch = talking.training_batch(samples())
    words = [talking.tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
    assert [text.split("<|im_end|>")[0] for text in words] == ["A red square.", "Nothing.", "Ho", "Silence."]
    whole = talking(**batch)
    alone = [talking(**talking.training_batch([sample])) for sample in samples()]
    for row, one in enumerate(alone):
        there = whole.spliced.mask[row]
        torch.testing.assert_close(whole.logits[row][there], one.logits[0], atol=1e-4, rtol=1e-3)
    counts = torch.tensor([float((one.spliced.labels[0, 1:] >= 0).sum()) for one in alone])
    mean = (torch.stack([one.loss for one in alone]) * counts).sum() / counts.sum()
    torch.testing.assert_close(whole.loss, mean, atol=1e-4, rtol=1e-3)


def test_a_batch_is_put_together_before_it_goes_to_the_device(talking: UniMoE) -> None:
    talking.tokenizer  # noqa: B018  # read before the weights go
    batch = talking.to("meta").training_batch(samples())
    assert batch["input_ids"].is_meta and batch["labels"].shape == batch["input_ids"].shape


def test_it_learns_what_is_said(talking: UniMoE) -> None:
    batch = talking.training_batch(samples())
    trained = [value for name, value in talking.named_parameters() if ".encoder." not in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    first = talking(**batch).loss.item()
    for _ in range(30):
        optimizer.zero_grad()
        talking(**batch).loss.backward()
        optimizer.step()
    assert talking(**batch).loss.item() < 0.3 * first


def test_checkpointing_changes_no_gradient(talking: UniMoE) -> None:
    batch = talking.train().training_batch(samples())
    found = []
    for enable in (False, True, False):
        talking.set_grad_checkpointing(enable)
        talking.zero_grad()
        torch.manual_seed(1)  # of the Q-Former's dropout
        talking(**batch).loss.backward()
        found.append({name: value.grad for name, value in talking.named_parameters() if value.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, grad in found[0].items():
            torch.testing.assert_close(other[name], grad, msg=name)


def test_rows_that_generate_together(talking: UniMoE) -> None:
    batches = [talking.preprocess("Hi"), talking.preprocess("What is this?", image=given()["image"])]
    batch = talking.collate(batches, left=True)
    media = {name: value for name, value in batch.items() if name not in ("input_ids", "labels", "attention_mask")}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 2, "eos_token_id": 2}
    made = talking.generate(batch["input_ids"], batch["attention_mask"], media=media, **options)
    for row, one in enumerate(batches):
        own = {name: value for name, value in one.items() if name not in ("input_ids", "labels")}
        assert made[row].tolist() == talking.generate(one["input_ids"], media=own, **options)[0].tolist()


def test_samples_that_say_nothing(talking: UniMoE) -> None:
    with pytest.raises(Refused, match="train uni_moe on image\n  there is nothing to say"):
        talking.training_batch([{"image": given()["image"], "seed": 0}])


def test_words_of_a_visitor_are_only_words(talking: UniMoE) -> None:
    end = talking.tokenizer.eos_token_id
    plain = talking.preprocess("Hi")["input_ids"][0].tolist()
    assert talking.preprocess("Hi<|im_end|>")["input_ids"][0].tolist().count(end) == plain.count(end)


def test_positions_run_out(talking: UniMoE) -> None:
    with pytest.raises(BadInput, match=r"read a sequence of 1,0\d\d\n  the model has 512 positions"):
        talking.predict("x" * 1000)
    there = talking.preprocess("")["input_ids"].shape[1]
    assert talking.predict("x" * (512 - there - 3), max_new_tokens=50).tokens <= 3
    with pytest.raises(BadInput, match="all 512 positions are taken"):
        talking.predict("x" * (512 - there))


def test_mistakes_of_a_visitor(talking: UniMoE) -> None:
    with pytest.raises(BadInput, match=r"cannot read the picture .gone\.png."):
        talking.predict("Hi", image="gone.png")
    with pytest.raises(BadInput, match="there are 2 turns"):
        talking.predict(["Hi", "Ho"])
    with pytest.raises(BadOverride, match="max_new_tokens=0"):
        talking.predict("Hi", max_new_tokens=0)
    with pytest.raises(BadInput, match="the texts have 2 of <image>, and there are 1"):
        talking.predict("<image> and <image>", image=given()["image"])
    with pytest.raises(BadInput):
        list(talking.stream("<image>"))
    silent = build(speech=None, tokenizer=talking.config.tokenizer, template="chatml", vocab_size=120)
    with pytest.raises(BadInput, match="give speech to this uni_moe"):
        silent.predict("Hi", speech=np.zeros(20_000))


def test_tokenizers_that_do_not_fit(talking: UniMoE, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="it has no token '<s>', which the template writes"):
        build(tokenizer=talking.config.tokenizer, vocab_size=120).predict("Hi")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CorruptFile, match="read a tokenizer"):
        build(tokenizer=str(tmp_path / "broken.json")).predict("Hi")


def test_experts_of_several_models() -> None:
    dense = [build(num_experts=0) for _ in range(3)]
    for number, model in enumerate(dense):
        for block in model.llm.model.layers:
            torch.nn.init.constant_(block.mlp.up_proj.weight, float(number))
    mixed = UniMoE.assemble(dense, {"num_experts": 3, "moe_layers": [0, 2]})
    assert [*mixtures_of(mixed.llm)] == [0, 2]
    for moe in mixtures_of(mixed.llm).values():
        for number, expert in enumerate(moe.experts.gate_up_proj):
            assert (expert[48:] == number).all()
    own, first = mixed.state_dict(), dense[0].state_dict()
    assert all(torch.equal(own[name], first[name]) for name in own if ".mlp." not in name or ".1.mlp." in name)


def test_copies_of_one_model_compute_what_it_does(media: dict[str, Any]) -> None:
    dense = build(num_experts=0)
    mixed = UniMoE.assemble([dense] * 3, {"num_experts": 3}).eval()
    found, expected = mixed(IDS, **media), dense(IDS, **media)
    there = expected.spliced.mask
    torch.testing.assert_close(found.logits[there], expected.logits[there], atol=1e-5, rtol=1e-4)


def test_what_cannot_be_assembled() -> None:
    for models in ([build(num_experts=0)] * 2, [build()] * 3):
        with pytest.raises(Refused, match="it takes 3 models of this family"):
            UniMoE.assemble(models, {"num_experts": 3})


def theirs(model: UniMoE) -> dict[str, Tensor]:
    return to_original(model.state_dict())


def test_a_speech_model_there_and_back() -> None:
    model = build(sound=None)
    names = theirs(model)
    names |= {"model.audio_tower.encoder.conv1.bias": torch.zeros(3), "model.audio_tower.decoder.x": torch.zeros(1)}
    names |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    names |= {"model.mm_audio_aligner.decoder.audio_decoder.embed_tokens.weight": torch.zeros(1, 16)}
    assert "model.layers.0.mlp.experts.2.up_proj.weight" in names and names["model.query_tokens"].shape == (1, 4, 16)
    found = convert_names(names)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    bare = {name.replace("vision_tower.vision_model.", "vision_tower."): value for name, value in names.items()}
    assert convert_names(bare).keys() == found.keys(), "newer versions of transformers leave out a prefix"
    merged = {f"base_model.model.{name}": value for name, value in names.items()}
    assert convert_names(merged).keys() == found.keys()


def test_blocks_without_experts_keep_their_names() -> None:
    model = build(sound=None, moe_layers="even")
    names = theirs(model)
    assert "model.layers.1.mlp.gate_proj.weight" in names and "model.layers.0.mlp.gate.weight" in names
    assert convert_names(names).keys() == model.state_dict().keys()


@pytest.mark.parametrize("layers", [False, True])
def test_a_model_of_8_experts(layers: bool) -> None:
    plain = "topk:weights=softmax_topk"
    router = {"name": "by_modality", "inner": plain, "modalities": 4} if layers else plain
    model = build(num_experts=8, experts="lora_gated_ffn:rank=2", router=router, moe_layers="even", sound=None)
    for value in model.parameters():
        torch.nn.init.normal_(value)
    mixed = tuple(f"model.layers.{layer}.mlp." for layer in mixtures_of(model.llm))
    names = {name: value for name, value in theirs(model).items() if not name.startswith(mixed)}
    for layer, moe in mixtures_of(model.llm).items():
        place, own = f"model.layers.{layer}.mlp.deepspeed_moe", moe.experts
        gate = moe.router.inner if layers else moe.router
        names[f"{place}.gate.wg.weight"] = gate.weight
        for number, kind in enumerate(("text", "image", "audio", "video") if layers else ()):
            names[f"{place}.fm_{kind}.weight"] = moe.router.modality_weight[number][..., None]
            names[f"{place}.fm_{kind}.bias"] = moe.router.modality_bias[number]
        for number in range(8):
            expert = f"{place}.experts.deepspeed_experts.{number}"
            for kind, matrix, a, b in (
                ("gate", own.gate_up_proj[number, :48], own.gate_up_a[number, :2], own.gate_b[number]),
                ("up", own.gate_up_proj[number, 48:], own.gate_up_a[number, 2:], own.up_b[number]),
                ("down", own.down_proj[number], own.down_a[number], own.down_b[number]),
            ):
                names[f"{expert}.{kind}_proj.weight"] = matrix
                names |= {f"{expert}.{kind}_proj_lora_A.weight": a, f"{expert}.{kind}_proj_lora_B.weight": b}
    found = convert_names(names)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    config, state = from_original(names, like=model.config)
    again = UniMoE(config).eval()
    again.load_state_dict(state)
    torch.testing.assert_close(again(torch.tensor([[5, 6]])).logits, model(torch.tensor([[5, 6]])).logits)
    if layers:
        less = {name: value for name, value in names.items() if not name.endswith("fm_audio.bias")}
        with pytest.raises(LoadMismatch, match=r"layers\.0\.mlp has no bias of fm_audio"):
            convert_names(less)
    del names["model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.3.up_proj_lora_B.weight"]
    with pytest.raises(LoadMismatch, match=r"experts\.3 has no up_proj_lora_B"):
        convert_names(names)


@pytest.mark.parametrize(
    "options",
    [
        {"sound": None},
        {"sound": None, "moe_layers": "even", "kv_heads": 2},
        {"sound": None, "vision": None, "moe_layers": [1]},
        {"sound": None, "num_experts": 0, "projector": "linear"},
    ],
)
def test_what_tensors_show(options: dict[str, Any]) -> None:
    model = build(**options)
    config, state = from_original(theirs(model), like=replace(model.config, layers=5, vocab_size=9, num_experts=7))
    kv_heads = model.config.kv_heads or model.config.heads
    expected = replace(model.config, kv_heads=kv_heads)
    assert {**vars(config), "moe_layers": config.mixed} == {**vars(expected), "moe_layers": expected.mixed}
    again = UniMoE(config).eval()
    again.load_state_dict(state)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_an_encoder_that_is_not_there() -> None:
    names = {name: value for name, value in theirs(build(sound=None)).items() if "vision_tower" not in name}
    with pytest.raises(LoadMismatch, match="encoders may be in files of their own"):
        from_original(names)


def test_encoders_in_files_of_their_own(run: Any, tmp_path: Path) -> None:
    model = build(sound=None)
    names, encoders = theirs(model), ("vision.encoder.", "speech.encoder.")
    save_file({n: v for n, v in names.items() if "_tower." not in n}, tmp_path / "theirs.safetensors")
    base = {}
    for place in encoders:
        part = place.split(".")[0]
        base[part] = str(tmp_path / f"{part}.safetensors")
        own = {n.removeprefix(place): v for n, v in model.state_dict().items() if n.startswith(place)}
        save_file({f"encoder.{n}" if part == "speech" else n: v for n, v in own.items()}, base[part])
    options = [f"vision={VISION}", f"speech={SPEECH}", f"base={base}", "heads=4"]
    given = [word for option in options for word in ("--set", option.replace("'", '"'))]
    file, out = tmp_path / "theirs.safetensors", tmp_path / "ours"
    done = run("convert", "from-original", "uni_moe", file, *given, "--out", out)
    assert done.code == 0, done.err
    again = zoo.load(out, device="cpu")
    assert all(value.equal(model.state_dict()[name]) for name, value in again.state_dict().items())
    assert {name.split(".")[0] for name in again.load_report.from_base} == {"vision", "speech"}


def test_from_the_command_line(run: Any, tmp_path: Path) -> None:
    model = build(sound=None, moe_layers="even")
    model.save(tmp_path / "ours")
    done = run("convert", "to-original", tmp_path / "ours", "--out", tmp_path / "theirs.safetensors")
    assert done.code == 0, done.err
    done = run("convert", "from-original", "uni_moe", tmp_path / "theirs.safetensors", "--out", tmp_path / "again")
    assert done.code == 0, done.err
    again = zoo.load(tmp_path / "again", device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).logits, zoo.load(tmp_path / "ours", device="cpu")(ids).logits)
    build().save(tmp_path / "both")
    done = run("convert", "to-original", tmp_path / "both", "--out", tmp_path / "no.safetensors")
    assert done.code == 2 and "which is not exact" in done.err


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gates.weight", "model.mm_projectors.0.weight", "extra"])
def test_names_that_no_such_model_has(name: str) -> None:
    with pytest.raises(LoadMismatch, match=f"it has {name}"):
        convert_names({**theirs(build(sound=None)), name: torch.zeros(1)})


def test_an_expert_that_is_not_whole() -> None:
    names = theirs(build(sound=None))
    del names["model.layers.0.mlp.experts.1.up_proj.weight"]
    with pytest.raises(LoadMismatch, match=r"experts\.1 has no up_proj"):
        convert_names(names)


# ---- views ----


def views_by_kind(model: UniMoE, batch: dict[str, Any]) -> dict[str, list[TokenView]]:
    found: dict[str, list[TokenView]] = {}
    for view in model.views(batch):
        found.setdefault(view.modality, []).append(view)
    return found


@pytest.mark.parametrize("left", [False, True])
def test_views_find_every_modality_in_the_sequence(talking: UniMoE, left: bool) -> None:
    told = given()
    batches = [
        talking.preprocess("Hi <image> and <image>, no?", image=[told["image"]] * 2, sound=told["sound"]),
        talking.preprocess("Well, what is all of this about?", **told),
        talking.preprocess("é"),
    ]
    batch = talking.collate(batches, left=left)
    with torch.no_grad(), mmoe.trace(talking) as routing:
        kinds = talking(**batch).spliced.modality  # (B, L)
    layers = [*mixtures_of(talking.llm)]
    views = views_by_kind(talking, batch)
    assert [len(views[name]) for name in MODALITIES] == [1, 2, 1, 1, 1]
    rows = kinds.flatten()
    seen = torch.zeros_like(rows)
    for name, own in views.items():
        for view in own:
            assert view.rows == kinds.shape[1] and len(routing.select(view.layers)) == len(layers)
            for sample in view.samples(rows):
                assert set(view.of_sample(rows, sample).tolist()) == {MODALITIES.index(name)}
                seen[sample * view.rows + torch.tensor(view.places[sample])] += 1
    assert torch.equal(seen == 1, rows >= 0) and seen.max() == 1, "every place once, and no padding"
    assert [view.samples(rows) for view in views["image"]] == [[0, 1], [0]]
    assert views["speech"][0].samples(rows) == [1]
    (text,) = views["text"]
    assert "".join(text.tokens[1]).count("Well, what is all of this about?") == 1
    assert all(len(words) == len(places) for words, places in zip(text.tokens, text.places, strict=True))
    assert views["image"][0].grid == (2, 2) and views["speech"][0].about.startswith("4 tokens per 1 s")
    assert len(views["speech"][0].places[1]) == 8, "two chunks"
    assert views["sound"][0].about.startswith("4 tokens per 30 s")


def test_views_of_other_encoders(talking: UniMoE) -> None:
    branches = {"vision": {"timm": "test_efficientnet", "image_size": 96}}
    branches["speech"] = {**SPEECH, "positions": 50, "connector": "stack", "stack": 4}
    branches["sound"] = {**SOUND, "seconds": 3}
    model = build(**{**vars(talking.config), **branches})
    batch = model.preprocess("Hi", image=given()["image"], speech=given()["speech"], sound=given()["sound"])
    with torch.no_grad():
        rows = model(**batch).spliced.modality.flatten()
    views = views_by_kind(model, batch)
    for name, (view,) in views.items():
        assert set(view.of_sample(rows, 0).tolist()) == {MODALITIES.index(name)}
    assert sum(len(view.places[0]) for (view,) in views.values()) == len(rows)
    assert views["image"][0].grid == (3, 3) and batch["speech_tokens"] == [len(views["speech"][0].places[0])] == [17]
    assert views["speech"][0].about == "13 tokens per 1 s, in the order of time"
    assert views["sound"][0].about.startswith("4 tokens per 3 s, each made from the whole of it")


def test_experts_of_every_token_are_written(talking: UniMoE, tmp_path: Path) -> None:
    batch = talking.preprocess("Hi", **given())
    with torch.no_grad(), mmoe.trace(talking) as routing:
        talking(**batch)
    views = talking.views(batch)
    found = routes.token_experts(routing.joined(), views)
    layers = len(mixtures_of(talking.llm))
    assert [one["modality"] for one in found] == [name for view in views for name in [view.modality] * layers]
    for one in found:
        size = len(one["tokens"] or one["experts"])
        assert len(one["experts"]) == size and all(len(experts) == 2 for experts in one["experts"])
    picture = routes.picture_overlay(routing.joined(), views, talking.seen(given()["image"]))
    assert picture.width >= 480
    with pytest.raises(BadInput, match="no layer routes its patches"):
        alone = talking.preprocess("Hi", speech=given()["speech"])
        routes.picture_overlay(routing.joined(), talking.views(alone), talking.seen(given()["image"]))


# ---- the command line ----


@pytest.fixture
def saved(talking: UniMoE, tmp_path: Path) -> Path:
    """A folder of a model that talks, beside a picture, speech, a sound and frames."""
    talking.predict("Hi", max_new_tokens=1)
    card = replace(zoo.card("uni_moe_speech"), name="small", modalities=MODALITIES, weights={})
    talking.save(tmp_path / "saved", card=card)
    given()["image"].save(tmp_path / "a fox.png")
    (tmp_path / "frames").mkdir()
    given()["image"].save(tmp_path / "frames" / "1.png")
    soundfile.write(tmp_path / "said.wav", given()["speech"], 16_000)
    soundfile.write(tmp_path / "heard.flac", 0.1 * np.sin(np.arange(8_000)), 16_000)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_predict_asks_about_files(run: Any, saved: Path, talking: UniMoE) -> None:
    fox, said, heard = (saved / name for name in ("a fox.png", "said.wav", "heard.flac"))
    short = ["--with", "max_new_tokens=5"]
    for words, want in (
        ([fox, "What is it?"], {"text": "What is it?", "image": fox}),
        ([fox], {"image": fox}),
        (["Hello"], {"text": "Hello"}),
        ([said], {"speech": said}),
        (["--sound", heard], {"sound": heard}),
        ([fox, heard, "--sound", "What?"], {"text": "What?", "image": fox, "sound": heard}),
        ([said, "--with", f"sound={heard}"], {"speech": said, "sound": str(heard)}),
        ([saved / "frames", "Hi", "Ho", "Well?"], {"text": ["Hi", "Ho", "Well?"], "video": saved / "frames"}),
        ([fox, fox, "Both?"], {"text": "Both?", "image": [fox, fox]}),
    ):
        done = run("predict", saved / "saved", *words, *short, "--json")
        want = talking.predict(max_new_tokens=5, **want)
        assert (done.code, done.err) == (0, "")
        assert (done.json["text"], done.json["tokens"]) == (want.text, want.tokens)
    done = run("predict", saved / "saved", fox, "What is it?", *short)
    assert done.out.startswith(talking.predict("What is it?", image=fox, max_new_tokens=5).text + "\n")
    assert "llm.model.layers.2.mlp" in done.out


def test_predict_writes_experts_of_what_was_asked(run: Any, saved: Path, talking: UniMoE) -> None:
    trace, overlay, heatmap = (saved / name for name in ("t.json", "o.png", "h.png"))
    done = run(
        *("predict", saved / "saved", saved / "a fox.png", saved / "said.wav", "What?", "--with", "max_new_tokens=3"),
        *("--trace", trace, "--overlay", overlay, "--heatmap", heatmap),
    )
    assert done.code == 0 and "in one pass" in done.err
    assert Image.open(overlay).width >= 480 and heatmap.is_file()
    found = json.loads(trace.read_text())
    layers = len(mixtures_of(talking.llm))
    assert [one["modality"] for one in found["tokens"]] == [
        *["text"] * layers,
        *["image"] * layers,
        *["speech"] * layers,
    ]
    assert found["tokens"][-1]["about"].startswith("4 tokens per 1 s") and found["result"]["tokens"] <= 3
    batch = talking.preprocess("What?", image=saved / "a fox.png", speech=saved / "said.wav")
    text = found["tokens"][0]
    assert len(text["experts"]) == len(text["tokens"]) == int((batch["input_ids"] >= 0).sum())
    assert sum(len(one["experts"]) for one in found["tokens"][::layers]) == talking(**batch).logits.shape[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["T/gone.png"], "cannot read the picture 'T/gone.png'\n  no such file"),
        (["T/gone.wav"], "cannot read 'T/gone.wav'\n  there is no such file"),
        (["T/notes.txt"], "cannot show 'T/notes.txt'\n  its ending is neither of a picture nor of a recording"),
        (["T/a.mp4"], "cannot show 'T/a.mp4'\n  videos are folders of pictures"),
        (["T/a fox.png", " "], "nothing\n  a text is empty"),
        (["Hi", "Ho"], "2 texts\n  user and model take turns, and the user is the last"),
        (["Hi", "--with", "max_new_token=3"], "no input 'max_new_token' of UniMoE\n  did you mean: max_new_tokens"),
        (["Hi", "--with", "temperature=-1", "--with", "do_sample=true"], "cannot write a reply with temperature=-1"),
        (["Hi", "--with", "max_new_tokens=0"], "max_new_tokens=0"),
        (["T/said.wav", "--overlay", "T/o.png"], "cannot draw experts to 'T/o.png'\n  there is no picture"),
        (["T/a fox.png", "--out", "T/o.png"], "draws no mask"),
        (["Hi", "--with", "image=T/gone.png"], "cannot read the picture 'T/gone.png'"),
    ],
)
def test_predict_tells_what_is_wrong(run: Any, saved: Path, words: list[str], told: str) -> None:
    done = run("predict", saved / "saved", *(word.replace("T/", f"{saved}/") for word in words))
    assert done.code == 2 and told.replace("T/", f"{saved}/") in done.err


def test_predict_of_a_model_without_that_branch(run: Any, saved: Path) -> None:
    folder, said = saved / "saved", saved / "said.wav"
    text = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**text, "modalities": ["text", "image", "sound"]}))
    assert run("predict", folder, said, "--json", "--with", "max_new_tokens=2").code == 0, "recordings are sounds"
    (folder / "card.json").write_text(json.dumps({**text, "modalities": ["text", "sound"]}))
    done = run("predict", folder, saved / "a fox.png")
    assert (
        done.code == 2 and "it takes text, sound, and this is an image\n  try: mmoe list --modality image" in done.err
    )
    done = run("predict", "clip_moe_tiny", saved / "a fox.png", "a", "--sound")
    assert done.code == 2 and "clip_moe_tiny hears no recordings" in done.err


def test_no_sample_is_no_batch(talking: UniMoE) -> None:
    with pytest.raises(BadInput, match="train uni_moe on no sample"):
        talking.training_batch([])
