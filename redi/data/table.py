"""The parquet files that build writes, and the parts it makes them from.

A part holds the rows chosen from one block of the input, an Arrow file with a JSON file beside it
that says how they came about. `merge` turns the parts, in order, into the two parquet files; what
it holds in memory is a few numbers for each row and a few megabytes of text.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from redi.data.choose import Chosen
from redi.data.overlap import text_of
from redi.data.report import BuildReport
from redi.errors import RediError

_ROWS, _BYTES = 1000, 32 << 20  # a row group has one or the other
_SHUFFLE_BYTES = 64 << 20  # of text sorted at once
_MAX_BUCKETS = 256
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


def merge(
    parts: Sequence[Path], folder: Path, report: BuildReport, *, drop: bool, seed: int | None
) -> bool:
    """Writes positives.parquet and pairs.parquet into `folder` from the .json files of the parts.

    With `drop`, of rows with the same key only the first is written; with `seed`, they are in the
    order that datasets.Dataset.shuffle(seed) gives the rows of the input. Completes `report`.
    Returns whether the input asks for pairs. Raises RediError for chat and plain text together.
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
    keep, rank = _plan(full, offset, drop, seed)
    tables = _kept(full, keep, report)
    with ExitStack() as stack:
        if rank is not None:
            tables = _shuffled(stack, tables, rank, folder, num_bytes)
        is_chat = kind is not False
        positives = stack.enter_context(_Output(folder / "positives.parquet", is_chat))
        pairs = stack.enter_context(_Output(folder / "pairs.parquet", is_chat))
        for table in tables:
            has_chosen = table.filter(pc.is_valid(table["chosen"]))
            positives.write(has_chosen.rename_columns({"chosen": "completion"}))
            pairs.write(table.filter(table["is_pair"]))
    return wants_pairs


def _plan(
    full: Sequence[tuple[Path, int]], num_rows: int, drop: bool, seed: int | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """(which rows of the parts to keep, the rank in the output of each row kept)."""
    keys, rows = [np.empty(0, "u8")], [np.empty(0, "i8")]
    for path, offset in full:
        for batch in _batches(path, ["key", "row"]):
            keys.append(batch["key"].to_numpy())
            rows.append(batch["row"].to_numpy() + offset)
    all_keys = np.concatenate(keys)
    keep = np.ones(len(all_keys), bool)
    if drop:
        keep[:] = False
        keep[np.unique(all_keys, return_index=True)[1]] = True
    if seed is None:
        return keep, None
    place = np.empty(num_rows, "i8")  # of each input row, as `datasets` shuffles
    place[np.random.default_rng(seed).permutation(num_rows)] = np.arange(num_rows)
    rank = np.empty(int(keep.sum()), "i8")
    rank[np.argsort(place[np.concatenate(rows)[keep]])] = np.arange(len(rank))
    return keep, rank


def _kept(
    full: Sequence[tuple[Path, int]], keep: np.ndarray, report: BuildReport
) -> Iterator[pa.Table]:
    """The rows to write, batch by batch; counts them and those dropped."""
    lengths: dict[str, list[np.ndarray]] = {"chosen": [], "rejected": []}
    done = 0
    for path, _ in full:
        for batch in _batches(path):
            mask = keep[done : done + batch.num_rows]
            done += batch.num_rows
            if not mask.all():
                for row in batch.filter(pa.array(~mask)).to_pylist():
                    _drop_duplicate(row, report)
                batch = batch.filter(pa.array(mask))
            for side, found in lengths.items():
                found.append(batch[f"{side}_length"].drop_null().to_numpy())
                report.count("traces kept", None, len(found[-1]))
            for name, of in (
                ("positives", pc.is_valid(batch["chosen"])),
                ("pairs", batch["is_pair"]),
            ):
                for source, number in Counter(batch.filter(of)["source"].to_pylist()).items():
                    report.count(name, source or "", number)
            yield batch
    for side, name in (("chosen", "correct"), ("rejected", "incorrect")):
        report.measure(f"{name} traces kept", np.concatenate([np.empty(0, int), *lengths[side]]))


def _drop_duplicate(row: dict[str, Any], report: BuildReport) -> None:
    sides = [row[side] for side in ("chosen", "rejected") if row[side] is not None]
    reason = "duplicate of a row before it"
    about = {"id": row["id"], "source": row["source"]}
    report.drop("rows", reason, row["where"], text=text_of(row["prompt"]), **about)
    reason = f"row dropped: {reason}"
    report.drop("traces", reason, row["where"], number=len(sides), **about)


def _shuffled(
    stack: ExitStack, tables: Iterator[pa.Table], rank: np.ndarray, folder: Path, num_bytes: int
) -> Iterator[pa.Table]:
    """The tables' rows by rank: scattered to files of consecutive ranks, then sorted in each."""
    num_buckets = min(max(1, num_bytes // _SHUFFLE_BYTES), _MAX_BUCKETS)
    writers: dict[int, Any] = {}
    done = 0
    for table in tables:
        ranks = rank[done : done + table.num_rows]
        done += table.num_rows
        table = table.append_column("rank", pa.array(ranks))
        buckets = ranks * num_buckets // max(len(rank), 1)
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
        yield table.sort_by("rank").drop_columns("rank")
        file.unlink()


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
            *(("where", pa.string()), ("row", pa.int64()), ("key", pa.uint64())),
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
