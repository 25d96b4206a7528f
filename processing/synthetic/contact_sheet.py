"""Pictures of generated clips, for people to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .answers import Dialogue
from .expressions import Expression
from .world import SyntheticClip

_OUTLINES = ((255, 0, 255), (0, 255, 255), (255, 255, 0), (0, 255, 0), (255, 128, 0), (255, 255, 255))
_MAX_COLUMNS = 8
_LINE = 12  # height of a line of text, in pixels
_COLUMN, _LETTERS = 680, 120  # width of a column of text in pixels and in letters


def render_contact_sheet(
    clip: SyntheticClip, expressions: Sequence[Expression], dialogues: Sequence[Dialogue] = (), scale: int = 2
) -> Image.Image:
    """Draw the frames of a clip, the same with masks, boxes and object numbers, and texts below.

    At most 8 frames are shown, evenly spread over the clip.

    Args:
        clip: the clip.
        expressions: those to write below, each with its kind and the numbers of its targets.
        dialogues: the same.
        scale: how much frames are enlarged.
    """
    num_frames, height, width = clip.frames.shape[:3]
    shown = np.unique(np.linspace(0, num_frames - 1, _MAX_COLUMNS).round().astype(int)).tolist()
    lines = [_describe(i, clip) for i in range(clip.num_objects)]
    for item in expressions:
        lines.append(f"{item.kind}: {item.text!r} -> {', '.join(map(str, item.target_ids)) or 'none'}")
    for item in dialogues:
        lines.append(f"{item.kind}: {item.question!r} -> {item.answer!r} {list(map(list, item.targets))}")
    lines = [part for line in lines for part in textwrap.wrap(line, _LETTERS, subsequent_indent="    ")]
    tile_width, tile_height = width * scale, height * scale
    columns = max(1, len(shown) * tile_width // _COLUMN)
    rows = -(-len(lines) // columns)
    sheet = Image.new("RGB", (len(shown) * tile_width, 2 * tile_height + rows * _LINE + 4), "white")
    for column, t in enumerate(shown):
        picture = Image.fromarray(clip.frames[t]).resize((tile_width, tile_height), Image.Resampling.NEAREST)
        sheet.paste(picture, (column * tile_width, 0))
        sheet.paste(_annotate(picture, clip, t, scale), (column * tile_width, tile_height))
    draw = ImageDraw.Draw(sheet)
    for k, line in enumerate(lines):
        corner = (4 + k // rows * _COLUMN, 2 * tile_height + 2 + k % rows * _LINE)
        draw.text(corner, line, fill="black", font_size=10)
    return sheet


def _describe(i: int, clip: SyntheticClip) -> str:
    thing = clip.objects[i]
    action = "" if thing.action == "straight" else f", {thing.action} at {thing.action_at:.0%}"
    wall = ", turns at a wall" if thing.bounces else ""
    return f"[{i}] {thing.size} {thing.colour} {thing.noun}, {thing.direction} {thing.speed:.1f} px{action}{wall}"


def _annotate(picture: Image.Image, clip: SyntheticClip, t: int, scale: int) -> Image.Image:
    """Outline the visible masks, and draw boxes and numbers."""
    pixels = np.array(picture)
    for i in range(clip.num_objects):
        mask = np.kron(clip.masks[i, t], np.ones((scale, scale), bool))
        inside = mask.copy()
        for axis in (0, 1):
            inside &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
        pixels[mask & ~inside] = _OUTLINES[i % len(_OUTLINES)]
    annotated = Image.fromarray(pixels)
    draw = ImageDraw.Draw(annotated)
    for i in range(clip.num_objects):
        box = clip.boxes[i, t] * scale
        if not np.isnan(box).any():
            outline = _OUTLINES[i % len(_OUTLINES)]
            draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=outline)
            draw.text((box[0] + 2, max(0.0, box[1] - 11)), str(i), fill=outline, font_size=10)
    return annotated
