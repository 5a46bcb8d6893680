"""`redi traces A B`: traces coloured by how their tokens' log-probs changed from model A to B.

With A = SFT and B = REDI one sees what stage 2 pulled up and what it pushed down, and where.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from markupsafe import Markup

from redi.data.read import read_rows, to_example
from redi.errors import RediError
from redi.evaluation.tables import Table
from redi.pages.charts import line_chart
from redi.pages.html import clip, token_spans, write_page
from redi.pages.token_scores import KINDS, ScoredExample, ScoredTrace, score

LIMITS = (0.1, 0.3, 1.0, 3.0, 10.0)  # nats between two colours, the same on every page
PARTS = 20  # of a trace, for the change along it
MAX_TRACE = 6_000  # tokens shown of one trace; the middle of a longer one is left out
MAX_SHOWN = 3_000_000  # characters that the traces may take; a token takes about 60
TOP = 10  # rows of the tables of what moved most
SIDES = {"chosen": True, "rejected": False}
COLOURS = {"chosen": 2, "rejected": 3}  # not those of up and down


def write_trace_page(
    before: str,
    after: str,
    dataset_name: str,
    file: Path,
    *,
    num_problems: int = 50,
    sort: Literal["change", "id"] = "change",
) -> Path:
    """Scores the first `num_problems` rows under both models and writes the page.

    `sort`: what moved most comes first, or the order of the rows. Raises RediError for models or
    rows that cannot be read, and for models whose tokenizers differ.
    """
    rows = islice(read_rows(dataset_name), num_problems)
    examples = [to_example(row, where) for where, row in rows]
    if not examples:
        raise RediError(f"{dataset_name}: no rows")
    scored, num_dropped = score(before, after, examples)
    if sort == "change":
        scored.sort(key=lambda example: -example.size)
    traces = [trace for example in scored for trace in example.traces]
    sides = {name: [t for t in traces if t.is_chosen == chosen] for name, chosen in SIDES.items()}
    sides = {name: of_side for name, of_side in sides.items() if of_side}
    shown = _within(scored, MAX_SHOWN)
    names = short_names(before, after)
    return write_page(
        file,
        "traces.html",
        title=" → ".join(names),
        folders=(before, after),
        dataset=dataset_name,
        num_scored=len(scored),
        num_dropped=num_dropped,
        sort=sort,
        summary=_sides_table(sides),
        kinds=_kinds_table(sides),
        chart=_chart(sides),
        legend=[(name, f"b{COLOURS[name]}") for name in sides],
        falls={name: _falls(of_side) for name, of_side in sides.items()},
        moved={name: _moved_table(of_side) for name, of_side in sides.items()},
        scale=_scale(),
        examples=[_shown(example) for example in shown],
    )


def short_names(before: str, after: str) -> tuple[str, str]:
    """The last parts of two paths, as many as tell them apart."""
    a, b = Path(before).parts, Path(after).parts
    depth = next((n for n in range(1, max(len(a), len(b)) + 1) if a[-n:] != b[-n:]), 1)
    return "/".join(a[-depth:]), "/".join(b[-depth:])


def colour(change: float) -> str:
    """n, or d1..d5 down, u1..u5 up: one more for each of LIMITS that is reached."""
    level = sum(abs(change) >= limit for limit in LIMITS)
    return "n" if not level else f"{'d' if change < 0 else 'u'}{level}"


def _scale() -> list[tuple[str, str]]:
    """Every colour from the deepest down to the highest up, with the change it begins at."""
    down = [(f"d{i}", f"−{limit:g}") for i, limit in enumerate(LIMITS, 1)]
    up = [(f"u{i}", f"+{limit:g}") for i, limit in enumerate(LIMITS, 1)]
    return [*reversed(down), ("n", "0"), *up]


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():+.3f}" if len(values) else ""


def _sides_table(sides: dict[str, list[ScoredTrace]]) -> Table:
    header = ["traces", "number", "tokens", "before", "after", "change"]
    header += ["until they part", "from there on", "stop token"]
    rows = []
    for name, traces in sides.items():
        before_T, after_T, change_T = (
            np.concatenate([getattr(t, key) for t in traces])
            for key in ("before_T", "after_T", "change_T")
        )
        pairs = [t for t in traces if t.parting < len(t.texts)]
        common_T, own_T = (
            np.concatenate([t.change_T[part(t)] for t in pairs]) if pairs else np.array([])
            for part in (lambda t: slice(t.parting), lambda t: slice(t.parting, None))
        )
        row = [name, f"{len(traces):,}", f"{len(change_T):,}"]
        row += [f"{before_T.mean():.3f}", f"{after_T.mean():.3f}", _mean(change_T)]
        stop_S = np.array([t.change_T[-1] for t in traces])
        rows.append([*row, _mean(common_T), _mean(own_T), _mean(stop_S)])
    note = (
        "Log-probs and their change: mean over tokens, in nats. Two traces of a problem part at "
        "the first token in which they differ."
    )
    return Table(header, rows, note)


def _kinds_table(sides: dict[str, list[ScoredTrace]]) -> Table:
    """Mean change by kind of token, on each side."""
    header = ["tokens", *(cell for name in sides for cell in (name, "change"))]
    rows = []
    for kind in KINDS:
        row = [kind]
        for traces in sides.values():
            change_T = np.concatenate(
                [t.change_T[np.array([k == kind for k in t.kinds])] for t in traces]
            )
            row += [f"{len(change_T):,}", _mean(change_T)]
        if any(row[2::2]):
            rows.append(row)
    return Table(header, rows)


def _chart(sides: dict[str, list[ScoredTrace]]) -> Markup:
    """Mean change along the traces, in PARTS equal parts of each."""
    curves = {}
    for name, traces in sides.items():
        sums, counts = np.zeros(PARTS), np.zeros(PARTS)
        for trace in traces:
            part_T = np.arange(len(trace.texts)) * PARTS // len(trace.texts)
            np.add.at(sums, part_T, trace.change_T)
            np.add.at(counts, part_T, 1)
        x = (np.arange(PARTS) + 0.5) * 100 / PARTS
        curves[name] = x[counts > 0], sums[counts > 0] / counts[counts > 0]
    colours = {name: COLOURS[name] for name in sides}
    name = "mean change of log-prob"
    return line_chart(curves, name, "percent of the trace", colours=colours, raw=False)


def _falls(traces: list[ScoredTrace]) -> list[dict[str, Any]]:
    """The TOP places whose log-prob fell most, each with what stands before it."""
    places = [
        (float(trace.change_T[i]), trace, int(i))
        for trace in traces
        for i in np.argsort(trace.change_T, kind="stable")[:TOP]
    ]
    places.sort(key=lambda place: place[0])
    return [
        {
            "context": ("…" if i else "") + "".join(trace.texts[max(0, i - 12) : i])[-36:],
            "token": trace.texts[i],
            "before": float(trace.before_T[i]),
            "after": float(trace.after_T[i]),
            "colour": colour(change),
        }
        for change, trace, i in places[:TOP]
    ]


def _moved_table(traces: list[ScoredTrace]) -> Table:
    """Which tokens moved most, all their places together."""
    totals: dict[str, list[float]] = defaultdict(list)
    for trace in traces:
        for text, change in zip(trace.texts, trace.change_T.tolist(), strict=True):
            totals[text].append(change)
    most = sorted(totals.items(), key=lambda item: -abs(sum(item[1])))[:TOP]
    rows = [
        [
            repr(text)[1:-1].replace(" ", "␣"),
            f"{len(changes):,}",
            f"{sum(changes) / len(changes):+.3f}",
            f"{sum(changes):+.1f}",
        ]
        for text, changes in most
    ]
    return Table(["token", "places", "mean change", "in all"], rows)


def _within(examples: Sequence[ScoredExample], budget: int) -> list[ScoredExample]:
    """The first examples that together take at most `budget` characters; always one."""
    shown: list[ScoredExample] = []
    for example in examples:
        budget -= 3000 + sum(60 * min(len(t.texts), MAX_TRACE) for t in example.traces)
        if budget < 0 and shown:
            break
        shown.append(example)
    return shown


def _shown(example: ScoredExample) -> dict[str, Any]:
    return {
        "id": example.id,
        "prompt": clip(example.traces[0].prompt, 2000),
        "traces": [
            {
                "side": "chosen" if trace.is_chosen else "rejected",
                "change": f"{trace.change_T.mean():+.3f}",
                "tokens": _spans(trace),
            }
            for trace in example.traces
        ],
    }


def _spans(trace: ScoredTrace) -> Markup:
    size = len(trace.texts)
    half = MAX_TRACE // 2
    left_out = range(half, size - half) if size > MAX_TRACE else range(0)

    def tokens(places: range) -> Markup:
        parts = []
        for i in places:
            if i == trace.parting:
                parts.append(("", "part", "here the two traces part"))
            note = f"{trace.before_T[i]:.2f} → {trace.after_T[i]:.2f}"
            parts.append((trace.texts[i], colour(float(trace.change_T[i])), note))
        return token_spans(parts)

    if not left_out:
        return tokens(range(size))
    gap = Markup("\n[… {:,} tokens left out, mean change {:+.3f} …]\n").format(
        len(left_out), float(trace.change_T[half : size - half].mean())
    )
    return tokens(range(half)) + gap + tokens(range(size - half, size))
