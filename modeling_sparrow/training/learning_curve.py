"""Learning curves of sparrow-tiny, and how many steps more would take it where it should be.

    python -m modeling_sparrow.training.learning_curve modeling_sparrow/checkpoints/sparrow-tiny visual \\
        val_easy_right=0.96 val_hard_none=0.85

reads the figures that a stage measured on held-out clips from `training.json` of the checkpoint and writes a Markdown
table: each figure by step, the power law that its error follows, and the steps at which that law reaches the aim.
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
    head = ["figure", *(f"{record['step']:,}" for record in shown), "aim", "error falls as", "steps", "hours"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, aim in aims.items():
        measured = [record for record in curve if name in record]
        if not measured:
            known = ", ".join(key for key in curve[-1] if key != "step")
            raise ValueError(f"the stage did not measure {name!r}; it has {known}")
        values = [f"{100 * record[name]:.0f} %" if name in record else "" for record in shown]
        steps, errors = [record["step"] for record in measured], [1 - record[name] for record in measured]
        if sum(error > 0 for error in errors) < FEWEST_POINTS:
            effort = ["–"] * 3
        else:
            law = fit_power_law(steps, errors)
            needed = steps_to_reach(1 - aim, law)
            hours = needed * stage["seconds"] / stage["steps"] / 3600
            effort = [f"{needed:,.0f}", f"{hours:,.1f}"] if math.isfinite(needed) else ["never", "–"]
            effort = [f"steps^{law[1]:.2f}", *effort]
        lines.append([name.removeprefix("val_"), *values, f"{100 * aim:.0f} %", *effort])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _aim(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder with training.json")
    parser.add_argument("stage", help="of training.json, for example visual")
    parser.add_argument("aims", nargs="+", type=_aim, help="figure=aim, for example val_hard_none=0.85")
    options = parser.parse_args()
    stages = read_json(options.checkpoint / "training.json")["stages"]
    if options.stage not in stages:
        parser.error(f"{options.checkpoint} has no stage {options.stage!r}: its stages are {', '.join(stages)}")
    sys.stdout.write(curve_table(stages[options.stage], dict(options.aims)))


if __name__ == "__main__":
    main()
