"""What a distillation is told: who teaches whom, how long, on which rows, and what files it leaves."""

from dataclasses import dataclass, field

from tinybert.augment import AugmentSettings
from tinybert.baselines import BaselineArguments
from tinybert.errors import InputError, check_least, refuse_given
from tinybert.rows import DataArguments
from tinybert.student import StudentArguments


@dataclass
class DistillArguments(DataArguments, StudentArguments, AugmentSettings, BaselineArguments):
    """Who teaches whom, how long each stage lasts, and whether the rows are augmented."""

    teacher: str = field(kw_only=True, metadata={"help": "Fine-tuned teacher: a folder or a hub name."})
    intermediate_epochs: float | None = field(
        default=None,
        metadata={"help": "Epochs on hidden states and attention; 1 after a closed form, else 5; 0: none."},
    )
    intermediate_learning_rate: float = field(default=3e-4, metadata={"help": "Its peak learning rate."})
    prediction_epochs: float | None = field(
        default=None,
        metadata={"help": "Epochs on the teacher's soft labels; 2 after a closed form, else 3; 0: none."},
    )
    prediction_learning_rate: float = field(default=1e-4, metadata={"help": "Its peak learning rate."})
    force: bool = field(default=False, metadata={"help": "Distil from a teacher no better than chance."})
    augment: bool = field(
        default=False, metadata={"help": "Train on augmented rows: --masked_lm, --word_vectors, --copies ..."}
    )
    augmented: str | None = field(
        default=None, metadata={"help": "Train on these rows, made by tinybert augment, in place of --train."}
    )
    onnx: bool = field(
        default=False,
        metadata={
            "help": "Write the student as ONNX as well, with 32-bit and 8-bit weights, as export does."
        },
    )
    max_drop: float | None = field(
        default=None,
        metadata={"help": "Points that 8-bit weights may cost on --eval, else exit status 1; 1 with --onnx."},
    )

    def __post_init__(self) -> None:
        """Settle how long the stages last; refuse what would silently do nothing."""
        super().__post_init__()
        check_least(self, {"intermediate_learning_rate": 0, "prediction_learning_rate": 0})
        if not self.augment and (self.masked_lm or self.word_vectors or self.keep_if_teacher_agrees):
            raise InputError(
                "--masked_lm, --word_vectors and --keep_if_teacher_agrees are for --augment true: add it"
            )
        if not self.augment:
            settings = ("copies", "candidates", "replace_probability", "stop_words", "masked_share")
            refuse_given(self, settings, "without --augment true")
        if not self.onnx:
            refuse_given(self, ("max_drop",), "without --onnx true")
        if self.augment and self.augmented:
            raise InputError("--augment makes rows and --augmented names some ready made: give one of them")
        if self.intermediate_epochs is None:
            self.intermediate_epochs = 1.0 if self.is_solved else 5.0
        if self.prediction_epochs is None:
            self.prediction_epochs = 2.0 if self.is_solved else 3.0
        epochs = (self.intermediate_epochs, self.prediction_epochs)
        solves_alone = self.is_solved and not (self.baseline or self.augment or self.augmented)
        if min(epochs) < 0 or (max(epochs) == 0 and not solves_alone):
            raise InputError(
                f"got {epochs[0]} intermediate and {epochs[1]} prediction epochs: neither may be negative, "
                "and one must be above 0 unless the student is to stay as --init closed_form solves it"
            )
