"""Tensors recorded from the official code: where they lie, how they are read, how ours are compared with them.

A folder holds `config.json` (with its `family`), `weights.safetensors` and `io.safetensors` (`in.*`, `out.*`); see its
README.md. Folders are found by family, so that further ones with other sizes and seeds are tested too.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

FOLDER = Path(os.environ.get("SPARROW_PARITY_DIR", Path(__file__).parents[2] / "../shared/parity"))

TOLERANCE = 1e-4  # both absolute and relative
BFLOAT16_TOLERANCE = 2e-2  # where memory is rounded to bfloat16: a last digit may flip
GRADIENT_TOLERANCE = 1e-3  # relative; absolute 1e-4 of the largest entry


class Recording:
    """One folder: `recording["in.frames"]` reads a tensor, `check` compares one of ours with `out.<name>`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = self.load("io.safetensors")
        self.weights = self.load("weights.safetensors")
        self.compared: dict[str, tuple[float, float]] = {}  # largest difference, and its share of the tolerance
        self.left_out: dict[str, str] = {}

    def load(self, file_name: str) -> dict[str, torch.Tensor]:
        """Tensors of a file; float16 is only a way of storing and comes back as float32."""
        tensors = load_file(self.folder / file_name)
        return {key: value.float() if value.dtype == torch.float16 else value for key, value in tensors.items()}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def names(self, prefix: str = "") -> list[str]:
        """Names of the expected outputs that start with `prefix`, sorted, without their `out.`."""
        return sorted(key[4:] for key in self.tensors if key.startswith(f"out.{prefix}"))

    def check(
        self,
        name: str,
        actual: torch.Tensor,
        tolerance: float = TOLERANCE,
        atol: float | None = None,
        where: torch.Tensor | None = None,
    ):
        """Compare with `out.<name>`: floating tensors within `tolerance`, integers and booleans exactly.

        Args:
            where: bool, of the leading axes; only these entries are compared.
        """
        expected = self[f"out.{name}"]
        actual = actual.detach()
        if actual.numel() == expected.numel() == 1:
            actual = actual.reshape(expected.shape)
        if where is not None:
            assert actual.shape == expected.shape, f"{self.folder.name} {name}: {actual.shape} is not {expected.shape}"
            actual, expected = actual[where], expected[where]
        self.compared.setdefault(name, (0.0, 0.0))
        if expected.is_floating_point():
            atol = tolerance if atol is None else atol
            actual = actual.float()
        else:
            tolerance = atol = 0
            actual = actual.to(expected.dtype)
        torch.testing.assert_close(
            actual, expected, rtol=tolerance, atol=atol, msg=lambda text: f"{self.folder.name} {name}\n{text}"
        )
        if expected.is_floating_point() and expected.numel():
            finite = expected.isfinite()
            difference = (actual - expected)[finite].abs()
            share = difference / (atol + tolerance * expected[finite].abs())
            if difference.numel():
                self.compared[name] = (difference.max().item(), share.max().item())

    def check_gradient(self, name: str, gradient: torch.Tensor):
        largest = self[f"out.{name}"].abs().max().item()
        self.check(name, gradient, GRADIENT_TOLERANCE, atol=1e-4 * largest)

    def check_mask(self, name: str, logits: torch.Tensor, tolerance: float = TOLERANCE):
        """A thresholded mask may differ in pixels whose logit is within `tolerance` of zero."""
        expected = self[f"out.{name}"]
        assert logits.shape == expected.shape, f"{self.folder.name} {name}: {logits.shape} is not {expected.shape}"
        differs = (logits > 0) != expected
        doubtful = logits.abs() <= tolerance
        self.compared[name] = (0.0, 0.0)
        assert not (differs & ~doubtful).any(), (
            f"{self.folder.name} {name}: {int((differs & ~doubtful).sum())} pixels with a clear logit differ"
        )

    def leave_out(self, name: str, reason: str):
        self.left_out[name] = reason

    def missing(self) -> list[str]:
        """Expected outputs that nothing was compared with and that no reason was given for."""
        return [name for name in self.names() if name not in self.compared and name not in self.left_out]

    def summary(self) -> str:
        line = f"{self.folder.name}: {len(self.compared)} of {len(self.names())} outputs compared"
        if self.left_out:
            line += f", {len(self.left_out)} left out"
        if self.compared:
            worst, (difference, share) = max(self.compared.items(), key=lambda item: item[1][1])
            line += f"; nearest to its tolerance: {worst}, difference {difference:.1e}, {share:.0%} of it"
        return line


@functools.cache
def load_recording(folder: Path) -> Recording:
    return Recording(folder)


def folders(*families: str) -> list[Path]:
    """Folders of some families, by the `family` that their config.json states."""
    found = sorted(path.parent for path in FOLDER.glob("*/config.json"))
    return [folder for folder in found if json.loads((folder / "config.json").read_text())["family"] in families]


def for_families(*families: str) -> pytest.MarkDecorator:
    """Run a test for each folder of some families; it takes the folder as `official`."""
    return _parametrize(("official",), families, lambda folder: [()])


def for_cases(prefix: str, *families: str) -> pytest.MarkDecorator:
    """Run a test for each case of each folder, cases being the outputs `<prefix><case>.<…>`; it takes `case` too."""

    def cases(folder: Path) -> list[tuple[str]]:
        start = f"out.{prefix}"
        with safe_open(folder / "io.safetensors", framework="pt") as file:
            keys = file.keys()
        return [(name,) for name in sorted({key[len(start) :].split(".")[0] for key in keys if key.startswith(start)})]

    return _parametrize(("official", "case"), families, cases)


def _parametrize(
    names: tuple[str, ...], families: tuple[str, ...], cases: Callable[[Path], list[tuple]]
) -> pytest.MarkDecorator:
    parameters = [
        pytest.param(folder, *case, id="-".join((folder.name, *case)))
        for folder in folders(*families)
        for case in cases(folder)
    ]
    if not parameters:
        reason = f"no folder of the families {', '.join(families)} in {FOLDER}; set SPARROW_PARITY_DIR"
        parameters = [pytest.param(*[None] * len(names), id="none", marks=pytest.mark.skip(reason=reason))]
    return pytest.mark.parametrize(names, parameters, indirect=["official"])
