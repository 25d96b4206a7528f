"""One request of one visitor: its folder, its clip, its results, and what the visitor does with them."""

import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from modeling_sparrow.mask_tracker import FrameMasks
from modeling_sparrow.modeling_outputs import GroundingOutput
from modeling_sparrow.region_proposer import RegionProposals
from sparrow_processing.errors import LimitExceededError, PromptError, VideoGroundingError, VideoReadError
from sparrow_processing.exports import write_coco, write_csv
from sparrow_processing.overlays import draw_overlay, write_overlay
from sparrow_processing.processing_sparrow import MaskCollector, MaskFrameStream, check_prompt
from sparrow_processing.results import GroundingResult, ObjectTrack
from sparrow_processing.video_io import VideoReader, open_video
from sparrow_processing.video_sources import VideoLimits

from .grounding import Grounder, StreamTail

KEPT_OVERLAYS = 4  # files of earlier choices of objects that stay for a quick return


@dataclass(frozen=True)
class DemoLimits:
    """What one request may cost.

    Args:
        video: size and length of a clip.
        max_queries: questions asked at once.
        max_seconds: wall time of a run; what is done by then is kept.
        max_waiting: visitors in the queue.
    """

    video: VideoLimits = field(
        default_factory=lambda: VideoLimits(
            max_bytes=200_000_000,
            max_frames=1800,
            max_side=4096,
            max_total_pixels=4_000_000_000,
            max_decode_seconds=60,
        )
    )
    max_queries: int = 8
    max_seconds: float = 300.0
    max_waiting: int = 16

    def __str__(self) -> str:
        return (
            f"at most {self.video.max_bytes / 1e6:.0f} MB, {self.video.max_frames} frames "
            f"({self.video.max_frames / 30:.0f} s at 30 frames a second) and {self.video.max_side} pixels a side"
        )


@dataclass
class Progress:
    """Frames done of those to do, and the seconds since the first of them was begun."""

    done: int
    total: int
    seconds: float

    @property
    def seconds_left(self) -> float:
        return self.seconds / max(self.done, 1) * (self.total - self.done)


@dataclass
class Reprompt:
    """An object that was lost, located anew on a frame and prompted again with `box` `(4,)`, normalised xyxy."""

    object_id: int
    frame: int
    box: np.ndarray


def visitor_folder(root: Path, session_hash: str | None) -> Path:
    """Where the requests of a visitor lie. The hash comes from the browser, so that it is no name for a folder."""
    return root / "requests" / hashlib.sha256(str(session_hash).encode()).hexdigest()


