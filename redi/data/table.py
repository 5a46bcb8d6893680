"""The parquet files that build writes, and the parts it makes them from.

A part holds the rows chosen from one block of the input, an Arrow file with a JSON file beside it
that says how they came about. `merge` turns the parts, in order, into the two parquet files; what
it holds in memory is a few numbers for each row and a few megabytes of text. There rows that pose
the same problem meet: which of their traces are written is decided from the numbers alone.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from redi.config import DataConfig
from redi.data.choose import UNPAIRED, Chosen, not_first
from redi.data.overlap import text_of
from redi.data.report import BuildReport
from redi.errors import RediError

_ROWS, _BYTES = 1000, 32 << 20  # a row group has one or the other
_SHUFFLE_BYTES = 64 << 20  # of text sorted at once
_MAX_BUCKETS = 256
_SIDES = {"chosen": "correct", "rejected": "incorrect"}
# What merge holds of each row: the last two say whether it has a trace of that side.
_NUMBERS = {"key": "u8", "join": "u8", "row": "i8", "chosen": "?", "rejected": "?"}
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


class Part:
    """One part in the making; `finish` leaves `path`.arrow and `path`.json, to be published."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = self.num_bytes = 0
        self._writer: Any = None
        self._is_chat: bool | None = None
        self._first = ""  # where the first row is from

    def write(self, rows: Sequence[Chosen]) -> None:
        """Raises RediError for plain text where the rows before were chat, and vice versa."""
        for chosen in rows:
            is_chat = not isinstance(chosen.example.prompt, str)
            if self._is_chat is None:
                self._is_chat, self._first = is_chat, chosen.where
            _check_kind(is_chat, self._is_chat, chosen.where)
        if not rows:
            return
        table = pa.Table.from_pylist([_record(row) for row in rows], _schema(bool(self._is_chat)))
        if self._writer is None:
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            arrow = str(self.path.with_suffix(".arrow"))
            self._writer = pa.ipc.new_file(arrow, table.schema, options=options)
        self._writer.write_table(table)
        self.num_rows += table.num_rows
        self.num_bytes += table.nbytes

    def finish(self, report: BuildReport, wants_pairs: bool) -> None:
        """Raises OSError, on a full disk say."""
        if self._writer is not None:
            self._writer.close()
        else:
            self.path.with_suffix(".arrow").touch()
        about = {
            "report": asdict(report),
            "wants_pairs": wants_pairs,
            "num_rows": self.num_rows,
            "num_bytes": self.num_bytes,
            "is_chat": self._is_chat,
            "first": self._first,
        }
        self.path.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")


def merge(parts: Sequence[Path], folder: Path, report: BuildReport, config: DataConfig) -> bool:
    """Writes positives.parquet and pairs.parquet into `folder` from the .json files of the parts.

    With `config.duplicates` "drop", a problem is written once: the first right and the first wrong
    trace of all its rows (`config.joins_rows`), in the place of the row that the right one is from.
    With a `shuffle_seed`, rows are in the order that datasets.Dataset.shuffle(seed) gives those of
    the input. Completes `report`. Returns whether the input asks for pairs. Raises RediError for
    chat and plain text together.
    """
    wants_pairs, num_bytes = False, 0
    full, offset = [], 0  # parts with rows, and the number of input rows before each
    kind: bool | None = None
    for path in parts:
        about = json.loads(path.read_text(encoding="utf-8"))
        part = BuildReport(**about["report"])
        if about["num_rows"]:
            kind = about["is_chat"] if kind is None else kind
            _check_kind(about["is_chat"], kind, about["first"])
            full.append((path.with_suffix(".arrow"), offset))
        report.add(part)
        wants_pairs |= about["wants_pairs"]
        num_bytes += about["num_bytes"]
        offset += part.counts.get("rows read", 0)
    plan = _plan(full, offset, config)
    tables = _kept(full, plan, report)
    with ExitStack() as stack:
        if plan.rank is not None:
            tables = _arranged(stack, tables, plan.rank, folder, num_bytes, report)
        is_chat = kind is not False
        positives = stack.enter_context(_Output(folder / "positives.parquet", is_chat))
        pairs = stack.enter_context(_Output(folder / "pairs.parquet", is_chat))
        for table in tables:
            has_chosen = table.filter(pc.is_valid(table["chosen"]))
            has_chosen = has_chosen.rename_columns({"chosen": "completion"})
            is_pair = table.filter(table["is_pair"])
            for name, output, rows in (
                ("positives", positives, has_chosen),
                ("pairs", pairs, is_pair),
            ):
                output.write(rows)
                for source, number in Counter(rows["source"].to_pylist()).items():
                    report.count(name, source or "", number)
    return wants_pairs


