"""sparrow-tiny as it ships: its size, its card, and that it grounds."""

from pathlib import Path

import numpy as np
import pytest

from modeling_sparrow.cli import load_model
from modeling_sparrow.evaluation import evaluate_synthetic
from modeling_sparrow.registration import DEFAULT_CHECKPOINT
from sparrow_processing import open_video

CHECKPOINT = Path(DEFAULT_CHECKPOINT)
EXAMPLES = Path(__file__).resolve().parents[2] / "spaces_demo" / "examples"


@pytest.fixture(scope="module")
def shipped():
    return load_model(None, "cpu")


def test_size_files_and_card():
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 40 * 10**6
    assert {path.suffix for path in CHECKPOINT.iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8").split("---")[2]
    first = next(line for line in card.splitlines() if line and not line.startswith("#"))
    assert "Knows only a generated world" in first


def test_it_finds_the_object_that_is_meant(shipped):
    """Far above chance on clips never seen; the published figures come from more of them."""
    numbers = evaluate_synthetic(*shipped, "test-easy", clips=28, seed=77)
    assert numbers["chance"] <= 0.4 and numbers["right_object"] >= 0.7 and numbers["j_and_f"] >= 0.6


def ground(shipped, clip: str, query: str):
    """The result, and the frames."""
    model, processor = shipped
    reader = open_video(EXAMPLES / clip)
    inputs = processor(text=query, videos=[reader], stream=True)
    masks = processor.collector(inputs["metadata"])
    (result,) = processor.post_process_grounding(model.ground(**inputs, mask_sink=masks), masks)
    assert result.num_frames == len(reader)
    return result, reader


@pytest.mark.parametrize(
    ("clip", "query", "channel"), [("shapes.mp4", "the red ring", 0), ("stars.mp4", "the green star", 1)]
)
def test_the_sample_clips(shipped, clip, query, channel):
    """The mask lies on pixels of the colour that was asked for."""
    result, reader = ground(shipped, clip, query)
    (track,) = result.objects
    colours = np.stack([frame[track.mask(t)].mean(axis=0) for t, frame in enumerate(reader) if track.mask(t).any()])
    assert len(colours) > len(reader) / 2
    others = [index for index in range(3) if index != channel]
    assert (colours[:, channel] > 1.3 * colours[:, others].max(axis=1)).mean() > 0.8


def test_both_means_two(shipped):
    result, _ = ground(shipped, "rabbits.mp4", "both rabbits")
    assert len(result.objects) == 2 and result.masks.any(axis=(2, 3)).mean() > 0.9


def test_what_is_not_there_is_not_marked(shipped):
    result, _ = ground(shipped, "stars.mp4", "the purple umbrella")
    assert result.objects == [] and len(result.masks) == 0