class Session:
    """One request.

    Args:
        folder: of the visitor; the request gets a new one inside, and what earlier requests left there is deleted.
        video: file of the clip; it is copied.
        queries: one per line; empty for the task `describe`.
        task: `refer`, `box`, `describe` or `ask`.
        limits: of this demo.

    Raises:
        VideoGroundingError: the clip cannot be read, is too large, or a query cannot be used; in plain words.
    """

    def __init__(self, folder: Path, video: str | None, queries: str, task: str, limits: DemoLimits):
        self.task, self.limits = task, limits
        self.queries = read_queries(queries, task, limits.max_queries)
        if video is None:
            raise VideoReadError("Choose a video first: upload one, or click an example.")
        shutil.rmtree(folder, ignore_errors=True)
        self.folder = folder / uuid.uuid4().hex
        self.folder.mkdir(parents=True)
        self.stop = threading.Event()
        self.reader = self._open(Path(video))
        self.results: list[GroundingResult] = []
        self.places: list[tuple[int, int]] = []  # (row, number in the row) of each object id
        self.hidden: set[int] = set()
        self.frames_done: set[int] = set()
        self.stopped = False
        self.output: GroundingOutput | None = None
        self.candidates: RegionProposals | None = None
        self.reprompts: list[Reprompt] = []
        self._overlays: dict[frozenset[int], Path] = {}

    def _open(self, video: Path) -> VideoReader:
        path = self.folder / ("clip" + video.suffix.lower())
        try:
            shutil.copyfile(video, path)
            return open_video(path, limits=self.limits.video)
        except LimitExceededError as error:
            self.close()
            raise LimitExceededError(
                f"This clip is larger than the demo takes: {self.limits}. Cut it or scale it down, or run "
                "`sparrow ground` on your own machine, which has no such limits."
            ) from error
        except VideoReadError as error:
            self.close()
            raise VideoReadError(f"This file cannot be read as a video: {self.plain(error)}.") from error

    def plain(self, error: Exception) -> str:
        """What an error says, without the place of the files."""
        return str(error).replace(f"{self.folder}{os.sep}", "")

    def close(self):
        """Delete everything that belongs to the request."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------ grounding

    def ground(self, grounder: Grounder) -> Iterator[Progress]:
        """Answer the queries; `results` is there afterwards, also if it was stopped on the way."""
        inputs = grounder.processor(text=self.queries or None, videos=[self.reader], task=self.task, stream=True)
        collector = grounder.processor.collector(inputs["metadata"])
        reprompts: list[tuple[int, int, int, np.ndarray]] = []
        for step in self._until_stopped(grounder.ground(dict(inputs))):
            if isinstance(step, GroundingOutput):
                self.output = step
            elif isinstance(step, RegionProposals):
                self.candidates = step
            else:
                row, masks = step
                collector(row, masks)
                reprompts += [(row, k, masks.frame_index, box) for k, box in boxes_again(masks)]
                yield self._advance(masks.frame_index, len(self.reader))
        self._keep(grounder, collector)
        ids = {place: number for number, place in enumerate(self.places)}
        # stopped early, objects that came in last may not be in the results
        self.reprompts = [Reprompt(ids[row, k], frame, box) for row, k, frame, box in reprompts if (row, k) in ids]

    def _until_stopped(self, steps: Iterator) -> Iterator:
        """The steps, until the visitor stops them or leaves, or the time is over."""
        began = time.monotonic()
        self.frames_done, self.stopped, self._first_frame = set(), False, None
        self.stop.clear()
        for step in steps:
            yield step
            over = time.monotonic() - began > self.limits.max_seconds
            if over or self.stop.is_set() or not self.folder.exists():
                self.stopped = True
                steps.close()
                return

    def _advance(self, frame: int, total: int) -> Progress:
        self._first_frame = self._first_frame or time.monotonic()
        self.frames_done.add(frame)
        return Progress(len(self.frames_done), total, time.monotonic() - self._first_frame)

    def _keep(self, grounder: Grounder, collector: MaskCollector):
        """Results of what was collected, objects numbered through all answers."""
        for row, objects in enumerate(self.output.objects):
            for k, found in enumerate(objects):
                if found.score is None:  # stopped before its first mask was read
                    found.score = collector.frame_object(row, k, found.frame_index)["score"]
        self.places = [(row, k) for row, objects in enumerate(self.output.objects) for k in range(len(objects))]
        self.results = []
        for result in grounder.processor.post_process_grounding(self.output, collector):
            first = sum(map(len, self.results))
            objects = [replace(track, id=first + k) for k, track in enumerate(result)]
            self.results.append(replace(result, objects=objects, path=None, warnings=result.warnings + self._notes()))
        if not self.places:
            self.frames_done = set(range(len(self.reader)))

    def _notes(self) -> list[str]:
        if not self.stopped:
            return []
        return [f"Stopped after {len(self.frames_done)} of {len(self.reader)} frames; what was done is kept."]

    def correct(
        self, grounder: Grounder, object_id: int, frame: int, box: list[float], whole: bool
    ) -> Iterator[Progress]:
        """Prompt an object with a box on a frame and carry it on from there; nothing else is computed again.

        Args:
            box: xyxy in pixels.
            whole: walk back to the first frame as well; otherwise earlier frames stay as they are.

        Raises:
            VideoGroundingError: no such object or frame, or no box.
        """
        corners = self._check_correction(object_id, frame, box)
        row, k = self.places[object_id]
        start = 0 if whole else frame
        height, width = self.results[row].size
        normalised = torch.tensor(corners, dtype=torch.float32) / torch.tensor([width, height, width, height])
        tracked = grounder.corrected(self.output.tracked[row][k], frame - start, normalised)
        collector = grounder.processor.collector([self.output.metadata[row]])
        stream = StreamTail(MaskFrameStream(self.reader, grounder.processor.mask_size), start)
        reached = self.frames_done
        for masks in self._until_stopped(grounder.carry_on(stream, tracked)):
            masks.frame_index += start
            collector(0, masks)
            yield self._advance(masks.frame_index, len(self.reader) - start)
        note = f"Object {object_id} was corrected on frame {frame}; {len(self.frames_done)} frames changed."
        self._take_over(object_id, collector, note)
        self.frames_done |= reached

    def _check_correction(self, object_id: int, frame: int, box: list[float]) -> np.ndarray:
        """The box, float64 (4,), inside the picture."""
        if object_id not in range(len(self.places)) or frame not in range(len(self.reader)):
            raise VideoGroundingError("There is no such object or frame.")
        corners = np.asarray(box, dtype=np.float64)
        if corners.shape != (4,) or not np.isfinite(corners).all():
            raise VideoGroundingError("Drag a box over the object on the picture first.")
        height, width = self.reader.height, self.reader.width
        corners = np.clip(np.sort(corners.reshape(2, 2), axis=0).ravel(), 0, [width, height, width, height])
        if (corners[2:] - corners[:2] < 2).any():
            raise VideoGroundingError("The box is too small: drag from one corner of the object to the opposite one.")
        return corners

    def _take_over(self, object_id: int, collector: MaskCollector, note: str):
        """Replace an object's frames by those just computed."""
        row, k = self.places[object_id]
        result = self.results[row]
        old = result.objects[k]
        new = collector.object_track(0, 0, old.phrase, old.span, old.score)
        mine = np.isin(np.arange(len(old)), list(self.frames_done))
        track = replace(
            old,
            boxes=np.where(mine[:, None], new.boxes, old.boxes),
            scores=np.where(mine, new.scores, old.scores),
            visible=np.where(mine, new.visible, old.visible),
            rles=[new.rles[t] if mine[t] else old.rles[t] for t in range(len(old))],
        )
        objects = [*result.objects[:k], track, *result.objects[k + 1 :]]
        self.results[row] = replace(result, objects=objects, warnings=[*result.warnings, note])
        self._overlays.clear()

    # ------------------------------------------------------------------ pictures and files

    @property
    def tracks(self) -> list[ObjectTrack]:
        """All objects, by id."""
        return [track for result in self.results for track in result]

    @property
    def shown(self) -> list[ObjectTrack]:
        """The objects to draw; the task `box` draws no masks."""
        tracks = [track for track in self.tracks if track.id not in self.hidden]
        if self.task == "box":
            tracks = [replace(track, rles=[None] * len(track)) for track in tracks]
        return tracks

    def draw(self, frame: int) -> np.ndarray:
        """A frame with the shown objects, uint8 RGB (H, W, 3)."""
        picture, tracks = self.reader.read([frame])[0], self.shown
        masks = np.array([track.mask(frame) for track in tracks], dtype=bool).reshape(-1, *picture.shape[:2])
        boxes = np.array([track.boxes[frame] for track in tracks]).reshape(-1, 4)
        labels = [track.phrase or "" for track in tracks]
        return draw_overlay(picture, masks, boxes, labels, [track.id for track in tracks])

    def original_video(self) -> Path:
        """The clip as every browser plays it, frame by frame beside the overlay."""
        path = self.folder / "original.mp4"
        if not path.exists():
            write_overlay(path, self.reader, [])
        return path

    def overlay_video(self) -> Path:
        """The clip with the shown objects. Each choice of objects has a file of its own."""
        key = frozenset(self.hidden)
        if key not in self._overlays:
            path = self.folder / f"overlay_{uuid.uuid4().hex[:8]}.mp4"
            write_overlay(path, self.reader, self.shown)
            while len(self._overlays) >= KEPT_OVERLAYS:
                self._overlays.pop(next(iter(self._overlays))).unlink(missing_ok=True)
            self._overlays[key] = path
        return self._overlays[key]

    def write_downloads(self) -> list[Path]:
        """overlay.mp4, and of each answer result.json, coco.json, boxes.csv and masks.zip, in a new folder: a browser
        must not take a file that it has seen before for the present one."""
        for before in self.folder.glob("downloads_*"):
            shutil.rmtree(before)
        folder = self.folder / f"downloads_{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        overlay = folder / "overlay.mp4"
        shutil.copyfile(self.overlay_video(), overlay)
        files = [overlay]
        for number, result in enumerate(self.results):
            tail = f"_{number}" if len(self.results) > 1 else ""
            paths = [folder / f"{stem}{tail}{suffix}" for stem, suffix in DOWNLOADS]
            result.save_json(paths[0])
            write_coco(result, paths[1])
            write_csv(result, paths[2])
            masks = folder / f"masks{tail}"
            result.save_pngs(masks)
            shutil.make_archive(str(masks), "zip", masks)
            files += paths
        return files


DOWNLOADS = (("result", ".json"), ("coco", ".json"), ("boxes", ".csv"), ("masks", ".zip"))


def read_queries(text: str, task: str, limit: int) -> list[str]:
    """One query per line.

    Raises:
        PromptError: none, too many, or one that is no usable text.
    """
    if task == "describe":
        return []
    queries = [line for line in (text or "").splitlines() if line.strip()]
    if not queries:
        raise PromptError("Write what to look for, for example: the red ring.")
    if len(queries) > limit:
        raise PromptError(f"{len(queries)} questions at once are too many; this demo takes {limit}, one on each line.")
    return [check_prompt(query) for query in queries]


def boxes_again(masks: FrameMasks) -> list[tuple[int, np.ndarray]]:
    """(object, box) of those that were prompted again on this frame."""
    if masks.reprompt_boxes is None:
        return []
    boxes = masks.reprompt_boxes.float().numpy()
    return [(k, box) for k, box in zip(masks.objects, boxes, strict=True) if np.isfinite(box).all()]
