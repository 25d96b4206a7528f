"""Backgrounds without nameable things, drawn or photographed: made once, then cropped and tinted for each clip."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from .sprites import ASSETS

POOL_SIZE = 96  # of drawn and of photographic backgrounds each
TEXTURE_SIDE = 256  # of each photograph in assets/textures.jpg, in pixels
TEXTURES = (
    "brick", "grass", "gravel", "wood", "rock", "soil", "meadow", "clouds", "paving", "floor", "warehouse", "street",
)  # fmt: skip
NOISE_LEVELS = (0.0, 1.5, 3.0)  # standard deviation of the noise of each frame, in grey levels
MAX_NOISE = 10
MAX_TINT = 12
_TEXTURE_RANGE = (62, 188)  # grey levels before tinting: every colour of an object stands out against them


def _smooth_noise(rng: np.random.Generator, cells: int, height: int, width: int, channels: int = 1) -> np.ndarray:
    """Random values on a ``cells`` × ``cells`` grid, interpolated to (height, width, channels) float, about -1..1."""
    grid = rng.uniform(-1, 1, (channels, cells + 1, cells + 1))

    def weights(size: int) -> np.ndarray:
        position = np.linspace(0, cells, size, endpoint=False)
        left = position.astype(int)
        share = position - left
        share = share * share * (3 - 2 * share)
        matrix = np.zeros((size, cells + 1))
        matrix[np.arange(size), left] = 1 - share
        matrix[np.arange(size), left + 1] = share
        return matrix

    return (weights(height) @ grid @ weights(width).T).transpose(1, 2, 0)


def _gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return (np.cos(angle) * x + np.sin(angle) * y)[..., None] * rng.uniform(15, 40)


def _stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Stripes, or checks when two sets of stripes cross."""
    period = min(height, width) * rng.uniform(0.06, 0.2)
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[:height, :width]
    first = np.sin(2 * np.pi / period * (np.cos(angle) * x + np.sin(angle) * y))
    second = np.sin(2 * np.pi / period * (np.cos(angle) * y - np.sin(angle) * x)) if rng.random() < 0.5 else 1.0
    return np.tanh(4 * first * second)[..., None] * rng.uniform(6, 16)


def _grain(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.normal(0, rng.uniform(4, 9), (height, width, 1))


def _clutter(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Patches of irregular outline and slightly other tone, with nothing one could name."""
    patches = _smooth_noise(rng, int(rng.integers(6, 13)), height, width)
    tone = (rng.uniform(6, 16) + rng.uniform(-3, 3, 3)) * rng.choice([-1, 1])
    return np.tanh(12 * (patches - 0.25)) * tone


@lru_cache(maxsize=4 * POOL_SIZE)
def _drawing(index: int, height: int, width: int) -> np.ndarray:
    """Number ``index`` of the drawn pool: (height, 3 * width) uint8, interleaved RGB."""
    rng = np.random.default_rng([7, index])
    picture = np.full((height, width, 3), rng.uniform(95, 155))
    picture += rng.uniform(-10, 10, 3)
    picture += _smooth_noise(rng, int(rng.integers(2, 6)), height, width, 3) * rng.uniform(4, 13)
    if index % 2:
        picture += _smooth_noise(rng, 4, height, width) * 25
    for pattern in (_gradient, _stripes, _grain, _clutter):
        if rng.random() < 0.4:
            picture += pattern(rng, height, width)
    return np.clip(picture, *_TEXTURE_RANGE).astype(np.uint8).reshape(height, 3 * width)


@lru_cache(maxsize=4 * POOL_SIZE)
def _photograph(index: int, height: int, width: int) -> np.ndarray:
    """Number ``index`` of the photographic pool: a cut, scaled and toned texture, as ``_drawing``."""
    rng = np.random.default_rng([9, index])
    left = index % len(TEXTURES) * TEXTURE_SIDE
    scale = rng.uniform(0.5, 1.0) * TEXTURE_SIDE / max(height, width)
    cut_width, cut_height = scale * width, scale * height
    x, y = left + rng.uniform(0, TEXTURE_SIDE - cut_width), rng.uniform(0, TEXTURE_SIDE - cut_height)
    cut = _textures().resize((width, height), Image.Resampling.BICUBIC, (x, y, x + cut_width, y + cut_height))
    contrast, middle = rng.uniform(0.2, 0.4), rng.uniform(105, 145)
    colour = 1 + rng.uniform(-0.14, 0.14, 3)
    picture = (middle + (np.asarray(cut, float) - 128)[..., None] * contrast) * colour
    return np.clip(picture, *_TEXTURE_RANGE).astype(np.uint8).reshape(height, 3 * width)


@lru_cache(maxsize=1)
def _textures() -> Image.Image:
    with Image.open(ASSETS / "textures.jpg") as picture:
        return picture.convert("L")


def random_background(rng: np.random.Generator, height: int, width: int, photographs: float) -> np.ndarray:
    """A background of (height, 3 * width) uint8, interleaved RGB, with values in 50..200.

    Args:
        photographs: probability of a photographic texture.
    """
    spare_y, spare_x = max(8, height // 4), max(8, width // 4)
    source = _photograph if rng.random() < photographs else _drawing
    texture = source(int(rng.integers(POOL_SIZE)), height + spare_y, width + spare_x)
    top, left = int(rng.integers(spare_y)), int(rng.integers(spare_x))
    picture = texture[top : top + height, 3 * left : 3 * (left + width)]
    if rng.random() < 0.5:
        picture = picture[::-1]
    tint = rng.integers(-MAX_TINT, MAX_TINT + 1, 3).astype(np.uint8)
    return picture + np.tile(tint, width)  # uint8 arithmetic wraps, so adding 256 - n subtracts n


@lru_cache(maxsize=8)
def noise_bank(level: int, height: int, width: int) -> np.ndarray:
    """Noise to cut frames from: (height + 32, 3 * width + 96) uint8, to be added with wrap-around."""
    rng = np.random.default_rng([8, level])
    noise = rng.normal(0, NOISE_LEVELS[level], (height + 32, 3 * width + 96))
    return np.clip(np.round(noise), -MAX_NOISE, MAX_NOISE).astype(np.int8).view(np.uint8)
