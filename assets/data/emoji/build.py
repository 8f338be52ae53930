# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy==2.4.6", "pillow==12.3.0", "resvg-py==0.5.0"]
# ///
"""Build the emoji data set: 1,641 concepts in three drawing styles at 64x64 pixels, with names and keywords.

    uv run assets/data/emoji/build.py --cache ~/.cache/mmoe/emoji

(or install the three packages named above and run it with python). It takes one to two minutes.

Sources, fetched with ``npm pack`` (about 140 MB, once) and checked against pinned sha256 sums:

    openmoji 17.0.0                  OpenMoji drawings (SVG), names, tags, groups           CC-BY-SA-4.0
    emoji-datasource-google 16.0.0   Noto Emoji drawings (64 px PNG), the list of emoji     Apache-2.0 (list: MIT)
    emoji-datasource-twitter 16.0.0  Twemoji drawings (64 px PNG)                           CC-BY-4.0

Which emoji: the emoji-datasource list has 1,911 base entries (an emoji and its skin-tone variants are one entry). All
are drawn in both of its styles and in OpenMoji, where they are looked up by the fully qualified code and then by the
code without the variation selector U+FE0F. Leaving out the category "Flags" (270) gives 1,641. The five skin-tone
swatches (group "component") are among them. Emoji 17.0, which only OpenMoji has, is not.

What is changed in the drawings: OpenMoji is rendered at 64 px; all three styles are rounded to 32 levels per colour and
16 levels of transparency (42 to 47 dB PSNR), and packed into one lossless WebP sheet per style.

Written: openmoji.webp, noto.webp, twemoji.webp (41 columns of 64x64 cells, row by row in the order of emoji.json),
emoji.json, splits.json, and ten pictures in assets/examples. The same versions write the same bytes. Nothing is written
before everything has been built, and each file replaces the old one in a single step.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples"

PACKAGES = {  # npm name: (version, sha256 of the tarball)
    "openmoji": ("17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"),
    "emoji-datasource-google": ("16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "emoji-datasource-twitter": ("16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
}
STYLES = ("openmoji", "noto", "twemoji")
CONCEPTS = 1641
CELL, COLUMNS = 64, 41  # pixels, cells
COLOUR_LEVELS, ALPHA_LEVELS = 32, 16

SEED, HELD_OUT, HELD_OUT_STYLE = 0, 300, "twemoji"
NEAR_DRAWING = 8  # root mean square difference, 0..255, see `drawing_distances`

EXAMPLE_SIZE = 256
EXAMPLE_NAMES = {  # file name: name of the emoji
    "airplane": "airplane",
    "cat_face": "cat face",
    "dog_face": "dog face",
    "fox": "fox",
    "guitar": "guitar",
    "octopus": "octopus",
    "pizza": "pizza",
    "red_apple": "red apple",
    "rocket": "rocket",
    "snowman": "snowman",
}


class BuildError(Exception):
    """Something that the person who runs the script can act on."""


def progress(text, done, total):
    """Overwrite one line on a terminal; elsewhere print only the last state."""
    if sys.stderr.isatty():
        print(f"\r{text}: {done}/{total} ", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total:
        print(f"{text}: {total}", file=sys.stderr, flush=True)


# ---- sources -------------------------------------------------------------------------------------------------------


def sha256(path):
    """Hash of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hash(path, expected, advice):
    """Raise if the file is not the pinned one."""
    found = sha256(path)
    if found != expected:
        raise BuildError(f"{path}: sha256 is\n  {found}, expected\n  {expected}\n{advice}")


