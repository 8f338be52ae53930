"""Builds the sheets of recordings from packages of Debian: spoken prompts with their texts, and sounds with names.

    apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-wav sonic-pi-samples
    for package in *.deb; do dpkg-deb -x $package unpacked; done
    python assets/data/recordings/build.py unpacked

A sheet is all recordings of a kind one after the other in an Ogg-Opus file, and a JSON file that says where each lies.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from zoo.sounds import read_sound

HERE = Path(__file__).parent
GAP = 0.1  # seconds of silence between two recordings
LONGEST = {"speech": 15.0, "sounds": 3.0}  # seconds; longer prompts are left out, longer sounds are cut
RATE = {"speech": 8_000, "sounds": 16_000}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = {str(digit): word for digit, word in enumerate(WORDS)}
COMPRESSION = 0.96  # of soundfile: 0 for the best sound, 1 for the smallest file
FEWEST_WORDS = 3  # of a prompt that is held out
NAMES = {
    "bd": "bass drum",
    "drum_bass": "bass drum",
    "drum_heavy_kick": "bass drum",
    "elec_hollow_kick": "bass drum",
    "elec_soft_kick": "bass drum",
    "sn": "snare drum",
    "drum_snare": "snare drum",
    "elec_lo_snare": "snare drum",
    "elec_mid_snare": "snare drum",
    "elec_hi_snare": "snare drum",
    "elec_snare": "snare drum",
    "elec_filt_snare": "snare drum",
    "drum_cymbal": "cymbal",
    "drum_splash": "cymbal",
    "elec_cymbal": "cymbal",
    "drum_tom": "tom drum",
    "elec_fuzz_tom": "tom drum",
    "tabla": "tabla",
    "bass": "bass guitar",
    "guit": "guitar",
    "perc_bell": "bell",
    "elec_bell": "bell",
    "elec_chime": "bell",
    "elec_triangle": "bell",
    "drum_cowbell": "bell",
    "elec_blip": "beep",
    "elec_beep": "beep",
    "elec_ping": "beep",
    "elec_plip": "beep",
    "elec_blup": "beep",
    "elec_pop": "beep",
    "elec_tick": "beep",
    "elec_twip": "beep",
    "elec_flip": "beep",
    "vinyl": "record player",
    "mehackit_robot": "robot",
    "glitch_robot": "robot",
    "mehackit_phone": "telephone",
    "loop": "rhythm",
    "ambi": "drone",
    "perc_swash": "whoosh",
    "perc_swoosh": "whoosh",
    "perc_snap": "finger snap",
    "perc_impact": "thud",
    "perc_door": "door",
    "misc_crow": "crow",
    "misc_burp": "burp",
}


def prompts(folder: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Spoken prompts with what is said, without those that hold other sounds or numbers of several digits."""
    index = folder / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    voice = folder / "usr/share/asterisk/sounds/en_US_f_Allison"
    with gzip.open(index, "rt", encoding="utf-8") as lines:
        entries = [line.partition(":") for line in lines if not line.startswith(";")]
    for key, _, text in entries:
        said, path = _said(text), voice / f"{key.strip()}.wav"
        if said and path.is_file():
            yield {"id": key.strip(), "text": said}, read_sound(path)


def _said(text: str) -> str | None:
    plain = re.sub(r"\[[^]]*\]|<[^>]*>", " ", text)
    plain = re.sub(r"\b\d\b", lambda digit: DIGITS[digit[0]], plain)
    plain = " ".join(plain.replace("...", " ").split()).strip(" ,")
    return plain if re.fullmatch(r"[A-Za-z][A-Za-z ,.'?!;:-]*", plain) else None


def sounds(folder: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Sounds that their package says to be CC0, with a name for what is heard."""
    licences = (folder / "usr/share/doc/sonic-pi-samples/copyright").read_text(encoding="utf-8")
    free = {
        Path(name).stem
        for stanza in licences.split("\n\n")
        if re.search(r"^License: CC0", stanza, re.MULTILINE)
        for name in re.findall(r"(\S+\.(?:flac|wav|\*))", stanza)
    }
    for path in sorted((folder / "usr/share/sonic-pi/samples").glob("*.flac")):
        fits = [name for name in NAMES if path.stem.startswith(name)]
        if fits and path.stem in free:
            values, rate = soundfile.read(path, dtype="float32")
            yield {"id": path.stem, "text": NAMES[max(fits, key=len)]}, read_sound((rate, values))


def held_out_prompts(records: Sequence[Mapping[str, Any]], share: float = 0.25) -> set[str]:
    """Sentences that are held out, in small letters; all prompts with one of them are."""
    texts = {record["text"].lower().strip(" .,;:!?") for record in records}
    long = sorted(text for text in texts if len(text.split()) >= FEWEST_WORDS)
    return set(sorted(long, key=_rank)[: round(share * len(long))])


def held_out_sounds(records: Sequence[Mapping[str, Any]]) -> set[str]:
    """A third of the sounds of every name that has three or more."""
    found: set[str] = set()
    for name in {record["text"] for record in records}:
        own = sorted((record["id"] for record in records if record["text"] == name), key=_rank)
        found |= set(own[: len(own) // 3])
    return found


def _rank(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(kind: str, found: Sequence[tuple[dict[str, Any], np.ndarray]], held_out: set[str], key: str) -> None:
    """Writes a sheet."""
    records, parts, place = [], [], 0
    gap = np.zeros(round(GAP * 16_000), dtype=np.float32)
    for record, samples in found:
        most = round(LONGEST[kind] * 16_000)
        if kind == "speech" and len(samples) > most:
            continue
        samples = samples[:most]
        own = record[key].lower().strip(" .,;:!?") in held_out
        records.append({**record, "begin": place / 16_000, "seconds": len(samples) / 16_000, "held_out": own})
        parts += [samples, gap]
        place += len(samples) + len(gap)
    sheet = np.concatenate(parts)[:: 16_000 // RATE[kind]] if kind == "sounds" else _slower(np.concatenate(parts))
    soundfile.write(
        HERE / f"{kind}.ogg", sheet, RATE[kind], format="OGG", subtype="OPUS", compression_level=COMPRESSION
    )
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (HERE / f"{kind}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    minutes, size = place / 16_000 / 60, (HERE / f"{kind}.ogg").stat().st_size
    print(
        f"{kind}: {len(records)} recordings, {sum(one['held_out'] for one in records)} held out, {minutes:.1f} min, "
        f"{size / 1e6:.2f} MB"
    )


def _slower(samples: np.ndarray) -> np.ndarray:
    from scipy.signal import resample_poly

    slower: np.ndarray = resample_poly(samples, 1, 2).astype(np.float32)
    return slower


def main(folder: Path) -> None:
    """Both sheets."""
    said = list(prompts(folder))
    write("speech", said, held_out_prompts([record for record, _ in said]), "text")
    heard = list(sounds(folder))
    write("sounds", heard, held_out_sounds([record for record, _ in heard]), "id")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
