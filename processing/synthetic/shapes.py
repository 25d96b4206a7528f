"""Outlines of the flat shapes."""

from __future__ import annotations

import numpy as np

# Twelve shapes that stay apart at 18 pixels (largest overlap of two outlines: circle and square, IoU 0.84).
SHAPES = (
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


def inside_shape(noun: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
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