def fetch(package, cache):
    """Return the path of a package's tarball in the cache, downloading it with `npm pack` if it is not there."""
    version, expected = PACKAGES[package]
    path = cache / f"{package}-{version}.tgz"
    if path.exists():
        check_hash(path, expected, "The cached file is damaged or not this version: delete it and run again.")
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise BuildError(
            f"{path.name} is not in {cache} and npm was not found, so it cannot be downloaded.\n"
            "Install Node.js (it brings npm), or put the file there yourself."
        )
    print(f"npm pack {package}@{version}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [npm, "pack", f"{package}@{version}", "--loglevel=error", "--pack-destination", folder]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(folder) / path.name
        if result.returncode != 0 or not fetched.exists():
            said = "\n".join((result.stderr or result.stdout).strip().splitlines()[:4])
            raise BuildError(f"`npm pack {package}@{version}` failed (is there a network?):\n{said}")
        check_hash(fetched, expected, "The registry's file is not the pinned one; nothing was kept.")
        os.replace(fetched, path)
    return path


def read_members(path, prefix, names):
    """Read the named members of a tarball below `prefix` -> {name: bytes}."""
    wanted, found = set(names), {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.removeprefix(prefix)
            if member.isfile() and name != member.name and name in wanted:
                found[name] = tar.extractfile(member).read()
    missing = sorted(wanted - found.keys())
    if missing:
        raise BuildError(f"{path.name}: {len(missing)} files not found, the first is {prefix}{missing[0]}")
    return found


# ---- concepts ------------------------------------------------------------------------------------------------------


def keywords_of(entry):
    """Tags of one openmoji.json entry: lower case, in source order, each once, without the name itself."""
    tags = [tag.strip().lower() for tag in f"{entry['tags']},{entry['openmoji_tags']}".split(",")]
    return [tag for tag in dict.fromkeys(tags) if tag and tag != entry["annotation"].lower()]


def select(openmoji, google, twitter):
    """Find the emoji that all three styles draw, in Unicode order -> (records for emoji.json, image file names)."""
    by_code = {entry["hexcode"]: (position, entry) for position, entry in enumerate(openmoji)}
    in_twitter = {entry["unified"]: entry["image"] for entry in twitter if entry["has_img_twitter"]}
    rows = []
    for item in google:
        match = by_code.get(item["unified"]) or by_code.get(item["non_qualified"])
        drawn = item["has_img_google"] and in_twitter.get(item["unified"]) == item["image"]
        if match and drawn and item["category"] != "Flags":
            rows.append((*match, item["image"]))
    rows.sort(key=lambda row: row[0])
    if len(rows) != CONCEPTS or len({entry["hexcode"] for _, entry, _ in rows}) != CONCEPTS:
        raise BuildError(f"{len(rows)} emoji are drawn in all three styles, expected {CONCEPTS}")
    records = [
        {
            "id": entry["hexcode"],
            "char": entry["emoji"],
            "name": entry["annotation"],
            "keywords": keywords_of(entry),
            "group": entry["group"],
            "subgroup": entry["subgroups"],
        }
        for _, entry, _ in rows
    ]
    return records, [image for *_, image in rows]


# ---- drawings ------------------------------------------------------------------------------------------------------


def render(svg):
    """Draw an SVG at the size of a cell. No SVG of the set holds text, so fonts are left out."""
    png = resvg_py.svg_to_bytes(svg_string=svg.decode(), width=CELL, height=CELL, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)))


def decode(png):
    """Open a 64 px PNG (some have a palette, some are grey)."""
    return Image.open(io.BytesIO(png))


def position(index):
    """Left and top pixel of a cell."""
    return index % COLUMNS * CELL, index // COLUMNS * CELL


