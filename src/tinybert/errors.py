"""The one exception that means "the input is wrong", as opposed to "the code is wrong"."""


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


def one_line(error: BaseException) -> str:
    """Return what an error says, for a one-line message: without line breaks, 300 characters at most."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
