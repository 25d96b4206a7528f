"""The three stages from YAML to their output: the command, its checkpoints, killing and resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modeling_sparrow.cli import load_model, main
from modeling_sparrow.evaluation.files import read_json
from modeling_sparrow.training.run import FINAL, HISTORY_FILE, load_start, train_stage
from modeling_sparrow.training.settings import SettingsError

from .conftest import STAGES, STEPS, WORLD, toy_content, toy_stage, trained_tensors, write_yaml

HELD_OUT = {"data": [WORLD | {"split": "validation"}], "samples": 2, "every": 4}
EXPECTED = {
    "proposer": {"objectness_loss", "l1_loss", "giou_loss", "eval_recall"},
    "target_injection": {"ce_loss", "mask_bce_loss", "mask_dice_loss", "eval_ce_loss", "eval_j_and_f"},
    "filter": {"filter_class_loss", "filter_box_loss", "eval_filter_class_loss"},
}


def start_and_kill(config: Path, output: Path):
    """Run the command in a process of its own and kill it (-9) once its second step is saved."""
    command = [sys.executable, "-m", "modeling_sparrow.cli", "train", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ)
    deadline = time.monotonic() + 300
    while not (output / "checkpoint-2").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no checkpoint: {process.communicate()[0].decode()}")
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_resumes_to_the_same_weights(stage, checkpoint, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    train_stage(toy_stage(stage, checkpoint, undisturbed, optimization={"steps": 16}))
    output = tmp_path / "killed"
    config = write_yaml(tmp_path / "stage.yaml", toy_content(stage, checkpoint, output, optimization={"steps": 16}))
    start_and_kill(config, output)
    assert not (output / FINAL).exists()
    assert main(["train", str(config)]) == 0
    first, second = trained_tensors(undisturbed), trained_tensors(output)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_every_loss_is_logged_by_name(stage, checkpoint, tmp_path):
    changes = {"held_out": HELD_OUT}
    if stage == "target_injection":
        changes["figures"] = {"clips": 1, "max_new_tokens": 6}
    output = tmp_path / "run"
    train_stage(toy_stage(stage, checkpoint, output, optimization={"steps": 4}, **changes))
    history = read_json(output / "checkpoint-4" / "trainer_state.json")["log_history"]
    logged = {name for entry in history for name in entry}
    assert EXPECTED[stage] | {"loss", "eval_loss", "seconds_per_step", "memory_gib", "learning_rate"} <= logged
    assert list(output.glob("runs/**/events.out.tfevents.*"))
    record = read_json(output / FINAL / HISTORY_FILE)["history"][-1]
    assert record["stage"] == stage and EXPECTED[stage] <= record["figures"].keys()
    assert yaml.safe_load((output / "stage.yaml").read_text()) == record["settings"]


def test_the_stages_follow_each_other(checkpoint, tmp_path):
    """Three commands; the last model has been through all of them and can be loaded as any other."""
    model = checkpoint
    for stage in STAGES:
        content = toy_content(stage, model, tmp_path / stage, optimization={"steps": 2})
        content.pop("allow_untrained_start", None)
        assert main(["train", str(write_yaml(tmp_path / f"{stage}.yaml", content))]) == 0
        model = tmp_path / stage / FINAL
    stages = [entry["stage"] for entry in read_json(model / HISTORY_FILE)["history"]]
    assert stages == list(STAGES)
    load_model(str(model), "cpu")


def test_a_stage_changes_only_what_it_trains(checkpoint, tmp_path):
    final = train_stage(toy_stage("filter", checkpoint, tmp_path / "run", optimization={"steps": 2}))
    before, after = load_file(checkpoint / "model.safetensors"), load_file(final / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("model.filtration_head.", "model.box_head.")) for name in changed)


def test_full_fine_tuning_without_lora(checkpoint, tmp_path):
    changes = {"lora": None, "trainable": ["host.language_model", "seg_head"], "optimization": {"steps": 2}}
    final = train_stage(toy_stage("target_injection", checkpoint, tmp_path / "run", **changes))
    before, after = load_file(checkpoint / "model.safetensors"), load_file(final / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in changed} == {"host", "seg_head"}
    assert not any("tower" in name for name in changed)


def test_filter_refuses_a_model_that_stage_1_has_not_trained(checkpoint, tmp_path):
    proposer = shutil.copytree(checkpoint, tmp_path / "proposer")
    (proposer / HISTORY_FILE).write_text(json.dumps({"history": [{"stage": "proposer"}]}))
    for model, stages in ((proposer, "proposer"), (checkpoint, "no stage")):
        with pytest.raises(SettingsError, match=f"has been through {stages}"):
            train_stage(toy_stage("filter", model, tmp_path / stages, allow_untrained_start=False))


def test_filter_starts_from_an_adapter_of_stage_1(injected, tmp_path):
    changes = {"optimization": {"steps": 1}, "allow_untrained_start": False}
    final = train_stage(toy_stage("filter", injected, tmp_path / "run", **changes))
    merged = load_start(str(injected)).model.state_dict()
    after = load_file(final / "model.safetensors")
    torch.testing.assert_close(after["model.seg_head.fc1.weight"], merged["model.seg_head.fc1.weight"])


def test_merge_writes_the_whole_model(checkpoint, tmp_path):
    content = toy_content("target_injection", checkpoint, tmp_path / "run", optimization={"steps": 1})
    config = write_yaml(tmp_path / "stage.yaml", content)
    assert main(["train", str(config), "--merge", str(tmp_path / "merged")]) == 0
    load_model(str(tmp_path / "merged"), "cpu")
    assert (tmp_path / "run" / FINAL / "adapter_model.safetensors").is_file()
    assert main(["train", str(config), "--merge", str(tmp_path / "merged")]) == 2  # not empty


def test_other_settings_do_not_continue_a_run(checkpoint, tmp_path):
    train_stage(toy_stage("proposer", checkpoint, tmp_path / "run", optimization={"steps": 1}))
    other = toy_stage("proposer", checkpoint, tmp_path / "run", optimization={"steps": 1, "learning_rate": 0.5})
    with pytest.raises(SettingsError, match="--no-resume"):
        train_stage(other)
    train_stage(other, resume=False)
    saved = yaml.safe_load((tmp_path / "run" / "stage.yaml").read_text())
    assert saved["optimization"]["learning_rate"] == 0.5


def test_a_finished_run_that_lost_its_output_only_writes_it_again(checkpoint, tmp_path):
    settings = toy_stage("proposer", checkpoint, tmp_path / "run", optimization={"steps": 2})
    final = train_stage(settings)
    before = load_file(final / "model.safetensors")
    shutil.rmtree(final)
    after = load_file(train_stage(settings) / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_unknown_parts_and_settings_without_losses_are_refused(checkpoint, tmp_path):
    with pytest.raises(SettingsError, match="no part seg_haed"):
        train_stage(toy_stage("target_injection", checkpoint, tmp_path / "run", trainable=["seg_haed"]))
    with pytest.raises(SettingsError, match="all weights are 0"):
        toy_stage("filter", checkpoint, tmp_path / "run", losses={"filter_class": 0.0})
    with pytest.raises(SettingsError, match="need box_guidance"):
        toy_stage("target_injection", checkpoint, tmp_path / "run", losses={"filter_class": 1.0})


def test_bad_settings_end_the_command_with_one_line(checkpoint, tmp_path, capsys):
    content = toy_content("proposer", checkpoint, tmp_path / "run") | {"learning_rat": 1}
    assert main(["train", str(write_yaml(tmp_path / "stage.yaml", content))]) == 2
    message = capsys.readouterr().err
    assert "learning_rat" in message and message.count("\n") == 1
    assert main(["train", str(tmp_path / "absent.yaml")]) == 2


def test_set_replaces_a_value(checkpoint, tmp_path):
    content = toy_content("proposer", checkpoint, tmp_path / "run") | {"optimization": STEPS}
    config = write_yaml(tmp_path / "stage.yaml", content)
    assert main(["train", str(config), "--set", "optimization.steps=1", "--set", "augment=false"]) == 0
    settings = json.loads((tmp_path / "run" / FINAL / HISTORY_FILE).read_text())["history"][-1]["settings"]
    assert settings["optimization"]["steps"] == 1 and settings["augment"] is False
