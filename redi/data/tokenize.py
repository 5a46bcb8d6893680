"""Examples to token ids: the model's chat template, the prompt's length, the stop token.

The mask is a position: a trace is prompt ids, completion ids, stop id, and everything from
`num_prompt_tokens` on is trained, the stop token included. Pad ids play no part in it.
"""

import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from redi.data.read import Example, Message, Prompt
from redi.errors import RediError

_MOST_CHARACTERS = 16  # of a token, nearly always; real text has 3 to 5
_CHUNK = 500  # examples per tokenizer call: enough for its threads, little enough for memory
_PROBE = "probe 4711"
_THINK = {"<think>", "</think>"}  # traces hold them
_WORDS = re.compile(r"[\w\s]*")  # no mark of a turn, though somebody made a token of it
# Put before a template that asks for the date: the same tokens on every day. A clock given as a
# keyword does not reach the template, transformers makes plain data of those.
_PINNED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"
_CLOSED = re.compile(r"</think>\s*\Z")  # and what they end it with when they are not to think
_GENERATION_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_OPENED = re.compile(r"<think>\s*\Z")  # what templates of reasoning models end the prompt with


@dataclass(frozen=True)
class Trace:
    """One prompt with one completion, as the model is trained on it."""

    input_ids: np.ndarray  # int32: prompt, completion, stop token
    num_prompt_tokens: int
    is_chosen: bool
    example: int  # index into the examples given
    ref_logp: float | None = None  # DPO: the reference model's log-prob, summed (dpo_reference.py)
    pushed: tuple[int, int] | None = None  # rejected: which tokens REDI pushes down; None: all


@dataclass(frozen=True)
class Dropped:
    id: str
    reason: str


@dataclass(frozen=True)
class Tokenized:
    traces: list[list[Trace]]  # for each kept example: chosen, then rejected; one may be missing
    example_ids: list[str]  # ids of the kept examples
    dropped: list[Dropped]


# What templates that name no roles are made for.
_ROLES = {"system", "developer", "user", "assistant", "tool"}


