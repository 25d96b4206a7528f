"""Flat shapes of the generated world: what each noun looks like, rasterised once per size and angle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Twelve shapes that stay apart at 18 pixels (largest overlap of two outlines: circle and square, IoU 0.84).
NOUNS = (
    "circle",
    "square",
    "triangle",
    "star",
    "ring",
    "cross",
    "heart",
    "diamond",
    "moon",
    "arrow",
    "bolt",
    "house",
)

# RGB, 0..255. All values lie in 20..235, so that the light jitter and noise that are added later never overflow.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (232, 128, 24),
    "yellow": (232, 218, 40),
    "green": (35, 150, 50),
    "blue": (35, 75, 220),
    "purple": (140, 40, 175),
    "white": (230, 230, 230),
    "black": (26, 26, 26),
}

ANGLES = (-8, -4, 0, 4, 8)  # degrees; small, because a turned square would be a diamond
SUPERSAMPLING = 4


def _star_corners() -> list[tuple[float, float]]:
    """Corners of a five-pointed star with one point up."""
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
    return list(zip((radii * np.cos(angles)).tolist(), (radii * np.sin(angles)).tolist(), strict=True))


# Corners in units of half the sprite's size: x to the right, y down.
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -0.9), (1, 0.85), (-1, 0.85)],
    "star": _star_corners(),
    "cross": [
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ],
    "diamond": [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)],
    "arrow": [(-1, -0.25), (0.05, -0.25), (0.05, -0.8), (1, 0), (0.05, 0.8), (0.05, 0.25), (-1, 0.25)],
    "bolt": [(0.25, -1), (-0.62, 0.15), (-0.1, 0.15), (-0.3, 1), (0.62, -0.25), (0.08, -0.25), (0.6, -1)],
    "house": [
        (0, -1), (1, -0.1), (0.72, -0.1), (0.72, 0.95), (0.24, 0.95), (0.24, 0.25),
        (-0.24, 0.25), (-0.24, 0.95), (-0.72, 0.95), (-0.72, -0.1), (-1, -0.1),
    ],
    "heart_tip": [(-0.94, -0.08), (0, -0.42), (0.94, -0.08), (0, 1)],
}  # fmt: skip


def _inside_polygon(corners: list[tuple[float, float]], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Even-odd test of points against a closed polygon."""
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 == y1:
            continue
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _inside(noun: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points, in units of half the sprite's size, lie inside the shape."""
    if noun == "circle":
        return np.hypot(x, y) <= 1
    if noun == "ring":
        return np.abs(np.hypot(x, y) - 0.79) <= 0.21
    if noun == "moon":
        return (np.hypot(x, y) <= 1) & (np.hypot(x - 0.52, y + 0.1) > 0.82)
    if noun == "heart":
        lobes = np.hypot(np.abs(x) - 0.5, y + 0.32) <= 0.5
        return lobes | _inside_polygon(_POLYGONS["heart_tip"], x, y)
    return _inside_polygon(_POLYGONS[noun], x, y)


def _erode(mask: np.ndarray, distance: int) -> np.ndarray:
    """Erode a mask by ``distance`` samples in eight directions (its border must be empty)."""
    diagonal = round(distance * 0.7)
    steps = [(distance, 0), (-distance, 0), (0, distance), (0, -distance)]
    steps += [(dy, dx) for dy in (-diagonal, diagonal) for dx in (-diagonal, diagonal)]
    eroded = mask.copy()
    for step in steps:
        eroded &= np.roll(mask, step, axis=(0, 1))
    return eroded


@dataclass(frozen=True)
class Sprite:
    """A shape without colour, cropped to its mask. Weights are 0..256 for each channel of interleaved RGB.

    Attributes:
        mask: (h, w) bool, pixels that are at least half covered. Each border row and column has at least one.
        area: number of pixels of the mask.
        keep: (h, 3 * w) uint16, weight of the background.
        inner, rim: (h, 3 * w) uint16, weights of the shape without its rim and of the rim; all three sum to 256.
    """

    mask: np.ndarray
    area: int
    keep: np.ndarray
    inner: np.ndarray
    rim: np.ndarray

    def paint(self, colour: np.ndarray, edge_colour: np.ndarray) -> np.ndarray:
        """What to add to the weighted background, (h, 3 * w) uint16: ``(background * keep + paint) >> 8``.

        Args:
            colour, edge_colour: (3,) uint16 RGB 0..255.
        """
        width = self.mask.shape[1]
        return self.inner * np.tile(colour, width) + self.rim * np.tile(edge_colour, width)


@lru_cache(maxsize=4096)
def rasterise(noun: str, size: int, angle: int) -> Sprite:
    """Draw one shape.

    Args:
        noun: one of ``NOUNS``.
        size: about the longest side, in pixels.
        angle: clockwise rotation in degrees.
    """
    side = int(1.3 * size) + 4
    samples = side * SUPERSAMPLING
    grid = ((np.arange(samples) + 0.5) / SUPERSAMPLING - side / 2) / (size / 2)
    x, y = np.meshgrid(grid, grid)
    cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    fine = _inside(noun, cosine * x + sine * y, cosine * y - sine * x)
    rim = max(2, round(SUPERSAMPLING * size / 28))  # about 3.5 % of the size, in samples

    def coverage(mask: np.ndarray) -> np.ndarray:
        share = mask.reshape(side, SUPERSAMPLING, side, SUPERSAMPLING).mean(axis=(1, 3))
        return np.round(256 * share).astype(np.uint16)

    alpha, inner = coverage(fine), coverage(_erode(fine, rim))
    mask = alpha >= 128
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    crop = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    mask, alpha, inner = mask[crop].copy(), alpha[crop], inner[crop]
    weights = (np.repeat(weight, 3, axis=1) for weight in (256 - alpha, inner, alpha - inner))
    return Sprite(mask, int(mask.sum()), *weights)
