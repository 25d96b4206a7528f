"""`SparrowTrainer`: transformers' Trainer with losses by name, exact normalisation and atomic checkpoints."""

import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from ..box_ops import cxcywh_to_xyxy, pairwise_iou
from ..modeling_sparrow import SparrowForVideoGrounding

TRAINED = "trained.safetensors"  # in a checkpoint: the tensors that are trained; the others are those of the start
_STAGING = ".saving"
FOUND = 0.5  # IoU from which a proposal covers an object


class ProposerForTraining(nn.Module):
    """The region proposer on frozen SAM2 features, as a model that a trainer can call."""

    figures = ("loss", "objectness_loss", "l1_loss", "giou_loss", "recall")

    def __init__(self, model: SparrowForVideoGrounding):
        super().__init__()
        self.mask_tracker, self.region_proposer = model.model.mask_tracker, model.model.region_proposer
        if len(self.region_proposer.objectness_heads) != 1 or model.config.proposer_config.image_size is not None:
            raise ValueError(
                "Stage 0 trains the paper's proposer, with one objectness head on the pyramid it shares with the mask "
                "tracker; this configuration is that of a released detector."
            )

    def train(self, mode: bool = True) -> "ProposerForTraining":
        super().train(mode)
        self.mask_tracker.eval()  # frozen
        return self

    def activation_checkpointing_enable(self, **options):
        """See `PreTrainedModel`; the mask tracker is frozen and keeps no activations."""
        self.region_proposer.activation_checkpointing_enable(**options)

    def count_items(self, boxes: list[torch.Tensor], **inputs) -> dict[str, int]:
        """By what each figure of a batch is divided: its boxes. Other inputs of `forward` are ignored."""
        return dict.fromkeys(self.figures, sum(len(item) for item in boxes))

    def forward(
        self,
        mask_pixel_values: torch.Tensor,
        boxes: list[torch.Tensor],
        num_items: dict[str, float | torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            mask_pixel_values: `(F, 3, S, S)`.
            boxes: per picture `(N, 4)` normalised cxcywh.
            num_items: as in `SparrowForVideoGrounding.forward`.

        Returns:
            `loss`, and by name the losses of the last decoder layer; in evaluation also `recall`, the share of the
            boxes that a proposal covers.
        """
        with torch.no_grad():
            levels = list(self.mask_tracker.encode_frames(mask_pixel_values).levels)
        output = self.region_proposer(levels)
        losses = self.region_proposer.loss(output, boxes)  # divided by the boxes of this call
        names = {"objectness_loss": "loss_ce", "l1_loss": "loss_bbox", "giou_loss": "loss_giou"}
        figures = {"loss": losses["loss"]} | {name: losses[own] for name, own in names.items()}
        own = max(sum(len(item) for item in boxes), 1)
        if not self.training:
            figures["recall"] = self._count_found(output, boxes) / own
        num_items = dict.fromkeys(figures, own) if num_items is None else num_items
        return {name: value * (own / num_items[name]) for name, value in figures.items()}

    def _count_found(self, output, boxes: list[torch.Tensor]) -> torch.Tensor:
        """How many boxes a kept proposal overlaps by more than half."""
        proposals = self.region_proposer.select(output)
        found = [
            (pairwise_iou(cxcywh_to_xyxy(own), proposed[valid]) > FOUND).any(-1).sum()
            for own, proposed, valid in zip(boxes, proposals.boxes, proposals.valid, strict=True)
        ]
        return torch.stack(found).sum().float()


class SparrowTrainer(Trainer):
    """Trains a model whose `forward` returns named losses and whose `count_items` says by what they are divided.

    - Every loss is a sum divided by the count of the whole step, over all processes and micro-batches: how a step is
      split does not change it.
    - Losses are logged by name, with seconds per step and memory.
    - A checkpoint appears whole or not at all. It holds the tensors that are trained, as safetensors, and the state of
      optimizer, schedule and random numbers; the frozen tensors are those of the start.

    Args:
        forward_options: passed to every `forward`.
        learning_rate_factors: how much faster parameters learn whose name contains a word.
        evaluate_model: figures beside the losses, called with the model in evaluation mode.
    """

    loss_is_scaled_for_ga = True  # by `_get_num_items_in_batch`

    def __init__(
        self,
        *args,
        forward_options: dict[str, Any] | None = None,
        learning_rate_factors: dict[str, float] | None = None,
        evaluate_model: Callable[[nn.Module], dict[str, float]] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.forward_options, self.evaluate_model = forward_options or {}, evaluate_model
        self.learning_rate_factors = learning_rate_factors or {}
        self._losses: dict[str, torch.Tensor] = {}
        self._skipped = 0
        self._last_log = (time.perf_counter(), 0)  # moment, step
        self._staging: str | None = None

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.learning_rate_factors:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(self._parameter_groups(self.model if model is None else model), **options)
        return super().create_optimizer(model)

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Trained parameters by learning rate and weight decay, which vectors do not get."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                factors = [factor for word, factor in self.learning_rate_factors.items() if word in name]
                decay = self.args.weight_decay if parameter.dim() > 1 else 0.0
                groups.setdefault((self.args.learning_rate * math.prod(factors), decay), []).append(parameter)
        return [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in sorted(groups.items())]

    # ------------------------------------------------------------------ losses

    def _count(self, batch: dict[str, Any]) -> dict[str, int]:
        return base_model(self.accelerator.unwrap_model(self.model)).count_items(**batch)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> dict[str, torch.Tensor]:
        """Counts of a whole step, by the name of the loss."""
        counts = [self._count(batch) for batch in batch_samples]
        names = sorted(counts[0])
        totals = torch.tensor([sum(count[name] for count in counts) for name in names], dtype=torch.float32)
        totals = self.accelerator.reduce(totals.to(device), reduction="sum").clamp(min=1)
        return dict(zip(names, totals, strict=True))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        self._skipped += int(inputs.pop("num_skipped", 0))
        outputs = model(**inputs, **self.forward_options, num_items=num_items_in_batch)
        for name, value in named_losses(outputs).items():
            self._losses[name] = self._losses.get(name, 0.0) + value.detach()
        # gradients are averaged over processes, and every process divides by the count of all of them
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "grad_norm" in logs:  # of training
            now, (moment, step) = time.perf_counter(), self._last_log
            steps = max(self.state.global_step - step, 1)
            self._last_log = (now, self.state.global_step)
            logs |= {name: value / steps for name, value in self._sum_over_processes(self._losses).items()}
            logs |= {"seconds_per_step": (now - moment) / steps, "memory_gib": memory_gib(self.args.device)}
            if self._skipped:
                logs["records_skipped"] = self._skipped
            self._losses = {}
        super().log(logs, start_time)

    def _sum_over_processes(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sums by name; a process may lack losses that another has."""
        names = sorted({name for own in self._gather_names(list(values)) for name in own})
        if not names:
            return {}
        totals = torch.stack([torch.as_tensor(values.get(name, 0.0), device=self.args.device) for name in names])
        return dict(zip(names, self.accelerator.reduce(totals.float(), reduction="sum").tolist(), strict=True))

    def _gather_names(self, names: list[str]) -> list[list[str]]:
        if self.accelerator.num_processes == 1:
            return [names]
        gathered: list[list[str]] = [[] for _ in range(self.accelerator.num_processes)]
        torch.distributed.all_gather_object(gathered, names)
        return gathered

    # ------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Losses on the held-out samples, divided by the count of all of them, and the figures of `evaluate_model`."""
        model = self.model
        was_training = model.training
        model.eval()
        sums: dict[str, torch.Tensor] = {}
        for batch in self.get_eval_dataloader(eval_dataset):
            batch = self._prepare_inputs(dict(batch))
            batch.pop("num_skipped", None)
            counts = self._count(batch)
            outputs = model(**batch, **self.forward_options, num_items=dict.fromkeys(counts, 1))
            figures = named_losses(outputs) | {"loss": outputs["loss"]}
            figures |= {f"{name} items": torch.tensor(float(count)) for name, count in counts.items()}
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + value.to(self.args.device)
        sums = self._sum_over_processes(sums)
        means = {name: sums[name] / max(sums[f"{name} items"], 1) for name in sums if f"{name} items" in sums}
        weights = self.forward_options.get("loss_weights")
        if weights is not None:
            means["loss"] = sum(weight * means.get(name, 0.0) for name, weight in weights.items())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        if self.evaluate_model is not None:
            with self.accelerator.autocast():
                figures = self.evaluate_model(model)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        model.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._last_log = (time.perf_counter(), self.state.global_step)  # evaluation is not part of a step
        return metrics

    # ------------------------------------------------------------------ checkpoints

    def _get_output_dir(self, trial) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """Written beside its place and renamed when complete."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        staging = folder.parent / _STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(staging / folder.name, folder)
            staging.rmdir()
            rotate_checkpoints(output_dir=folder.parent, save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if not self.args.should_save:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        tensors = model.state_dict() if state_dict is None else state_dict
        names = trained_names(model)
        save_file({name: tensors[name].contiguous() for name in names}, Path(output_dir) / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        tensors = load_file(Path(resume_from_checkpoint) / TRAINED)
        assign_trained(self.accelerator.unwrap_model(self.model if model is None else model), tensors)


def base_model(model: nn.Module) -> nn.Module:
    """The model inside an adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@torch.no_grad()
def assign_trained(model: nn.Module, tensors: dict[str, torch.Tensor]):
    """Put trained tensors into a model.

    Raises:
        ValueError: they are not those that the model trains.
    """
    parameters, expected = dict(model.named_parameters()), set(trained_names(model))
    if odd := sorted(expected ^ set(tensors)):
        raise ValueError(f"The checkpoint has other tensors than this model trains, for example {odd[0]}.")
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def named_losses(outputs: Any) -> dict[str, torch.Tensor]:
    """Scalars of an output by name, without their weighted sum where it has parts of its own."""
    scalars = {name: value for name, value in outputs.items() if torch.is_tensor(value) and value.dim() == 0}
    return {name: value for name, value in scalars.items() if name != "loss"}


def memory_gib(device: torch.device) -> float:
    """Largest memory so far: of the device, or of the process where there is no other."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
