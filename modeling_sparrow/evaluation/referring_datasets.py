"""Referring-segmentation benchmarks in their official layouts: MeViS, Ref-YouTube-VOS, Ref-DAVIS17, ReVOS, ReasonVOS.

Every data set lists its videos and expressions and knows the ground truth of each expression. Predictions are binary
PNG files `<predictions>/<video>/<expression id>/<frame>.png` at the size of the annotation.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .files import (
    EvaluationError,
    MissingPredictionError,
    decode_rle,
    read_json,
    read_label_map,
    read_mask,
    read_mask_dict,
)
from .prompts import Host, referring_prompt
from .results import average, version_name


@dataclass(frozen=True)
class ReferringSample:
    """One referring expression of one video.

    Attributes:
        video: name, also the folder of its predictions (may hold a slash).
        expression_id: as the benchmark numbers it.
        expression: text as annotated.
        prompt: what the host model is asked.
        frame_names: frames in order, without suffix; a prediction is `<frame name>.png`.
        frame_paths: the pictures.
    """

    video: str
    expression_id: str
    expression: str
    prompt: str
    frame_names: tuple[str, ...]
    frame_paths: tuple[Path, ...]

    @property
    def key(self) -> str:
        return f"{self.video}_{self.expression_id}"

    def prediction_paths(self, predictions: str | Path) -> list[Path]:
        """Where the masks of all frames belong under the folder `predictions`."""
        folder = Path(predictions) / self.video / self.expression_id
        return [folder / f"{name}.png" for name in self.frame_names]


@dataclass(frozen=True)
class RleTrack:
    """Ground truth of one expression from run-length encodings; several annotations are united.

    Attributes:
        frame_names: annotated frames, without suffix.
        annotations: one list per annotation, each with an encoding or `None` per frame.
        size: height and width of the video in pixels; `None` if no annotation of the video tells.
        source: what to name in an error.
    """

    frame_names: tuple[str, ...]
    annotations: tuple[list, ...]
    size: tuple[int, int] | None
    source: str

    def __post_init__(self) -> None:
        for annotation in self.annotations:
            if len(annotation) != len(self.frame_names):
                raise EvaluationError(
                    f"{self.source}: {len(annotation)} masks in an annotation, expected one for each of "
                    f"{len(self.frame_names)} frames"
                )

    def frame(self, index: int) -> np.ndarray | None:
        """Number of annotations that cover each pixel, `(H, W)` uint8; `None` if all is empty and the size unknown."""
        if self.size is None:
            return None
        total = np.zeros(self.size, np.uint8)
        for annotation in self.annotations:
            if annotation[index]:
                mask = decode_rle(annotation[index], self.source)
                if mask.shape != total.shape:
                    raise EvaluationError(f"{self.source}: mask of {mask.shape} pixels in a video of {total.shape}")
                total += mask
        return total


@dataclass(frozen=True)
class FileTrack:
    """Ground truth of one expression from PNG files.

    Attributes:
        frame_names: annotated frames, without suffix.
        paths: one file per frame.
        label: the object's value in a label map; `None` takes every non-zero pixel.
    """

    frame_names: tuple[str, ...]
    paths: tuple[Path, ...]
    label: int | None = None

    def frame(self, index: int) -> np.ndarray:
        """`(H, W)` bool mask of a frame."""
        try:
            if self.label is None:
                return read_mask(self.paths[index])
            return read_label_map(self.paths[index]) == self.label
        except MissingPredictionError as error:
            raise EvaluationError(f"{self.paths[index]}: annotation missing") from error


class ReferringDataset(ABC):
    """Expressions of a benchmark in its official layout, with their ground truth.

    Iterating yields [`ReferringSample`]s in the benchmark's order. Listing needs only the annotation files;
    pictures and masks are opened when used.

    Attributes:
        benchmark: name, as in `sparrow evaluate`.
        protocol: name of the rules that [`score_expressions`] follows.
        official_missing: what the benchmark's own script does with a missing video folder, and with a missing
            expression folder or frame: `"zero"`, `"skip"` or `"error"`.
        known_versions: (videos, expressions) of released versions.
    """

    benchmark: ClassVar[str]
    protocol: ClassVar[str] = "per-expression"
    official_missing: ClassVar[dict[str, str]]
    known_versions: ClassVar[dict[tuple[int, int], str]] = {}
    metric_names: ClassVar[tuple[str, ...]] = ("J", "F")

    def __init__(self, expressions_file: Path, frames_folder: Path, host: Host) -> None:
        self.expressions_file = expressions_file
        self.frames_folder = frames_folder
        self.host = host
        content = read_json(expressions_file)
        if not isinstance(content, dict) or not isinstance(content.get("videos"), dict):
            raise EvaluationError(f"{expressions_file}: expected a dictionary with the key 'videos'")
        self.videos: dict[str, dict[str, Any]] = content["videos"]

    @cached_property
    def samples(self) -> list[ReferringSample]:
        samples = []
        for video in self.videos:
            try:
                samples += self._video_samples(video)
            except (KeyError, TypeError, ValueError) as error:
                raise EvaluationError(
                    f"{self.expressions_file}: video {video} is not as expected ({error})"
                ) from error
        if not samples:
            raise EvaluationError(f"{self.expressions_file}: no expressions")
        return samples

    def _video_samples(self, video: str) -> list[ReferringSample]:
        names = tuple(self.videos[video]["frames"])
        if not names:
            raise ValueError("no frames")
        samples = []
        for expression_id, text in self._expressions(video):
            # Predictions are written to folders of these names: they must not lead elsewhere.
            for name in (video, expression_id, *names):
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise ValueError(f"name {name!r} leads out of the folder")
            paths = tuple(self.frames_folder / video / f"{name}.jpg" for name in names)
            prompt = referring_prompt(text, self.host)
            samples.append(ReferringSample(video, expression_id, text, prompt, names, paths))
        return samples

    def _expressions(self, video: str) -> Iterator[tuple[str, str]]:
        for expression_id, entry in self.videos[video]["expressions"].items():
            yield expression_id, entry["exp"]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> ReferringSample:
        return self.samples[index]

    def __iter__(self) -> Iterator[ReferringSample]:
        return iter(self.samples)

    @property
    def version(self) -> str:
        """Name of the released version with these counts, or the counts."""
        return version_name(self.known_versions, len(self.video_names), len(self))

    @property
    def video_names(self) -> list[str]:
        """Videos with expressions, in the benchmark's order."""
        return list(dict.fromkeys(sample.video for sample in self))

    def limit(self, count: int) -> None:
        """Keeps only the expressions of the first videos."""
        kept = set(self.video_names[:count])
        self.samples = [sample for sample in self if sample.video in kept]

    @abstractmethod
    def ground_truth(self, sample: ReferringSample) -> RleTrack | FileTrack:
        """Masks of an expression.

        Raises:
            EvaluationError: if the split has no public ground truth or a file is absent.
        """

    def foreground(self, video: str) -> RleTrack | None:
        """Masks of everything annotated in a video, for benchmarks that measure robustness."""
        return None

    def summarise(self, values: dict[str, dict[str, float]]) -> dict[str, float]:
        """Final numbers from those of all expressions."""
        metrics = average(values.values(), self.metric_names)
        return metrics | {"J&F": (metrics["J"] + metrics["F"]) / 2}


