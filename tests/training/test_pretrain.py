"""The stages that made sparrow-tiny: a step of each, what they optimise, and that they go on where they stopped."""

import functools
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from modeling_sparrow.box_ops import xyxy_to_cxcywh
from modeling_sparrow.cli import load_model
from modeling_sparrow.filtration_head import FiltrationOutput
from modeling_sparrow.frame_pyramid import ClipPyramids
from modeling_sparrow.mask_tracker import MaskPrompt, TrackedObject
from modeling_sparrow.region_proposer import RegionProposals
from modeling_sparrow.registration import DEFAULT_CHECKPOINT
from modeling_sparrow.training import (
    learning_curve,
    packed_questions,
    pretrain_language,
    pretrain_plural,
    pretrain_segmenter,
    pretrain_tiny,
    pretrain_towers,
)
from modeling_sparrow.training.loop import run_stage
from modeling_sparrow.training.object_facts import EVENT_NAMES, object_facts
from sparrow_processing import SparrowProcessor, open_video
from sparrow_processing.synthetic import PRESETS, Expression, all_expressions, generate_clip, split_seed
from sparrow_processing.synthetic.words import EVENTS

CHOSEN = (0.65, 0.25, 4)  # rules of a checkpoint; a new model has other thresholds


@pytest.fixture
def short_evaluation(monkeypatch):
    for module, name in (
        (pretrain_segmenter, "evaluate_image"),
        (pretrain_segmenter, "evaluate_video"),
        (pretrain_towers, "evaluate_towers"),
        (pretrain_language, "evaluate_language"),
        (pretrain_plural, "evaluate_plural"),
    ):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), clips=2))


@pytest.fixture(scope="module")
def small_start(tmp_path_factory):
    """A checkpoint to go on from: sparrow-tiny with rules of its own and another history."""
    folder = tmp_path_factory.mktemp("start")
    model, _ = load_model(DEFAULT_CHECKPOINT, "cpu")
    rules = model.config.filtration_config
    rules.score_threshold, rules.fallback_threshold, model.config.num_prompt_frames = CHOSEN
    model.save_pretrained(folder)
    SparrowProcessor.from_pretrained(DEFAULT_CHECKPOINT).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"world": "shapes"}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("recipe", ["grow", "longer", "answers", "memory", "plural", "anchors", "refine"])
def test_every_stage_in_turn_and_a_checkpoint_that_grounds(recipe, small_start, short_evaluation, tmp_path):
    plan = pretrain_tiny.RECIPES[recipe]
    for stage in plan:
        pretrain_tiny.train_stage(stage, tmp_path, "train", 1, clips=2, seed=0, recipe=recipe, start=small_start)
        assert pretrain_tiny.is_finished(tmp_path, stage, 1)
        if stage in pretrain_tiny.PAPER_STAGES:
            continue
        record = json.loads((tmp_path / f"{stage}.jsonl").read_text().splitlines()[-1])
        assert record["step"] == 1 and any(name.startswith("val_") for name in record)
    pretrain_tiny.assemble(tmp_path, tmp_path / "final", "train", seed=0, recipe=recipe, start=small_start)
    history = json.loads((tmp_path / "final" / "training.json").read_text())
    assert history["start"] == {"world": "shapes"} and set(history["stages"]) == set(plan)
    assert all(stage["steps"] == 1 for stage in history["stages"].values())
    assert [item["stage"] for item in history["history"]] == [s for s in plan if s in pretrain_tiny.PAPER_STAGES]
    model, processor = load_model(str(tmp_path / "final"), "cpu")
    rules = model.config.filtration_config
    assert (rules.score_threshold, rules.fallback_threshold, model.config.num_prompt_frames) == CHOSEN
    clip = generate_clip(split_seed("validation", 0), PRESETS["train"])
    inputs = processor(text="the red ring", videos=open_video(clip.frames, fps=8.0), task="refer")
    assert model.ground(**inputs).num_frames == [8]


