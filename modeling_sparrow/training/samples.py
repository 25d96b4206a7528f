"""Records about one video to the tensors of `SparrowForVideoGrounding.forward`.

Every mask, box and crop is taken from the very frame it is used for; the sample says which frames those are.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from sparrow_processing import SparrowProcessor, open_video
from sparrow_processing.frame_sampling import pad_to_multiple, sample_frame_indices
from sparrow_processing.pixel_streams import proposer_pixels, segmenter_pixels, spatial_pixels, temporal_pixels
from sparrow_processing.processing_sparrow import SEG_TOKEN

from .records import GroundingRecord, RecordError, SkipRecordError, recorded_objects

IGNORED = -100  # label of a word that is not trained


@dataclass
class TrackedFeatureSettings:
    """Target-specific tracked features (TSF): crops of the referent shown to the language model.

    Args:
        mode: `train` shows them in training only, which is the paper's default; `train_and_inference` in evaluation
            as well.
        crops: most crops of a question; the model keeps the medoids of K clusters of them.
        share: of the questions that get crops. Below 1 the model also sees prompts as they are at inference.
        box_jitter: standard deviation by which each edge of a crop is moved, in sides of the box (paper App. D.4).
        identity_switches: share of crops that show another object instead (paper App. D.4).
    """

    mode: Literal["none", "train", "train_and_inference"] = "none"
    crops: int = 16
    share: float = 1.0
    box_jitter: float = 0.0
    identity_switches: float = 0.0


@dataclass
class FrameSettings:
    """How much of a video a sample holds.

    Args:
        mask_frames: frames whose masks are compared. The language model sees as many as its configuration says.
        max_length: of the token sequence, visual tokens included; None: what the language model can hold.
    """

    mask_frames: int = 8
    max_length: int | None = None


@dataclass(frozen=True)
class Crop:
    """A crop of a tracked object: `box` float32 `(4,)` xyxy in pixels of frame `frame_index`."""

    object_id: int
    frame_index: int
    box: np.ndarray


class SampleBuilder:
    """Makes a sample of the records about one video.

    Args:
        processor: of the model.
        max_length: most tokens of a sequence, visual ones included.
        frames, tracked: see there.
        training: frames are drawn at random and crops are noisy; otherwise the same sample is made every time.
        grounded_only: leave out questions that ground nothing, for stages that train on objects alone.
    """

    def __init__(
        self,
        processor: SparrowProcessor,
        max_length: int,
        frames: FrameSettings,
        tracked: TrackedFeatureSettings,
        training: bool,
        grounded_only: bool = False,
    ):
        self.processor, self.max_length = processor, min(frames.max_length or max_length, max_length)
        self.num_mask_frames, self.tracked, self.training = frames.mask_frames, tracked, training
        self.grounded_only = grounded_only
        self.shows_crops = tracked.mode == "train_and_inference" or (training and tracked.mode == "train")

    def __call__(self, records: Sequence[GroundingRecord], rng: np.random.Generator) -> dict[str, Any]:
        """
        Returns:
            `input_ids` and `labels`, one list per question; `spatial_pixel_values` `(F, 3, h, w)`,
            `temporal_pixel_values` or None, `num_frames`; `crops` per question `(n, 3, h, w)`; for questions with
            tokens `mask_pixel_values` `(T, 3, S, S)`, `mask_labels` `(S, T, H, W)` int8 and `box_labels`
            `(S, M, T, 4)` as `forward` takes them, else None; `frames`: the indices of the frames and the [`Crop`]s
            they come from; `num_skipped` questions that were too long.

        Raises:
            SkipRecordError: no question fits.
            RecordError: an annotation does not fit the video.
            VideoReadError: the video cannot be read.
        """
        if self.grounded_only:
            first, records = records[0], [record for record in records if record.targets]
            if not records:
                raise SkipRecordError(f"{first.where}: no question grounds anything")
        video = open_video(records[0].video)
        size = (video.height, video.width)
        language_frames = sample_frame_indices(video.timestamps, self.processor.num_frames)
        rows, too_long = [], []
        for record in records:
            crops = choose_crops(record, self.tracked, size, rng, self.training) if self.shows_crops else []
            ids, labels = self._words(record, len(language_frames), len(crops))
            if len(ids) > self.max_length:
                too_long.append(record)
            else:
                rows.append((record, ids, labels, crops))
        if not rows:
            raise SkipRecordError(f"{too_long[0].where}: longer than {self.max_length} tokens")
        mask_frames = self._choose_mask_frames([record for record, *_ in rows], len(video), rng)
        crop_frames = [crop.frame_index for *_, crops in rows for crop in crops]
        needed = np.unique(np.concatenate([language_frames, mask_frames, crop_frames]).astype(np.int64))
        _check_frames(records[0], needed, len(video))
        pictures = dict(zip(needed.tolist(), video.read(needed), strict=True))
        sample = self._language_streams(pictures, language_frames)
        sample |= self._mask_streams([record for record, *_ in rows], pictures, mask_frames, size)
        return sample | {
            "input_ids": [ids for _, ids, _, _ in rows],
            "labels": [labels for _, _, labels, _ in rows],
            "crops": [self._crop_pixels(crops, pictures) for *_, crops in rows],
            "frames": {
                "language": language_frames.tolist(),
                "mask": list(mask_frames),
                "crops": [crops for *_, crops in rows],
            },
            "num_skipped": len(too_long),
        }

    # ------------------------------------------------------------------ words

    def _words(self, record: GroundingRecord, num_frames: int, num_crops: int) -> tuple[list[int], list[int]]:
        """Token ids and labels of a dialogue. What follows the last token pair of a long answer is cut off."""
        prompt = self.processor.prompt_ids(record.question, "ask", num_frames, num_crops)
        answer = answer_ids(self.processor, record.answer)
        seg = self.processor.token_ids[SEG_TOKEN]
        needed = max((place for place, index in enumerate(answer) if index == seg), default=0) + 1
        answer = answer[: max(self.max_length - len(prompt), needed)]
        return prompt + answer, [IGNORED] * len(prompt) + answer

    # ------------------------------------------------------------------ pictures

    def _language_streams(self, pictures: dict[int, np.ndarray], indices: np.ndarray) -> dict[str, Any]:
        processor = self.processor
        frames = [pictures[index] for index in pad_to_multiple(indices, processor.chunk_size).tolist()]
        spatial = [spatial_pixels(frame, processor.spatial_size, processor.spatial_crop) for frame in frames]
        temporal = [temporal_pixels(frame, processor.temporal_size) for frame in frames if len(frames) > 1]
        return {
            "spatial_pixel_values": torch.stack(spatial),
            "temporal_pixel_values": torch.stack(temporal) if temporal else None,
            "num_frames": len(frames),
        }

    def _crop_pixels(self, crops: list[Crop], pictures: dict[int, np.ndarray]) -> torch.Tensor:
        side = self.processor.spatial_size
        pixels = [spatial_pixels(cut(pictures[crop.frame_index], crop.box), side, crop=False) for crop in crops]
        return torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side)

    def _choose_mask_frames(
        self, records: list[GroundingRecord], num_frames: int, rng: np.random.Generator
    ) -> list[int]:
        """Frames in which all objects that are meant are annotated: the first, and others spread over the rest."""
        meant = [record.objects_by_id[index] for record in records for ids in record.targets for index in ids]
        if not any(record.targets for record in records):
            return []
        known = sorted(set.intersection(*(set(item.frames) for item in meant))) if meant else list(range(num_frames))
        if not known:
            raise SkipRecordError(f"{records[0].where}: no frame is annotated for all objects that are meant")
        if len(known) <= self.num_mask_frames:
            return known
        edges = np.linspace(1, len(known), self.num_mask_frames).astype(int)  # strata after the first frame
        places = [rng.integers(low, high) if self.training else low for low, high in itertools.pairwise(edges)]
        return [known[0], *(known[int(place)] for place in places)]

    def _mask_streams(
        self,
        records: list[GroundingRecord],
        pictures: dict[int, np.ndarray],
        frames: list[int],
        size: tuple[int, int],
    ) -> dict[str, Any]:
        if not frames:
            return dict.fromkeys(("mask_pixel_values", "proposer_pixel_values", "mask_labels", "box_labels"))
        pixels = [segmenter_pixels(pictures[index], self.processor.mask_size) for index in frames]
        masks, boxes = zip(
            *(token_labels(record, ids, frames, size) for record in records for ids in record.targets), strict=True
        )
        widest = max(len(item) for item in boxes)
        padded = torch.full((len(boxes), widest, len(frames), 4), torch.nan)
        for row, item in enumerate(boxes):
            padded[row, : len(item)] = torch.from_numpy(item)
        first = None
        if self.processor.proposer_size is not None:
            first = proposer_pixels(pixels[0], self.processor.proposer_size)
        return {
            "mask_pixel_values": torch.stack(pixels),
            "proposer_pixel_values": first,
            "mask_labels": torch.from_numpy(np.stack(masks)),
            "box_labels": padded,
        }


@functools.lru_cache(maxsize=8)
def _answer_prefix(processor: SparrowProcessor) -> tuple[int, ...]:
    """Token ids of a question up to where its answer begins."""
    return tuple(_template_ids(processor, [{"role": "user", "content": "x"}], add_generation_prompt=True))


def answer_ids(processor: SparrowProcessor, answer: str) -> list[int]:
    """Token ids of an answer as the chat template writes it, its end included.

    Raises:
        ValueError: a chat template whose answers do not begin where the prompt ends.
    """
    prefix = _answer_prefix(processor)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    ids = _template_ids(processor, turns, add_generation_prompt=False)
    if tuple(ids[: len(prefix)]) != prefix:
        raise ValueError("The chat template does not continue its generation prompt with the words of the assistant.")
    control = processor.tokenizer.added_tokens_decoder
    last = max(place for place, index in enumerate(ids) if index in control)
    return ids[len(prefix) : last + 1]


def _template_ids(processor: SparrowProcessor, turns: list[dict], add_generation_prompt: bool) -> list[int]:
    encoded = processor.tokenizer.apply_chat_template(
        turns,
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=add_generation_prompt,
    )
    return list(encoded["input_ids"])


# ---------------------------------------------------------------------- objects


def token_labels(
    record: GroundingRecord, ids: Sequence[int], frames: list[int], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """What a token means on some frames: all objects `ids` together.

    Returns:
        mask `(T, H, W)` int8, -1 in frames where the shape of an object is not known; boxes `(M, T, 4)` float32
        normalised xyxy, NaN where absent, `M` at least 1.
    """
    objects = record.objects_by_id
    H, W = size
    mask = np.zeros((len(frames), H, W), dtype=np.int8)
    boxes = np.full((max(len(ids), 1), len(frames), 4), np.nan, dtype=np.float32)
    for row, index in enumerate(ids):
        for t, frame in enumerate(frames):
            annotation = objects[index].frames[frame]
            shape = annotation.read_mask(size, record.where)
            if shape is None:
                mask[t] = -1
            elif mask[t, 0, 0] != -1:
                mask[t] |= shape
            boxes[row, t] = annotation.read_box(size, record.where) / np.array([W, H, W, H], dtype=np.float32)
    return mask, boxes


def choose_crops(
    record: GroundingRecord,
    settings: TrackedFeatureSettings,
    size: tuple[int, int],
    rng: np.random.Generator,
    training: bool,
) -> list[Crop]:
    """Where the crops of a question come from: frames spread over the track of each object that is meant.

    None for a question without objects, and, in training, for `1 - share` of the others.
    """
    ids = sorted({index for target in record.targets for index in target})
    if not ids or (training and rng.random() >= settings.share):
        return []
    objects = record.objects_by_id
    crops = []
    for index in ids:
        visible = sorted(frame for frame, item in objects[index].frames.items() if item.is_visible)
        count = min(-(-settings.crops // len(ids)), len(visible))
        for place in np.linspace(0, len(visible) - 1, count).round().astype(int):
            frame = visible[place]
            shown = index
            if rng.random() < settings.identity_switches:
                others = [item for item in record.objects if item.id not in ids and frame in item.frames]
                others = [item.id for item in others if item.frames[frame].is_visible]
                shown = others[int(rng.integers(len(others)))] if others else index
            box = objects[shown].frames[frame].read_box(size, record.where)
            noise = rng.normal(0, settings.box_jitter, 4) if settings.box_jitter else np.zeros(4)
            box = box + (noise * np.tile(box[2:] - box[:2], 2)).astype(np.float32)
            crops.append(Crop(shown, frame, box))
    return crops[: settings.crops]


def evaluation_crops(settings: TrackedFeatureSettings) -> Callable[[dict[str, Any]], list[np.ndarray]]:
    """Crops `(h, w, 3)` uint8 for a record of `SyntheticVideos`, from its true tracks with the noise of `settings`."""

    def crops(record: dict[str, Any]) -> list[np.ndarray]:
        question = GroundingRecord(
            video=record["frames"],
            question=record["expression"],
            answer="",
            objects=recorded_objects(record["masks"]),
            targets=(tuple(record["target_ids"]),),
        )
        size = record["frames"].shape[1:3]
        chosen = choose_crops(question, settings, size, np.random.default_rng(record["seed"]), training=False)
        return [cut(record["frames"][crop.frame_index], crop.box) for crop in chosen]

    return crops


def cut(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The pixels of `(H, W, 3)` that a box in pixels touches, at least one."""
    H, W = picture.shape[:2]
    x0, y0 = (int(np.clip(np.floor(low), 0, side - 1)) for low, side in zip(box[:2], (W, H), strict=True))
    x1, y1 = np.ceil(box[2:]).astype(int)
    return picture[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]


