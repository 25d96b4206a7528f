"""Pictures with class-agnostic boxes, for the region proposer (stage 0)."""

import json
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from sparrow_processing.pixel_streams import segmenter_pixels
from sparrow_processing.synthetic import PRESETS, WorldConfig, generate_clip, split_seed

from .records import RecordError, SkipRecordError, _tuples

MIN_SIDE = 2.0  # pixels; what is smaller shows nothing
MIN_VISIBLE = 0.2  # share of an object of the generated world that must show


@dataclass
class BoxedPicture:
    """A picture `(H, W, 3)` uint8 RGB and all objects in it, boxes `(N, 4)` float32 xyxy in pixels."""

    picture: np.ndarray
    boxes: np.ndarray


class PictureSource(Protocol):
    """A numbered collection of pictures with boxes."""

    def __len__(self) -> int: ...

    def read(self, index: int, rng: np.random.Generator) -> BoxedPicture: ...


class CocoPictures:
    """Pictures and boxes of a JSON file in COCO's form; categories are not read.

    COCO, Objects365, OpenImages and V3Det are published so; SA-1B has one such object per picture, to be joined. Boxes
    of crowds are left out, and those with a side under two pixels. A picture without boxes left is kept: it teaches
    that there is nothing.

    Args:
        annotations: JSON file with `images` (`id`, `file_name`) and `annotations` (`image_id`, `bbox` as x, y, width
            and height in pixels, `iscrowd`).
        images: folder of the pictures.

    Raises:
        RecordError: the file is absent or not of that form.
    """

    def __init__(self, annotations: str | PathLike, images: str | PathLike):
        self.annotations, self.folder = Path(annotations), Path(images)
        try:
            content = json.loads(self.annotations.read_text(encoding="utf-8"))
            names = {image["id"]: image["file_name"] for image in content["images"]}
            boxes: dict[Any, list[list[float]]] = {index: [] for index in names}
            for item in content["annotations"]:
                x, y, width, height = item["bbox"]
                if not item.get("iscrowd", 0) and min(width, height) >= MIN_SIDE:
                    boxes[item["image_id"]].append([x, y, x + width, y + height])
        except OSError as error:
            raise RecordError(f"{annotations}: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(
                f"{annotations}: not in COCO's form, images with id and file_name and annotations with image_id and "
                f"bbox: {error!r}."
            ) from error
        if not names:
            raise RecordError(f"{annotations}: lists no images.")
        self.names = list(names.values())
        self.boxes = [np.array(item, dtype=np.float32).reshape(-1, 4) for item in boxes.values()]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, rng: np.random.Generator) -> BoxedPicture:
        path = self.folder / self.names[index]
        try:
            picture = np.asarray(Image.open(path).convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise RecordError(f"{self.annotations}: picture {path}: {error}.") from error
        return BoxedPicture(picture, self.boxes[index])


@dataclass
class SyntheticPictures:
    """One frame of each clip of the generated world; arguments as of [`SyntheticRecords`]."""

    split: str = "train"
    preset: str = "easy"
    world: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    size: int = 1_000_000

    def __post_init__(self):
        self.config: WorldConfig = replace(PRESETS[self.preset], **_tuples(self.world))

    def __len__(self) -> int:
        return self.size

    def read(self, index: int, rng: np.random.Generator) -> BoxedPicture:
        clip = generate_clip(split_seed(self.split, index, self.seed), self.config)
        t = int(rng.integers(len(clip.frames)))
        return BoxedPicture(clip.frames[t], clip.boxes[clip.visibility[:, t] >= MIN_VISIBLE, t])


class PictureBuilder:
    """Pictures to the tensors of the proposer: frames for SAM2, boxes normalised.

    Args:
        size: side of SAM2's square frame, pixels.
        augment: flip half of the pictures and cut up to a third off each side, in training.
    """

    def __init__(self, size: int, augment: bool):
        self.size, self.augment = size, augment

    def __call__(self, item: BoxedPicture, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """`mask_pixel_values` `(3, S, S)` and `boxes` `(N, 4)` normalised cxcywh."""
        picture, boxes = item.picture, item.boxes
        if self.augment:
            picture, boxes = _random_crop(picture, boxes, rng)
            if rng.random() < 0.5:
                picture, boxes = picture[:, ::-1], boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [picture.shape[1], 0] * 2
        H, W = picture.shape[:2]
        if min(H, W) < MIN_SIDE:
            raise SkipRecordError(f"a picture of {H} x {W} pixels")
        boxes = np.clip(boxes, 0, [W, H, W, H]) / [W, H, W, H]
        center, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        seen = (sides * np.minimum([W, H], self.size)).min(axis=1, initial=np.inf) >= MIN_SIDE
        return {
            "mask_pixel_values": segmenter_pixels(np.ascontiguousarray(picture), self.size),
            "boxes": torch.from_numpy(np.concatenate([center, sides], axis=1)[seen]).float(),
        }


def _random_crop(picture: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two thirds or more of each side; of the boxes those of which at least half is left, cut to the window."""
    H, W = picture.shape[:2]
    height, width = (max(round(side * rng.uniform(2 / 3, 1)), 1) for side in (H, W))
    top, left = int(rng.integers(H - height + 1)), int(rng.integers(W - width + 1))
    cut = np.clip(boxes - [left, top] * 2, 0, [width, height] * 2)
    left_over = np.prod(cut[:, 2:] - cut[:, :2], axis=1) >= 0.5 * np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return picture[top : top + height, left : left + width], cut[left_over].astype(np.float32)


def collate_pictures(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """`mask_pixel_values` `(F, 3, S, S)` and `boxes`, per picture `(N, 4)`."""
    return {
        "mask_pixel_values": torch.stack([sample["mask_pixel_values"] for sample in samples]),
        "boxes": [sample["boxes"] for sample in samples],
    }
