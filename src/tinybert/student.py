"""The student: fewer layers than its teacher's, and narrower ones, and where it starts."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from tinybert import models
from tinybert.capture import capture, evaluating
from tinybert.closed_form import Batches, check_solvable, solve_student
from tinybert.collation import MODEL_INPUTS
from tinybert.errors import InputError, refuse_given
from tinybert.mapping import layer_map as map_layers
from tinybert.moments import Moments
from tinybert.student_config import StudentSize, bert_config, shrink_config
from tinybert.vocabulary import vocabulary_difference

Start = Literal["closed_form", "copy", "random"]
Family = Literal["bert"]

# The closed form on more text than this gains less than its time is worth (docs/results.md).
CALIBRATION_TOKENS = 32_768

_OF_A_BUILT_ONE = ("layers", "hidden_size", "intermediate_size", "heads", "student_family", "init")

_BERTS: dict[str, type[PreTrainedModel]] = {
    "": BertModel,
    "ForMaskedLM": BertForMaskedLM,
    "ForQuestionAnswering": BertForQuestionAnswering,
    "ForSequenceClassification": BertForSequenceClassification,
    "ForTokenClassification": BertForTokenClassification,
}


@dataclass(kw_only=True)
class StudentArguments:
    """Which student: one that is there, or one to build, how large, and where it starts."""

    student: str | None = field(
        default=None, metadata={"help": "Student to start from: a folder or hub name; built unless given."}
    )
    layers: int = field(default=4, metadata={"help": "Layers of a student that is built."})
    hidden_size: int = field(default=312, metadata={"help": "Its hidden size."})
    intermediate_size: int = field(default=1200, metadata={"help": "Its feed-forward size."})
    heads: int | None = field(default=None, metadata={"help": "Its attention heads; the teacher's number."})
    student_family: Family | None = field(
        default=None,
        metadata={
            "help": "bert builds a BERT over the teacher's vocabulary, whatever the teacher is; the "
            "teacher's family unless given."
        },
    )
    init: Start = field(
        default="closed_form",
        metadata={"help": "Where a built student starts: solved from the teacher, copied layers, or random."},
    )

    @property
    def is_solved(self) -> bool:
        """Whether the student starts in closed form."""
        return self.student is None and self.init == "closed_form"


def tokenizer_of_student(
    arguments: StudentArguments, teacher: PreTrainedTokenizerBase, *, compares_tokens: bool
) -> PreTrainedTokenizerBase:
    """Return what the student reads with: its teacher's tokenizer, or its own where the pieces differ.

    Args:
        arguments: Which student.
        teacher: The teacher's tokenizer.
        compares_tokens: Whether any loss sets the states of one model's tokens against the other's.

    Raises:
        InputError: Tokens would be compared, and the models do not have the same ones.
    """
    if arguments.student is None:
        return teacher
    own = models.open_tokenizer(arguments.student)
    difference = vocabulary_difference(own, teacher)
    if difference is None:
        return teacher
    if compares_tokens:
        raise InputError(
            f"student and teacher have {difference}, and are compared token by token: take a student "
            "with the teacher's tokenizer, let tinybert build one or, where a label is one of a whole text, "
            "distil predictions alone (tinybert distill --intermediate_epochs 0)"
        )
    return own


def begin_student(
    arguments: StudentArguments,
    teacher: PreTrainedModel,
    open_model: Callable[[str], PreTrainedModel],
    *,
    layer_map: str | Sequence[int],
    seed: int,
) -> PreTrainedModel:
    """Open the student that was named, or build one; check that it fits its teacher.

    Where it is to start in closed form, it is left at random: ``solve_student`` overwrites it later, once
    there is a place for what it makes.

    Args:
        arguments: Which student.
        teacher: The teacher.
        open_model: Opens a named student with the head it needs.
        layer_map: g, see ``tinybert.mapping.layer_map``.
        seed: Of everything random.

    Raises:
        InputError: The student cannot be opened or built, or does not fit the teacher.
    """
    if arguments.student is None:
        size = StudentSize(
            arguments.layers, arguments.hidden_size, arguments.intermediate_size, arguments.heads
        )
        init: Start = "copy" if arguments.init == "copy" else "random"
        family = arguments.student_family
        student = make_student(teacher, size, family=family, init=init, layer_map=layer_map, seed=seed)
        if arguments.is_solved:
            depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
            check_solvable(teacher, student, map_layers(layer_map, *depths))
        return student
    refuse_given(arguments, _OF_A_BUILT_ONE, f"with --student {arguments.student}, which is there already")
    set_seed(seed)
    student = open_model(arguments.student)
    if student.config.hidden_size > teacher.config.hidden_size:
        raise InputError(
            f"the student {arguments.student} is {student.config.hidden_size} wide, more than the teacher's "
            f"{teacher.config.hidden_size}: take a narrower student"
        )
    return student


def _bert_like(teacher: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the BERT with the teacher's kind of head."""
    head = re.search(r"For\w+$", type(teacher).__name__)
    kind = _BERTS.get(head[0] if head else "")
    if kind is None:
        raise InputError(f"BERT has no head like {type(teacher).__name__}'s: leave --student_family out")
    return kind


