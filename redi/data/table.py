"""The parquet files that build writes: TRL's columns, in row groups, complete or not at all."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from redi.data.read import Example
from redi.errors import RediError

_ROWS = 1000  # per row group
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


class Table:
    """Rows of one file, written beside it until `publish` puts it in its place.

    `columns` are ("completion",) for positives, ("chosen", "rejected") for pairs; like `prompt`
    they are lists of messages, or plain text if the first row's prompt is. A context manager:
    leaving it removes what was not published.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path = path
        self.aside = path.with_name(path.name + ".tmp")
        self._columns = columns
        self._rows: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None
        self._is_chat: bool | None = None

    def __enter__(self) -> "Table":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if self._writer:
                self._writer.close()
        except OSError:
            if error is None:
                raise
        finally:
            self.aside.unlink(missing_ok=True)

    def write(self, example: Example, where: str) -> None:
        """Raises RediError for plain text where the rows before were chat, and vice versa."""
        is_chat = not isinstance(example.prompt, str)
        if self._is_chat is None:
            self._is_chat = is_chat
        if is_chat != self._is_chat:
            kinds = ("plain text", "chat messages")
            raise RediError(
                f"{where}: `prompt` is {kinds[is_chat]}, but {kinds[not is_chat]} in the rows "
                "before it; build the two kinds into separate folders"
            )
        texts = {
            "completion": example.chosen,
            "chosen": example.chosen,
            "rejected": example.rejected,
        }
        row: dict[str, Any] = {"id": example.id, "prompt": example.prompt}
        for column in self._columns:
            text = texts[column]
            is_message = is_chat and text is not None
            row[column] = [{"role": "assistant", "content": text}] if is_message else text
        self._rows.append(row | {"answer": example.answer, "source": example.source})
        if len(self._rows) >= _ROWS:
            self._flush()

    def finish(self) -> None:
        """Writes what is left and makes it durable, still aside."""
        self._flush()
        assert self._writer
        self._writer.close()
        self._writer = None
        _fsync(self.aside)

    def _flush(self) -> None:
        if self._writer is None:
            kind = pa.string() if self._is_chat is False else _MESSAGES
            names = [("id", pa.string()), *((c, kind) for c in ("prompt", *self._columns))]
            schema = pa.schema([*names, ("answer", pa.string()), ("source", pa.string())])
            self._writer = pq.ParquetWriter(self.aside, schema, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._writer.schema))
        self._rows = []


def publish(tables: list[Table], texts: dict[Path, str]) -> None:
    """Puts tables, then texts, in their places. The last text marks the folder as complete: an old
    one goes before anything else changes."""
    for table in tables:
        table.finish()
    for path, text in texts.items():
        aside = path.with_name(path.name + ".tmp")
        aside.write_text(text + "\n", encoding="utf-8")
        _fsync(aside)
    last = list(texts)[-1]
    last.unlink(missing_ok=True)
    for path in (*(table.path for table in tables), *texts):
        os.replace(path.with_name(path.name + ".tmp"), path)
    _fsync(last.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
