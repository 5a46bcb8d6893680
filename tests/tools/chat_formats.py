"""Byte-level tokenizers with the chat templates of real families, built in a moment."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# The paper's (Qwen2.5-Math's): a default system turn; and as it edits the last line to evaluate.
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nPlease reason step by step."
    "<|im_end|>\n{% endif %}" + CHATML
)
QWEN_THINKS = QWEN.replace("assistant\n{% endif %}", "assistant<think>\n{% endif %}")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% else %}<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}<｜end▁of▁sentence｜>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
# As the templates of reasoning models do: earlier thoughts are not shown to the model again.
STRIPS_REASONING = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
# The generation prompt opens a think block that the rendered turn does not have.
OPENS_THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# gpt-oss's way: the assistant's turn names a channel, which the generation prompt leaves open.
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}"
    "<|channel|>final{% endif %}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
# DeepSeek-V3.1's and EXAONE 4's way: without thinking, the generation prompt closes the thoughts.
SWITCHED = (
    "{% if thinking is not defined %}{% set thinking = false %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'].split('</think>')[-1] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def byte_tokenizer(
    template: str | None,
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"),
    *,
    adds_bos: bool = False,
    ordinary: tuple[str, ...] = (),
    **roles: str,
) -> PreTrainedTokenizerFast:
    """A BPE of bytes with three merges; `roles` such as eos_token="</s>" are special tokens too.

    `ordinary` tokens are added without being special, as <think> and </think> are.
    """
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "ab", "Ġa"]
    merges = [("1", "2"), ("a", "b"), ("Ġ", "a")]
    bpe = models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges)
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(dict.fromkeys((*special, *roles.values()))))
    added = (*ordinary, "<think>", "</think>")
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    if adds_bos:
        bos = roles["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    tokenizer.chat_template = template
    return tokenizer


def chatml() -> PreTrainedTokenizerFast:
    """As Qwen's base models: the chat's stop token is not eos, and pad is eos."""
    return byte_tokenizer(CHATML, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def qwen(template: str = QWEN) -> PreTrainedTokenizerFast:
    return byte_tokenizer(template, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def gemma() -> PreTrainedTokenizerFast:
    special = ("<start_of_turn>", "<end_of_turn>")
    return byte_tokenizer(GEMMA, special, adds_bos=True, bos_token="<bos>", eos_token="<eos>")


def r1() -> PreTrainedTokenizerFast:
    """As the distilled models are published: the turns' tokens are not special ones."""
    names = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    ordinary = ("<｜User｜>", "<｜Assistant｜>")
    return byte_tokenizer(R1, (), adds_bos=True, ordinary=ordinary, **names)


def llama3() -> PreTrainedTokenizerFast:
    return byte_tokenizer(
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        adds_bos=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
    )