class _MaskDictDataset(ReferringDataset):
    """A benchmark whose ground truth is one dictionary of run-length encodings."""

    mask_file: Path

    @cached_property
    def masks(self) -> dict[str, list]:
        return read_mask_dict(self.mask_file)

    def annotation_ids(self, sample: ReferringSample) -> list[str]:
        entry = self.videos[sample.video]["expressions"][sample.expression_id]
        if "anno_id" not in entry:
            raise EvaluationError(
                f"{self.expressions_file}: expression {sample.key} has no 'anno_id': this split has no public ground "
                "truth; write a submission instead"
            )
        return [str(annotation) for annotation in entry["anno_id"]]

    def ground_truth(self, sample: ReferringSample) -> RleTrack:
        annotations = []
        for annotation in self.annotation_ids(sample):
            if annotation not in self.masks:
                raise EvaluationError(f"{self.mask_file}: no masks for annotation {annotation} ({sample.key})")
            annotations.append(self.masks[annotation])
        source = f"{self.mask_file}, expression {sample.key}"
        return RleTrack(sample.frame_names, tuple(annotations), self.video_sizes[sample.video], source)

    @cached_property
    def video_sizes(self) -> dict[str, tuple[int, int] | None]:
        """Height and width of every video: as annotated, else of any of its masks; `None` if no mask tells."""
        sizes: dict[str, tuple[int, int] | None] = {}
        for video, meta in self.videos.items():
            sizes[video] = (meta["height"], meta["width"]) if "height" in meta and "width" in meta else None
        for sample in self:
            for annotation in self.annotation_ids(sample) if sizes[sample.video] is None else ():
                rle = next((rle for rle in self.masks.get(annotation, ()) if rle), None)
                if rle is not None:
                    sizes[sample.video] = tuple(rle["size"])
                    break
        return sizes


