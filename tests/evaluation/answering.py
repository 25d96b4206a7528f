"""A random checkpoint whose answers are fixed, so that benchmarks can be run from end to end."""

from itertools import pairwise
from pathlib import Path

from ..tiny import TOKENIZER, random_model, random_processor


def save_checkpoint(folder: Path, answer: str, seed: int = 0) -> Path:
    """Saves a random model that says `answer` to whatever it is asked, and its processor.

    The checkpoint itself holds the answer: each token's logit is raised after the token before it. No token may occur
    twice. The model always takes its best box, so that every [BOX] [SEG] has an object.
    """
    model = random_model(seed, filtration_config={"fallback_threshold": 0.0, "score_threshold": 1.0})
    ids = TOKENIZER.encode(f"<|assistant|> {answer} <|end|>", add_special_tokens=False)
    assert TOKENIZER.unk_token_id not in ids and len(set(ids)) == len(ids)
    model.generation_config.sequence_bias = [[list(pair), 1e4] for pair in pairwise(ids)]
    model.save_pretrained(folder)
    random_processor(model.config).save_pretrained(folder)
    return folder