# Why a row or some of its traces are not written: the traces alone are dropped, or the whole row.
_SPARE, _ALONE, _DUPLICATE, _OTHER_ANSWER = range(4)
_ROW_REASONS = {
    _DUPLICATE: "duplicate of a row before it",
    _OTHER_ANSWER: "the problem of another row, with another answer or other messages around it",
}


@dataclass(frozen=True)
class _Plan:
    """What becomes of the rows of all parts, in their order."""

    sides: dict[str, np.ndarray]  # "chosen" and "rejected": whether that trace is written
    why: np.ndarray  # for each row why what is not written is not
    rank: np.ndarray | None  # in the output, of each row written; the same for rows to be joined


def _plan(full: Sequence[tuple[Path, int]], num_rows: int, config: DataConfig) -> _Plan:
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _NUMBERS}
    for path, offset in full:
        for batch in _batches(path, ["key", "join", "row", *(f"{side}_length" for side in _SIDES)]):
            columns["key"].append(batch["key"].to_numpy())
            columns["join"].append(batch["join"].to_numpy())
            columns["row"].append(batch["row"].to_numpy() + offset)
            for side in _SIDES:
                columns[side].append(pc.is_valid(batch[f"{side}_length"]).to_numpy())
    whole = {name: np.concatenate([np.empty(0, kind), *columns.pop(name)])
             for name, kind in _NUMBERS.items()}  # fmt: skip
    has = {side: whole.pop(side) for side in _SIDES}
    num = len(whole["key"])
    if config.duplicates == "keep":
        whole["key"] = whole["join"] = np.arange(num, dtype="u8")  # every row by itself
    joins, first, group = np.unique(whole["join"], return_index=True, return_inverse=True)
    firsts = {side: np.full(len(joins), num) for side in _SIDES}  # num: no row has it
    for side in _SIDES:
        np.minimum.at(firsts[side], group[has[side]], np.flatnonzero(has[side]))
    base = np.where(firsts["chosen"] < num, firsts["chosen"], firsts["rejected"])
    is_ready = joins == whole["key"][first]
    usable = is_ready | (firsts["chosen"] < num) | (config.unpaired == "keep")
    # Of the groups that pose one problem, the first one that can be used.
    candidates = np.flatnonzero(usable)
    candidates = candidates[np.argsort(base[candidates])]
    wins = np.zeros(len(joins), bool)
    wins[candidates[np.unique(whole["key"][base[candidates]], return_index=True)[1]]] = True
    sides = {side: np.zeros(num, bool) for side in _SIDES}
    for side in _SIDES:
        sides[side][firsts[side][wins & (firsts[side] < num)]] = True
    is_whole = is_ready[group] | (has["chosen"] & has["rejected"])
    other = _OTHER_ANSWER if config.joins_rows else _DUPLICATE
    lost = np.where(usable[group], other, _ALONE)
    why = np.where(wins[group], np.where(is_whole, _DUPLICATE, _SPARE), lost)
    written, base = sides["chosen"] | sides["rejected"], base[group]
    return _Plan(sides, why, _rank(whole["row"], written, base, num_rows, config.shuffle_seed))


def _rank(
    row: np.ndarray, written: np.ndarray, base: np.ndarray, num_rows: int, seed: int | None
) -> np.ndarray | None:
    """Of each row written, given the input row and the row to be joined with (itself, if none) of
    every row; None if rows stay as they are."""
    bases = np.flatnonzero(written & (base == np.arange(len(base))))
    if seed is None:
        if len(bases) == int(written.sum()):
            return None
        place = row
    else:
        shuffled = np.empty(num_rows, "i8")  # the place of each input row, as `datasets` shuffles
        shuffled[np.random.default_rng(seed).permutation(num_rows)] = np.arange(num_rows)
        place = shuffled[row]
    rank = np.empty(len(base), "i8")
    rank[bases[np.argsort(place[bases])]] = np.arange(len(bases))
    return rank[base[written]]