class MevisDataset(_MaskDictDataset):
    """MeViS: `<root>/<split>/{meta_expressions.json, mask_dict.json, JPEGImages/<video>/<frame>.jpg}`.

    The official script scores an expression 0 if its video's folder is missing, but drops it from the mean without
    a word if the expression's folder or one frame is.

    Args:
        root: folder of the data set.
        split: `"valid_u"` (public ground truth), `"train"`, or `"valid"` (no ground truth: submission only).
        host: whose prompts to use.
    """

    benchmark = "mevis"
    official_missing: ClassVar = {"video": "zero", "expression": "skip"}
    known_versions: ClassVar = {
        (50, 793): "MeViS v1 valid_u",
        (50, 907): "MeViS v2 valid_u",
        (140, 2236): "MeViS v1 valid",
        (140, 2523): "MeViS v2 valid",
    }

    def __init__(self, root: str | Path, split: str = "valid_u", host: Host = "sparrow") -> None:
        folder = Path(root) / split
        super().__init__(folder / "meta_expressions.json", folder / "JPEGImages", host)
        self.mask_file = folder / "mask_dict.json"


class RefYoutubeVosDataset(_MaskDictDataset):
    """Ref-YouTube-VOS: `<root>/meta_expressions/<split>/meta_expressions.json`, `<root>/<split>/JPEGImages/…`.

    The released validation list holds the validation and the test videos; those in the test list are left out, which
    leaves 202. The ground truth of that split is not part of the release. If you own it, pass it as label maps
    `<root>/<split>/Annotations/<video>/<frame>.png` with `objects_file`, or as run-length encodings with
    `mask_file` (then the expressions need an `anno_id`). The train split carries object ids. The official numbers
    come from a server whose treatment of missing files is unknown: `missing="official"` stops.

    Args:
        root: folder of the data set.
        split: `"valid"` or `"train"`.
        host: whose prompts to use.
        objects_file: JSON, video -> expression id -> object number.
        mask_file: mask dictionary, annotation id -> one encoding or null per frame.
    """

    benchmark = "ref-youtube-vos"
    official_missing: ClassVar = {"video": "error", "expression": "error"}

    def __init__(
        self,
        root: str | Path,
        split: str = "valid",
        host: Host = "sparrow",
        objects_file: str | Path | None = None,
        mask_file: str | Path | None = None,
    ) -> None:
        root = Path(root)
        super().__init__(
            root / "meta_expressions" / split / "meta_expressions.json", root / split / "JPEGImages", host
        )
        self.annotations_folder = root / split / "Annotations"
        self.objects_file = objects_file
        self.mask_file = Path(mask_file) if mask_file else None
        if split == "valid":
            test_file = root / "meta_expressions" / "test" / "meta_expressions.json"
            if test_file.is_file():
                test_videos = read_json(test_file)["videos"]
                self.videos = {name: meta for name, meta in self.videos.items() if name not in test_videos}
            elif len(self.videos) == 507:
                raise EvaluationError(
                    f"{test_file}: missing; the validation list holds 507 videos, and the test list is needed to find "
                    "the 202 validation videos among them"
                )

    @property
    def version(self) -> str:
        if len(self.video_names) == 202:
            return f"Ref-YouTube-VOS val (202 videos, {len(self)} expressions)"
        return super().version

    @cached_property
    def objects(self) -> dict[str, dict[str, int]]:
        return read_json(self.objects_file) if self.objects_file else {}

    def ground_truth(self, sample: ReferringSample) -> RleTrack | FileTrack:
        if self.mask_file:
            return super().ground_truth(sample)
        entry = self.videos[sample.video]["expressions"][sample.expression_id]
        label = self.objects.get(sample.video, {}).get(sample.expression_id, entry.get("obj_id"))
        if label is None:
            raise EvaluationError(
                f"{self.expressions_file}: expression {sample.key} has no 'obj_id': this split's ground truth is not "
                "part of the release; write a submission, or pass objects_file or mask_file"
            )
        folder = self.annotations_folder / sample.video
        return FileTrack(sample.frame_names, tuple(folder / f"{name}.png" for name in sample.frame_names), int(label))


