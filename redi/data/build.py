"""Raw generations to training data: `redi data build`.

    files.py   the input as blocks of a few megabytes
    choose.py  every row judged; the first right and the first wrong trace of a problem
    pool.py    blocks worked on by all cores
    table.py   what each block gave, kept aside; merged into two parquet files in the end

A block's part is made from that block alone and the merge goes through the parts in order, so the
result does not depend on the number of workers, nor on how often the build was killed and run
again: parts that are finished are found by the next run.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from redi.config import DataConfig
from redi.data.choose import Chooser
from redi.data.files import Block, blocks, find_files, name_of, unread
from redi.data.overlap import Overlap
from redi.data.pool import WorkerDied, run_all
from redi.data.report import COUNTS, BuildReport
from redi.data.table import Part, merge
from redi.data.tokenize import digest_tokenizer, with_template_arguments
from redi.errors import RediError, VerifierFailed
from redi.files import claim, digest_file, publish, write_text
from redi.grading.verify import Verifier, grading_rules, num_cores

_ENOUGH = 1000  # rows, none of which could be used: a build ends there
FORMAT = 3  # of the parts; also to be raised when a rule other than a grader's changes
TACIT = "tokenizer, template, or version of redi or math-verify"  # only the fingerprint has them
OUTPUTS = ("positives.parquet", "pairs.parquet", "report.txt", "report.json")

FAILED = "failed-report.txt"  # of a build that left nothing
_FAILED_HEAD = "A build that left nothing to train on.\n\n"

Inputs = list[tuple[Path, str]]  # files with their names
Progress = Callable[[int, float], None]  # (rows read, share of the input done)


def build(
    config: DataConfig,
    output_dir: str | os.PathLike,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Builds positives.parquet, pairs.parquet, report.txt and report.json in `output_dir`.

    positives.parquet holds the first correct trace of each problem (the paper's D_SFT),
    pairs.parquet that and the first incorrect one (D_Pref); of a problem in several rows, of all
    of them (`config.joins_rows`). A trace is correct iff `config.judges`
    say so: "both" (every recorded judge), "any" of them, or "math_verify" alone. Where a verdict is
    missing, math-verify judges the trace against `answer`. A trace without a definite verdict is
    dropped: it never becomes a negative. docs/data.md describes the other options.

    Ready rows pass through unchanged; `system_prompt` and `prompt_template` are for raw problems.
    With a tokenizer, lengths are in tokens.

    A build that is there already, from the same files, tokenizer and options, is only read. The
    files appear complete or not at all, report.json last. A build that was killed goes on where it
    stood. Raises RediError for bad input, a full disk, a folder that holds another build, and if no
    pairs are left (if the input has nothing but positives: no positives), with the reasons.
    """
    if tokenizer is None and config.counts_tokens:
        raise RediError(
            "max_length, max_prompt_length and max_completion_length count tokens: give a tokenizer"
        )
    if config.chat_template_kwargs:
        if tokenizer is None:
            raise RediError("chat_template_kwargs: there is no tokenizer to give them to")
        tokenizer = with_template_arguments(tokenizer, config.chat_template_kwargs)
    folder = Path(output_dir)
    inputs = [(file, name_of(file, config.path)) for file in find_files(config.path)]
    start = _describe(config, inputs, tokenizer)
    start.unread = unread(config.path)
    done = _finished(folder, start)
    if done is not None:
        return done
    overlap = Overlap().read(config.decontaminate)
    overlap.start(start)
    if tokenizer is not None:
        start.length_unit = "tokens"
    aside = folder / ".building"
    try:
        with claim(folder, "build"):
            _check_foreign(folder)
            _begin(aside, start.fingerprint)
            try:
                chooser = Chooser(config, tokenizer, overlap)
                parts = _make_parts(chooser, inputs, aside, progress)
                report = _finish(config, parts, aside, start)
            except (WorkerDied, VerifierFailed):
                raise
            except _NothingLeft as error:
                shutil.rmtree(aside, ignore_errors=True)
                file = _keep_failed(folder, start)
                raise RediError(f"{error}; the whole report: {file}") from None
            except RediError:  # the next try will have other input
                shutil.rmtree(aside, ignore_errors=True)
                raise
            publish(aside, {name: folder / name for name in OUTPUTS})
            shutil.rmtree(aside)
            if _is_failed_report(folder / FAILED):
                (folder / FAILED).unlink()
    except OSError as error:
        raise RediError(
            f"{folder}: cannot be written: {error}; put it right and run again"
        ) from error
    return report


