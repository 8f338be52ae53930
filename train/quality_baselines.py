"""What a model of picture quality has to beat, measured on the distorted photographs: python -m train.quality_baselines

* cell oracle: knows kind and level of every picture and says what people said about them; nothing about the picture.
  On labels that are this alone it is right by construction; on those with a content term it is the ceiling of models
  that see distortions and no content.
* PIQE (Venkatanath et al., NCC 2015), which needs no training. In blocks of 16 x 16 of normalised luminance with
  variance v > 0.1, an artefact (one of the 6-pixel parts of the edges varies by less than 0.1) counts 1 - v and noise
  (s > 2 |s - r| / max(s, r), where s = sqrt(v) and r is the ratio of the deviations of two middle columns and of the
  rest) counts v; the score is (sum + 1) / (active blocks + 1).
* total variation and size as JPEG: busy or not. The sign that is better is the one on the training folds.
* ridge regression on 18 statistics: seven of normalised luminance at two sizes (mean magnitude, variance, kurtosis,
  mean products of neighbours in four directions, after BRISQUE: Mittal et al., IEEE TIP 2012), lightness, its
  deviation, colourfulness, and log size as JPEG.

Own implementations of the formulas. Shapes: H, W picture; n pictures.
"""

from __future__ import annotations

import argparse
import io
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from train.data import build
from train.data.distorted_photos import FOLDS
from train.data.lab import to_lab
from train.progress import Progress
from train.quality import agreement
from train.quality_groups import monotone
from train.sections import DataSection
from zoo.images import read_image

BLOCK, PART = 16, 6
_EDGE = 0.1  # of PIQE: variance of active blocks, deviation of parts of edges
_ROWS = ("cell oracle", "PIQE", "total variation", "JPEG size", "ridge on 18 statistics")


def luminance(picture: Any) -> np.ndarray:
    """Grey values 0 to 255, (H, W)."""
    return np.asarray(read_image(picture).convert("L"), np.float64)


def normalised(grey: np.ndarray) -> np.ndarray:
    """Each pixel less the mean around it, over 1 + the deviation around it (Gaussian window of 7 x 7, sigma 7/6)."""
    window = {"sigma": 7 / 6, "radius": 3, "mode": "nearest"}
    mean = gaussian_filter(grey, **window)
    spread = np.sqrt(np.abs(gaussian_filter(grey**2, **window) - mean**2))
    return (grey - mean) / (spread + 1)


