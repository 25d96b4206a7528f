"""Region similarity J, boundary accuracy F and their statistics over a video.

The definitions are those of Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation" (CVPR 2016), as fixed by the DAVIS 2017 evaluation code that every referring-segmentation benchmark
shares:

* J = |G ∩ P| / |G ∪ P|, and 1 if both masks are empty.
* The contour of a mask is one pixel wide: a pixel belongs to it if its value differs from the pixel to the right,
  below, or below-right. Neighbours outside the image are not looked at, so an object that runs off the image has
  no contour along the image edge.
* F is the harmonic mean of precision (share of P's contour within ``r`` pixels of G's) and recall (the reverse), with
  ``r = ceil(0.008 · image diagonal)`` and Euclidean distance. Two contours without a pixel give 1, only one gives 0.
  Hence a full-frame prediction of an empty object has J 0 but F 1.
* Void pixels count in neither mask.

Speed: masks are cropped to what they cover, the contours of all objects of a frame are the bits of one integer image,
one dilation serves every object at once, and it is read out only at contour pixels.
"""

import math
from typing import NamedTuple

import numpy as np

#: Most objects and proposals together that one frame may hold: one bit each.
MAX_LABELS = 64


class MeanRecallDecay(NamedTuple):
    """Statistics of the per-frame values of one object, as DAVIS reports them."""

    mean: float
    recall: float
    decay: float


def boundary_radius(height: int, width: int) -> int:
    """Tolerance of the boundary accuracy in pixels: 0.8 % of the image diagonal, rounded up (480 x 854 gives 8)."""
    return math.ceil(0.008 * math.sqrt(height * height + width * width))


def region_and_boundary(
    prediction: np.ndarray, ground_truth: np.ndarray, void: np.ndarray | None = None
) -> tuple[float, float]:
    """J and F of one mask pair.

    Args:
        prediction: `(H, W)`, any dtype; every non-zero pixel is foreground.
        ground_truth: `(H, W)`, like `prediction`.
        void: `(H, W)` bool, pixels to leave out; `None` for none.

    Returns:
        J and F, each in 0 … 1.

    Raises:
        ValueError: if the shapes differ or are not two-dimensional.
    """
    prediction, ground_truth = _foreground(prediction), _foreground(ground_truth)
    _check_shapes(prediction, ground_truth, void)
    if void is not None:
        prediction, ground_truth = prediction & ~void, ground_truth & ~void
    radius = boundary_radius(*prediction.shape)
    covered = prediction | ground_truth
    crop = _bounding_box(covered)
    if crop is None:
        return 1.0, 1.0
    intersection = np.count_nonzero(prediction[crop] & ground_truth[crop])
    union = np.count_nonzero(covered[crop])
    bits = prediction[crop].view(np.uint8) | (ground_truth[crop].view(np.uint8) << 1)
    return intersection / union, float(_pairwise_boundary(bits, 1, 1, radius)[0, 0])