class _NothingLeft(RediError):
    """Rows were read, and there is nothing to train on."""


@dataclass(frozen=True)
class Task:
    """The block at `index` of the whole input."""

    index: int
    block: Block

    @property
    def name(self) -> str:
        return f"{self.block.name}, what comes after {self.block.first}"

    @property
    def part(self) -> str:
        return f"{self.index:06d}"


class Work:
    """What is done with a task, here or in a worker: leaves a part under a name of this process's
    own, so that a worker whose parent was killed disturbs nobody; returns the name.

    A context manager: its verifier's processes stay from task to task.
    """

    def __init__(self, chooser: Chooser, folder: Path, num_judges: int) -> None:
        self.chooser, self.folder, self.num_judges = chooser, folder, num_judges
        self.verifier: Verifier | None = None

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        if self.verifier is not None:
            self.verifier.__exit__()

    def __call__(self, task: Task) -> str:
        if self.verifier is None:
            timeout = self.chooser.config.verify_timeout
            self.verifier = Verifier(num_workers=self.num_judges, timeout=timeout)
        name = f"{task.part}-by-{os.getpid()}"
        part = Part(self.folder / name)
        for rows in self.chooser.run(task.block, self.verifier):
            part.write(rows)
        part.finish(self.chooser.report, self.chooser.wants_pairs)
        return name


def _make_parts(
    chooser: Chooser, inputs: Inputs, aside: Path, progress: Progress | None
) -> list[Path]:
    """The part of every block, made now or found; in the order of the input."""
    total = sum(file.stat().st_size for file, _ in inputs) or 1
    parts: list[Path] = []
    rows = size = 0
    is_hopeless = True

    def count(task: Task) -> None:
        nonlocal rows, size, is_hopeless
        about = json.loads((aside / f"{task.part}.json").read_text(encoding="utf-8"))
        report = BuildReport(**about["report"])
        rows += report.counts.get("rows read", 0)
        size += task.block.bytes
        is_hopeless &= report.is_hopeless

    def tell() -> None:  # of parts made now, so that those that were found do not set the pace
        if progress:
            progress(rows, min(size / total, 1.0))

    def to_do() -> Iterator[Task]:
        whole = (block for file, name in inputs for block in blocks(file, name))
        for index, block in enumerate(whole):
            task = Task(index, block)
            parts.append(aside / f"{task.part}.json")
            if parts[-1].exists():
                count(task)
            else:
                yield task

    for task, name in _work_on(chooser, to_do(), aside):
        suffixes = (".arrow", ".json")
        publish(aside, {name + suffix: aside / (task.part + suffix) for suffix in suffixes})
        count(task)
        tell()
        if is_hopeless and rows >= _ENOUGH:
            return [part for part in parts if part.exists()]  # the rest would be read in vain
    return parts


def _work_on(chooser: Chooser, tasks: Iterator[Task], aside: Path) -> Iterator[tuple[Task, str]]:
    """(task, name of its part) as they get done: here, if there is but one or one worker."""
    num_workers = chooser.config.num_workers or num_cores()
    first = list(islice(tasks, 2))
    tasks = chain(first, tasks)
    if num_workers > 1 and len(first) > 1:
        yield from run_all(Work(chooser, aside, num_judges=1), tasks, num_workers)
        return
    with Work(chooser, aside, num_workers) as work:
        for task in tasks:
            yield task, work(task)


def _finish(config: DataConfig, parts: list[Path], aside: Path, report: BuildReport) -> BuildReport:
    """Merges the parts and writes the four files into `aside`."""
    report.counts.update(dict.fromkeys(COUNTS, 0))
    wants_pairs = merge(parts, aside, report, config)
    counts = report.counts
    if not counts["rows read"]:
        raise RediError(f"{config.path}: no rows")
    if not counts["pairs"] and (wants_pairs or not counts["positives"]):
        dropped = [*report.dropped_rows.items(), *report.dropped_traces.items()]
        raise _NothingLeft(
            f"{config.path}: no pairs left of {counts['rows read']} rows"
            + "".join(
                f"{'; ' if i else ': '}{d['count']} {reason} (first: "
                f"{d.get('detail') or d['first']})"
                for i, (reason, d) in enumerate(dropped)
            )
            + _about_lone_generations(report, config)
        )
    report.finish()
    (aside / "report.txt").write_text(report.text() + "\n", encoding="utf-8")
    (aside / "report.json").write_text(report.json(), encoding="utf-8")
    return report