class RefDavis17Dataset(_MaskDictDataset):
    """Ref-DAVIS17: `<root>/meta_expressions/valid/meta_expressions.json`, `<root>/valid/{JPEGImages/…,
    mask_dict.pkl}`.

    Two protocols go by this name and their numbers differ: 4A joins the expressions of one annotator to a label map
    ([`write_label_maps`], [`score_ref_davis17`]), 4B scores each expression ([`score_expressions`]). The mask
    dictionary of 4B is numbered by position: videos by name, expression ids sorted as strings ("0", "1", "10", "11",
    "2" …).

    Args:
        root: folder of the data set.
        host: whose prompts to use.
        expressions_file: if it is not in the official place.
        mask_file: mask dictionary (`.pkl` or `.json`), if it is not in the official place.
    """

    benchmark = "ref-davis17"
    protocol = "4B (per expression, no pairing)"
    official_missing: ClassVar = {"video": "zero", "expression": "skip"}
    known_versions: ClassVar = {(30, 244): "Ref-DAVIS17 val"}

    def __init__(
        self,
        root: str | Path,
        host: Host = "sparrow",
        expressions_file: str | Path | None = None,
        mask_file: str | Path | None = None,
    ) -> None:
        root = Path(root)
        default = root / "meta_expressions" / "valid" / "meta_expressions.json"
        super().__init__(Path(expressions_file or default), root / "valid" / "JPEGImages", host)
        self.mask_file = Path(mask_file or root / "valid" / "mask_dict.pkl")

    @cached_property
    def _positions(self) -> dict[str, str]:
        keys = [f"{video}_{expression}" for video in sorted(self.videos) for expression in self._sorted_ids(video)]
        if len(keys) != len(self.masks):
            raise EvaluationError(
                f"{self.mask_file}: {len(self.masks)} entries, expected one per expression ({len(keys)})"
            )
        return {key: str(position) for position, key in enumerate(keys)}

    def _sorted_ids(self, video: str) -> list[str]:
        return sorted(self.videos[video]["expressions"])

    def annotation_ids(self, sample: ReferringSample) -> list[str]:
        return [self._positions[sample.key]]


