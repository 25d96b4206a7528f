"""Frames to the tensors of the three visual streams."""

import re

import torch

from sparrow_processing.pixel_streams import segmenter_pixels, spatial_pixels, temporal_pixels

from .fixtures import Recording, for_cases, for_families

CLIP_SIZE, INTERNVIDEO_SIZE = 336, 224  # fixed in the official code


def check_pixels(official: Recording, name: str, pixels: torch.Tensor):
    """Compare with a recording of every n-th pixel."""
    stride = int(re.search(r"every(\d+)$", name)[1])
    official.check(name, pixels[:, ::stride, ::stride])


@for_cases("", "preprocess")
def test_streams(official: Recording, case: str):
    frame = official[f"in.{case}"].numpy()
    size = int(official[f"out.{case}.sam2_shape"][-1])
    segmenter = segmenter_pixels(frame, size)
    official.check(f"{case}.sam2_shape", torch.tensor(segmenter.shape))
    top, left = official[f"out.{case}.sam2_corner"].shape[1:]
    official.check(f"{case}.sam2_corner", segmenter[:, :top, :left])
    for name in official.names(f"{case}."):
        if "sam2_every" in name:
            check_pixels(official, name, segmenter)
        elif "clip_every" in name:
            check_pixels(official, name, spatial_pixels(frame, CLIP_SIZE))
        elif "internvideo_every" in name:
            check_pixels(official, name, temporal_pixels(frame, INTERNVIDEO_SIZE))
    official.leave_out(f"{case}.resize_shape", "a size on the way, which `segmenter_pixels` does not return")


@for_families("preprocess")
def test_every_output_is_compared(official: Recording, whole_module):
    assert not official.missing()


@for_families("internvideo2_tiny")
def test_frame_of_the_temporal_tower(official: Recording):
    pixels = temporal_pixels(official["in.raw_frame"].numpy(), INTERNVIDEO_SIZE)
    official.check("preprocess_224_strided", pixels[:, ::7, ::7])
