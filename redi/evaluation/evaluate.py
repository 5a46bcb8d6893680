"""`redi eval`: sample answers to held-out problems, grade them, say how sure the numbers are.

    output_dir/evaluation.json    what is evaluated: settings, fingerprint and rules of grading
    output_dir/generations.jsonl  every sample with its verdict, appended batch by batch
    output_dir/votes.jsonl        which samples of a problem give the same answer
    output_dir/pairs.jsonl        log-probs of held-out right and wrong traces (pairs_name)
    output_dir/metrics.json       the figures; written last, so it marks a finished evaluation

With `benchmarks`, each has a folder of that kind in output_dir. A sample depends on the settings,
the model and (seed, problem, sample) only, so an evaluation that was killed goes on where it stood
and ends in the same files.
"""

import dataclasses
import gc
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from redi import preflight
from redi.config import EvalConfig
from redi.data.files import name_some
from redi.data.read import Example, Prompt, make_prompt, read_examples
from redi.errors import RediError
from redi.evaluation.benchmarks import BENCHMARKS, find_benchmark
from redi.evaluation.results import EvalResult, load_result, read_result
from redi.evaluation.verdicts import (
    Question,
    grade,
    grade_again,
    make_verifier,
    read_questions,
    vote,
)
from redi.files import claim, read_json, write_text
from redi.grading.verify import grading_rules

# What a model's answers depend on; cards, logs and checkpoints in its folder may change.
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", "*.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
)
# Settings that change how fast the answers come, not which (but for the rounding of sums).
SPEED_FIELDS = {
    *("num_workers", "batch_size", "max_tokens_per_batch"),
    *("concurrency", "request_timeout", "max_retries", "base_url", "api_key_env"),
}
PLACES = {"dataset_name", "pairs_name", "benchmarks", "data_dir", "preset"}  # their content counts
# Younger than the first evaluations, whose fingerprints hold as long as these are not used.
LATER_FIELDS = {
    "grader": "math_verify",
    "answer_prefix": "",
    "engine": "transformers",
    "api": "chat",
    "chat_template_kwargs": {},
}


def evaluate_benchmarks(
    model_name_or_path: str | os.PathLike, config: EvalConfig, output_dir: str | os.PathLike
) -> dict[str, EvalResult]:
    """`evaluate` on each of `config.benchmarks`, in a folder of its name; results by name.

    Raises RediError for a benchmark that is unknown or not found, before any work.
    """
    names = config.benchmarks or []
    paths = {name: find_benchmark(name, config.data_dir) for name in names}
    results = {}
    for name, path in paths.items():
        one = config.model_copy(update={"benchmarks": None, "data_dir": None, "dataset_name": path})
        result = evaluate(model_name_or_path, one, Path(output_dir) / name)
        expected = min(BENCHMARKS[name].num_problems, config.max_problems or sys.maxsize)
        if len(result.problem_ids) != expected:
            print(
                f"{name}: {len(result.problem_ids)} problems, not the usual {expected}",
                file=sys.stderr,
            )
        results[name] = result
    return results


def evaluate(
    model_name_or_path: str | os.PathLike,
    config: EvalConfig,
    output_dir: str | os.PathLike,
    *,
    replace: bool = False,
) -> EvalResult:
    """Evaluates one model, going on where an earlier call with the same settings stopped.

    A finished evaluation of the same model files, data and settings is only read; samples that
    other rules graded are graded again, not made again. Samples of another evaluation are refused,
    or with `replace` removed. Computes in float32 on a CPU, bfloat16 on
    CUDA. Raises RediError for bad data, a folder without a model or tokenizer, problems longer than
    the model's context, a full disk, and a full memory.
    """
    name, folder = os.fspath(model_name_or_path), Path(output_dir)
    if config.dataset_name is None:
        raise RediError("benchmarks: evaluate takes a dataset_name; use evaluate_benchmarks")
    preflight.check_questions(config)
    questions = read_questions(config)
    pairs = read_examples(config.pairs_name) if config.pairs_name is not None else []
    preflight.check_evaluation(name, config)
    fingerprint = _fingerprint(name, config, questions, pairs)
    finished = read_json(folder / "metrics.json")
    mark = {"fingerprint": fingerprint, "rules": grading_rules()}
    if mark.items() <= finished.items():
        return load_result(folder)
    identity = {**mark, "model": name, "config": config.model_dump()}
    generations = folder / "generations.jsonl"
    if not replace and generations.exists() and generations.stat().st_size:
        _check_same(folder, identity)
    try:
        with claim(folder, "evaluation"):
            finished = read_json(folder / "metrics.json")  # another may have ended just now
            if mark.items() <= finished.items():
                return load_result(folder)
            return _evaluate(name, config, folder, identity, questions, pairs, finished)
    except OSError as error:
        raise RediError(
            f"{folder}: cannot be written: {error}; put it right and run again"
        ) from error