def test_held_out_clips_choose_the_rules(small_start, tmp_path, monkeypatch):
    asked = []

    def pretend(model, processor, split, clips, seed, world):
        rules = model.config.filtration_config
        assert split == "validation"
        easy = world == PRESETS["easy"]
        setting = (rules.score_threshold, rules.fallback_threshold, rules.plural_threshold)
        asked.append((easy, *setting, model.config.num_prompt_frames))
        # easy clips prefer a fallback of 0.2, hard ones 0.5, and more so
        off = abs(rules.fallback_threshold - 0.2) if easy else 2 * abs(rules.fallback_threshold - 0.5)
        off += abs(rules.score_threshold - 0.6)
        return {"j_and_f": 1 - off - 0.01 * abs(model.config.num_prompt_frames - 2)}

    monkeypatch.setattr(pretrain_tiny, "evaluate_synthetic", pretend)
    folder = shutil.copytree(small_start, tmp_path / "model")
    pretrain_tiny.choose_rules(folder)
    config = load_model(str(folder), "cpu")[0].config
    rules = config.filtration_config
    assert (rules.score_threshold, rules.fallback_threshold, config.num_prompt_frames) == (0.6, 0.5, 2)
    before, after = ((path / "config.json").read_text().splitlines() for path in (small_start, folder))
    assert len(before) == len(after)  # nothing else is written
    figures = json.loads((folder / "training.json").read_text())["validation_j_and_f"]
    assert figures["num_prompt_frames"] == {"1": 0.84, "2": 0.85, "4": 0.83, "8": 0.79}
    assert figures["fallback_threshold"] == {"0.2": 0.68, "0.3": 0.73, "0.4": 0.78, "0.5": 0.83}
    assert len(asked) == len(set(asked))  # nothing is measured twice


def test_a_stage_says_what_it_needs(tmp_path, small_start):
    with pytest.raises(FileNotFoundError, match="needs stage 'image'"):
        pretrain_tiny.train_stage("video", tmp_path, "train", 1, clips=1, seed=0, recipe="grow", start=small_start)


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


def test_all_runs_go_on_from_one_another(tmp_path, monkeypatch, short_evaluation):
    towers = {"towers": (10, 1)}
    planned = (("scratch", "shapes", 0), ("grow", "train", 0), ("longer", "train", 1))
    monkeypatch.setattr(pretrain_tiny, "RUNS", planned)
    monkeypatch.setattr(pretrain_tiny, "RECIPES", dict.fromkeys(("scratch", "grow", "longer"), towers))
    chosen = []
    monkeypatch.setattr(pretrain_tiny, "choose_rules", chosen.append)
    monkeypatch.setattr(pretrain_tiny, "measure", functools.partial(pretrain_tiny.measure, clips=1))
    arguments = ["pretrain", "--output", str(tmp_path / "runs"), "--checkpoint", str(tmp_path / "made")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps-scale", "0.1"])
    pretrain_tiny.main()
    assert chosen == [tmp_path / path for path in ("runs/1-scratch/checkpoint", "runs/2-grow/checkpoint", "made")]
    history = json.loads((tmp_path / "made" / "training.json").read_text(encoding="utf-8"))
    runs = [history, history["start"], history["start"]["start"]]
    assert tuple((run["recipe"], run["world"], run["seed"]) for run in reversed(runs)) == planned
    assert runs[-1]["start"] is None and all(run["stages"]["towers"]["steps"] == 1 for run in runs)
    for run in runs:
        assert run["test"].keys() == {"test-easy", "test-hard", "test-new-words"}
        assert 0 <= run["test"]["test-hard"]["j_and_f"] <= 1
    pretrain_tiny.main()
    assert len(chosen) == 3  # finished runs are passed over
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", [*arguments, "--seed", "1"])
        pretrain_tiny.main()


def test_a_deeper_language_model_answers_as_before(small_start, monkeypatch):
    def states(model):
        tokens = torch.arange(12).view(1, -1)
        with torch.no_grad():
            return model.eval().model.host.language_model(tokens, output_hidden_states=True).hidden_states

    shallow, _ = pretrain_tiny.new_model(0, small_start)
    deeper_config = pretrain_tiny.tiny_config

    def deepen(*arguments, **ids):
        config = deeper_config(*arguments, **ids)
        config.text_config.num_hidden_layers += 2
        return config

    monkeypatch.setattr(pretrain_tiny, "tiny_config", deepen)
    deep, processor = pretrain_tiny.new_model(0, small_start)
    before, after = states(shallow), states(deep)
    assert len(after) == len(before) + 2
    # embeddings and first layer, then two layers that add nothing, then the others
    for number, old in enumerate(before):
        torch.testing.assert_close(after[number if number < 2 else number + 2], old)
    for number in (2, 3):
        torch.testing.assert_close(after[number], before[1])

    deep.save_pretrained(small_start / "deep")
    processor.save_pretrained(small_start / "deep")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="it cannot shrink"):
        pretrain_tiny.new_model(0, small_start / "deep")


