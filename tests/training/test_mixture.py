"""Sample `i` follows from the seed and `i`: order, weights, ranks, replacement, random state."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from modeling_sparrow.training.mixture import MAX_ATTEMPTS, MixtureDataset
from modeling_sparrow.training.records import SkipRecordError
from sparrow_processing.errors import VideoReadError


class Numbers:
    """A source of `length` numbers from `first` on; those in `odd` cannot be used."""

    def __init__(self, first: int, length: int, odd: tuple[int, ...] = ()):
        self.first, self.length, self.odd = first, length, odd

    def __len__(self):
        return self.length

    def read(self, index, rng):
        if self.first + index in self.odd:
            raise SkipRecordError("odd")
        return self.first + index


def build(number, rng):
    return {"number": number, "drawn": rng.random()}


def mixture(*sources, weights=None, size=400, seed=0):
    return MixtureDataset(sources, weights or [1.0] * len(sources), build, size, seed)


def test_the_same_number_gives_the_same_sample_in_any_order():
    first, second = mixture(Numbers(0, 30), Numbers(100, 7)), mixture(Numbers(0, 30), Numbers(100, 7))
    forwards = [first[i] for i in range(60)]
    backwards = [second[i] for i in reversed(range(60))]
    assert forwards == backwards[::-1]
    assert [mixture(Numbers(0, 30), Numbers(100, 7), seed=1)[i] for i in range(60)] != forwards


def test_a_pass_over_one_source_sees_every_item_once():
    data = mixture(Numbers(0, 25))
    passes = [[data[i]["number"] for i in range(n * 25, (n + 1) * 25)] for n in range(3)]
    assert all(sorted(seen) == list(range(25)) for seen in passes)
    assert passes[0] != passes[1] != list(range(25))


def test_weights_are_respected():
    data = mixture(Numbers(0, 1000), Numbers(1000, 1000), weights=[3.0, 1.0], size=4000)
    share = np.mean([data.place(i)[0] == 0 for i in range(4000)])
    assert share == pytest.approx(0.75, abs=0.02)


def test_processes_see_different_samples():
    """As accelerate deals the batches out; together they are what one process sees."""
    data = mixture(Numbers(0, 64), size=64)
    batches = BatchSampler(SequentialSampler(data), batch_size=4, drop_last=False)
    shards = [list(BatchSamplerShard(batches, num_processes=2, process_index=rank)) for rank in range(2)]
    seen = [{data[i]["number"] for batch in shard for i in batch} for shard in shards]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(range(64))


def test_what_cannot_be_used_is_replaced_and_counted():
    data = mixture(Numbers(0, 10, odd=(1, 3, 5)), size=10)
    samples = [data[i] for i in range(10)]
    assert not {sample["number"] for sample in samples} & {1, 3, 5}
    assert sum(sample["num_skipped"] > 0 for sample in samples) == 3
    assert samples == [mixture(Numbers(0, 10, odd=(1, 3, 5)), size=10)[i] for i in range(10)]


def test_a_damaged_video_is_left_out_with_a_warning(caplog):
    class Damaged(Numbers):
        def read(self, index, rng):
            if index == 2:
                raise VideoReadError("clip.mp4: no frames")
            return index

    data = mixture(Damaged(0, 5), size=5)
    assert 2 not in [data[i]["number"] for i in range(5)]
    assert "clip.mp4: no frames" in caplog.text


def test_a_source_without_anything_usable_ends_the_run():
    with pytest.raises(RuntimeError, match=f"{MAX_ATTEMPTS} items in a row could not be used; the last one: odd"):
        mixture(Numbers(0, 3, odd=(0, 1, 2)))[0]


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0, 1.0], [1.0]])
def test_weights_that_make_no_sense(weights):
    with pytest.raises(ValueError, match="positive weights"):
        MixtureDataset([Numbers(0, 3), Numbers(3, 3)], weights, build, 4, 0)


def test_an_empty_source():
    with pytest.raises(ValueError, match="Source 1 of the mixture is empty"):
        mixture(Numbers(0, 3), Numbers(0, 0))


def test_global_random_state_is_left_alone():
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    data = mixture(Numbers(0, 30))
    for i in range(50):
        data[i]
    assert (np.random.get_state()[1] == states[0]).all() and torch.equal(torch.get_rng_state(), states[1])
