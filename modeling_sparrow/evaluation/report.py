"""Results beside the published ones: a markdown table, and the Hub's machine-readable `.eval_results` files."""

import hashlib
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from .files import EvaluationError, atomic_path
from .results import EvaluationResult

#: Reported first, in this order; whatever else a result holds stays in its JSON file.
HEADLINES = ("J&F", "J", "F", "A", "R", "mIoU", "tIoU", "vIoU", "recall", "METEOR", "CIDEr", "CLAIR")
#: Published as fractions, not as percent.
_FRACTIONS = {"recall", "METEOR", "CIDEr"}


class Published(NamedTuple):
    """One model's row of published numbers, in percent; `None` where none is known."""

    model: str
    mevis_val: float | None = None
    mevis_val_u: float | None = None
    ref_youtube_vos: float | None = None
    ref_davis17: float | None = None
    vidstg: float | None = None
    video_gcg: float | None = None


_UNIPIXEL_README = "README of PolyU-ChenLab/UniPixel"
_GLUS_README = "README of GLUS-video/GLUS"
_SPARROW_README = "README of RISys-Lab/SPARROW"

#: J&F (MeViS, Ref-YouTube-VOS, Ref-DAVIS17) and mIoU (VidSTG interrogative, VideoGCG), by source.
PUBLISHED: dict[str, tuple[Published, ...]] = {
    _SPARROW_README: (
        Published("UniPixel-3B", 53.1, 59.7, 70.5, 74.2, 41.25, 52.0),
        Published("UniPixel-3B + SPARROW", 54.4, 60.7, 70.7, 76.4, 46.74, 54.5),
        Published("GLUS-A", 51.3, 59.8, 67.3, 72.9, 29.92, 45.86),
        Published("GLUS-A + SPARROW", 53.2, 61.9, 69.1, 75.5, 35.17, 47.91),
        Published("VideoGLaMM", 45.2, 48.5, 66.8, 69.5, 39.66, 62.34),
        Published("VideoGLaMM + SPARROW", 47.5, 57.4, 68.9, 76.8, 45.06, 65.59),
    ),
    _UNIPIXEL_README: (Published("UniPixel-7B", 55.8, None, 71.0, 76.4),),
    _GLUS_README: (
        Published("GLUS-S (partial)", 49.5, None, 65.2),
        Published("GLUS-S", 50.3, None, 66.6),
    ),
    "README of henghuiding/MeViS": (Published("LMPM", 37.21, 40.23),),
}


class _Column(NamedTuple):
    """One column of the table: which published field and which of our results belong in it."""

    title: str
    published: str | None
    metric: str = "J&F"
    benchmark: str | None = None
    protocol: str = ""  # how our result's protocol begins
    version: str = ""  # how the data set version of the published numbers begins


_COLUMNS = (
    _Column("MeViS val", "mevis_val"),
    _Column("MeViS val_u", "mevis_val_u", "J&F", "mevis", "", "MeViS v1 valid_u"),
    _Column("Ref-YTVOS", "ref_youtube_vos", "J&F", "ref-youtube-vos", "", "Ref-YouTube-VOS val"),
    _Column("Ref-DAVIS17 as published", "ref_davis17"),
    _Column("Ref-DAVIS17 4A", None, "J&F", "ref-davis17", "4A", "DAVIS 2017 val"),
    _Column("Ref-DAVIS17 4B", None, "J&F", "ref-davis17", "4B", "Ref-DAVIS17 val"),
    _Column("VidSTG", "vidstg", "mIoU", "vidstg", "moment, interrogative", "VidSTG test"),
    _Column("VideoGCG", "video_gcg", "mIoU", "video-gcg"),
)


@dataclass(frozen=True)
class RunInfo:
    """What is needed to repeat a result.

    Attributes:
        model: name of the row.
        command: as typed.
        seed: of the run.
        checkpoint: name or folder of the weights.
        checkpoint_hash: SHA-256 of the weights, see [`hash_checkpoint`].
        date: ISO 8601, UTC.
        package_version: of this package.
    """

    model: str
    command: str
    seed: int
    checkpoint: str
    checkpoint_hash: str
    date: str
    package_version: str

    @classmethod
    def collect(cls, model: str, command: str, seed: int, checkpoint: str | Path | None) -> "RunInfo":
        """Fills in the hash of a local checkpoint (`None`: nobody knows what made the predictions), date and version.

        Raises:
            EvaluationError: if the checkpoint holds no safetensors file.
        """
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            version = importlib.metadata.version("sparrow-video-grounding")
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        if checkpoint is None:
            return cls(model, command, seed, "not recorded", "not recorded", date, version)
        return cls(model, command, seed, str(checkpoint), hash_checkpoint(checkpoint), date, version)


