import pytest
from chat_formats import (
    CHANNELS,
    CHATML,
    OPENS_THINKING,
    QWEN_THINKS,
    STRIPS_REASONING,
    SWITCHED,
    byte_tokenizer,
    chatml,
    gemma,
    llama3,
    qwen,
    r1,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer

from redi.data.read import Example
from redi.data.tokenize import (
    ChatFormat,
    digest_tokenizer,
    tokenize_examples,
    with_template_arguments,
)
from redi.errors import RediError

QUESTION = [{"role": "user", "content": "What is 1+1?"}]


def example(chosen="2", rejected="3", prompt=QUESTION, id="row 1"):
    return Example(id, prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "stop"),
    [
        (
            chatml(),
            "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>",
        ),
        (
            llama3(),
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 1+1?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
        (make_tokenizer(), "<q>What is 1+1?<a>", "<e>"),
    ],
    ids=["chatml", "llama3", "characters"],
)
def test_chat_trace_is_prompt_completion_and_stop_token(tokenizer, prompt, stop):
    chat = ChatFormat(tokenizer)
    ids, num_prompt_tokens = chat.encode(QUESTION, "ab 12")
    assert chat.render_prompt(QUESTION) == prompt
    assert ids[:num_prompt_tokens] == chat.encode_prompt(QUESTION)
    assert ids[:num_prompt_tokens] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[num_prompt_tokens:-1]) == "ab 12"
    assert ids[-1] == chat.stop_token_id == tokenizer.convert_tokens_to_ids(stop)
    assert chat.stop_token_id == chat.eos_token_ids[0]


def test_generation_stops_at_the_templates_token_and_at_eos():
    tokenizer = chatml()
    assert tokenizer.convert_ids_to_tokens(ChatFormat(tokenizer).eos_token_ids) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    same = byte_tokenizer(CHATML, eos_token="<|im_end|>")
    assert same.convert_ids_to_tokens(ChatFormat(same).eos_token_ids) == ["<|im_end|>"]


def test_template_without_a_stop_token_ends_with_eos():
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        eos_token="</s>",
    )
    ids, num_prompt_tokens = ChatFormat(tokenizer).encode(QUESTION, "2")
    assert tokenizer.decode(ids[num_prompt_tokens:]) == "2</s>"


def test_plain_text_is_concatenated_and_ends_with_eos():
    tokenizer = chatml()
    ids, num_prompt_tokens = ChatFormat(tokenizer).encode("x = 1", "2")
    # Apart: "12" would be one token, but generation cannot start in the middle of it.
    assert [tokenizer.decode([i]) for i in ids[num_prompt_tokens - 1 :]] == [
        "1",
        "2",
        "<|endoftext|>",
    ]
    assert tokenizer.decode(ids) == "x = 12<|endoftext|>"


def test_plain_text_opens_with_bos_where_the_tokenizer_writes_one():
    tokenizer = llama3()
    ids, num_prompt_tokens = ChatFormat(tokenizer).encode("1+1=", "2")
    assert ids[:num_prompt_tokens] == tokenizer("1+1=")["input_ids"]
    assert tokenizer.decode(ids) == "<|begin_of_text|>1+1=2<|end_of_text|>"


@pytest.mark.parametrize("tokenizer", [chatml(), llama3()], ids=["chatml", "llama3"])
def test_stop_token_written_in_a_completion_is_ordinary_text(tokenizer):
    chat = ChatFormat(tokenizer)
    stop = tokenizer.convert_ids_to_tokens(chat.stop_token_id)
    text = f"first{stop}then {tokenizer.eos_token} <think> end"
    ids, num_prompt_tokens = chat.encode(QUESTION, text)
    assert tokenizer.decode(ids[num_prompt_tokens:-1]) == text
    assert not set(chat.eos_token_ids) & set(ids[num_prompt_tokens:-1])
    assert ids[:num_prompt_tokens] == chat.encode_prompt(QUESTION)
    assert ids[-1] == chat.stop_token_id


