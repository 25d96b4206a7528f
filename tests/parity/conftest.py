import os
from pathlib import Path

import pytest
import torch

from .fixtures import Recording, load_recording

_RECORDINGS = pytest.StashKey[dict[str, Recording]]()
_DESELECTED = pytest.StashKey[set[Path]]()


def pytest_configure(config: pytest.Config):
    config.stash[_RECORDINGS] = {}
    config.stash[_DESELECTED] = set()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def pytest_deselected(items: list[pytest.Item]):
    for item in items:
        item.config.stash[_DESELECTED].add(item.path)


@pytest.fixture
def official(request: pytest.FixtureRequest) -> Recording:
    """What the official code gave: one folder of recorded tensors."""
    recording = load_recording(request.param)
    request.config.stash[_RECORDINGS][recording.folder.name] = recording
    return recording


@pytest.fixture
def whole_module(request: pytest.FixtureRequest):
    """Skips unless every test of the module runs in this process."""
    config = request.config
    if request.path in config.stash[_DESELECTED] or any("::" in argument for argument in config.args):
        pytest.skip("only some tests of the module run")
    if hasattr(config, "workerinput"):
        pytest.skip("the tests of the module are spread over several processes")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config):
    recordings = config.stash[_RECORDINGS]
    if recordings:
        terminalreporter.section("parity with the official code")
    for recording in recordings.values():
        terminalreporter.write_line(recording.summary())