def _kept(full: Sequence[tuple[Path, int]], plan: _Plan, report: BuildReport) -> Iterator[pa.Table]:
    """The rows to write, batch by batch; counts their traces and what is dropped."""
    lengths: dict[str, list[np.ndarray]] = {side: [] for side in _SIDES}
    done = 0
    for path, _ in full:
        for batch in _batches(path):
            these = slice(done, done + batch.num_rows)
            done += batch.num_rows
            keep = {side: plan.sides[side][these] for side in _SIDES}
            has = {side: pc.is_valid(batch[side]).to_numpy() for side in _SIDES}
            written = keep["chosen"] | keep["rejected"]
            spoilt = np.logical_or.reduce([has[side] & ~keep[side] for side in _SIDES])
            for i in np.flatnonzero(spoilt).tolist():
                [row] = batch.slice(i, 1).to_pylist()
                gone = [side for side in _SIDES if has[side][i] and not keep[side][i]]
                is_row = not written[i] and plan.why[these][i] in _ROW_REASONS
                _drop(row, gone, int(plan.why[these][i]), is_row, report)
            if spoilt.any():
                batch = _without(batch, keep).filter(pa.array(written))
            for side, found in lengths.items():
                found.append(batch[f"{side}_length"].drop_null().to_numpy())
                report.count("traces kept", None, len(found[-1]))
            yield batch
    for side, name in _SIDES.items():
        report.measure(f"{name} traces kept", np.concatenate([np.empty(0, int), *lengths[side]]))


def _without(batch: pa.Table, keep: dict[str, np.ndarray]) -> pa.Table:
    """Null where a side is not kept."""
    for side, mask in keep.items():
        for name in (side, f"{side}_length"):
            column = pc.if_else(pa.array(mask), batch[name], pa.scalar(None, batch[name].type))
            batch = batch.set_column(batch.column_names.index(name), name, column)
    return batch


def _drop(
    row: dict[str, Any], gone: list[str], why: int, is_row: bool, report: BuildReport
) -> None:
    about = {"id": row["id"], "source": row["source"]}
    if is_row:
        reason = _ROW_REASONS[why]
        report.drop("rows", reason, row["where"], text=text_of(row["prompt"]), **about)
        reason = f"row dropped: {reason}"
        report.drop("traces", reason, row["where"], number=len(gone), **about)
        return
    for side in gone:
        reason = UNPAIRED if why == _ALONE else not_first(_SIDES[side])
        text = row[side] if isinstance(row[side], str) else row[side][-1]["content"]
        report.drop("traces", reason, row["where"], text=text, **about)


