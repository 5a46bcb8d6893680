"""Small charts as inline SVG: they follow the page's colours, light or dark, and load nothing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from redi.pages.html import visible
from redi.pages.plots import smooth

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 394, 8, 192  # of the plane
POINTS = 400  # of a curve; longer ones are thinned
SMOOTHED = 2000  # points that are smoothed at most; of a longer curve, means of so many stretches

Curve = tuple[np.ndarray, np.ndarray]  # x, y


@dataclass(frozen=True)
class Axis:
    """Values to pixels. `sign` 0: linear; +1 or -1: logarithmic in sign * value."""

    low: float
    high: float
    start: float
    end: float
    sign: int = 0

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.sign:
            value, low, high = (math.log10(self.sign * z) for z in (value, low, high))
        share = (value - low) / (high - low) if high != low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> list[float]:
        if self.sign:
            sizes = sorted((self.sign * self.low, self.sign * self.high))
            decades = range(math.floor(math.log10(sizes[0])), math.ceil(math.log10(sizes[1])) + 1)
            marks = (1, 2, 5) if math.log10(sizes[1] / sizes[0]) < 2 else (1,)
            found = [m * 10.0**d for d in decades for m in marks]
            found = [x for x in found if sizes[0] * 0.999 <= x <= sizes[1] * 1.001]
            return [self.sign * x for x in found[:: -(-len(found) // (count + 2)) or 1]]
        step = (self.high - self.low or 1.0) / count
        size = 10.0 ** math.floor(math.log10(step))
        step = next(m * size for m in (1, 2, 5, 10) if m * size >= step * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def axis_for(values: np.ndarray, start: float, end: float) -> Axis:
    """Logarithmic where values of one sign span more than a factor of five, as in plots.py: a run
    that collapses must not flatten the others."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Axis(0.0, 1.0, start, end)
    low, high = float(values.min()), float(values.max())
    sizes = np.abs(values[values != 0])
    if low * high > 0 and np.quantile(sizes, 0.99) >= 5 * np.quantile(sizes, 0.01):
        return Axis(low, high, start, end, int(math.copysign(1, low)))
    pad = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(low - pad, high + pad, start, end)


def line_chart(
    curves: Mapping[str, Curve],
    name: str,
    x_name: str = "step",
    *,
    colours: Mapping[str, int] | None = None,
    raw: bool = True,
) -> Markup:
    """`raw`: the values are noisy: shown faintly, with a smoothed line on top."""
    colours = colours or {run: i for i, run in enumerate(curves)}
    finite = [y[np.isfinite(y)] for _, y in curves.values()]
    y_axis = axis_for(np.concatenate(finite), BOTTOM, TOP)
    xs = np.concatenate([x for x, _ in curves.values()])
    x_axis = Axis(float(xs.min()), float(xs.max()), LEFT, RIGHT)
    paths = []
    for run, (x, y) in curves.items():
        style = line_class(colours[run])
        if raw:
            paths.append(_path(*thin(x, y), x_axis, y_axis, f"raw {style}"))
            x, y = _means(x, y)
            y = smooth(y)
        paths.append(_path(*thin(x, y), x_axis, y_axis, style))
    last = ", ".join(f"{run} {y[-1]:.4g}" for run, (_, y) in curves.items() if len(y))
    label = f"{name} by {x_name}; last values: {last}"
    return _svg(label, [_grid(x_axis, y_axis, x_name), *paths])


