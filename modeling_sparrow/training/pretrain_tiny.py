"""Train sparrow-tiny on generated videos, stage by stage: first in a world of shapes, then in the whole one.

    python -m modeling_sparrow.training.pretrain_tiny --output runs/tiny --checkpoint runs/final

does all runs that the shipped checkpoint comes from, one after another. One of them, or one more:

    python -m modeling_sparrow.training.pretrain_tiny --recipe memory --start runs/final --seed 5 --output runs/more

With `--start` training begins with the weights of a checkpoint; words that it does not know are new. With the seed of
an earlier run in the same world it would see that run's clips again. Stages: image (segmenter, proposer, region
features), video (memory), towers, text, visual, motion, polish, plural (one object or several), and then those of the
paper, target_injection and filter, as `sparrow train tiny_…` runs them. Each can be interrupted and goes on where it
stopped; before those of the paper none needs `video`, which may run beside those after it. With `--stages video`, or
`visual`, a stage runs in several processes (`torchrun --nproc-per-node 2 -m -- …`) whose gradients are averaged.
"""

import argparse
import json
import logging
import platform
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from sparrow_processing import SparrowProcessor
from sparrow_processing.synthetic import PRESETS

from ..configuration_sparrow import FiltrationHeadConfig, SparrowConfig
from ..evaluation.files import read_json, write_json
from ..evaluation.synthetic import evaluate_synthetic
from ..modeling_sparrow import SparrowForVideoGrounding
from ..registration import DEFAULT_CHECKPOINT
from .loop import computes_in_bfloat16, process_share
from .pretrain_language import train_language_stage
from .pretrain_plural import train_plural_stage
from .pretrain_segmenter import train_image_stage, train_video_stage
from .pretrain_towers import train_tower_stage
from .run import FINAL, HISTORY_FILE, load_start, save_model
from .run import train_stage as train_paper_stage
from .settings import read_settings
from .stages import AnyStage
from .tiny_model import tiny_config
from .tiny_tokenizer import build_tokenizer

logger = logging.getLogger(__name__)

# stage: (steps, clips per step), by recipe: from random weights, and two ways to go on from a checkpoint
RECIPES = {
    "scratch": {
        "image": (1600, 16),
        "video": (700, 8),
        "towers": (900, 16),
        "text": (400, 16),
        "visual": (700, 16),
        "motion": (350, 16),
        "polish": (220, 16),
    },
    # into a larger world: every stage again
    "grow": {
        "image": (1500, 8),
        "video": (520, 8),
        "towers": (3500, 16),
        "text": (300, 8),
        "visual": (2200, 8),
        "polish": (500, 8),
    },
    # the same world for longer: the image encoder stays
    "longer": {"video": (1550, 4), "towers": (2400, 16), "visual": (2400, 6)},
    # and the towers learn along with the answers
    "answers": {"video": (900, 4), "visual": (2500, 6)},
    # the memory alone; two processes take half of the clips each
    "memory": {"video": (850, 8)},
    # the memory in one process, and one object or several
    "plural": {"video": (650, 4), "plural": (150, 6)},
    # what the towers tell, without another change, then the answers, and then the stages of the paper
    "anchors": {
        "towers": (1300, 16),
        "visual": (2050, 8),
        "plural": (150, 6),
        "target_injection": (30, 4),
        "filter": (30, 4),
    },
    # the answers once more
    "refine": {"visual": (1750, 8), "plural": (150, 6)},
}
# stages of the paper: settings of `sparrow train`; stage 0 is part of the stage image
PAPER_STAGES = {"target_injection": "tiny_target_injection", "filter": "tiny_filter"}
# what ends every run: put the weights together, choose the rules, measure the test splits
CLOSING = ("assemble", "rules", "test")
# the runs that sparrow-tiny comes from, each from what the one before gave: recipe, world, seed
RUNS = (
    ("scratch", "shapes", 0),
    ("grow", "train", 0),
    ("longer", "train", 1),
    ("longer", "train", 2),
    ("answers", "train", 3),
    ("memory", "train", 4),
    ("memory", "train", 5),
    ("plural", "train", 6),
    ("anchors", "train", 7),
    ("refine", "train", 8),
)
# learning rate of the stage video: the better the memory is, the less it should be shaken, but for a new layer
VIDEO_RATES = {"scratch": 8e-4, "grow": 6e-4, "longer": 4e-4, "answers": 4e-4, "memory": 6e-4, "plural": 4e-4}
# recipes in which the towers learn along with the answers, and at which rate
TOWERS_LEARN = {"answers": 8e-4, "anchors": 8e-4, "refine": 5e-4}
# rules of the choice among proposals and of prompting, and the values among which held-out clips choose
RULES = {
    "score_threshold": (0.5, 0.6, 0.7),
    "fallback_threshold": (0.2, 0.3, 0.4, 0.5),
    "plural_threshold": (0.3, 0.4, 0.5, 0.6),
    "num_prompt_frames": (1, 2, 4, 8),
}
# what the test splits measure, kept in training.json
TEST_SPLITS = ("test-easy", "test-hard", "test-new-words")
TEST_FIGURES = ("j_and_f", "right_object", "identity_switches", "no_target_accuracy", "multi_target_recall")
NEEDED = {
    "image": [],
    "video": ["image"],
    "towers": [],
    "text": ["image"],
    "visual": ["image", "towers", "text"],
    "motion": ["image", "towers", "text", "visual"],
    "polish": ["image", "towers", "text", "visual", "motion"],
    "plural": ["visual"],
    "target_injection": ["video", "visual", "plural"],
    "filter": ["target_injection"],
}


