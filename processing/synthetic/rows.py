"""Rows of the published dataset: one clip, one question and what grounds its answer."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from ..results import encode_mask
from .answers import DIALOGUE_KINDS, Dialogue, all_dialogues, refer_dialogue
from .dataset import SyntheticVideos
from .expressions import Expression, sample_expressions
from .world import SyntheticClip

OTHER_FORMS = 0.3  # share of the training rows that ask for a caption, a time span or a plain answer
_QUALITY = "12"  # x264's constant rate factor: nothing a person sees is lost


@dataclass(frozen=True)
class SyntheticRow:
    """One row, the same fields as the columns of the parquet files.

    Attributes:
        id: split and number.
        video: an MP4 file (H.264), its bytes.
        question: the user's words.
        answer: with one ``[BOX] [SEG]`` for each entry of ``targets``. A time span counts the frames of the clip, or
            16 frames spread evenly over a longer one.
        objects: of the whole clip: ``{"id": int, "frames": [{"index": int, "box": [x0, y0, x1, y1] or None,
            "mask": {"size": [h, w], "counts": str} or None}]}``; boxes in pixels with exclusive maximum, masks in
            COCO's compressed run-length encoding; both of the visible pixels, None where there are none.
        targets: for each pair of tokens the ids of the objects that it means.
        time_span: [start, end] in seconds that the answer speaks of, or None.
        kind: kind of the expression or one of ``DIALOGUE_KINDS``.
        expression: the referring expression that the question is about, empty for ``DIALOGUE_KINDS``.
        seed: of the clip.
        height, width: pixels.
        num_frames: of the clip.
        frames_per_second: of the clip.
    """

    id: str
    video: bytes
    question: str
    answer: str
    objects: list[dict[str, Any]]
    targets: list[list[int]]
    time_span: list[float] | None
    kind: str
    expression: str
    seed: int
    height: int
    width: int
    num_frames: int
    frames_per_second: float


def make_row(videos: SyntheticVideos, index: int) -> SyntheticRow:
    """Row number ``index`` of a split: in test splits a referring expression, otherwise any form of task."""
    record = videos[index]
    clip: SyntheticClip = record["clip"]
    rng = np.random.default_rng([clip.seed, 2])
    asked = Expression(record["expression"], record["target_ids"], record["kind"], record["candidates"])
    dialogue = refer_dialogue(asked, rng)
    if not videos.split.startswith("test") and rng.random() < OTHER_FORMS:
        others = [item for item in all_dialogues(clip, rng) if item.kind in DIALOGUE_KINDS]
        dialogue = next(iter(sample_expressions(others, 1, rng)), dialogue)
    config = clip.config
    return SyntheticRow(
        id=record["id"],
        video=encode_video(clip.frames, config.frames_per_second),
        question=dialogue.question,
        answer=dialogue.answer,
        objects=object_frames(clip),
        targets=[list(ids) for ids in dialogue.targets],
        time_span=_seconds(dialogue, config.frames_per_second),
        kind=dialogue.kind,
        expression="" if dialogue.kind in DIALOGUE_KINDS else asked.text,
        seed=clip.seed,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        frames_per_second=config.frames_per_second,
    )


def _seconds(dialogue: Dialogue, frames_per_second: float) -> list[float] | None:
    return None if dialogue.time_span is None else [frame / frames_per_second for frame in dialogue.time_span]


def object_frames(clip: SyntheticClip) -> list[dict[str, Any]]:
    """Visible boxes and masks of every object on every frame; see ``SyntheticRow.objects``."""
    return [
        {"id": n, "frames": [_frame(clip, n, t) for t in range(clip.config.num_frames)]}
        for n in range(clip.num_objects)
    ]


def _frame(clip: SyntheticClip, n: int, t: int) -> dict[str, Any]:
    if np.isnan(clip.boxes[n, t, 0]):
        return {"index": t, "box": None, "mask": None}
    return {"index": t, "box": clip.boxes[n, t].tolist(), "mask": encode_mask(clip.masks[n, t])}


def encode_video(frames: np.ndarray, frames_per_second: float) -> bytes:
    """MP4 of frames (T, H, W, 3) uint8 RGB.

    Raises:
        ValueError: if a side is odd, which H.264 cannot hold, or the frame rate is no whole number.
    """
    height, width = frames.shape[1:3]
    if height % 2 or width % 2 or frames_per_second != int(frames_per_second):
        raise ValueError(f"expected even sides and a whole frame rate, got {width} × {height} at {frames_per_second}")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=int(frames_per_second), options={"crf": _QUALITY})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1  # the same bytes on every machine
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()