def pack(style, sources, draw):
    """Draw every concept into one sheet."""
    rows = -(-len(sources) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for index, source in enumerate(sources):
        picture = draw(source)
        if picture.size != (CELL, CELL):
            raise BuildError(f"{style}: picture {index} is {picture.size}, expected {CELL}x{CELL}")
        sheet.paste(picture.convert("RGBA"), position(index))
        progress(f"draw {style}", index + 1, len(sources))
    return sheet


def levels(count):
    """Lookup table that rounds 0..255 to `count` evenly spaced levels."""
    step = 255 / (count - 1)
    return [round(round(value / step) * step) for value in range(256)]


def reduce_levels(sheet):
    """Round colours and transparency, and blank the colour under fully transparent pixels."""
    sheet = sheet.point(levels(COLOUR_LEVELS) * 3 + levels(ALPHA_LEVELS))
    visible = sheet.getchannel("A").point([0] + [255] * 255)
    return Image.composite(sheet, Image.new("RGBA", sheet.size), visible)


def to_webp(sheet):
    """Encode without loss, and make sure of it."""
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", lossless=True, exact=True, quality=100, method=6)
    if Image.open(buffer).convert("RGBA").tobytes() != sheet.tobytes():
        raise BuildError("the WebP sheet does not decode to the same pixels")
    return buffer.getvalue()


def enlarge(cell):
    """A cell as a larger PNG; resampled with premultiplied colour, so that edges get no dark rim."""
    buffer = io.BytesIO()
    big = cell.convert("RGBa").resize((EXAMPLE_SIZE, EXAMPLE_SIZE), Image.Resampling.LANCZOS).convert("RGBA")
    big.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# ---- near duplicates and the split ---------------------------------------------------------------------------------


def cells_of(sheet, count):
    """Cut a sheet into pixels -> integer array (count, values per cell)."""
    pixels = np.asarray(sheet)
    side = pixels.shape[1] // COLUMNS
    grid = pixels.reshape(-1, side, COLUMNS, side, 4).transpose(0, 2, 1, 3, 4)
    return grid.reshape(-1, side * side * 4)[:count]


def drawing_distances(sheet, count):
    """Root mean square difference between all cells at 32x32 px, premultiplied RGBA, 0..255 -> (count, count).

    Sums of squares of 8-bit integers are exact in float64, so the result does not depend on the machine.
    """
    x = cells_of(sheet.convert("RGBa").reduce(2), count).astype(np.float64)  # (count, 32 * 32 * 4)
    squares = (x * x).sum(1)
    return np.sqrt((squares[:, None] + squares[None, :] - 2 * (x @ x.T)) / x.shape[1])


def one_word_apart(first, second):
    """Whether two names share a word and become equal by replacing, adding or removing one word, in any order."""
    a, b = (Counter(re.findall(r"\w+", name.lower())) for name in (first, second))
    return bool(a & b) and (a - b).total() <= 1 and (b - a).total() <= 1


def near_duplicate(records, distances):
    """Which pairs of concepts are near duplicates -> boolean array (count, count)."""
    near = np.any([d <= NEAR_DRAWING for d in distances.values()], axis=0)
    for i, first in enumerate(records):
        for j in range(i):
            second = records[j]
            if first["subgroup"] == second["subgroup"] and one_word_apart(first["name"], second["name"]):
                near[i, j] = near[j, i] = True
    np.fill_diagonal(near, False)
    return near


def draw_held_out(records):
    """Draw the held-out concepts: a share of every group, in the order of a hash, which no library version changes."""
    groups = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record["id"])
    shares = {group: len(ids) * HELD_OUT / len(records) for group, ids in groups.items()}
    counts = {group: int(share) for group, share in shares.items()}
    by_remainder = sorted(shares, key=lambda group: (counts[group] - shares[group], group))
    for group in by_remainder[: HELD_OUT - sum(counts.values())]:
        counts[group] += 1
    held_out = []
    for group, ids in groups.items():
        held_out += sorted(ids, key=lambda code: hashlib.sha256(f"{SEED}:{code}".encode()).digest())[: counts[group]]
    return sorted(held_out)


def split(records, near):
    """Content of splits.json."""
    held_out = draw_held_out(records)
    is_held_out = np.array([record["id"] in set(held_out) for record in records])
    leaky = {record["id"] for record, row in zip(records, near, strict=True) if row[~is_held_out].any()}
    with_seen_twin = [code for code in held_out if code in leaky]
    return {
        "held_out_style": HELD_OUT_STYLE,
        "held_out_concepts": held_out,
        "seed": SEED,
        "how": (
            f"{HELD_OUT} of {len(records)} concepts are held out from all three styles; the other "
            f"{len(records) - HELD_OUT} are seen. Each group gives its share (largest remainder); inside a group the "
            f"ids with the smallest sha256('{SEED}:' + id) are held out. Ids are sorted. The style '{HELD_OUT_STYLE}' "
            "is held out as well: train on the seen concepts of the other two styles, test on the held-out concepts of "
            "all three. The draw is plainly random: it does not keep families of look-alikes together, so one o'clock "
            "may be held out while two o'clock is seen, and the same goes for the man/woman/person variants of one "
            "activity, families, skin tones, coloured hearts, circles and squares, keycaps. `near_duplicates` lists "
            "the held-out concepts to which this happens; leave them out for a stricter test."
        ),
        "near_duplicates": {
            "rule": (
                "a held-out concept is listed if some seen concept (a) is in the same subgroup, shares a word of the "
                "name, and has the same name after one word is replaced, added or removed (in any order), or (b) has "
                f"nearly the same drawing in at least one style: root mean square difference of at most {NEAR_DRAWING} "
                "of 255, at 32x32 pixels, premultiplied RGBA"
            ),
            "count": len(with_seen_twin),
            "held_out_concepts": with_seen_twin,
        },
    }


# ---- output --------------------------------------------------------------------------------------------------------