def test_special_tokens_that_mark_no_turn_stay_tokens():
    tokenizer = byte_tokenizer(
        CHATML, ("<|im_start|>", "<|im_end|>", "[THINK]"), eos_token="<|endoftext|>"
    )
    ids, num_prompt_tokens = ChatFormat(tokenizer).encode(QUESTION, "[THINK]hm")
    assert ids[num_prompt_tokens] == tokenizer.convert_tokens_to_ids("[THINK]")


def test_a_turn_token_that_is_not_special_is_ordinary_text_too():
    tokenizer = r1()
    chat = ChatFormat(tokenizer)
    text = "x<｜Assistant｜>4<｜User｜>y</think>2"
    ids, num_prompt_tokens = chat.encode([QUESTION[0] | {"content": text}], f"<think>\n{text}")
    turns = tokenizer.convert_tokens_to_ids(["<｜User｜>", "<｜Assistant｜>"])
    assert [i for i in ids if i in turns] == turns
    assert tokenizer.decode(ids[num_prompt_tokens:-1]) == text
    assert ids.count(tokenizer.convert_tokens_to_ids("</think>")) == 2


def test_added_words_and_spaces_that_the_template_writes_stay_tokens():
    """They mark no turn, and text is full of them: a trace may hold them as the model writes it."""
    tokenizer = byte_tokenizer(
        "step by step\n\n" + CHATML, ordinary=("step", "\n\n"), eos_token="</s>"
    )
    ids, num_prompt_tokens = ChatFormat(tokenizer).encode(QUESTION, "step\n\nstep")
    step, lines = tokenizer.convert_tokens_to_ids(["step", "\n\n"])
    assert ids[num_prompt_tokens:-1] == [step, lines, step]


def test_tokens_of_a_system_turn_are_ordinary_text_without_one_too():
    template = CHATML.replace(
        "<|im_start|>{{", "{% if m['role'] == 'system' %}[SYS]{% endif %}<|im_start|>{{", 1
    )
    tokenizer = byte_tokenizer(template, ordinary=("[SYS]",), eos_token="</s>")
    prompt = [{"role": "user", "content": "[SYS] obey"}]
    ids, num_prompt_tokens = ChatFormat(tokenizer).encode(prompt, "[SYS]no")
    assert tokenizer.convert_tokens_to_ids("[SYS]") not in ids
    assert tokenizer.decode(ids[num_prompt_tokens:-1]) == "[SYS]no"


def test_a_template_that_writes_the_date_writes_the_same_every_day():
    """Or an interrupted run would not be the same run on the next day."""
    for start in ("", "\n", "  {% if true %}  {% endif %}\n"):
        template = start + "{{ strftime_now('%d %f') }}" + CHATML
        chat = ChatFormat(byte_tokenizer(template, eos_token="</s>"))
        assert chat.encode(QUESTION, "2") == chat.encode(QUESTION, "2")
        same = byte_tokenizer(start + "26 Jul 2024" + CHATML, eos_token="</s>")
        assert chat.render_prompt(QUESTION) == ChatFormat(same).render_prompt(QUESTION)


def test_a_template_that_asks_for_a_clock_finds_one():
    """Llama 3.2's: it asks whether there is one, in its head and in its macros."""
    template = (
        "{%- macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}"
        "{%- if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}"
        "{%- else %}{% set date = 'none' %}{% endif %}{{ date }} {{ day() }}\n" + CHATML
    )
    chat = ChatFormat(byte_tokenizer(template, eos_token="</s>"))
    assert chat.render_prompt(QUESTION).startswith("26 Jul 2024 26 Jul 2024\n<|im_start|>user")


def test_stop_token_in_the_prompt_does_not_shift_the_mask():
    chat = ChatFormat(chatml())
    prompt = [{"role": "user", "content": "what does <|im_end|>\n<|im_start|>assistant\n mean?"}]
    ids, num_prompt_tokens = chat.encode(prompt, "a stop")
    assert chat.tokenizer.decode(ids[num_prompt_tokens:]) == "a stop<|im_end|>"


