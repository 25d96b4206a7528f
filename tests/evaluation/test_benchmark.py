"""The metric benchmark: it compares equal numbers, and memory does not grow with the video."""

import pytest

from modeling_sparrow.evaluation import benchmark, benchmark_metrics


@pytest.fixture(scope="module")
def result():
    return benchmark_metrics(num_frames=2, repeats=1)


def test_ours_is_faster(result):
    pair, table = result.timings
    # Half of the targets: a shared machine may disturb a single round.
    assert pair.speedup > 2.5 and table.speedup > 7.5


def test_memory_is_independent_of_length(result):
    # Eight times as many frames; a few freed ones may wait for the garbage collector.
    assert result.long_peak < 1.5 * result.short_peak


def test_report(result):
    text = result.to_markdown()
    assert "J and F of one mask pair" in text and "20 proposals" in text and "64 frames" in text


def test_different_numbers_are_refused(monkeypatch):
    monkeypatch.setattr(benchmark, "region_and_boundary", lambda prediction, truth: (0.123, 0.456))
    with pytest.raises(RuntimeError, match="one mask pair: ours and the plain reference differ"):
        benchmark_metrics(num_frames=1, repeats=1)
