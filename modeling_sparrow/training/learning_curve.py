"""Learning curves of sparrow-tiny, and how much more would take it where it should be.

    python -m modeling_sparrow.training.learning_curve modeling_sparrow/checkpoints/sparrow-tiny visual \\
        val_easy_right=0.96 val_hard_none=0.85
    python -m modeling_sparrow.training.learning_curve modeling_sparrow/checkpoints/sparrow-tiny runs \\
        test-hard.j_and_f=0.72 test-hard.identity_switches=0.05

The first reads the figures that a stage measured on held-out clips from `training.json` of the checkpoint, the second
the test figures that each run of the whole recipe ended with. Both write a Markdown table: each figure by step or by
hours of training, the power law that its error follows, and where that law reaches the aim.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

from ..evaluation.files import read_json

FEWEST_POINTS = 3  # with an error above 0, that a power law is fitted to


def fit_power_law(steps: list[int], errors: list[float]) -> tuple[float, float]:
    """`(a, b)` of `error = a * steps^b`, least squares of the logarithms over points with an error above 0.

    Raises:
        ValueError: fewer than three such points.
    """
    points = [(math.log(step), math.log(error)) for step, error in zip(steps, errors, strict=True) if error > 0]
    if len(points) < FEWEST_POINTS:
        raise ValueError(f"a power law needs three points with an error above 0, got {len(points)}")
    x, y = np.array(points).T
    slope, intercept = np.polyfit(x, y, 1)
    return math.exp(intercept), float(slope)


def steps_to_reach(error: float, law: tuple[float, float]) -> float:
    """Steps at which a power law comes down to `error`; infinite if it does not fall."""
    a, b = law
    return (error / a) ** (1 / b) if b < 0 else math.inf


def _error(name: str, value: float) -> float:
    """What is to fall: switches themselves, of everything else what lacks to 1."""
    return value if name.endswith("identity_switches") else 1 - value


def _effort(name: str, efforts: list[float], values: list[float], aim: float) -> tuple[str, float | None]:
    """Exponent of the power law of a figure's error, and the effort (steps, hours) at which it reaches the aim; a dash
    and None where fewer than three points have an error, infinite where it does not fall."""
    errors = [_error(name, value) for value in values]
    if sum(error > 0 for error in errors) < FEWEST_POINTS:
        return "–", None
    law = fit_power_law(efforts, errors)
    return f"{law[1]:.2f}", steps_to_reach(_error(name, aim), law)


def _markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def curve_table(stage: dict, aims: dict[str, float], columns: int = 7) -> str:
    """Markdown table of one stage.

    Args:
        stage: of `training.json`: `steps`, `seconds`, `curve`.
        aims: by figure (`val_…`, in [0, 1], higher is better) the value it should reach.
        columns: measurements shown, spread over all; the fit uses all of them, and is left out where fewer than three
            have an error.

    Raises:
        ValueError: the stage did not measure a figure.
    """
    curve = stage["curve"]
    shown = [curve[i] for i in sorted({round(k * (len(curve) - 1) / (columns - 1)) for k in range(columns)})]
    rows = [["figure", *(f"{record['step']:,}" for record in shown), "aim", "error falls as", "steps", "hours"]]
    for name, aim in aims.items():
        measured = [record for record in curve if name in record]
        if not measured:
            known = ", ".join(key for key in curve[-1] if key != "step")
            raise ValueError(f"the stage did not measure {name!r}; it has {known}")
        values = [f"{100 * record[name]:.0f} %" if name in record else "" for record in shown]
        steps = [record["step"] for record in measured]
        exponent, needed = _effort(name, steps, [record[name] for record in measured], aim)
        if needed is None:
            effort = ["–"] * 3
        else:
            hours = needed * stage["seconds"] / stage["steps"] / 3600
            effort = [f"{needed:,.0f}", f"{hours:,.1f}"] if math.isfinite(needed) else ["never", "–"]
            effort = [f"steps^{exponent}", *effort]
        rows.append([name.removeprefix("val_"), *values, f"{100 * aim:.0f} %", *effort])
    return _markdown(rows)


def _runs(history: dict | None) -> list[dict]:
    """The runs that led to a checkpoint, the first one first."""
    return [] if history is None else [*_runs(history["start"]), history]


def runs_table(history: dict, aims: dict[str, float]) -> str:
    """Markdown table of the runs that led to a checkpoint, by hours of training on one core up to the end of each.

    Args:
        history: `training.json`: `stages` with their `seconds`, `start` (the run before, or None), and perhaps `test`:
            by split the figures of `sparrow evaluate synthetic`. Runs without these count, but are not shown.
        aims: by figure (`<split>.<key>`) the value it should reach.

    Raises:
        ValueError: a run with test figures lacks one, or there is none.
    """
    hours, measured = 0.0, []
    for number, run in enumerate(_runs(history), start=1):
        hours += sum(stage["seconds"] for stage in run["stages"].values()) / 3600
        if "test" in run:
            figures = {f"{split}.{key}": v for split, own in run["test"].items() for key, v in own.items()}
            measured.append((number, hours, figures))
    labels = [f"run {number}, {hours:.1f} h" for number, hours, _ in measured]
    rows = [["figure", *labels, "aim", "error falls as", "hours"]]
    for name, aim in aims.items():
        if not all(name in figures for *_, figures in measured) or not measured:
            raise ValueError(f"not every run with test figures has {name!r}")
        values = [figures[name] for *_, figures in measured]
        exponent, needed = _effort(name, [hours for _, hours, _ in measured], values, aim)
        effort = ["–", "–"] if needed is None else [f"hours^{exponent}", f"{needed:,.0f}" if needed < 1e6 else "never"]
        rows.append([name, *(f"{100 * value:.1f} %" for value in values), f"{100 * aim:.0f} %", *effort])
    return _markdown(rows)


def _aim(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder with training.json")
    parser.add_argument("stage", help="of the last run that has it, for example visual; or: runs")
    parser.add_argument("aims", nargs="+", type=_aim, help="figure=aim, for example val_hard_none=0.85")
    options = parser.parse_args()
    history, aims = read_json(options.checkpoint / "training.json"), dict(options.aims)
    if options.stage == "runs":
        sys.stdout.write(runs_table(history, aims))
        return
    known: list[str] = []
    for run in _runs(history)[::-1]:
        if options.stage in run["stages"]:
            sys.stdout.write(curve_table(run["stages"][options.stage], aims))
            return
        known += [stage for stage in run["stages"] if stage not in known]
    parser.error(f"{options.checkpoint} has no stage {options.stage!r}: its stages are {', '.join(known)}")


if __name__ == "__main__":
    main()