def _arranged(
    stack: ExitStack,
    tables: Iterator[pa.Table],
    rank: np.ndarray,
    folder: Path,
    num_bytes: int,
    report: BuildReport,
) -> Iterator[pa.Table]:
    """The tables' rows by rank, those of one rank joined: scattered to files of consecutive ranks,
    then sorted in each."""
    num_buckets = min(max(1, num_bytes // _SHUFFLE_BYTES), _MAX_BUCKETS)
    num_ranks = int(rank.max(initial=0)) + 1
    writers: dict[int, Any] = {}
    done = 0
    for table in tables:
        ranks = rank[done : done + table.num_rows]
        done += table.num_rows
        table = table.append_column("rank", pa.array(ranks))
        buckets = ranks * num_buckets // num_ranks
        for i in np.unique(buckets).tolist():
            if i not in writers:
                sink = stack.enter_context(pa.OSFile(str(folder / f"bucket-{i}.arrow"), "wb"))
                writers[i] = pa.ipc.new_stream(sink, table.schema)
            writers[i].write_table(table.filter(pa.array(buckets == i)))
    for writer in writers.values():
        writer.close()
    for i in sorted(writers):
        file = folder / f"bucket-{i}.arrow"
        with pa.OSFile(str(file)) as source:
            table = pa.ipc.open_stream(source).read_all()
        table = _joined(table.sort_by("rank"), report)
        yield table.drop_columns("rank")
        file.unlink()


def _joined(table: pa.Table, report: BuildReport) -> pa.Table:
    """Each two rows of one rank as one: that of the right trace, with the other's wrong one."""
    rank = table["rank"].to_numpy()
    starts = np.flatnonzero(np.diff(rank, prepend=-1))
    if len(starts) == len(rank):
        return table
    ends = np.append(starts[1:], len(rank)) - 1
    report.count("pairs of two rows", None, int((ends > starts).sum()))
    at = {}  # for each output row the row that has the side; any where none has
    for side in _SIDES:
        has = pc.is_valid(table[side]).to_numpy()
        at[side] = np.where(has[ends], ends, starts)
    whole = table.take(at["chosen"])
    for name in ("rejected", "rejected_length"):
        column = table[name].take(at["rejected"])
        whole = whole.set_column(whole.column_names.index(name), name, column)
    is_pair = pc.or_(whole["is_pair"], pa.array(ends > starts))
    return whole.set_column(whole.column_names.index("is_pair"), "is_pair", is_pair)


class _Output:
    """One parquet file, in row groups; a context manager."""

    def __init__(self, path: Path, is_chat: bool) -> None:
        kind = _MESSAGES if is_chat else pa.string()
        sides = ("completion",) if path.name == "positives.parquet" else ("chosen", "rejected")
        names = [("id", pa.string()), *((name, kind) for name in ("prompt", *sides))]
        schema = pa.schema([*names, ("answer", pa.string()), ("source", pa.string())])
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._held: list[pa.Table] = []

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None and self._held:
                self._flush()
        finally:
            self._writer.close()

    def write(self, table: pa.Table) -> None:
        for start in range(0, table.num_rows, _ROWS):
            piece = table.slice(start, _ROWS).select(self._writer.schema.names)
            self._held.append(piece)
            rows, size = (sum(getattr(t, n) for t in self._held) for n in ("num_rows", "nbytes"))
            if rows >= _ROWS or size >= _BYTES:
                self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.concat_tables(self._held).combine_chunks())
        self._held = []


def _schema(is_chat: bool) -> pa.Schema:
    kind = _MESSAGES if is_chat else pa.string()
    return pa.schema(
        [
            *(("where", pa.string()), ("row", pa.int64())),
            *(("key", pa.uint64()), ("join", pa.uint64())),
            *(("id", pa.string()), ("prompt", kind), ("chosen", kind), ("rejected", kind)),
            *(("answer", pa.string()), ("source", pa.string()), ("is_pair", pa.bool_())),
            *(("chosen_length", pa.int64()), ("rejected_length", pa.int64())),
        ]
    )


def _record(row: Chosen) -> dict[str, Any]:
    example = row.example
    sides: dict[str, Any] = {"chosen": example.chosen, "rejected": example.rejected}
    if not isinstance(example.prompt, str):
        for side, text in sides.items():
            sides[side] = None if text is None else [{"role": "assistant", "content": text}]
    return {
        "where": row.where,
        "row": row.row,
        "key": int.from_bytes(row.key, "little"),
        "join": int.from_bytes(row.join, "little"),
        "id": example.id,
        "prompt": example.prompt,
        **sides,
        "answer": example.answer,
        "source": example.source,
        "is_pair": row.is_pair,
        "chosen_length": row.chosen_length,
        "rejected_length": row.rejected_length,
    }


def _batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    with pa.OSFile(str(path)) as raw:
        file = pa.ipc.open_file(raw)
        if columns:
            indices = [file.schema.get_field_index(name) for name in columns]
            raw.seek(0)
            file = pa.ipc.open_file(raw, options=pa.ipc.IpcReadOptions(included_fields=indices))
        for i in range(file.num_record_batches):
            yield pa.Table.from_batches([file.get_batch(i)])


def _check_kind(is_chat: bool, expected: bool, where: str) -> None:
    if is_chat != expected:
        kinds = ("plain text", "chat messages")
        raise RediError(
            f"{where}: `prompt` is {kinds[is_chat]}, but {kinds[not is_chat]} in the rows "
            "before it; build the two kinds into separate folders"
        )
