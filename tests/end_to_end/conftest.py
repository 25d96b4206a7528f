from pathlib import Path

import pytest

from ..evaluation.answering import save_checkpoint
from ..processing.clip_factory import write_clip

NUM_FRAMES = 7


@pytest.fixture(scope="session")
def answering(tmp_path_factory) -> Path:
    """Checkpoint of a random model that answers every query with one phrase and its tokens."""
    return save_checkpoint(tmp_path_factory.mktemp("answering"), "it is <p> a ring </p> [BOX] [SEG] .")


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", count=NUM_FRAMES)
