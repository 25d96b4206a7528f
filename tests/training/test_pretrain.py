"""The stages that made sparrow-tiny: a step of each, what they optimise, and that they go on where they stopped."""

import functools
import json
import shutil

import pytest
import torch
from torch import nn

from modeling_sparrow.cli import load_model
from modeling_sparrow.filtration_head import FiltrationOutput
from modeling_sparrow.region_proposer import RegionProposals
from modeling_sparrow.registration import DEFAULT_CHECKPOINT
from modeling_sparrow.training import pretrain_language, pretrain_segmenter, pretrain_tiny, pretrain_towers
from modeling_sparrow.training.loop import run_stage
from sparrow_processing import SparrowProcessor, open_video
from sparrow_processing.synthetic import PRESETS, generate_clip, split_seed


@pytest.fixture
def short_evaluation(monkeypatch):
    for module, name in (
        (pretrain_segmenter, "evaluate_image"),
        (pretrain_segmenter, "evaluate_video"),
        (pretrain_towers, "evaluate_towers"),
        (pretrain_language, "evaluate_language"),
    ):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), clips=2))


@pytest.fixture(scope="module")
def small_start(tmp_path_factory):
    """sparrow-tiny with the words of its first world only."""
    folder = tmp_path_factory.mktemp("start")
    model, _ = load_model(DEFAULT_CHECKPOINT, "cpu")
    model.save_pretrained(folder)
    SparrowProcessor.from_pretrained(DEFAULT_CHECKPOINT).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"world": "shapes"}), encoding="utf-8")
    return folder


def test_every_stage_in_turn_and_a_checkpoint_that_grounds(small_start, short_evaluation, tmp_path):
    plan = pretrain_tiny.recipe(small_start)
    for stage in plan:
        pretrain_tiny.train_stage(stage, tmp_path, "train", steps=1, clips=2, seed=0, start=small_start)
        assert pretrain_tiny.is_finished(tmp_path, stage, 1)
        record = json.loads((tmp_path / f"{stage}.jsonl").read_text().splitlines()[-1])
        assert record["step"] == 1 and any(name.startswith("val_") for name in record)
    pretrain_tiny.assemble(tmp_path, tmp_path / "final", "train", seed=0, start=small_start)
    history = json.loads((tmp_path / "final" / "training.json").read_text())
    assert history["start"] == {"world": "shapes"} and set(history["stages"]) == set(plan)
    model, processor = load_model(str(tmp_path / "final"), "cpu")
    clip = generate_clip(split_seed("validation", 0), PRESETS["train"])
    inputs = processor(text="the red ring", videos=open_video(clip.frames, fps=8.0), task="refer")
    assert model.ground(**inputs).num_frames == [8]


def test_the_validation_split_chooses_the_rules(small_start, tmp_path, monkeypatch):
    def pretend(model, processor, split, clips, seed):
        rules = model.config.filtration_config
        assert split == "validation"
        return {"j_and_f": 1 - abs(rules.score_threshold - 0.4) - abs(rules.fallback_threshold - 0.2)}

    monkeypatch.setattr(pretrain_tiny, "evaluate_synthetic", pretend)
    folder = shutil.copytree(small_start, tmp_path / "model")
    pretrain_tiny.choose_rules(folder)
    rules = load_model(str(folder), "cpu")[0].config.filtration_config
    assert (rules.score_threshold, rules.fallback_threshold) == (0.4, 0.2)
    assert json.loads((folder / "training.json").read_text())["validation_j_and_f"]["score_threshold"]["0.4"] == 0.8


def test_a_stage_says_what_it_needs(tmp_path, small_start):
    with pytest.raises(FileNotFoundError, match="needs stage 'image'"):
        pretrain_tiny.train_stage("video", tmp_path, "train", steps=1, clips=1, seed=0, start=small_start)


