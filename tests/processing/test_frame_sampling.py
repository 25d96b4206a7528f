import numpy as np
import pytest

from sparrow_processing.frame_sampling import pad_to_multiple, sample_frame_indices


@pytest.mark.parametrize("fps", [24, 25, 30_000 / 1001, 1 / 3])
@pytest.mark.parametrize("decimals", [12, 3], ids=["exact", "rounded to 1 ms"])
def test_constant_rate_gives_the_released_rule(fps, decimals):
    for num_frames in [*range(2, 130), 999, 1000, 36_000]:
        timestamps = np.round(np.arange(num_frames) / fps, decimals)
        for count in (1, 2, 3, 5, 8, 16, 50, 64, 100):
            if num_frames > count:
                expected = np.linspace(0, num_frames - 1, count).astype(int)
                np.testing.assert_array_equal(sample_frame_indices(timestamps, count), expected)


def test_variable_rate_samples_time_not_index():
    # Ten frames in the first 0.9 s, then nothing until 9 s: targets 0, 3, 6, 9 s.
    timestamps = [*np.arange(10) / 10, 9.0]
    assert sample_frame_indices(timestamps, 4).tolist() == [0, 9, 9, 10]
    # Targets 0, 2, 4 s, where 4 s is the last frame and the last to begin by 2 s is the one at 1.5 s.
    assert sample_frame_indices([0.0, 0.5, 1.5, 2.5, 4.0], 3).tolist() == [0, 2, 4]


@pytest.mark.parametrize("num_frames, count", [(1, 16), (2, 16), (16, 16)])
def test_short_clip_gives_every_frame_once(num_frames, count):
    indices = sample_frame_indices(np.arange(num_frames) / 25, count)
    assert indices.tolist() == list(range(num_frames))
    assert indices.dtype == np.int64


def test_result_is_int64_and_ordered():
    timestamps = np.cumsum(np.random.default_rng(0).uniform(0.001, 1, size=300))
    indices = sample_frame_indices(timestamps, 16)
    assert indices.dtype == np.int64 and len(indices) == 16
    assert indices[0] == 0 and indices[-1] == 299
    assert (np.diff(indices) >= 0).all()


@pytest.mark.parametrize("timestamps, count", [([], 4), ([[0.0, 1.0]], 4), ([0.0, 1.0], 0)])
def test_bad_arguments_are_refused(timestamps, count):
    with pytest.raises(ValueError):
        sample_frame_indices(timestamps, count)


@pytest.mark.parametrize(
    "indices, expected",
    [([7], [7]), ([0, 3], [0, 3, 3, 3]), ([0, 1, 2, 3], [0, 1, 2, 3]), ([0, 1, 2, 3, 9], [0, 1, 2, 3, 9, 9, 9, 9])],
)
def test_padding_repeats_the_last_index(indices, expected):
    padded = pad_to_multiple(np.array(indices), 4)
    assert padded.tolist() == expected
    assert padded.dtype == np.int64
