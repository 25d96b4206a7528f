"""File formats of a `GroundingResult`: writers and the readers that take them back.

| format       | writer               | the reader returns                                                      |
|--------------|----------------------|-------------------------------------------------------------------------|
| JSON         | `write_json`         | `read_json`: the whole `GroundingResult`                                |
| COCO         | `write_coco`         | `read_coco`: {track_id: `CocoTrack`}, for tracks present in some frame  |
| MOTChallenge | `write_mot`          | `read_mot`: {id: (boxes, scores)}, for tracks present in some frame     |
| CSV          | `write_csv`          | `read_csv`: {id: `CsvTrack`}, everything but the masks                  |
| PNG folders  | `write_pngs`         | `read_pngs`: {id: T RLEs}                                               |
| indexed PNGs | `write_indexed_pngs` | `read_indexed_pngs`: {value: T RLEs}, for values in some frame          |

Writers appear whole or not at all: they write beside the target and rename. They raise `ExportError`, also for a
target that exists unless `overwrite=True`. Readers take files of unknown origin: they raise `ValueError` naming the
file and the field, and check sizes against what the file really holds or a fixed bound before they allocate.
"""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import unicodedata
import uuid
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils
from tqdm import tqdm

from .errors import ExportError
from .results import MAX_MASK_PIXELS, GroundingResult, ObjectTrack, encode_mask, mask_to_box, validate_rle

# Tracks times frames that a reader allocates for a file which need not list them all (160 MB of boxes).
MAX_TRACK_FRAMES = 10_000_000

CSV_COLUMNS = ("frame", "time", "object", "phrase", "visible", "score", "x0", "y0", "x1", "y1")

_RESERVED_STEMS = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}


class CocoTrack(NamedTuple):
    """A track of a COCO file: boxes float32 (T, 4) xyxy pixels, NaN where absent; scores float32 (T,), 0 there."""

    phrase: str
    boxes: np.ndarray
    scores: np.ndarray
    rles: list[dict[str, Any] | None]


class CsvTrack(NamedTuple):
    """A track of a CSV file: times float64 (T,) seconds; boxes float32 (T, 4) xyxy pixels, NaN where absent."""

    phrase: str | None
    times: np.ndarray
    visible: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray


# --- JSON ---


def result_to_json(result: GroundingResult) -> str:
    """The whole result as one line of strict, ASCII-only JSON: loading and dumping again gives the same bytes.

    Times and boxes keep their full precision. Frame times stand with each object, so a result without objects keeps
    only their number and the duration: its frames come back evenly spaced.
    """
    height, width = result.size
    document = {
        "query": result.query,
        "text": result.text,
        "video": {
            "path": result.path,
            "width": width,
            "height": height,
            "frames": result.num_frames,
            "fps": result.fps,
            # Rounded: times that come back evenly spaced give the same duration only up to float error.
            "duration": round(result.duration, 6),
        },
        "sampled_frames": result.sampled_frames,
        "objects": [_track_to_dict(track, result.timestamps.tolist()) for track in result.objects],
        "time_span": result.time_span,
        "warnings": result.warnings,
        "timings": result.timings,
    }
    return json.dumps(document, allow_nan=False)


def _track_to_dict(track: ObjectTrack, times: list[float]) -> dict[str, Any]:
    boxes, scores, visible = _shortest(track.boxes), _shortest(track.scores), track.visible.tolist()
    frames = [
        {
            "index": index,
            "time": time,
            "visible": visible[index],
            "score": scores[index],
            "box": None if np.isnan(boxes[index][0]) else boxes[index],
            "mask": track.rles[index],
        }
        for index, time in enumerate(times)
    ]
    return {"id": track.id, "phrase": track.phrase, "span": track.span, "score": track.score, "frames": frames}


def _shortest(values: np.ndarray) -> list:
    """float32 values as the shortest decimals that read back to them: 0.9 and not 0.8999999761581421."""
    return values.astype(str).astype(np.float64).tolist()


