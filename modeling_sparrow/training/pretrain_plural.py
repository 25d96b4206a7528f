"""From scratch, one object or several: the head of the filter that tells which a [BOX] embedding means.

Stage "plural" comes when the language model answers, and leaves everything else as it is.
"""

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sparrow_processing import SparrowProcessor
from sparrow_processing.synthetic import PRESETS, SyntheticClip, WorldConfig

from ..modeling_sparrow import SparrowForVideoGrounding
from .loop import computes_in_bfloat16, run_stage
from .packed_questions import draw_questions
from .pretrain_language import LanguageSide, language_states
from .pretrain_segmenter import PixelSide, batch_clips
from .pretrain_towers import as_seen

STREAM = 10  # added to the seed of a run, so that it sees no clips of the other stages


def plural_step(
    step: int, side: LanguageSide, worlds: list[WorldConfig], clips: int, seed: int
) -> dict[str, torch.Tensor]:
    """Whether a [BOX] embedding means several objects, on questions half of which do; the embeddings stay."""
    rng = np.random.default_rng([seed, step])
    batch = batch_clips(step, clips, seed, worlds[step % len(worlds)])
    meant, logits = _plural_logits(side, batch, rng, favoured=("multi",))
    return {"loss": F.binary_cross_entropy_with_logits(logits, meant.float())}


def _plural_logits(
    side: LanguageSide, batch: list[SyntheticClip], rng: np.random.Generator, favoured: tuple[str, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of questions about some clips, whether they mean several objects, and the logits of the head."""
    questions = draw_questions(side.processor, batch, 12, rng, lambda clip, item: bool(item.target_ids), favoured)
    watched = [as_seen(clip, side.model.config.num_frames) for clip in batch]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bfloat16()):
        states = language_states(side, watched, questions, with_video=True)
    tokens = side.box_head(states.box.float()).detach()
    meant = torch.tensor([len(question.targets) > 1 for question in questions])
    return meant, side.filtration_head.plural_logits(tokens)


def evaluate_plural(
    side: LanguageSide, worlds: dict[str, WorldConfig], seed: int, clips: int = 48
) -> dict[str, float]:
    """Share of embeddings that mean several objects, and of those that mean one, for which the head is right."""
    right: dict[str, list[bool]] = {"several": [], "one": []}
    for world in worlds.values():
        rng = np.random.default_rng(seed)
        for start in range(0, clips, 16):
            batch = batch_clips(start // 16, min(16, clips), seed + 5, world, split="validation")
            meant, logits = _plural_logits(side, batch, rng, favoured=("multi",))
            for name, own in (("several", meant), ("one", ~meant)):
                right[name] += ((logits > 0) == meant)[own].tolist()
    return {f"val_{name}": float(np.mean(values)) for name, values in right.items()}


def train_plural_stage(
    model: SparrowForVideoGrounding,
    processor: SparrowProcessor,
    output: Path,
    world_names: list[str],
    steps: int,
    clips: int,
    seed: int = 0,
):
    """Stage "plural": the head that tells from the [BOX] embedding whether it means several objects, and it alone."""
    seed += STREAM
    torch.manual_seed(seed)
    worlds = {name: PRESETS[name] for name in world_names}
    model.requires_grad_(False)
    side = LanguageSide(model, processor, PixelSide(model, worlds[world_names[0]])).eval()
    head = side.filtration_head.plural_head.requires_grad_(True)
    run_stage(
        "plural",
        head,
        functools.partial(plural_step, side=side, worlds=list(worlds.values()), clips=clips, seed=seed),
        output=output,
        steps=steps,
        learning_rate=3e-3,
        warmup=10,
        evaluate=functools.partial(evaluate_plural, side, worlds, seed),
        evaluate_every=100,
    )
