"""The one exception that means "the input is wrong", as opposed to "the code is wrong"."""


class InputError(ValueError):
    """Bad input from the user: one line that says what came, what was expected and what to do.

    The command line prints it on stderr and exits with 2; from Python it is a plain ``ValueError``.
    """
