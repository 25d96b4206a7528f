"""What each noun looks like: flat shapes and emoji in one of eight colours, drawn once per size and angle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .emoji import EMOJI
from .shapes import SHAPES, inside_shape

ASSETS = Path(__file__).parent / "assets"
CELL = 72  # side of a cell of the atlas, in pixels
ATLAS_COLUMNS = 10

NOUNS = (*SHAPES, *EMOJI)

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
DARKEST, LIGHTEST = 20, 235

ANGLES = (-8, -4, 0, 4, 8)  # degrees; small, because a turned square would be a diamond
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Sprite:
    """A picture without colour, cropped to its mask. Weights are 0..256 for each channel of interleaved RGB.

    Attributes:
        mask: (h, w) bool, pixels that are at least half covered. Each border row and column has at least one.
        area: number of pixels of the mask.
        keep: (h, 3 * w) uint16, weight of the background.
        body, shadow, highlight: (h, 3 * w) uint16, weights of the three tones; with ``keep`` they sum to 256. The rim
            of a shape is its shadow.
    """

    mask: np.ndarray
    area: int
    keep: np.ndarray
    body: np.ndarray
    shadow: np.ndarray
    highlight: np.ndarray

    def paint(self, body: np.ndarray, shadow: np.ndarray, highlight: np.ndarray) -> np.ndarray:
        """What to add to the weighted background, (h, 3 * w) uint16: ``(background * keep + paint) >> 8``.

        Args:
            body, shadow, highlight: (3,) uint16 RGB 0..255.
        """
        width = self.mask.shape[1]
        painted = self.body * np.tile(body, width)
        painted += self.shadow * np.tile(shadow, width)
        painted += self.highlight * np.tile(highlight, width)
        return painted


@lru_cache(maxsize=8192)
def rasterise(noun: str, size: int, angle: int) -> Sprite:
    """Draw one noun.

    Args:
        noun: one of ``NOUNS``.
        size: about the longest side, in pixels.
        angle: clockwise rotation in degrees.
    """
    if noun in EMOJI:
        alpha, body, shadow, highlight = _emoji_weights(noun, size, angle)
    else:
        alpha, body, shadow, highlight = _shape_weights(noun, size, angle)
    mask = alpha >= 128
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    crop = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    mask = mask[crop].copy()
    weights = (np.repeat(weight[crop], 3, axis=1) for weight in (256 - alpha, body, shadow, highlight))
    return Sprite(mask, int(mask.sum()), *weights)


def _shape_weights(noun: str, size: int, angle: int) -> tuple[np.ndarray, ...]:
    """Coverage, and weights of body, rim and nothing: uint16 0..256 (side, side)."""
    side = int(1.3 * size) + 4
    samples = side * SUPERSAMPLING
    grid = ((np.arange(samples) + 0.5) / SUPERSAMPLING - side / 2) / (size / 2)
    x, y = np.meshgrid(grid, grid)
    cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    fine = inside_shape(noun, cosine * x + sine * y, cosine * y - sine * x)
    rim = max(2, round(SUPERSAMPLING * size / 28))  # about 3.5 % of the size, in samples

    def coverage(mask: np.ndarray) -> np.ndarray:
        share = mask.reshape(side, SUPERSAMPLING, side, SUPERSAMPLING).mean(axis=(1, 3))
        return np.round(256 * share).astype(np.uint16)

    alpha, body = coverage(fine), coverage(_erode(fine, rim))
    return alpha, body, alpha - body, np.zeros_like(alpha)


def _erode(mask: np.ndarray, distance: int) -> np.ndarray:
    """Erode a mask by ``distance`` samples in eight directions (its border must be empty)."""
    diagonal = round(distance * 0.7)
    steps = [(distance, 0), (-distance, 0), (0, distance), (0, -distance)]
    steps += [(dy, dx) for dy in (-diagonal, diagonal) for dx in (-diagonal, diagonal)]
    eroded = mask.copy()
    for step in steps:
        eroded &= np.roll(mask, step, axis=(0, 1))
    return eroded


def _emoji_weights(noun: str, size: int, angle: int) -> tuple[np.ndarray, ...]:
    """Coverage, and weights of body, shadow and highlight: uint16 0..256 (side, side)."""
    side = int(1.3 * size) + 4
    half = side / 2 * CELL / size  # pixels of the atlas that lie between the centre and the side
    turned = _atlas_cell(noun).rotate(-angle, Image.Resampling.BICUBIC, fillcolor=(128, 0))
    box = (CELL / 2 - half, CELL / 2 - half, CELL / 2 + half, CELL / 2 + half)
    padding = int(half - CELL / 2) + 2
    padded = Image.new("LA", (CELL + 2 * padding,) * 2, (128, 0))
    padded.paste(turned, (padding, padding))
    tone, alpha = padded.resize((side, side), Image.Resampling.BOX, tuple(edge + padding for edge in box)).split()
    tone, alpha = (np.asarray(channel).astype(np.uint16) for channel in (tone, alpha))
    alpha = alpha + (alpha >> 7)  # 0..256
    dark = np.maximum(128 - tone.astype(np.int32), 0).astype(np.uint16) * 2
    light = np.maximum(tone.astype(np.int32) - 128, 0).astype(np.uint16) * 2
    shadow, highlight = (
        (alpha.astype(np.uint32) * np.minimum(share, 256) >> 8).astype(np.uint16) for share in (dark, light)
    )
    return alpha, alpha - shadow - highlight, shadow, highlight


@lru_cache(maxsize=1)
def _atlas() -> Image.Image:
    with Image.open(ASSETS / "sprites.png") as picture:
        return picture.convert("LA")


@lru_cache(maxsize=len(EMOJI))
def _atlas_cell(noun: str) -> Image.Image:
    row, column = divmod(list(EMOJI).index(noun), ATLAS_COLUMNS)
    left, top = column * CELL, row * CELL
    return _atlas().crop((left, top, left + CELL, top + CELL))


def tones(colour: list[int]) -> tuple[list[float], list[float]]:
    """Shadow and highlight of an emoji of this colour, RGB. White gets no lighter and black no darker: both change
    little, and only the other way, so that they are not taken for grey."""
    if min(colour) > 180:
        return [0.62 * value for value in colour], [0.8 * value for value in colour]
    if max(colour) < 80:
        return [value + 32 for value in colour], [value + 64 for value in colour]
    return [0.45 * value for value in colour], [0.6 * value + 94 for value in colour]