class RevosDataset(_MaskDictDataset):
    """ReVOS: `<root>/{meta_expressions_valid_.json, mask_dict.json, mask_dict_foreground.json, JPEGImages/…}`.

    Beside J and F: A, the share of pixels that are right, and R, robustness against naming the wrong objects,
    max(1 - wrong / annotated foreground, 0). The official script compares raw pixel values, so its A and R mean
    something only for PNGs with 0 and 1 and objects that do not overlap; `A` and `R` here compare masks,
    `A_official` and `R_official` the raw values. Each expression's percentage is rounded to two decimals before
    averaging; the overall number is the mean of the referring and the reasoning mean; expressions without a target
    are in no mean. The official script scores whatever is missing 0.

    Args:
        root: folder of the data set.
        host: whose prompts to use.
    """

    benchmark = "revos"
    official_missing: ClassVar = {"video": "zero", "expression": "zero"}
    metric_names = ("J", "F", "A", "R", "A_official", "R_official")
    types: ClassVar = {0: "referring", 1: "reasoning"}

    def __init__(self, root: str | Path, host: Host = "sparrow") -> None:
        root = Path(root)
        super().__init__(root / "meta_expressions_valid_.json", root / "JPEGImages", host)
        self.mask_file = root / "mask_dict.json"
        self.foreground_file = root / "mask_dict_foreground.json"

    @cached_property
    def _foregrounds(self) -> dict[str, dict[str, list]]:
        return read_json(self.foreground_file)

    def foreground(self, video: str) -> RleTrack:
        if video not in self._foregrounds:
            raise EvaluationError(f"{self.foreground_file}: no foreground for video {video}")
        masks = self._foregrounds[video]["masks_rle"]
        # A frame holds one encoding or a list of them.
        layers = [[rle] if isinstance(rle, dict) or rle is None else list(rle) for rle in masks]
        depth = max(map(len, layers))
        annotations = tuple([layer[i] if i < len(layer) else None for layer in layers] for i in range(depth))
        names = tuple(self.videos[video]["frames"])
        return RleTrack(names, annotations, self.video_sizes[video], f"{self.foreground_file}, video {video}")

    def summarise(self, values: dict[str, dict[str, float]]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for type_id, name in self.types.items():
            rows = [values[s.key] for s in self if s.key in values and self._type(s) == type_id]
            if rows:
                percents = [{metric: round(100 * row[metric], 2) for metric in self.metric_names} for row in rows]
                means = average(percents, self.metric_names)
                metrics |= {f"{metric}_{name}": value / 100 for metric, value in means.items()}
                metrics[f"J&F_{name}"] = (metrics[f"J_{name}"] + metrics[f"F_{name}"]) / 2
        if all(f"J_{name}" in metrics for name in self.types.values()):
            for metric in (*self.metric_names, "J&F"):
                metrics[metric] = (metrics[f"{metric}_referring"] + metrics[f"{metric}_reasoning"]) / 2
        return metrics

    def _type(self, sample: ReferringSample) -> int:
        return self.videos[sample.video]["expressions"][sample.expression_id]["type_id"]


class ReasonVosDataset(ReferringDataset):
    """ReasonVOS: `<root>/{meta_expressions.json, JPEGImages/<video>/…,
    Annotations/<source>_<video>_<object>/<frame>.png}`.

    Scored are the frames that are annotated. The official script leaves expressions without predictions out of the
    mean.

    Args:
        root: folder of the data set.
        host: whose prompts to use.
    """

    benchmark = "reasonvos"
    official_missing: ClassVar = {"video": "skip", "expression": "skip"}

    def __init__(self, root: str | Path, host: Host = "sparrow") -> None:
        root = Path(root)
        super().__init__(root / "meta_expressions.json", root / "JPEGImages", host)
        self.annotations_folder = root / "Annotations"

    def _expressions(self, video: str) -> Iterator[tuple[str, str]]:
        for entry in self.videos[video]["expressions"]:
            yield str(entry["exp_id"]), entry["exp_text"]

    def ground_truth(self, sample: ReferringSample) -> FileTrack:
        meta = self.videos[sample.video]
        entry = next(entry for entry in meta["expressions"] if str(entry["exp_id"]) == sample.expression_id)
        folder = self.annotations_folder / f"{meta['source']}_{sample.video}_{entry['obj_id']}"
        paths = tuple(sorted(folder.glob("*.png")))
        if not paths:
            raise EvaluationError(f"{folder}: no annotations (PNG files) for expression {sample.key}")
        return FileTrack(tuple(path.stem for path in paths), paths)