def histogram(series: Mapping[str, Sequence[float]], edges: Sequence[float], name: str) -> Markup:
    """Shares of each series in bins between `edges`; bins are drawn equally wide."""
    bins = len(edges) - 1
    shares = {key: np.asarray(counts) / (sum(counts) or 1) for key, counts in series.items()}
    top = max((float(share.max()) for share in shares.values()), default=0) or 1.0
    x_axis = Axis(0, bins, LEFT, RIGHT)
    y_axis = Axis(0, 100 * top * 1.05, BOTTOM, TOP)
    paths = []
    for i, share in enumerate(shares.values()):
        steps = "".join(
            f"V{y_axis.at(100 * value)}H{x_axis.at(b + 1)}" for b, value in enumerate(share)
        )
        path = f"M{x_axis.at(0)} {BOTTOM}{steps}V{BOTTOM}Z"
        paths.append(f'<path class="area {line_class(i)}" d="{path}"/>')
    narrow = edges[-1] < 20 * max(edges[0], 1)
    digits = range(1, 10) if narrow else (1, 2, 5)
    round_numbers = [m * 10**d for d in range(10) for m in digits]
    inside = [x for x in round_numbers if edges[0] <= x <= edges[-1]]
    inside = inside[:: -(-len(inside) // 6) or 1]
    marks = {float(np.interp(x, edges, np.arange(bins + 1))): short(x) for x in inside}
    peaks = {key: int(share.argmax()) for key, share in shares.items()}
    most = (
        f"{key}: most in {short(edges[b])} to {short(edges[b + 1])}" for key, b in peaks.items()
    )
    label = f"{name}, percent of each; {', '.join(most)}"
    return _svg(label, [_grid(x_axis, y_axis, name, marks, suffix="%"), *paths])


def thin(x: np.ndarray, y: np.ndarray, limit: int = POINTS) -> Curve:
    """At most `limit` points of a curve: the least and the greatest of each stretch."""
    if len(x) <= limit:
        return x, y
    keep = []
    for stretch in np.array_split(np.arange(len(x)), limit // 2):
        values = y[stretch]
        if np.isfinite(values).any():
            keep += sorted({stretch[np.nanargmin(values)], stretch[np.nanargmax(values)]})
    return x[keep], y[keep]


def line_class(i: int) -> str:
    """Colour, and dashes once the colours are used up."""
    return f"l{i % 7}" + (f" dash{i // 7 % 4}" if i >= 7 else "")


def short(value: float) -> str:
    """12,345 as 12k; a tick's label."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if unit == "k" else 1):
            return f"{value / size:.3g}{unit}".replace("-", "−")
    return f"{value:,.4g}".replace("-", "−")


def _means(x: np.ndarray, y: np.ndarray) -> Curve:
    if len(x) <= SMOOTHED:
        return x, y
    stretches = np.array_split(np.arange(len(x)), SMOOTHED)
    means = [
        (x[s].mean(), y[s][np.isfinite(y[s])].mean()) for s in stretches if np.isfinite(y[s]).any()
    ]
    return tuple(np.array(means).T)  # type: ignore[return-value]


def _path(x: np.ndarray, y: np.ndarray, x_axis: Axis, y_axis: Axis, style: str) -> str:
    points, pen = [], "M"
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if not math.isfinite(b) or (y_axis.sign and y_axis.sign * b <= 0):
            pen = "M"  # a gap
            continue
        points.append(f"{pen}{x_axis.at(a)} {y_axis.at(b)}")
        pen = "L"
    return f'<path class="{style}" d="{"".join(points)}"/>'


def _grid(
    x_axis: Axis,
    y_axis: Axis,
    x_name: str,
    marks: Mapping[float, str] | None = None,
    suffix: str = "",
) -> str:
    lines = []
    for tick in y_axis.ticks():
        y = y_axis.at(tick)
        kind = "zero" if tick == 0 else "grid"
        lines.append(f'<line class="{kind}" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>')
        lines.append(
            f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{short(tick)}{suffix}</text>'
        )
    marks = marks or {tick: short(tick) for tick in x_axis.ticks() if tick < x_axis.high * 0.9}
    for tick, text in marks.items():
        lines.append(
            f'<text x="{x_axis.at(tick)}" y="{BOTTOM + 15}" text-anchor="middle">{text}</text>'
        )
    lines.append(
        f'<text x="{RIGHT}" y="{BOTTOM + 28}" text-anchor="end">{escape(visible(x_name))}</text>'
    )
    return "".join(lines)


def _svg(label: str, parts: list[str]) -> Markup:
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(visible(label))}"'
    return Markup(f"<svg {box}>{''.join(parts)}</svg>")
