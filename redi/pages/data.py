"""`redi data report` and `redi data show`: what became of the data, and what one row trains."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from redi.data.detokenize import token_texts
from redi.data.read import Example, read_rows, to_example
from redi.data.report import COUNTS, BuildReport
from redi.data.tokenize import Trace, tokenize_examples
from redi.errors import RediError
from redi.evaluation.tables import Table
from redi.pages.charts import histogram
from redi.pages.html import token_spans, visible, write_page

MAX_SOURCES = 30  # rows of the table of sources; the rest is added up
MAX_TOKENS = 40_000  # of a trace on a page: about 2.5 MB; the middle of a longer one is left out
KINDS = {"masked": "m", "trained": "t", "stop": "s"}  # their classes on a page; o: trained, too


@dataclass(frozen=True)
class ShownTrace:
    """One trace as training sees it, T tokens: each "masked", "trained" or "stop"."""

    is_chosen: bool
    ids: list[int]
    texts: list[str]
    kinds: list[str]

    @property
    def side(self) -> str:
        return "chosen" if self.is_chosen else "rejected"

    def runs(self) -> Iterator[tuple[str, int, int]]:
        """(kind, start, end) of neighbours of one kind."""
        for kind, places in groupby(range(len(self.kinds)), key=lambda i: self.kinds[i]):
            first, *rest = places
            yield kind, first, first + len(rest) + 1


def find_example(path: str, *, row: int | None = None, id: str | None = None) -> Example:
    """The ready row with that number (from 1; default) or id. Raises RediError if there is none."""
    number = 0
    for number, (where, columns) in enumerate(read_rows(path), 1):
        if id is None and number < (row or 1):
            continue
        example = to_example(columns, where)
        if id is None or example.id == id:
            return example
    wanted = f"id {id!r}" if id is not None else f"row {row or 1}"
    raise RediError(f"{path}: no {wanted} among its {number:,} rows")


def shown_traces(example: Example, tokenizer: Any) -> list[ShownTrace]:
    """The example's traces. A token is trained iff the pack that training makes has it as a target.

    Raises RediError for a template that cannot carry the row, and for an empty completion.
    """
    tokenized = tokenize_examples([example], tokenizer, max_length=None)
    return [_shown(trace, tokenizer) for trace in tokenized.traces[0]]


def _shown(trace: Trace, tokenizer: Any) -> ShownTrace:
    from redi.data.pack import IGNORE_INDEX, pack_traces

    (pack,) = pack_traces([trace], len(trace.input_ids))
    is_target = [False, *(pack.targets_T != IGNORE_INDEX).tolist()[:-1]]  # of the token before
    kinds = ["trained" if trained else "masked" for trained in is_target]
    if is_target[-1]:
        kinds[-1] = "stop"
    ids = trace.input_ids.tolist()
    return ShownTrace(trace.is_chosen, ids, token_texts(tokenizer, ids), kinds)


def print_traces(example: Example, traces: Sequence[ShownTrace]) -> None:
    """On standard output, coloured on a terminal; headings say the same without colours."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f"{visible(example.id)}", style="bold"))
    styles = {"masked": ("dim", "dim"), "trained": ("green", "cyan"), "stop": ("bold reverse",) * 2}
    for trace in traces:
        for kind, start, end in trace.runs():
            count = "the stop token" if kind == "stop" else f"{end - start:,} tokens"
            console.print(Text(f"\n── {trace.side}, {kind}: {count} ──", style="bold"))
            line = Text()
            for i in range(start, end):
                line.append(visible(trace.texts[i]), styles[kind][i % 2])
            console.print(line, soft_wrap=True)