def test_a_deeper_memory_attention_adds_nothing_at_first(small_start, monkeypatch):
    shallow, _ = pretrain_tiny.new_model(0, small_start)
    config = pretrain_tiny.tiny_config

    def deepen(*arguments, **ids):
        deeper = config(*arguments, **ids)
        deeper.mask_tracker_config.sam2_config.memory_attention_num_layers += 1
        return deeper

    monkeypatch.setattr(pretrain_tiny, "tiny_config", deepen)
    deep, _ = pretrain_tiny.new_model(0, small_start)
    clip = generate_clip(split_seed("validation", 0), PRESETS["hard"])
    box = pretrain_segmenter.true_box(clip, 0, 0)
    before, after = (
        list(_tracker(model).propagate(_whole(model, clip), [TrackedObject(0, [MaskPrompt(boxes=box)])]))
        for model in (shallow.eval(), deep.eval())
    )
    assert len(_tracker(deep).sam2.memory_attention.layers) == len(_tracker(shallow).sam2.memory_attention.layers) + 1
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new.raw_logits, old.raw_logits, atol=1e-3, rtol=1e-4)


def _tracker(model):
    return model.model.mask_tracker


@torch.no_grad()
def _whole(model, clip, objects=1):
    pyramid = pretrain_segmenter.encode_frames(_tracker(model), clip.frames)
    return ClipPyramids(pyramid, len(clip.frames), torch.zeros(objects, dtype=torch.int64))


@pytest.mark.parametrize("start", [0, 9])
def test_remembered_frames_are_those_of_the_memory(start, monkeypatch, small_start):
    model, _ = load_model(str(small_start), "cpu")
    tracker = _tracker(model)
    encode, seen = tracker.remember, {}

    def remember(pyramid, masks, prompted):  # a memory that says which frame it is of
        memory = encode(pyramid, masks, prompted)
        memory.features = torch.full_like(memory.features, float(masks.frame_index))
        return memory

    condition = tracker.condition

    def listen(pyramid, memory, frame_index, num_frames=None, reverse=False):
        maps = memory.spatial(frame_index, reverse, tracker.config.sam2_config.max_cond_frame_num)
        seen[frame_index] = [int(features[0, 0, 0]) for _, features in maps]
        return condition(pyramid, memory, frame_index, num_frames, reverse)

    monkeypatch.setattr(tracker, "remember", remember)
    monkeypatch.setattr(tracker, "condition", listen)
    clip = generate_clip(split_seed("validation", 0), PRESETS["hard"])
    box = pretrain_segmenter.true_box(clip, 0, start)
    list(tracker.propagate(_whole(model, clip), [TrackedObject(start, [MaskPrompt(boxes=box)])]))
    assert len(seen) == 15
    for t, frames in seen.items():
        assert frames == pretrain_segmenter.remembered_frames(t, start, tracker.new_memory().num_recent)


