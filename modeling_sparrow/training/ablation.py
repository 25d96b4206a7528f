"""The paper's ablation on the generated world: tracked features (TSF) and boxes, each with and without.

For every seed the start model goes through stage 1 without and with TSF, and then through stage 2; every row of the
table is scored with the boxes off (before stage 2) and on (after it). The paper compares training with TSF with a host
that has not seen the data at all; the row `same data, no TSF` tells what the data alone do.
"""

import dataclasses
import json
import logging
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sparrow_processing.exports import write_text

from ..evaluation.files import read_json, write_json
from ..evaluation.synthetic import evaluate_synthetic
from .run import box_guidance, load_start, train_stage
from .samples import TrackedFeatureSettings, evaluation_crops
from .settings import SettingsError, read_settings
from .stages import FilterStage, TargetInjectionStage

logger = logging.getLogger(__name__)

# Columns of the table, in percent: name of the figure and heading.
FIGURES = (("j_and_f", "J&F"), ("right_object", "right object"), ("identity_switches", "identity switches"))
BOXES = {"off": False, "on": True}


@dataclass(frozen=True)
class Row:
    """A way to use TSF: in stage 1 (`None`: there is no stage 1), and at inference, where stage 2 sees it too."""

    name: str
    title: str
    training: Literal["none", "train"] | None
    inference: bool = False


ROWS = (
    Row("none", "no stage 1", None),
    Row("control", "same data, no TSF", "none"),
    Row("train", "TSF in training", "train"),
    Row("train_and_inference", "TSF in training and inference", "train", inference=True),
)


@dataclass(kw_only=True)
class AblationSettings:
    """What `sparrow ablate` runs.

    Args:
        output: folder of all runs and cells.
        target_injection, filter: YAML files of the stages; model, output, seed and TSF mode are replaced.
        model: what all runs start from; None: sparrow-tiny.
        seeds: of the training runs. All cells are scored on the same clips.
        split, clips, clip_seed, max_new_tokens: see [`evaluate_synthetic`].
    """

    output: str
    target_injection: str
    filter: str
    model: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    split: str = "test-hard"
    clips: int = 256
    clip_seed: int = 0
    max_new_tokens: int = 32


def ablate(settings: AblationSettings) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Run what is not done yet; finished cells are kept.

    Returns:
        for each row and `off` or `on` the figures of the seeds.

    Raises:
        SettingsError: a stage cannot be run as its file says, or cells in `output` have other settings.
    """
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in settings.seeds:
        for row in ROWS:
            for boxes in BOXES:
                cells.setdefault((row.name, boxes), []).append(_cell(settings, seed, row, boxes))
    return cells


def _cell(settings: AblationSettings, seed: int, row: Row, boxes: str) -> dict[str, Any]:
    folder = Path(settings.output) / f"seed-{seed}"
    file = folder / "cells" / f"{row.name}-boxes-{boxes}.json"
    wanted = dataclasses.asdict(dataclasses.replace(settings, seeds=[]))
    if file.is_file():
        cell = read_json(file)
        if cell["settings"] != wanted:
            raise SettingsError(f"{file} was made with other settings. Choose another output, or delete it.")
        return cell
    began = time.perf_counter()
    tracked = _stage(settings, "target_injection").tracked_features
    model = _injected(settings, seed, row, folder)
    if BOXES[boxes]:
        model = _filtered(settings, seed, row, folder, model, tracked)
    start = load_start(model)
    start.model.to(_device())
    crops = evaluation_crops(tracked) if row.inference else None
    with box_guidance(start.model, BOXES[boxes]):
        figures = evaluate_synthetic(
            start.model,
            start.processor,
            settings.split,
            settings.clips,
            settings.clip_seed,
            max_new_tokens=settings.max_new_tokens,
            crops=crops,
        )
    cell = {"row": row.name, "boxes": boxes, "training_seed": seed, "model": model} | figures
    cell |= {"cell_seconds": round(time.perf_counter() - began, 1), "settings": wanted}
    write_json(file, cell)
    return cell


def _injected(settings: AblationSettings, seed: int, row: Row, folder: Path) -> str | None:
    """The model of a row after stage 1, or the start."""
    if row.training is None:
        return settings.model
    stage = _stage(settings, "target_injection")
    run = dataclasses.replace(
        stage,
        model=settings.model,
        output=str(folder / f"target_injection-tsf-{row.training}"),
        tracked_features=dataclasses.replace(stage.tracked_features, mode=row.training),
        optimization=dataclasses.replace(stage.optimization, seed=seed),
    )
    return str(train_stage(run))


def _filtered(
    settings: AblationSettings,
    seed: int,
    row: Row,
    folder: Path,
    model: str | None,
    tracked: TrackedFeatureSettings,
) -> str:
    """The model of a row after stage 2, which sees prompts as they are at inference."""
    stage = _stage(settings, "filter")
    mode = "train_and_inference" if row.inference else "none"
    run = dataclasses.replace(
        stage,
        model=model,
        output=str(folder / f"filter-{row.name}"),
        tracked_features=dataclasses.replace(tracked, mode=mode),
        optimization=dataclasses.replace(stage.optimization, seed=seed),
        allow_untrained_start=stage.allow_untrained_start or row.training is None,
    )
    return str(train_stage(run))


def _stage(settings: AblationSettings, name: Literal["target_injection", "filter"]) -> Any:
    hints = {"target_injection": TargetInjectionStage, "filter": FilterStage}
    return read_settings(getattr(settings, name), hints[name])


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


# ---------------------------------------------------------------------- report


def write_table(
    settings: AblationSettings, cells: dict[tuple[str, str], list[dict[str, Any]]], command: str, path: Path
):
    """The figures of all cells as markdown, mean and standard deviation over the seeds, and how they were made."""
    device = _device()
    hardware = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    hours = sum(cell["cell_seconds"] for own in cells.values() for cell in own) / 3600
    headings = [f"{title}, boxes {boxes}" for _, title in FIGURES for boxes in BOXES]
    lines = [
        "# Ablation: tracked features and boxes",
        "",
        f"Split `{settings.split}` of the generated world, {settings.clips} clips (seed {settings.clip_seed}); "
        f"training seeds {', '.join(map(str, settings.seeds))}. Per cent, mean ± standard deviation over the seeds.",
        "",
        "| TSF | " + " | ".join(headings) + " |",
        "|---|" + "---:|" * len(headings),
    ]
    for row in ROWS:
        figures = [
            _mean_and_spread([cell[name] for cell in cells[row.name, boxes]]) for name, _ in FIGURES for boxes in BOXES
        ]
        lines.append(f"| {row.title} | " + " | ".join(figures) + " |")
    lines += [
        "",
        "*No stage 1*: the start model as it is, which the paper compares with. *Same data, no TSF*: stage 1 on the "
        "same samples for as many steps, without the crops; the paper has no such row. At inference the crops come "
        "from the true tracks. *Boxes on*: after stage 2.",
        "",
        f"Command: `{command}`. Hardware: {hardware} ({device}), {torch.get_num_threads()} thread(s). "
        f"Time: {hours:.2f} hours.",
        "",
        "Settings:",
        "",
        "```json",
        json.dumps(dataclasses.asdict(settings), indent=2),
        "```",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n", overwrite=True)
    logger.info("written: %s", path)


def _mean_and_spread(values: list[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    return f"{statistics.mean(known):.1f}" + (f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else "")
