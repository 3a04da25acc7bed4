"""Which teacher layer each student layer imitates."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinybert.errors import InputError
from tinybert.mapping import STRATEGIES, layer_map

DEPTHS = [(student, teacher) for teacher in range(1, 49) for student in range(1, teacher + 1)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_pair_of_depths_gets_a_rising_mapping_inside_the_teacher(strategy: str) -> None:
    """A layer out of range crashes a run late; a repeated one wastes a student layer."""
    for student, teacher in DEPTHS:
        mapping = layer_map(strategy, student, teacher)
        assert len(mapping) == student
        assert mapping[0] >= 1
        assert mapping[-1] <= teacher
        assert all(earlier < later for earlier, later in pairwise(mapping))


def test_uniform_stays_within_half_a_layer_of_even_and_ends_at_the_last_layer() -> None:
    """Uniform is the paper's best strategy because it covers the teacher evenly, its last layer included."""
    for student, teacher in DEPTHS:
        mapping = layer_map("uniform", student, teacher)
        assert mapping[-1] == teacher
        assert all(
            abs(g * student - m * teacher) <= student / 2 for m, g in enumerate(mapping, start=1)
        )  # |g(m) - m N / M| <= 1 / 2 without division


@pytest.mark.parametrize(
    ("strategy", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, (3, 6, 9, 12)),
        ("uniform", 6, 12, (2, 4, 6, 8, 10, 12)),
        ("uniform", 12, 12, tuple(range(1, 13))),
        ("uniform", 4, 24, (6, 12, 18, 24)),
        ("uniform", 4, 6, (2, 3, 4, 6)),
        ("uniform", 5, 12, (2, 5, 7, 10, 12)),
        ("uniform", 1, 12, (12,)),
        ("top", 4, 12, (9, 10, 11, 12)),
        ("bottom", 4, 12, (1, 2, 3, 4)),
    ],
)
def test_known_depths_give_the_published_layers(
    strategy: str, student: int, teacher: int, expected: tuple[int, ...]
) -> None:
    """Another mapping would be another method than the one whose figures the paper reports."""
    assert layer_map(strategy, student, teacher) == expected


@given(st.data())
def test_an_explicit_mapping_is_kept_as_given(data: st.DataObject) -> None:
    """A user who names the layers gets these layers, repeated ones included."""
    teacher = data.draw(st.integers(1, 48))
    layers = sorted(data.draw(st.lists(st.integers(1, teacher), min_size=1, max_size=teacher)))
    assert layer_map(layers, len(layers), teacher) == tuple(layers)


@pytest.mark.parametrize(
    ("strategy", "student", "teacher", "message"),
    [
        ("uniform", 13, 12, "cannot map 13 student layers and 12 teacher layers.*between 1 and 12"),
        ("top", 0, 12, "cannot map 0 student layers and 12 teacher layers.*between 1 and 12"),
        ("even", 4, 12, "unknown layer mapping 'even': use uniform, top, bottom"),
        ((3, 6, 9), 4, 12, r"\(3, 6, 9\) has 3 entries for 4 student layers and 12 teacher layers"),
        ((3, 6, 9, 13), 4, 12, r"leaves the range 1 to 12 \(4 student layers and 12 teacher layers"),
        ((0, 6, 9, 12), 4, 12, "leaves the range 1 to 12"),
        ((3, 9, 6, 12), 4, 12, r"decreases \(4 student layers and 12 teacher layers\)"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused_in_one_line(
    strategy: str | tuple[int, ...], student: int, teacher: int, message: str
) -> None:
    """The user has to see both depths to repair the command."""
    with pytest.raises(InputError, match=message) as refusal:
        layer_map(strategy, student, teacher)
    assert "\n" not in str(refusal.value)
