"""Cuts the example places out of NASA's Blue Marble.

mmoe recipe fetch blue_marble
python assets/places/build.py
"""

from pathlib import Path

from PIL import Image

from mmoe.atomic import atomic_path
from train.data import blue_marble

HERE = Path(__file__).resolve().parent
SIDE = 192  # pixels, 15 per degree
PLACES = {  # latitude and longitude of the middle
    "nile_delta": (29.5, 31.0),
    "himalaya": (29.5, 85.5),
    "congo_and_sahel": (8.0, 21.0),
    "baltic_sea": (58.5, 22.0),
    "great_lakes": (44.0, -83.5),
    "florida": (29.0, -83.0),
    "andes": (-17.0, -68.0),
    "patagonia": (-47.0, -70.0),
}


def main() -> None:
    """Writes a PNG per place."""
    map_ = blue_marble.pictures()  # (rows, columns, 3), from 70 N and 180 W
    for name, (latitude, longitude) in PLACES.items():
        row, column = round(15 * (70 - latitude)) - SIDE // 2, round(15 * (180 + longitude)) - SIDE // 2
        with atomic_path(HERE / f"{name}.png") as temporary:
            Image.fromarray(map_[row : row + SIDE, column : column + SIDE]).save(temporary, "PNG", optimize=True)


if __name__ == "__main__":
    main()
