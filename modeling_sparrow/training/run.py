"""Running a stage: start, data, trainer, and the folder that comes out."""

import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from sparrow_processing import SparrowProcessor

from ..cli import load_model
from ..evaluation.files import atomic_path, read_json, write_json
from ..evaluation.synthetic import evaluate_synthetic
from ..modeling_sparrow import SparrowForVideoGrounding
from ..registration import DEFAULT_CHECKPOINT
from .lora import add_lora, base_of_adapter, is_adapter, merge_adapter
from .mixture import MixtureDataset
from .pictures import PictureBuilder, collate_pictures
from .samples import GroundingCollator, SampleBuilder, evaluation_crops
from .settings import SettingsError, to_plain
from .stages import AnyStage, FilterStage, GroundingStage, Optimization, ProposerStage, TargetInjectionStage
from .trainer import ProposerForTraining, SparrowTrainer, assign_trained, trained_names

logger = logging.getLogger(__name__)

SETTINGS_FILE, HISTORY_FILE, FINAL = "stage.yaml", "training.json", "final"
# What may change between a run and its continuation.
_FREE = ("log_every", "save_every", "keep_checkpoints", "num_workers")
_DEFORMABLE = ("sampling_offsets", "reference_points")


@dataclass
class Start:
    """A model that a stage begins with, its processor, and the stages it has been through, oldest first."""

    name: str | None
    model: SparrowForVideoGrounding
    processor: SparrowProcessor
    history: list[dict[str, Any]] = field(default_factory=list)


def load_start(name: str | None, dtype: str = "float32") -> Start:
    """A model folder, a Hub id, or an adapter, which is merged into its model.

    Raises:
        ValueError, OSError: it cannot be loaded.
    """
    folder = Path(DEFAULT_CHECKPOINT if name is None else name)
    if is_adapter(folder):
        start = load_start(base_of_adapter(folder), dtype)
        model, processor = merge_adapter(start.model, folder), SparrowProcessor.from_pretrained(folder)
    else:
        model, processor = load_model(name, "cpu", dtype)
    history = folder / HISTORY_FILE
    stages = read_json(history).get("history", []) if history.is_file() else []
    return Start(name, model, processor, stages)


@dataclass
class PreparedStage:
    """What a trainer needs, and `whole`, the model that is written in the end."""

    model: nn.Module
    whole: nn.Module
    train_data: Dataset
    held_out: Dataset | None
    collate: Any
    forward_options: dict[str, Any] = field(default_factory=dict)
    learning_rate_factors: dict[str, float] = field(default_factory=dict)
    evaluate_model: Any = None


# ---------------------------------------------------------------------- preparing


def prepare_stage(settings: AnyStage, start: Start, num_samples: int) -> PreparedStage:
    """Freeze, adapt and open the data.

    Args:
        num_samples: that the whole run takes.
    """
    start.model.requires_grad_(False)
    if isinstance(settings, ProposerStage):
        return _prepare_proposer(settings, start, num_samples)
    return _prepare_grounding(settings, start, num_samples)


def _prepare_proposer(settings: ProposerStage, start: Start, num_samples: int) -> PreparedStage:
    if start.model.model.region_proposer is None:
        raise SettingsError("model: has no region proposer (box_guidance is off in its configuration).")
    start.model.model.region_proposer.requires_grad_(True).float()
    size = start.model.config.mask_tracker_config.image_size
    seed = settings.optimization.seed

    def mixture(sources, build, count, seed):
        opened = [source.open_pictures() for source in sources]
        return MixtureDataset(opened, [source.weight for source in sources], build, count, seed)

    held_out = settings.held_out
    return PreparedStage(
        model=ProposerForTraining(start.model),
        whole=start.model,
        train_data=mixture(settings.data, PictureBuilder(size, settings.augment), num_samples, seed),
        held_out=held_out and mixture(held_out.data, PictureBuilder(size, False), held_out.samples, 0),
        collate=collate_pictures,
        learning_rate_factors=dict.fromkeys(_DEFORMABLE, settings.offset_learning_rate),
    )


