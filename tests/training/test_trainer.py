"""`SparrowTrainer`: normalisation, what is frozen, precision, checkpointing of activations, checkpoints."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_sparrow.evaluation.files import read_json
from modeling_sparrow.training.run import Start, prepare_stage, train_stage
from modeling_sparrow.training.trainer import TRAINED, assign_trained, base_model, trained_names

from ..tiny import random_model, random_processor
from .conftest import STAGES, WORLD, toy_content, toy_stage, trained_tensors, write_yaml

NO_DROPOUT = {"lora": {"dropout": 0.0}}


def logged(output, name: str) -> list[float]:
    """A figure of each step."""
    newest = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    entries = read_json(newest / "trainer_state.json")["log_history"]
    return [entry[name] for entry in entries if name in entry]


def prepared(stage: str, **changes):
    """A stage on a fresh random model, and its first batch."""
    model = random_model()
    settings = toy_stage(stage, "unused", "unused", **changes)
    ready = prepare_stage(settings, Start("toy", model, random_processor(model.config)), 4)
    batch = ready.collate([ready.train_data[0], ready.train_data[1]])
    batch.pop("num_skipped", None)
    return ready, batch


def options_of(stage: str) -> dict:
    return NO_DROPOUT if stage == "target_injection" else {}


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_add_up_to_the_batch(stage, checkpoint, tmp_path):
    """Samples differ in words, masks and boxes, so that a mean over means would not give this."""
    for name, sizes in {"whole": (3, 1), "split": (1, 3)}.items():
        steps = {"steps": 2, "batch_size": sizes[0], "accumulation": sizes[1]}
        train_stage(toy_stage(stage, checkpoint, tmp_path / name, optimization=steps, **options_of(stage)))
    for name in ("loss", "grad_norm"):
        assert logged(tmp_path / "split", name) == pytest.approx(logged(tmp_path / "whole", name), rel=1e-4)


def run_two_processes(module: str, settings: Path, **environment: str):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
    command = [*launch, "train", str(settings)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | environment)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("stage", ["target_injection"])
def test_two_processes_do_what_one_does(stage, checkpoint, tmp_path):
    """gloo on CPU, against one process with the same global batch: every loss and the gradient."""
    one = {"steps": 2, "batch_size": 4}
    train_stage(toy_stage(stage, checkpoint, tmp_path / "one", optimization=one, **options_of(stage)))
    two = toy_content(
        stage, checkpoint, tmp_path / "two", optimization={"steps": 2, "batch_size": 2}, **options_of(stage)
    )
    run_two_processes("modeling_sparrow.cli", write_yaml(tmp_path / "two.yaml", two))
    for name in ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss", "grad_norm"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), rel=1e-4)


def test_sharded_over_two_processes(checkpoint, tmp_path):
    """FSDP on CPU: the losses of one process, and the weights of an uninterrupted run after a resumed one."""
    stage = "target_injection"
    one = {"steps": 4, "batch_size": 4}
    train_stage(toy_stage(stage, checkpoint, tmp_path / "one", optimization=one, **options_of(stage)))
    two = toy_content(
        stage, checkpoint, tmp_path / "two", optimization={"steps": 4, "batch_size": 2}, **options_of(stage)
    )
    settings = write_yaml(tmp_path / "two.yaml", two)
    fsdp = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }
    run_two_processes("tests.training.fsdp_on_cpu", settings, **fsdp)
    for name in ("loss", "grad_norm"):
        figures = logged(tmp_path / "two", name), logged(tmp_path / "one", name)
        assert figures[0][:2] == pytest.approx(figures[1][:2], rel=1e-4)  # before weights have changed
        # Adam turns rounding of small gradients into steps of full size: how far runs part depends on the processor
        assert figures[0] == pytest.approx(figures[1], rel=3e-2)
    final = tmp_path / "two" / "final"
    uninterrupted = load_file(final / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in uninterrupted.values())
    shutil.rmtree(final)
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    run_two_processes("tests.training.fsdp_on_cpu", settings, **fsdp)
    resumed = load_file(final / "adapter_model.safetensors")
    assert resumed.keys() == uninterrupted.keys()
    for name, value in uninterrupted.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("proposer", {"region_proposer"}),
        ("target_injection", {"seg_head", "spatial_adapter", "temporal_adapter", "language_model"}),
        ("filter", {"filtration_head", "box_head"}),
    ],
)
def test_only_what_is_trained_has_gradients(stage, expected):
    ready, batch = prepared(stage)
    ready.model.train()
    outputs = ready.model(**batch, **ready.forward_options)
    outputs["loss"].backward()
    with_gradient = {name for name, parameter in ready.model.named_parameters() if parameter.grad is not None}
    assert with_gradient <= set(trained_names(ready.model))
    for part in expected:
        assert any(f"{part}." in name for name in with_gradient), part
    assert all(any(f"{part}." in name for part in expected) for name in with_gradient)


def test_frozen_parts_stay_in_evaluation_mode():
    """No dropout and no dropped paths in what is not trained."""
    ready, _ = prepared("target_injection")
    model = base_model(ready.model.train()).model
    frozen = [model.mask_tracker, model.region_proposer, model.filtration_head, model.box_head]
    frozen += [model.host.spatial_tower, model.host.temporal_tower]
    assert not any(module.training for part in frozen for module in part.modules())
    assert model.host.language_model.training and model.seg_head.training
    ready, _ = prepared("proposer")
    ready.model.train()
    assert not ready.model.mask_tracker.training and ready.model.region_proposer.training


def test_checkpointing_of_activations_changes_nothing():
    losses, gradients, calls = [], [], []
    for checkpointing in (False, True):
        ready, batch = prepared("target_injection", **NO_DROPOUT)
        model = ready.model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        count = []
        layer = base_model(model).model.host.language_model.model.layers[0].self_attn
        layer.register_forward_hook(lambda *_, count=count: count.append(1))
        loss = model(**batch, **ready.forward_options)["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        calls.append(len(count))
    assert calls == [1, 2]  # computed a second time for the gradient
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_steps(stage, checkpoint, tmp_path):
    """Frozen weights and computation in bfloat16; what is trained stays float32."""
    half = {"precision": "bfloat16", "gradient_checkpointing": True, "steps": 2}
    changes: dict = {"held_out": {"data": [WORLD | {"split": "validation"}], "samples": 1, "every": 2}}
    if stage != "proposer":
        changes["figures"] = {"clips": 1, "max_new_tokens": 2}
    train_stage(toy_stage(stage, checkpoint, tmp_path / "run", optimization=half, dtype="bfloat16", **changes))
    assert logged(tmp_path / "run", "eval_loss")
    assert all(value == value and value < 100 for value in logged(tmp_path / "run", "loss"))
    tensors = trained_tensors(tmp_path / "run")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


class KeepOptimizer(TrainerCallback):
    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.groups = optimizer.param_groups


def test_sampling_offsets_learn_slower(checkpoint, tmp_path):
    keeper = KeepOptimizer()
    settings = toy_stage("proposer", checkpoint, tmp_path / "run", optimization={"steps": 1})
    train_stage(settings, callbacks=[keeper])
    assert [group["initial_lr"] for group in keeper.groups] == pytest.approx([1e-4, 1e-3])
    slow = sum(p.numel() for group in keeper.groups if group["initial_lr"] < 5e-4 for p in group["params"])
    proposer = random_model().model.region_proposer
    words = ("sampling_offsets", "reference_points")
    assert slow == sum(p.numel() for name, p in proposer.named_parameters() if any(word in name for word in words))


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(injected):
    folder = injected.parent / "checkpoint-6"
    assert {file.name for file in folder.iterdir()} == {
        TRAINED,
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }
    assert not (injected.parent / ".saving").exists()
    assert (injected.parent / "checkpoint-4").exists() and not (injected.parent / "checkpoint-2").exists()
    tensors = load_file(folder / TRAINED)
    assert not any("tower" in name or "mask_tracker" in name for name in tensors)


def test_tensors_of_another_run_are_refused():
    ready, _ = prepared("filter")
    tensors = {name: torch.zeros(1) for name in trained_names(ready.model)[1:]}
    with pytest.raises(ValueError, match="other tensors than this model trains"):
        assign_trained(ready.model, tensors)


def test_a_batch_of_questions_without_objects(checkpoint, tmp_path):
    """Stage 1 learns to say that nothing fits; stage 2 passes over such questions."""
    world = {"height": 64, "width": 64, "num_frames": 4}
    nothing = {"data": [{"kind": "synthetic", "preset": "hard", "world": world, "kinds": ["none"]}]}
    changes = {"optimization": {"steps": 1, "batch_size": 1}} | nothing
    train_stage(toy_stage("target_injection", checkpoint, tmp_path / "run", **changes))
    assert logged(tmp_path / "run", "ce_loss")[0] > 0
    with pytest.raises(RuntimeError, match="no question grounds anything"):
        train_stage(toy_stage("filter", checkpoint, tmp_path / "filter", **changes))


def test_a_token_that_finds_no_box_still_trains():
    """With the boxes on, the best one prompts its mask in training; otherwise its mask would have no gradient."""
    ready, batch = prepared("target_injection", lora=None, trainable=["seg_head"], box_guidance=True)
    model = ready.model
    model.config.filtration_config.score_threshold = model.config.filtration_config.fallback_threshold = 2.0
    outputs = model.train()(**batch, **ready.forward_options)
    assert outputs.boxes and all(len(boxes) == 1 for boxes in outputs.boxes)
    outputs.loss.backward()
    assert model.model.seg_head.fc2.weight.grad.abs().max() > 0
    with torch.no_grad():
        outputs = model.eval()(**batch, **ready.forward_options)
    assert all(len(boxes) == 0 for boxes in outputs.boxes)