class ChatFormat:
    """How one tokenizer turns a prompt and a completion into ids.

    Chat messages are rendered with the tokenizer's template; plain text is taken as it is, after
    the bos token where the tokenizer writes one, and ends with eos. Prompt and completion are
    tokenized apart, so that training starts a completion where generation does.

    A control token (bos, eos, pad, and those that the template writes around messages) written out
    in a message or a completion is tokenized as ordinary characters: it can neither end nor open a
    turn, nor shift the mask. Templates that write the date write the same one every day.

    Where the template's generation prompt opens a think block, completions must open it in the same
    words, which then belong to the prompt, or be already inside it. Where it closes one, they must
    not hold another.

    `stop_token_id` ends a chat completion: the first special token that the template writes after
    the assistant's text, else eos. `eos_token_ids` is what generation should stop at.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.suffix = ""
        stop, eos = None, tokenizer.eos_token_id
        control = {eos, tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}
        if tokenizer.chat_template:
            turn = self._render([{"role": "user", "content": "question"}, _assistant(_PROBE)])
            if _PROBE not in turn:
                raise RediError(
                    "the chat template leaves out the assistant's text; set another chat_template"
                )
            self.suffix = turn[turn.rindex(_PROBE) + len(_PROBE) :]
            added = tokenizer.added_tokens_decoder
            special = control | {i for i, token in added.items() if token.special}
            stop = next((i for i in self._ids([self.suffix])[0] if i in special), None)
            written = {i for ids in self._ids([turn, *self._system_turn()]) for i in ids}
            # Special or not: the published R1 models' <｜User｜> and <｜Assistant｜> are not.
            control |= {i for i in written & added.keys() if _marks_a_turn(added[i])}
        if stop is None and eos is None:
            raise RediError(
                "the tokenizer has no eos token, nor a chat template that ends the assistant's "
                "turn with a special token; set eos_token in its tokenizer_config.json"
            )
        self.stop_token_id: int = eos if stop is None else stop
        self.eos_token_ids = [i for i in dict.fromkeys((self.stop_token_id, eos)) if i is not None]
        texts = sorted(tokenizer.convert_ids_to_tokens(sorted(control)), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        inside = (f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in texts)
        self._inside_control = re.compile("|".join(inside) or "(?!)")
        bos = tokenizer.bos_token_id
        self._leading_ids = [bos] if tokenizer("")["input_ids"][:1] == [bos] else []

    def render_prompt(self, prompt: Prompt) -> str:
        """The text the model sees before the completion.

        Raises RediError for chat messages when the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            return prompt
        if not self.tokenizer.chat_template:
            raise RediError(
                "the data holds chat messages but the tokenizer has no chat template: set "
                "chat_template to a Jinja file, or give prompts as plain text"
            )
        return self._render(prompt, add_generation_prompt=True)

    def render_completion(self, prompt: Prompt, completion: str) -> str:
        """The completion's text as the template writes it (it may trim white space around it), or
        as it is if the template takes its think block for an earlier turn's and changes it.

        Raises RediError if the template changes anything else: the text trained on would then not
        be what the model sees and writes when it generates.
        """
        return self._render_after(self.render_prompt(prompt), prompt, completion)

    def _render_after(self, before: str, prompt: Prompt, completion: str) -> str:
        if isinstance(prompt, str):
            return completion
        thinks = "</think>" in completion
        opened = _OPENED.search(before)
        if opened:
            if completion.startswith(opened[0]):
                return completion[len(opened[0]) :]
            if thinks and "<think>" not in completion:  # what a server that opened it sends
                return completion
            raise RediError(
                f"the chat template opens the answer with {opened[0]!r}, but this one begins with "
                f"{completion[:40]!r}; set a chat_template that does not, or write it into the data"
            )
        if thinks and _CLOSED.search(before):
            raise RediError(
                f"the chat template ends the prompt with {before[-30:]!r}, after which a trace "
                "with thoughts would be a second think block; set the template's switch "
                "(chat_template_kwargs: {enable_thinking: true}, or thinking), or another "
                "chat_template"
            )
        turn = self._render([*prompt, _assistant(completion)])
        if not turn.startswith(before):
            raise RediError(
                "the prompt is not a prefix of the whole text after templating: the prompt ends "
                f"with {before[-40:]!r}, but with the answer the template writes "
                f"{turn[: len(before)][-40:]!r} there; set a chat_template whose generation prompt "
                "is how the assistant's turn begins"
            )
        text = turn[len(before) :].removesuffix(self.suffix)
        if text.strip() != completion.strip() or not turn.endswith(self.suffix):
            if thinks and self._begins_the_turn(before, prompt):
                return completion
            raise RediError(
                "the chat template rewrites the assistant's text (templates that remove or add "
                f"<think> blocks do): after the prompt it writes {turn[len(before) :][:60]!r}... "
                f"for {completion[:60]!r}...; set a chat_template that writes the text as it is"
            )
        return text

    def _begins_the_turn(self, before: str, prompt: list[Message]) -> bool:
        """Whether the assistant's text stands right after the generation prompt. Some templates
        write more there (gpt-oss its channel), without which a trace would not be what the model
        reads; with thoughts in the trace, which templates take out, only other text shows it."""
        turn = self._render([*prompt, _assistant(_PROBE)])
        return turn[len(before) :].lstrip().startswith(_PROBE)

    def encode_prompt(self, prompt: Prompt, prefix: str = "") -> list[int]:
        """Ids that generation starts from; the same ids open the trace in training.

        `prefix` is how the answer is made to begin. Where the template's generation prompt opens a
        think block, the prefix does not open another.
        """
        text = self.render_prompt(prompt)
        if not isinstance(prompt, str) and _OPENED.search(text):
            prefix = re.sub(r"\A<think>\s*", "", prefix)
        return self._encode_prompts([prompt], [text])[0] + self._ids([prefix])[0]

    def encode(self, prompt: Prompt, completion: str) -> tuple[list[int], int]:
        """(ids of prompt + completion + stop token, number of prompt ids)."""
        return self.encode_many([(prompt, completion)])[0]

    def encode_many(self, pairs: Sequence[tuple[Prompt, str]]) -> list[tuple[list[int], int]]:
        """`encode` of every (prompt, completion), in a few tokenizer calls."""
        before = [self.render_prompt(prompt) for prompt, _ in pairs]
        prompts = self._encode_prompts([prompt for prompt, _ in pairs], before)
        texts = [self._render_after(text, *pair) for text, pair in zip(before, pairs, strict=True)]
        completions = self._ids(texts)
        for i, text in enumerate(texts):
            if self._control.search(text):
                completions[i] = self._ids_of_characters(text)
        encoded = []
        for (prompt, _), prompt_ids, ids in zip(pairs, prompts, completions, strict=True):
            stop = self.stop_token_id
            if isinstance(prompt, str):
                stop = self.eos_token_ids[-1]
            encoded.append(([*prompt_ids, *ids, stop], len(prompt_ids)))
        return encoded

    def is_far_longer(self, prompt: Prompt, completion: str, limit: int) -> bool:
        """Whether a text has so many characters that its beginning alone tells that it has more
        than `limit` tokens. Tokenizing 20 MB to find that out takes a minute and gigabytes."""
        turns = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
        heads = [
            t[:size] for t in (*turns, completion) if len(t) > (size := _MOST_CHARACTERS * limit)
        ]
        # twice: where the text is cut, the tokens of a word may be others
        return any(len(ids) > 2 * limit for ids in self._ids(heads))

    def count_apart(self, messages: Prompt) -> int:
        """Tokens of `messages` templated by themselves, and one: how the paper measures prompts and
        completions (a default system turn is in both, the header of the assistant's in neither)."""
        text = messages if isinstance(messages, str) else self._render(messages)
        return len(self._ids([text])[0]) + 1

    def _encode_prompts(self, prompts: Sequence[Prompt], rendered: list[str]) -> list[list[int]]:
        """Ids of prompts, given as they are `rendered` too."""
        encoded = self._ids(rendered)
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                encoded[i] = self._leading_ids + encoded[i]
            elif any(self._control.search(message["content"]) for message in prompt):
                encoded[i] = self._encode_hostile(prompt)
        return encoded

    def _encode_hostile(self, prompt: list[Message]) -> list[int]:
        """Ids of messages that write out control tokens: only the template's own count as such."""
        mark = "\ue000"  # private use: stands for a control token while the template is filled
        while any(mark in message["content"] for message in prompt):
            mark += "\ue001"
        written: list[str] = []

        def hide(control: re.Match) -> str:
            written.append(control[0])
            return mark

        hidden = [m | {"content": self._control.sub(hide, m["content"])} for m in prompt]
        pieces = self._render(hidden, add_generation_prompt=True).split(mark)
        if len(pieces) != len(written) + 1:
            raise RediError("the chat template repeats or leaves out messages; set another one")
        ids = self._ids([pieces[0]])[0]
        for control, piece in zip(written, pieces[1:], strict=True):
            ids += self._ids_of_characters(control) + self._ids([piece])[0]
        return ids

    def _ids_of_characters(self, text: str) -> list[int]:
        """Ids of text whose control tokens are none. The tokenizer never splits those that are not
        special, so each is cut after its first character."""
        pieces = self._inside_control.split(text)
        return [i for ids in self._ids(pieces, split_special_tokens=True) for i in ids]

    def _system_turn(self) -> list[str]:
        """A conversation with one, unless the template refuses it."""
        messages = [{"role": role, "content": "question"} for role in ("system", "user")]
        try:
            return [self._render(messages)]
        except RediError:
            return []

    def _render(self, messages: list[Message], **kwargs: Any) -> str:
        from jinja2 import TemplateError

        template = self.tokenizer.get_chat_template()
        for role in {message["role"] for message in messages} - _ROLES:
            if role not in template:  # templates write any role's name where a turn begins
                raise RediError(
                    f"role {role!r} is none that the chat template knows; use system, user, "
                    "assistant or tool"
                )
        if "strftime_now" in template:
            kwargs["chat_template"] = _PINNED_DATE + template
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RediError(f"the chat template refuses messages of {roles}: {error}") from None

    def _ids(self, texts: list[str], **kwargs: Any) -> list[list[int]]:
        if not texts:  # which the tokenizer refuses
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False, **kwargs)["input_ids"]