def _prepare_grounding(settings: GroundingStage, start: Start, num_samples: int) -> PreparedStage:
    model, processor = start.model, start.processor
    _check_start(settings, start)
    if isinstance(settings, TargetInjectionStage) and settings.lora is not None:
        whole = add_lora(model, settings.lora, settings.trainable)
    else:
        whole = model
        for part in settings.trainable:
            model.model.get_submodule(part).requires_grad_(True)
    for parameter in whole.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()

    weights, held_out = settings.losses.by_name(), settings.held_out
    longest = model.config.text_config.max_position_embeddings
    shown = (settings.frames, settings.tracked_features)

    def mixture(sources, training, count, seed):
        opened = [source.open_records(processor.num_frames) for source in sources]
        build = SampleBuilder(processor, longest, *shown, training, grounded_only="ce_loss" not in weights)
        return MixtureDataset(opened, [source.weight for source in sources], build, count, seed)

    options = {"loss_weights": weights, "box_guidance": settings.box_guidance}
    if "ce_loss" not in weights:
        options["logits_to_keep"] = 1
    pad = processor.tokenizer.pad_token_id
    return PreparedStage(
        model=whole,
        whole=whole,
        train_data=mixture(settings.data, True, num_samples, settings.optimization.seed),
        held_out=held_out and mixture(held_out.data, False, held_out.samples, 0),
        collate=GroundingCollator(processor.tokenizer.eos_token_id if pad is None else pad),
        forward_options=options,
        evaluate_model=settings.figures and (lambda _: synthetic_figures(settings, model, processor)),
    )


def _check_start(settings: GroundingStage, start: Start):
    parts = dict(start.model.model.named_modules())
    if unknown := [part for part in settings.trainable if part not in parts]:
        raise SettingsError(f"trainable: the model has no part {', '.join(unknown)}.")
    if settings.box_guidance and start.model.model.filtration_head is None:
        raise SettingsError("box_guidance: this model has no filtration head (its configuration switches it off).")
    stages = [item["stage"] for item in start.history]
    if isinstance(settings, FilterStage) and "target_injection" not in stages and not settings.allow_untrained_start:
        raise SettingsError(
            f"model: stage 'filter' starts from the output of 'target_injection', but {start.name} has been through "
            f"{', '.join(stages) or 'no stage'}. Name that output, or set allow_untrained_start: true."
        )


def synthetic_figures(
    settings: GroundingStage, model: SparrowForVideoGrounding, processor: SparrowProcessor
) -> dict[str, float]:
    """Figures of the generated world by name, those that exist."""
    figures, tracked = settings.figures, settings.tracked_features
    crops = evaluation_crops(tracked) if tracked.mode == "train_and_inference" else None
    with box_guidance(model, settings.box_guidance):
        numbers = evaluate_synthetic(
            model,
            processor,
            figures.split,
            figures.clips,
            figures.seed,
            max_new_tokens=figures.max_new_tokens,
            crops=crops,
        )
    names = ("j_and_f", "j", "f", "box_miou", "right_object", "identity_switches", "no_target_accuracy")
    return {name: numbers[name] for name in names if numbers[name] is not None}


@contextmanager
def box_guidance(model: SparrowForVideoGrounding, enabled: bool) -> Iterator[None]:
    """Ground with or without the boxes of [BOX] for a while."""
    before = model.config.box_guidance
    model.config.box_guidance = enabled and before
    try:
        yield
    finally:
        model.config.box_guidance = before


# ---------------------------------------------------------------------- running


