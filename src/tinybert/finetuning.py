"""One fine-tuning whose input has been opened and checked."""

from dataclasses import dataclass, field, replace

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from tinybert import models
from tinybert.batch_mix import check_batches
from tinybert.collation import Collator
from tinybert.data import TaskData, tokenize
from tinybert.errors import InputError
from tinybert.evaluation import metrics_for_trainer
from tinybert.preflight import Preflight, check_ids, measure_lengths, row_lines
from tinybert.rows import DataArguments, load_rows, row_length
from tinybert.run_directory import Run
from tinybert.training import EncoderTrainer, TrainingConfig, plan_stage


@dataclass
class FinetuneArguments(DataArguments):
    """What to fine-tune."""

    model: str = field(kw_only=True, metadata={"help": "Encoder to fine-tune: a folder or a hub name."})


@dataclass(frozen=True)
class FineTuning:
    """A model under a new head, and its rows.

    Attributes:
        run: Where it happens.
        config: How it is trained.
        model: The encoder.
        tokenizer: Its own.
        max_length: Where rows are cut.
        data: Training and eval rows.
        train_rows: Training rows as tokens.
        eval_rows: Eval rows as tokens.
    """

    run: Run
    config: TrainingConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    data: tuple[TaskData, TaskData]
    train_rows: Dataset
    eval_rows: Dataset

    def train(self) -> None:
        """Train on the gold labels."""
        trainer = EncoderTrainer(
            model=self.model,
            args=self.run.stage_config("finetune", self.config, best=self.data[0].metric),
            train_dataset=self.train_rows,
            eval_dataset=self.eval_rows,
            data_collator=Collator(self.tokenizer, self.data[0].kind),
            compute_metrics=metrics_for_trainer(self.data[1], self.eval_rows),
        )
        self.run.train("finetune", trainer)

    def preflight(self) -> Preflight:
        """Return what has been found out, steps counted and nothing timed."""
        cut = self.max_length, models.positions_of(self.model.config)
        lengths = measure_lengths(self.data[0], self.train_rows, self.tokenizer, *cut)
        plan = plan_stage("finetune", self.config, self.train_rows["length"])
        return Preflight(
            row_lines(*self.data),
            {"model": self.model.num_parameters()},
            (plan,),
            data=self.data,
            lengths={"model": lengths},
            batches=check_batches(self.data[0], self.train_rows["length"], self.config),
        )


def prepare_finetuning(arguments: FinetuneArguments, config: TrainingConfig) -> FineTuning:
    """Open and check everything, without writing.

    Raises:
        InputError: Bad input, see the message.
    """
    if config.num_train_epochs <= 0 and config.max_steps <= 0:
        raise InputError(
            f"--num_train_epochs is {config.num_train_epochs}, so nothing would be trained: give more than 0"
        )
    run = Run(config, arguments, inputs=[arguments.model, arguments.train, arguments.eval])
    data = load_rows(arguments)
    kind = data[0].kind
    tokenizer = models.open_tokenizer(arguments.model, kind=kind)
    set_seed(config.seed)
    model = models.new_task_model(arguments.model, kind, data[0].label_names)
    max_length = row_length(arguments.max_length, kind, model)
    run.arguments = replace(arguments, max_length=max_length)
    rows = [tokenize(part, tokenizer, max_length, arguments.stride) for part in data]
    for part in rows:
        check_ids("model", model, part)
    return FineTuning(run, config, model, tokenizer, max_length, data, *rows)
