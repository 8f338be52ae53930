"""Trains the tokenizer of uni_moe_tiny: byte-level BPE on what its training data say.

python assets/tokenizers/build.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from train.data.dialogues import Dialogues
from train.data.emoji import load_emoji
from train.data.recordings import Prompts, Sounds
from zoo.hosts.chat import CHATML
from zoo.uni_moe.model import QUESTIONS

HERE = Path(__file__).parent
SIZE = 2048
LEAST = 2  # times that a pair has to occur
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"  # words, single digits, signs


def texts() -> Iterator[str]:
    """What is said in training, each text once."""
    emoji = load_emoji()
    yield from (emoji.concepts[place].name for place in emoji.seen)
    yield from (text for data in (Prompts("train"), Sounds("train")) for text in (one["text"] for one in data.records))
    yield from (turn for one in Dialogues("train").records for turn in one["turns"])
    yield from QUESTIONS.values()
    yield CHATML.prompt(["user", "assistant"])


def main() -> None:
    """Writes uni_moe_tiny.json."""
    words = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        min_frequency=LEAST,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(texts(), trainer)
    words.save(str(HERE / "uni_moe_tiny.json"), pretty=False)
    print(f"{words.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
