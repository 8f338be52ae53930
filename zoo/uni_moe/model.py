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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmoe.errors import BadInput, Refused
from mmoe.losses import balance_loss
from mmoe.moe import with_context
from mmoe.routing import Context, Routing
from mmoe.trace import trace
from zoo.config import make_config
from zoo.hosts.decoder import PROJECTIONS, add_mixtures, pack_ffns
from zoo.hosts.splice import Spliced, splice
from zoo.model import Model
from zoo.uni_moe.config import MODALITIES, UniMoEConfig
from zoo.uni_moe.losses import divergence_loss, modality_loss
from zoo.uni_moe.towers import Sound, Speech, Vision

PLACEHOLDERS = {"<image>": -200, "<speech>": -300, "<video>": -400, "<sound>": -500}


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
        options: dict[str, Any] = {"top_k": config.top_k, "router": config.router, "experts": config.experts}
        add_mixtures(self.llm, config.mixed, config.num_experts, **options)
        dim, queries = config.width, config.queries
        self.vision = config.vision and Vision(config.vision, config.vision_layer, config.projector, dim)
        self.speech = config.speech and Speech(config.speech, queries, dim)
        self.sound = config.sound and Sound(config.sound, queries, dim)

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
            sounds: (C, T, 128) filter banks of chunks.
            sound_padding: (C, S) samples that are padding.
            sound_chunks: chunks of each recording, one each when None.

        Raises:
            BadInput: media and placeholders do not fit, or the model has no such branch.
        """
        given = {
            "<image>": images is not None and list(self._branch("vision")(images)),
            "<speech>": speech is not None and _recordings(self._branch("speech")(speech), speech_chunks),
            "<video>": videos is not None and [self.vision_of(video) for video in videos],
            "<sound>": sounds is not None and _recordings(self._branch("sound")(sounds, sound_padding), sound_chunks),
        }
        features = {PLACEHOLDERS[word]: _dealt(input_ids, word, blocks or []) for word, blocks in given.items()}
        return splice(input_ids, self.llm.get_input_embeddings(), features, attention_mask, labels)

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
        media: dict[str, Any] | None = None,
        **options: Any,
    ) -> Tensor:
        """New tokens (B, at most max_new_tokens): media are spliced once, then the host goes on with its cache.

        Args:
            input_ids: (B, N), padded on the left.
            attention_mask: (B, N).
            media: see `splice`.
            options: of transformers' `generate`.
        """
        spliced = self.splice(input_ids, attention_mask, **(media or {}))
        found: Tensor = self.llm.generate(inputs_embeds=spliced.embeds, attention_mask=spliced.mask.long(), **options)
        return found

    @classmethod
    def assembled_from(cls, options: Mapping[str, Any]) -> int | None:
        """One model for each expert."""
        return int(options.get("num_experts", UniMoEConfig.num_experts))

    @classmethod
    def assemble(cls, models: Sequence[Model], options: Mapping[str, Any]) -> UniMoE:
        """A mixture whose expert e is the feed-forward block of model e; all else is the first one's.

        Routers are drawn at random. This is the third stage of Uni-MoE's training, whose models were trained for one
        modality each.
        """
        host, count = models[0], cls.assembled_from(options)
        if not all(isinstance(one, UniMoE) and not one.config.mixed for one in models) or len(models) != count:
            wrong = f"it takes {count} dense models of this family, one for each expert"
            raise Refused(f"assemble {len(models)} models", wrong, "start: {assemble: [base, ...]}")
        config = make_config(UniMoEConfig, {**vars(host.config), "num_experts": count, **options}, cls.family)
        with torch.device(host.device):
            model = cls(config).to(host.dtype)
        states = [one.state_dict() for one in models]
        state = dict(states[0])
        for layer in config.mixed:
            place = f"llm.model.layers.{layer}.mlp"
            names = {name: f"{place}.{name}.weight" for name in PROJECTIONS}
            packed = pack_ffns([{name: own[key] for name, key in names.items()} for own in states])
            state = {key: value for key, value in state.items() if key not in names.values()}
            state |= {f"{place}.experts.{name}": value for name, value in packed.items()}
            state[f"{place}.router.weight"] = model.state_dict()[f"{place}.router.weight"]
        model.load_state_dict(state)
        return model


def _recordings(tokens: Tensor, chunks: Sequence[int] | None) -> list[Tensor]:
    """Tokens (C, Q, D) of chunks as one block per recording."""
    parts = tokens.split(list(chunks)) if chunks is not None else tokens.split(1)
    return [part.flatten(0, 1) for part in parts]


def _dealt(ids: Tensor, word: str, blocks: Sequence[Tensor]) -> list[list[Tensor]]:
    """Blocks in the order of a batch, for each of its samples."""
    counts = (ids == PLACEHOLDERS[word]).sum(-1).tolist()
    if sum(counts) != len(blocks):
        wrong = f"the texts have {sum(counts)} of {word}, and there are {len(blocks)} to put there"
        raise BadInput(f"splice a batch with {word}", wrong, "one for each placeholder, in order")
    rest = iter(blocks)
    return [[next(rest) for _ in range(count)] for count in counts]
