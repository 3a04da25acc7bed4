"""``python -m tinybert``, for ``accelerate launch -m tinybert`` and ``torchrun -m tinybert``."""

from tinybert.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
