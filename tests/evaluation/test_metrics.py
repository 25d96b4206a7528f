"""Metric objects and their use in a trainer."""

import numpy as np
import pytest
import torch

from modeling_sparrow.evaluation import (
    BoxIouMetric,
    CaptionMetrics,
    Cider,
    GroundedConversationMetric,
    RegionBoundaryMetric,
    TrainerMetrics,
)

from .fake_data import moving_square


def track(offset: int = 0, frames: int = 4) -> np.ndarray:
    return np.stack([moving_square(index, offset) for index in range(frames)])


def test_region_and_boundary_metric():
    metric = RegionBoundaryMetric()
    metric.add_batch(torch.from_numpy(np.stack([track(), track(10)])), np.stack([track(), track()]))
    result = metric.compute()
    # One object is right, the other elsewhere.
    assert result["J"] == result["J_recall"] == 0.5 and result["J_decay"] == 0.0
    assert result["J&F"] == pytest.approx((0.5 + result["F"]) / 2)
    with pytest.raises(ValueError, match="call add_batch first"):
        metric.compute()
    metric.add_batch([track(frames=2), track(frames=7)], [track(frames=2), track(frames=7)])  # videos of any length
    assert metric.compute()["J&F"] == 1.0


def test_batches_add_up():
    tracks, truths = [track(), track(2), track(10)], [track(), track(), track(9)]
    at_once, in_turn = RegionBoundaryMetric(), RegionBoundaryMetric()
    at_once.add_batch(tracks, truths)
    for one, truth in zip(tracks, truths, strict=True):
        in_turn.add_batch([one], [truth])
    assert at_once.compute() == in_turn.compute()


def test_region_metric_rejects_wrong_shapes():
    metric = RegionBoundaryMetric()
    with pytest.raises(ValueError, match="1 tracks for 2"):
        metric.add_batch([track()], [track(), track()])
    with pytest.raises(ValueError, match="expected the same"):
        metric.add_batch([track()], [track(frames=3)])


def test_box_metric():
    metric = BoxIouMetric()
    metric.add_batch(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 5]]))
    metric.add_batch([[0, 0, 2, 2], None], [[0, 0, 2, 2], [0, 0, 1, 1]])
    assert metric.compute() == {
        "mIoU": pytest.approx(0.5),
        "mIoU@0.3": pytest.approx(2 / 3),
        "mIoU@0.5": pytest.approx(1 / 3),
    }
    with pytest.raises(ValueError, match="expected 4 numbers"):
        metric.add_batch([[1, 2, 3]], [[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="1 boxes for 0"):
        metric.add_batch([None], [])


def test_grounded_conversation_metric():
    metric = GroundedConversationMetric(text_similarity=lambda a, b: float(a == b))
    truth = (np.stack([track(), track(10)]), ["a cat", "a dog"])
    metric.add_batch([truth], [truth])
    metric.add_batch([(truth[0][::-1], ["a cat", "a dog"])], [truth])  # masks swapped, phrases not
    assert metric.compute() == {"mIoU": 1.0, "recall": 0.5}
    without = GroundedConversationMetric()
    without.add_batch([truth], [truth])
    assert without.compute() == {"mIoU": 1.0}
    with pytest.raises(ValueError, match="expected \\(objects, frames"):
        without.add_batch([(track(), [])], [truth])


def test_grounded_conversation_with_uneven_phrases():
    metric = GroundedConversationMetric(text_similarity=lambda a, b: 1.0)
    masks = np.stack([track(), track(10)])
    metric.add_batch([(masks, ["a cat"])], [(masks, ["a cat", "a dog"])])  # the second mask has no phrase
    assert metric.compute() == {"mIoU": 1.0, "recall": 0.5}


def test_caption_metrics():
    metric = CaptionMetrics([Cider(tokens="simple")])
    metric.add_batch(["a dog runs", "two cats"], ["a dog runs", "two cats"])
    metric.add_batch(["a red car"], ["the sea"])
    assert 0 < metric.compute()["CIDEr (simple tokens)"] < 10
    with pytest.raises(ValueError, match="1 captions for 2"):
        metric.add_batch(["a"], ["a", "b"])


class _Boxes(torch.nn.Module):
    """Learns one box for all; returns it as the prediction."""

    def __init__(self):
        super().__init__()
        self.box = torch.nn.Parameter(torch.tensor([0.0, 0.0, 10.0, 10.0]))

    def forward(self, boxes):
        predicted = self.box.expand_as(boxes)
        return {"loss": (predicted - boxes).abs().mean(), "boxes": predicted}


@pytest.mark.parametrize("batched", [False, True])
def test_in_a_trainer(tmp_path, batched):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"boxes": torch.tensor([0.0, 0.0, 10.0, height])} for height in (10.0, 5.0, 4.0)]
    metrics = TrainerMetrics({"box": BoxIouMetric()}, lambda p: {"box": (p.predictions, p.label_ids)})
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, batch_eval_metrics=batched, label_names=["boxes"],
        report_to=[], use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model=_Boxes(), args=arguments, eval_dataset=data, compute_metrics=metrics)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_box_mIoU"] == second["eval_box_mIoU"] == pytest.approx((1.0 + 0.5 + 0.4) / 3)
    assert first["eval_box_mIoU@0.5"] == pytest.approx(1 / 3)
