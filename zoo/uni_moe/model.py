"""Uni-MoE: encoders and connectors of four modalities into one mixture-of-experts language model.

Paper: Li et al., "Uni-MoE: Scaling Unified Multimodal LLMs with Mixture of Experts", arXiv 2405.11273. Authors' code:
github.com/HITsz-TMG/Uni-MoE; written from the paper and from recorded tensors.

    image:  CLIP, last block but one, without class token -> MLP, a token per patch;  video: the mean over its frames
    speech: Whisper encoder -> Whisper decoder fed by learned queries -> Linear, 50 tokens per 30 s
    sound:  BEATs -> Q-Former -> Linear, 50 tokens per 30 s
    text with these tokens in the place of <image>, <video>, <speech>, <sound> -> Llama; in chosen blocks
    y = h + sum_{k in top-K} w_k FFN_k(norm(h)),  w the softmax over the K best scores

The host is transformers' Llama, so its attention, cache and `generate` are used. Where we differ: one model may have
both the speech and the sound branch (theirs have one, under one placeholder); features are spliced once and generation
goes on with a cache (theirs encodes everything again at every step); the mask is right for left padding too.

Shapes: B samples, N ids, L positions after the splice, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmoe.errors import BadInput, Refused
from mmoe.losses import balance_loss
from mmoe.moe import with_context
from mmoe.options import check_int
from mmoe.routing import Context, Routing
from mmoe.trace import trace
from zoo.base import checksum_of
from zoo.config import make_config
from zoo.hosts.chat import TEMPLATES, Template, as_words, encode, read_tokenizer, tokenizer_text
from zoo.hosts.decoder import add_mixtures
from zoo.hosts.replies import Reply, check_names, in_words, likelihoods, streamed, told_of_prompt
from zoo.hosts.rotary import SteadyRotaryEmbedding
from zoo.hosts.splice import IGNORED, Spliced, filled_on_the_left, splice
from zoo.images import as_seen
from zoo.model import Model
from zoo.samples import check_samples
from zoo.state import State
from zoo.uni_moe.assembly import assembled_config, assembled_state
from zoo.uni_moe.config import MODALITIES, UniMoEConfig
from zoo.uni_moe.losses import divergence_loss, modality_loss
from zoo.uni_moe.media import image_tensor, sound_tensor, speech_tensor, video_tensor, videos_of
from zoo.uni_moe.parts import TENSORS, added_to, part_state
from zoo.uni_moe.towers import Sound, Speech, Vision, recordings
from zoo.uni_moe.views import batch_views
from zoo.views import TokenView
from zoo.weights import locate

PLACEHOLDERS = {"<image>": -200, "<speech>": -300, "<video>": -400, "<sound>": -500}
BATCHED = (
    "images",
    "videos",
    "speech",
    "speech_chunks",
    "speech_tokens",
    "sounds",
    "sound_padding",
    "sound_chunks",
)  # of `splice`
QUESTIONS = {
    "text": "Say something.",
    "image": "What is this?",
    "speech": "What is said?",
    "video": "What happens?",
    "sound": "What is heard?",
}


@dataclass(kw_only=True)
class UniMoEOutput:
    """What a forward pass returns.

    Attributes:
        logits: (B, L, vocabulary).
        spliced: the sequence that the language model saw.
        loss: scalar, or None without labels.
        losses: the unweighted parts of the loss by name.
    """

    logits: Tensor
    spliced: Spliced
    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


class UniMoE(Model):
    """A language model that reads text, images, videos, speech and sounds.

    Args:
        config: options; `num_experts=0` builds the dense model.

    Attributes:
        llm: the host, a `LlamaForCausalLM`, to hand to whatever takes one.
        vision, speech, sound: encoders with their connectors, or None.
    """

    family = "uni_moe"
    config_class = UniMoEConfig
    base_tensors = MappingProxyType(TENSORS)
    windows = True  # a reply is written token by token: routing is shown by one forward of the whole
    views_note = "experts are written and drawn of what was asked, in one pass; those of the reply are not among them"

    def __init__(self, config: UniMoEConfig) -> None:
        super().__init__(config)
        host = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads or config.heads,
            intermediate_size=config.ffn_dim,
            max_position_embeddings=config.positions,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
        )
        self.llm = LlamaForCausalLM(host)
        self.llm.model.rotary_emb = SteadyRotaryEmbedding(host)
        options: dict[str, Any] = {"top_k": config.top_k, "router": config.gate, "experts": config.experts}
        add_mixtures(self.llm, config.mixed, config.num_experts, **options)
        dim, queries = config.width, config.queries
        self.vision = config.vision and Vision(config.vision, config.vision_layer, config.projector, dim)
        self.speech = config.speech and Speech(config.speech, queries, dim)
        self.sound = config.sound and Sound(config.sound, queries, dim)
        self.adapters = added_to(name for name, _ in self.named_parameters())
        told = {name: getattr(config, name) for name in ("template", "frames", "parts")}
        self.preprocessing = {**told, "tokenizer": None}

    def from_base(self, state: State, part: str) -> State:
        """Tensors of one part from a released model; see `zoo.uni_moe.parts`."""
        return part_state(state, part, self.config, self.state_dict().keys())

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How texts and media become tensors, as plain data; a tokenizer is the text of its file, once it is read."""
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, values: dict[str, Any]) -> None:
        told = {name: values[name] for name in ("template", "frames", "parts")}
        make_config(UniMoEConfig, {**vars(self.config), **told}, self.family)
        self._preprocessing, self._words = values, None
        if values["tokenizer"] is not None:
            self._read_words(values["tokenizer"])

    def whole_preprocessing(self) -> dict[str, Any]:
        """With the tokenizer that the config names."""
        if self.config.tokenizer is not None:
            self.tokenizer  # noqa: B018  # is read
        return self.preprocessing

    def _read_words(self, text: str) -> None:
        """Takes a tokenizer, and its special tokens for the host to write with."""
        self._words = read_tokenizer(text, self.template)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self.llm.generation_config, name, getattr(self._words, name))

    @property
    def template(self) -> Template:
        """How conversations are written."""
        return TEMPLATES[self._preprocessing["template"]]

    @property
    def tokenizer(self) -> Any:
        """Words to ids: what was saved with the model, or the config's, read on first use.

        Raises:
            Refused: the config names none.
        """
        if self._words is None:
            if self.config.tokenizer is None:
                raise Refused("read a text", "the model has no tokenizer", "tokenizer='PATH/tokenizer.json'")
            text = tokenizer_text(locate(self.config.tokenizer, checksum_of(self, self.config.tokenizer)))
            self._read_words(text)
            self._preprocessing["tokenizer"] = text
        return self._words

    def preprocess(
        self,
        text: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        video: Any = None,
        speech: Any = None,
        sound: Any = None,
        reply: bool = True,
    ) -> dict[str, Any]:
        """One conversation as a batch on the model's device.

        Args:
            text: what the user says, or turns that user and model take in turn. Media without a placeholder such as
                <image> in a turn of the user are put before the first. The usual question about what is given when
                None, as "What is this?".
            image, video, speech, sound: one of each or a list, in the order of their placeholders; see
                `zoo.uni_moe.media`. A list of pictures is one video, a list of lists or folders several.
            reply: ends where the model's reply begins; False takes turns that end with one.

        Returns:
            "input_ids" (1, N), "labels" (1, N), and what `splice` takes.
        """
        given = {"image": image, "video": video, "speech": speech, "sound": sound}
        return {name: self._here(value) for name, value in self._read(text, given, reply).items()}

    def _read(self, text: str | Sequence[str] | None, media: Mapping[str, Any], reply: bool) -> dict[str, Any]:
        """What `preprocess` gives, on the CPU."""
        listed = _by_placeholder(media)
        ids, labels = self._ids_of(text, listed, reply)
        return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), **self._media(listed)}

    def _ids_of(
        self, text: str | Sequence[str] | None, given: Mapping[str, Sequence[Any]], reply: bool
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation about media by their placeholder."""
        if text is None:
            text = QUESTIONS[next((word.strip("<>") for word, many in given.items() if many), "text")]
        said = [text] if isinstance(text, str) else text
        if not isinstance(said, list | tuple) or not all(isinstance(turn, str) for turn in said):
            asked, wrong = f"read a text from {type(text).__name__}", "it is a text, or turns that are texts"
            raise BadInput(asked, wrong, "model.predict('What is this?', image='fox.png')")
        turns = [as_words(turn, self.tokenizer, [*PLACEHOLDERS] * (place % 2)) for place, turn in enumerate(said)]
        lacking = [word for word, many in given.items() for _ in many[sum(turn.count(word) for turn in turns) :]]
        if turns and lacking:
            turns[0] = "".join(f"{word}\n" for word in lacking) + turns[0]
        return encode(self.tokenizer, self.template.parts(turns, reply), PLACEHOLDERS)

    @torch.autocast("cpu", enabled=False)  # spectra are exact whatever the model runs in
    def _media(self, given: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        frames, parts = self._preprocessing["frames"], self._preprocessing["parts"]
        if given["<image>"] or given["<video>"]:
            eye = self._branch("vision")
            norm = {"mean": eye.mean, "std": eye.std}
            if given["<image>"]:
                found["images"] = torch.stack([image_tensor(one, eye.size, **norm) for one in given["<image>"]])
            if given["<video>"]:
                found["videos"] = [video_tensor(one, eye.size, frames, **norm) for one in given["<video>"]]
        if given["<speech>"]:
            ear = self._branch("speech")
            sizes = ear.sizes["mels"], ear.sizes["positions"]
            heard, filled = zip(*(speech_tensor(one, *sizes, parts) for one in given["<speech>"]), strict=True)
            found |= {"speech": torch.cat(heard), "speech_chunks": [len(one) for one in heard]}
            found |= {} if ear.tokens_of(0) is None else {"speech_tokens": [ear.tokens_of(one) for one in filled]}
        if given["<sound>"]:
            seconds = self._branch("sound").seconds
            mels, padding = zip(*(sound_tensor(one, parts, seconds) for one in given["<sound>"]), strict=True)
            found |= {"sounds": torch.cat(mels), "sound_padding": torch.cat(padding)}
            found["sound_chunks"] = [len(one) for one in mels]
        return found

    def _here(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._here(one) for one in value]
        if not isinstance(value, Tensor):
            return value
        device = self.input_device
        return value.to(device, self.dtype) if value.is_floating_point() else value.to(device)

    def collate(self, batches: Sequence[Mapping[str, Any]], *, left: bool = False) -> dict[str, Any]:
        """Batches of `preprocess` as one, filled up on the right, or on the left for generation.

        Args:
            batches: of one conversation each.
            left: fills up on the left.
        """
        longest = max(batch["input_ids"].shape[1] for batch in batches)
        filled: dict[str, Any] = {"attention_mask": torch.zeros(len(batches), longest, dtype=torch.long)}
        for name, value in (("input_ids", 0), ("labels", IGNORED)):
            filled[name] = torch.full((len(batches), longest), value)
        for row, batch in enumerate(batches):
            count = batch["input_ids"].shape[1]
            place = slice(longest - count, None) if left else slice(count)
            filled["attention_mask"][row, place] = 1
            for name in ("input_ids", "labels"):
                filled[name][row, place] = batch[name][0]
        for name in dict.fromkeys(name for batch in batches for name in batch if name not in filled):
            parts = [batch[name] for batch in batches if name in batch]
            joined = isinstance(parts[0], Tensor)
            filled[name] = torch.cat(parts) if joined else [one for part in parts for one in part]
        return {name: self._here(value) for name, value in filled.items()}

    def training_batch(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Samples with "turns", or with a "text" that is the answer to their "question" or the usual one.

        Media are "image", "video", "speech" and "sound", as `preprocess` takes them; "audio" is speech where the model
        has that branch, and sound where it has not.

        Raises:
            Refused: they have neither turns nor a text.
        """
        check_samples(samples, (), self.family, "data with turns or a text")
        return self.collate([self._conversation(sample) for sample in samples])

    def views(self, batch: Mapping[str, Any]) -> list[TokenView]:
        """Where text, patches and tokens of recordings lie in the sequence, of a batch of `preprocess` or `collate`."""
        patches = 0 if self.vision is None else self.vision.patches
        return batch_views(self.config, batch, PLACEHOLDERS, self.tokenizer, patches)

    def seen(self, picture: Any) -> Image.Image:
        """The square middle of a picture."""
        return as_seen(picture)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes the activations of the language model again in backward instead of keeping them."""
        verb = "enable" if enable else "disable"
        old = getattr(self.llm, f"gradient_checkpointing_{verb}", None)  # its older name
        switch = getattr(self.llm, f"activation_checkpointing_{verb}", old)
        switch(*[{"use_reentrant": False}] * enable)

    def _conversation(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        media, given = self._parted(sample)
        if "turns" in given:
            turns = [turn["value"] if isinstance(turn, Mapping) else turn for turn in given["turns"]]
        elif "text" in given:
            turns = [given.get("question") or QUESTIONS[next(iter(media), "text")], given["text"]]
        else:
            known = ", ".join(name for name in sample if name not in ("seed", "part"))
            raise Refused(f"train {self.family} on {known}", "there is nothing to say", "data with turns or a text")
        return self._read(turns, media, False)

    def _parted(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Media as `preprocess` takes them, and the rest; "audio" is speech where the model has that branch."""
        heard = "speech" if self.speech is not None else "sound"
        if given.get("audio") is not None and given.get(heard) is not None:
            asked, wrong = f"hear audio beside {heard}", f"audio is {heard} to this model"
            raise BadInput(asked, wrong, f"{heard}=[FIRST, SECOND]")
        named = {heard if name == "audio" else name: value for name, value in given.items()}
        media = {name: named.pop(name) for name in MODALITIES[1:] if name in named}
        return {name: value for name, value in media.items() if value is not None}, named

    def predict(self, text: str | Sequence[str] | None = None, *, max_new_tokens: int = 128, **given: Any) -> Reply:
        """What the model says.

        Args:
            text: what the user says, or turns that user and model take in turn; the usual question about what is given
                when None.
            max_new_tokens: at most.
            given: media as for `preprocess`, or "audio", which is speech where the model hears it; and options of
                transformers' `generate`, such as `do_sample=True`.

        Raises:
            BadInput: media cannot be read, or do not fit the text.
        """
        self.check_values("predict with")
        check_int("max_new_tokens", max_new_tokens, 1)
        batch, options = self._asked(text, given)
        ids = self.generate(**batch, max_new_tokens=max_new_tokens, **options)
        return Reply(self.tokenizer.decode(ids[0], skip_special_tokens=True).strip(), ids.shape[1])

    def stream(
        self, text: str | Sequence[str] | None = None, *, max_new_tokens: int = 128, **given: Any
    ) -> Iterator[str]:
        """The words of `predict` as they are written."""
        self.check_values("predict with")
        check_int("max_new_tokens", max_new_tokens, 1)
        batch, options = self._asked(text, given)
        told = {**batch, "max_new_tokens": max_new_tokens, **options}
        yield from streamed(self.tokenizer, lambda words: self.generate(**told, streamer=words))

    def _asked(
        self, text: str | Sequence[str] | None, given: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A batch for `generate`, and its options."""
        media, told = self._parted(given)
        check_names(self.llm, told, [*MODALITIES[1:], "audio"])
        if told.get("return_dict_in_generate"):
            wrong, fix = "a reply is a text", "model.generate(**model.preprocess('Hi'), return_dict_in_generate=True)"
            raise BadInput("predict with return_dict_in_generate", wrong, fix)
        batch = self.preprocess(text, **media)
        del batch["labels"]
        ids = batch.pop("input_ids")
        return {"input_ids": ids, "media": batch}, {"do_sample": False, **told}

    @torch.no_grad()
    def reply_likelihoods(
        self, replies: Sequence[str], text: str | Sequence[str] | None = None, **given: Any
    ) -> tuple[Tensor, Tensor]:
        """How likely the model finds each of some replies to one question; media are encoded once.

        Args:
            replies: n of them.
            text: what was said before, as for `predict`.
            given: media as for `predict`.

        Returns:
            Logarithms of the probabilities in nats (n,), and numbers of tokens (n,), the reply's end included.

        Raises:
            BadInput: there are no replies, or media do not fit the text.
        """
        media, rest = self._parted(given)
        if not replies or rest:
            wrong = f"{next(iter(rest))!r} is no medium" if rest else "there are none"
            raise BadInput("tell how likely replies are", wrong, "model.reply_likelihoods(['a fox'], image='fox.png')")
        listed = _by_placeholder(media)
        asked = self._ids_of(text, listed, True)[0]
        turns = [text] if isinstance(text, str) else [QUESTIONS[next(iter(media), "text")]] if text is None else text
        told = [self._ids_of([*turns, reply], listed, False) for reply in replies]
        alike = (len(set(column)) == 1 for column in zip(asked, *(ids for ids, _ in told), strict=False))
        shared = sum(takewhile(bool, alike))
        heard = {name: self._here(value) for name, value in self._media(listed).items()}
        prompt = self.splice(self._here(torch.tensor([asked[:shared]])), **heard)
        rest_of = [(ids[shared:], labels[shared:]) for ids, labels in told]
        return likelihoods(self.llm, prompt, rest_of, route_padding=self.config.route_padding)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **media: Any,
    ) -> UniMoEOutput:
        """Scores of the next token at every position, and the loss where there are labels.

        Args:
            input_ids: (B, N), with placeholders.
            attention_mask: (B, N), 0 for padding on either side.
            labels: (B, N), -100 where no loss counts.
            media: see `splice`.
        """
        spliced = self.splice(input_ids, attention_mask, labels, **media)
        valid = None if self.config.route_padding else spliced.mask
        with with_context(self.llm, Context(valid=valid, modality=spliced.modality)), trace(self.llm) as routing:
            out = self.llm(
                inputs_embeds=spliced.embeds, attention_mask=spliced.mask.long(), labels=spliced.labels, use_cache=False
            )
        found = UniMoEOutput(logits=out.logits, spliced=spliced)
        if labels is None:
            return found
        found.losses = {"next_token": out.loss, **self._router_losses(list(routing), spliced.modality)}
        found.loss = out.loss
        for name in ("balance", "modality", "divergence"):
            if name in found.losses:
                found.loss = found.loss + getattr(self.config, f"{name}_coef") * found.losses[name]
        return found

    def _router_losses(self, routing: Sequence[Routing], modality: Tensor) -> dict[str, Tensor]:
        """Losses whose coefficient is above 0."""
        config, found = self.config, dict[str, Tensor]()
        if config.balance_coef and routing:
            found["balance"] = balance_loss(routing, choices="first")
        if config.modality_coef and routing:
            own = {MODALITIES.index(name): experts for name, experts in config.modality_experts.items()}
            found["modality"] = modality_loss(routing, modality, own)
        if config.divergence_coef and routing:
            found["divergence"] = divergence_loss(routing, modality)
        return found

    def splice(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        images: Tensor | None = None,
        videos: Tensor | Sequence[Tensor] | None = None,
        speech: Tensor | None = None,
        speech_chunks: Sequence[int] | None = None,
        speech_tokens: Sequence[int] | None = None,
        sounds: Tensor | None = None,
        sound_padding: Tensor | None = None,
        sound_chunks: Sequence[int] | None = None,
    ) -> Spliced:
        """The sequence for the language model; media come in the order of their placeholders in the batch.

        Args:
            input_ids: (B, N), with placeholders.
            attention_mask: (B, N), 0 for padding on either side.
            labels: (B, N).
            images: (I, 3, S, S).
            videos: (V, F, 3, S, S), or V of (F, 3, S, S) with numbers of frames of their own.
            speech: (C, M, T) log-mels of chunks of 30 seconds.
            speech_chunks: chunks of each recording, one each when None.
            speech_tokens: tokens of each recording that count, of those in the order of time; all when None.
            sounds: (C, T, 128) filter banks of chunks.
            sound_padding: (C, S) samples that are padding.
            sound_chunks: chunks of each recording, one each when None.

        Raises:
            BadInput: media and placeholders do not fit, or the model has no such branch.
        """
        given = {
            "<image>": images is not None and list(self._branch("vision")(images)),
            "<speech>": speech is not None and recordings(self._branch("speech")(speech), speech_chunks, speech_tokens),
            "<video>": videos is not None and [self.vision_of(video) for video in videos],
            "<sound>": sounds is not None and recordings(self._branch("sound")(sounds, sound_padding), sound_chunks),
        }
        ids = input_ids.tolist()
        features = {PLACEHOLDERS[word]: _dealt(ids, word, blocks or []) for word, blocks in given.items()}
        found = splice(input_ids, self.llm.get_input_embeddings(), features, attention_mask, labels)
        if found.embeds.shape[1] > self.config.positions:
            wrong = f"the model has {self.config.positions:,} positions"
            raise BadInput(f"read a sequence of {found.embeds.shape[1]:,}", wrong, "a shorter text, or fewer media")
        return found

    def vision_of(self, video: Tensor) -> Tensor:
        """One video (F, 3, S, S) -> tokens (patches, D)."""
        tokens: Tensor = self._branch("vision").of_videos(video[None])[0]
        return tokens

    def _branch(self, name: str) -> Any:
        branch = getattr(self, name)
        if branch is None:
            raise BadInput(f"give {name} to this {self.family}", "it was built without that branch", f"{name}={{...}}")
        return branch

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        media: dict[str, Any] | None = None,
        **options: Any,
    ) -> Tensor:
        """New tokens (B, at most max_new_tokens): media are spliced once, then the host goes on with its cache.

        As in `forward`, mixtures are told of the batch, so a model runs one call at a time; threads take turns.

        Args:
            input_ids: (B, N).
            attention_mask: (B, N), 0 for padding on either side.
            labels: not used; a batch of `preprocess` or `collate` has them.
            media: see `splice`.
            options: media by their names too, as a batch has them; and those of transformers' `generate`, of which
                `max_new_tokens` is cut to the positions that are left.

        Raises:
            BadInput: there is no position left.
        """
        named = {name: options.pop(name) for name in BATCHED if name in options}
        with torch.no_grad():
            spliced = filled_on_the_left(self.splice(input_ids, attention_mask, **{**(media or {}), **named}))
        left = self.config.positions - spliced.embeds.shape[1]
        if not left:
            wrong = f"all {self.config.positions:,} positions are taken"
            raise BadInput("write a reply", wrong, "a shorter text, or fewer media")
        options["max_new_tokens"] = min(left, options.get("max_new_tokens") or left)
        telling = told_of_prompt(self.llm, spliced, route_padding=self.config.route_padding)
        with in_words(options), telling:
            found: Tensor = self.llm.generate(
                inputs_embeds=spliced.embeds, attention_mask=spliced.mask.long(), **options
            )
        return found

    @classmethod
    def assembled_from(cls, options: Mapping[str, Any]) -> int:
        """One model for each expert."""
        return int(options.get("num_experts", UniMoEConfig.num_experts))

    @classmethod
    def assemble(cls, models: Sequence[Model], options: Mapping[str, Any]) -> UniMoE:
        """A mixture whose expert e is the feed-forward block of model e; see `zoo.uni_moe.assembly`."""
        config = assembled_config(models, cls.assembled_from(options), options)
        with torch.device(models[0].device):
            model = cls(config).to(models[0].dtype)
        model.load_state_dict(assembled_state(model.state_dict(), [one.state_dict() for one in models], config.mixed))
        return model


def _by_placeholder(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Media as lists, by the word that stands for them."""
    named = {word: given.get(word.strip("<>")) for word in PLACEHOLDERS}
    return {word: _listed(value, word == "<video>") for word, value in named.items()}


def _listed(value: Any, videos: bool) -> list[Any]:
    if value is None:
        return []
    return videos_of(value) if videos else list(value) if isinstance(value, list) else [value]


def _dealt(ids: Sequence[Sequence[int]], word: str, blocks: Sequence[Tensor]) -> list[list[Tensor]]:
    """Blocks in the order of a batch, for each of its samples."""
    counts = [row.count(PLACEHOLDERS[word]) for row in ids]
    if sum(counts) != len(blocks):
        wrong = f"the texts have {sum(counts)} of {word}, and there are {len(blocks)} to put there"
        raise BadInput(f"splice a batch with {word}", wrong, "one for each placeholder, in order")
    rest = iter(blocks)
    return [[next(rest) for _ in range(count)] for count in counts]