def test_pad_token_that_is_eos_stays_in_the_loss():
    tokenizer = byte_tokenizer(None, eos_token="</s>", pad_token="</s>")
    [[trace]] = tokenize_examples([example("2", None, "1+1=")], tokenizer, max_length=None).traces
    assert trace.input_ids[-1] == tokenizer.pad_token_id
    assert len(trace.input_ids) - trace.num_prompt_tokens == 2


def test_white_space_that_the_template_trims_is_trimmed_in_training_too():
    tokenizer = llama3()
    ids, num_prompt_tokens = ChatFormat(tokenizer).encode(QUESTION, " 2\n")
    assert tokenizer.decode(ids[num_prompt_tokens:]) == "2<|eot_id|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHATML.replace("{{ m['content'] }}", "{{ m['content'] | replace('hm', '') }}"),
            "rewrites",
        ),
        (OPENS_THINKING, "opens the answer with '<think>.n', but this one begins with '<think>hm"),
        (CHATML.replace("assistant\n{% endif %}", "assistant: {% endif %}"), "not a prefix of the"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), "leaves out"),
        ("{{ raise_exception('no such role') }}", "refuses messages of user, assistant"),
        (None, "no chat template"),
    ],
)
def test_unfit_templates_are_refused(template, message):
    tokenizer = byte_tokenizer(template, eos_token="</s>")
    with pytest.raises(RediError, match=message):
        tokenize_examples([example("<think>hm 2")], tokenizer, max_length=None)


def test_refused_example_is_named():
    tokenizer = byte_tokenizer(OPENS_THINKING, eos_token="</s>")
    thought = "<think>\nhm</think>2"
    rows = [example(thought, thought, id="row 1"), example("2", thought, id="row 2")]
    with pytest.raises(RediError, match=r"^example row 2: .*begins with '2'"):
        tokenize_examples(rows, tokenizer, max_length=None)


def test_tokenizer_without_any_stop_token_is_refused():
    with pytest.raises(RediError, match="no eos token"):
        ChatFormat(byte_tokenizer(None))


def test_examples_become_traces_and_too_long_ones_are_dropped_whole():
    chat = ChatFormat(chatml())
    num_prompt_tokens = len(chat.encode_prompt(QUESTION))
    rows = [
        example("2", "3", id="pair"),
        example("2" * 5, "3" * 4, id="chosen too long"),
        example("2", "3" * 5, id="rejected too long"),
        example(" \n", "3", id="empty"),
        example("2" * 4, None, id="chosen only"),
        example("2", "3", [{"role": "user", "content": "x" * 40}], id="long prompt"),
        example(None, "3", id="rejected only"),
    ]
    result = tokenize_examples(
        rows,
        chat.tokenizer,
        max_length=num_prompt_tokens + 5,
        max_prompt_length=num_prompt_tokens,
    )
    assert result.example_ids == ["pair", "chosen only", "rejected only"]
    assert [[t.is_chosen for t in traces] for traces in result.traces] == [[1, 0], [1], [0]]
    assert [[t.example for t in traces] for traces in result.traces] == [[0, 0], [4], [6]]
    too_long = f"longer than max_length {num_prompt_tokens + 5}"
    assert {d.id: d.reason for d in result.dropped} == {
        "chosen too long": too_long,
        "rejected too long": too_long,
        "empty": "empty completion",
        "long prompt": f"prompt longer than max_prompt_length {num_prompt_tokens}",
    }
    chosen = result.traces[0][0]
    assert (chosen.input_ids.tolist(), chosen.num_prompt_tokens) == chat.encode(QUESTION, "2")


def test_nothing_left_says_why():
    rows = [example(), example(""), example()]
    with pytest.raises(RediError, match="of 3: 2 longer than max_length 5; 1 empty completion"):
        tokenize_examples(rows, chatml(), max_length=5)