def make_student(
    teacher: PreTrainedModel,
    size: StudentSize | None = None,
    *,
    family: Family | None = None,
    init: Start | None = None,
    layer_map: str | Sequence[int] = "uniform",
    calibration: Sequence[str] | Batches | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 42,
) -> PreTrainedModel:
    """Build a student of the teacher's architecture, or of BERT's, with its head and label names.

    Where layers differ in kind (ModernBERT's attend locally or globally), student layer m is of the kind of
    the teacher's g(m). An MPNet student with its teacher's number of heads starts with the teacher's position
    bias, whatever else it starts with: equation 7 leaves it out of the scores (``tinybert.capture``).

    Args:
        teacher: Any BERT-family model with or without a head; read only.
        size: The student's shape, TinyBERT-4's unless given.
        family: ``"bert"`` for BERT's architecture over the vocabulary and the special pieces of a teacher of
            another family; the teacher's own unless given.
        init: ``"closed_form"`` solves the weights on calibration text (``tinybert.closed_form``);
            ``"copy"`` takes embeddings, head and the layers g(m) where widths agree; ``"random"``. Closed
            form where calibration text is given, else random, unless said.
        layer_map: g, see ``tinybert.mapping.layer_map``.
        calibration: Texts (with a tokenizer), or tokenised batches, for the closed form.
        tokenizer: The teacher's.
        seed: Of everything random.

    Raises:
        InputError: A shape that does not fit the teacher, a copy between different widths, or a closed form
            without text or for another family.
    """
    size = size or StudentSize()
    init = init or ("random" if calibration is None else "closed_form")
    own = family is None or family == teacher.config.model_type
    config = (shrink_config if own else bert_config)(teacher.config, size)
    if init == "copy" and not own:
        raise InputError(
            f"cannot copy {teacher.config.model_type} layers into BERT's: leave --student_family out, or "
            "start otherwise (init closed_form or random)"
        )
    teacher_layers = map_layers(layer_map, size.layers, teacher.config.num_hidden_layers)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [teacher.config.layer_types[layer - 1] for layer in teacher_layers]
    set_seed(seed)
    student = (type(teacher) if own else _bert_like(teacher))(config).float()
    _copy_position_bias(teacher, student)
    if init == "copy":
        _copy_layers(teacher, student, teacher_layers)
    elif init == "closed_form":
        if calibration is None:
            raise InputError("a closed-form start needs text: give calibration, or init random")
        batches = calibration if tokenizer is None else calibration_batches(calibration, tokenizer)  # type: ignore[arg-type]
        solve_student(teacher, student, batches, teacher_layers, seed=seed)  # type: ignore[arg-type]
    return student.eval()


