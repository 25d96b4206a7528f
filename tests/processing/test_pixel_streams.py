"""Resizing, cropping and normalising of single frames, against numbers worked out by hand."""

import tracemalloc

import numpy as np
import pytest
import torch

from sparrow_processing.pixel_streams import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SAM_MEAN,
    SAM_STD,
    proposer_pixels,
    resize_bilinear,
    segmenter_pixels,
    spatial_pixels,
    temporal_pixels,
)

COLOR = (10, 128, 250)
STREAMS = {
    "spatial": (lambda frame, size: spatial_pixels(frame, size), CLIP_MEAN, CLIP_STD, 255),
    "spatial, whole": (lambda frame, size: spatial_pixels(frame, size, crop=False), CLIP_MEAN, CLIP_STD, 255),
    "temporal": (temporal_pixels, IMAGENET_MEAN, IMAGENET_STD, 255),
    "segmenter": (segmenter_pixels, SAM_MEAN, SAM_STD, 1),
}
SIZES = [(48, 64), (64, 48), (63, 127), (7, 5), (32, 32), (1, 1), (200, 3)]


def plain(height, width, color=COLOR):
    return np.full((height, width, 3), color, dtype=np.uint8)


def gray(values):
    """`(H, W, 3)` picture of gray values `(H, W)`."""
    return np.repeat(np.asarray(values, dtype=np.uint8)[..., None], 3, axis=-1)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("size", SIZES)
def test_a_plain_picture_stays_plain(stream, size):
    function, mean, std, scale = STREAMS[stream]
    frame = plain(*size)
    frame.flags.writeable = False  # as readers give them
    pixels = function(frame, 32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    for channel in range(3):
        expected = (COLOR[channel] / scale - mean[channel]) / std[channel]
        torch.testing.assert_close(pixels[channel], torch.full((32, 32), expected), atol=1e-5, rtol=1e-5)


def reds(pixels):
    """Columns and rows in which the red channel is the larger one."""
    is_red = pixels[0] > pixels[2]
    return is_red.float().mean(0), is_red.float().mean(1)


def half_red(height, width, axis):
    """Left (axis 1) or upper (axis 0) quarter red, the rest blue."""
    frame = plain(height, width, (0, 0, 255))
    frame[(slice(None),) * axis + (slice((height, width)[axis] // 4),)] = (255, 0, 0)
    return frame


def test_the_centre_is_cropped_or_the_whole_is_stretched():
    columns, _ = reds(spatial_pixels(half_red(40, 80, 1), 40))
    assert not columns.any()  # a quarter of the width lies on each side of the centre square
    columns, _ = reds(spatial_pixels(half_red(40, 80, 1), 40, crop=False))
    assert columns[:9].all() and not columns[11:].any()
    _, rows = reds(spatial_pixels(half_red(80, 40, 0), 40))
    assert not rows.any()


@pytest.mark.parametrize("function", [temporal_pixels, segmenter_pixels])
def test_the_whole_frame_is_stretched(function):
    columns, rows = reds(function(half_red(40, 80, 1), 64))
    assert columns[:15].all() and not columns[17:].any() and (rows == rows[0]).all()
    columns, rows = reds(function(half_red(80, 40, 0), 64))
    assert rows[:15].all() and not rows[17:].any() and (columns == columns[0]).all()


def test_a_frame_of_the_right_size_is_not_resampled():
    frame = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    picture = torch.from_numpy(frame).permute(2, 0, 1).float()
    expected = (picture - torch.tensor(SAM_MEAN)[:, None, None]) / torch.tensor(SAM_STD)[:, None, None]
    torch.testing.assert_close(segmenter_pixels(frame, 32), expected)
    np.testing.assert_array_equal(resize_bilinear(frame, 32), frame)
    expected = (picture / 255 - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    torch.testing.assert_close(spatial_pixels(frame, 32), expected)


def test_bilinear_by_hand():
    """Output centres lie at -1/4, 1/4, 3/4 and 5/4 of the two pixels; beyond the edge the edge is repeated."""
    np.testing.assert_array_equal(resize_bilinear(gray([[0, 255]] * 4), 4)[..., 0], [[0, 64, 191, 255]] * 4)
    np.testing.assert_array_equal(resize_bilinear(gray([[0] * 4, [255] * 4]), 4)[:, 0, 0], [0, 64, 191, 255])
    # halving is the mean of four pixels, rounded half up
    values = [[0, 1, 10, 20], [1, 0, 30, 40], [255, 255, 5, 5], [255, 254, 5, 6]]
    np.testing.assert_array_equal(resize_bilinear(gray(values), 2)[..., 0], [[1, 25], [255, 5]])


@pytest.mark.parametrize("size", SIZES)
def test_fixed_point_is_within_one_level_of_exact_arithmetic(size):
    frame = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(frame).permute(2, 0, 1)[None].double(), size=(24, 24), mode="bilinear", align_corners=False
    )[0].permute(1, 2, 0)
    assert np.abs(resize_bilinear(frame, 24) - exact.numpy()).max() < 1


def test_the_proposer_sees_the_picture_of_the_segmenter():
    frame = np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    picture = torch.from_numpy(frame).permute(2, 0, 1) / 255
    expected = (picture - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    torch.testing.assert_close(proposer_pixels(segmenter_pixels(frame, 32), 32), expected)
    assert proposer_pixels(segmenter_pixels(frame, 32), 20).shape == (3, 20, 20)


@pytest.mark.parametrize("size", [(1, 2048), (2048, 2)])
@pytest.mark.parametrize("stream", STREAMS)
def test_a_strip_takes_little_memory(stream, size):
    """With its short side magnified to 336 pixels, the first strip would take 694 MB."""
    function, mean, std, _ = STREAMS[stream]
    frame = plain(*size, (255, 255, 255))
    H, W = size
    frame[H // 2 - 1 :, W // 2 - 1 :] = 0
    tracemalloc.start()
    pixels = function(frame, 336)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pixels.shape == (3, 336, 336) and pixels[0, 175, 175] == pytest.approx(-mean[0] / std[0], abs=1e-5)
    assert peak < 64e6