def train_stage(settings: AnyStage, resume: bool = True, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Run a stage to its end, from its last checkpoint if there is one.

    Args:
        resume: otherwise the checkpoints and results of an earlier run in `output` are deleted first.
        callbacks: further ones for the trainer.

    Returns:
        the folder `final`: the whole model, or the adapter if the stage trained one; with processor and the record of
        all stages so far (`training.json`).

    Raises:
        SettingsError: the settings do not fit the model, or the run in `output` has others.
    """
    output = Path(settings.output)
    final = output / FINAL
    arguments = training_arguments(settings)
    if arguments.n_gpu > 1:
        raise SettingsError("There are several GPUs: start with `accelerate launch -m modeling_sparrow.cli train …`.")
    with arguments.main_process_first(desc="the folder of the run"):
        if arguments.should_save:
            _open_run(settings, output, resume)
    if (final / HISTORY_FILE).is_file():
        logger.info("%s: finished before", output)
        return final
    set_seed(settings.optimization.seed)
    start = load_start(settings.model, settings.dtype)
    step_samples = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    prepared = prepare_stage(settings, start, arguments.max_steps * step_samples)
    trainer = SparrowTrainer(
        model=prepared.model,
        args=arguments,
        data_collator=prepared.collate,
        train_dataset=prepared.train_data,
        eval_dataset=prepared.held_out,
        callbacks=list(callbacks),
        forward_options=prepared.forward_options,
        learning_rate_factors=prepared.learning_rate_factors,
        evaluate_model=prepared.evaluate_model,
    )
    logger.info("%s: trains %.3f M of %.2f M parameters", settings.stage, *_millions(prepared.whole))
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)))
    seconds = time.perf_counter() - began
    _write_final(settings, trainer, prepared, start, seconds)
    return final


def training_arguments(settings: AnyStage) -> TrainingArguments:
    options: Optimization = settings.optimization
    held_out = settings.held_out
    return TrainingArguments(
        output_dir=settings.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        bf16=options.precision == "bfloat16",
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        dataloader_num_workers=options.num_workers,
        train_sampling_strategy="sequential",  # sample i is a function of i, see MixtureDataset
        logging_steps=options.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=options.save_every,
        save_total_limit=options.keep_checkpoints,
        eval_strategy="no" if held_out is None else "steps",
        eval_steps=None if held_out is None else held_out.every,
        ddp_find_unused_parameters=True,  # a batch without tokens leaves the token heads out
        remove_unused_columns=False,
        report_to=["tensorboard"],
        save_only_model=False,
    )


def _open_run(settings: AnyStage, output: Path, resume: bool):
    """Make the folder, or check that what lies there is this run."""
    if not resume:
        for path in [*output.glob("checkpoint-*"), output / FINAL]:
            shutil.rmtree(path, ignore_errors=True)
        (output / SETTINGS_FILE).unlink(missing_ok=True)
    file = output / SETTINGS_FILE
    if file.is_file():
        earlier = yaml.safe_load(file.read_text(encoding="utf-8"))
        if _fixed(earlier) != _fixed(to_plain(settings)):
            raise SettingsError(
                f"{file}: the run there has other settings. Choose another output, or start it anew with --no-resume."
            )
    with atomic_path(file) as temporary:
        temporary.write_text(yaml.safe_dump(to_plain(settings), sort_keys=False), encoding="utf-8")


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    optimization = {name: value for name, value in settings["optimization"].items() if name not in _FREE}
    return settings | {"optimization": optimization}


def _write_final(settings: AnyStage, trainer: SparrowTrainer, prepared: PreparedStage, start: Start, seconds: float):
    """Write `final` beside its place and rename it."""
    tensors = None
    if trainer.is_fsdp_enabled:  # the parameters in memory are shards
        tensors = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.args.should_save:
        whole = prepared.whole
        if tensors is not None:
            start = load_start(settings.model, settings.dtype)
            again = prepare_stage(settings, start, 1)
            assign_trained(again.model, {name: tensors[name] for name in trained_names(again.model)})
            whole = again.whole
        final = Path(settings.output) / FINAL
        temporary = final.with_name(f".{FINAL}")
        shutil.rmtree(temporary, ignore_errors=True)
        save_model(whole, start.processor, temporary)
        write_json(temporary / HISTORY_FILE, {"history": [*start.history, _record(settings, trainer, seconds)]})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        logger.info("written: %s", final)
    trainer.accelerator.wait_for_everyone()


def save_model(model: nn.Module, processor: SparrowProcessor, folder: Path):
    """Weights and configuration (of a peft model: the adapter) and processor."""
    config = model.config
    if "use_cache" not in type(config)().to_dict():  # the trainer has set it
        vars(config).pop("use_cache", None)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _record(settings: AnyStage, trainer: SparrowTrainer, seconds: float) -> dict[str, Any]:
    """What is to be known of a stage: settings, hardware, time since it was last started, last figures."""
    figures: dict[str, float] = {}
    for entry in trainer.state.log_history:
        figures |= {name: value for name, value in entry.items() if "loss" in name or name.startswith("eval_")}
    device = trainer.args.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "stage": settings.stage,
        "settings": to_plain(settings),
        "hardware": f"{trainer.args.world_size} x {hardware}, {torch.get_num_threads()} thread(s)",
        "seconds": round(seconds, 1),
        "figures": figures,
    }


def _millions(model: nn.Module) -> tuple[float, float]:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained / 1e6, sum(parameter.numel() for parameter in model.parameters()) / 1e6


def merge_stage(final: Path, folder: str | os.PathLike):
    """Write the whole model of a stage, its adapter merged in, as a folder of its own.

    Raises:
        SettingsError: the folder is there and not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder} is not empty.")
    start = load_start(str(final))
    save_model(start.model, start.processor, folder)
    write_json(folder / HISTORY_FILE, {"history": start.history})
    logger.info("written: %s", folder)
