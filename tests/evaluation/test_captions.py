"""CIDEr, CLAIR and phrase similarity without Java and without downloads."""

import builtins
import json
import math

import numpy as np
import pytest

from modeling_sparrow.evaluation import BertSimilarity, Cider, Clair, LocalJudge, Meteor
from modeling_sparrow.evaluation.captions import cider_scores, parse_clair_answer, simple_tokenize


def test_cider_by_hand():
    # Two samples with no common word: every n-gram of a reference has idf log 2.
    references = ["a b", "c d"]
    perfect = cider_scores(references, references)
    # Only 1- and 2-grams exist: the similarities of 3- and 4-grams are 0.
    assert perfect == pytest.approx([5.0, 5.0])
    half = cider_scores(["a x", "c d"], references)
    # 1-grams: idf of "x" is log 2 as well, so the cosine is 1/2; 2-grams: nothing in common.
    assert half[0] == pytest.approx(10 * 0.5 / 4)
    longer = cider_scores(["a b b b b", "c d"], references)[0]
    assert longer < perfect[0] * math.exp(-(3**2) / (2 * 36)) + 1e-9  # three bigrams too many


def test_cider_depends_on_the_set():
    assert cider_scores(["a b c d"], ["a b c d"]).tolist() == [0.0]
    assert cider_scores(["", "a b"], ["", "a b"])[0] == 0.0
    with pytest.raises(ValueError, match="2 captions for 1 references"):
        cider_scores(["a", "b"], ["a"])


def test_simple_tokens_and_name():
    assert simple_tokenize(["A man's dog runs, fast!"]) == ["a man 's dog runs fast"]
    captions = ["A dog runs.", "Two cats sleep."]
    assert list(Cider(tokens="simple")(captions, captions)) == ["CIDEr (simple tokens)"]
    with pytest.raises(ValueError, match="tokens='words'"):
        Cider(tokens="words")


def test_captions_are_cut_to_2000_characters():
    seen = []
    judge = Clair(lambda prompt: seen.append(prompt) or '{"score": 50}')
    judge(["x" * 5000], ["y" * 5000])
    assert seen[0].count("x") < 2100 and "y" * 2000 in seen[0] and "y" * 2001 not in seen[0]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('Sure: {"score": 85, "reason": "same"} and more {"score": 1}', 0.85),
        ('{"score": "70", "reason": ""}', 0.7),
        ('{"score": 0.9}', 0.009),  # only a bare number is taken as a fraction
        ("I would say 0.9", 0.9),
        ("Score: 40 out of 100", 0.4),
        ('{"reason": "no score, 3 objects"}', 0.03),
        ("cannot tell", None),
        ("", None),
    ],
)
def test_clair_answers(answer, score):
    assert parse_clair_answer(answer) == (None if score is None else pytest.approx(score))


def test_clair_asks_again_then_counts_zero():
    answers = iter(["?", "?", '{"score": 60}', "?", "?", "?"])
    result = Clair(lambda prompt: next(answers))(["a", "b"], ["c", "d"])
    assert result == {"CLAIR": pytest.approx(0.3), "CLAIR_unread": 1.0}


def test_clair_template():
    prompts = []
    Clair(lambda p: prompts.append(p) or "5", template="{candidates}|{references}")(["a {b}"], ["c"])
    assert prompts == ["- a {b}\n|- c\n"]


def test_missing_extra_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without_pycocoevalcap(name, *arguments, **keywords):
        if name.startswith("pycocoevalcap"):
            raise ImportError(name)
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_pycocoevalcap)
    for metric in (Cider(), Meteor()):
        with pytest.raises(ImportError, match=r"pip install 'sparrow-video-grounding\[eval\]'"):
            metric(["a"], ["b"])


@pytest.fixture
def tiny_tokenizer(tmp_path):
    """A word-level tokenizer with a chat template, saved for both model tests."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[PAD]", "[EOS]", "a", "dog", "cat", "the", "red", "car", "user", ":"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]")
    fast.chat_template = "{% for m in messages %}user : {{ m['content'] }}{% endfor %}"
    fast.save_pretrained(tmp_path / "model")
    return tmp_path / "model", len(words)


def test_bert_similarity(tiny_tokenizer):
    from transformers import BertConfig, BertModel

    folder, size = tiny_tokenizer
    config = BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    similarity = BertSimilarity(str(folder))
    assert similarity("a red car", "a red car") == pytest.approx(1.0)
    assert similarity("a red car", "the cat") == pytest.approx(similarity("the cat", "a red car"))
    assert -1.0 <= similarity("a red car", "the cat") < 1.0


def test_local_judge(tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, size = tiny_tokenizer
    config = LlamaConfig(
        **{"vocab_size": size, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "max_position_embeddings": 512, "eos_token_id": 2, "pad_token_id": 1},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    judge = LocalJudge(str(folder))
    answer = judge("the dog")
    assert isinstance(answer, str) and answer == judge("the dog")
    result = Clair(judge)(["a dog"], ["a cat"])
    assert result == {"CLAIR": 0.0, "CLAIR_unread": 1.0}  # an untrained judge names no number


def test_numbers_are_plain_floats():
    scores = Cider(tokens="simple")(["a dog", "a cat"], ["a dog", "the cat"])
    assert json.dumps(scores) and not isinstance(next(iter(scores.values())), np.generic)