def test_words_keep_their_rows(small_start):
    earlier, _ = load_model(str(small_start), "cpu")
    old_ids = SparrowProcessor.from_pretrained(small_start).tokenizer.get_vocab()
    model, processor = pretrain_tiny.new_model(0, small_start)
    ids = processor.tokenizer.get_vocab()
    for word in ("[BOX]", "red", "moving"):
        for part in ("get_input_embeddings", "get_output_embeddings"):
            row = getattr(model, part)().weight[ids[word]]
            assert row.equal(getattr(earlier, part)().weight[old_ids[word]])
    assert model.model.box_head.state_dict().keys() == earlier.model.box_head.state_dict().keys()
    for name, value in earlier.model.mask_tracker.state_dict().items():
        assert value.equal(model.model.mask_tracker.state_dict()[name])


@pytest.mark.parametrize("interrupted_at", [2, 5])
def test_an_interrupted_stage_ends_with_the_same_weights(interrupted_at, tmp_path):
    def run(output, stop=None):
        torch.manual_seed(0)
        module = nn.Linear(3, 1)

        def step(number):
            if number == stop:
                raise KeyboardInterrupt
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
            return {"loss": (module(inputs) - inputs.sum(1, keepdim=True)).square().mean()}

        run_stage("toy", module, step, output=output, steps=8, learning_rate=0.1, warmup=2, save_every=2)
        return module

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=interrupted_at)
    resumed = run(tmp_path / "parts")
    assert resumed.weight.equal(whole.weight) and resumed.bias.equal(whole.bias)


# ---------------------------------------------------------------------- the filtration loss of several and no targets

BOXES = torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.6, 0.6, 0.8, 0.8], [0.1, 0.6, 0.3, 0.8]])
NOWHERE = torch.full((4,), float("nan"))


@pytest.fixture(scope="module")
def side():
    model, processor = load_model(DEFAULT_CHECKPOINT, "cpu")
    pixels = pretrain_segmenter.PixelSide(model, PRESETS["train"])
    return pretrain_language.LanguageSide(model, processor, pixels)


def losses_of(side, logits: list[float], targets: list[torch.Tensor]) -> dict[str, float]:
    """Of one question over three proposals."""
    output = FiltrationOutput(logits=torch.tensor([logits]), boxes=BOXES[None])
    valid = torch.ones(1, 3, dtype=torch.bool)
    proposals = RegionProposals(boxes=BOXES[None], scores=torch.ones(1, 3), features=torch.zeros(1, 3, 1), valid=valid)
    losses = pretrain_language.filter_loss(side, output, proposals, [0], torch.stack(targets)[None])
    return {name: float(value) for name, value in losses.items()}


@pytest.mark.parametrize(
    ("targets", "right", "wrong"),
    [
        ([BOXES[0], NOWHERE], [[9.0, -9.0, -9.0]], [[-9.0, 9.0, -9.0], [-9.0, -9.0, -9.0], [9.0, 9.0, -9.0]]),
        ([BOXES[0], BOXES[1]], [[9.0, 9.0, -9.0]], [[9.0, -9.0, -9.0], [9.0, 9.0, 9.0], [-9.0, -9.0, -9.0]]),
        ([NOWHERE, NOWHERE], [[-9.0, -9.0, -9.0]], [[9.0, -9.0, -9.0]]),
    ],
)
def test_each_target_and_nothing_else_is_kept(targets, right, wrong, side):
    for logits in right:
        losses = losses_of(side, logits, targets)
        assert losses["filter"] < 1e-3 and losses["ranking"] < 2e-3 and losses["box"] == pytest.approx(0, abs=1e-6)
    for logits in wrong:
        losses = losses_of(side, logits, targets)
        assert losses["filter"] > 1 and losses["ranking"] > 0.5


def test_a_target_without_a_proposal_teaches_no_rank(side):
    losses = losses_of(side, [9.0, -9.0, -9.0], [torch.tensor([0.4, 0.1, 0.5, 0.2]), NOWHERE])
    assert losses["ranking"] == 0 and losses["box"] == 0 and losses["filter"] > 1


def test_questions_with_one_several_and_no_targets_are_asked(side):
    import numpy as np

    clips = pretrain_segmenter.batch_clips(0, 6, 0, PRESETS["train"])
    questions = pretrain_language.draw_questions(side, clips, 12, np.random.default_rng(0), PRESETS["train"].kinds)
    assert {len(question.targets) for question in questions} >= {0, 1, 2}