def _evaluate(
    name: str,
    config: EvalConfig,
    folder: Path,
    identity: dict[str, Any],
    questions: list[Question],
    pairs: list[Example],
    finished: dict[str, Any],
) -> EvalResult:
    """What `evaluate` does in a folder that it has claimed."""
    start = lambda: _start(folder, identity, questions, config)
    generations = folder / "generations.jsonl"
    if finished.get("fingerprint") == identity["fingerprint"]:
        start()
    elif config.engine == "openai":
        start()
        _sample_served(name, questions, config, generations)
    else:
        lm, tokenizer = _load(name)
        start()
        _sample(lm, tokenizer, questions, config, generations)
        if pairs:
            _score_pairs(lm, tokenizer, pairs, config, folder / "pairs.jsonl")
    if config.num_samples > 2:
        vote(config, generations, folder / "votes.jsonl")
    result = read_result(folder, name)
    mark = {key: identity[key] for key in ("fingerprint", "rules")}
    _write_json(folder / "metrics.json", {**result.metrics(), **mark})
    return result


def _load(name: str) -> tuple[Any, Any]:
    """The model, ready to generate, and its tokenizer."""
    import torch

    from redi.training.model import load_tokenizer_from
    from redi.training.start import read_causal_lm

    gc.collect()  # a trained model may still be there, as in train
    tokenizer = load_tokenizer_from(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lm = read_causal_lm(name, dtype=dtype)
    return lm.to(device).eval(), tokenizer


def _sample(
    lm: Any, tokenizer: Any, questions: list[Question], config: EvalConfig, file: Path
) -> None:
    """Appends the samples that `file` lacks. Its order is fixed: long prompts first, so that memory
    runs out at once if it does, and prompts of one length side by side."""
    import torch

    from redi.data.tokenize import ChatFormat, with_template_arguments
    from redi.evaluation.generate import NotNumbers, generate

    chat = ChatFormat(with_template_arguments(tokenizer, config.chat_template_kwargs))
    has_template = bool(tokenizer.chat_template)
    posed = [_pose(question.problem, config, has_template) for question in questions]
    prompts = [chat.encode_prompt(prompt, config.answer_prefix) for prompt in posed]
    _check_context(lm.config, max(map(len, prompts)), config.max_new_tokens)
    order = sorted(range(len(questions)), key=lambda i: (-len(prompts[i]), i))
    items = [(problem, sample) for problem in order for sample in range(config.num_samples)]
    done = _keep_whole_batches(file, config.batch_size, len(items))
    with (
        _progress("samples", len(items), done) as advance,
        make_verifier(config) as verifier,
        file.open("a", encoding="utf-8") as output,
    ):
        for start in range(done, len(items), config.batch_size):
            batch = items[start : start + config.batch_size]
            try:
                completions = generate(
                    lm,
                    [prompts[problem] for problem, _ in batch],
                    _uniforms(config, batch),
                    stop_ids=chat.eos_token_ids,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    on_finished=advance,
                )
            except NotNumbers as error:
                name = questions[batch[error.prompt][0]].id
                raise RediError(
                    f"the model's logits are NaN or infinite (problem {name}, after "
                    f"{error.num_tokens} new tokens): its weights are damaged, or its training "
                    "diverged; there is nothing to grade"
                ) from None
            except torch.OutOfMemoryError:
                raise RediError(
                    f"out of memory at batch_size {config.batch_size}: run again with a smaller "
                    f"one (nothing is lost of the {start} samples done)"
                ) from None
            rows = []
            for item, ids in zip(batch, completions, strict=True):
                finished = ids[-1] in chat.eos_token_ids
                text = tokenizer.decode(
                    ids[:-1] if finished else ids, clean_up_tokenization_spaces=False
                )
                text = config.answer_prefix + text
                rows.append(_row(questions, item, text, finished, len(ids)))
            _keep(rows, questions, verifier, output)


def _sample_served(model: str, questions: list[Question], config: EvalConfig, file: Path) -> None:
    """Appends the samples that `file` lacks, in the order in which the server answers.

    A sample that it does not answer is missing, never wrong: raises RediError if any is in the end,
    or once three in a row are. One that it refuses (a problem too long for it, say) is named and
    counts as not solved, once all others are there; where it takes none at all, RediError.
    """
    from redi.evaluation.served import Client, Refused, Unanswered

    done = _keep_whole_lines(file)
    requests = [
        ((problem, sample), _request(model, question.problem, config, (problem, sample)))
        for sample in range(config.num_samples)  # so that a problem which always fails is not three
        for problem, question in enumerate(questions)
        if (problem, sample) not in done
    ]
    missing, in_a_row, last = len(requests), 0, ""
    total = len(questions) * config.num_samples
    refused: dict[tuple[int, int], str] = {}
    odd: Counter[str] = Counter()
    with (
        _progress("samples", total, len(done)) as advance,
        make_verifier(config) as verifier,
        file.open("a", encoding="utf-8") as output,
    ):
        for batch in Client(config).answers(requests):
            rows = [
                _row(questions, item, config.answer_prefix + got.text, got.finished, got.num_tokens)
                for item, got in batch
                if not isinstance(got, Exception)
            ]
            _keep(rows, questions, verifier, output)
            advance(len(rows))
            missing -= len(rows)
            for item, got in batch:
                if isinstance(got, Unanswered):
                    in_a_row, last = in_a_row + 1, str(got)
                elif isinstance(got, Refused):
                    refused[item] = str(got)
                elif isinstance(got, Exception):
                    raise got
                else:
                    in_a_row = 0
                    odd.update([got.odd_ending] if got.odd_ending else [])
            takes_none = len(refused) >= 3 and total - missing == 0
            if in_a_row >= 3 or takes_none:
                break
        _tell_endings(odd)
        missing -= len(refused)
        if refused and total - missing == len(refused):
            raise RediError(f"the server takes no request: {next(iter(refused.values()))}")
        if missing:
            raise RediError(
                f"{missing} of {total} samples have no answer after {config.max_retries} retries "
                f"each ({last}); the other {total - missing - len(refused)} are kept: run again "
                "when the server is well"
            )
        rows = [_row(questions, item, "", False, None, "refused") for item in sorted(refused)]
        _keep(rows, questions, verifier, output)
    if refused:
        names = dict.fromkeys(questions[problem].id for problem, _ in sorted(refused))
        print(
            f"WARNING: the server refuses {len(refused)} of {total} samples, which count as not "
            f"solved: {name_some(list(names))} ({next(iter(refused.values()))})",
            file=sys.stderr,
        )


def _tell_endings(odd: "Counter[str]") -> None:
    for reason, count in sorted(odd.items()):
        print(
            f"WARNING: {count} answers end with finish_reason {reason}, which redi does not know: "
            "taken as finished, not as cut off",
            file=sys.stderr,
        )


def _request(
    model: str, problem: Prompt, config: EvalConfig, item: tuple[int, int]
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_tokens": config.max_new_tokens,
        "seed": int(np.random.default_rng([config.seed, *item]).integers(2**31)),
    }
    if config.chat_template_kwargs:  # as vLLM and SGLang take them
        body["chat_template_kwargs"] = config.chat_template_kwargs
    posed = _pose(problem, config, config.api == "chat")
    if config.api == "completions":
        if not isinstance(posed, str):
            raise RediError("api: completions takes problems as text, not as chat messages")
        return body | {"prompt": posed + config.answer_prefix}
    if config.answer_prefix:  # vLLM's way to let the server go on with an answer
        posed = [*posed, {"role": "assistant", "content": config.answer_prefix}]  # type: ignore[misc]
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    return body | {"messages": posed}


def _keep(
    rows: list[dict[str, Any]], questions: list[Question], verifier: Any, output: Any
) -> None:
    """Grades the rows and writes them down, to the disk."""
    grade(rows, questions, verifier)
    output.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    output.flush()
    os.fsync(output.fileno())


def _pose(problem: Prompt, config: EvalConfig, has_template: bool) -> Prompt:
    """Chat messages; plain text for a base model, whose tokenizer has no chat template."""
    if has_template or not isinstance(problem, str):
        return make_prompt(problem, config.system_prompt, config.prompt_template)
    if config.system_prompt is not None:
        raise RediError("system_prompt: there is no chat template to put it in")
    return config.prompt_template.replace("{problem}", problem)


def _uniforms(config: EvalConfig, batch: list[tuple[int, int]]) -> Any:
    import torch

    draws = [
        np.random.default_rng([config.seed, *item]).random(config.max_new_tokens, np.float32)
        for item in batch
    ]
    return torch.from_numpy(np.stack(draws))


def _row(
    questions: list[Question],
    item: tuple[int, int],
    text: str,
    finished: bool,
    num_tokens: int | None,
    verdict: str = "wrong",
) -> dict[str, Any]:
    problem, sample = item
    return {
        "problem": problem,
        "id": questions[problem].id,
        "sample": sample,
        "text": text,
        "verdict": verdict,
        "finished": finished,
        "num_tokens": num_tokens,
    }


def _packed(lm: Any, config: EvalConfig) -> Any:
    """`lm` wrapped to score packs, and shown to do it rightly. Its attention stays what it was,
    since sampling needs that."""
    from redi.training.model import PackedLM
    from redi.training.selfcheck import compare_with_own, keep_apart

    own = lm.config._attn_implementation
    or_else = "leave out pairs_name to sample only"
    model = compare_with_own(lm, PackedLM, lm.device, or_else=or_else).eval()
    keep_apart(model, config.max_tokens_per_batch)
    lm.set_attn_implementation(own)
    return model


def _score_pairs(
    lm: Any, tokenizer: Any, pairs: list[Example], config: EvalConfig, file: Path
) -> None:
    """Writes the log-probs of every pair that has both traces and fits the model's context."""
    from redi.data.pack import pack_traces
    from redi.data.tokenize import tokenize_examples
    from redi.training.attention import NAME
    from redi.training.model import sequence_logps
    from redi.training.selfcheck import refuse_untold

    whole = [pair for pair in pairs if pair.chosen is not None and pair.rejected is not None]
    if not whole:
        raise RediError(f"{config.pairs_name}: no row has both chosen and rejected")
    context = getattr(lm.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokenized = tokenize_examples(whole, tokenizer, max_length=context)
    traces = [trace for both in tokenized.traces for trace in both]
    refuse_untold(lm.config, max((len(trace.input_ids) for trace in traces), default=0))
    packs = pack_traces(traces, config.max_tokens_per_batch)
    model = _packed(lm, config)
    lm.set_attn_implementation(NAME)
    scores: dict[int, dict[str, float]] = {}
    with _progress("held-out pairs", len(packs), 0) as advance:
        for pack, sum_S, length_S in sequence_logps(model, packs):
            mean_S = (sum_S.double() / length_S).tolist()
            for example, is_chosen, mean in zip(
                pack.examples, pack.is_chosen_S.tolist(), mean_S, strict=True
            ):
                scores.setdefault(example, {})["chosen" if is_chosen else "rejected"] = mean
            advance(1)
    rows = [{"id": whole[i].id, **scores[i]} for i in sorted(scores)]
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def _check_context(model_config: Any, longest_prompt: int, max_new_tokens: int) -> None:
    context = getattr(model_config, "max_position_embeddings", None)
    if context is not None and longest_prompt + max_new_tokens > context:
        raise RediError(
            f"max_new_tokens: {max_new_tokens} new tokens after the longest prompt "
            f"({longest_prompt} tokens) exceed the model's {context} positions; "
            f"set max_new_tokens to at most {context - longest_prompt}"
        )


def _fingerprint(
    name: str, config: EvalConfig, questions: list[Question], pairs: list[Example]
) -> str:
    digest = hashlib.sha256()
    settings = config.model_dump(exclude=SPEED_FIELDS | PLACES)
    settings = {k: v for k, v in settings.items() if k not in LATER_FIELDS or v != LATER_FIELDS[k]}
    rows: list[Any] = [*questions, *pairs]
    content = [settings, *map(dataclasses.asdict, rows)]
    for question in content[1 : 1 + len(questions)]:
        if not question["others"]:
            del question["others"]
    digest.update(json.dumps(content, sort_keys=True).encode())
    folder = Path(name)
    if not folder.is_dir():
        digest.update(name.encode())  # a hub name
    for file in sorted({f for pattern in MODEL_FILES for f in folder.glob(pattern) if f.is_file()}):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _check_same(folder: Path, identity: dict[str, Any]) -> None:
    """Raises RediError, with what differs, if the samples in `folder` are another evaluation's."""
    there = read_json(folder / "evaluation.json")
    if there.get("fingerprint") == identity["fingerprint"]:
        return
    defaults = {name: field.default for name, field in EvalConfig.model_fields.items()}
    saved = {**defaults, **there.get("config", {}), "model": there.get("model")}
    wanted = {"model": identity["model"], **identity["config"]}
    differ = [
        f"{key} ({saved.get(key)!s:.40} there, {value!s:.40} now)"
        for key, value in wanted.items()
        if key not in SPEED_FIELDS and saved.get(key) != value
    ]
    what = ", ".join(differ) or "the model's files or the problems"
    raise RediError(
        f"{folder}: holds the samples of an evaluation that differs in {what}; "
        "choose another output_dir, or remove that folder to start anew"
    )


def _start(
    folder: Path, identity: dict[str, Any], questions: list[Question], config: EvalConfig
) -> None:
    """Makes `folder` the place of this evaluation; what another one left there is removed, and
    samples of this one that other rules graded are graded again."""
    folder.mkdir(parents=True, exist_ok=True)
    found = read_json(folder / "evaluation.json") or read_json(folder / "metrics.json")
    generations = folder / "generations.jsonl"
    if generations.exists() and generations.stat().st_size and not found:
        raise RediError(
            f"{generations}: no evaluation of redi has left it (there is no evaluation.json beside "
            "it); move it away, or choose another output_dir"
        )
    is_same = found.get("fingerprint") == identity["fingerprint"]
    is_graded = found.get("rules") == identity["rules"]
    if is_same and not is_graded and (kept := len(_keep_whole_lines(generations))):
        print(f"{folder}: {kept} samples graded by other rules, graded again", file=sys.stderr)
        grade_again(generations, questions, config)
    (folder / "metrics.json").unlink(missing_ok=True)
    if not is_same:
        for name in ("generations.jsonl", "votes.jsonl", "pairs.jsonl"):
            (folder / name).unlink(missing_ok=True)
    if not (is_same and is_graded):
        _write_json(folder / "evaluation.json", identity)


def _keep_whole_batches(file: Path, batch_size: int, total: int) -> int:
    """Cuts `file` after its last whole batch, and returns how many rows are left: a kill in the
    middle of a write leaves half a batch or a torn line."""
    if not file.exists():
        return 0
    lines = file.read_bytes().splitlines(keepends=True)
    whole = len(lines) if not lines or lines[-1].endswith(b"\n") else len(lines) - 1
    done = total if whole >= total else whole // batch_size * batch_size
    os.truncate(file, sum(map(len, lines[:done])))
    return done


def _keep_whole_lines(file: Path) -> set[tuple[int, int]]:
    """Cuts a torn last line off; returns the (problem, sample) of the others."""
    if not file.exists():
        return set()
    lines = file.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(file, sum(map(len, lines[:-1])))
        lines.pop()
    return {(row["problem"], row["sample"]) for row in map(json.loads, lines)}


@contextmanager
def _progress(what: str, total: int, done: int) -> Iterator[Any]:
    """A bar on a terminal, else a plain line at most every 10 s. Yields `advance(count)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(None), MofNCompleteColumn(), Remaining())
    printed = time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        bar.advance(task, count)
        if not console.is_terminal and (done == total or time.monotonic() - printed >= 10):
            printed = time.monotonic()
            print(f"{what}  {done}/{total}", file=sys.stderr, flush=True)

    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield advance


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_text(file, json.dumps(content, indent=2) + "\n")
