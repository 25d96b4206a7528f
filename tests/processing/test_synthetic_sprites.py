"""What ships with the generated world: pictures that can be told apart, and textures that hide nothing."""

import numpy as np
import pytest

from sparrow_processing.synthetic import COLOURS, NOUNS
from sparrow_processing.synthetic.backgrounds import TEXTURES, random_background
from sparrow_processing.synthetic.emoji import EMOJI
from sparrow_processing.synthetic.shapes import SHAPES
from sparrow_processing.synthetic.sprites import ANGLES, ASSETS, DARKEST, LIGHTEST, rasterise, tones

SIDE = 32


def draw(rng, noun, size, background):
    """One object in a random colour in the middle of a picture (SIDE, SIDE, 3)."""
    colour = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))]) + rng.integers(-14, 15, 3)
    sprite = rasterise(noun, size, ANGLES[rng.integers(len(ANGLES))])
    shades = tones(colour.tolist()) if noun in EMOJI else (colour, colour)
    rgb = (np.clip(np.array(shade), DARKEST, LIGHTEST).astype(np.uint16) for shade in (colour, *shades))
    height, width = sprite.mask.shape
    y, x = (SIDE - height) // 2, (SIDE - width) // 2
    picture = background[:SIDE, : 3 * SIDE].astype(np.uint16)
    view = picture[y : y + height, 3 * x : 3 * (x + width)]
    view[...] = (view * sprite.keep + sprite.paint(*rgb)) >> 8
    return picture.reshape(SIDE, SIDE, 3) / 255


def edges(picture):
    """Strength of the edges between neighbouring pixels, whatever the colours."""
    down, right = np.abs(np.diff(picture, axis=0)).max(axis=-1), np.abs(np.diff(picture, axis=1)).max(axis=-1)
    return np.sqrt(np.concatenate([down.ravel(), right.ravel()]))


def examples(rng, count):
    pictures, labels = [], []
    for label, noun in enumerate(NOUNS):
        for _ in range(count):
            background = random_background(rng, 64, 64, 0.5)
            pictures.append(edges(draw(rng, noun, int(rng.integers(19, 23)), background)))
            labels.append(label)
    return np.array(pictures), np.array(labels)


def test_a_linear_classifier_tells_all_nouns_apart_at_20_pixels():
    rng = np.random.default_rng(0)
    known, labels = examples(rng, 20)
    seen, truth = examples(rng, 6)
    mean, spread = known.mean(axis=0), known.std(axis=0) + 0.05
    known, seen = (known - mean) / spread, (seen - mean) / spread
    wanted = np.eye(len(NOUNS))[labels] - 1 / len(NOUNS)
    weights = np.linalg.solve(known @ known.T + 300 * np.eye(len(known)), wanted)
    right = ((seen @ known.T) @ weights).argmax(axis=1) == truth
    assert right.mean() >= 0.99
    assert all(right[truth == label].mean() > 0.6 for label in range(len(NOUNS)))


def test_there_are_enough_nouns_and_none_is_a_speck():
    assert len(NOUNS) == len(set(NOUNS)) >= 40 and len(EMOJI) >= 30 and len(SHAPES) == 12
    assert len(set(EMOJI.values())) == len(EMOJI)
    for noun in NOUNS:
        for size in (18, 22, 38, 76):
            sprite = rasterise(noun, size, 0)
            assert 0.8 * size <= max(sprite.mask.shape) <= 1.1 * size, noun
            assert sprite.area >= 0.2 * size * size, noun


@pytest.mark.parametrize("noun", ["ring", "frog"])
def test_weights_of_the_tones_sum_up(noun):
    sprite = rasterise(noun, 30, 4)
    total = sprite.keep + sprite.body + sprite.shadow + sprite.highlight
    assert sprite.keep.dtype == np.uint16 and (total == 256).all()
    assert sprite.mask.any(axis=0).all() and sprite.mask.any(axis=1).all() and sprite.area == sprite.mask.sum()
    assert (sprite.keep.reshape(*sprite.mask.shape, 3)[sprite.mask] <= 128).all()


def test_assets_are_small_and_their_sources_named():
    notice = (ASSETS / "NOTICE.md").read_text(encoding="utf-8")
    for name in ("sprites.png", "textures.jpg"):
        assert (ASSETS / name).stat().st_size < 400_000 and name in notice
    assert all(texture in notice for texture in TEXTURES)
    assert "Open Font License" in notice and "CC0" in notice


@pytest.mark.parametrize("photographs", [0.0, 1.0])
@pytest.mark.parametrize("size", [(128, 128), (144, 256), (256, 192)])
def test_backgrounds_stay_in_their_range(photographs, size):
    pictures = [random_background(np.random.default_rng(seed), *size, photographs) for seed in range(12)]
    assert {picture.shape for picture in pictures} == {(size[0], 3 * size[1])}
    assert min(picture.min() for picture in pictures) >= 50 and max(picture.max() for picture in pictures) <= 200
    assert len({picture.tobytes() for picture in pictures}) == 12