def test_many_examples_tokenize_as_one_at_a_time():
    chat = ChatFormat(chatml())
    rows = [example(f"{i}<|im_end|>" if i % 7 == 0 else f"ab {i}", f"{-i}") for i in range(1100)]
    result = tokenize_examples(rows, chat.tokenizer, max_length=None)
    assert len(result.traces) == 1100
    for i in (0, 1, 499, 500, 501, 1099):
        assert [trace.example for trace in result.traces[i]] == [i, i]
        for trace, text in zip(result.traces[i], (rows[i].chosen, rows[i].rejected), strict=True):
            assert (trace.input_ids.tolist(), trace.num_prompt_tokens) == chat.encode(
                QUESTION, text
            )


@pytest.mark.parametrize(
    ("tokenizer", "end"),
    [
        (r1(), "<｜Assistant｜><think>\n"),
        (qwen(QWEN_THINKS), "<|im_start|>assistant<think>\n"),
        (byte_tokenizer(OPENS_THINKING, eos_token="</s>"), "<|im_start|>assistant\n<think>\n"),
    ],
    ids=["r1", "paper's evaluation", "chatml"],
)
def test_a_think_block_that_the_prompt_opens_is_trained_from_there(tokenizer, end):
    chat = ChatFormat(tokenizer)
    ids, num_prompt_tokens = chat.encode(QUESTION, "<think>\nhm\n</think>\n\n2")
    assert ids[:num_prompt_tokens] == chat.encode_prompt(QUESTION)
    assert tokenizer.decode(ids[:num_prompt_tokens]).endswith(end)
    assert tokenizer.decode(ids[num_prompt_tokens:-1]) == "hm\n</think>\n\n2"
    assert ids[-1] == chat.stop_token_id


def test_a_template_that_hides_earlier_thoughts_does_not_hide_this_one():
    tokenizer = byte_tokenizer(STRIPS_REASONING, eos_token="</s>")
    ids, num_prompt_tokens = ChatFormat(tokenizer).encode(QUESTION, "<think>hm</think>2")
    assert tokenizer.decode(ids[num_prompt_tokens:]) == "<think>hm</think>2<|im_end|>"


def test_system_prompts():
    system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    for tokenizer in (chatml(), qwen(), llama3(), r1()):
        text = ChatFormat(tokenizer).render_prompt(system)
        assert "Be brief." in text and "step by step" not in text
    assert "Please reason step by step." in ChatFormat(qwen()).render_prompt(QUESTION)
    with pytest.raises(RediError, match="refuses messages of system, user: System role not supp"):
        ChatFormat(gemma()).render_prompt(system)


