"""Replies of language models whose prompts hold features of other modalities: as they are written, and how likely.

Shapes: L positions of the prompt, n replies, R tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from mmoe.errors import BadInput, BadOverride, did_you_mean
from mmoe.moe import with_context
from mmoe.routing import Context
from zoo.hosts.splice import IGNORED, PADDING, TEXT, Spliced

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_OWN = ("max_new_tokens", "do_sample", "streamer")  # options of writing that are there without being asked for


@dataclass(frozen=True)
class Reply:
    """What a model said.

    Attributes:
        text: without special tokens.
        tokens: how many it wrote, the end included.
    """

    text: str
    tokens: int

    def __str__(self) -> str:
        return self.text

    def table(self, picture: int = 0) -> tuple[list[str], list[list[str]]]:
        """Header and row that show it."""
        return ["tokens"], [[self.text, str(self.tokens)]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"text": self.text, "tokens": self.tokens}


class _Dropped(Exception):
    """Nobody reads on."""


def streamed(tokenizer: Any, write: Callable[[Any], object]) -> Iterator[str]:
    """Words as they are written; closing the iterator ends the writing at its next token.

    Args:
        tokenizer: of transformers.
        write: generates with the streamer that it is given; what it raises is raised here.
    """
    from transformers import TextIteratorStreamer

    words = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    dropped, put, failed = Event(), words.put, list[BaseException]()
    casts = _autocasts()  # a thread begins without those of its maker

    def put_or_stop(tokens: Tensor) -> None:
        if dropped.is_set():
            raise _Dropped
        put(tokens)

    def run() -> None:
        try:
            with ExitStack() as around:
                for cast in casts:
                    around.enter_context(cast)
                write(words)
        except BaseException as error:
            failed.append(error)
            words.end()

    words.put = put_or_stop
    writing = Thread(target=run, daemon=True)
    writing.start()
    try:
        yield from words
    finally:
        dropped.set()
        writing.join()
    if failed:
        raise failed[0]


def _autocasts() -> list[torch.autocast]:
    """What turns on in another thread the autocast that is on in this one."""
    kinds = [kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.is_autocast_enabled(kind)]
    return [torch.autocast(kind, dtype=torch.get_autocast_dtype(kind)) for kind in kinds]


def check_names(llm: PreTrainedModel, given: Mapping[str, Any], media: Sequence[str]) -> None:
    """Makes sure that options of writing are some.

    Args:
        llm: a causal language model.
        given: options of its `generate`.
        media: what could have been meant as well.

    Raises:
        BadInput: there is no such option.
    """
    from transformers import GenerationConfig

    takes = [name for name in signature(llm.generate).parameters if name not in ("inputs", "kwargs")]
    known = [*media, *takes, *(name for name in vars(GenerationConfig()) if not name.startswith("_"))]
    for name in given:
        if name not in known:
            wrong = did_you_mean(name, known)
            raise BadInput(f"write a reply with {name!r}", wrong, "model.predict('Hi', max_new_tokens=20)")


@contextmanager
def in_words(options: Mapping[str, Any]) -> Iterator[None]:
    """Says what the library finds wrong with options of writing.

    Raises:
        BadOverride: something.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        given = {name: value for name, value in options.items() if name not in _OWN}
        if not given:
            raise
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        wrong = str(error).strip().partition("\n")[0]
        raise BadOverride(f"cannot write a reply with {told}", wrong, "max_new_tokens=20") from error


@contextmanager
def told_of_prompt(llm: PreTrainedModel, prompt: Spliced, *, route_padding: bool) -> Iterator[None]:
    """Tells mixtures of the modalities and the padding of a prompt while a language model writes on.

    The pass that reads embeddings reads the prompt; what is written is text, which needs no telling.
    Rows that the library repeats, for beams or several replies, are told alike.

    Args:
        llm: a causal language model.
        prompt: (B, L).
        route_padding: sends padding through mixtures too.
    """
    passes = ExitStack()

    def before(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if given.get("inputs_embeds") is None:
            return
        repeats = len(given["inputs_embeds"]) // len(prompt.mask)
        mask, modality = (told.repeat_interleave(repeats, 0) for told in (prompt.mask, prompt.modality))
        passes.enter_context(with_context(llm, Context(valid=None if route_padding else mask, modality=modality)))

    hooks = [llm.register_forward_pre_hook(before, with_kwargs=True)]
    hooks.append(llm.register_forward_hook(lambda *_: passes.close(), always_call=True))
    try:
        yield
    finally:
        passes.close()
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def likelihoods(
    llm: PreTrainedModel,
    prompt: Spliced,
    replies: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    route_padding: bool,
) -> tuple[Tensor, Tensor]:
    """How likely each of some replies to one prompt is.

    Args:
        llm: a causal language model.
        prompt: (1, L).
        replies: ids of each, and labels that say which of them count.
        route_padding: sends padding through mixtures too.

    Returns:
        Logarithms of the probabilities in nats (n,), and numbers of tokens that count (n,), both on the CPU.
    """
    count, device = len(replies), prompt.embeds.device
    ids = pad_sequence([torch.tensor(own) for own, _ in replies], batch_first=True).to(device)  # (n, R)
    labels = pad_sequence([torch.tensor(own) for _, own in replies], batch_first=True, padding_value=IGNORED)
    there = torch.arange(ids.shape[1]) < torch.tensor([len(own) for own, _ in replies])[:, None]
    there = there.to(device)
    embeds = torch.cat([prompt.embeds.expand(count, -1, -1), llm.get_input_embeddings()(ids)], 1)
    mask = torch.cat([prompt.mask.expand(count, -1), there], 1)
    modality = torch.cat([prompt.modality.expand(count, -1), torch.where(there, TEXT, PADDING)], 1)
    with with_context(llm, Context(valid=None if route_padding else mask, modality=modality)):
        told = llm(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False, logits_to_keep=ids.shape[1] + 1)
    scores = told.logits[:, :-1].float().transpose(1, 2)  # (n, vocabulary, R)
    losses = cross_entropy(scores, labels.to(device), ignore_index=IGNORED, reduction="none")
    return -losses.sum(1).cpu(), (labels != IGNORED).sum(1)
