"""What a build did: report.json, report.txt, and all that a page about the data needs."""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from redi.errors import RediError

MAX_EXAMPLES = 3  # shown for each reason and each evaluation set
# What every build counts, be it 0.
COUNTS = ("rows read", "traces read", "traces correct", "traces incorrect", "traces kept",
          "positives", "pairs")  # fmt: skip
_BINS = 4  # histogram bins for each doubling of the length


@dataclass
class BuildReport:
    """What became of every row and every trace.

    traces read = traces kept + traces dropped (a trace that is in both files is kept once). The
    traces of a dropped row are among the traces dropped.

    counts           rows read; traces read, correct, incorrect, kept; positives, pairs (written)
    dropped_rows     reason: {"count", "first": where it struck first, "detail": what was wrong
                     there, of rows and traces that could not be used at all}
    dropped_traces   the same of traces
    examples         {"rows" or "traces": {reason: [{"where", "id", "source", "excerpt"}]}}: the
                     first few of each reason; `excerpt` is the problem's text for rows, the trace's
                     for traces, its middle left out ("" if there is none)
    lengths          {"correct traces kept" and "incorrect traces kept": {"mean", "median", "p95",
                     "max"}} in `length_unit`
    length_unit      "tokens" (prompt, completion and stop token) or "characters" (completion)
    histograms       {name: {"unit", "edges": n + 1 numbers, "counts": n}}: the names of `lengths`,
                     in its unit, and "correct traces" and "incorrect traces", all that were judged,
                     in characters. A length L is in bin i if edges[i] <= L < edges[i + 1]
    sources          {source: {"rows read", "traces read", "traces correct", "traces incorrect",
                     "positives", "pairs"}}, "" for rows without one
    overlap          {evaluation set: {"problems", "rows exact": rows that pose one of its problems
                     word for word, "rows shared": rows that share 8 words in a row with one (exact
                     ones included), "problems shared": indices of the problems met, "examples":
                     [{"where", "id", "excerpt", "evaluation": the problem met}]}}
    files            [{"name", "bytes", "sha256"}] of the input
    unread           names of the input folder's other files
    fingerprint      of files, tokenizer, template and options: what the output depends on
    config           the options, without num_workers
    """

    counts: dict[str, int] = field(default_factory=dict)
    dropped_rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped_traces: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: dict[str, dict[str, list[dict[str, Any]]]] = field(
        default_factory=lambda: {"rows": {}, "traces": {}}
    )
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)
    length_unit: str = "characters"
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    overlap: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    fingerprint: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> "BuildReport":
        """Raises RediError for a file that no build has written."""
        try:
            content = json.loads(file.read_bytes())
            cls(**content)  # unknown names, which pydantic would pass over
            report = TypeAdapter(cls).validate_python(content)
        except ValidationError as error:  # a ValueError, of many lines
            what = ".".join(map(str, error.errors()[0]["loc"]))
            raise RediError(f"{file}: not a report of redi data build ({what})") from None
        except (ValueError, TypeError) as error:
            raise RediError(f"{file}: not a report of redi data build ({error})") from None
        if not report.counts:
            raise RediError(f"{file}: not a report of redi data build (no counts)")
        return report

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def count(self, name: str, source: str | None = None, number: int = 1) -> None:
        """Counts for the whole, and for `source` if it is given ("" for none)."""
        self.counts[name] = self.counts.get(name, 0) + number
        if source is not None:
            entry = self.sources.setdefault(source, {})
            entry[name] = entry.get(name, 0) + number

    def drop(
        self,
        what: str,
        reason: str,
        where: str,
        *,
        number: int = 1,
        id: str = "",
        source: str | None = None,
        text: str | None = "",
        detail: str = "",
    ) -> None:
        """Counts `number` "rows" or "traces" dropped for `reason`; keeps the first as examples.
        `detail` names row, field and value of what could not be used."""
        dropped = self.dropped_rows if what == "rows" else self.dropped_traces
        entry = dropped.setdefault(
            reason, {"count": 0, "first": where} | ({"detail": detail} if detail else {})
        )
        entry["count"] += number
        examples = self.examples[what].setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            example = {"where": where, "id": id, "source": source, "excerpt": shorten(text or "")}
            examples.append(example)

    def add(self, other: "BuildReport") -> None:
        """Takes in the report of the rows that come next."""
        for name, number in other.counts.items():
            self.count(name, None, number)
        for source, counts in other.sources.items():
            sums = self.sources.setdefault(source, {})
            for name, number in counts.items():
                sums[name] = sums.get(name, 0) + number
        for dropped, theirs in (
            (self.dropped_rows, other.dropped_rows),
            (self.dropped_traces, other.dropped_traces),
        ):
            for reason, entry in theirs.items():
                dropped.setdefault(reason, entry | {"count": 0})["count"] += entry["count"]
        for what, reasons in other.examples.items():
            for reason, examples in reasons.items():
                kept = self.examples[what].setdefault(reason, [])
                kept += examples[: MAX_EXAMPLES - len(kept)]
        for name, histogram in other.histograms.items():
            self.spread(name, histogram["unit"], dict(enumerate(histogram["counts"])))
        for name, met in other.overlap.items():
            mine = self.overlap[name]
            for key in ("rows exact", "rows shared"):
                mine[key] += met[key]
            mine["problems shared"] = sorted({*mine["problems shared"], *met["problems shared"]})
            mine["examples"] += met["examples"][: MAX_EXAMPLES - len(mine["examples"])]

    def spread(self, name: str, unit: str, counts: dict[int, int]) -> None:
        """Adds to a histogram; `counts` maps a `bin_of` to how many."""
        histogram = self.histograms.setdefault(name, {"unit": unit, "edges": [], "counts": []})
        sums = histogram["counts"]
        for i, number in counts.items():
            sums.extend([0] * (i + 1 - len(sums)))
            sums[i] += number

    def measure(self, name: str, lengths: np.ndarray) -> None:
        """Statistics and histogram of the lengths of traces kept."""
        if len(lengths) == 0:
            return
        self.lengths[name] = {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "max": float(lengths.max()),
        }
        self.spread(name, self.length_unit, Counter(bin_of(int(length)) for length in lengths))

    def finish(self) -> None:
        """Names the bins; the last thing before the report is written."""
        for histogram in self.histograms.values():
            num_bins = len(histogram["counts"])
            histogram["edges"] = [0, *(2 ** (i / _BINS) for i in range(num_bins))]

    def text(self) -> str:
        """The report as lines that line up."""
        width = 4 + max(map(len, (*self.counts, *self.dropped_rows, *self.dropped_traces)))
        lines = [f"{name:<{width}}{count:>12,}" for name, count in self.counts.items()]
        for title, dropped in (("rows", self.dropped_rows), ("traces", self.dropped_traces)):
            lines += ["", f"{title} dropped" if dropped else f"no {title} dropped"]
            for reason, entry in dropped.items():
                name = f"  {reason}"
                first = entry.get("detail") or entry["first"]
                lines.append(f"{name:<{width}}{entry['count']:>12,}  first: {first}")
        columns = ("mean", "median", "p95", "max")
        title = f"length in {self.length_unit}"
        lines += ["", f"{title:<{width}}" + "".join(f"{column:>12}" for column in columns)]
        for name, stats in self.lengths.items():
            figures = "".join(f"{stats[column]:>12,.0f}" for column in columns)
            lines.append(f"{'  ' + name:<{width}}{figures}")
        for name, met in self.overlap.items():
            lines += [
                "",
                f"overlap with {name}: {len(met['problems shared']):,} of its "
                f"{met['problems']:,} problems; {met['rows shared']:,} rows share 8 words in a "
                f"row with one, {met['rows exact']:,} pose one word for word",
            ]
        if self.unread:
            lines += ["", f"not read: {', '.join(self.unread)}"]
        return "\n".join(lines)

    @property
    def is_hopeless(self) -> bool:
        """Whether not one row, or not one trace, could be used at all."""
        for dropped, read in (
            (self.dropped_rows, self.counts.get("rows read", 0)),
            (self.dropped_traces, self.counts.get("traces read", 0)),
        ):
            if read and read == sum(e["count"] for e in dropped.values() if "detail" in e):
                return True
        return False


def bin_of(length: int) -> int:
    """0 for 0, then _BINS to each doubling."""
    return 0 if length < 1 else 1 + int(_BINS * math.log2(length))


def shorten(text: str, head: int = 120, tail: int = 160) -> str:
    """Begin and end of `text`, without what UTF-8 cannot carry."""
    if len(text) > head + tail:
        text = f"{text[:head]} ... {text[-tail:]}"
    return text.encode("utf-8", "replace").decode()