def _check_frames(record: GroundingRecord, frames: np.ndarray, num_frames: int):
    if len(frames) and frames[-1] >= num_frames:
        raise RecordError(
            f"{record.where}: frame {frames[-1]} is annotated, but the video has only {num_frames} frames."
        )


# ---------------------------------------------------------------------- batches


class GroundingCollator:
    """Samples of [`SampleBuilder`] to a batch of `forward`. Rows are padded on the right.

    Args:
        pad_token_id: for the padding.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [torch.tensor(row) for sample in samples for row in sample["input_ids"]]
        labels = [torch.tensor(row) for sample in samples for row in sample["labels"]]
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        batch = {
            "input_ids": pad(ids, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids]),
            "labels": pad(labels, padding_value=IGNORED),
            "video_index": torch.tensor([v for v, sample in enumerate(samples) for _ in sample["input_ids"]]),
            "spatial_pixel_values": torch.cat([sample["spatial_pixel_values"] for sample in samples]),
            "num_frames": torch.tensor([sample["num_frames"] for sample in samples]),
            "num_skipped": torch.tensor(sum(sample["num_skipped"] for sample in samples)),
        }
        temporal = [s["temporal_pixel_values"] for s in samples if s["temporal_pixel_values"] is not None]
        if temporal:
            batch["temporal_pixel_values"] = torch.cat(temporal)
        crops = [row for sample in samples for row in sample["crops"]]
        if any(len(row) for row in crops):
            batch["tsf_pixel_values"] = torch.cat(crops)
            batch["num_tsf_crops"] = torch.tensor([len(row) for row in crops])
        return batch | self._clips(samples)

    def _clips(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The mask side; a clip without tokens is one black frame, and all such clips have none."""
        shown = [sample["mask_pixel_values"] for sample in samples]
        present = [clip for clip in shown if clip is not None]
        if not present:
            return {}
        clips = [torch.zeros_like(present[0][:1]) if clip is None else clip for clip in shown]
        longest = max(len(clip) for clip in clips)
        padded = [torch.cat([clip, clip[-1:].expand(longest - len(clip), -1, -1, -1)]) for clip in clips]
        batch = {
            "mask_pixel_values": torch.stack(padded),
            "num_mask_frames": torch.tensor([len(clip) for clip in clips]),
            "mask_labels": [
                torch.zeros(0, 1, 1, 1, dtype=torch.int8) if sample["mask_labels"] is None else sample["mask_labels"]
                for sample in samples
            ],
            "box_labels": [
                torch.zeros(0, 1, 1, 4) if sample["box_labels"] is None else sample["box_labels"] for sample in samples
            ],
        }
        if any(sample["proposer_pixel_values"] is not None for sample in samples):
            first = next(s["proposer_pixel_values"] for s in samples if s["proposer_pixel_values"] is not None)
            batch["proposer_pixel_values"] = torch.stack(
                [
                    torch.zeros_like(first) if s["proposer_pixel_values"] is None else s["proposer_pixel_values"]
                    for s in samples
                ]
            )
        return batch
