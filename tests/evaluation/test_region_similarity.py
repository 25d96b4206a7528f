"""J and F: hand-computed cases, properties, and agreement with a brute-force reading of the definition."""

import numpy as np
import pytest

from modeling_sparrow.evaluation.benchmark import reference_region_and_boundary
from modeling_sparrow.evaluation.region_similarity import (
    boundary_radius,
    mean_recall_decay,
    pairwise_region_and_boundary,
    region_and_boundary,
)


def blobs(seed: int, size: tuple[int, int] = (60, 90), share: float = 0.4) -> np.ndarray:
    """Irregular random mask, made of 5 x 5 blocks and some single pixels."""
    generator = np.random.default_rng(seed)
    coarse = generator.random((size[0] // 5 + 1, size[1] // 5 + 1)) < share
    mask = np.kron(coarse, np.ones((5, 5), bool))[: size[0], : size[1]]
    return mask ^ (generator.random(size) < 0.01)


def label_map(seed: int, labels: int, size: tuple[int, int] = (60, 90)) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, labels + 1, (size[0] // 10 + 1, size[1] // 10 + 1))
    return np.kron(coarse, np.ones((10, 10), np.uint8))[: size[0], : size[1]].astype(np.uint8)


def brute_force_boundary(prediction: np.ndarray, truth: np.ndarray) -> float:
    """F by the distance of every contour pixel to every other."""
    radius = boundary_radius(*prediction.shape)
    height, width = prediction.shape
    contours = []
    for mask in (prediction, truth):
        contours.append(
            np.array(
                [
                    (y, x)
                    for y in range(height)
                    for x in range(width)
                    if any(
                        y + dy < height and x + dx < width and mask[y, x] != mask[y + dy, x + dx]
                        for dy, dx in ((0, 1), (1, 0), (1, 1))
                    )
                ]
            ).reshape(-1, 2)
        )
    if not len(contours[0]) or not len(contours[1]):
        return float(len(contours[0]) == len(contours[1]))
    squared = ((contours[0][:, None] - contours[1][None]) ** 2).sum(-1)
    near = squared <= radius**2
    precision, recall = near.any(1).mean(), near.any(0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_overlap_by_hand():
    truth, prediction = np.zeros((100, 100), bool), np.zeros((100, 100), bool)
    truth[20:40, 20:40] = True
    prediction[20:40, 30:50] = True
    region, boundary = region_and_boundary(prediction, truth)
    assert region == pytest.approx(200 / 600)
    assert boundary == pytest.approx(brute_force_boundary(prediction, truth))


def test_boundary_within_and_beyond_the_radius():
    # Full-height edges: the contour is one column, and a shift is a distance.
    height, width = 30, 200
    radius = boundary_radius(height, width)
    truth = np.zeros((height, width), bool)
    truth[:, :100] = True
    for shift, expected in ((radius, 1.0), (radius + 1, 0.0)):
        prediction = np.zeros((height, width), bool)
        prediction[:, : 100 + shift] = True
        assert region_and_boundary(prediction, truth)[1] == expected


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [(0, 0, (1.0, 1.0)), (1, 1, (1.0, 1.0)), (1, 0, (0.0, 1.0)), (0, 1, (0.0, 1.0))],
)
def test_empty_and_full_frames(prediction, truth, expected):
    # A full frame has no contour: nothing at the image border counts.
    masks = [np.full((20, 30), value, np.uint8) for value in (prediction, truth)]
    assert region_and_boundary(*masks) == expected


def test_one_empty_mask():
    mask = np.zeros((20, 30), bool)
    mask[5:9, 5:9] = True
    assert region_and_boundary(mask, np.zeros_like(mask)) == (0.0, 0.0)
    assert region_and_boundary(np.zeros_like(mask), mask) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("size", "radius"),
    [((480, 854), 8), ((480, 910), 9), ((480, 1152), 10), ((720, 1280), 12), ((1080, 1920), 18), ((225, 300), 3)],
)
def test_radius(size, radius):
    assert boundary_radius(*size) == radius


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (17, 1), (2, 2), (33, 21), (60, 90), (225, 300)])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_brute_force(size, seed):
    prediction, truth = blobs(seed, size, 0.2), blobs(seed + 100, size, 0.2)
    region, boundary = region_and_boundary(prediction, truth)
    union = np.count_nonzero(prediction | truth)
    assert region == (np.count_nonzero(prediction & truth) / union if union else 1.0)
    if size[0] < 100:
        assert boundary == pytest.approx(brute_force_boundary(prediction, truth), abs=1e-12)
    assert reference_region_and_boundary(prediction, truth) == pytest.approx((region, boundary), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_properties(seed):
    first, second = blobs(seed), blobs(seed + 50)
    forward = region_and_boundary(first, second)
    assert region_and_boundary(first, first) == (1.0, 1.0)
    assert region_and_boundary(second, first) == pytest.approx(forward)
    assert all(0 <= value <= 1 for value in forward)
    assert region_and_boundary(first * np.uint8(37), second * np.uint8(255)) == forward


def test_moved_inside_the_frame_scores_the_same():
    first, second = np.zeros((80, 80), bool), np.zeros((80, 80), bool)
    first[10:30, 10:30], second[12:30, 13:33] = True, True
    moved = [np.roll(mask, (31, 22), (0, 1)) for mask in (first, second)]
    assert region_and_boundary(*moved) == region_and_boundary(first, second)


def test_void_counts_in_neither_mask():
    prediction, truth = blobs(1), blobs(2)
    void = np.zeros_like(truth)
    void[:, 40:] = True
    expected = region_and_boundary(prediction & ~void, truth & ~void)
    assert region_and_boundary(prediction, truth, void) == expected
    assert region_and_boundary(prediction, truth, np.ones_like(truth)) == (1.0, 1.0)


@pytest.mark.parametrize(("num_predictions", "num_objects"), [(1, 1), (3, 5), (6, 3), (20, 4), (40, 20)])
def test_all_pairs_agree_with_single_pairs(num_predictions, num_objects):
    predictions, truths = label_map(3, num_predictions), label_map(4, num_objects + 2)
    void = blobs(9, share=0.1)
    region, boundary = pairwise_region_and_boundary(predictions, truths, num_predictions, num_objects, void)
    assert region.shape == boundary.shape == (num_predictions, num_objects)
    for q in range(num_predictions):
        for n in range(num_objects):  # labels above num_objects are background
            single = region_and_boundary(predictions == q + 1, truths == n + 1, void)
            assert (region[q, n], boundary[q, n]) == pytest.approx(single, abs=1e-12)


def test_absent_labels():
    empty = np.zeros((10, 10), np.uint8)
    truths = empty.copy()
    truths[2:5, 2:5] = 1
    region, boundary = pairwise_region_and_boundary(empty, truths, 2, 2)
    assert region.tolist() == boundary.tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_wrong_arguments():
    mask = np.zeros((5, 5), np.uint8)
    with pytest.raises(ValueError, match=r"\(5, 5\), \(5, 6\)"):
        region_and_boundary(mask, np.zeros((5, 6)))
    with pytest.raises(ValueError, match="one shape"):
        region_and_boundary(np.zeros((2, 5, 5)), np.zeros((2, 5, 5)))
    with pytest.raises(ValueError, match="label 3, expected at most 2"):
        pairwise_region_and_boundary(mask + np.uint8(3), mask, 2, 1)
    with pytest.raises(ValueError, match="at most 64"):
        pairwise_region_and_boundary(mask, mask, 60, 5)


def test_statistics_by_hand():
    statistics = mean_recall_decay([1.0, 0.8, 0.5, 0.2, 0.0])
    # Quarter borders of 5 frames: 0, 1, 2, 3, 4; 0.5 itself is not above 0.5.
    assert statistics == pytest.approx((0.5, 0.4, (1.0 + 0.8) / 2 - (0.2 + 0.0) / 2))
    assert mean_recall_decay([0.7]) == pytest.approx((0.7, 1.0, 0.0))
    with pytest.raises(ValueError, match="no frames"):
        mean_recall_decay([])


def test_decay_of_a_long_video():
    values = np.concatenate([np.ones(500), np.zeros(500)])
    assert mean_recall_decay(values).decay == pytest.approx(1.0)
