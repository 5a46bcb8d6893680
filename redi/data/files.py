"""Files to rows, in blocks that can be read anywhere: JSON lines, .parquet, .arrow.

A path is a file, a folder, a glob, or a dataset on the Hugging Face Hub. Blocks are the unit of
`redi data build`: a few megabytes of rows, cut in the same places whoever reads them.

Of a folder, hidden files (editors' and copying programs' own) are never read, files of two splits
are never read together, and `unread` names what is left.
"""

import codecs
import glob
import gzip
import io
import json
import lzma
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.errors import RediError
from redi.files import publish

READABLE = ".jsonl or .ndjson (also .gz, .zst, .xz), .parquet, .arrow"
_LINES = re.compile(r"\.(jsonl|ndjson)(\.(gz|zst|xz))?$", re.IGNORECASE)
_OTHERS = re.compile(r"\.(parquet|arrow|json)$", re.IGNORECASE)
# The words by which the Hub's convention tells splits apart, in names of files and folders.
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "valid": "validation",
    "validation": "validation", "val": "validation", "dev": "validation", "eval": "test",
}  # fmt: skip
BLOCK_BYTES = 4 << 20  # of rows, before compression
_MAX_LINE = 256 << 20  # bytes; longer is no row, and would not fit into memory as one
_BESIDE_DATA = ("dataset_info.json", "dataset_dict.json", "state.json")
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what damaged files raise
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one file. `payload` is their lines, their Arrow batches in IPC format, or
    the row groups of a parquet file to read them from."""

    file: Path
    kind: str  # "lines", "json", "parquet" or "arrow"
    name: str  # of the file, for people
    first: int  # lines or rows of the file before this block
    payload: bytes | range
    bytes: int  # what this block takes of the file, as it lies on the disk


@dataclass(frozen=True)
class Unreadable:
    """A row that cannot be read, though the file can."""

    reason: str  # "not JSON"
    detail: str = ""  # "Expecting value at column 3"


def find_files(path: str | Path, *, mix_splits: bool = False) -> list[Path]:
    """The data files that `path` (a file, folder, glob or Hub name) means, sorted.

    A Hub name is `owner/name`, `owner/name:config`, `owner/name@split` (default: train) or both; it
    is downloaded by `datasets`. A folder's .json files are not read: most describe other files.
    Raises RediError, also for files of several splits, unless `mix_splits`.
    """
    root = Path(path)
    if root.is_file():
        if _kind(root) is None:
            raise RediError(f"{root}: not a data file; expected {READABLE}")
        return [root]
    if is_hub_name(path):
        return _download(str(path))
    if (root / "dataset_dict.json").is_file():
        splits = _read_json(root / "dataset_dict.json").get("splits", [])
        if len(splits) > 1:
            raise RediError(f"{root}: holds the splits {', '.join(splits)}; name the one to read")
    files = [p for p in _found(path) if _kind(p) not in (None, "json") and not _is_cache(p)]
    if not files:
        what = f"holds no {READABLE} file" if root.is_dir() else "no such file"
        others = unread(path)
        raise RediError(f"{path}: {what}" + (f"; it holds {name_some(others)}" if others else ""))
    if {"positives.parquet", "pairs.parquet"} <= {p.name for p in files}:
        raise RediError(f"{path}: both positives.parquet and pairs.parquet; name one of them")
    # Seen from the folder that holds them all: what it is called itself says nothing here.
    above = os.path.commonpath([p.parent for p in files])
    found = {s: p for p in reversed(files) for s in _splits(os.path.relpath(p, above))}
    if len(found) > 1 and not mix_splits:
        named = ", ".join(f"{split} ({name_of(found[split], path)})" for split in sorted(found))
        raise RediError(
            f"{path}: holds files of the splits {named}; name one file, or a glob of one's files"
        )
    return files


def unread(path: str | Path) -> list[str]:
    """Names of what lies in the folder (or is matched by the glob) `path` and is not read, but for
    hidden files and those that `datasets` writes beside its data."""
    if Path(path).is_file() or is_hub_name(path):
        return []
    others = (p for p in _found(path) if _kind(p) in (None, "json") and p.name not in _BESIDE_DATA)
    return [name_of(p, path) for p in others]


def name_some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _found(path: str | Path) -> list[Path]:
    """All files of a folder or glob, but hidden ones and those in hidden folders."""
    root = Path(path)
    if root.is_dir():
        inside = ((p, p.relative_to(root).parts) for p in root.rglob("*"))
        found = [p for p, parts in inside if not any(part.startswith(".") for part in parts)]
    else:  # `*` matches no hidden name; who writes the dot means it
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
    return sorted(p for p in found if p.is_file())


def _kind(file: Path) -> str | None:
    if _LINES.search(file.name):
        return "lines"
    other = _OTHERS.search(file.name)
    return other[1].lower() if other else None


def _is_cache(file: Path) -> bool:
    """Whether `Dataset.map` has left it beside a saved dataset."""
    return file.name.startswith("cache-") and _kind(file) == "arrow"


def _splits(name: str) -> set[str]:
    """The split that the file's name, or else one of its folders', says; at most one."""
    for part in reversed(Path(name).parts):
        said = {_SPLITS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _SPLITS}
        if said:
            return {min(said)}
    return set()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise RediError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise RediError(f"{file}: not an object with named fields: {kind_of(content)}")
    return content


def is_hub_name(path: str | Path) -> bool:
    text = str(path)
    is_name = _HUB.fullmatch(text) and _kind(Path(text)) is None
    return bool(is_name) and not Path(path).exists()


def name_of(file: Path, path: str | Path) -> str:
    """What a file of `path` is called: unique within it, and the same wherever the folder lies."""
    root = Path(path)
    if root.is_dir():
        return file.relative_to(root).as_posix()
    return file.name if file == root or is_hub_name(path) else str(file)


def read_rows(
    path: str | Path, *, mix_splits: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, row) over all files of `path`; `where` is "name.jsonl line 12", from 1, and
    unique within the call.

    Raises RediError for a missing file, a line that is not a JSON object, a broken archive.
    """
    files, others = find_files(path, mix_splits=mix_splits), unread(path)
    if others:
        warnings.warn(f"{path}: not read: {name_some(others)}", stacklevel=2)
    for file in files:
        for block in blocks(file, name_of(file, path)):
            for where, row in read_block(block):
                if isinstance(row, Unreadable):
                    where = where.replace(block.name, str(file), 1)
                    detail = f": {row.detail}" if row.detail else ""
                    raise RediError(f"{where}: {row.reason}{detail}")
                yield where, row