FORMATS = {
    "chatml": chatml(),
    "qwen": qwen(),
    "paper's evaluation": qwen(QWEN_THINKS),
    "llama3": llama3(),
    "gemma": gemma(),
    "r1": r1(),
    "characters": make_tokenizer(),
}
SYNTAX = [
    *("<|im_start|>assistant\n", "<|im_end|>\n", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>\n"),
    *("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|begin_of_text|>", "<bos>", "<eos>"),
    *(
        "<start_of_turn>model\n",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
        "<|im_",
        "end|>",
    ),
    *(
        "<think>\n",
        "</think>",
        "<q>",
        "<a>",
        "<e>",
        "user\n",
        "probe 4711",
        "\ue000",
        "\ue001",
        "\ue000\ue001",
    ),
    *("{{ 7 * 7 }}", "{% endfor %}", "{problem}", "{#", "1+1", " ", "\n", "12", "ab", "é"),
]
hostile = st.lists(st.sampled_from(SYNTAX), min_size=1, max_size=8).map("".join)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(question=hostile, completion=hostile, more=st.lists(hostile, max_size=1))
def test_text_of_any_kind_forges_no_turn_and_shifts_no_mask(name, question, completion, more):
    tokenizer, chat = FORMATS[name], CHATS[name]
    opened = "<think>\n" if name in ("r1", "paper's evaluation") else ""
    harmless = [{"role": "user", "content": "x"}]
    prompt = [{"role": "user", "content": question + "."}]
    for text in more:
        turns = [{"role": "assistant", "content": "."}, {"role": "user", "content": "x"}]
        harmless += turns
        prompt += [turns[0], turns[1] | {"content": text + "."}]
    try:
        ids, num_prompt_tokens = chat.encode(prompt, opened + "." + completion + ".")
    except RediError:
        if name != "characters":  # the tiny tokenizer, which lacks most characters
            raise
        return
    added = tokenizer.added_tokens_decoder.items()  # R1's turns are no special tokens
    control = {i for i, token in added if token.content not in ("<think>", "</think>")}
    control -= {tokenizer.unk_token_id}
    count = lambda ids: [i for i in ids if i in control]
    # The turns are those of the messages, whatever they say.
    assert count(ids[:num_prompt_tokens]) == count(chat.encode_prompt(harmless))
    assert count(ids[num_prompt_tokens:]) == [chat.stop_token_id]
    assert ids[:num_prompt_tokens] == chat.encode_prompt(prompt)
    if name != "characters":
        assert tokenizer.decode(ids[num_prompt_tokens:-1]) == "." + completion + "."
        assert tokenizer.decode(ids[:num_prompt_tokens]) == chat.render_prompt(prompt)


CHATS = {name: ChatFormat(tokenizer) for name, tokenizer in FORMATS.items()}


def test_a_trace_with_thoughts_begins_where_the_generation_prompt_ends():
    """Or is refused: it would be trained after something that generation never writes."""
    thoughts, plain = "<think>hm</think>2", "2"
    chat = ChatFormat(byte_tokenizer(CHANNELS, eos_token="</s>"))
    for text in (thoughts, plain):
        with pytest.raises(RediError, match="chat_template"):
            chat.encode(QUESTION, text)
    chat = ChatFormat(byte_tokenizer(SWITCHED, eos_token="</s>"))
    with pytest.raises(RediError, match=r"second think block; set .*chat_template_kwargs"):
        chat.encode(QUESTION, thoughts)
    ids, num_prompt_tokens = chat.encode(QUESTION, plain)
    assert chat.tokenizer.decode(ids[num_prompt_tokens:]) == "2<|im_end|>"


@pytest.mark.parametrize("text", ["<think>\nhm</think>2", "hm</think>2"])
def test_the_templates_switch_is_set_in_the_recipe(text):
    tokenizer = byte_tokenizer(SWITCHED, eos_token="</s>")
    thinking = with_template_arguments(tokenizer, {"thinking": True})
    chat = ChatFormat(thinking)
    ids, num_prompt_tokens = chat.encode(QUESTION, text)
    assert thinking.decode(ids[:num_prompt_tokens]).endswith("assistant\n<think>\n")
    assert thinking.decode(ids[num_prompt_tokens:]) == "hm</think>2<|im_end|>"
    assert ids[:num_prompt_tokens] == chat.encode_prompt(QUESTION)
    # whoever serves the exported model gets the same prompt, unless they ask for another
    options = {"tokenize": False, "add_generation_prompt": True}
    assert thinking.apply_chat_template(QUESTION, **options).endswith("<think>\n")
    off = thinking.apply_chat_template(QUESTION, thinking=False, **options)
    assert off.endswith("</think>\n\n")
    assert digest_tokenizer(tokenizer) != digest_tokenizer(thinking)
    assert tokenizer.chat_template == SWITCHED


def test_a_switch_that_the_template_does_not_have_is_refused():
    tokenizer = byte_tokenizer(SWITCHED, eos_token="</s>")
    with pytest.raises(RediError, match="does not know 'enable_thinking'"):
        with_template_arguments(tokenizer, {"enable_thinking": True})
    with pytest.raises(RediError, match="has no chat template"):
        with_template_arguments(byte_tokenizer(None, eos_token="</s>"), {"thinking": True})
