"""Caption metrics of VideoGCG: CIDEr, METEOR, CLAIR, and the phrase similarity of its recall.

CIDEr is computed here; its tokens, and METEOR, come from `pycocoevalcap` (optional, needs Java), whose scorers are
called one by one because its all-in-one entry point insists on downloading a further model. CLAIR asks a language
model, given as any function from prompt to answer. As in the official scripts, captions are cut to 2,000 characters.
"""

import json
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

logger = logging.getLogger(__name__)

#: Function of predicted and reference captions, one reference each, that returns named numbers.
CaptionMetric = Callable[[Sequence[str], Sequence[str]], dict[str, float]]
#: A language model: prompt -> answer.
Judge = Callable[[str], str]
Tokenizer = Callable[[Sequence[str]], list[str]]

MAX_CHARACTERS = 2000
_MAX_NGRAM = 4
_SIGMA = 6.0

#: What CLAIR (Chan et al., EMNLP 2023) asks, in our words; the original wording can be passed as `template`.
CLAIR_TEMPLATE = """\
Below are captions from two sources. Judge whether both sources talk about one and the same image.
Candidate captions:
{candidates}
Reference captions:
{references}
Answer with JSON only: "score" is a number from 0 (certainly different images) to 100 (certainly the same image), \
"reason" is a short string.
"""


def cider_scores(candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """CIDEr-D of tokenised captions (Vedantam et al., CVPR 2015), as coco-caption computes "CIDEr".

    Inverse document frequencies are taken over the given references: the number depends on the whole set and is 0
    for a single sample.

    Args:
        candidates: tokens separated by spaces.
        references: one for each candidate.

    Returns:
        `(N,)` float64; the metric is the mean.

    Raises:
        ValueError: if the lengths differ or are 0.
    """
    _check(candidates, references)
    counts = [[_ngrams(text) for text in texts] for texts in (candidates, references)]
    document_frequency = Counter(ngram for ngrams in counts[1] for ngram in ngrams)
    log_documents = math.log(len(references))

    def weights(ngrams: Counter) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(_MAX_NGRAM)]
        for ngram, frequency in ngrams.items():
            idf = log_documents - math.log(max(1, document_frequency[ngram]))
            vectors[len(ngram) - 1][ngram] = frequency * idf
        return vectors

    scores = []
    for candidate, reference in zip(*counts, strict=True):
        # coco-caption measures length in bigrams.
        difference = _bigrams(candidate) - _bigrams(reference)
        penalty = math.exp(-(difference**2) / (2 * _SIGMA**2))
        similarities = [_clipped_cosine(c, r) for c, r in zip(weights(candidate), weights(reference), strict=True)]
        scores.append(10 * penalty * sum(similarities) / _MAX_NGRAM)
    return np.array(scores)


def _ngrams(text: str) -> Counter:
    words = text.split()
    return Counter(
        tuple(words[start : start + n]) for n in range(1, _MAX_NGRAM + 1) for start in range(len(words) - n + 1)
    )


def _bigrams(ngrams: Counter) -> int:
    return sum(frequency for ngram, frequency in ngrams.items() if len(ngram) == 2)


def _clipped_cosine(candidate: dict, reference: dict) -> float:
    product = sum(
        min(weight, reference[ngram]) * reference[ngram] for ngram, weight in candidate.items() if ngram in reference
    )
    norms = math.sqrt(sum(w * w for w in candidate.values())) * math.sqrt(sum(w * w for w in reference.values()))
    return product / norms if norms else 0.0


def ptb_tokenize(texts: Sequence[str]) -> list[str]:
    """Lower-case Penn Treebank tokens without punctuation, joined by spaces (CoreNLP, through `pycocoevalcap`).

    Raises:
        ImportError: if `pycocoevalcap` is not installed.
        RuntimeError: if Java is not installed.
    """
    _require_java("The PTB tokeniser")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokens = PTBTokenizer().tokenize({index: [{"caption": text}] for index, text in enumerate(texts)})
    return [tokens[index][0] for index in range(len(texts))]


def simple_tokenize(texts: Sequence[str]) -> list[str]:
    """Lower-case words and numbers, joined by spaces: close to the PTB tokens, without Java, but not comparable."""
    return [" ".join(re.findall(r"[^\W_]+(?:-[^\W_]+)*|'[a-z]+", text.lower())) for text in texts]


