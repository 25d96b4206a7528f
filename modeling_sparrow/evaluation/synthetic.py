"""Evaluation on the generated world: questions about moving shapes whose masks are known exactly.

Beside J and F it measures what language is for: whether the right one of several similar objects was taken, whether
it was kept when objects cross, whether "nothing" was answered when nothing fits. The controls take something away
from the language model while the mask side sees the real clip: a model that does not look, or does not read, then
falls to `chance`. The control `true-boxes` leaves the language model out and prompts with the true boxes: what the
segmenter allows.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from sparrow_processing.results import GroundingResult, mask_to_box
from sparrow_processing.synthetic import SyntheticVideos, WorldConfig
from sparrow_processing.video_io import open_video

from .region_similarity import region_and_boundary
from .video_gcg import tube_ious
from .vidstg import box_iou

#: `blank-video`: the language model sees black frames; `other-video`: those of another clip; `other-question`: it is
#: asked what belongs to another clip; `true-boxes`: the targets are followed from where they first appear.
Control = Literal["none", "blank-video", "other-video", "other-question", "true-boxes"]
CONTROLS = ("none", "blank-video", "other-video", "other-question", "true-boxes")

TUBE_OVERLAP = 0.1  # IoU with the prediction over the whole clip from which an object can be the one taken
FOUND = 0.5  # IoU from which an object counts as covered
LEFT = 0.1  # IoU below which the prediction is no longer on the target


@dataclass(frozen=True)
class ClipScores:
    """Scores of one clip; see [`evaluate_synthetic`]. `None` where a question has no such number."""

    kind: str
    j: float
    f: float
    box_miou: float
    answered_none: bool
    chance: float | None
    right_object: bool | None
    identity_switch: bool | None
    targets_found: tuple[int, int] | None  # covered targets, targets


def evaluate_synthetic(
    model,
    processor,
    split: str,
    clips: int,
    seed: int = 0,
    control: Control = "none",
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    crops: Callable[[dict[str, Any]], list[np.ndarray]] | None = None,
    world: WorldConfig | None = None,
) -> dict[str, Any]:
    """Grounds one question in each clip of a split of the generated world and scores the masks.

    Args:
        model: a `SparrowForVideoGrounding`, in evaluation mode.
        processor: its `SparrowProcessor`.
        split: of [`SyntheticVideos`].
        clips: how many.
        seed: of the split; another seed gives other clips.
        control: what is taken away from the language model, or `true-boxes`.
        batch_size: clips answered together; it changes the speed, not the answers.
        max_new_tokens: longest answer; default as the checkpoint says.
        crops: gives the crops `(h, w, 3)` uint8 of the tracked referent of a record, which the language model then
            sees as well (the paper's TSF at inference).
        world: of the clips; default: the preset of the split.

    Returns:
        `j`, `f`, `box_miou`: means over clips of the mean over frames, of all predicted objects united against all
        targets united (both empty: 1); `right_object`: share of clips in which the object with the largest tube IoU
        with the prediction is a target, and that IoU is above 0.1; `chance`: mean of targets / objects;
        `identity_switches`: share of clips in which the prediction was on the target (frame IoU > 0.5) and later on
        another object instead (> 0.5 with it, < 0.1 with the target); these three leave out questions of kind `none`.
        `no_target_accuracy`: share of kind `none` that were answered with no object; `multi_target_recall`: share of
        the targets of kind `multi` that one predicted object covers (tube IoU > 0.5); both `None` if there is no such
        question. `by_kind`: `clips`, `right_object` and `j` of each kind. `seconds` and `frames_per_second` count the
        processor and the model.

    Raises:
        ValueError: for an unknown split or control, or fewer than one clip.
    """
    if control not in CONTROLS:
        raise ValueError(f"control={control!r}: expected one of {', '.join(CONTROLS)}")
    if clips < 1 or batch_size < 1:
        raise ValueError(f"clips={clips}, batch_size={batch_size}: expected at least 1")
    # One record more than is asked, so that every clip has a neighbour for the controls.
    videos = SyntheticVideos(split, config=world, size=clips + 1, seed=seed)
    scores: list[ClipScores] = []
    seconds, frames = 0.0, 0
    with tqdm(total=clips, desc=f"{split} ({control})" if control != "none" else split, unit="clip") as bar:
        for start in range(0, clips, batch_size):
            indices = range(start, min(start + batch_size, clips))
            records = [videos[index] for index in indices]
            neighbours = [videos[index + 1] for index in indices] if control.startswith("other") else records
            began = time.perf_counter()
            rate = videos.config.frames_per_second
            if control == "true-boxes":
                predicted = [follow_true_boxes(model, processor, record, rate) for record in records]
            else:
                results = ground_records(model, processor, records, neighbours, control, rate, max_new_tokens, crops)
                predicted = [result.masks for result in results]
            seconds += time.perf_counter() - began
            frames += sum(len(record["frames"]) for record in records)
            for record, masks in zip(records, predicted, strict=True):
                scores.append(score_clip(masks, record["masks"], record["target_ids"], record["kind"]))
                bar.update()
    summary = {"split": split, "clips": clips, "seed": seed, "control": control} | summarise(scores)
    return summary | {"frames_per_second": frames / seconds, "seconds": seconds}


def ground_records(
    model,
    processor,
    records: Sequence[dict[str, Any]],
    neighbours: Sequence[dict[str, Any]],
    control: Control,
    frames_per_second: float,
    max_new_tokens: int | None,
    crops: Callable[[dict[str, Any]], list[np.ndarray]] | None = None,
) -> list[GroundingResult]:
    """Results of some records, computed together.

    Args:
        neighbours: for each record another one, whose frames or question the controls use.
        frames_per_second: of the clips.
        crops: see [`evaluate_synthetic`].
    """
    asked = neighbours if control == "other-question" else records
    questions = [record["expression"] for record in asked]
    clips = [open_video(record["frames"], fps=frames_per_second) for record in records]
    tracked = None if crops is None else [crops(record) or None for record in records]
    inputs = processor(text=questions, videos=clips, task="refer", tracked_crops=tracked)
    if control in ("blank-video", "other-video"):
        seen = [record["frames"] for record in (neighbours if control == "other-video" else records)]
        if control == "blank-video":
            seen = [np.zeros_like(frames) for frames in seen]
        seen = [open_video(frames, fps=frames_per_second) for frames in seen]
        language = processor(text=questions, videos=seen, task="refer", stream=True)
        for name in ("spatial_pixel_values", "temporal_pixel_values"):
            inputs[name] = language[name]
    inputs = inputs.to(model.device)
    masks = processor.collector(inputs["metadata"])
    output = model.ground(**inputs, mask_sink=masks, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.post_process_grounding(output, masks)


def follow_true_boxes(model, processor, record: dict[str, Any], frames_per_second: float) -> np.ndarray:
    """Masks `(N, T, H, W)` bool of the targets of a record, each prompted with its true box where it first appears."""
    import torch  # the rest of this module needs no torch
    import torch.nn.functional as F

    from ..frame_pyramid import TensorFrames
    from ..mask_tracker import MaskPrompt, TrackedObject

    H, W = record["frames"].shape[1:3]
    clip = open_video(record["frames"], fps=frames_per_second)
    inputs = processor(text=record["expression"], videos=clip, task="refer").to(model.device)
    boxes = torch.from_numpy(record["boxes"]) / torch.tensor([W, H, W, H])  # NaN where hidden
    objects = []
    for n in record["target_ids"]:
        start = int((~boxes[n, :, 0].isnan()).nonzero()[0])
        prompt = MaskPrompt(boxes=boxes[n, start, None].to(model.device))
        objects.append(TrackedObject(start, [prompt]))
    followed = np.zeros((len(objects), len(record["frames"]), H, W), bool)
    with torch.no_grad():
        pyramids = model.model.mask_tracker.encode_video(TensorFrames(inputs["mask_pixel_values"][0]))
        for masks in model.propagate(pyramids, objects):
            logits = F.interpolate(masks.logits[:, None], size=(H, W), mode="bilinear", align_corners=False)[:, 0]
            followed[masks.objects, masks.frame_index] = (logits > 0).cpu().numpy()
    return followed


def score_clip(predicted: np.ndarray, masks: np.ndarray, target_ids: Sequence[int], kind: str) -> ClipScores:
    """Scores of one clip.

    Args:
        predicted: `(P, T, H, W)` bool.
        masks: `(N, T, H, W)` bool, all objects of the clip.
        target_ids: which of them are meant.
        kind: of the question.
    """
    targets = list(target_ids)
    union, truth = predicted.any(axis=0), masks[targets].any(axis=0)
    values = np.array([region_and_boundary(p, t) for p, t in zip(union, truth, strict=True)])
    boxes = np.mean([_tight_box_iou(p, t) for p, t in zip(union, truth, strict=True)])
    j, f = values.mean(axis=0).tolist()
    return ClipScores(
        kind=kind,
        j=j,
        f=f,
        box_miou=float(boxes),
        answered_none=len(predicted) == 0,
        chance=len(targets) / len(masks) if targets else None,
        right_object=_is_right_object(union, masks, targets) if targets else None,
        identity_switch=_has_identity_switch(union, masks, targets) if targets else None,
        targets_found=_targets_found(predicted, masks[targets]) if kind == "multi" else None,
    )


def _tight_box_iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """IoU of the boxes around two `(H, W)` masks: 1 if both are empty, 0 if one is."""
    boxes = mask_to_box(prediction), mask_to_box(truth)
    absent = [bool(np.isnan(box).any()) for box in boxes]
    return float(all(absent)) if any(absent) else box_iou(*boxes)


def _is_right_object(union: np.ndarray, masks: np.ndarray, targets: list[int]) -> bool:
    if not union.any():
        return False
    overlap = tube_ious(zip(masks.swapaxes(0, 1), union[:, None], strict=True))[:, 0]  # (N,)
    return bool(overlap.max() > TUBE_OVERLAP and overlap[targets].max() == overlap.max())


def _has_identity_switch(union: np.ndarray, masks: np.ndarray, targets: list[int]) -> bool:
    others = np.delete(masks, targets, axis=0)
    on_target = _frame_ious(union, masks[targets].any(axis=0))
    on_other = np.array([_frame_ious(union, other) for other in others]).reshape(len(others), len(union))
    been_there = np.logical_or.accumulate(on_target > FOUND)
    gone = (on_other > FOUND).any(axis=0) & (on_target < LEFT)
    return bool((been_there & gone).any())


def _frame_ious(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU `(T,)` of two `(T, H, W)` tracks on each frame, 0 where both are empty."""
    shared, covered = (first & second).sum(axis=(1, 2)), (first | second).sum(axis=(1, 2))
    return shared / np.maximum(covered, 1)


def _targets_found(predicted: np.ndarray, targets: np.ndarray) -> tuple[int, int]:
    if not len(predicted):
        return 0, len(targets)
    ious = tube_ious(zip(targets.swapaxes(0, 1), predicted.swapaxes(0, 1), strict=True))
    return int((ious.max(axis=1) > FOUND).sum()), len(targets)


def summarise(scores: Sequence[ClipScores]) -> dict[str, Any]:
    """Numbers over all clips; see [`evaluate_synthetic`]."""
    j, f = _mean(s.j for s in scores), _mean(s.f for s in scores)
    found = [s.targets_found for s in scores if s.targets_found is not None]
    kinds = {kind: [s for s in scores if s.kind == kind] for kind in sorted({s.kind for s in scores})}
    return {
        "j": j,
        "f": f,
        "j_and_f": (j + f) / 2,
        "box_miou": _mean(s.box_miou for s in scores),
        "right_object": _mean(s.right_object for s in scores),
        "chance": _mean(s.chance for s in scores),
        "identity_switches": _mean(s.identity_switch for s in scores),
        "no_target_accuracy": _mean(s.answered_none for s in kinds.get("none", ())),
        "multi_target_recall": sum(n for n, _ in found) / sum(n for _, n in found) if found else None,
        "by_kind": {
            kind: {
                "clips": len(own),
                "right_object": _mean(s.right_object for s in own),
                "j": _mean(s.j for s in own),
            }
            for kind, own in kinds.items()
        },
    }


def _mean(values) -> float | None:
    """Mean of those that are not `None`; `None` if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