def with_template_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> Any:
    """The tokenizer with values for its chat template's switches (`enable_thinking`, ...).

    They become the template's own defaults, so that an exported model is prompted as it was
    trained, by whoever serves it; a value given at the call still wins. Raises RediError for a name
    that no template has, and where there is no template.
    """
    if not arguments:
        return tokenizer
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise RediError("chat_template_kwargs: the tokenizer has no chat template to give them to")
    lines = []
    for name, value in arguments.items():
        if name not in _switches(template):
            raise RediError(f"chat_template_kwargs: the chat template does not know {name!r}")
        lines.append(f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} -%}}\n")
    changed = copy.copy(tokenizer)
    changed.chat_template = "".join(lines) + template
    return changed


def _switches(template: str) -> set[str]:
    """The names that a template takes from its caller."""
    from jinja2 import Environment, TemplateError
    from jinja2.meta import find_undeclared_variables

    plain = _GENERATION_MARKS.sub("", template)  # transformers' own, which plain Jinja refuses
    try:
        return find_undeclared_variables(
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        )
    except TemplateError as error:
        raise RediError(f"chat_template_kwargs: the chat template is not valid: {error}") from None


def _literal(value: Any) -> str:
    """As Jinja writes it."""
    if value is None:
        return "none"
    return json.dumps(value, ensure_ascii=False)