def result_from_json(text: str) -> GroundingResult:
    """Inverse of `result_to_json`. Every mask is validated before anything of its size is allocated.

    Raises:
        ValueError: naming the field that is absent, of the wrong type or out of range.
    """
    document = _parse_json(text)
    with _located("video"):
        video = _field(document, "video", "object")
        size = (_field(video, "height", "integer"), _field(video, "width", "integer"))
        frames = _field(video, "frames", "integer")
        fps, duration = _field(video, "fps", "number"), _field(video, "duration", "number")
        path = _field(video, "path", "string", optional=True)
    objects, timestamps = [], None
    for position, record in enumerate(_field(document, "objects", "list")):
        with _located(f"objects[{position}]"):
            track, times = _track_from_dict(record, size)
            if timestamps is not None and times != timestamps:
                raise ValueError("frames: the times differ from those of objects[0]")
            objects.append(track)
            timestamps = times
    if timestamps is None:
        _check_extent(1, frames)
        # One frame lasts 1 / fps; several share the duration evenly.
        start = duration - 1 / fps if frames == 1 and fps > 0 else 0.0
        timestamps = np.linspace(start, duration, frames, endpoint=False)
    elif len(timestamps) != frames:
        raise ValueError(f"video: frames: {frames}, but the objects have {len(timestamps)}")
    return GroundingResult(
        query=_field(document, "query", "string"),
        text=_field(document, "text", "string"),
        objects=objects,
        size=size,
        fps=fps,
        timestamps=timestamps,
        sampled_frames=_items(document, "sampled_frames", "integer"),
        path=path,
        timings={
            stage: _typed(s, "number", f"timings.{stage}")
            for stage, s in _field(document, "timings", "object").items()
        },
        warnings=_items(document, "warnings", "string"),
        time_span=_items(document, "time_span", "number", length=2, optional=True),
    )


def _track_from_dict(record: Any, size: tuple[int, int]) -> tuple[ObjectTrack, list[float]]:
    """A track and the times of its frames."""
    times, boxes, scores, visible, rles = [], [], [], [], []
    for index, frame in enumerate(_field(record, "frames", "list")):
        with _located(f"frames[{index}]"):
            if _field(frame, "index", "integer") != index:
                raise ValueError(f"index: expected {index}, got {frame['index']}")
            times.append(_field(frame, "time", "number"))
            visible.append(_field(frame, "visible", "boolean"))
            scores.append(_field(frame, "score", "number"))
            boxes.append(_items(frame, "box", "number", length=4, optional=True) or [np.nan] * 4)
            rles.append(_rle(_field(frame, "mask", "object", optional=True), size))
    track = ObjectTrack(
        id=_field(record, "id", "integer"),
        phrase=_field(record, "phrase", "string", optional=True),
        span=_items(record, "span", "integer", length=2, optional=True),
        score=_field(record, "score", "number"),
        boxes=boxes,
        scores=scores,
        visible=visible,
        rles=rles,
        size=size,
    )
    return track, times


def write_json(result: GroundingResult, path: str | PathLike, *, overwrite: bool = False) -> None:
    """Write `result_to_json` to a file."""
    write_text(path, result_to_json(result) + "\n", overwrite)


def read_json(path: str | PathLike) -> GroundingResult:
    """Read a file of `write_json`."""
    with _located(path):
        return result_from_json(_read_text(path))


# --- COCO ---


