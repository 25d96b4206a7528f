"""Training records: a question about a video, its answer, and the objects the answer grounds.

A record is what a user writes down, one JSON object per line or one parquet row:

    {"video": "clips/frog.mp4",
     "question": "Which frog jumps first?",
     "answer": "It is <p> the green frog </p> [BOX] [SEG].",
     "objects": [{"id": 0, "frames": [{"index": 0, "box": [12, 40, 60, 88], "mask": {"size": …, "counts": …}}, …]}],
     "targets": [[0]]}

`objects` is what `result.json` holds under that name; further keys are ignored, so that results can be corrected by
hand and trained on.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pycocotools import mask as mask_utils
from tqdm import tqdm

from sparrow_processing.processing_sparrow import BOX_TOKEN, SEG_TOKEN, TSF_TOKEN, VIDEO_TOKEN
from sparrow_processing.results import decode_mask, mask_to_box, validate_rle
from sparrow_processing.synthetic import (
    DIALOGUE_KINDS,
    KINDS,
    MAX_SAMPLED,
    PRESETS,
    WorldConfig,
    all_dialogues,
    generate_clip,
    sample_expressions,
    split_seed,
)

logger = logging.getLogger(__name__)

MAX_ERRORS_SHOWN = 5
_PAIR = re.compile(r"(?:\[BOX\]\s*)?\[SEG\]")


class RecordError(ValueError):
    """A record that cannot be trained on; the message begins with its place."""


class SkipRecordError(Exception):
    """A record that is valid but does not fit the model, such as a question longer than its context."""


@dataclass(frozen=True, eq=False)
class RecordedFrame:
    """An object in one frame: `box` xyxy in pixels with exclusive maximum, `mask` as run lengths or bool `(H, W)`.

    Both `None`: the object is not visible. A box without a mask: its shape is not known.
    """

    index: int
    box: tuple[float, float, float, float] | None = None
    mask: dict[str, Any] | np.ndarray | None = None

    @property
    def is_visible(self) -> bool:
        """Whether the object shows; tells it without decoding the mask."""
        if self.mask is None:
            return self.box is not None
        return bool(self.mask.any() if isinstance(self.mask, np.ndarray) else mask_utils.area(self.mask))

    def read_mask(self, size: tuple[int, int], where: str) -> np.ndarray | None:
        """Bool `(H, W)`, `None` if the shape is not known.

        Raises:
            RecordError: the mask is damaged or of another size than the video, `(H, W)`.
        """
        if self.mask is None:
            return None if self.box is not None else np.zeros(size, dtype=bool)
        try:
            mask = self.mask if isinstance(self.mask, np.ndarray) else decode_mask(self.mask)
        except ValueError as error:
            raise RecordError(f"{where}: mask of frame {self.index}: {error}") from error
        if mask.shape != size:
            raise RecordError(f"{where}: mask of frame {self.index} has the size {mask.shape}, the video {size}.")
        return mask

    def read_box(self, size: tuple[int, int], where: str) -> np.ndarray:
        """float32 `(4,)` xyxy in pixels, tight around the mask if there is one; NaN where not visible."""
        mask = self.read_mask(size, where)
        if mask is not None:
            return mask_to_box(mask)
        H, W = size
        return np.clip(np.array(self.box, dtype=np.float32), 0, np.array([W, H, W, H], dtype=np.float32))


@dataclass(frozen=True, eq=False)
class RecordedObject:
    """An object and the frames in which it was annotated, by index."""

    id: int
    frames: dict[int, RecordedFrame]


@dataclass(frozen=True, eq=False)
class GroundingRecord:
    """One question about a video.

    Args:
        video: whatever `open_video` takes: a path, the bytes of a file, frames `(T, H, W, 3)` uint8.
        question: the user's turn, word by word.
        answer: text with one `[BOX] [SEG]` for each phrase that it grounds.
        objects: what is annotated in the video, at least the objects that are meant.
        targets: for each `[BOX] [SEG]` the ids of the objects it means.
        time_span: seconds, when the answer is about a part of the video.
        kind: of the question, for statistics.
        where: where the record comes from, for messages.
    """

    video: Any
    question: str
    answer: str
    objects: tuple[RecordedObject, ...] = ()
    targets: tuple[tuple[int, ...], ...] = ()
    time_span: tuple[float, float] | None = None
    kind: str | None = None
    where: str = "record"

    @property
    def objects_by_id(self) -> dict[int, RecordedObject]:
        return {item.id: item for item in self.objects}


class RecordSource(Protocol):
    """A numbered collection of videos with questions."""

    def __len__(self) -> int: ...

    def read(self, index: int, rng: np.random.Generator) -> list[GroundingRecord]:
        """Records about one video; what is drawn follows from `rng` alone."""


# ---------------------------------------------------------------------- one record


def parse_record(content: Any, where: str, folder: Path = Path()) -> GroundingRecord:
    """A record from its JSON form.

    Args:
        content: see the top of this module.
        where: its place, for messages.
        folder: what a relative path of the video begins at.

    Raises:
        RecordError: a field is absent, of the wrong type, or does not fit the others.
    """
    if not isinstance(content, dict):
        raise RecordError(f"{where}: expected an object with the keys video, question, answer, objects.")
    for name in ("question", "answer"):
        if not isinstance(content.get(name), str) or not content[name].strip():
            raise RecordError(f"{where}: {name}: expected a text, got {content.get(name)!r}.")
    answer = normalize_answer(content["answer"], where)
    objects = tuple(
        _parse_object(item, f"{where}: objects[{n}]")
        for n, item in enumerate(_list(content.get("objects"), f"{where}: objects"))
    )
    ids = [item.id for item in objects]
    if len(set(ids)) < len(ids):
        raise RecordError(f"{where}: objects: expected distinct ids, got {ids}.")
    span = content.get("time_span")
    if span is not None and (len(_list(span, f"{where}: time_span")) != 2 or not all(map(_is_number, span))):
        raise RecordError(f"{where}: time_span: expected [start, end] in seconds, got {span!r}.")
    return GroundingRecord(
        video=_parse_video(content.get("video"), where, folder),
        question=content["question"],
        answer=answer,
        objects=objects,
        targets=_parse_targets(content.get("targets"), answer.count(SEG_TOKEN), ids, where),
        time_span=None if span is None else (float(span[0]), float(span[1])),
        kind=content.get("kind"),
        where=where,
    )


def normalize_answer(answer: str, where: str = "answer") -> str:
    """Every `[SEG]`, also a bare one, as `[BOX] [SEG]`.

    Raises:
        RecordError: a `[BOX]` without `[SEG]`, or a placeholder of visual features.
    """
    for token in (VIDEO_TOKEN, TSF_TOKEN):
        if token in answer:
            raise RecordError(f"{where}: answer: {token} is a placeholder of the prompt and cannot be answered.")
    normalized = _PAIR.sub(f"{BOX_TOKEN} {SEG_TOKEN}", answer)
    if normalized.count(BOX_TOKEN) != normalized.count(SEG_TOKEN):
        raise RecordError(f"{where}: answer: every {BOX_TOKEN} must stand right before a {SEG_TOKEN}, got {answer!r}.")
    return normalized


def _parse_video(video: Any, where: str, folder: Path) -> Any:
    if isinstance(video, dict):  # a video column of `datasets`
        video = video.get("bytes") or video.get("path")
    if isinstance(video, bytes):
        return video
    if not isinstance(video, str) or not video:
        raise RecordError(f"{where}: video: expected a path or the bytes of a file, got {type(video).__name__}.")
    path = Path(video) if Path(video).is_absolute() else folder / video
    if not path.exists():
        raise RecordError(f"{where}: video: there is no file {path}.")
    return str(path)


def _parse_object(content: Any, where: str) -> RecordedObject:
    if not isinstance(content, dict) or not _is_integer(content.get("id")):
        raise RecordError(f"{where}: expected an object with an integer id and frames.")
    frames = {}
    for n, item in enumerate(_list(content.get("frames"), f"{where}: frames")):
        place = f"{where}.frames[{n}]"
        if not isinstance(item, dict) or not _is_integer(item.get("index")) or item["index"] < 0:
            raise RecordError(f"{place}: expected an object with index, box and mask, the index 0 or more.")
        box, mask = item.get("box"), item.get("mask")
        if isinstance(mask, dict) and all(mask.get(key) is None for key in ("size", "counts")):
            mask = None  # how a table may write that there is none
        if box is not None:
            if not isinstance(box, Sequence) or len(box) != 4 or not all(map(_is_number, box)):
                raise RecordError(f"{place}.box: expected [x0, y0, x1, y1] in pixels, got {box!r}.")
            if not (box[0] < box[2] and box[1] < box[3]):
                raise RecordError(f"{place}.box: expected x0 < x1 and y0 < y1, got {box!r}.")
        if mask is not None:
            try:
                validate_rle(mask)
            except ValueError as error:
                raise RecordError(f"{place}.mask: {error}") from error
        frames[item["index"]] = RecordedFrame(item["index"], None if box is None else tuple(map(float, box)), mask)
    if not frames:
        raise RecordError(f"{where}: frames: expected at least one annotated frame.")
    return RecordedObject(content["id"], frames)


def _parse_targets(content: Any, num_tokens: int, ids: list[int], where: str) -> tuple[tuple[int, ...], ...]:
    if content is None:
        if num_tokens == 1:
            return (tuple(ids),)
        if num_tokens != len(ids) and num_tokens:
            raise RecordError(
                f"{where}: the answer has {num_tokens} {SEG_TOKEN} and {len(ids)} objects; targets must say which "
                "objects each token means."
            )
        return tuple((index,) for index in ids[:num_tokens])
    targets = tuple(tuple(_list(item, f"{where}: targets")) for item in _list(content, f"{where}: targets"))
    if len(targets) != num_tokens:
        raise RecordError(f"{where}: targets: expected {num_tokens} lists, one per {SEG_TOKEN}, got {len(targets)}.")
    if unknown := sorted({index for target in targets for index in target if index not in ids}, key=str):
        raise RecordError(f"{where}: targets: no object has the id {unknown}; objects are {ids}.")
    return targets


def _list(value: Any, where: str) -> list:
    if value is None:
        return []
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise RecordError(f"{where}: expected a list, got {type(value).__name__}.")
    return list(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, (float, np.floating))) and bool(np.isfinite(value))


# ---------------------------------------------------------------------- files


class RecordFile:
    """Records of a `.jsonl` file, of a parquet file, or of a data set that `datasets.load_dataset` opens.

    Everything is checked when the file is opened, so that a run does not end at a bad line hours later; records are
    read again one by one when they are asked for.

    Args:
        path: the file, or a folder or name for `datasets.load_dataset`. Videos lie relative to the file.
        split: of a data set.
        questions_per_video: most records about the same video that are trained together; they share the work on it.

    Raises:
        RecordError: the file is absent, empty or has records that cannot be used; the first of them are named.
    """

    def __init__(self, path: str | PathLike, split: str = "train", questions_per_video: int = 1):
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.questions_per_video = questions_per_video
        self.lines = JsonLines(self.path) if self.path.suffix == ".jsonl" else DatasetRows(str(path), split)
        self.groups = self._check_and_group()

    def _check_and_group(self) -> list[list[int]]:
        """Rows about the same video, in order of appearance; every row alone if questions are not shared."""
        errors: list[str] = []
        groups: dict[Any, list[int]] = {}
        for row in tqdm(range(len(self.lines)), desc=f"checking {self.path.name}", unit="record", mininterval=2):
            try:
                record = self._parse(row)
            except RecordError as error:
                errors.append(str(error))
                continue
            shares = self.questions_per_video > 1 and isinstance(record.video, str)
            groups.setdefault(record.video if shares else row, []).append(row)
        if errors:
            shown = "\n".join(errors[:MAX_ERRORS_SHOWN])
            more = f"\n… and {len(errors) - MAX_ERRORS_SHOWN} more" if len(errors) > MAX_ERRORS_SHOWN else ""
            raise RecordError(f"{len(errors)} of {len(self.lines)} records cannot be used:\n{shown}{more}")
        if not groups:
            raise RecordError(f"{self.path}: holds no records.")
        return list(groups.values())

    def _parse(self, row: int) -> GroundingRecord:
        return parse_record(self.lines[row], self.lines.place(row), self.folder)

    def __len__(self) -> int:
        return len(self.groups)

    def read(self, index: int, rng: np.random.Generator) -> list[GroundingRecord]:
        rows = self.groups[index]
        if len(rows) > self.questions_per_video:
            rows = sorted(rng.choice(rows, self.questions_per_video, replace=False).tolist())
        return [self._parse(row) for row in rows]


class JsonLines:
    """Lines of a JSONL file by number, without keeping them in memory; empty lines do not count."""

    def __init__(self, path: Path):
        self.path = path
        self.offsets: list[tuple[int, int]] = []  # line number from 1, offset in bytes
        try:
            with open(path, "rb") as file:
                offset = 0
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self.offsets.append((number, offset))
                    offset += len(line)
        except OSError as error:
            raise RecordError(f"{path}: {error.strerror}.") from error

    def __len__(self) -> int:
        return len(self.offsets)

    def place(self, row: int) -> str:
        return f"{self.path}:{self.offsets[row][0]}"

    def __getitem__(self, row: int) -> Any:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[row][1])
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError as error:
            raise RecordError(f"{self.place(row)}: not valid JSON: {error}") from error


class DatasetRows:
    """Rows of a parquet file or of another data set, read through `datasets`, which keeps them on disk."""

    def __init__(self, path: str, split: str):
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "Training data other than .jsonl needs datasets: pip install 'sparrow-video-grounding[train]'"
            ) from error
        self.path = path
        try:
            if path.endswith(".parquet"):
                rows = datasets.load_dataset("parquet", data_files=path, split="train")
            else:
                rows = datasets.load_dataset(path, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise RecordError(f"{path}: {error}") from error
        if isinstance(rows.features.get("video"), datasets.Video):
            rows = rows.cast_column("video", datasets.Video(decode=False))
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, row: int) -> str:
        return f"{self.path}, row {row}"

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.rows[row]


# ---------------------------------------------------------------------- the generated world


@dataclass
class SyntheticRecords:
    """Questions about clips of the generated world, made when they are asked for.

    Args:
        split: whose seeds are used.
        preset: of the world.
        world: fields of `WorldConfig` that differ from the preset.
        seed: another seed gives other clips of the same split.
        size: number of clips.
        questions_per_video: of each clip.
        kinds: of dialogues, drawn equally often; by default those of the world's expressions, captions, time spans and
            plain questions.
        sampled_frames: that the language model sees of a clip at most; time spans count in these.
    """

    split: str = "train"
    preset: str = "train"
    world: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    size: int = 1_000_000
    questions_per_video: int = 4
    kinds: list[str] | None = None
    sampled_frames: int = MAX_SAMPLED

    def __post_init__(self):
        split_seed(self.split, 0, self.seed)
        unknown = set(self.kinds or ()) - {*KINDS, *DIALOGUE_KINDS}
        if unknown:
            raise ValueError(f"kinds: expected some of {', '.join([*KINDS, *DIALOGUE_KINDS])}, got {sorted(unknown)}.")
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {self.preset!r}.")
        try:
            self.config: WorldConfig = replace(PRESETS[self.preset], **_tuples(self.world))
        except TypeError as error:
            raise ValueError(f"world: {error}") from error

    def __len__(self) -> int:
        return self.size

    def read(self, index: int, rng: np.random.Generator) -> list[GroundingRecord]:
        clip = generate_clip(split_seed(self.split, index, self.seed), self.config)
        objects = recorded_objects(clip.masks)
        kinds = self.kinds or (*self.config.kinds, *DIALOGUE_KINDS)
        seen = min(self.sampled_frames, len(clip.frames))
        possible = [dialogue for dialogue in all_dialogues(clip, rng, seen) if dialogue.kind in kinds]
        dialogues = sample_expressions(possible, self.questions_per_video, rng)
        if not dialogues:
            raise SkipRecordError("no question fits the generated clip")
        return [
            GroundingRecord(
                video=clip.frames,
                question=dialogue.question,
                answer=dialogue.answer,
                objects=objects,
                targets=dialogue.targets,
                kind=dialogue.kind,
                where=f"{self.split} clip {index}",
            )
            for dialogue in dialogues
        ]


def recorded_objects(masks: np.ndarray) -> tuple[RecordedObject, ...]:
    """Objects with masks `(N, T, H, W)` bool, annotated in every frame."""
    return tuple(
        RecordedObject(n, {t: RecordedFrame(t, None, mask) for t, mask in enumerate(track)})
        for n, track in enumerate(masks)
    )


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """YAML has lists where `WorldConfig` has tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
