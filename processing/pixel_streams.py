"""Frames to the tensors of each visual stream, as the released preprocessing does it: numpy, PIL and torch only.

Every function takes one upright RGB frame `(H, W, 3)` uint8 and returns one `(3, h, w)` float32 tensor.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet statistics, 0 to 255

# A longer strip is cut before its short side is magnified: one of 1 x 8192 pixels would take gigabytes.
STRIP_ASPECT = 32


def spatial_pixels(frame: np.ndarray, size: int, crop: bool = True) -> torch.Tensor:
    """Spatial tower (CLIP): short side to `size` and centre crop, or the whole frame stretched to a square."""
    if not crop:
        picture = Image.fromarray(frame).resize((size, size), Image.BICUBIC)
        return _normalize(np.asarray(picture) / 255.0, CLIP_MEAN, CLIP_STD)
    frame = _centre(frame, STRIP_ASPECT * min(frame.shape[:2]))
    H, W = frame.shape[:2]
    height, width = (size, int(size * W / H)) if H <= W else (int(size * H / W), size)
    picture = np.asarray(Image.fromarray(frame).resize((width, height), Image.BICUBIC))
    return _normalize(_centre(picture, size) / 255.0, CLIP_MEAN, CLIP_STD)


def temporal_pixels(frame: np.ndarray, size: int) -> torch.Tensor:
    """Temporal tower (InternVideo2): the whole frame stretched to a square, without smoothing."""
    return _normalize(resize_bilinear(frame, size) / 255.0, IMAGENET_MEAN, IMAGENET_STD)


def segmenter_pixels(frame: np.ndarray, size: int) -> torch.Tensor:
    """Segmenter (SAM2): long side to `size`, normalised, then stretched to a square."""
    H, W = frame.shape[:2]
    scale = size / max(H, W)
    height, width = max(int(H * scale + 0.5), 1), max(int(W * scale + 0.5), 1)
    if (height, width) != (H, W):
        frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.BILINEAR))
    pixels = _normalize(frame, SAM_MEAN, SAM_STD)
    if (height, width) == (size, size):
        return pixels
    return F.interpolate(pixels[None], size=(size, size), mode="bilinear", align_corners=False)[0]


def proposer_pixels(segmenter_frame: torch.Tensor, size: int) -> torch.Tensor:
    """Released region proposer: the segmenter's frame `(3, S, S)` turned back into a picture and shrunk to `size`."""
    picture = (segmenter_frame * _column(SAM_STD) + _column(SAM_MEAN)).round().clamp(0, 255).to(torch.uint8)
    picture = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((size, size), Image.BICUBIC)
    return _normalize(np.asarray(picture) / 255.0, IMAGENET_MEAN, IMAGENET_STD)


def resize_bilinear(frame: np.ndarray, size: int) -> np.ndarray:
    """`(H, W, 3)` uint8 to `(size, size, 3)` uint8 by bilinear sampling in OpenCV's fixed-point arithmetic.

    Weights have 11 bits; the vertical pass drops 4 bits before and 16 bits after each product.
    """
    left, right, weight = _taps(frame.shape[1], size)
    weight = np.where(left == right, 0, weight)[None, :, None]  # beyond the edge: the edge alone, along x only
    rows = frame[:, left] * (2048 - weight) + frame[:, right] * weight
    top, bottom, weight = _taps(frame.shape[0], size)
    weight = weight[:, None, None]
    upper, lower = (2048 - weight) * (rows[top] >> 4) >> 16, weight * (rows[bottom] >> 4) >> 16
    return np.clip((upper + lower + 2) >> 2, 0, 255).astype(np.uint8)


def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbours of each output pixel along one axis and the weight of the second, in units of 1 / 2048."""
    position = ((np.arange(size) + 0.5) * (length / size) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.int64)
    weight = np.rint((position - first) * 2048).astype(np.int32)
    return np.clip(first, 0, length - 1), np.clip(first + 1, 0, length - 1), weight


def _centre(picture: np.ndarray, limit: int) -> np.ndarray:
    """The middle `limit` rows and columns, all where there are no more."""
    top, left = (max(side - limit, 0) // 2 for side in picture.shape[:2])
    return picture[top : top + limit, left : left + limit]


def _normalize(picture: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32)).permute(2, 0, 1)
    return ((pixels - _column(mean)) / _column(std)).contiguous()


def _column(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values)[:, None, None]