def digest_tokenizer(tokenizer: Any) -> str:
    """sha256 over all that turns messages into ids: vocabulary, rules, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend else {"vocab": tokenizer.get_vocab()}
    rules |= {"truncation": None, "padding": None}  # these change with use
    parts = [rules, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
) -> Tokenized:
    """Every example as its traces; one that is too long or empty is dropped whole, never cut.

    `max_length` bounds prompt + completion + stop token, `max_prompt_length` the prompt, in tokens.
    Raises RediError that names the example if the tokenizer's template cannot carry it, and if
    nothing is left.
    """
    chat = ChatFormat(tokenizer)
    result = Tokenized([], [], [])
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        huge = {id(e) for e in chunk if _is_huge(chat, e, max_length)}
        encoded = iter(_encode(chat, [e for e in chunk if id(e) not in huge]))
        for i, example in enumerate(chunk, start):
            traces, reason = [], None
            if id(example) in huge:
                result.dropped.append(Dropped(example.id, f"longer than max_length {max_length}"))
                continue
            for is_chosen, text in example.sides:
                ids, num_prompt_tokens = next(encoded)
                ids_T = np.array(ids, dtype=np.int32)
                traces.append(Trace(ids_T, num_prompt_tokens, is_chosen, i))
                if not text.strip():
                    reason = "empty completion"
                reason = reason or over_limit(
                    len(ids), num_prompt_tokens, max_length, max_prompt_length
                )
            if reason:
                result.dropped.append(Dropped(example.id, reason))
            else:
                result.traces.append(traces)
                result.example_ids.append(example.id)
    if not result.traces:
        counts = Counter(dropped.reason for dropped in result.dropped)
        raise RediError(
            f"no examples left of {len(examples)}: "
            + "; ".join(f"{count} {reason}" for reason, count in counts.most_common())
        )
    return result


def _is_huge(chat: ChatFormat, example: Example, max_length: int | None) -> bool:
    texts = (text for _, text in example.sides)
    return bool(max_length) and any(
        chat.is_far_longer(example.prompt, text, max_length or 0) for text in texts
    )


def _encode(chat: ChatFormat, examples: Sequence[Example]) -> list[tuple[list[int], int]]:
    """Every side of every example."""
    try:
        return chat.encode_many([(e.prompt, text) for e in examples for _, text in e.sides])
    except RediError as error:
        if len(examples) == 1:
            raise RediError(f"example {examples[0].id}: {error}") from None
        return [pair for example in examples for pair in _encode(chat, [example])]  # to name it


def over_limit(
    num_tokens: int, num_prompt_tokens: int, max_length: int | None, max_prompt_length: int | None
) -> str | None:
    """Why a trace is too long, or None."""
    if max_prompt_length and num_prompt_tokens > max_prompt_length:
        return f"prompt longer than max_prompt_length {max_prompt_length}"
    if max_length and num_tokens > max_length:
        return f"longer than max_length {max_length}"
    return None


def _marks_a_turn(token: Any) -> bool:
    """Whether an added token that a template writes is one of its marks, and none of its words."""
    words = not token.special and _WORDS.fullmatch(token.content)
    return not words and token.content not in _THINK


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
