"""What several tests of training share."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from zoo.assets import asset


@pytest.fixture(scope="module")
def picture():
    """Soft and sharp parts in colour, as photographs have them: a drawing over waves of light."""
    rows, columns = np.mgrid[:96, :128]
    waves = [0.5 + 0.3 * np.sin(rows / 9 + phase) * np.cos(columns / 14 - phase) for phase in (0, 0.4, 0.8)]
    ground = Image.fromarray((np.stack(waves, 2) * 255).astype(np.uint8))
    with Image.open(asset("examples/fox.png")) as fox:
        fox = fox.convert("RGBA").resize((80, 80))
    ground.paste(fox, (24, 8), fox)
    return ground