def new_model(seed: int, start: Path | None = None) -> tuple[SparrowForVideoGrounding, SparrowProcessor]:
    """Model and processor with random weights, or with those of the checkpoint `start`."""
    tokenizer = build_tokenizer()
    names = {
        "box_token_id": "[BOX]",
        "seg_token_id": "[SEG]",
        "video_token_id": "<video>",
        "tsf_token_id": "<tsf>",
        "pad_token_id": "<pad>",
        "eos_token_id": "<|end|>",
    }
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    torch.manual_seed(seed)
    model = SparrowForVideoGrounding(tiny_config(len(tokenizer), **ids))
    if start is not None:
        load_checkpoint(model, tokenizer, start)
    return model, SparrowProcessor.from_config(model.config, tokenizer, spatial_crop=False)


@torch.no_grad()
def load_checkpoint(model: SparrowForVideoGrounding, tokenizer: PreTrainedTokenizerBase, start: Path):
    """Put the weights of a checkpoint of the same widths into the model; the row of a word goes where the word is now.

    Raises:
        ValueError: the checkpoint lacks a weight, or has more layers.
        RuntimeError: it has one in another shape.
    """
    earlier = SparrowForVideoGrounding.from_pretrained(start)
    old_ids = SparrowProcessor.from_pretrained(start).tokenizer.get_vocab()
    shared = [(index, old_ids[word]) for word, index in tokenizer.get_vocab().items() if word in old_ids]
    new_rows, old_rows = (list(rows) for rows in zip(*shared, strict=True))
    tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    old_tables = earlier.get_input_embeddings().weight, earlier.get_output_embeddings().weight
    for table, old_table in zip(tables, old_tables, strict=True):
        table[new_rows] = old_table[old_rows]
    by_word = {name for name, value in model.named_parameters() if any(value is table for table in tables)}
    _insert_layers(earlier, model)
    weights = {name: value for name, value in earlier.state_dict().items() if name not in by_word}
    new = {name for name in model.state_dict() if ".plural_head." in name}  # older checkpoints have none
    wrong = set(model.load_state_dict(weights, strict=False).missing_keys) - by_word - new
    if wrong:
        raise ValueError(f"{start} lacks weights of sparrow-tiny, among them {sorted(wrong)[0]}.")


def _insert_layers(earlier: SparrowForVideoGrounding, model: SparrowForVideoGrounding):
    """Give `earlier` the layers that `model` has more: of the language model behind its first one, of the memory
    attention behind its last one. They add nothing to their input at first, so that it answers as before.

    Raises:
        ValueError: `model` has fewer.
    """
    old, new = earlier.model.host.language_model.model, model.model.host.language_model.model
    for layer in _extra_layers(old, new, after=1):
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    old, new = (core.model.mask_tracker.sam2.memory_attention for core in (earlier, model))
    for layer in _extra_layers(old, new, after=len(old.layers)):
        for last in (layer.self_attn.o_proj, layer.cross_attn_image.o_proj, layer.linear2):
            last.weight.zero_()
            last.bias.zero_()


