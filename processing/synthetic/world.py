"""The generated world: named, coloured things that move over a background, with exact masks and boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .backgrounds import NOISE_LEVELS, noise_bank, random_background
from .config import WorldConfig
from .emoji import EMOJI
from .scene import Bar, SyntheticObject, plan_scene
from .sprites import ANGLES, COLOURS, DARKEST, LIGHTEST, Sprite, rasterise, tones

_MAX_LIGHT = 6  # largest change of brightness of a whole frame, in grey levels
_MAX_SHADE = 14  # largest difference of an object's colour from the named colour, in grey levels


@dataclass
class SyntheticClip:
    """One generated clip. ``T`` frames, ``N`` objects; later objects lie in front of earlier ones.

    Attributes:
        seed, config: what the clip follows from.
        frames: (T, H, W, 3) uint8 RGB.
        masks: (N, T, H, W) bool, visible pixels; the masks of two objects never overlap.
        boxes: (N, T, 4) float32, xyxy in pixels (exclusive maximum) around the visible pixels; NaN if none is.
        full_boxes: (N, T, 4) float32, the same around the whole shape, even where it is hidden or outside the picture.
        visibility: (N, T) float32, visible share of each shape's pixels.
        objects: N descriptions.
        bar: what hides objects for a while, if there is one.
    """

    seed: int
    config: WorldConfig
    frames: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    full_boxes: np.ndarray
    visibility: np.ndarray
    objects: list[SyntheticObject]
    bar: Bar | None = None

    @property
    def num_objects(self) -> int:
        return len(self.objects)


def generate_clip(seed: int, config: WorldConfig) -> SyntheticClip:
    """Generate the clip that belongs to ``seed``; the same seed and config always give the same clip.

    Args:
        seed: a non-negative integer; ``split_seed`` gives those of the fixed splits.
        config: the world.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    objects, bar = plan_scene(rng, config)
    sprites = [rasterise(thing.noun, thing.length, ANGLES[int(rng.integers(len(ANGLES)))]) for thing in objects]
    full_boxes = np.stack([_place_sprite(thing, sprite) for thing, sprite in zip(objects, sprites, strict=True)])
    paints = [_paint(rng, thing, sprite, config) for thing, sprite in zip(objects, sprites, strict=True)]
    frames, masks = _draw(rng, sprites, paints, full_boxes, config)
    if bar is not None:
        _draw_bar(rng, bar, frames, masks, config)
    _add_light_and_noise(rng, frames)
    frames = frames.reshape(config.num_frames, config.height, config.width, 3)
    boxes, visibility = _visible_boxes(masks, full_boxes, sprites)
    return SyntheticClip(seed, config, frames, masks, boxes, full_boxes.astype(np.float32), visibility, objects, bar)


def _place_sprite(thing: SyntheticObject, sprite: Sprite) -> np.ndarray:
    """Full boxes (T, 4) int xyxy: the path rounded to whole pixels."""
    size = np.array(sprite.mask.shape[::-1])
    corner = np.round(thing.centres - size / 2).astype(int)
    return np.concatenate([corner, corner + size], axis=1)