def test_attention_is_led_to_the_same_object():
    owners = torch.tensor([[[0, 1, -1, 1], [1, 0, -1, -1], [-1, 1, 0, 1]]])  # three frames of four cells
    right = torch.tensor(
        [
            [
                [0, 0, 0, 0, 0, 0, 0, 0, 1.0],
                [0, 0.5, 0, 0.5, 0, 0, 0, 0, 0],
                [1, 0, 0, 0, 0, 0, 0, 0, 0],
                [0] * 4 + [1] + [0] * 4,
            ]
        ]
    )  # onto frames 0 and 1 and a pointer
    loss = pretrain_segmenter.matching_loss(right, owners, 2, [0, 1])
    assert loss == pytest.approx(math.log(1 / (1 + 1e-4)), abs=1e-6)  # the first cell has no owner: it may look away
    right[0, 2] = torch.tensor([0, 1.0] + [0] * 7)  # object 0 looks at object 1
    wrong = pretrain_segmenter.matching_loss(right, owners, 2, [0, 1])
    assert wrong == pytest.approx(-math.log(1e-4) / 3, rel=1e-3)
    nobody = torch.full_like(owners, -1)
    assert pretrain_segmenter.matching_loss(right, nobody, 2, [0, 1]) == 0


def test_cells_belong_to_what_fills_them_and_can_be_told():
    masks = np.zeros((2, 1, 4, 4), bool)
    masks[0, 0, :2, :2], masks[1, 0, :2, 2:] = True, True
    masks[1, 0, 2, 0] = True  # a quarter of a cell
    assert pretrain_segmenter.cell_owners(masks, [True, True], (2, 2)).tolist() == [[0, 1, -1, -1]]
    assert pretrain_segmenter.cell_owners(masks, [True, False], (2, 2)).tolist() == [[0, -1, -1, -1]]


def test_after_jumps_only_what_is_unlike_all_others_is_followed():
    clip = generate_clip(split_seed("train", 0), PRESETS["hard"])
    for thing, colour in zip(clip.objects, ("red", "red", "blue", "green", "white"), strict=False):
        thing.noun, thing.colour, thing.size = "cat", colour, "small"
    clip.visibility[:] = 1.0
    whole = pretrain_segmenter.Footage(PRESETS["hard"])
    jumps = pretrain_segmenter.Footage(PRESETS["hard"], jumps=5)
    everyone = list(range(len(clip.objects)))
    assert whole.followed(clip, 0) == everyone and jumps.followed(clip, 0) == everyone[2:]
    order = jumps.frame_order(np.random.default_rng(0))
    assert len(set(order.tolist())) == 5 and sorted(order.tolist()) != order.tolist()
    assert whole.frame_order(np.random.default_rng(0)).tolist() == list(range(16))


class FakePyramid:
    def __init__(self, features: torch.Tensor):
        self.made_in = features.dtype

    def float(self):
        return self


@pytest.mark.parametrize("able", [True, False])
def test_frozen_features_are_made_in_bfloat16_where_the_cpu_has_it(able, monkeypatch):
    monkeypatch.setattr(pretrain_segmenter, "computes_in_bfloat16", lambda: able)
    monkeypatch.setattr(pretrain_segmenter, "encode_frames", lambda tracker, frames: FakePyramid(frames @ frames))
    made_in = pretrain_segmenter.encode_frozen(None, torch.ones(2, 2)).made_in
    assert made_in == (torch.bfloat16 if able else torch.float32)