def pairwise_region_and_boundary(
    predictions: np.ndarray,
    ground_truths: np.ndarray,
    num_predictions: int,
    num_objects: int,
    void: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """J and F of every predicted label with every ground-truth label of one frame.

    Args:
        predictions: `(H, W)` uint8 label map, 0 background, proposals 1 … Q.
        ground_truths: `(H, W)` uint8 label map, 0 background, objects 1 … N; higher labels are treated as background.
        num_predictions: Q, also counts proposals that are absent from this frame.
        num_objects: N.
        void: `(H, W)` bool, pixels to leave out; `None` for none.

    Returns:
        Two `(Q, N)` float64 arrays, J and F, in 0 … 1.

    Raises:
        ValueError: if the shapes differ, a predicted label exceeds Q, or Q + N exceeds 64.
    """
    _check_shapes(predictions, ground_truths, void)
    if num_predictions + num_objects > MAX_LABELS:
        raise ValueError(f"{num_predictions} proposals + {num_objects} objects: at most {MAX_LABELS} together")
    highest = int(predictions.max())
    if highest > num_predictions:
        raise ValueError(f"the prediction holds label {highest}, expected at most {num_predictions}")
    radius = boundary_radius(*predictions.shape)
    if void is not None:
        predictions, ground_truths = np.where(void, 0, predictions), np.where(void, 0, ground_truths)
    ground_truths = np.where(ground_truths > num_objects, 0, ground_truths)
    crop = _bounding_box((predictions | ground_truths) != 0)
    if crop is None:
        return np.ones((num_predictions, num_objects)), np.ones((num_predictions, num_objects))
    predictions, ground_truths = predictions[crop], ground_truths[crop]

    # One joint histogram holds every intersection (inside) and every area (row and column sums).
    codes = predictions.astype(np.intp) * (num_objects + 1) + ground_truths
    counts = np.bincount(codes.ravel(), minlength=(num_predictions + 1) * (num_objects + 1))
    counts = counts.reshape(num_predictions + 1, num_objects + 1)
    intersection = counts[1:, 1:]
    union = counts.sum(1)[1:, None] + counts.sum(0)[None, 1:] - intersection
    region = np.divide(intersection, union, out=np.ones(union.shape), where=union > 0)

    dtype = next(
        t for t in (np.uint8, np.uint16, np.uint32, np.uint64) if 8 * t().nbytes >= num_predictions + num_objects
    )
    prediction_bits = np.zeros(num_predictions + 1, dtype)
    prediction_bits[1:] = dtype(1) << np.arange(num_predictions, dtype=dtype)
    object_bits = np.zeros(num_objects + 1, dtype)
    object_bits[1:] = dtype(1) << np.arange(num_predictions, num_predictions + num_objects, dtype=dtype)
    bits = prediction_bits[predictions] | object_bits[ground_truths]
    return region, _pairwise_boundary(bits, num_predictions, num_objects, radius)


def mean_recall_decay(values: np.ndarray) -> MeanRecallDecay:
    """Mean, recall and decay of the per-frame values of one object.

    Recall is the share of frames above 0.5. Decay is the mean of the first quarter of the frames minus the mean of the
    last; the quarters' borders are rounded positions and both ends belong to a quarter. (The DAVIS code stores the
    borders in 8 bits and returns nonsense from 256 frames on; here they are ordinary integers.)

    Args:
        values: `(T,)` float, T at least 1.

    Raises:
        ValueError: if `values` is empty.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no frames to average: expected at least one value")
    # 1e-10 makes halves round up.
    borders = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    first, last = values[borders[0] : borders[1] + 1], values[borders[3] : borders[4] + 1]
    return MeanRecallDecay(float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean()))


def _foreground(mask: np.ndarray) -> np.ndarray:
    return mask if mask.dtype == bool else mask != 0


def _check_shapes(prediction: np.ndarray, ground_truth: np.ndarray, void: np.ndarray | None) -> None:
    shapes = [array.shape for array in (prediction, ground_truth, void) if array is not None]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ValueError(f"expected masks of one shape (height, width), got {', '.join(map(str, shapes))}")


def _bounding_box(covered: np.ndarray) -> tuple[slice, slice] | None:
    """Rows and columns that hold foreground, and one more on each side for the contours; `None` if none do."""
    rows = np.flatnonzero(covered.any(axis=1))
    if rows.size == 0:
        return None
    rows = slice(max(rows[0] - 1, 0), rows[-1] + 2)
    columns = np.flatnonzero(covered[rows].any(axis=0))
    return rows, slice(max(columns[0] - 1, 0), columns[-1] + 2)


def _pairwise_boundary(bits: np.ndarray, num_predictions: int, num_objects: int, radius: int) -> np.ndarray:
    """F of all pairs, `(Q, N)`: proposals are the Q low bits of the image `bits` `(h, w)`, objects the next N."""
    contours, zones = _contours_and_zones(bits, radius)
    shifts = np.arange(num_predictions + num_objects, dtype=bits.dtype)[:, None]
    # float32 counts exactly up to 2^24 pixels and multiplies much faster than integers.
    contours = ((contours >> shifts) & 1).astype(np.float32)
    zones = ((zones >> shifts) & 1).astype(np.float32)
    prediction, truth = slice(0, num_predictions), slice(num_predictions, None)
    matched_predictions = (contours[prediction] @ zones[truth].T).astype(np.float64)
    matched_truths = (zones[prediction] @ contours[truth].T).astype(np.float64)
    lengths = contours.sum(1, dtype=np.float64)
    length_p, length_t = lengths[prediction, None], lengths[None, truth]

    precision = matched_predictions / np.maximum(length_p, 1)
    recall = matched_truths / np.maximum(length_t, 1)
    total = precision + recall
    score = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    score[(length_p == 0) & (length_t == 0)] = 1.0
    return score


def _contours_and_zones(bits: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Contours of the masks and their dilation by a disk, both read at the pixels where any contour lies.

    The dilation is a union of rows: at vertical distance dy, the contour widened by floor(sqrt(r² - dy²)) to both
    sides. The image lies flat in memory with `radius` spare columns and rows around it, so that every shift is one
    slice.

    Args:
        bits: `(h, w)` unsigned integer; bit k of a pixel says whether it belongs to mask k.
        radius: of the disk, in pixels.

    Returns:
        Two `(M,)` arrays over the M contour pixels, same dtype as `bits`.
    """
    flat, stride = _flat_contours(bits, radius)
    positions = np.flatnonzero(flat != 0)
    contours = flat[positions]
    widened, zones = flat.copy(), contours.copy()
    rows_of_width: dict[int, list[int]] = {}
    for dy in range(radius + 1):
        rows_of_width.setdefault(math.isqrt(radius * radius - dy * dy), []).append(dy)
    for half_width in range(radius + 1):
        if half_width:
            widened[half_width:] |= flat[:-half_width]
            widened[:-half_width] |= flat[half_width:]
        for dy in rows_of_width.get(half_width, ()):
            zones |= widened[positions + dy * stride]
            zones |= widened[positions - dy * stride]
    return contours, zones


def _flat_contours(bits: np.ndarray, margin: int) -> tuple[np.ndarray, int]:
    """Contours of the masks in `bits`, in an image with empty rows above and below and empty columns to the right.

    A pixel is on a contour if it differs from its right, lower or lower-right neighbour inside the image.

    Args:
        bits: `(h, w)` unsigned integer, one bit per mask.
        margin: number of empty rows on either side and of empty columns, at least 1.

    Returns:
        The image, flat, and its row stride in elements.
    """
    height, width = bits.shape
    stride = width + margin
    padded = np.zeros((height + 2 * margin + 1, stride), bits.dtype)
    inside = padded[margin : margin + height]
    inside[:, :width] = bits
    # Repeating the last row and column makes the neighbours outside the image equal: they leave no contour.
    inside[:, width] = bits[:, -1]
    padded[margin + height] = inside[-1]
    source, size = padded.ravel()[margin * stride :], height * stride
    here = source[:size]
    flat = np.zeros(padded.size, bits.dtype)
    contours = flat[margin * stride :][:size]
    np.bitwise_xor(here, source[1 : size + 1], out=contours)
    contours |= here ^ source[stride : size + stride]
    contours |= here ^ source[stride + 1 : size + stride + 1]
    contours.reshape(height, stride)[:, width:] = 0
    return flat, stride
