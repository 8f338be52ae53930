"""Builds the dialogues from the ChatterBot corpus: short questions with a reply each, every question once.

pip download --no-deps chatterbot-corpus==1.3.3
unzip -d unpacked chatterbot_corpus-*.whl
python assets/data/dialogues/build.py unpacked
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
TOPICS = (
    "ai",
    "botprofile",
    "computers",
    "conversations",
    "emotion",
    "food",
    "greetings",
    "history",
    "literature",
    "money",
    "movies",
    "psychology",
    "science",
    "sports",
    "tech_support",
    "trivia",
)  # without coding, whose replies are programs, and without gossip, humor, health and politics
LONGEST = 120, 160  # characters of a question and of a reply
HELD_OUT = 0.12


def main(folder: Path) -> None:
    """Writes dialogues.json."""
    found: dict[str, dict[str, object]] = {}
    for topic in TOPICS:
        file = folder / f"chatterbot_corpus/data/english/{topic}.yml"
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            pair = [" ".join(str(turn).replace("\u2019", "'").split()) for turn in turns[:2]]
            if len(pair) == 2 and all(0 < len(said) <= most for said, most in zip(pair, LONGEST, strict=True)):
                found.setdefault(pair[0].lower().strip(" ?.!"), {"topic": topic, "turns": pair})
    held_out = set(
        sorted(found, key=lambda said: hashlib.sha256(said.encode()).hexdigest())[: round(HELD_OUT * len(found))]
    )
    lines = (json.dumps({**one, "held_out": said in held_out}, ensure_ascii=False) for said, one in found.items())
    (HERE / "dialogues.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    print(f"{len(found)} dialogues, {len(held_out)} held out")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
