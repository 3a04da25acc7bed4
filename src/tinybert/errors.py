"""What ends a command other than success: bad input, a stop, a bar that was not reached; none is a bug."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any


class InputError(ValueError):
    """Bad input from the user: one line that says what came, what was expected and what to do.

    The command line prints it on stderr and exits with 2; from Python it is a plain ``ValueError``.
    """


class Stopped(Exception):
    """Training was asked to stop and did, with everything kept: one line that says where and how to go on.

    The command line prints it and exits with 0.
    """


class Rejected(Exception):
    """What was made is not good enough by the bar that was set: one line that says by how much, what is left.

    The command line prints it on stderr and exits with 1.
    """


def refuse_given(options: Any, names: Iterable[str], when: str) -> None:
    """Refuse options that nobody would read: those that have another value than their default.

    Args:
        options: A dataclass.
        names: Of its fields; what is not one of them, or has no plain default, is passed over.
        when: What makes them meaningless, as the message goes on: "with --student".

    Raises:
        InputError: One was given.
    """
    unread = set(names)
    for entry in fields(options):
        has_default = entry.name in unread and entry.default is not MISSING
        if has_default and getattr(options, entry.name) != entry.default:
            raise InputError(f"--{entry.name} has no meaning {when}: leave it out")


def check_least(options: Any, least: Mapping[str, float]) -> None:
    """Check that numbers among options are not too small.

    Args:
        options: A dataclass.
        least: The smallest value of each; None is no number, and passes.

    Raises:
        InputError: One is smaller, or no number at all (NaN).
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and not value >= bound:
            raise InputError(f"--{name} must be {bound} or more, got {value}")


def one_line(error: BaseException) -> str:
    """Return what an error says, for a one-line message: without line breaks, 300 characters at most."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
