"""Runs a model over a benchmark and writes its answers where the scores read them.

Every prediction is written atomically, and what is complete on disk is not made again: an interrupted run goes on
where it stopped. A video that fails is logged and reported with the name of its file, and the others go on.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm.auto import tqdm

from sparrow_processing.processing_sparrow import BOX_TOKEN, SEG_TOKEN
from sparrow_processing.results import GroundingResult, ObjectTrack
from sparrow_processing.video_io import VideoReader, open_video

from . import video_gcg, vidstg
from .files import EvaluationError, write_mask
from .frames import open_frames, select_frames
from .referring_datasets import ReferringDataset, ReferringSample
from .video_gcg_dataset import GcgSample, VideoGcgDataset
from .vidstg import VidStgDataset, VidStgSample

logger = logging.getLogger(__name__)

Sample = TypeVar("Sample")

#: Written into answers to ground phrases; every other special token is left out of them.
MARK_UP = ("<p>", "</p>", BOX_TOKEN, SEG_TOKEN)
#: What one video may die of without ending the run: unreadable files, bad values, failures of the device.
VIDEO_ERRORS = (OSError, ValueError, RuntimeError)


@dataclass(frozen=True)
class GroundedAnswer:
    """A model's answer to one prompt.

    Attributes:
        text: with mark-up, e.g. `<p> a dog </p> [BOX] [SEG]`.
        size: height and width of the clip in pixels.
        objects: for each [SEG] of the text (or [BOX], if there is no [SEG]), in order, the tracks of what it means.
    """

    text: str
    size: tuple[int, int]
    objects: list[list[ObjectTrack]]

    def mask(self, token: int, frame: int) -> np.ndarray:
        """Union `(H, W)` bool of all that one [SEG] means, on one frame; empty if the answer has no [SEG] at all."""
        mask = np.zeros(self.size, bool)
        for track in self.objects[token] if self.objects else ():
            mask |= track.mask(frame)
        return mask


class Grounder:
    """Asks a model questions in the exact words of a benchmark.

    Args:
        model: a `SparrowForVideoGrounding`, in evaluation mode.
        processor: its `SparrowProcessor`.
        queries_per_pass: questions about one video that are answered together. They share the features of the frames;
            memory grows with their number.
        max_new_tokens: longest answer; default as the checkpoint says.
    """

    def __init__(self, model, processor, queries_per_pass: int = 4, max_new_tokens: int | None = None) -> None:
        if queries_per_pass < 1 or (max_new_tokens is not None and max_new_tokens < 1):
            raise ValueError("queries_per_pass and max_new_tokens must be at least 1")
        self.model, self.processor = model, processor
        self.queries_per_pass, self.max_new_tokens = queries_per_pass, max_new_tokens

    def __call__(self, video: VideoReader, prompts: Sequence[str]) -> Iterator[GroundedAnswer]:
        """Yields the answer to each prompt about a video, in order; masks are held as run-length encodings."""
        for start in range(0, len(prompts), self.queries_per_pass):
            yield from self._pass(video, list(prompts[start : start + self.queries_per_pass]))

    def _pass(self, video: VideoReader, prompts: list[str]) -> list[GroundedAnswer]:
        inputs = self.processor(text=prompts, videos=[video], task="ask", stream=True).to(self.model.device)
        masks = self.processor.collector(inputs["metadata"])
        output = self.model.ground(**inputs, mask_sink=masks, max_new_tokens=self.max_new_tokens, do_sample=False)
        results = self.processor.post_process_grounding(output, masks)
        return [
            self._answer(ids, [found.token_position for found in objects], result)
            for ids, objects, result in zip(output.sequences.tolist(), output.objects, results, strict=True)
        ]

    def _answer(self, ids: list[int], positions: list[int], result: GroundingResult) -> GroundedAnswer:
        token_ids = self.processor.token_ids
        marker = token_ids[SEG_TOKEN] if token_ids[SEG_TOKEN] in ids else token_ids[BOX_TOKEN]
        objects: dict[int, list[ObjectTrack]] = {place: [] for place, index in enumerate(ids) if index == marker}
        for position, track in zip(positions, result.objects, strict=True):
            objects[position].append(track)
        tokenizer = self.processor.tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for token in set(tokenizer.all_special_tokens).difference(MARK_UP):
            text = text.replace(token, " ")
        return GroundedAnswer(" ".join(text.split()), result.size, list(objects.values()))


@dataclass
class PredictionSummary:
    """What a run did.

    Attributes:
        predicted: expressions, sentences or samples that were answered.
        already_done: those that were complete on disk.
        failures: one line for each video that failed.
    """

    predicted: int = 0
    already_done: int = 0
    failures: list[str] = field(default_factory=list)


def predict_expressions(
    grounder: Grounder,
    dataset: ReferringDataset,
    predictions: str | Path,
    chunk_frames: int | None = None,
    fail_fast: bool = False,
) -> PredictionSummary:
    """Writes `<predictions>/<video>/<expression id>/<frame>.png` for every expression of a benchmark.

    The mask is what the first [SEG] of the answer means, as the host scripts keep only their lowest object; an answer
    without one gets empty masks.

    Args:
        grounder: asks the model.
        dataset: the benchmark.
        predictions: folder.
        chunk_frames: cut videos into pieces of this many frames, each answered on its own, as VideoGLaMM's and
            SPARROW's scripts do with Ref-DAVIS17 (64). `None` keeps them whole.
        fail_fast: raise the first error instead of going on.
    """
    predictions = Path(predictions)

    def predict(samples: list[ReferringSample]) -> Iterator[ReferringSample]:
        paths = samples[0].frame_paths
        length = chunk_frames or len(paths)
        for start in range(0, len(paths), length):
            answers = grounder(open_frames(paths[start : start + length]), [sample.prompt for sample in samples])
            for sample, answer in zip(samples, answers, strict=True):
                for frame, path in enumerate(sample.prediction_paths(predictions)[start : start + length]):
                    write_mask(path, answer.mask(0, frame))
                if start + length >= len(paths):
                    yield sample

    def is_done(sample: ReferringSample) -> bool:
        return all(path.is_file() for path in sample.prediction_paths(predictions))

    videos = _group(dataset, lambda sample: sample.video)
    return _run(videos, predict, is_done, f"predicting {dataset.benchmark}", fail_fast)


def predict_vidstg(
    grounder: Grounder, dataset: VidStgDataset, predictions: str | Path, fail_fast: bool = False
) -> PredictionSummary:
    """Writes `<predictions>/<sample id>.json`, a box for every sampled frame of every sentence.

    The box is drawn around the first object of the answer, by VideoGLaMM's rules (`dataset.host`) around the last.

    Args:
        grounder: asks the model.
        dataset: the benchmark.
        predictions: folder.
        fail_fast: raise the first error instead of going on.
    """
    predictions = Path(predictions)
    token = -1 if dataset.host == "videoglamm" else 0

    def predict(samples: list[VidStgSample]) -> Iterator[VidStgSample]:
        video = open_video(samples[0].video_path)
        size = samples[0].height, samples[0].width
        if (video.height, video.width) != size:
            raise EvaluationError(
                f"{video.path}: {video.height} x {video.width} pixels (height x width), annotated as "
                f"{size[0]} x {size[1]}"
            )
        for frame_ids, same_frames in _group(samples, lambda sample: sample.frame_ids).items():
            clip = select_frames(video, frame_ids, dataset.protocol.frame_size(*size))
            answers = grounder(clip, [sample.prompt for sample in same_frames])
            for sample, answer in zip(same_frames, answers, strict=True):
                masks = (vidstg.remove_small_components(answer.mask(token, i)) for i in range(len(frame_ids)))
                boxes = dict(zip(frame_ids, map(vidstg.mask_to_box, masks), strict=True))
                span = dataset.protocol.read_span(answer.text, frame_ids)
                vidstg.write_prediction(predictions, sample, boxes, span)
                yield sample

    def is_done(sample: VidStgSample) -> bool:
        return (predictions / f"{sample.sample_id}.json").is_file()

    videos = _group(dataset, lambda sample: str(sample.video_path))
    return _run(videos, predict, is_done, f"predicting {dataset.benchmark}", fail_fast)


def predict_video_gcg(
    grounder: Grounder, dataset: VideoGcgDataset, predictions: str | Path, fail_fast: bool = False
) -> PredictionSummary:
    """Writes `<predictions>/<set>/<video>/res.json` and, for each [SEG] of the caption, `pred_masks_<k>/`.

    Args:
        grounder: asks the model.
        dataset: the benchmark.
        predictions: folder.
        fail_fast: raise the first error instead of going on.
    """
    predictions = Path(predictions)

    def predict(samples: list[GcgSample]) -> Iterator[GcgSample]:
        (sample,) = samples
        for left_over in (predictions / sample.name).glob("pred_masks_*"):  # of an interrupted run
            shutil.rmtree(left_over)
        (answer,) = grounder(open_frames(sample.frame_paths), [sample.prompt])
        frames = (
            [vidstg.remove_small_components(answer.mask(token, frame)) for token in range(len(answer.objects))]
            for frame in range(len(sample.frame_paths))
        )
        video_gcg.write_prediction(predictions, sample, answer.text, frames, tokens=(BOX_TOKEN, SEG_TOKEN))
        yield sample

    def is_done(sample: GcgSample) -> bool:
        return (predictions / sample.name / "res.json").is_file()

    samples = _group(dataset, lambda sample: sample.name)
    return _run(samples, predict, is_done, f"predicting {dataset.benchmark}", fail_fast)


def _group(samples: Iterable[Sample], key: Callable[[Sample], object]) -> dict:
    groups: dict[object, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(key(sample), []).append(sample)
    return groups


def _run(
    videos: dict[str, list[Sample]],
    predict: Callable[[list[Sample]], Iterator[Sample]],
    is_done: Callable[[Sample], bool],
    description: str,
    fail_fast: bool,
) -> PredictionSummary:
    """Predicts what is not done yet, video by video; `predict` yields each sample that it has written."""
    summary = PredictionSummary()
    with tqdm(videos.items(), desc=description, unit="video") as bar:
        for name, samples in bar:
            waiting = [sample for sample in samples if not is_done(sample)]
            summary.already_done += len(samples) - len(waiting)
            if not waiting:
                continue
            try:
                for _ in predict(waiting):
                    summary.predicted += 1
            except VIDEO_ERRORS as error:
                if fail_fast:
                    raise
                summary.failures.append(f"{name}: {' '.join(str(error).split()) or type(error).__name__}")
                logger.error("failed: %s", summary.failures[-1])
                logger.debug("where it failed", exc_info=True)
                bar.set_postfix(failed=len(summary.failures))
    return summary
