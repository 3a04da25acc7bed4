"""Transformer distillation of BERT-family encoders: a big teacher in, a small fast student out."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

_HOMES = {
    "DistillationConfig": "trainer",
    "DistillationTrainer": "trainer",
    "DistillationLoss": "objective",
    "make_student": "student",
    "load_data": "data",
    "finetune": "stages",
    "distill_task": "stages",
    "distill_general": "general",
    "evaluate": "stages",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562): ``import tinybert`` loads no torch."""
    if name == "__version__":
        return version("tinybert")
    if name not in _HOMES:
        raise AttributeError(f"module 'tinybert' has no attribute {name!r}")
    return getattr(import_module(f"tinybert.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
