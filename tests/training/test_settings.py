"""Strict YAML: what is wrong is named, what is shipped can be read."""

import pytest
import yaml

from modeling_sparrow.training.settings import CONFIGS, SettingsError, build, read_settings, to_plain
from modeling_sparrow.training.stages import AnyStage, FilterStage, Optimization, ProposerStage, TargetInjectionStage

from .conftest import STEPS, toy_content, write_yaml


def read(tmp_path, content, overrides=None):
    return read_settings(write_yaml(tmp_path / "stage.yaml", content), AnyStage, overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batchsize": 3}, "unknown key batchsize; known are"),
        ({"stage": "stage2"}, "stage: proposer or stage: target_injection or stage: filter"),
        ({"data": {}}, "data: expected a list"),
        ({"data": [{"kind": "coco"}]}, "data.*: the key annotations, images is required"),
        ({"data": [{"kind": "folder"}]}, "kind: coco or kind: synthetic"),
        ({"augment": "yes please"}, "augment: expected bool"),
        ({"optimization": STEPS | {"steps": "many"}}, "steps: expected int, got 'many'"),
        ({"optimization": STEPS | {"steps": True}}, "steps: expected int"),
        ({"optimization": STEPS | {"steps": 0}}, "must be at least 1"),
        ({"optimization": STEPS | {"learning_rate": "fast"}}, "learning_rate: expected a number"),
        ({"optimization": STEPS | {"betas": [0.9]}}, "betas: expected two numbers"),
        ({"optimization": STEPS | {"schedule": "step"}}, "schedule: expected one of 'linear'"),
        ({"dtype": "bfloat16"}, "needs optimization.precision: bfloat16"),
        ({"held_out": {"samples": 2}}, "held_out: the key data is required"),
    ],
)
def test_what_is_wrong_is_named(change, message, tmp_path):
    with pytest.raises(SettingsError, match=message):
        read(tmp_path, toy_content("proposer", tmp_path, tmp_path) | change)


def test_numbers_as_yaml_writes_them():
    settings = build(Optimization, yaml.safe_load("{steps: 3, learning_rate: 3e-4, weight_decay: 1}"), "here")
    assert settings.learning_rate == 3e-4 and settings.weight_decay == 1.0


def test_other_values_from_the_command_line(tmp_path):
    content = toy_content("filter", tmp_path, tmp_path)
    overrides = ["optimization.steps=9", "losses.filter_box=0.5", "tracked_features={mode: none}", "held_out=null"]
    settings = read(tmp_path, content, overrides)
    assert settings.optimization.steps == 9 and settings.losses.filter_box == 0.5
    assert settings.tracked_features.mode == "none" and settings.held_out is None
    with pytest.raises(SettingsError, match="expected key=value"):
        read(tmp_path, content, ["steps"])
    with pytest.raises(SettingsError, match="not below a mapping"):
        read(tmp_path, content, ["data.kind=coco"])


@pytest.mark.parametrize("stage", ["proposer", "target_injection", "filter"])
def test_settings_survive_yaml(stage, tmp_path):
    settings = read(tmp_path, toy_content(stage, tmp_path, tmp_path))
    assert build(AnyStage, yaml.safe_load(yaml.safe_dump(to_plain(settings))), "again") == settings


def test_defaults_are_those_of_the_paper():
    """Loss weights, what is trained, and that stage 1 shows tracked features and trains [SEG] without boxes."""
    content = toy_content("target_injection", "model", "output")
    first = build(AnyStage, content, "here")
    assert isinstance(first, TargetInjectionStage)
    assert first.losses.by_name() == {"ce_loss": 1.0, "mask_bce_loss": 2.0, "mask_dice_loss": 0.5}
    assert (first.lora.rank, first.lora.alpha, first.lora.dropout) == (8, 16, 0.05)
    assert first.tracked_features.mode == "train" and not first.box_guidance
    second = build(AnyStage, toy_content("filter", "model", "output"), "here")
    assert isinstance(second, FilterStage)
    assert second.losses.by_name() == {"filter_class_loss": 1.0, "filter_box_loss": 2.0}
    assert second.trainable == ["filtration_head", "box_head"]
    third = build(AnyStage, toy_content("proposer", "model", "output"), "here")
    assert isinstance(third, ProposerStage) and third.offset_learning_rate == 0.1


def test_a_file_that_is_no_yaml(tmp_path):
    (tmp_path / "stage.yaml").write_text("a: [1", encoding="utf-8")
    with pytest.raises(SettingsError, match="not valid YAML"):
        read_settings(tmp_path / "stage.yaml", AnyStage)
    with pytest.raises(SettingsError, match=r"none of the shipped settings: .*tiny_filter"):
        read_settings("tiny_fliter", AnyStage)


SHIPPED = ["proposer", "target_injection", "filter", "tiny_proposer", "tiny_target_injection", "tiny_filter"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_settings(name):
    assert read_settings(name, AnyStage).stage == name.removeprefix("tiny_")


def test_no_shipped_settings_are_forgotten():
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == {*SHIPPED, "tiny_ablation"}