def write_show_page(
    example: Example, traces: Sequence[ShownTrace], dataset_name: str, file: Path
) -> Path:
    return write_page(
        file,
        "show.html",
        title=example.id,
        dataset=dataset_name,
        answer=example.answer,
        traces=[
            {
                "side": trace.side,
                "counts": {kind: trace.kinds.count(kind) for kind in KINDS},
                "tokens": _spans(trace, MAX_TOKENS // len(traces)),
                "left_out": max(0, len(trace.ids) - MAX_TOKENS // len(traces)),
            }
            for trace in traces
        ],
    )


def _spans(trace: ShownTrace, limit: int) -> Any:
    def span(i: int) -> tuple[str, str, str]:
        kind = trace.kinds[i]
        name = "o" if kind == "trained" and i % 2 else KINDS[kind]
        return trace.texts[i], name, f"{kind}, id {trace.ids[i]}"

    size = len(trace.ids)
    if size <= limit:
        return token_spans(map(span, range(size)))
    head, tail = map(span, range(limit // 2)), map(span, range(size - limit // 2, size))
    gap = (f"\n[… {size - 2 * (limit // 2):,} tokens left out …]\n", "m", "")
    return token_spans([*head, gap, *tail])


def write_data_page(folder: Path, file: Path | None = None) -> Path:
    """The page of a folder of `redi data build`; default: report.html in it.

    Raises RediError for a folder without report.json.
    """
    source = folder / "report.json"
    if not source.exists():
        raise RediError(f"{folder}: no report.json; run `redi data build` first")
    report = vars(BuildReport.load(source))
    counts = report["counts"]
    lacking = [name for name in COUNTS if name not in counts]
    if lacking:
        raise RediError(f"{source}: not a report of redi data build (no count of {lacking[0]})")
    dropped = {what: report[f"dropped_{what}"] for what in ("rows", "traces")}
    examples = report.get("examples", {})
    return write_page(
        file or folder / "report.html",
        "data.html",
        title=f"Data: {folder.resolve().name}",
        folder=folder,
        counts=counts,
        steps=_steps(counts, dropped),
        lengths=_lengths_table(report),
        charts=list(_histograms(report.get("histograms", {}))),
        dropped={
            f"{what.capitalize()} dropped": _reasons(
                dropped[what], examples.get(what, {}), counts[f"{what} read"]
            )
            for what in dropped
        },
        sources=_sources_table(report.get("sources", {})),
        overlap=report.get("overlap", {}),
        overlap_table=_overlap_table(report.get("overlap", {})),
        files=report.get("files", []),
        fingerprint=report.get("fingerprint", ""),
        config=json.dumps(report["config"], indent=2, ensure_ascii=False),
    )


def _steps(
    counts: Mapping[str, int], dropped: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Bars of rows and of traces, each beside all that were read."""
    groups = []
    for what, names in (
        ("rows", ("rows read", "positives", "pairs")),
        ("traces", ("traces read", "traces correct", "traces incorrect", "traces kept")),
    ):
        number = {name: counts[name] for name in names}
        number[f"{what} dropped"] = sum(entry["count"] for entry in dropped[what].values())
        read = counts[f"{what} read"] or 1
        bars = [{"name": n, "count": c, "share": 100 * c / read} for n, c in number.items()]
        groups.append((what, bars))
    return groups


def _lengths_table(report: Mapping[str, Any]) -> Table | None:
    if not report["lengths"]:
        return None
    columns = ("mean", "median", "p95", "max")
    rows = [
        [name, *(f"{stats[column]:,.0f}" for column in columns)]
        for name, stats in report["lengths"].items()
    ]
    return Table([f"length in {report['length_unit']}", *columns], rows)


def _histograms(histograms: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """(which traces, chart): right and wrong ones together, in the bins that hold any."""
    which = {"all that were judged": "traces", "kept": "traces kept"}
    for heading, name in which.items():
        found = {side: histograms.get(f"{side} {name}") for side in ("correct", "incorrect")}
        series = {side: h for side, h in found.items() if h and sum(h["counts"])}
        if not series:
            continue
        longest = max(series.values(), key=lambda h: len(h["counts"]))
        bins = len(longest["counts"])
        counts = {s: [*h["counts"], *[0] * (bins - len(h["counts"]))] for s, h in series.items()}
        used = [i for i in range(bins) if any(c[i] for c in counts.values())]
        first, last = used[0], used[-1] + 1
        chart = histogram(
            {side: c[first:last] for side, c in counts.items()},
            longest["edges"][first : last + 1],
            f"length in {longest['unit']}",
        )
        yield heading, chart


def _reasons(
    reasons: Mapping[str, Mapping[str, Any]], examples: Mapping[str, Any], read: int
) -> list[dict[str, Any]]:
    """The commonest first, with their examples."""
    ordered = sorted(reasons.items(), key=lambda item: -item[1]["count"])
    return [
        {
            "reason": reason,
            "count": entry["count"],
            "share": 100 * entry["count"] / (read or 1),
            "first": entry["first"],
            "examples": examples.get(reason, []),
        }
        for reason, entry in ordered
    ]


def _sources_table(sources: Mapping[str, Mapping[str, int]]) -> Table | None:
    if not sources:
        return None
    names = list(dict.fromkeys(name for entry in sources.values() for name in entry))
    ordered = sorted(sources.items(), key=lambda item: -item[1].get("rows read", 0))
    rows = [
        [source or "(no source)", *(f"{entry.get(name, 0):,}" for name in names)]
        for source, entry in ordered[:MAX_SOURCES]
    ]
    rest = ordered[MAX_SOURCES:]
    if rest:
        sums = (sum(entry.get(name, 0) for _, entry in rest) for name in names)
        rows.append([f"{len(rest):,} more sources", *(f"{number:,}" for number in sums)])
    return Table(["source", *names], rows)


def _overlap_table(overlap: Mapping[str, Mapping[str, Any]]) -> Table | None:
    if not overlap:
        return None
    rows = [
        [name, f"{met['problems']:,}", f"{len(met['problems shared']):,}"]
        + [f"{met[key]:,}" for key in ("rows shared", "rows exact")]
        for name, met in overlap.items()
    ]
    header = ["evaluation set", "its problems", "of them met", "rows sharing 8 words", "rows exact"]
    return Table(header, rows)
