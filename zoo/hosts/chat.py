"""Conversations as the text that a language model reads, as ids with placeholders, and as labels of its replies.

Placeholders such as <image> stand for features (`zoo.hosts.splice`); they have ids that no token has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe.errors import BadInput, CorruptFile
from zoo.hosts.splice import IGNORED
from zoo.runtimes import gguf_tokenizer


@dataclass(frozen=True, kw_only=True)
class Template:
    """How turns are written.

    Attributes:
        system: what stands before all turns.
        question: a user's turn, with {} for what is said.
        answer: what comes before a reply; a prompt for generation ends in it.
        reply: a reply, with {} for what is said; a loss counts all of it.
        bos: token before all, or None.
        eos: token that ends a reply.
    """

    system: str
    question: str
    answer: str
    reply: str
    bos: str | None
    eos: str

    def prompt(self, turns: Sequence[str], reply: bool = False) -> str:
        """Text of turns that the user and the model take in turn, the user first.

        Args:
            turns: what is said.
            reply: ends where the model's next reply begins.

        >>> VICUNA.prompt(["Hi"], reply=True)[-19:]
        'USER: Hi ASSISTANT:'
        """
        return "".join(text for text, _ in self.parts(turns, reply))

    def parts(self, turns: Sequence[str], reply: bool = False) -> list[tuple[str, bool]]:
        """The text in parts, and which of them a loss counts."""
        if not turns or (len(turns) % 2 == 0) == reply:
            wrong = f"there are {len(turns)} turns; the user begins{' and is the last' if reply else ''}"
            raise BadInput("write a conversation", wrong, '["What is this?", "A fox."]')
        found = [(self.system, False)]
        for number, said in enumerate(turns):
            if number % 2:
                found.append((self.reply.format(said), True))
            else:
                found += [(self.question.format(said), False), (self.answer, False)]
        return found if reply or len(turns) % 2 == 0 else found[:-1]


VICUNA = Template(
    system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. ",
    question="USER: {} ",
    answer="ASSISTANT:",
    reply=" {}</s>",
    bos="<s>",
    eos="</s>",
)
CHATML = Template(
    system="",
    question="<|im_start|>user\n{}<|im_end|>\n",
    answer="<|im_start|>assistant\n",
    reply="{}<|im_end|>\n",
    bos=None,
    eos="<|im_end|>",
)
TEMPLATES = {"vicuna": VICUNA, "chatml": CHATML}


def tokenizer_text(path: Path) -> str:
    """The text of a tokenizer.json, from such a file or out of a GGUF."""
    return gguf_tokenizer(path) if path.suffix == ".gguf" else path.read_text(encoding="utf-8")


def read_tokenizer(text: str, template: Template) -> Any:
    """A tokenizer of transformers from the text of a tokenizer.json, with the special tokens of a template.

    Raises:
        CorruptFile: it is no such text. BadInput: it lacks a token of the template.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        words = Tokenizer.from_str(text)
    except Exception as error:  # the library has one kind for all
        raise CorruptFile("read a tokenizer", str(error), "a tokenizer.json of transformers") from error
    for token in filter(None, (template.bos, template.eos)):
        if words.token_to_id(token) is None:
            wrong = f"it has no token {token!r}, which the template writes"
            raise BadInput("read a tokenizer", wrong, f"one of the templates {', '.join(TEMPLATES)} that fits")
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=template.bos, eos_token=template.eos, pad_token=template.eos
    )


def as_words(said: str, tokenizer: Any, more: Sequence[str] = ()) -> str:
    """What is said, with special tokens such as </s> taken apart, so that they are only words.

    Args:
        said: by a visitor, who is not to write turns.
        tokenizer: of transformers.
        more: words to take apart as well.
    """
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in (*special, *more):
        said = said.replace(token, f"{token[0]} {token[1:]}")
    return said


def encode(
    tokenizer: Any, parts: Sequence[tuple[str, bool]], placeholders: Mapping[str, int]
) -> tuple[list[int], list[int]]:
    """Ids and labels of a text; pieces between placeholders are tokenised one by one, with one BOS before all.

    Args:
        tokenizer: a fast one of transformers, which knows where in the text its tokens are.
        parts: of `Template.parts`.
        placeholders: ids by the word that stands for them.
    """
    text, counted = "".join(part for part, _ in parts), []
    for part, counts in parts:
        counted += [counts] * len(part)
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = [] if bos is None else [bos]
    labels = [IGNORED] * len(ids)
    begin = 0
    for end, word in [*_places(text, placeholders), (len(text), "")]:
        if end > begin:
            found = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
            ids += found["input_ids"]
            at = [begin + first for first, _ in found["offset_mapping"]]
            labels += [one if counted[place] else IGNORED for one, place in zip(found["input_ids"], at, strict=True)]
        if word:
            ids.append(placeholders[word])
            labels.append(IGNORED)
        begin = end + len(word)
    return ids, labels


def _places(text: str, words: Mapping[str, int]) -> list[tuple[int, str]]:
    """Where placeholders stand, in order."""
    found = []
    for word in words:
        place = text.find(word)
        while place >= 0:
            found.append((place, word))
            place = text.find(word, place + len(word))
    return sorted(found)
