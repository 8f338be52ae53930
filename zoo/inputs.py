"""What the words of `mmoe predict` are to a model: pictures with labels, or a conversation about files.

Every check here needs no torch, so that a mistake is told at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmoe.errors import BadInput, BadOverride, Refused, did_you_mean
from zoo.card import Card
from zoo.cli import find_card
from zoo.registry import model_folder

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_VIDEOS = {".mp4", ".mov", ".mkv", ".avi", ".webm"}  # only to say what to do with them
_COMPARES, _TALKS = "zero-shot-classification", "chat"  # tasks that take texts to choose from, and that answer
_RUNS = (_COMPARES, "quality", "segmentation", _TALKS)
_WRITING = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class Call:
    """How a model is called.

    Attributes:
        args: inputs by their place.
        media: inputs by their name.
        pictures: shown over their results; none where there is one result of all.
        takes: media that `--with` may name as well.
        options: other names that `--with` takes; those of the model's `predict` when None.
    """

    args: tuple[Any, ...]
    media: dict[str, Any] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    options: tuple[str, ...] | None = None

    def with_media(self, given: Mapping[str, Any]) -> Call:
        """The call with those of some inputs that are media."""
        more = {name: value for name, value in given.items() if name in self.takes}
        return replace(self, media={**self.media, **more})

    @property
    def picture(self) -> Any:
        """That experts can be drawn over, or None."""
        found = self.media.get("image") if self.options is not None else self.args[0]
        return found[0] if isinstance(found, list) else found


def known_card(name: str) -> Card | None:
    """The card of a model, or None where it comes with the model.

    Raises:
        Refused: the model does nothing that the command line runs.
    """
    folder = model_folder(name)
    if name.startswith("hf-hub:") or (folder is not None and not (folder / "card.json").is_file()):
        return None
    found, _ = find_card(name)
    check_runs(name, found)
    return found


def check_runs(name: str, card: Card) -> None:
    """Raises where a model does nothing that the command line runs."""
    if not set(_RUNS) & set(card.tasks):
        wrong = f"its tasks are {', '.join(card.tasks)}; this runs {', '.join(_RUNS)}"
        raise Refused(f"cannot run {name!r} from the command line", wrong, f"zoo.load({name!r}).predict(...)")


def read_call(name: str, inputs: Sequence[str], card: Card | None, sound: bool = False) -> Call:
    """What the inputs of a command are to its model.

    Args:
        name: of the model.
        inputs: words of the command line.
        card: of the model, where it is known.
        sound: recordings are sounds, where the model takes speech as well.

    Raises:
        BadInput: they are not what the model takes, or a file cannot be read.
    """
    if card is not None and _TALKS in card.tasks:
        return _conversation(name, inputs, card.modalities, sound)
    if sound:
        raise BadOverride("cannot read --sound", f"{name} hears no recordings", "mmoe list --modality sound")
    return _pictures(name, inputs, None if card is None else _COMPARES in card.tasks)


def _pictures(name: str, inputs: Sequence[str], compares: bool | None) -> Call:
    """Pictures come first, at least one; what is not named like a picture is a label."""
    from zoo.images import read_image

    count = 1
    while count < len(inputs) and Path(inputs[count]).suffix.lower() in PICTURES:
        count += 1
    pictures, labels = list(inputs[:count]), list(inputs[count:])
    for picture in pictures:
        read_image(picture)
    if compares is False and labels:
        wrong = "it takes no texts, and what has no ending of a picture is one"
        raise BadInput(f"cannot show {labels[0]!r} to {name}", wrong, f"mmoe predict {name} {pictures[0]}")
    if (compares and not labels) or not all(label.strip() for label in labels):
        wrong = "one label is empty" if labels else "the texts to choose from come after it"
        fix = f"mmoe predict {name} {pictures[0]} 'a fox' 'a pizza'"
        raise BadInput(f"cannot compare '{pictures[-1]}' with no text", wrong, fix)
    args = (pictures, labels) if labels else (pictures,)
    return Call(args=args, pictures=tuple(pictures))


def _conversation(name: str, inputs: Sequence[str], modalities: Sequence[str], sound: bool) -> Call:
    """Files by their kind, and texts, which user and model say in turn."""
    hears = [kind for kind in ("speech", "sound") if kind in modalities]
    heard = "sound" if sound or not hears else hears[0]
    texts: list[str] = []
    media: dict[str, list[Any]] = {}
    for word in inputs:
        kind = _kind(word, heard)
        if kind == "text":
            texts.append(word)
            continue
        if kind not in modalities:
            wrong = f"it takes {', '.join(modalities)}, and this is {'an image' if kind == 'image' else kind}"
            raise BadInput(f"cannot show '{word}' to {name}", wrong, f"mmoe list --modality {kind}")
        media.setdefault(kind, []).append(_READERS.get(kind, str)(word))
    if not all(text.strip() for text in texts):
        raise BadInput(f"cannot ask {name} nothing", "a text is empty", f"mmoe predict {name} fox.png 'What is this?'")
    if texts and len(texts) % 2 == 0:
        wrong = "user and model take turns, and the user is the last"
        raise BadInput(f"cannot ask {name} {len(texts)} texts", wrong, f"mmoe predict {name} 'Hi' 'Hello!' 'And now?'")
    asked: Any = texts[0] if len(texts) == 1 else texts or None
    return Call(
        args=(asked,),
        media={kind: many[0] if len(many) == 1 else many for kind, many in media.items()},
        takes=tuple(kind for kind in modalities if kind != "text"),
        options=_WRITING,
    )


def _kind(word: str, heard: str) -> str:
    from zoo.sounds import ENDINGS

    path, ending = Path(word), Path(word).suffix.lower()
    if ending in PICTURES:
        return "image"
    if ending in ENDINGS:
        return heard
    if ending in _VIDEOS:
        fix = f"ffmpeg -i '{word}' frames/%04d.jpg, and then 'frames'"
        raise BadInput(f"cannot show '{word}'", "videos are folders of pictures, or --with video=ANIMATION.gif", fix)
    try:
        there = "video" if path.is_dir() else "file" if path.is_file() else "text"
    except OSError:  # a text may be too long for a name
        there = "text"
    if there == "file":
        wrong = f"its ending is neither of a picture nor of a recording ({', '.join(ENDINGS)})"
        raise BadInput(f"cannot show '{word}'", wrong, f"ffmpeg -i '{word}' '{path.with_suffix('.wav')}'")
    return there


def _picture(source: str) -> Any:
    from zoo.images import read_image

    return read_image(source)


def _recording(source: str) -> Any:
    from zoo.sounds import read_sound

    return read_sound(source)


_READERS: dict[str, Callable[[str], Any]] = {"image": _picture, "speech": _recording, "sound": _recording}


def check_options(model: Any, call: Call, given: Sequence[str]) -> None:
    """Fails where a model takes no such input.

    Args:
        model: the model.
        call: how it is called.
        given: names of `--with`.
    """
    own = list(inspect.signature(model.predict).parameters)[len(call.args) :]
    known = own if call.options is None else [*call.takes, *call.options]
    for key in given:
        if key not in known:
            wrong = did_you_mean(key, known) if known else "it takes no other inputs"
            raise BadOverride(f"no input {key!r} of {type(model).__name__}", wrong, "mmoe predict --help")
