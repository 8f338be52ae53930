"""Bundled texts that the program espeak-ng reads aloud in many voices: more speech to train on than was recorded.

Nothing is stored: a text is read when it is its turn, and in each pass by another voice. What is read is what is
trained on elsewhere: transcripts of prompts, turns of dialogues, names of emoji; no text that is held out in one of
them, whatever its case, spaces and signs.
Shapes: S samples at 16 kHz.
"""

from __future__ import annotations

import io
import random
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmoe.errors import BadInput, BadOverride, MissingExtra
from mmoe.options import check_choice, check_float, check_int
from train.data.base import SPLITS, DataSet, Sample, Split, data_sets
from train.data.dialogues import Dialogues
from train.data.emoji import load_emoji
from train.data.recordings import Prompts, varied
from zoo.sounds import read_sound

PROGRAM = "espeak-ng"
ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")  # of "en-gb" no variants work
VARIANTS = ("", *(f"+m{number}" for number in range(1, 9)), *(f"+f{number}" for number in range(1, 6)))
SPEEDS = 120, 190  # words in a minute
PITCHES = 25, 75
SOURCES = ("prompts", "dialogues", "emoji")
_SECONDS = 60  # that the program may take


@dataclass(frozen=True, kw_only=True)
class Voice:
    """How a text is read.

    Attributes:
        name: of espeak-ng, an accent with a variant.
        speed: words in a minute.
        pitch: 0 to 99.
    """

    name: str = "en-us"
    speed: int = 160
    pitch: int = 50

    @classmethod
    def drawn(cls, draw: random.Random) -> Voice:
        """A random one."""
        name = draw.choice(ACCENTS) + draw.choice(VARIANTS)
        return cls(name=name, speed=draw.randint(*SPEEDS), pitch=draw.randint(*PITCHES))


def read_aloud(text: str, voice: Voice) -> np.ndarray:
    """A text as speech, (S,) at 16 kHz.

    Raises:
        MissingExtra: espeak-ng is not installed, or cannot be started. BadInput: it cannot read this text.
    """
    asked = f"read {text[:40]!r} aloud"
    command = [PROGRAM, "-v", voice.name, "-s", str(voice.speed), "-p", str(voice.pitch), "--stdin", "--stdout"]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=_SECONDS, check=False)
    except FileNotFoundError as error:
        raise MissingExtra(asked, f"the program {PROGRAM} is not installed", f"apt install {PROGRAM}") from error
    except OSError as error:
        raise MissingExtra(asked, f"cannot start {PROGRAM}: {error.strerror}", f"{PROGRAM} --version") from error
    except subprocess.TimeoutExpired as error:
        raise BadInput(asked, f"{PROGRAM} took more than {_SECONDS} s", f"{PROGRAM} --version") from error
    if done.returncode:
        wrong = done.stderr.decode(errors="replace").strip() or f"{PROGRAM} ended with {done.returncode}"
        raise BadInput(asked, wrong, f"{PROGRAM} --voices=en")
    return read_sound(_wave(asked, done.stdout))


def _wave(asked: str, written: bytes) -> tuple[int, np.ndarray]:
    """Rate and samples of what the program writes to a pipe, whose header does not know the length.

    Raises:
        BadInput: there are none.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(written)) as file:
            rate, samples = file.samplerate, file.read(dtype="int16")
    except soundfile.LibsndfileError as error:
        if written:
            raise BadInput(asked, f"{PROGRAM} writes no sound: {error.error_string}", f"{PROGRAM} --version") from error
        rate, samples = 0, np.zeros(0)
    if not len(samples):
        raise BadInput(asked, f"{PROGRAM} says nothing for it", "a text with words")
    return rate, samples


@data_sets.register("aloud")
class Aloud(DataSet):
    """Texts that espeak-ng reads aloud, each time in another voice; to train on beside recordings.

    Needs the program espeak-ng. There is nothing to evaluate: speech that a program makes tells nothing about people's.

    Args:
        split: "train"; "eval" is empty.
        texts: where they come from: "prompts" (the transcripts of the bundled prompts), "dialogues" (turns of the
            bundled dialogues) and "emoji" (names).
        longest: characters of a text; longer ones are left out.
        strength: how much speed, loudness and noise vary beside the voice; 0 not at all.
        limit: uses so many.
    """

    fields = ("audio", "text")
    task = "transcription"
    needs_path = False

    def __init__(
        self,
        split: Split,
        *,
        texts: Sequence[str] = SOURCES,
        longest: int = 90,
        strength: float = 1.0,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(texts, str) or not texts:
            raise BadOverride(f"texts={texts!r}", "it is a list", f"texts={list(SOURCES)}")
        for source in texts:
            check_choice("texts", source, SOURCES)
        check_int("longest", longest, 1)
        check_float("strength", strength, low=0, below=5)
        self.strength = strength
        self.texts = [] if split == "eval" else list(dict.fromkeys(_texts(texts, longest)))[:limit]

    def __len__(self) -> int:
        return len(self.texts)

    def name(self, index: int) -> str:
        """The text."""
        return self.texts[index]

    def size(self, index: int) -> float:
        """Seconds, about."""
        return len(self.texts[index]) / 15

    def read(self, index: int) -> Sample:
        """A text, and itself read by the first voice."""
        return {"audio": read_aloud(self.texts[index], Voice()), "text": self.texts[index]}

    def drawn(self, index: int, seed: int) -> Sample:
        """A text, and itself read by a voice that is drawn."""
        heard = read_aloud(self.texts[index], Voice.drawn(random.Random(seed)))
        return {"audio": varied(heard, seed, self.strength), "text": self.texts[index]}


def _texts(sources: Sequence[str], longest: int) -> list[str]:
    """Texts of some sources that are held out in none, without those that are read in several ways."""
    of_split = {source: _of(source) for source in SOURCES}
    held_out = {_letters(text) for _, texts in of_split.values() for text in texts}
    found = [text for source in sources for text in of_split[source][0]]
    return [text for text in found if len(text) <= longest and _is_plain(text) and _letters(text) not in held_out]


def _of(source: str) -> tuple[list[str], list[str]]:
    """Texts that are trained on, and texts that are held out."""
    if source == "emoji":
        emoji = load_emoji()
        names = [concept.name for concept in emoji.concepts]
        return [names[index] for index in emoji.seen], [names[index] for index in emoji.held_out]
    if source == "prompts":
        train, held_out = ([str(record["text"]) for record in Prompts(split).records] for split in SPLITS)
    else:
        train, held_out = ([turn for one in Dialogues(split).records for turn in one["turns"]] for split in SPLITS)
    return train, held_out


def _letters(text: str) -> str:
    return "".join(filter(str.isalpha, text.casefold()))


def _is_plain(text: str) -> bool:
    """Words alone: what digits and signs sound like is not written in them."""
    return all(sign.isascii() and (sign.isalpha() or sign in " ,.?!'-") for sign in text) and any(
        sign.isalpha() for sign in text
    )