def _extra_layers(old: nn.Module, new: nn.Module, after: int) -> list[nn.Module]:
    """Move the layers that `new` has more into `old`, behind its first `after`; returns them."""
    extra = len(new.layers) - len(old.layers)
    if extra < 0:
        raise ValueError(
            f"The checkpoint has {len(old.layers)} layers where sparrow-tiny has {len(new.layers)}: it cannot shrink."
        )
    inserted = list(new.layers[after : after + extra])
    old.layers = nn.ModuleList([*old.layers[:after], *inserted, *old.layers[after:]])
    return inserted


def load_stage(model: SparrowForVideoGrounding, output: Path, stage: str):
    """Put the weights that a finished stage trained into the model. Later stages see those of earlier ones."""
    weights = load_file(output / f"{stage}.safetensors")
    core = model.model
    if stage == "video":
        core.mask_tracker.load_state_dict(weights)
        return
    if stage == "plural":
        core.filtration_head.plural_head.load_state_dict(weights)
        return
    places = {
        "mask_tracker.": core.mask_tracker,
        "region_proposer.": core.region_proposer,
        "filtration_head.": core.filtration_head,
        "spatial_tower.": core.host.spatial_tower,
        "temporal_tower.": core.host.temporal_tower,
        "language_model.": core.host.language_model,
        "adapters.0.": core.host.spatial_adapter,
        "adapters.1.": core.host.temporal_adapter,
        "box_head.": core.box_head,
        "seg_head.": core.seg_head,
    }
    for prefix, part in places.items():
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if own:
            part.load_state_dict(own)


def is_finished(output: Path, stage: str, steps: int) -> bool:
    if stage in PAPER_STAGES:
        return (output / stage / FINAL / HISTORY_FILE).exists()
    state = output / f"{stage}.state"
    return state.exists() and torch.load(state, weights_only=True)["step"] >= steps


def train_stage(
    stage: str,
    output: Path,
    world: str,
    steps: int,
    clips: int,
    seed: int,
    recipe: str = "scratch",
    start: Path | None = None,
):
    """Run one stage of a recipe on top of its finished ones."""
    plan, from_scratch = RECIPES[recipe], recipe == "scratch"
    needed = [earlier for earlier in NEEDED[stage] if earlier in plan]
    for earlier in needed:
        if not is_finished(output, earlier, 0):
            raise FileNotFoundError(f"Stage {stage!r} needs stage {earlier!r}: run it first.")
    began = time.time()
    if stage in PAPER_STAGES:
        run_paper_stage(stage, output, steps, clips, seed, recipe, start)
        logger.info("%s: %d steps in %.0f s", stage, steps, time.time() - began)
        return
    model, processor = new_model(seed, start)
    for earlier in needed:
        load_stage(model, output, earlier)
    if not computes_in_bfloat16():
        logger.info("%s: this CPU has no bfloat16, so everything is float32 and takes longer", stage)
    worlds = [world] if "image" in plan else [world, "hard", "easy"]
    if stage == "image":
        train_image_stage(model, output, world, steps, clips, seed, from_scratch)
    elif stage == "video":
        train_video_stage(model, output, world, steps, clips, seed, learning_rate=VIDEO_RATES[recipe])
    elif stage == "towers":
        train_tower_stage(model, output, world, steps, clips, seed, keeps=recipe == "anchors")
    elif stage == "plural":
        train_plural_stage(model, processor, output, worlds, steps, clips, seed)
    else:
        pixel_heads = output / "image.safetensors" if "image" in plan else None
        train_language_stage(
            model,
            processor,
            output,
            stage,
            worlds,
            steps,
            clips,
            seed,
            from_scratch=from_scratch,
            pixel_heads=pixel_heads,
            with_towers=recipe in TOWERS_LEARN,
            learning_rate=5e-4 if stage == "polish" else TOWERS_LEARN.get(recipe, 1e-3),
        )
    logger.info("%s: %d steps in %.0f s", stage, steps, time.time() - began)


