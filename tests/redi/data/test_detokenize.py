"""Tokens' texts: joined they are the text, and each stands with the token that completes it."""

import pytest
import tiny
from chat_formats import chatml, llama3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from redi.data.detokenize import token_texts


def sentencepiece():
    """As Llama 2's: a decoded text drops the space that its first token begins with."""
    words = ["▁so", "▁the", "▁", "n", "<unk>"]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.mark.parametrize("make", [chatml, llama3, tiny.make_tokenizer])
@pytest.mark.parametrize("text", ["12+ab= 12\n", "é€😀 a\u0301", "��a�", "<|im_end|>", ""])
def test_joined_they_are_the_text(make, text):
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_spread_character_stands_at_its_last_token():
    tokenizer = chatml()
    ids = tokenizer("12€ab", add_special_tokens=False)["input_ids"]
    assert token_texts(tokenizer, ids) == ["12", "", "", "€", "ab"]
    assert token_texts(tokenizer, ids[:3]) == ["12", "", "�"]  # the end of a trace cut there


def test_bytes_that_are_no_text_do_not_wait_for_ever():
    tokenizer = chatml()
    broken = tokenizer.convert_tokens_to_ids("ÿ")  # the byte 0xff
    texts = token_texts(tokenizer, [broken] * 100)
    assert len(texts) == 100 and "".join(texts) == "�" * 100
    assert sum(map(bool, texts)) > 10


def test_spaces_that_a_token_alone_would_lose():
    tokenizer = sentencepiece()
    assert tokenizer.decode([1]) == "the"  # what makes this worth a test
    assert token_texts(tokenizer, [0, 1, 2, 3, 1]) == ["so", " the", " ", "n", " the"]