def blocks(file: Path, name: str) -> Iterator[Block]:
    """The blocks of one file, in order. Raises RediError if the file is broken."""
    import pyarrow as pa

    kind = _kind(file) or "lines"
    if kind == "json" and _holds_lines(file):
        kind = "lines"
    cuts = {"parquet": _cut_parquet, "arrow": _cut_arrow, "json": _cut_json, "lines": _cut_lines}
    first = 0
    try:
        for payload, rows, size in cuts[kind](file):
            yield Block(file, kind, name, first, payload, size)
            first += rows
    except _BROKEN + (pa.ArrowException,) as error:
        unit = "line" if kind == "lines" else "row"
        raise RediError(f"{file} after {unit} {first}: cannot be read: {error}") from None


def read_block(block: Block) -> Iterator[tuple[str, dict[str, Any] | Unreadable]]:
    """Yields (where, row) for every row of the block. Raises RediError if the file is broken."""
    import pyarrow as pa

    if block.kind == "lines":
        assert isinstance(block.payload, bytes)
        for number, line in enumerate(io.BytesIO(block.payload), block.first + 1):
            if line.strip():
                yield f"{block.name} line {number}", _parse(line)
        return
    number = block.first
    try:
        for batch in _batches(block):
            for row in batch:
                number += 1
                yield f"{block.name} row {number}", row
    except (OSError, pa.ArrowException) as error:
        raise RediError(f"{block.file} after row {number}: cannot be read: {error}") from None