def run_paper_stage(stage: str, output: Path, steps: int, clips: int, seed: int, recipe: str, start: Path | None):
    """A stage of the paper on what the earlier ones gave, see [`run.train_stage`]."""
    earlier = NEEDED[stage][-1]
    model = output / earlier / FINAL
    if earlier not in PAPER_STAGES:
        model = output / "pretrained"
        save_pretrained(output, model, seed, recipe, start)
    numbers = [f"optimization.steps={steps}", f"optimization.batch_size={clips}"]
    train_paper_stage(
        read_settings(PAPER_STAGES[stage], AnyStage, [f"model={model}", f"output={output / stage}", *numbers])
    )


def save_pretrained(output: Path, folder: Path, seed: int, recipe: str = "scratch", start: Path | None = None):
    """Write model and processor from the finished stages before those of the paper."""
    model, processor = new_model(seed, start)
    for stage in RECIPES[recipe]:
        if stage not in PAPER_STAGES:
            load_stage(model, output, stage)
    if start is not None:  # its rules hold until others are chosen
        _copy_rules(SparrowConfig.from_pretrained(start), model.config)
    model.generation_config.update(do_sample=False, max_new_tokens=16)  # "it is [BOX] [SEG] ."
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def assemble(
    output: Path, checkpoint: Path, world: str, seed: int, recipe: str = "scratch", start: Path | None = None
):
    """Write the checkpoint folder from the finished stages: model, processor, and how it was made."""
    last, history = list(RECIPES[recipe])[-1], []
    if last in PAPER_STAGES:
        trained = load_start(str(output / last / FINAL))
        history = trained.history
        save_model(trained.model, trained.processor, checkpoint)
    else:
        save_pretrained(output, checkpoint, seed, recipe, start)
    record = {
        "command": "python -m modeling_sparrow.training.pretrain_tiny",
        "recipe": recipe,
        "world": world,
        "seed": seed,
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        "stages": {stage: _summary(output, stage) for stage in RECIPES[recipe]},
        "history": history,  # of the stages of the paper, as they read it
        "start": None if start is None else read_json(start / "training.json"),
    }
    write_json(checkpoint / "training.json", record)


def choose_rules(checkpoint: Path, clips: int = 64):
    """Set the rules of a checkpoint to what gives the best J&F, one after another: the mean of `clips` easy and as
    many hard clips of the validation split."""
    model = SparrowForVideoGrounding.from_pretrained(checkpoint).eval()
    processor = SparrowProcessor.from_pretrained(checkpoint)
    known: dict[tuple, float] = {}

    def score() -> float:
        setting = tuple(getattr(_owner(model.config, name), name) for name in RULES)
        if setting not in known:
            runs = [
                evaluate_synthetic(model, processor, "validation", clips, seed=1, world=PRESETS[world])
                for world in ("easy", "hard")
            ]
            known[setting] = sum(run["j_and_f"] for run in runs) / len(runs)
        return round(known[setting], 4)

    figures: dict[str, dict] = {}
    for name, values in RULES.items():
        figures[name] = {}
        for value in values:
            setattr(_owner(model.config, name), name, value)
            figures[name][value] = score()
        best = max(figures[name], key=figures[name].get)
        setattr(_owner(model.config, name), name, best)
        logger.info("%s: %s of %s", name, best, figures[name])
    config = SparrowConfig.from_pretrained(checkpoint)  # without what loading the weights has added
    _copy_rules(model.config, config)
    config.save_pretrained(checkpoint)
    history = checkpoint / "training.json"
    write_json(history, read_json(history) | {"validation_j_and_f": figures})


def measure(checkpoint: Path, clips: int = 256, seed: int = 0):
    """Write the figures of the test splits into `training.json` of a checkpoint, under `test`."""
    model = SparrowForVideoGrounding.from_pretrained(checkpoint).eval()
    processor = SparrowProcessor.from_pretrained(checkpoint)
    figures = {}
    for split in TEST_SPLITS:
        summary = evaluate_synthetic(model, processor, split, clips, seed)
        figures[split] = {name: round(summary[name], 4) for name in TEST_FIGURES if summary[name] is not None}
        logger.info("%s: %s", split, figures[split])
    history = checkpoint / "training.json"
    write_json(history, read_json(history) | {"test": figures})


def _owner(config: SparrowConfig, rule: str) -> SparrowConfig | FiltrationHeadConfig:
    """The configuration that has a rule."""
    parts = (config, config.filtration_config)
    return next(part for part in parts if hasattr(part, rule))


def _copy_rules(source: SparrowConfig, target: SparrowConfig):
    for name in RULES:
        setattr(_owner(target, name), name, getattr(_owner(source, name), name))


