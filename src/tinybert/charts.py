"""Numbers -> inline SVG that takes its colours and letters from the page around it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 250.0, 150.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 10.0, 12.0, 34.0
_MOST_POINTS = 150  # of a line: what fits into its pixels

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: What it is, for the style (``series-NAME``) and the spoken description.
        points: Finite (x, y).
    """

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class _Axis:
    """Values -> places between two ends in the drawing, on a line or on powers of ten."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def place(self, value: float) -> float:
        bend: Callable[[float], float] = math.log10 if self.is_log else float
        share = (bend(value) - bend(self.low)) / (bend(self.high) - bend(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 4) -> list[float]:
        """Return round values, at most so many."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
                inside = [value for value in found if self.low <= value <= self.high]
                if 2 <= len(inside) <= most:
                    return inside
            return [self.low, self.high]
        size = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        step = next(
            size * digit for digit in (1, 2, 5, 10, 20) if (self.high - self.low) / (size * digit) < most
        )
        first = math.ceil(self.low / step)
        return [place * step for place in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _axis(values: Sequence[float], start: float, end: float, *, may_log: bool, pad: float = 0.0) -> _Axis:
    low, high = min(values), max(values)
    if may_log and low > 1e-12 and high > 8 * low:
        return _Axis(low / (1 + pad), high * (1 + pad), start, end, is_log=True)
    size, room = max(abs(low), abs(high)), (high - low) * pad
    if high - low <= 1e-9 * max(size, 1e-3):  # one value, in the middle
        room = size / 2 if size > 1e-6 else 0.5
    least = max(low - room, 0.0) if low > 0 else low - room  # no time below none
    return _Axis(least, high + room, start, end, is_log=False)


def _number(value: float) -> str:
    size = abs(value)
    if size >= 10_000 or 0 < size < 0.001:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str = "") -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<path class="grid" d="M{_LEFT:.0f} {y:.1f}H{right:.0f}"/>')
        parts.append(f'<text x="{_LEFT - 5:.0f}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in x_axis.ticks():
        x = x_axis.place(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {bottom:.0f}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15:.0f}" text-anchor="middle">{_number(value)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{_HEIGHT - 4:.0f}" text-anchor="middle">{escape(x_label)}</text>'
    )
    if y_label:
        parts.append(f'<text x="{_LEFT:.0f}" y="9">{escape(y_label)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT:.0f} {_TOP:.0f}V{bottom:.0f}H{right:.0f}"/>')
    return parts


def _svg(description: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(description)}">'
        f"{''.join(parts)}</svg>"
    )


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Return no more points than can be seen: means over runs of equal length."""
    length = math.ceil(len(points) / _MOST_POINTS)
    runs = [points[start : start + length] for start in range(0, len(points), length)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def line_chart(title: str, series: Sequence[Series], x_label: str) -> str:
    """Return lines over a common x axis; y is on powers of ten where the values span more than one.

    Args:
        title: For the spoken description; not drawn.
        series: At least one, each with at least one finite point.
        x_label: Under the axis.
    """
    points = [point for line in series for point in line.points]
    x_axis = _axis([x for x, _ in points], _LEFT, _WIDTH - _RIGHT, may_log=False)
    y_axis = _axis([y for _, y in points], _HEIGHT - _BOTTOM, _TOP, may_log=True, pad=0.04)
    parts = _frame(x_axis, y_axis, x_label)
    spoken = []
    for line in series:
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in _thinned(line.points)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="series series-{escape(line.name)}" d="M{path}"/>')
        if len(places) < 30:
            dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in places)
            parts.append(f'<g class="series-{escape(line.name)}">{dots}</g>')
        spoken.append(f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}")
    return _svg(f"{title} by {x_label}: {', '.join(spoken)}", parts)


def scatter_chart(points: Sequence[tuple[str, float, float]], x_label: str, y_label: str) -> str:
    """Return named points; x is on powers of ten where the values span more than one.

    Args:
        points: (name, x, y), finite, at least one.
        x_label: Under the axis.
        y_label: Over the axis.
    """
    x_axis = _axis([x for _, x, _ in points], _LEFT, _WIDTH - _RIGHT, may_log=True, pad=0.3)
    y_axis = _axis([y for *_, y in points], _HEIGHT - _BOTTOM, _TOP + 12, may_log=False, pad=0.15)
    parts = _frame(x_axis, y_axis, x_label, y_label)
    lowest = _HEIGHT
    for name, x, y in sorted(points, key=lambda point: point[2]):
        across, up = x_axis.place(x), y_axis.place(y)
        lowest = min(up - 7, lowest - 12)  # a name above its point, and above the names below it
        side = "end" if across > _WIDTH / 2 else "start"
        if lowest < up - 8:  # moved away from its point: a line leads back
            parts.append(f'<path class="grid" d="M{across:.1f} {lowest + 2:.1f}V{up - 5:.1f}"/>')
        kind = "teacher" if name == "teacher" else "student"
        parts.append(f'<circle class="dot dot-{kind}" cx="{across:.1f}" cy="{up:.1f}" r="4.5"/>')
        parts.append(
            f'<text class="name" x="{across:.1f}" y="{lowest:.1f}" text-anchor="{side}">{escape(name)}</text>'
        )
    spoken = "; ".join(f"{name}: {x:.3g} and {y:.4g}" for name, x, y in points)
    return _svg(f"{y_label} against {x_label}: {spoken}", parts)
