"""Write the example clips of the demo: `python spaces_demo/make_examples.py`.

Each comes from the generated world, from a seed that no model is trained on; nothing else is needed to make it again.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparrow_processing.overlays import VideoWriter
from sparrow_processing.synthetic import KINDS, PRESETS, SyntheticClip, all_expressions, generate_clip, split_seed

logger = logging.getLogger(__name__)

# name: preset of the world, and the question that the clip has to be good for
EXAMPLES = {
    "shapes": ("shapes", "the red ring"),
    "stars": ("shapes", "the green star"),
    "rabbits": ("easy", "both rabbits"),
}


def find_clip(preset: str, question: str) -> SyntheticClip:
    """First clip of the easy test split of which the question can be asked, whose targets move among others of their
    noun or colour, and in which nothing hides anything."""
    world = replace(PRESETS[preset], height=256, width=256, num_frames=32, min_objects=3, kinds=KINDS)
    for index in range(100_000):
        clip = generate_clip(split_seed("test-easy", index), world)
        if not (clip.visibility > 0.95).all():
            continue
        expressions = all_expressions(clip, np.random.default_rng(clip.seed))
        targets = next((item.target_ids for item in expressions if item.text == question), ())
        meant = [clip.objects[n] for n in targets]
        words = {word for thing in meant for word in (thing.noun, thing.colour)}
        rivals = [
            thing for n, thing in enumerate(clip.objects) if n not in targets and words & {thing.noun, thing.colour}
        ]
        if meant and rivals and all(thing.speed for thing in meant):
            return clip
    raise LookupError(f"no clip to ask for {question}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "examples")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.output.mkdir(parents=True, exist_ok=True)
    for name, (preset, question) in EXAMPLES.items():
        clip = find_clip(preset, question)
        config = clip.config
        path = options.output / f"{name}.mp4"
        with VideoWriter(path, config.width, config.height, fps=config.frames_per_second) as writer:
            for frame in clip.frames:
                writer.write(frame)
        logger.info('%s: seed %d, ask for "%s"', path.name, clip.seed, question)


if __name__ == "__main__":
    main()