def report(records, sheets, distances, splits):
    """Print the figures that README.md quotes."""
    print("concepts per group:", dict(Counter(record["group"] for record in records)))
    held_out = set(splits["held_out_concepts"])
    print("held out per group:", dict(Counter(r["group"] for r in records if r["id"] in held_out)))
    print("held out with a seen near duplicate:", splits["near_duplicates"]["count"])
    print("subgroups:", len({record["subgroup"] for record in records}))
    names = Counter(record["name"].lower() for record in records)
    print("names used more than once:", [name for name, count in names.items() if count > 1])
    words = [len(record["keywords"]) for record in records]
    print(f"keywords per concept: mean {np.mean(words):.1f}, {min(words)} to {max(words)}")
    print("keywords, different:", len({word for record in records for word in record["keywords"]}))
    same_caption = Counter(tuple(sorted(record["keywords"])) for record in records)
    print("concepts that share all their keywords with another:", sum(n for n in same_caption.values() if n > 1))
    for style, (drawn, stored) in sheets.items():
        a, b = (np.asarray(sheet.convert("RGBa"), dtype=np.float64) for sheet in (drawn, stored))
        cells = cells_of(stored, len(records))
        alpha = cells.reshape(len(records), -1, 4)[..., 3]
        boxes = [stored.crop((x, y, x + CELL, y + CELL)).getbbox() for x, y in map(position, range(len(records)))]
        extent = np.mean([max(right - left, bottom - top) for left, top, right, bottom in boxes])
        twins = Counter(cell.tobytes() for cell in cells)
        pairs = distances[style][np.triu_indices(len(records), 1)]
        near = distances[style] <= NEAR_DRAWING
        np.fill_diagonal(near, False)
        print(
            f"{style}: rounding {10 * np.log10(255**2 / np.mean((a - b) ** 2)):.1f} dB; "
            f"drawing spans {extent:.0f} px, covers {alpha.mean() / 2.55:.0f} % of the cell; exact copies: "
            f"{sum(n for n in twins.values() if n > 1)} concepts in {sum(n > 1 for n in twins.values())} sets; "
            f"nearly equal: {int((pairs <= NEAR_DRAWING).sum())} pairs, {int(near.any(1).sum())} concepts"
        )


def write(path, data):
    """Write a file under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{hashlib.sha256(data).hexdigest()}  {len(data):>8}  {path.name}")


def build(cache, out, examples):
    """Fetch, draw, split, report and write."""
    cache.mkdir(parents=True, exist_ok=True)
    tarballs = {package: fetch(package, cache) for package in PACKAGES}

    openmoji = json.loads(read_members(tarballs["openmoji"], "package/data/", ["openmoji.json"])["openmoji.json"])
    lists = {
        site: json.loads(read_members(tarballs[f"emoji-datasource-{site}"], "package/", ["emoji.json"])["emoji.json"])
        for site in ("google", "twitter")
    }
    records, images = select(openmoji, lists["google"], lists["twitter"])

    svgs = [f"{record['id']}.svg" for record in records]
    plan = {
        "openmoji": ("openmoji", "package/color/svg/", svgs, render),
        "noto": ("emoji-datasource-google", "package/img/google/64/", images, decode),
        "twemoji": ("emoji-datasource-twitter", "package/img/twitter/64/", images, decode),
    }
    sheets, distances = {}, {}
    for style in STYLES:
        package, folder, names, draw = plan[style]
        members = read_members(tarballs[package], folder, names)
        drawn = pack(style, [members[name] for name in names], draw)
        sheets[style] = (drawn, reduce_levels(drawn))
        distances[style] = drawing_distances(sheets[style][1], len(records))

    splits = split(records, near_duplicate(records, distances))
    report(records, sheets, distances, splits)

    files = {out / f"{style}.webp": to_webp(stored) for style, (_, stored) in sheets.items()}
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    files[out / "emoji.json"] = f"[\n{lines}\n]\n".encode()
    files[out / "splits.json"] = (json.dumps(splits, indent=1, ensure_ascii=False) + "\n").encode()
    index_of = {record["name"]: index for index, record in enumerate(records)}
    for file_name, name in EXAMPLE_NAMES.items():
        x, y = position(index_of[name])
        cell = sheets[HELD_OUT_STYLE][0].crop((x, y, x + CELL, y + CELL))
        files[examples / f"{file_name}.png"] = enlarge(cell)
    for path, data in files.items():
        write(path, data)


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="folder of the npm tarballs")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="where the data set goes (here)")
    parser.add_argument("--examples", type=Path, default=EXAMPLES, metavar="DIR", help="where the pictures go")
    options = parser.parse_args()
    try:
        build(options.cache.expanduser(), options.out, options.examples)
    except (BuildError, OSError, tarfile.TarError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
