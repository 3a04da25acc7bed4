"""Tiny random models, a tokenizer, toy data and a fine-tuned teacher; all made here, none downloaded."""

# ruff: noqa: E402

import atexit
import os
import shutil
import tempfile

# Before anything that reads them when it is imported.
_cache = tempfile.mkdtemp(prefix="tinybert-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_CACHE": _cache,
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}

import csv
import gc
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    set_seed,
)

from tinybert.run_directory import Result
from tinybert.stages import FinetuneArguments, finetune
from tinybert.training import TrainingConfig

torch.set_num_threads(1)
# The same examples each time, and a busy machine is no fault of the code.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
gc.freeze()  # the Trainer collects garbage at each start: half a second among all the imported modules

GOOD = ("good", "great", "fine", "superb")
BAD = ("bad", "awful", "poor", "dull")
FILLERS = ("the", "a", "film", "plot", "was", "and", "with", "cast", "very", "story")
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLERS, "##s", ".")

_FAMILIES: dict[str, tuple[type, type[PreTrainedModel], dict[str, Any]]] = {
    "bert": (BertConfig, BertModel, {"num_hidden_layers": 3, "hidden_size": 32}),
    "roberta": (RobertaConfig, RobertaModel, {"num_hidden_layers": 2, "hidden_size": 24}),
    "electra": (
        ElectraConfig,
        ElectraModel,
        {"num_hidden_layers": 2, "hidden_size": 32, "embedding_size": 16},
    ),
    "distilbert": (DistilBertConfig, DistilBertModel, {"n_layers": 3, "dim": 48}),
}
_SHARED = {
    "vocab_size": len(PIECES),
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Give a model weights that no default start has, so that an unread gain or bias shows."""
    set_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(mean=float(gain), std=0.2)
    return model.eval()


def run_processes(count: int, script: Path, *arguments: object) -> None:
    """Run a script in so many processes by torchrun, this folder before its arguments; fail as it does."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    done = subprocess.run(
        [*launch, *map(str, (script, Path(__file__).parent, *arguments))],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def tiny_encoder() -> Callable[..., PreTrainedModel]:
    """``tiny_encoder(family, **config)``: a random encoder with dropout 0.1 (the families' own default)."""

    def make(family: str, *, seed: int = 0, **options: Any) -> PreTrainedModel:
        config_class, model_class, shape = _FAMILIES[family]
        width = "hidden_dim" if family == "distilbert" else "intermediate_size"
        return randomise(model_class(config_class(**_SHARED | shape | {width: 40} | options)), seed)

    return make


@pytest.fixture(params=sorted(_FAMILIES))
def encoder(request: pytest.FixtureRequest, tiny_encoder: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """One random encoder of each supported family."""
    return tiny_encoder(request.param)


def make_masked_lm(seed: int = 0) -> PreTrainedModel:
    """Make a random masked language model over ``PIECES``."""
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 40}
    return randomise(BertForMaskedLM(BertConfig(**_SHARED | shape)), seed)


@pytest.fixture(scope="session")
def tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast(vocab={piece: place for place, piece in enumerate(PIECES)})


@pytest.fixture(scope="session")
def save_model(tokenizer: BertTokenizerFast) -> Callable[[PreTrainedModel, Path], Path]:
    """``save_model(model, folder)``: a model folder with the tokenizer."""

    def save(model: PreTrainedModel, folder: Path) -> Path:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def sentence(generator: random.Random, telling: Sequence[str]) -> str:
    """One telling word somewhere among one to seven words that tell nothing."""
    words = generator.choices(FILLERS, k=generator.randint(1, 7))
    words.insert(generator.randint(0, len(words)), generator.choice(telling))
    return " ".join(words)


def write_csv(
    path: Path, rows: Sequence[Sequence[object]], header: Sequence[str] = ("text", "label")
) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def toy_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Rows of a text and its sentiment, which one word tells."""
    generator = random.Random(seed)
    names = ["negative", "positive"] * (count // 2 + 1)
    rows = [(sentence(generator, GOOD if name == "positive" else BAD), name) for name in names[:count]]
    generator.shuffle(rows)
    return rows


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """``train`` (96 rows) and ``eval`` (33 rows): two paths, as the options are called."""
    folder = tmp_path_factory.mktemp("toy")
    return {
        "train": str(write_csv(folder / "train.csv", toy_rows(96))),
        "eval": str(write_csv(folder / "dev.csv", toy_rows(33, seed=1))),
    }


QUICK: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="session")
def start_folder(
    tmp_path_factory: pytest.TempPathFactory, save_model: Callable[[PreTrainedModel, Path], Path]
) -> Path:
    """An encoder that learns the toy task in a second."""
    set_seed(0)
    config = BertConfig(
        **_SHARED, num_hidden_layers=3, hidden_size=32, intermediate_size=40, initializer_range=0.05
    )
    return save_model(BertModel(config), tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory, toy: dict[str, str], start_folder: Path) -> Result:
    """The result of fine-tuning on the toy task."""
    config = TrainingConfig(
        str(tmp_path_factory.mktemp("taught") / "teacher"), num_train_epochs=9, learning_rate=6e-3, **QUICK
    )
    return finetune(FinetuneArguments(**toy, model=str(start_folder), max_length=16), config)