def _summary(output: Path, stage: str) -> dict:
    """Steps of a stage, its time over all runs, its last figures and all of them by step."""
    if stage in PAPER_STAGES:
        record = read_json(output / stage / FINAL / HISTORY_FILE)["history"][-1]
        return {
            "steps": record["settings"]["optimization"]["steps"],
            "seconds": record["seconds"],
            **record["figures"],
        }
    log = output / f"{stage}.jsonl"
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    seconds, previous = 0.0, 0.0
    for record in records:
        if record["seconds"] < previous:  # the stage was resumed
            seconds += previous
        previous = record["seconds"]
    curve = {}  # by step: what a killed run measured twice counts once
    for record in records:
        figures = {key: value for key, value in record.items() if key.startswith("val_")}
        if figures:
            curve[record["step"]] = {"step": record["step"], **figures}
    last = {key: value for figures in curve.values() for key, value in figures.items() if key != "step"}
    return {"steps": records[-1]["step"], "seconds": round(seconds + previous), **last, "curve": list(curve.values())}


def run_recipe(
    recipe: str,
    world: str,
    seed: int,
    start: Path | None,
    output: Path,
    checkpoint: Path,
    stages: list[str],
    steps_scale: float = 1.0,
):
    """Run stages of a recipe and the closing ones in their order; finished ones are passed over.

    Args:
        steps_scale: multiplies the steps of every stage.
    """
    for stage in stages:
        if stage == "assemble":
            assemble(output, checkpoint, world, seed, recipe, start)
        elif stage == "rules":
            choose_rules(checkpoint)
        elif stage == "test":
            measure(checkpoint)
        else:
            steps, clips = RECIPES[recipe][stage]
            steps = max(1, round(steps * steps_scale))
            if is_finished(output, stage, steps):
                logger.info("%s: finished before", stage)
            else:
                train_stage(stage, output, world, steps, clips, seed, recipe, start)


def run_all(output: Path, checkpoint: Path, steps_scale: float = 1.0):
    """Every run that sparrow-tiny comes from, each in a folder of its own and from what the one before gave."""
    start = None
    for number, (recipe, world, seed) in enumerate(RUNS, start=1):
        folder = output / f"{number}-{recipe}"
        made = checkpoint if number == len(RUNS) else folder / "checkpoint"
        done = (folder / "done").exists()
        logger.info("run %d of %d, recipe %s%s", number, len(RUNS), recipe, ": finished before" if done else "")
        if not done:
            run_recipe(recipe, world, seed, start, folder, made, [*RECIPES[recipe], *CLOSING], steps_scale)
            (folder / "done").touch()
        start = made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/tiny"), help="checkpoints and logs of the stages")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path(DEFAULT_CHECKPOINT), help="folder of the finished model"
    )
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies the steps of every stage")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", choices=RECIPES, help="one run instead of all; the options below go with it")
    parser.add_argument("--start", type=Path, help="checkpoint that a recipe other than scratch begins with")
    parser.add_argument("--stages", nargs="*", choices=[*NEEDED, *CLOSING], help="default: all")
    parser.add_argument("--world", choices=("shapes", "train"), help="preset of the clips, default train")
    parser.add_argument("--seed", type=int, help="default 0")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    if options.recipe is None:
        for name in ("start", "stages", "world", "seed"):
            if getattr(options, name) is not None:
                parser.error(f"--{name} goes with one --recipe, which is not named")
        run_all(options.output, options.checkpoint, options.steps_scale)
        return
    if process_share()[1] > 1 and options.stages not in (["video"], ["visual"]):
        parser.error("several processes share one stage, video or visual: add --stages video")
    plan = RECIPES[options.recipe]
    if (options.recipe == "scratch") != (options.start is None):
        parser.error("--start goes with every recipe but scratch, and these need it")
    if unknown := [stage for stage in options.stages or () if stage in NEEDED and stage not in plan]:
        parser.error(f"recipe {options.recipe} has no stage {unknown[0]}: its stages are {', '.join(plan)}")
    run_recipe(
        options.recipe,
        options.world or "train",
        options.seed or 0,
        options.start,
        options.output,
        options.checkpoint,
        options.stages or [*plan, *CLOSING],
        options.steps_scale,
    )


if __name__ == "__main__":
    main()
