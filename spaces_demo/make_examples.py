"""Write the example clips of the demo: `python spaces_demo/make_examples.py`.

Each comes from the generated world, from a seed that no model is trained on; nothing else is needed to make it again.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from sparrow_processing.overlays import VideoWriter
from sparrow_processing.synthetic import PRESETS, SyntheticClip, generate_clip, split_seed

logger = logging.getLogger(__name__)

# name: colour and noun that one object must have, beside another object with the same noun
EXAMPLES = {"shapes": ("red", "ring"), "stars": ("green", "star")}
WORLD = replace(PRESETS["shapes"], height=256, width=256, num_frames=32, min_objects=3)


def find_clip(colour: str, noun: str) -> SyntheticClip:
    """First clip of the easy test split in which the pair occurs once, moves, and has a rival of its noun."""
    for index in range(100_000):
        clip = generate_clip(split_seed("test-easy", index), WORLD)
        named = [thing for thing in clip.objects if (thing.colour, thing.noun) == (colour, noun)]
        rivals = [thing for thing in clip.objects if thing.noun == noun and thing.colour != colour]
        if len(named) == 1 and rivals and named[0].speed and (clip.visibility > 0.5).all():
            return clip
    raise LookupError(f"no clip with a {colour} {noun} and another {noun}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "examples")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.output.mkdir(parents=True, exist_ok=True)
    for name, (colour, noun) in EXAMPLES.items():
        clip = find_clip(colour, noun)
        path = options.output / f"{name}.mp4"
        with VideoWriter(path, WORLD.width, WORLD.height, fps=WORLD.frames_per_second) as writer:
            for frame in clip.frames:
                writer.write(frame)
        logger.info('%s: seed %d, ask for "the %s %s"', path.name, clip.seed, colour, noun)


if __name__ == "__main__":
    main()
