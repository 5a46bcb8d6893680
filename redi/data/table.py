"""The parquet files that build writes: TRL's columns, in row groups, complete or not at all."""

import contextlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from redi.data.read import Example
from redi.errors import RediError

_ROWS = 1000  # per row group
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


class Table:
    """Writes one parquet file; a context manager that ends without a word after an error.

    `columns` are ("completion",) for positives, ("chosen", "rejected") for pairs; like `prompt`
    they are lists of messages, or plain text if the first row's prompt is.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path = path
        self._columns = columns
        self._rows: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None
        self._is_chat: bool | None = None

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            with contextlib.suppress(OSError):
                self._writer.close()

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
        row: dict[str, Any] = {"id": example.id, "prompt": example.prompt}
        for column in self._columns:
            text = example.rejected if column == "rejected" else example.chosen
            as_messages = is_chat and text is not None
            row[column] = [{"role": "assistant", "content": text}] if as_messages else text
        self._rows.append(row | {"answer": example.answer, "source": example.source})
        if len(self._rows) >= _ROWS:
            self._flush()

    def finish(self) -> None:
        """Writes what is left. Raises OSError, on a full disk say."""
        self._flush().close()
        self._writer = None

    def _flush(self) -> pq.ParquetWriter:
        if self._writer is None:
            kind = pa.string() if self._is_chat is False else _MESSAGES
            names = [("id", pa.string()), *((c, kind) for c in ("prompt", *self._columns))]
            schema = pa.schema([*names, ("answer", pa.string()), ("source", pa.string())])
            self._writer = pq.ParquetWriter(self.path, schema, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._writer.schema))
        self._rows = []
        return self._writer
