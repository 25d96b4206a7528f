"""A small training loop for the from-scratch stages of sparrow-tiny: resumable, atomic, exact.

Every batch is a function of (seed, step) alone, so a run that was killed and started again ends with the weights of
an uninterrupted one.
"""

import atexit
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from tqdm import tqdm

from .tiny_model import cosine_schedule

logger = logging.getLogger(__name__)


def computes_in_bfloat16() -> bool:
    """Whether this CPU multiplies matrices in bfloat16: where it does not, torch takes fifty times as long as in
    float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def save_weights(module: nn.Module, path: Path):
    """Trained state of a module as safetensors, written to a temporary file and renamed."""
    temporary = path.with_suffix(".tmp")
    save_file({key: value.contiguous().clone() for key, value in module.state_dict().items()}, temporary)
    os.replace(temporary, path)


def load_weights(module: nn.Module, path: Path):
    module.load_state_dict(load_file(path))


def process_share() -> tuple[int, int]:
    """Rank and number of the processes that train together (`torchrun --nproc-per-node`), (0, 1) for one alone."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
        # threads of the group that still run when the interpreter ends can abort the process
        atexit.register(distributed.destroy_process_group)
    return distributed.get_rank(), distributed.get_world_size()


def share_of(clips: int) -> tuple[int, int]:
    """Rank and number of the processes that share the clips of a step.

    Raises:
        ValueError: the clips cannot be dealt out evenly.
    """
    rank, processes = process_share()
    if clips % processes:
        raise ValueError(f"{clips} clips a step cannot be dealt out evenly among {processes} processes: use fewer.")
    return rank, processes


def average_gradients(parameters: list[nn.Parameter], processes: int):
    """Give every process the mean of all processes' gradients."""
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
    distributed.all_reduce(flat)
    for parameter, own in zip(parameters, (flat / processes).split([p.numel() for p in parameters]), strict=True):
        parameter.grad = own.view_as(parameter)


def run_stage(
    name: str,
    module: nn.Module,
    training_step: Callable[[int], dict[str, torch.Tensor]],
    *,
    output: Path,
    steps: int,
    learning_rate: float,
    warmup: int = 50,
    weight_decay: float = 0.01,
    save_every: int = 100,
    log_every: int = 20,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int = 200,
) -> Path:
    """Train the parameters of `module` that require gradients; returns the file with its final weights.

    Args:
        name: of the stage; its files in `output` are `<name>.safetensors` (weights), `<name>.state` (optimizer) and
            `<name>.jsonl` (losses and figures by step, seconds of all processes together).
        training_step: called with the step, returns named losses with `loss` among them.
        evaluate: figures on held-out data, called with the module in eval mode.
    """
    rank, processes = process_share()
    output.mkdir(parents=True, exist_ok=True)
    weights, state = output / f"{name}.safetensors", output / f"{name}.state"
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    start = 0
    if state.exists():
        checkpoint = torch.load(state, weights_only=True)
        start = checkpoint["step"]
        load_weights(module, weights)
        optimizer.load_state_dict(checkpoint["optimizer"])
        logger.info("%s: resumed at step %d of %d", name, start, steps)
    began = time.perf_counter()
    with open(output / f"{name}.jsonl", "a", encoding="utf-8") as log:
        for step in tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=10):
            module.train()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * cosine_schedule(step, steps, warmup)
            losses = training_step(step)
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            if processes > 1:
                average_gradients(parameters, processes)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            done = step + 1
            if rank:
                continue
            record = {}
            if done % log_every == 0:
                record = {key: round(float(value.detach()), 4) for key, value in losses.items()}
            if evaluate is not None and (done % evaluate_every == 0 or done == steps):
                module.eval()
                with torch.no_grad():
                    record |= {key: round(float(value), 4) for key, value in evaluate().items()}
            if record:
                seconds = (time.perf_counter() - began) * processes
                record = {"step": done, "seconds": round(seconds, 1), **record}
                log.write(json.dumps(record) + "\n")
                log.flush()
            if done % save_every == 0 or done == steps:
                _save(module, optimizer, done, weights, state)
    return weights


def _save(module: nn.Module, optimizer: torch.optim.Optimizer, step: int, weights: Path, state: Path):
    save_weights(module, weights)
    temporary = state.with_suffix(".tmp")
    torch.save({"step": step, "optimizer": optimizer.state_dict()}, temporary)
    os.replace(temporary, state)