def piqe(picture: Any) -> float:
    """Distortion of a picture, 0 to 100, lower is better.

    Example:
        >>> piqe(Image.new("RGB", (64, 64), "red"))
        100.0
    """
    values = normalised(luminance(picture))
    missing = [-side % BLOCK for side in values.shape]
    values = np.pad(values, [(0, more) for more in missing], "edge")
    rows, columns = (side // BLOCK for side in values.shape)
    blocks = values.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2).reshape(-1, BLOCK, BLOCK)  # (n, 16, 16)
    variance = blocks.var((1, 2), ddof=1)
    active = variance > _EDGE
    blocks, variance = blocks[active], variance[active]
    if not len(blocks):
        return 100.0
    edges = np.stack([blocks[:, 0], blocks[:, -1], blocks[:, :, 0], blocks[:, :, -1]], 1)  # (n, 4, 16)
    parts = np.lib.stride_tricks.sliding_window_view(edges, PART, 2)  # (n, 4, 11, 6)
    artefact = (parts.std(3, ddof=1) < _EDGE).any((1, 2))
    middle = slice(BLOCK // 2 - 1, BLOCK // 2 + 1)
    inner = blocks[:, :, middle].std((1, 2), ddof=1)
    outer = np.delete(blocks, np.r_[middle], 2).std((1, 2), ddof=1)
    deviation, ratio = np.sqrt(variance), inner / np.maximum(outer, 1e-12)
    noise = deviation > 2 * np.abs(deviation - ratio) / np.maximum(deviation, ratio)
    total = (artefact * (1 - variance) + noise * variance).sum()
    return float(100 * (total + 1) / (len(blocks) + 1))


def total_variation(picture: Any) -> float:
    """Mean difference of neighbours, 0 to 255."""
    grey = luminance(picture)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def jpeg_size(picture: Any) -> float:
    """Bytes per pixel as JPEG of quality 75."""
    image, file = read_image(picture), io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return file.tell() / (image.width * image.height)


def statistics_of(picture: Any) -> list[float]:
    """The 18 numbers that ridge regression gets."""
    image = read_image(picture)
    lab = to_lab(np.asarray(image, np.float32) / 255)
    found = [lab[..., 0].mean(), lab[..., 0].std(), np.hypot(lab[..., 1], lab[..., 2]).mean(), np.log(jpeg_size(image))]
    for size in (image.size, [max(8, side // 2) for side in image.size]):
        values = normalised(luminance(image.resize(size, Image.Resampling.BICUBIC)))
        variance = values.var() + 1e-6
        found += [np.abs(values).mean(), variance, ((values - values.mean()) ** 4).mean() / variance**2]
        found += [(values[:, 1:] * values[:, :-1]).mean(), (values[1:] * values[:-1]).mean()]
        found += [(values[1:, 1:] * values[:-1, :-1]).mean(), (values[1:, :-1] * values[:-1, 1:]).mean()]
    return [float(value) for value in found]


def measured(packaged: bool, size: int) -> list[dict[str, Any]]:
    """Every picture of the data with its fold and what the baselines see of it."""
    options = {"packaged": packaged, "size": size}
    sets = [build(DataSection(name="distorted_photos", options={**options, "fold": f}), "eval") for f in range(FOLDS)]
    found = []
    with Progress("measuring", sum(map(len, sets)), unit="pictures") as bar:
        for fold, data in enumerate(sets):
            for index in range(len(data)):
                sample = data.read(index)
                picture = sample["image"]
                seen = {"PIQE": -piqe(picture), "total variation": total_variation(picture)}
                seen |= {"JPEG size": jpeg_size(picture), "statistics": statistics_of(picture)}
                about = {name: value for name, value in sample.items() if name != "image"}
                found.append({**about, **seen, "fold": fold})
                bar.update(len(found))
    return found


def predictions(name: str, train: list[dict[str, Any]], test: list[dict[str, Any]], label: str) -> list[float]:
    """What a baseline says about the pictures of a fold.

    Args:
        name: of the baseline.
        train: pictures of the other folds.
        test: pictures of the fold.
        label: field that holds the labels.
    """
    if name == "cell oracle":
        return [row["human"] for row in test]
    if name == "ridge on 18 statistics":
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))
        model.fit([row["statistics"] for row in train], [row[label] for row in train])
        return [float(value) for value in model.predict([row["statistics"] for row in test])]
    seen, right = [row[name] for row in train], [row[label] for row in train]
    sign = 1 if name == "PIQE" or agreement(seen, right)["SRCC"] >= 0 else -1
    return [sign * row[name] for row in test]


def compare(pictures: list[dict[str, Any]], fold: int, label: str) -> dict[str, dict[str, float]]:
    """Metrics of each baseline on one fold."""
    train = [row for row in pictures if row["fold"] != fold]
    test = [{**row, "score": row[label]} for row in pictures if row["fold"] == fold]
    found = {}
    for name in _ROWS:
        said = predictions(name, train, test, label)
        falling = monotone(said, test)
        found[name] = agreement(said, [row["score"] for row in test]) | {"monotone": falling or 0.0}
    return found


def table(results: list[Mapping[str, Mapping[str, float]]]) -> str:
    """Mean and standard deviation over folds, a line per baseline; and both correlations fold by fold."""
    metrics = list(results[0][_ROWS[0]])
    lines = [f"{'':24}" + "".join(f"{metric:>18}" for metric in metrics)]
    for name in _ROWS:
        cells = []
        for metric in metrics:
            values = [result[name][metric] for result in results]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"{name:24}" + "".join(f"{cell:>18}" for cell in cells))
    if len(results) > 1:
        for metric in ("SRCC", "PLCC"):
            lines.append(f"{metric} fold by fold")
            lines += [f"  {name:22}" + "".join(f"{result[name][metric]:9.3f}" for result in results) for name in _ROWS]
    return "\n".join(lines)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(
        prog="python -m train.quality_baselines", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--fold", type=int, choices=range(FOLDS), help="only this one; all when left out")
    parser.add_argument("--packaged", action="store_true", help="only the pictures of scikit-image and scikit-learn")
    parser.add_argument("--size", type=int, default=192, help="side of the pictures in pixels")
    given = parser.parse_args()
    pictures = measured(given.packaged, given.size)
    folds = range(FOLDS) if given.fold is None else [given.fold]
    labels = {"human": "human part of the pseudo-labels", "score": "pseudo-labels with content"}
    for label, told in {**labels, "metrics": "what five metrics alone say"}.items():
        print(f"{told}, fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))}")
        print(table([compare(pictures, fold, label) for fold in folds]), end="\n\n")


if __name__ == "__main__":
    main()