Cut = Iterator[tuple[bytes | range, int, int]]  # payload, rows in it, bytes of the file


def _cut_lines(file: Path) -> Cut:
    import pyarrow as pa

    with ExitStack() as stack:
        raw = stack.enter_context(file.open("rb"))
        lines: Any = raw
        archive = file.suffix.lower()
        if archive == ".gz":
            lines = stack.enter_context(gzip.GzipFile(fileobj=raw))
        elif archive == ".xz":
            lines = stack.enter_context(lzma.LZMAFile(raw))
        elif archive == ".zst":
            stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
            lines = stack.enter_context(io.BufferedReader(stream))
        held: list[bytes] = []
        size, start = 0, 0
        try:
            while line := lines.readline(_MAX_LINE):
                if len(line) == _MAX_LINE:
                    raise OSError(f"a line of more than {_MAX_LINE >> 20} MiB")
                if not size and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise OSError("UTF-16 text; save it as UTF-8")
                held.append(line)
                size += len(line)
                if size >= BLOCK_BYTES:
                    yield b"".join(held), len(held), raw.tell() - start
                    held, size, start = [], 0, raw.tell()
        except _BROKEN:
            if held:  # the rows before it are good
                yield b"".join(held), len(held), raw.tell() - start
            raise
        if held:
            yield b"".join(held), len(held), raw.tell() - start


def _cut_parquet(file: Path) -> Cut:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        _check_names(table.schema_arrow)
        meta = table.metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    total = sum(group.total_byte_size for group in groups) or 1
    start, size = 0, 0
    for i, group in enumerate(groups, 1):
        size += group.total_byte_size
        if size >= BLOCK_BYTES or i == len(groups):
            rows = sum(group.num_rows for group in groups[start:i])
            yield range(start, i), rows, file.stat().st_size * size // total
            start, size = i, 0