class Cider:
    """CIDEr of a set of captions; a [`CaptionMetric`].

    Args:
        tokens: `"ptb"` as published (needs Java), or `"simple"`, which returns the number under another name.
    """

    def __init__(self, tokens: Literal["ptb", "simple"] = "ptb") -> None:
        if tokens not in ("ptb", "simple"):
            raise ValueError(f"tokens={tokens!r}: expected 'ptb' or 'simple'")
        self.tokenize: Tokenizer = ptb_tokenize if tokens == "ptb" else simple_tokenize
        self.name = "CIDEr" if tokens == "ptb" else "CIDEr (simple tokens)"

    def __call__(self, candidates: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        _check(candidates, references)
        scores = cider_scores(self.tokenize(_cut(candidates)), self.tokenize(_cut(references)))
        return {self.name: float(scores.mean())}


class Meteor:
    """METEOR 1.5 of a set of captions (statistics pooled, not a mean of sentences); a [`CaptionMetric`].

    Raises (when called):
        ImportError: if `pycocoevalcap` is not installed.
        RuntimeError: if Java is not installed.
    """

    def __call__(self, candidates: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        _check(candidates, references)
        _require_java("METEOR")
        from pycocoevalcap.meteor.meteor import Meteor as MeteorScorer

        candidates, references = ptb_tokenize(_cut(candidates)), ptb_tokenize(_cut(references))
        scorer = MeteorScorer()
        score, _ = scorer.compute_score(
            {index: [text] for index, text in enumerate(references)},
            {index: [text] for index, text in enumerate(candidates)},
        )
        return {"METEOR": float(score)}


class Clair:
    """CLAIR of a set of captions: a language model's opinion that both texts describe one image; a [`CaptionMetric`].

    One question per caption. From the answer the first `{…}` is read as JSON and its "score" divided by 100; failing
    that, the first number (times 100 if below 1). An answer without a number is asked for again, three times in all,
    then counts 0. Published numbers used gpt-3.5-turbo at temperature 0.5 and are not repeatable: state judge,
    version, temperature and template with yours.

    Args:
        judge: any function from prompt to answer, e.g. [`LocalJudge`] or a call of an API.
        template: prompt with the fields `{candidates}` and `{references}`.
        attempts: how often an unreadable answer is asked for.
    """

    def __init__(self, judge: Judge, template: str = CLAIR_TEMPLATE, attempts: int = 3) -> None:
        self.judge, self.template, self.attempts = judge, template, attempts

    def __call__(self, candidates: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        _check(candidates, references)
        scores = [self._score(*pair) for pair in zip(_cut(candidates), _cut(references), strict=True)]
        unread = sum(score is None for score in scores)
        if unread:
            logger.warning(
                "CLAIR: no score in the judge's answers for %d of %d captions, counted 0", unread, len(scores)
            )
        return {"CLAIR": sum(score or 0.0 for score in scores) / len(scores), "CLAIR_unread": float(unread)}

    def _score(self, candidate: str, reference: str) -> float | None:
        # Not str.format: a template in the original wording holds no other braces, but captions may.
        prompt = self.template.replace("{candidates}", f"- {candidate}\n").replace("{references}", f"- {reference}\n")
        for _ in range(self.attempts):
            score = parse_clair_answer(self.judge(prompt))
            if score is not None:
                return score
        return None


def parse_clair_answer(answer: str) -> float | None:
    """Score in 0 … 1 of a judge's answer, or `None` if it names no number; see [`Clair`]."""
    match = re.search(r"\{([^}]*)\}", answer)
    if match:
        try:
            return float(json.loads(match[0])["score"]) / 100
        except (KeyError, TypeError, ValueError):
            pass  # not the JSON asked for: read the first number instead
    number = re.search(r"\d*\.?\d+", answer)
    if number is None:
        return None
    score = float(number[0])
    return score if score < 1 else score / 100


class LocalJudge:
    """A local chat model as a judge for [`Clair`]: greedy decoding, at most 100 new tokens.

    Args:
        model: name or folder of a causal language model with a chat template.
        device: where to run it.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).eval()

    def __call__(self, prompt: str) -> str:
        inputs = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=100, do_sample=False)
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class BertSimilarity:
    """Cosine of the mean-pooled last hidden states of two phrases, special tokens included.

    The published recall uses bert-base-uncased.

    Args:
        model: name or folder of an encoder.
        device: where to run it.
    """

    def __init__(self, model: str = "bert-base-uncased", device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModel.from_pretrained(model).to(device).eval()
        self._embeddings: dict[str, np.ndarray] = {}

    def __call__(self, first: str, second: str) -> float:
        return float(self._embed(first) @ self._embed(second))

    def _embed(self, phrase: str) -> np.ndarray:
        import torch

        if phrase not in self._embeddings:
            inputs = self.tokenizer(phrase, return_tensors="pt", truncation=True, max_length=512).to(self.model.device)
            with torch.inference_mode():
                embedding = self.model(**inputs).last_hidden_state[0].float().mean(0).cpu().numpy()
            self._embeddings[phrase] = embedding / max(np.linalg.norm(embedding), np.finfo(np.float32).tiny)
        return self._embeddings[phrase]


def _cut(texts: Sequence[str]) -> list[str]:
    return [text[:MAX_CHARACTERS] for text in texts]


def _check(candidates: Sequence[str], references: Sequence[str]) -> None:
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"{len(candidates)} captions for {len(references)} references: expected as many, at least one"
        )


def _require_java(what: str) -> None:
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs pycocoevalcap: pip install 'sparrow-video-grounding[eval]'") from error
    if shutil.which("java") is None:
        raise RuntimeError(f"{what} runs on Java, which was not found: install a Java runtime, 8 or later")