def result_to_coco(result: GroundingResult) -> dict[str, Any]:
    """COCO instances: an image per frame, a category per phrase, an annotation per object and frame it is present in.

    Present means a box or a mask that is not empty. Annotations also carry `track_id` and `score`; one without mask
    has an empty `segmentation` and the area of its box. Boxes are xywh, rounded to 0.001 pixels.
    """
    height, width = result.size
    categories: dict[str, int] = {}
    annotations = []
    for track in result.objects:
        category = categories.setdefault(track.phrase or "object", len(categories) + 1)
        for frame, rle in enumerate(track.rles):
            box = _present_box(track, frame)
            if box is None:
                continue
            area = 0 if rle is None else int(mask_utils.area(rle))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": frame + 1,
                    "category_id": category,
                    "track_id": track.id,
                    "segmentation": rle if area else [],
                    "bbox": _to_xywh(box),
                    "area": area or round(float((box[2] - box[0]) * (box[3] - box[1])), 3),
                    "iscrowd": 0,
                    "score": _shortest(track.scores[frame]),
                }
            )
    images = [
        {"id": frame + 1, "file_name": _frame_name(frame), "width": width, "height": height, "time": time}
        for frame, time in enumerate(result.timestamps.tolist())
    ]
    return {
        "info": {"description": result.query},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
    }


def write_coco(result: GroundingResult, path: str | PathLike, *, overwrite: bool = False) -> None:
    """Write `result_to_coco` to a file."""
    write_text(path, json.dumps(result_to_coco(result), allow_nan=False) + "\n", overwrite)


def read_coco(path: str | PathLike) -> dict[int, CocoTrack]:
    """Read a file of `write_coco`; its images, in their order, are the T frames."""
    with _located(path):
        document = _parse_json(_read_text(path))
        frames: dict[int, int] = {}
        sizes = []
        for position, image in enumerate(_field(document, "images", "list")):
            with _located(f"images[{position}]"):
                sizes.append((_field(image, "height", "integer"), _field(image, "width", "integer")))
                if frames.setdefault(_field(image, "id", "integer"), position) != position:
                    raise ValueError(f"id: {image['id']} is used twice")
        phrases = {}
        for position, category in enumerate(_field(document, "categories", "list")):
            with _located(f"categories[{position}]"):
                phrases[_field(category, "id", "integer")] = _field(category, "name", "string")
        tracks: dict[int, CocoTrack] = {}
        for position, annotation in enumerate(_field(document, "annotations", "list")):
            with _located(f"annotations[{position}]"):
                _add_annotation(tracks, annotation, frames, sizes, phrases)
        return tracks


def _add_annotation(
    tracks: dict[int, CocoTrack],
    annotation: dict[str, Any],
    frames: dict[int, int],
    sizes: list[tuple[int, int]],
    phrases: dict[int, str],
) -> None:
    """Enter one COCO annotation in its track."""
    image, category = _field(annotation, "image_id", "integer"), _field(annotation, "category_id", "integer")
    if image not in frames:
        raise ValueError(f"image_id: no image has the id {image}")
    if category not in phrases:
        raise ValueError(f"category_id: no category has the id {category}")
    frame, track_id = frames[image], _field(annotation, "track_id", "integer")
    if track_id not in tracks:
        _check_extent(len(tracks) + 1, len(frames))
        tracks[track_id] = CocoTrack(phrases[category], *_empty_track(len(frames)), [None] * len(frames))
    track = tracks[track_id]
    bbox, score = _items(annotation, "bbox", "number", length=4), _field(annotation, "score", "number")
    _enter_box(track.boxes, track.scores, frame, bbox, score)
    if annotation.get("segmentation") != []:
        track.rles[frame] = _rle(_field(annotation, "segmentation", "object"), sizes[frame])


# --- MOTChallenge ---


def result_to_mot(result: GroundingResult) -> str:
    """MOTChallenge text, a line `frame, id, x, y, w, h, confidence, -1, -1, -1` per object and frame it is present in.

    Frames count from 1, boxes are rounded to 0.001 pixels. Lines are sorted by frame.
    """
    lines = []
    for frame in range(result.num_frames):
        for track in result.objects:
            box = _present_box(track, frame)
            if box is not None:
                numbers = ",".join(map(str, _to_xywh(box)))
                lines.append(f"{frame + 1},{track.id},{numbers},{_shortest(track.scores[frame])},-1,-1,-1\n")
    return "".join(lines)