def _paint(rng: np.random.Generator, thing: SyntheticObject, sprite: Sprite, config: WorldConfig) -> np.ndarray:
    """Colour the sprite, with a random shade and, if it is a shape, perhaps a thin edge; see ``Sprite.paint``."""
    shade, *tints = rng.integers(-_MAX_SHADE, _MAX_SHADE + 1, 4).tolist()
    body = [value + shade + tint // 2 for value, tint in zip(COLOURS[thing.colour], tints, strict=True)]
    shadow, highlight = body, body
    if thing.noun in EMOJI:
        shadow, highlight = tones(body)
    elif rng.random() < config.edge:
        shadow = [0.4 * value for value in body] if rng.random() < 0.5 else [(value + 470) / 3 for value in body]
    limited = ([min(max(int(value), DARKEST), LIGHTEST) for value in rgb] for rgb in (body, shadow, highlight))
    return sprite.paint(*(np.array(rgb, np.uint16) for rgb in limited))


def _draw(
    rng: np.random.Generator,
    sprites: list[Sprite],
    paints: list[np.ndarray],
    full_boxes: np.ndarray,
    config: WorldConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Paste the sprites onto a background, the last in front: frames (T, H, 3 * W) and masks (N, T, H, W)."""
    height, width = config.height, config.width
    frames = np.empty((config.num_frames, height, 3 * width), np.uint8)  # interleaved: long rows are fast to blend
    frames[:] = random_background(rng, height, width, config.photographs)
    masks = np.zeros((len(sprites), config.num_frames, height, width), bool)
    for n, (sprite, paint) in enumerate(zip(sprites, paints, strict=True)):
        outside = ~sprite.mask
        for t, (left, top, right, bottom) in enumerate(full_boxes[n].tolist()):
            x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
            if x0 >= x1 or y0 >= y1:
                continue
            view = frames[t, y0:y1, 3 * x0 : 3 * x1]
            part = np.s_[y0 - top : y1 - top, 3 * (x0 - left) : 3 * (x1 - left)]
            blend = view * sprite.keep[part]
            blend += paint[part]
            blend >>= 8
            view[...] = blend
            part = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
            masks[n, t, y0:y1, x0:x1] = sprite.mask[part]
            if n:
                masks[:n, t, y0:y1, x0:x1] &= outside[part]
    return frames, masks


def _draw_bar(rng: np.random.Generator, bar: Bar, frames: np.ndarray, masks: np.ndarray, config: WorldConfig) -> None:
    """Hide everything behind a bar that has a background of its own and dark borders, in place."""
    picture = random_background(rng, *masks.shape[2:], config.photographs)
    if bar.axis == 0:
        picture[:, 3 * bar.start : 3 * bar.start + 3] //= 2
        picture[:, 3 * bar.stop - 3 : 3 * bar.stop] //= 2
        frames[:, :, 3 * bar.start : 3 * bar.stop] = picture[:, 3 * bar.start : 3 * bar.stop]
        masks[:, :, :, bar.start : bar.stop] = False
    else:
        picture[[bar.start, bar.stop - 1]] //= 2
        frames[:, bar.start : bar.stop] = picture[bar.start : bar.stop]
        masks[:, :, bar.start : bar.stop] = False


def _add_light_and_noise(rng: np.random.Generator, frames: np.ndarray) -> None:
    """Change the brightness a little from frame to frame and add noise, in place; no value can overflow."""
    num_frames, height, row = frames.shape
    bank = noise_bank(int(rng.integers(len(NOISE_LEVELS))), height, row // 3)
    light = rng.integers(-_MAX_LIGHT, _MAX_LIGHT + 1, num_frames).astype(np.uint8)
    for t, (y, x) in enumerate(rng.integers(32, size=(num_frames, 2)).tolist()):
        frames[t] += bank[y : y + height, 3 * x : 3 * x + row]
        frames[t] += light[t]


def _visible_boxes(masks: np.ndarray, full_boxes: np.ndarray, sprites: list[Sprite]) -> tuple[np.ndarray, np.ndarray]:
    """Tight boxes (N, T, 4) float32 of the visible pixels, NaN where there are none, and visible shares (N, T)."""
    boxes = np.full(full_boxes.shape, np.nan, np.float32)
    visibility = np.zeros(full_boxes.shape[:2], np.float32)
    for n, sprite in enumerate(sprites):
        for t, (left, top, right, bottom) in enumerate(full_boxes[n].tolist()):
            x0, y0 = max(left, 0), max(top, 0)
            window = masks[n, t, y0 : max(bottom, 0), x0 : max(right, 0)]
            area = np.count_nonzero(window)
            visibility[n, t] = area / sprite.area
            if area == sprite.area:
                boxes[n, t] = full_boxes[n, t]
            elif area:
                columns, rows = np.flatnonzero(window.any(axis=0)), np.flatnonzero(window.any(axis=1))
                boxes[n, t] = x0 + columns[0], y0 + rows[0], x0 + columns[-1] + 1, y0 + rows[-1] + 1
    return boxes, visibility
