"""Make the pictures that the generated world ships: the atlas of sprites and the photographic textures.

    python -m sparrow_processing.synthetic.build_assets sprites NotoColorEmoji.ttf
    python -m sparrow_processing.synthetic.build_assets textures PHOTOGRAPHS

Nobody who uses the world needs this: it is how the files in assets/ came about. Sources and licences are in
assets/NOTICE.md.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .backgrounds import TEXTURE_SIDE, TEXTURES
from .emoji import EMOJI
from .sprites import ASSETS, ATLAS_COLUMNS, CELL

FONT_SIZE = 109  # the one size of the bitmaps in the font
_MARGIN = 1  # empty pixels around each sprite, so that neighbours never mix
_LEAST_SPREAD = 30.0  # grey levels: flat pictures are not stretched beyond this
_CONTRAST = 1.5  # above 1: more of a picture stays near the named colour

# Where each texture is cut from its photograph: file, left, top and side in pixels, before it is resized.
CROPS = {
    "brick": ("brick.png", 0, 0, 512),
    "grass": ("grass.png", 0, 0, 512),
    "gravel": ("gravel.png", 0, 0, 512),
    "wood": ("coffee.png", 445, 245, 155),
    "rock": ("dawn.png", 130, 150, 100),
    "soil": ("forest.png", 20, 150, 90),
    "meadow": ("park.png", 100, 145, 100),
    "clouds": ("sky.png", 0, 20, 110),
    "paving": ("sunset.png", 180, 150, 100),
    "floor": ("hall.png", 330, 150, 100),
    "warehouse": ("warehouse.png", 10, 60, 130),
    "street": ("city.png", 0, 110, 110),
}


def draw_emoji(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One character, RGBA, cropped to what is drawn."""
    picture = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    ImageDraw.Draw(picture).text((FONT_SIZE // 4, FONT_SIZE // 4), character, font=font, embedded_color=True)
    box = picture.getchannel("A").point(lambda value: 255 * (value > 40)).getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for {character!r}: take a colour emoji font")
    return picture.crop(box)


def tone_picture(picture: Image.Image) -> Image.Image:
    """Luminance around its median, "LA": 128 where the named colour goes, 0 its shadow, 255 its highlight."""
    alpha = np.array(picture.getchannel("A"))
    luminance = np.array(picture.convert("RGB").convert("L"), float)
    inside = luminance[alpha > 128]
    low, median, high = np.percentile(inside, (4, 50, 96))
    below = (luminance - median) / max(median - low, _LEAST_SPREAD)
    above = (luminance - median) / max(high - median, _LEAST_SPREAD)
    spread = np.clip(np.where(luminance < median, below, above), -1, 1)
    tone = 128 + 127 * np.sign(spread) * np.abs(spread) ** _CONTRAST
    tone[alpha < 8] = 128
    return Image.merge("LA", (Image.fromarray(tone.astype(np.uint8)), Image.fromarray(alpha)))


def build_sprites(font_file: Path) -> Image.Image:
    font = ImageFont.truetype(str(font_file), FONT_SIZE)
    rows = -(-len(EMOJI) // ATLAS_COLUMNS)
    atlas = Image.new("LA", (ATLAS_COLUMNS * CELL, rows * CELL), (128, 0))
    for number, character in enumerate(EMOJI.values()):
        picture = tone_picture(draw_emoji(character, font))
        scale = (CELL - 2 * _MARGIN) / max(picture.size)
        size = [max(1, round(side * scale)) for side in picture.size]
        row, column = divmod(number, ATLAS_COLUMNS)
        corner = (column * CELL + (CELL - size[0]) // 2, row * CELL + (CELL - size[1]) // 2)
        atlas.paste(picture.resize(size, Image.Resampling.LANCZOS), corner)
    return atlas


def build_textures(photographs: Path) -> Image.Image:
    """Grey crops side by side, each stretched to the whole range of grey levels.

    Args:
        photographs: folder with the files of ``CROPS``.
    """
    strip = Image.new("L", (len(TEXTURES) * TEXTURE_SIDE, TEXTURE_SIDE))
    for number, name in enumerate(TEXTURES):
        file, left, top, side = CROPS[name]
        with Image.open(photographs / file) as picture:
            crop = picture.convert("L").crop((left, top, left + side, top + side))
        crop = crop.resize((TEXTURE_SIDE, TEXTURE_SIDE), Image.Resampling.LANCZOS)
        pixels = np.array(crop, float)
        low, high = np.percentile(pixels, (1, 99))
        pixels = np.clip((pixels - low) / (high - low) * 255, 0, 255).astype(np.uint8)
        strip.paste(Image.fromarray(pixels), (number * TEXTURE_SIDE, 0))
    return strip


def save(picture: Image.Image, path: Path, **options) -> None:
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    picture.save(unfinished, format="PNG" if path.suffix == ".png" else "JPEG", **options)
    os.replace(unfinished, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("sprites", "textures"))
    parser.add_argument("source", type=Path, help="the font, or the folder of photographs")
    options = parser.parse_args()
    if options.what == "sprites":
        save(build_sprites(options.source), ASSETS / "sprites.png", optimize=True)
    else:
        save(build_textures(options.source), ASSETS / "textures.jpg", quality=82)


if __name__ == "__main__":
    main()
