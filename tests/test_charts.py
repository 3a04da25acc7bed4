"""Charts: well-formed, truthful about places, and unharmed by any numbers or names."""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinybert.charts import Series, line_chart, scatter_chart

NUMBERS = st.floats(-1e18, 1e18, allow_nan=False)


def places(chart: str, tag: str, *names: str) -> list[tuple[float, ...]]:
    found = ElementTree.fromstring(chart).iter(tag)
    return [tuple(float(str(element.get(name))) for name in names) for element in found]


def test_a_line_falls_where_its_numbers_fall() -> None:
    """A curve drawn upside down tells of a loss that rose."""
    chart = line_chart("loss", [Series("training", [(0, 5.0), (10, 4.0), (20, 3.0)])], "step")
    (x0, y0), (x1, y1), (x2, y2) = places(chart, "circle", "cx", "cy")
    assert x0 < x1 < x2
    assert y0 < y1 < y2, "SVG counts from above"
    assert math.isclose(y1 - y0, y2 - y1, abs_tol=0.2)
    assert 'aria-label="loss by step: training from 5 to 3"' in chart


def test_values_of_several_sizes_are_drawn_on_powers_of_ten() -> None:
    """On a plain axis all that happened after the first steps is one flat line."""
    chart = line_chart("loss", [Series("training", [(0, 100.0), (1, 10.0), (2, 1.0)])], "step")
    ups = [up for _, up in places(chart, "circle", "cx", "cy")]
    assert math.isclose(ups[1] - ups[0], ups[2] - ups[1], abs_tol=0.2)


def test_a_long_line_is_thinned_to_what_can_be_seen() -> None:
    """A week of training logs a megabyte of points."""
    chart = line_chart(
        "loss", [Series("training", [(step, 2.0 + step % 2) for step in range(100_000)])], "step"
    )
    assert len(chart) < 8000


def test_points_stand_in_the_order_of_their_numbers_and_their_names_do_not_overlap() -> None:
    """Score against latency is read by where the points are."""
    chart = scatter_chart(
        [("teacher", 40.0, 91.0), ("student", 4.0, 90.9), ("int8", 1.0, 90.8)], "ms", "accuracy"
    )
    dots = sorted(places(chart, "circle", "cx", "cy"))
    assert [up for _, up in dots] == sorted((up for _, up in dots), reverse=True)
    names = re.findall(r'<text class="name" x="[\d.]+" y="([\d.]+)"', chart)
    heights = sorted(map(float, names))
    assert len(heights) == 3
    assert min(above - below for below, above in itertools.pairwise(heights)) >= 12


@pytest.mark.parametrize("chart", [line_chart, None])
def test_names_are_escaped(chart: object) -> None:
    """A model folder may be called anything."""
    name = '<script>alert(1)</script>"&'
    made = (
        line_chart(name, [Series(name, [(0, 1.0)])], name)
        if chart
        else scatter_chart([(name, 1.0, 1.0)], name, name)
    )
    assert "<script" not in made
    assert ElementTree.fromstring(made).get("aria-label", "").count(name)


@settings(max_examples=150)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=40))
def test_any_finite_numbers_make_a_chart_with_its_points_inside(points: list[tuple[float, float]]) -> None:
    """A page is not worth failing for a loss that was the same at all steps, or huge, or tiny."""
    for chart in (
        line_chart("loss", [Series("training", points)], "step"),
        scatter_chart([("m", x, y) for x, y in points], "ms", "score"),
    ):
        for x, y in places(chart, "circle", "cx", "cy"):
            assert -1 <= x <= 251
            assert -1 <= y <= 151
        assert "nan" not in chart
        assert len(places(chart, "text", "x")) < 14 + len(points)