PROCESS = """
import sys, torch
from pathlib import Path
from torch import nn
from modeling_sparrow.training.loop import process_share, run_stage
torch.manual_seed(0)
module = nn.Linear(3, 1)
def step(number):
    rank, processes = process_share()
    draws = [number * 2 + rank] if processes == 2 else [number * 2, number * 2 + 1]
    inputs = torch.cat([torch.randn(4, 3, generator=torch.Generator().manual_seed(draw)) for draw in draws])
    return {"loss": (module(inputs) - inputs.sum(1, keepdim=True)).square().mean()}
run_stage("toy", module, step, output=Path(sys.argv[1]), steps=8, learning_rate=0.1, warmup=2)
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    runs = [({}, "alone"), ({**together, "RANK": "0"}, "both"), ({**together, "RANK": "1"}, "both")]
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path / folder)], env=os.environ | settings)
        for settings, folder in runs
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    alone, both = (load_file(tmp_path / folder / "toy.safetensors") for folder in ("alone", "both"))
    torch.testing.assert_close(both, alone, atol=1e-6, rtol=1e-5)


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


def test_learning_curve(tmp_path):
    steps = [100, 200, 400, 800]
    curve = [{"step": step, "val_right": 1 - step**-0.5} for step in steps]
    stage = {"steps": 800, "seconds": 3600, "curve": curve}
    rows = [line.split(" | ") for line in learning_curve.curve_table(stage, {"val_right": 0.98}, 2).splitlines()]
    assert rows[0][1:3] == ["100", "800"]
    assert rows[2] == ["| right", "90 %", "96 %", "98 %", "steps^-0.50", "2,500", "3.1 |"]
    worse = [{"step": step, "val_right": 0.5 - step / 1e4} for step in steps]
    assert "never" in learning_curve.curve_table(stage | {"curve": worse}, {"val_right": 0.98})
    without_errors = [{"step": step, "val_right": 1.0 if step > 200 else 0.9} for step in steps]
    table = learning_curve.curve_table(stage | {"curve": without_errors}, {"val_right": 0.98}, 2)
    assert table.endswith("| right | 90 % | 100 % | 98 % | – | – | – |\n")
    with pytest.raises(ValueError, match="did not measure 'val_wrong'; it has val_right"):
        learning_curve.curve_table(stage, {"val_wrong": 1.0})
    with pytest.raises(ValueError, match="three points"):
        learning_curve.fit_power_law([1, 2, 3], [0.5, 0.2, 0.0])


def test_learning_curve_over_runs(tmp_path, monkeypatch, capsys):
    history = None
    for number, hours in enumerate((1, 3, 12, 48)):  # in all 1, 4, 16, 64
        error = (4**number) ** -0.5
        figures = {"right_object": 1 - error, "identity_switches": error}
        history = {"stages": {"visual": {"seconds": hours * 3600}}, "start": history, "test": {"test-hard": figures}}
    history["start"]["start"]["start"].pop("test")  # counts, but is not shown
    (tmp_path / "training.json").write_text(json.dumps(history), encoding="utf-8")
    aims = ["test-hard.right_object=0.9", "test-hard.identity_switches=0.05"]
    monkeypatch.setattr(sys, "argv", ["learning_curve", str(tmp_path), "runs", *aims])
    learning_curve.main()
    header, _, right, switches = capsys.readouterr().out.splitlines()
    assert header == "| figure | run 2, 4.0 h | run 3, 16.0 h | run 4, 64.0 h | aim | error falls as | hours |"
    assert right == "| test-hard.right_object | 50.0 % | 75.0 % | 87.5 % | 90 % | hours^-0.50 | 100 |"
    assert switches == "| test-hard.identity_switches | 50.0 % | 25.0 % | 12.5 % | 5 % | hours^-0.50 | 400 |"
    curve = [{"step": 100, "val_j": 0.5}, {"step": 200, "val_j": 0.6}]
    history["start"]["stages"]["video"] = {"steps": 200, "seconds": 3600, "curve": curve}
    (tmp_path / "training.json").write_text(json.dumps(history), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["learning_curve", str(tmp_path), "video", "val_j=0.9"])
    learning_curve.main()  # of the last run that has it
    assert capsys.readouterr().out.splitlines()[0].startswith("| figure | 100 | 200 |")
    monkeypatch.setattr(sys, "argv", ["learning_curve", str(tmp_path), "image", "val_iou=0.9"])
    with pytest.raises(SystemExit):
        learning_curve.main()
    assert "no stage 'image': its stages are visual, video" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"not every run with test figures has 'test-easy\.f'"):
        learning_curve.runs_table(history, {"test-easy.f": 0.9})


def test_a_summary_counts_a_resumed_stage_once(tmp_path):
    lines = [
        {"step": 100, "seconds": 10.0, "val_right": 0.5},
        {"step": 150, "seconds": 15.0, "loss": 1.0},
        {"step": 100, "seconds": 9.0, "val_right": 0.6},
        {"step": 200, "seconds": 18.0, "val_right": 0.7, "val_none": 0.1},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    curve = [{"step": 100, "val_right": 0.6}, {"step": 200, "val_right": 0.7, "val_none": 0.1}]
    summary = {"steps": 200, "seconds": 33, "val_right": 0.7, "val_none": 0.1, "curve": curve}
    assert pretrain_tiny._summary(tmp_path, "log") == summary


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
    clips = pretrain_segmenter.batch_clips(0, 6, 0, PRESETS["train"])
    questions = packed_questions.draw_questions(
        side.processor, clips, 12, np.random.default_rng(0), lambda clip, item: item.kind != "event"
    )
    assert {len(question.targets) for question in questions} >= {0, 1, 2}
    assert "event" not in {question.expression.kind for question in questions}


def test_a_question_waits_for_a_frame_that_answers_it():
    clip = generate_clip(0, PRESETS["easy"])
    clip.visibility[:] = 1.0
    clip.visibility[0] = [0.0, 0.2, *[1.0] * 6]  # enters late

    def is_askable(kind, target_ids, frame, with_video=True):
        return packed_questions.is_askable(clip, Expression("", target_ids, kind, 3), frame, with_video)

    assert is_askable("class", (0,), 0) and not is_askable("class", (0,), 1) and is_askable("class", (0,), 2)
    assert is_askable("motion", (0,), 2) and is_askable("motion", (1,), 2) and not is_askable("multi", (0, 1), 1)
    assert not is_askable("motion", (1,), 0, with_video=False) and is_askable("none", (), 2)


def test_the_language_model_sees_some_frames_of_a_long_clip():
    clip = generate_clip(3, PRESETS["hard"])
    seen = pretrain_towers.as_seen(clip, 8)
    kept = [0, 2, 4, 6, 8, 10, 12, 15]
    assert seen.config == clip.config and seen.objects == clip.objects
    assert (seen.frames == clip.frames[kept]).all() and (seen.masks == clip.masks[:, kept]).all()
    assert pretrain_towers.as_seen(clip, 16) is clip
    facts = object_facts(clip, clip.config.colours)
    owners = pretrain_towers.tubelet_owners([clip, seen], [facts, facts], 16, 4)
    speeds = [
        pretrain_towers.patch_targets(part, "speed", pretrain_towers.SPEED_WORDS) for part in (owners[:4], owners[4:])
    ]
    assert (speeds[0] >= 0).any() and (speeds[1] < 0).all()  # half of the frames do not tell the speed
    events = pretrain_towers.patch_targets(owners[4:], "events", None)
    on_object = torch.from_numpy(np.concatenate([owner.index for owner in owners[4:]])) >= 0
    assert events.shape == (2 * 64, len(EVENT_NAMES)) and events[~on_object].isnan().all()
    assert (events[on_object] == 1).any()  # what happens is that of the whole clip


def test_what_is_asked_of_visual_tokens_is_what_expressions_say():
    seen = set()
    for index in range(60):
        clip = generate_clip(split_seed("validation", index), PRESETS["hard"])
        facts = object_facts(clip, clip.config.colours)
        for item in all_expressions(clip, np.random.default_rng(index)):
            if item.kind == "event":
                names = [name for name, forms in EVENTS.items() if any(item.text.endswith(form[0]) for form in forms)]
                seen.update(names)
                assert max(facts.events[item.target_ids[0], EVENT_NAMES.index(name)] for name in names) == 1
            if item.kind == "meeting":
                anchor, (target,) = clip.objects[item.anchor_id], item.target_ids
                assert f"{anchor.noun}" in item.text and item.anchor_id != target
                meets = [facts.events[target, EVENT_NAMES.index(f"meets_{side}")] for side in ("front", "behind")]
                assert 1 in meets
                colour = facts.partner[target]
                assert colour in (-1, clip.config.colours.index(anchor.colour))
            if item.kind == "ordinal" and f"second {clip.objects[item.target_ids[0]].noun}" in item.text:
                assert 1 in facts.ranks[item.target_ids[0]]
    assert len(seen) >= 9


def test_what_is_not_there_is_denied_in_the_first_word_and_in_all(side):
    clips = pretrain_segmenter.batch_clips(0, 4, 0, PRESETS["train"])
    questions = packed_questions.draw_questions(
        side.processor, clips, 12, np.random.default_rng(0), lambda clip, item: True
    )
    prefix = packed_questions.shared_ids(side.processor, 0)
    packed = packed_questions.pack_questions(side.processor, side.model.config, prefix, len(clips), questions)
    tokenizer = side.processor.tokenizer
    said = {0: set(), 1: set(), 2: set()}
    for question, (row, column) in zip(packed.order, packed.first, strict=True):
        wanted = itertools.takewhile(lambda label: label >= 0, packed.labels[row, column + 1 :].tolist())
        said[min(len(question.targets), 2)].add(tokenizer.decode(list(wanted)))
    assert said == {
        0: {"nothing"},
        1: {"it is [BOX] [SEG] . <|end|>"},
        2: {"they are [BOX] [SEG] . <|end|>"},
    }
    denied = sum(not question.targets for question in questions)
    assert (packed.ids == tokenizer.convert_tokens_to_ids("nothing")).sum() == denied > 0
    assert len(packed.order) == len(questions) and (packed.ids == 3).sum() == len(questions)


def test_supervised_attention_is_that_of_the_layer(side):
    clips = pretrain_segmenter.batch_clips(0, 2, 0, PRESETS["train"])
    questions = packed_questions.draw_questions(
        side.processor, clips, 3, np.random.default_rng(0), lambda clip, item: True
    )
    prefix = packed_questions.shared_ids(side.processor, 8)
    packed = packed_questions.pack_questions(side.processor, side.model.config, prefix, len(clips), questions)
    model = side.language_model
    with torch.no_grad():
        model.set_attn_implementation("eager")
        output = model(
            inputs_embeds=pretrain_language._embed(side, packed.ids, clips, True),
            attention_mask=packed.mask,
            position_ids=packed.positions,
            output_hidden_states=True,
            output_attentions=True,
        )
        model.set_attn_implementation("sdpa")
        rows, columns = zip(*packed.box, strict=True)
        for index in (-2, -3):
            own = pretrain_language._attention_onto_prefix(side, index, output.hidden_states[index - 1], packed)
            expected = output.attentions[index][rows, :, columns, : len(prefix)]
            assert own.shape == (len(questions), 4, len(prefix))
            torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
def late_clip():
    """A clip whose first object comes in on frame 3."""
    clip = generate_clip(0, PRESETS["easy"])
    clip.visibility[:] = 1.0
    clip.visibility[0, :3] = 0.0
    clip.masks[0, :3] = False
    return clip


def test_attention_to_what_comes_late_is_led_to_where_it_is_first_seen(side, late_clip):
    config, frames = side.model.config, len(late_clip.frames)
    prefix = config.num_visual_tokens(frames) + 5
    places = pretrain_language.visual_places(side, prefix, frames)
    late = pretrain_towers.tubelet_owners(
        [late_clip], [None], config.temporal_config.patch_size, config.temporal_config.tubelet_size
    )
    on_object = np.concatenate([owner.index for owner in late]).tolist().index(0)
    y, x = (int(place.float().mean()) for place in torch.from_numpy(late_clip.masks[0, 3]).nonzero(as_tuple=True))
    grid, (height, width) = config.spatial_pool_size, late_clip.masks.shape[2:]
    cell = y * grid // height * grid + x * grid // width

    def loss(frame, objects=(0,)):
        attention = torch.zeros(1, 4, prefix)
        attention[:, :2, places["temporal"].start + on_object] = 1
        attention[:, 2:, places["spatial"].start + frame * grid**2 + cell] = 1
        return float(pretrain_language.attention_loss(side, attention, [late_clip], [0], [objects]))

    assert loss(3) == pytest.approx(0, abs=1e-4) and loss(0) == pytest.approx(2, abs=1e-3)  # half of the heads
    assert loss(3, objects=()) == 0
    late_clip.visibility[0] = 0
    assert loss(3) == 0


def test_a_box_embedding_tells_the_target_on_the_frame_that_is_prompted(side, late_clip, monkeypatch):
    thing = late_clip.objects[0]
    assert side.model.candidate_frames(len(late_clip.frames)) == [0, 2, 5, 7]
    one = packed_questions.Question(0, Expression("", (0,), "event", 3), (0,), [])
    others = [packed_questions.Question(0, Expression("", ids, "x", 3), ids, []) for ids in ((0, 1), ())]

    def losses(frame, noun):
        box = xyxy_to_cxcywh(pretrain_language.true_boxes([late_clip], frame)[0][0])
        monkeypatch.setattr(side.box_regressor, "forward", lambda tokens: box.logit().expand(len(tokens), 4))
        for name, word in (("noun", noun), ("colour", thing.colour)):
            scores = torch.zeros(len(side.words[name]))
            scores[side.words[name].index(word)] = 20
            monkeypatch.setattr(
                side.look_heads[name], "forward", lambda tokens, scores=scores: scores.expand(len(tokens), -1)
            )
        tokens = torch.zeros(3, side.model.config.prompt_size)
        questions = [others[0], one, others[1]]
        return [float(loss) for loss in pretrain_language.target_losses(side, tokens, questions, [late_clip])]

    assert losses(5, thing.noun) == pytest.approx([0, 0], abs=1e-4)
    distance, looks = losses(7, next(noun for noun in side.words["noun"] if noun != thing.noun))
    assert distance > 0.01 and looks > 10


def test_a_look_is_absent_from_clips_that_show_nothing_alike(side, monkeypatch):
    clips = pretrain_segmenter.batch_clips(0, 2, 0, PRESETS["easy"])
    for number, thing in enumerate([*clips[0].objects, *clips[1].objects]):
        thing.noun = "cat" if number else "ring"
    features = torch.zeros(2, 3, 1), torch.zeros(2, 3, 1, 1)
    proposals = RegionProposals(boxes=None, scores=None, features=None, valid=torch.ones(2, 3, dtype=torch.bool))

    def loss(noun_of, level):
        logits = torch.full((1, 2, 3), level)
        monkeypatch.setattr(side.filtration_head, "score", lambda tokens, *features: (logits, None))
        question = packed_questions.Question(0, Expression("", (noun_of,), "class", 3), (noun_of,), [])
        return float(pretrain_language.absence_loss(side, torch.ones(1, 4), [question], clips, proposals, features))

    assert loss(0, 9.0) > 9 and loss(0, -9.0) < 1e-3  # no ring in the other clip
    assert loss(1, 9.0) == 0  # but cats