def _about_lone_generations(report: BuildReport, config: DataConfig) -> str:
    """Of rows that have made no pair, having one generation each."""
    counts = report.counts
    judged = counts.get("traces correct", 0) + counts.get("traces incorrect", 0)
    if not judged or counts["traces read"] > counts["rows read"]:
        return ""
    if config.joins_rows:
        return (
            ". Each row has one generation: a problem needs several rows, with the same answer and "
            "a right and a wrong trace among them"
        )
    return (
        ". Each row has one generation, and a pair is made within a row: put the generations of a "
        "problem into one row's list `generations`, or leave duplicates and length_rule at their "
        "defaults, which join the rows of a problem"
    )


def _describe(config: DataConfig, inputs: Inputs, tokenizer: Any) -> BuildReport:
    """An empty report that says what the build depends on, with the fingerprint of it."""
    evaluation = [
        file for path in config.decontaminate for file in find_files(path, mix_splits=True)
    ]
    with ThreadPoolExecutor(num_cores()) as pool:  # hashing does not hold the interpreter
        (*digests,) = pool.map(digest_file, [*(file for file, _ in inputs), *evaluation])
    report = BuildReport(config=config.model_dump(exclude={"num_workers"}))
    report.files = [
        {"name": name, "bytes": file.stat().st_size, "sha256": digest}
        for (file, name), digest in zip(inputs, digests, strict=False)
    ]
    depends = {
        "format": FORMAT,
        "rules": grading_rules(),
        "files": report.files,
        "evaluation": digests[len(inputs) :],
        "tokenizer": None if tokenizer is None else digest_tokenizer(tokenizer),
        "options": config.model_dump(exclude={"num_workers", "path"}),
    }
    text = json.dumps(depends, sort_keys=True)
    report.fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return report


def _finished(folder: Path, wanted: BuildReport) -> BuildReport | None:
    """The report of this very build, if the folder holds it whole. Raises RediError if it holds
    another one."""
    file = folder / "report.json"
    if not file.exists():
        return None
    found = vars(BuildReport.load(file))
    if found["fingerprint"] == wanted.fingerprint:
        is_whole = all((folder / name).exists() for name in OUTPUTS)
        return BuildReport(**found) if is_whole else None
    options = {key for key, value in wanted.config.items() if found["config"].get(key) != value}
    differ = sorted(options - {"path"})
    if found.get("files") != wanted.files:
        differ = ["input files", *differ]
    raise RediError(
        f"{folder}: holds data built from other {', '.join(differ) or TACIT}; "
        "choose another output_dir, or remove that folder"
    )


def _check_foreign(folder: Path) -> None:
    """Raises RediError where files of the build's names lie that no build has written."""
    if (folder / "report.json").exists() or (folder / ".building").exists():
        return  # a build's, whole or interrupted
    foreign = [name for name in OUTPUTS if (folder / name).exists()]
    if foreign:
        raise RediError(
            f"{folder}: holds {', '.join(foreign)}, which this build has not written and would "
            "overwrite; choose another output_dir"
        )


def _is_failed_report(file: Path) -> bool:
    return file.is_file() and file.read_bytes().startswith(_FAILED_HEAD.encode())


def _keep_failed(folder: Path, report: BuildReport) -> Path:
    """Leaves what became of every row; never in place of a file of somebody else's."""
    file = folder / FAILED
    if file.exists() and not _is_failed_report(file):
        raise RediError(f"{file}: is no report of a build; move it away")
    write_text(file, _FAILED_HEAD + report.text() + "\n")
    return file


def _begin(aside: Path, fingerprint: str) -> None:
    """Keeps the parts of a build of the same fingerprint that was interrupted; removes all else."""
    mark = aside / "fingerprint"
    if not mark.exists() or mark.read_text() != fingerprint:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        write_text(mark, fingerprint)
    for file in aside.iterdir():
        if not (file == mark or file.stem.isdigit()):
            file.unlink()
