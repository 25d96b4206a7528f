"""Submission archives for the two benchmarks whose ground truth stays on a server.

| | inside the archive |
|---|---|
| MeViS | `<video>/<expression>/<frame>.png`, no folder above |
| Ref-YouTube-VOS | `Annotations/<video>/<expression>/<frame>.png` |

Both want every frame of every expression as an 8-bit grey PNG with the values 0 and 255 at the size of the video
frame. A wrong top level makes the server average nothing, so an archive is checked as a whole before it gets its
name.
"""

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .files import EvaluationError, atomic_path
from .referring_datasets import MevisDataset, RefYoutubeVosDataset
from .results import list_problems

#: Folder at the top of the archive.
ARCHIVE_ROOTS = {MevisDataset.benchmark: "", RefYoutubeVosDataset.benchmark: "Annotations/"}


@dataclass(frozen=True)
class Submission:
    """A finished archive: where it is and what it holds."""

    path: Path
    dataset_version: str
    videos: int
    expressions: int
    frames: int


def write_submission(
    dataset: MevisDataset | RefYoutubeVosDataset, predictions: str | Path, path: str | Path
) -> Submission:
    """Packs predictions into the archive the benchmark's server expects, and checks it.

    Args:
        dataset: the split to submit (`valid`); its pictures must be there, for their sizes.
        predictions: folder with `<video>/<expression id>/<frame>.png`.
        path: the `.zip` to write. Nothing is left there if a check fails.

    Raises:
        ValueError: if the benchmark takes no submissions.
        EvaluationError: if a mask is missing, unreadable, of the wrong size, mode or values; one line for each.
    """
    predictions, path = Path(predictions), Path(path)
    root = _archive_root(dataset)
    absent = [file for sample in dataset for file in sample.prediction_paths(predictions) if not file.is_file()]
    if absent:
        raise EvaluationError(list_problems([f"{file}: missing" for file in absent], "no submission written"))
    with atomic_path(path) as temporary:
        # PNG files are compressed already.
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for sample in tqdm(dataset, desc="packing"):
                for file in sample.prediction_paths(predictions):
                    archive.write(file, root + file.relative_to(predictions).as_posix())
        problems = check_submission(dataset, temporary)
        if problems:
            raise EvaluationError(list_problems(problems, "no submission written"))
    return Submission(
        path=path,
        dataset_version=dataset.version,
        videos=len({sample.video for sample in dataset}),
        expressions=len(dataset),
        frames=sum(len(sample.frame_names) for sample in dataset),
    )


def check_submission(dataset: MevisDataset | RefYoutubeVosDataset, path: str | Path) -> list[str]:
    """Checks an archive: top folder, depth, all expressions and frames, nothing else, mode, values, sizes.

    Args:
        dataset: the split it is for.
        path: the `.zip`.

    Returns:
        One line for each problem, naming the entry; empty if the archive is in order.

    Raises:
        ValueError: if the benchmark takes no submissions.
        EvaluationError: if the file is not an archive, or a picture of the data set cannot be read.
    """
    root = _archive_root(dataset)
    try:
        with zipfile.ZipFile(path) as archive:
            return list(_problems(dataset, archive, root))
    except (OSError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path}: not a readable zip archive ({error})") from error


def _problems(dataset: MevisDataset | RefYoutubeVosDataset, archive: zipfile.ZipFile, root: str) -> Iterator[str]:
    names = [name for name in archive.namelist() if not name.endswith("/")]
    present = set(names)
    if len(names) != len(present):
        yield f"{len(names) - len(present)} entries occur twice"
    expected: set[str] = set()
    sizes: dict[str, tuple[int, int]] = {}
    for sample in tqdm(dataset, desc="checking"):
        if sample.video not in sizes:
            sizes[sample.video] = _picture_size(sample.frame_paths[0])
        for frame in sample.frame_names:
            name = f"{root}{sample.video}/{sample.expression_id}/{frame}.png"
            expected.add(name)
            if name not in present:
                yield f"{name}: missing"
                continue
            problem = _mask_problem(archive.read(name), sizes[sample.video])
            if problem:
                yield f"{name}: {problem}"
    for name in sorted(present - expected):
        yield f"{name}: not expected; entries are {root}<video>/<expression id>/<frame>.png"


def _mask_problem(content: bytes, size: tuple[int, int]) -> str | None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            form, mode, mask = image.format, image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        return f"not a readable PNG ({error})"
    if form != "PNG" or mode != "L":
        return f"{form} of mode {mode}, expected an 8-bit grey PNG (mode L)"
    if mask.shape != size:
        return f"{mask.shape[0]} x {mask.shape[1]} pixels (height x width), expected {size[0]} x {size[1]}"
    values = set(np.unique(mask).tolist())
    if not values <= {0, 255}:
        return f"values {sorted(values)[:5]}, expected 0 and 255"
    return None


def _picture_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError) as error:
        raise EvaluationError(f"{path}: video frame cannot be read, its size is needed ({error})") from error


def _archive_root(dataset: MevisDataset | RefYoutubeVosDataset) -> str:
    if dataset.benchmark not in ARCHIVE_ROOTS:
        raise ValueError(f"{dataset.benchmark} takes no submissions: expected one of {', '.join(ARCHIVE_ROOTS)}")
    return ARCHIVE_ROOTS[dataset.benchmark]
