"""What every benchmark returns, and how missing predictions are counted."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm.auto import tqdm

from .files import EvaluationError, read_json, write_json

logger = logging.getLogger(__name__)

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")

#: What to do with a missing prediction: stop, score it 0, leave it out of the mean, or do as the benchmark's own
#: script.
MissingPolicy = Literal["error", "zero", "skip", "official"]

#: Lines an error message shows before it only counts the rest.
MAX_LINES = 20


@dataclass
class EvaluationResult:
    """Scores of one set of predictions on one benchmark.

    Attributes:
        benchmark: e.g. `"mevis"`.
        protocol: which rules were followed, e.g. `"per-expression"`.
        dataset_version: name of the released version whose counts were found, or the counts themselves.
        metrics: final numbers, as fractions in 0 … 1 unless the protocol documents otherwise.
        per_item: numbers of every expression, object or sample.
        counts: what was evaluated and what was not: videos, expressions, frames, items in
            the mean, missing, extra …
        missing_policy: how missing predictions were counted.
        problems: one line for each missing or unexpected file.
    """

    benchmark: str
    protocol: str
    dataset_version: str
    metrics: dict[str, float]
    per_item: dict[str, dict[str, float]]
    counts: dict[str, int]
    missing_policy: str
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes the result as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationResult":
        """Reads a result that [`EvaluationResult.save`] wrote.

        Raises:
            EvaluationError: if the file is absent or something else.
        """
        content = read_json(path)
        try:
            return cls(**content)
        except TypeError as error:
            raise EvaluationError(f"{path}: not a saved evaluation result ({error})") from error


@dataclass
class Scores:
    """Scores of some items (the expressions of a video, say), as a worker process returns them.

    Attributes:
        values: item -> named numbers; also of an item of which a part is missing, if that part was counted 0.
        missing: item -> what kind of thing is missing (`"video"`, `"expression"` …) and a line naming the file.
        broken: lines naming files that cannot be scored at all, whatever the policy.
        counts: numbers to add up over all workers.
    """

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: dict[str, tuple[str, str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def missing_lines(self) -> list[str]:
        """The lines of `missing`, each once: several items may lack the same file."""
        return list(dict.fromkeys(line for _, line in self.missing.values()))


def run_jobs(
    function: Callable[[Job], Outcome], jobs: Sequence[Job], num_workers: int, description: str
) -> Iterator[Outcome]:
    """Applies a picklable function to every job, in order, with a progress bar.

    Args:
        num_workers: processes; 0 or 1 runs in this one.
    """
    if num_workers <= 1:
        yield from tqdm(map(function, jobs), total=len(jobs), desc=description)
        return
    with ProcessPoolExecutor(num_workers) as pool:
        try:
            yield from tqdm(pool.map(function, jobs), total=len(jobs), desc=description)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def merge_scores(
    parts: Iterable[Scores],
    missing: MissingPolicy,
    official: dict[str, str],
    zero: dict[str, float],
) -> Scores:
    """Joins the workers' scores and applies the policy for missing predictions.

    Args:
        parts: one per job.
        missing: the policy.
        official: what `"official"` means for each kind of missing thing: `"error"`, `"zero"` or `"skip"`.
        zero: the values an item gets when it is scored 0.

    Returns:
        All scores; items without a prediction hold `zero` or are absent, but stay listed in `missing`.

    Raises:
        EvaluationError: if a file is broken, if predictions are missing and the policy says `"error"`, or if
            nothing is left to score.
    """
    if missing not in ("error", "zero", "skip", "official"):
        raise ValueError(f"missing={missing!r}: expected 'error', 'zero', 'skip' or 'official'")
    merged = Scores()
    for part in parts:
        merged.values.update(part.values)
        merged.missing.update(part.missing)
        merged.broken.extend(part.broken)
        for name, number in part.counts.items():
            merged.counts[name] = merged.counts.get(name, 0) + number
    if merged.broken:
        raise EvaluationError(list_problems(merged.broken, "files that cannot be scored"))
    fatal = []
    for item, (kind, line) in merged.missing.items():
        policy = official[kind] if missing == "official" else missing
        if policy == "error":
            fatal.append(line)
        elif policy == "zero":
            merged.values.setdefault(item, dict(zero))
        else:
            merged.values.pop(item, None)
    if fatal:
        raise EvaluationError(
            list_problems(
                list(dict.fromkeys(fatal)), "missing predictions (pass missing='zero' or 'skip' to score the rest)"
            )
        )
    if not merged.values:
        raise EvaluationError(list_problems(merged.missing_lines, "nothing left to score"))
    for line in merged.missing_lines:
        logger.warning("%s", line)
    merged.counts |= {"in_mean": len(merged.values), "missing": len(merged.missing)}
    return merged


def average(values: Iterable[dict[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Plain mean of each named number over all items."""
    rows = list(values)
    return {name: float(sum(row[name] for row in rows) / len(rows)) for name in names}


def version_name(known: dict[tuple[int, int], str], videos: int, items: int) -> str:
    """Name of the released version with these counts, or the counts: unlike numbers must not be compared unseen."""
    return known.get((videos, items), f"unrecognised: {videos} videos, {items} expressions or objects")


def list_problems(lines: Sequence[str], verdict: str) -> str:
    """A message with the number of problems, a verdict, and the first lines."""
    shown = "\n".join(f"  {line}" for line in lines[:MAX_LINES])
    rest = f"\n  … and {len(lines) - MAX_LINES} more" if len(lines) > MAX_LINES else ""
    return f"{len(lines)} problem(s), {verdict}:\n{shown}{rest}"
