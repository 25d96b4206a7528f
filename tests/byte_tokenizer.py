"""A tokenizer to which no text is unknown: one token per byte, and the control tokens of sparrow-tiny."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_sparrow.training.tiny_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS


def byte_tokenizer(special_tokens: list[str] = SPECIAL_TOKENS, unk_token: str | None = None):
    vocabulary = [*special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        unk_token=unk_token,
        additional_special_tokens=[token for token in special_tokens if token not in ("<pad>", "<unk>", "<|end|>")],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