def write_mot(result: GroundingResult, path: str | PathLike, *, overwrite: bool = False) -> None:
    """Write `result_to_mot` to a file."""
    write_text(path, result_to_mot(result), overwrite)


def read_mot(path: str | PathLike, num_frames: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Read a file of `write_mot`, which does not say how many frames the video has.

    Returns:
        {id: (boxes float32 (T, 4) xyxy pixels, NaN where absent; scores float32 (T,), 0 where absent)}.
    """
    with _located(path):
        tracks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for line, row in enumerate(_csv_rows(_read_text(path)), start=1):
            with _located(f"line {line}"):
                if len(row) != 10:
                    raise ValueError(f"expected 10 values, got {len(row)}")
                frame, track_id = _parsed(row[0], int, "frame") - 1, _parsed(row[1], int, "id")
                if not 0 <= frame < num_frames:
                    raise ValueError(f"frame: expected 1 to {num_frames}, got {frame + 1}")
                bbox = [_parsed(value, float, name) for value, name in zip(row[2:6], "xywh", strict=True)]
                if track_id not in tracks:
                    _check_extent(len(tracks) + 1, num_frames)
                    tracks[track_id] = _empty_track(num_frames)
                _enter_box(*tracks[track_id], frame, bbox, _parsed(row[6], float, "confidence"))
        return tracks


# --- CSV ---


def result_to_csv(result: GroundingResult) -> str:
    """A table with the columns `CSV_COLUMNS`, a row per object and frame (from 0), no coordinates where absent."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(CSV_COLUMNS)
    for track in result.objects:
        boxes, scores = _shortest(track.boxes), _shortest(track.scores)
        for frame, time in enumerate(result.timestamps.tolist()):
            box = [""] * 4 if np.isnan(boxes[frame][0]) else boxes[frame]
            writer.writerow(
                [frame, time, track.id, track.phrase or "", int(track.visible[frame]), scores[frame], *box]
            )
    return table.getvalue()


def write_csv(result: GroundingResult, path: str | PathLike, *, overwrite: bool = False) -> None:
    """Write `result_to_csv` to a file."""
    write_text(path, result_to_csv(result), overwrite)


def read_csv(path: str | PathLike) -> dict[int, CsvTrack]:
    """Read a file of `write_csv`. The score of the object as a whole and its span are not in this format."""
    with _located(path):
        rows = _csv_rows(_read_text(path))
        if next(rows, None) != list(CSV_COLUMNS):
            raise ValueError(f"line 1: expected the columns {','.join(CSV_COLUMNS)}")
        columns: dict[int, tuple[list, ...]] = {}
        for line, row in enumerate(rows, start=2):
            with _located(f"row {line}"):
                _add_csv_row(columns, row)
        return {
            track_id: CsvTrack(
                phrases[0] or None, np.array(times), np.array(visible), np.float32(scores), np.float32(boxes)
            )
            for track_id, (phrases, times, visible, scores, boxes) in columns.items()
        }


def _add_csv_row(columns: dict[int, tuple[list, ...]], row: list[str]) -> None:
    """Append one CSV row to the columns (phrase, time, visible, score, box) of its object."""
    if len(row) != len(CSV_COLUMNS):
        raise ValueError(f"expected {len(CSV_COLUMNS)} values, got {len(row)}")
    track = columns.setdefault(_parsed(row[2], int, "object"), ([], [], [], [], []))
    if _parsed(row[0], int, "frame") != len(track[0]):
        raise ValueError(f"frame: expected {len(track[0])}, the next one of object {row[2]}, got {row[0]}")
    if row[4] not in ("0", "1"):
        raise ValueError(f"visible: expected 0 or 1, got {row[4]!r}")
    box = [np.nan] * 4
    if any(row[6:]):
        box = [_parsed(value, float, name) for value, name in zip(row[6:], CSV_COLUMNS[6:], strict=True)]
    values = (row[3], _parsed(row[1], float, "time"), row[4] == "1", _parsed(row[5], float, "score"), box)
    for column, value in zip(track, values, strict=True):
        column.append(value)


def _csv_rows(text: str) -> Iterator[list[str]]:
    try:
        yield from csv.reader(io.StringIO(text, newline=""))
    except csv.Error as error:
        raise ValueError(f"not a CSV table: {error}") from error


# --- PNG folders ---


def write_pngs(
    result: GroundingResult, folder: str | PathLike, *, overwrite: bool = False, progress: bool = False
) -> None:
    """Write the masks as `folder/<object id>/<frame>.png`, 8-bit gray, 0 or 255, every frame from 00000.png on."""
    with _replacing(folder, overwrite) as temp:
        temp.mkdir()
        with tqdm(total=len(result) * result.num_frames, unit="mask", disable=not progress) as bar:
            for track in result.objects:
                (temp / str(track.id)).mkdir()
                for frame, mask in enumerate(track.iter_masks()):
                    image = Image.fromarray(mask.astype(np.uint8) * 255)
                    image.save(temp / str(track.id) / _frame_name(frame))
                    bar.update()


def read_pngs(folder: str | PathLike) -> dict[int, list[dict[str, Any] | None]]:
    """Read a folder of `write_pngs`: {object id: T RLEs}, None where the object has no pixel."""
    tracks = {}
    with _located(folder):
        for subfolder in sorted(Path(folder).iterdir()):
            with _located(subfolder.name):
                if not subfolder.name.isdecimal():
                    raise ValueError("expected only folders named by object ids")
                rles = []
                for path, pixels in _read_frames(subfolder, "L"):
                    if not np.isin(pixels, (0, 255)).all():
                        raise ValueError(f"{path.name}: expected only the values 0 and 255")
                    rles.append(encode_mask(pixels == 255) if pixels.any() else None)
                tracks[int(subfolder.name)] = rles
        if len({len(rles) for rles in tracks.values()}) > 1:
            raise ValueError("the objects have different numbers of frames")
    return tracks


def davis_palette() -> np.ndarray:
    """DAVIS's and VOC's colour map, uint8 (256, 3): the bits of the value, three at a time, from the top bit down."""
    values, palette = np.arange(256), np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((values >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def write_indexed_pngs(
    result: GroundingResult, folder: str | PathLike, *, overwrite: bool = False, progress: bool = False
) -> None:
    """Write `folder/<frame>.png` in DAVIS's format: value = position of the object + 1, 0 = background.

    A pixel has one value: where objects overlap, the first one wins.

    Raises:
        ExportError: also if there are more than the 255 objects that a byte can number.
    """
    if len(result) > 255:
        raise ExportError(f"cannot write {folder}: an indexed PNG numbers at most 255 objects, got {len(result)}")
    with _replacing(folder, overwrite) as temp:
        temp.mkdir()
        for frame in tqdm(range(result.num_frames), unit="frame", disable=not progress):
            labels = np.zeros(result.size, dtype=np.uint8)
            for position in reversed(range(len(result))):
                labels[result[position].mask(frame)] = position + 1
            image = Image.fromarray(labels)
            image.putpalette(davis_palette().tobytes())
            image.save(temp / _frame_name(frame))


def read_indexed_pngs(folder: str | PathLike) -> dict[int, list[dict[str, Any] | None]]:
    """Read a folder of `write_indexed_pngs`: {value: T RLEs}, None where no pixel has the value."""
    tracks: dict[int, list[dict[str, Any] | None]] = {}
    with _located(folder):
        frames = len(_frame_files(Path(folder)))
        for frame, (_, labels) in enumerate(_read_frames(Path(folder), "P")):
            for value in np.unique(labels[labels > 0]).tolist():
                tracks.setdefault(value, [None] * frames)[frame] = encode_mask(labels == value)
    return dict(sorted(tracks.items()))


def _frame_name(frame: int) -> str:
    return f"{frame:05d}.png"


def _frame_files(folder: Path) -> list[Path]:
    """The files of a folder, which must be the frames 00000.png, 00001.png, … and nothing else."""
    files = sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name))
    if not files or [path.name for path in files] != [_frame_name(frame) for frame in range(len(files))]:
        raise ValueError("expected the frames 00000.png, 00001.png, … without gaps and no other file")
    return files


def _read_frames(folder: Path, mode: str) -> Iterator[tuple[Path, np.ndarray]]:
    """Path and pixels, uint8 (H, W), of every frame, all of one size."""
    size = None
    for path in _frame_files(folder):
        try:
            with Image.open(path, formats=["PNG"]) as image:
                size = size or image.size
                if image.mode != mode or image.size != size or size[0] * size[1] > MAX_MASK_PIXELS:
                    raise ValueError(
                        f"{path.name}: expected mode {mode}, size {size}, at most {MAX_MASK_PIXELS} pixels; "
                        f"got mode {image.mode}, size {image.size}"
                    )
                pixels = np.asarray(image)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises on a bad PNG
            raise ValueError(f"{path.name}: not a PNG that can be read: {error}") from error
        yield path, pixels


# --- file names and atomic writing ---


def safe_stem(name: str) -> str:
    """A file name without suffix made from arbitrary text: letters, digits, `_` and `-`, at most 200 bytes.

    Different texts may give the same stem. `.` is replaced too: pass `Path(file).stem` to drop a suffix.

    Example:
        >>> safe_stem('../the "red" car [SEG]')
        'the_red_car_SEG'
    """
    words = re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFKC", name)).strip("_-")
    stem = words.encode("utf-8")[:200].decode("utf-8", errors="ignore").strip("_-")
    if stem.upper() in _RESERVED_STEMS:  # device names of Windows
        stem += "_"
    return stem or "unnamed"


def check_target(path: str | PathLike, *, overwrite: bool) -> None:
    """Raise `ExportError` if `path` exists and may not be overwritten."""
    if os.path.lexists(path) and not overwrite:
        raise ExportError(f"cannot write {path}: it exists; pass overwrite=True to replace it")


def write_text(path: str | PathLike, text: str, overwrite: bool) -> None:
    """Write a UTF-8 file whole or not at all."""
    with _replacing(path, overwrite) as temp:
        temp.write_bytes(text.encode("utf-8"))


def write_picture(picture: np.ndarray, path: str | PathLike, *, overwrite: bool = False) -> None:
    """Write a PNG of `(H, W, 3)` uint8 RGB."""
    with _replacing(path, overwrite) as temp:
        Image.fromarray(picture).save(temp, format="PNG")


@contextlib.contextmanager
def _replacing(path: str | PathLike, overwrite: bool) -> Iterator[Path]:
    """Yield a free name beside `path` to write a file or folder to, which then takes the place of `path`.

    Nothing is left behind on failure, and `OSError` becomes `ExportError`.
    """
    check_target(path, overwrite=overwrite)
    target = Path(os.path.abspath(path))
    temp = target.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        yield temp
        if temp.is_dir() and target.is_dir():
            _replace_folder(temp, target)
        else:
            os.replace(temp, target)
    except (OSError, UnicodeEncodeError) as error:
        raise ExportError(f"cannot write {path}: {error}") from error
    finally:
        # Only after a failure is there something left; that failure is the error to report.
        if os.path.isdir(temp):
            shutil.rmtree(temp, ignore_errors=True)
        elif os.path.exists(temp):
            os.unlink(temp)


def _replace_folder(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`, which is put back if that fails. Only a folder of masks is ever deleted."""
    if not all(path.stem.isdecimal() and (path.is_dir() or path.suffix == ".png") for path in target.rglob("*")):
        raise ExportError(f"cannot overwrite {target}: it holds other files than masks; remove it yourself")
    old = new.with_suffix(".old")
    os.replace(target, old)
    try:
        os.replace(new, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


# --- validation of files ---


@contextlib.contextmanager
def _located(where: Any) -> Iterator[None]:
    """Put the place, a file or a field, in front of the message of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error.__cause__


def _read_text(path: str | PathLike) -> str:
    return Path(path).read_bytes().decode("utf-8")  # as it is: read_text would change line ends in phrases


def _parse_json(text: str) -> Any:
    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


_KINDS = {"object": dict, "list": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}


def _typed(value: Any, kind: str, name: str) -> Any:
    """`value` if it is of the JSON kind. Numbers must be finite and fit float32."""
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "boolean"):
        raise ValueError(f"{name}: expected {kind}, got {type(value).__name__}")
    if kind == "number" and not -1e38 <= value <= 1e38:
        raise ValueError(f"{name}: expected a finite number, got {str(value)[:20]}")
    return value


def _field(record: Any, name: str, kind: str, *, optional: bool = False) -> Any:
    """A field of a JSON object; an optional one may be null but not left out."""
    if not isinstance(record, dict):
        raise ValueError(f"expected object, got {type(record).__name__}")
    if name not in record:
        raise ValueError(f"{name}: missing")
    if optional and record[name] is None:
        return None
    return _typed(record[name], kind, name)


def _items(record: Any, name: str, kind: str, *, length: int | None = None, optional: bool = False) -> list | None:
    """A field that is a list of one JSON kind."""
    values = _field(record, name, "list", optional=optional)
    if values is None:
        return None
    if length is not None and len(values) != length:
        raise ValueError(f"{name}: expected {length} items, got {len(values)}")
    return [_typed(value, kind, f"{name}[{position}]") for position, value in enumerate(values)]


def _parsed(text: str, kind: type, name: str) -> Any:
    """A number from a table."""
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{name}: expected {kind.__name__}, got {text[:20]!r}") from None
    return _typed(value, "number", name)


def _rle(rle: dict[str, Any] | None, size: tuple[int, int]) -> dict[str, Any] | None:
    """A mask of a file, with nothing but the two fields of an RLE, after validation."""
    if rle is None:
        return None
    with _located("mask"):
        validate_rle(rle)
        if tuple(rle["size"]) != size:
            raise ValueError(f"size: expected {list(size)}, that of the video, got {rle['size']}")
    return {"size": rle["size"], "counts": rle["counts"]}


def _check_extent(tracks: int, frames: int) -> None:
    if frames < 1 or tracks * frames > MAX_TRACK_FRAMES:
        raise ValueError(
            f"{tracks} tracks of {frames} frames: expected at least one frame and at most {MAX_TRACK_FRAMES} boxes"
        )


# --- boxes ---


def _present_box(track: ObjectTrack, frame: int) -> np.ndarray | None:
    """Box of the object, else that of its mask, float64 (4,) xyxy pixels; None if it has neither in this frame."""
    if not np.isnan(track.boxes[frame]).any():
        return track.boxes[frame].astype(np.float64)
    if track.rles[frame] is None:
        return None
    box = mask_to_box(track.mask(frame))
    return None if np.isnan(box).any() else box.astype(np.float64)


def _to_xywh(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = box.tolist()
    return [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)]


def _empty_track(frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (T, 4) and scores (T,) of an object that is absent everywhere."""
    return np.full((frames, 4), np.nan, dtype=np.float32), np.zeros(frames, dtype=np.float32)


def _enter_box(boxes: np.ndarray, scores: np.ndarray, frame: int, xywh: list[float], score: float) -> None:
    """Write one box, xywh pixels, and its score into a track, which must not have one in that frame."""
    x, y, width, height = xywh
    if width < 0 or height < 0:
        raise ValueError(f"box: expected a width and height of 0 or more, got {width} x {height}")
    if not np.isnan(boxes[frame]).all():
        raise ValueError(f"the object has two boxes in frame {frame}")
    boxes[frame], scores[frame] = (x, y, x + width, y + height), score
