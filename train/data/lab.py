"""CIE Lab of sRGB pictures (D65), where distances are about those that people see; and back.

IEC 61966-2-1 for sRGB; CIE 15 for Lab. Shapes: colours last, any others before.
"""

from __future__ import annotations

import numpy as np

_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _TO_XYZ.sum(1, keepdims=True)
_TO_CONES = (_TO_XYZ / _WHITE).T.astype(np.float32)  # white becomes (1, 1, 1)
_FROM_CONES = np.linalg.inv(_TO_CONES)
_TO_LAB = np.array([[0, 116, 0], [500, -500, 0], [0, 200, -200]], np.float32).T
_FROM_LAB = np.linalg.inv(_TO_LAB)
_EDGE = 6 / 29  # below it the cube root is a line


def to_lab(pixels: np.ndarray) -> np.ndarray:
    """Lightness 0 to 100 and two colours, (..., 3) float32.

    Args:
        pixels: (..., 3) sRGB in [0, 1].

    Example:
        >>> to_lab(np.ones((1, 3), np.float32)).round(1).tolist()[0][0]
        100.0
    """
    linear = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    xyz = linear.astype(np.float32) @ _TO_CONES
    roots = np.where(xyz > _EDGE**3, np.cbrt(xyz), xyz / (3 * _EDGE**2) + 4 / 29)
    return roots.astype(np.float32) @ _TO_LAB - np.array([16, 0, 0], np.float32)


def from_lab(lab: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1], (..., 3) float32; colours that no screen shows are cut off.

    Args:
        lab: (..., 3).
    """
    roots = (lab + np.array([16, 0, 0], np.float32)) @ _FROM_LAB
    xyz = np.where(roots > _EDGE, roots**3, 3 * _EDGE**2 * (roots - 4 / 29))
    linear = (xyz.astype(np.float32) @ _FROM_CONES).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return srgb.astype(np.float32)