def hash_checkpoint(checkpoint: str | Path) -> str:
    """SHA-256 of a checkpoint's weights: of the file, or of all safetensors files of a folder, names included.

    Raises:
        EvaluationError: if there is no safetensors file.
    """
    checkpoint = Path(checkpoint)
    files = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.rglob("*"))
    files = [file for file in files if file.suffix == ".safetensors"]
    if not files:
        raise EvaluationError(f"{checkpoint}: no safetensors file to hash")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def results_table(results: Sequence[EvaluationResult], run: RunInfo) -> str:
    """Markdown: published numbers with ours beneath, then how ours came about.

    A number of ours is marked † if it was not made on the data the published ones were, and ‡ if predictions were
    missing. Ref-DAVIS17 has three columns because the published column mixes two protocols.

    Args:
        results: ours, of one model.
        run: seed, command, checkpoint.
    """
    header = ["model", *(column.title for column in _COLUMNS), "source"]
    lines = [_row(header), _row(["---"] * len(header))]
    for source, rows in PUBLISHED.items():
        for published in rows:
            cells = [_number(getattr(published, c.published)) if c.published else "" for c in _COLUMNS]
            lines.append(_row([published.model, *cells, source]))
    lines.append(_row([f"**{run.model}**", *(_our_cell(results, column) for column in _COLUMNS), "this run"]))
    lines += ["", "J&F for segmentation and mIoU for VidSTG and VideoGCG, in percent."]
    lines += ["† other data than the published numbers, see below. ‡ predictions were missing.", ""]
    lines += [f"- command: `{run.command}`", f"- seed: {run.seed}"]
    lines += [f"- checkpoint: `{run.checkpoint}`, SHA-256 `{run.checkpoint_hash}`"]
    lines += [f"- date: {run.date}, sparrow-video-grounding {run.package_version}", ""]
    details = ["benchmark", "protocol", "data", "counts", "missing", "numbers"]
    lines += [_row(details), _row(["---"] * len(details))]
    for result in results:
        counts = ", ".join(f"{name} {number}" for name, number in result.counts.items())
        numbers = ", ".join(f"{name} {_number(value)}" for name, value in _headlines(result).items())
        cells = [result.benchmark, result.protocol, result.dataset_version, counts, result.missing_policy, numbers]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def write_eval_results(
    results: Sequence[EvaluationResult],
    run: RunInfo,
    folder: str | Path,
    dataset_ids: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes `.eval_results/<benchmark>_<protocol>.yaml`, the form in which the Hub reads a model's results.

    Percentages as published (recall, METEOR and CIDEr as fractions). The notes hold what the form has no field for.

    Args:
        results: ours.
        run: seed, command, checkpoint.
        folder: of the model; `.eval_results` is made in it.
        dataset_ids: benchmark -> id of its data set on the Hub; without one the benchmark's own name is written, which
            the Hub shows but cannot link.

    Returns:
        The files.
    """
    paths = []
    for result in results:
        slug = re.sub(r"[^a-z0-9]+", "_", f"{result.benchmark} {result.protocol}".lower()).strip("_")
        notes = (
            f"protocol {result.protocol}; data {result.dataset_version}; counts {result.counts}; missing predictions: "
            f"{result.missing_policy}; seed {run.seed}; command {run.command}; checkpoint {run.checkpoint} sha256 "
            f"{run.checkpoint_hash}; sparrow-video-grounding {run.package_version}"
        )
        dataset_id = (dataset_ids or {}).get(result.benchmark, result.benchmark)
        entries = [
            EvalResultEntry(
                dataset_id, name.lower().replace("&", "_and_"), round(value, 4), date=run.date, notes=notes
            )
            for name, value in _headlines(result).items()
        ]
        path = Path(folder) / ".eval_results" / f"{slug}.yaml"
        with atomic_path(path) as temporary:
            content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
            temporary.write_text(content, encoding="utf-8")
        paths.append(path)
    return paths


def _headlines(result: EvaluationResult) -> dict[str, float]:
    return {
        name: result.metrics[name] * (1 if name in _FRACTIONS else 100) for name in HEADLINES if name in result.metrics
    }


def _our_cell(results: Sequence[EvaluationResult], column: _Column) -> str:
    for result in results:
        if result.benchmark == column.benchmark and result.protocol.startswith(column.protocol):
            cell = _number(100 * result.metrics[column.metric])
            cell += "" if result.dataset_version.startswith(column.version) else "†"
            return cell + ("‡" if result.counts["missing"] else "")
    return ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