def _cut_arrow(file: Path) -> Cut:
    import pyarrow as pa

    for batch, size in _arrow_batches(file):
        _check_names(batch.schema)
        step = max(1, batch.num_rows * BLOCK_BYTES // max(batch.nbytes, 1))
        for start in range(0, batch.num_rows, step):
            piece = batch.slice(start, step)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(piece)
            share = size * piece.num_rows // batch.num_rows
            yield sink.getvalue().to_pybytes(), piece.num_rows, share


def _check_names(schema: Any) -> None:
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise OSError(f"the column `{twice}` is there twice")


def _arrow_batches(file: Path) -> Iterator[tuple[Any, int]]:
    """Batches of an Arrow file or stream (`datasets` writes streams) with their bytes on disk."""
    import pyarrow as pa

    with pa.OSFile(str(file)) as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        if is_file:
            table = pa.ipc.open_file(raw)
            size = file.stat().st_size // max(table.num_record_batches, 1)
            for i in range(table.num_record_batches):
                yield table.get_batch(i), size
        else:
            start = 0
            for batch in pa.ipc.open_stream(raw):
                yield batch, raw.tell() - start
                start = raw.tell()


def _holds_lines(file: Path) -> bool:
    """Whether a .json file is JSON lines, as many are: its first line is an object by itself, and
    is not the whole file."""
    with file.open("rb") as lines:
        first = lines.readline(_MAX_LINE)
        try:
            is_object = isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            return False
        return is_object and bool(lines.readline(_MAX_LINE).strip())


def _cut_json(file: Path) -> Cut:
    """One list of objects; for evaluation sets, which come so, and fit into memory."""
    text = file.read_bytes()
    yield text, 0, len(text)


def _batches(block: Block) -> Iterator[list[dict[str, Any] | Unreadable]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(block.payload, range):
        with pq.ParquetFile(block.file, pre_buffer=False, buffer_size=1 << 20) as table:
            groups = [table.metadata.row_group(i) for i in block.payload]
            mean = sum(g.total_byte_size for g in groups) // max(sum(g.num_rows for g in groups), 1)
            size = min(max(BLOCK_BYTES // max(mean, 1), 1), 256)
            for batch in table.iter_batches(size, row_groups=list(block.payload)):
                yield _rows_of(batch)
    elif block.kind == "json":
        rows = _parse(block.payload, kind=list)
        rows = rows if isinstance(rows, list) else [rows]
        yield [row if isinstance(row, dict | Unreadable) else _no_object(row) for row in rows]
    else:
        for batch in pa.ipc.open_stream(block.payload):
            yield _rows_of(batch)


def _rows_of(batch: Any) -> list[dict[str, Any] | Unreadable]:
    """The batch as Python rows; bytes in a text column that are not UTF-8 spoil only their row."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [Unreadable("not UTF-8 text", f"{error.reason} at byte {error.start}")]
        return [row for i in range(batch.num_rows) for row in _rows_of(batch.slice(i, 1))]


class _Twice(ValueError):
    """A name that an object has twice, of which readers keep the last without a word."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(f"`{name}`" for name in names if names.count(name) > 1))
    return found


def _parse(line: bytes, kind: type = dict) -> Any:
    try:
        row = json.loads(line.rstrip(), object_pairs_hook=_object)
        if b"\\ud" in line.lower():  # perhaps half a character, which no file and no model takes
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return Unreadable("not UTF-8 text", f"{error.reason} at byte {error.start}")
    except UnicodeEncodeError:
        return Unreadable("not UTF-8 text", "half of a surrogate pair")
    except json.JSONDecodeError as error:
        return Unreadable("not JSON", f"{error.msg} at column {error.colno}")
    except _Twice as error:
        return Unreadable("a field is there twice", str(error))
    except ValueError as error:  # an integer of more digits than Python reads
        return Unreadable("not JSON", str(error))
    except RecursionError:
        return Unreadable("not JSON", "nested too deeply")
    if isinstance(row, kind):
        return row
    return _no_object(row) if kind is dict else Unreadable("not a list of objects", kind_of(row))


def _no_object(row: Any) -> Unreadable:
    return Unreadable("not an object with named columns", kind_of(row))


def kind_of(value: Any) -> str:
    """What a value is, in words for error messages."""
    kinds = {str: "text", list: "a list", dict: "an object", bool: "true/false", type(None): "null",
             bytes: "bytes"}  # fmt: skip
    return f"{kinds.get(type(value), 'a number')} ({str(value)[:40]!r})"


def _download(path: str) -> list[Path]:
    """A Hub dataset's files, from `datasets`' cache or the network."""
    match = _HUB.fullmatch(path)
    assert match
    try:
        from datasets import load_dataset
    except ImportError:
        raise RediError(
            f"{path}: no such file or folder; to read it from the Hugging Face Hub: "
            "pip install datasets"
        ) from None
    split = match["split"] or "train"
    try:
        data = load_dataset(match["name"], match["config"], split=split)
        files = [Path(cached["filename"]) for cached in data.cache_files]
        return [_write_slice(data, files[0].parent, split)] if "[" in split else files
    except Exception as error:  # the hub's, the network's and the loader's are many
        raise RediError(
            f"{path}: no such file or folder, and not to be had from the Hub: {error}"
        ) from None


def _write_slice(data: Any, cache: Path, split: str) -> Path:
    """The rows of `train[:10%]` as a file of their own: the cache holds whole splits only."""
    file = cache / f"{split}.parquet"
    if not file.exists():
        aside = cache / f"{split}.{os.getpid()}.tmp"
        try:
            data.to_parquet(aside)
            publish(cache, {aside.name: file})
        finally:
            aside.unlink(missing_ok=True)
    return file
