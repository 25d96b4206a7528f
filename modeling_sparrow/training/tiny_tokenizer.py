"""Word-level tokenizer of sparrow-tiny: the words of the generated world and of the prompts, nothing else."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparrow_processing.processing_sparrow import BOX_TOKEN, SEG_TOKEN, TASK_PROMPTS, TSF_TOKEN, VIDEO_TOKEN
from sparrow_processing.synthetic import VOCABULARY
from sparrow_processing.synthetic.answers import ONE_ANSWER

SPECIAL_TOKENS = [
    "<pad>",
    "<unk>",
    "<|end|>",
    BOX_TOKEN,
    SEG_TOKEN,
    VIDEO_TOKEN,
    TSF_TOKEN,
    "<|user|>",
    "<|assistant|>",
    "<p>",
    "</p>",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %} {{ message.content }}"
    "{% else %}{% for item in message.content %}"
    "{% if item.type == 'video' %} <video>"
    "{% elif item.type == 'tracked_features' %} <tsf>"
    "{% else %} {{ item.text }}{% endif %}{% endfor %}{% endif %} <|end|>"
    "{% endfor %}{% if add_generation_prompt %} <|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one id per word; words it does not know are `<unk>`, capitals are lowered."""
    splitter = pre_tokenizers.Whitespace()
    sentences = [*VOCABULARY, *TASK_PROMPTS.values(), ONE_ANSWER, "frames : ( , ) and the a in of"]
    sentences += ["there is no such object ."]  # what earlier checkpoints answer
    sentences += [str(number) for number in range(17)]
    words = {word for sentence in sentences for word, _ in splitter.pre_tokenize_str(sentence.lower())}
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS + sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