@torch.no_grad()
def fit_projections(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    layer_map: tuple[int, ...],
) -> list[Tensor]:
    """Return the W_m (d', d) with the least |h_S W - h_T|^2 on some text, for the embeddings and layers 1..M.

    Where a student that comes ready starts: from projections drawn at random, its first steps would bend it
    to fit them.
    """
    layers = (0, *layer_map)
    moments = [Moments() for _ in layers]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        with evaluating(student), evaluating(teacher):
            own = capture(student.base_model, batch, scores=False).hidden
            goals = capture(teacher.base_model, batch, scores=False, layers=layer_map[-1]).hidden
        for m, g in enumerate(layers):
            moments[m].add(own[m][mask], goals[g][mask], torch.ones(int(mask.sum())))
    width, teacher_width = student.config.hidden_size, teacher.config.hidden_size
    without_one = torch.eye(width + 1, dtype=torch.float64)[:, :-1]
    prior = torch.zeros(width, teacher_width, dtype=torch.float64)
    return [moment.mapped(without_one).ridge(prior, 1e-6).float() for moment in moments]


def calibration_batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int = 128
) -> list[Mapping[str, Tensor]]:
    """Tokenise texts, from the first on, into batches for the closed form."""
    rows, tokens = [], 0
    for text in texts:
        rows.append(tokenizer(text, truncation=True, max_length=max_length))
        tokens += len(rows[-1]["input_ids"])
        if tokens >= CALIBRATION_TOKENS:
            break
    return padded_batches(rows, tokenizer)


def calibration_rows(rows: Dataset, *, seed: int) -> list[Mapping[str, list[int]]]:
    """Draw tokenised rows at random, about ``CALIBRATION_TOKENS`` tokens of them, without their labels."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))
    enough = np.searchsorted(np.cumsum(np.asarray(rows["length"])[order]), CALIBRATION_TOKENS) + 1
    inputs = [name for name in MODEL_INPUTS if name in rows.column_names]
    return rows.select(order[:enough]).select_columns(inputs).to_list()


def padded_batches(
    rows: Iterable[Mapping[str, list[int]]], tokenizer: PreTrainedTokenizerBase
) -> list[Mapping[str, Tensor]]:
    """Pad tokenised rows into batches of 32, rows of like lengths together, the batches in mixed order."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    starts = np.random.Generator(np.random.PCG64(0)).permutation(range(0, len(ordered), 32))
    return [dict(tokenizer.pad(ordered[i : i + 32], return_tensors="pt")) for i in starts]  # type: ignore[arg-type]


@torch.no_grad()
def _copy_position_bias(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Copy MPNet's table of biases by distance (buckets, heads), which all of its layers share."""
    source = teacher.state_dict()
    for name, table in student.named_parameters():
        if name.endswith("encoder.relative_attention_bias.weight") and table.shape == source[name].shape:
            table.copy_(source[name])


def _copy_layers(teacher: PreTrainedModel, student: PreTrainedModel, teacher_layers: tuple[int, ...]) -> None:
    """Copy embeddings, head and the mapped layers by name: layer m - 1 takes the weights of g(m) - 1.

    Layers that share their weights (ALBERT) are copied once, as they are.
    """
    source = teacher.state_dict()
    copied = {}
    for name, tensor in student.state_dict().items():
        origin = re.sub(
            r"\b(layers?\.)(\d+)", lambda found: f"{found[1]}{teacher_layers[int(found[2])] - 1}", name
        )
        if origin not in source:
            raise InputError(
                f"cannot copy {name}: the teacher has no {origin}; map the teacher's first layer to the "
                "student's first alone, or start at random"
            )
        if source[origin].shape != tensor.shape:
            raise InputError(
                f"cannot copy {name}: {tuple(source[origin].shape)} in the teacher, {tuple(tensor.shape)} in "
                "the student: give the student the teacher's widths, or start at random"
            )
        copied[name] = source[origin]
    student.load_state_dict(copied)
