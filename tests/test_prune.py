"""A model folder goes in and a smaller one comes out, or one line says why not."""

import bz2
import gzip
import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from conftest import FILLERS, GOOD, QUICK
from tinybert.cli import main
from tinybert.errors import InputError
from tinybert.model_card import is_unedited
from tinybert.prune import PruneArguments, _read, prune
from tinybert.run_directory import Result
from tinybert.stages import DistillArguments, EvaluateArguments, distill_task, evaluate
from tinybert.trainer import DistillationConfig


def arguments(taught: Result, toy: dict[str, str], folder: Path, **options: Any) -> PruneArguments:
    given: dict[str, Any] = {"model": str(taught.output_dir), "corpus": [toy["train"]]}
    if options.keys() & {"neurons", "data"}:
        given["max_length"] = 16
    return PruneArguments(**given | {"output_dir": str(folder)} | options)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Running text that uses few pieces."""
    path = tmp_path / "corpus.txt"
    path.write_text("the film was good\n\nthe plot was bad\na great cast\n", encoding="utf-8")
    return str(path)


def test_a_pruned_folder_is_plain_and_says_what_was_removed(
    taught: Result, toy: dict[str, str], tmp_path: Path
) -> None:
    """A folder that needs tinybert to open, or that nobody can tell from the whole model, is no product."""
    folder = tmp_path / "small"
    made = prune(arguments(taught, toy, folder, vocabulary=22, neurons=24, data=toy["eval"]))
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 24
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.vocab_size == 22
    answer = pipeline("text-classification", str(folder))("the film was great")
    assert answer[0]["label"] == "positive"
    record = json.loads((folder / "run.json").read_text())
    assert record["removed"]["pieces"].items() >= {"before": 25, "after": 22}.items()
    assert record["removed"]["neurons"].items() >= {"before": 40, "after": 24}.items()
    before, after = record["models"]
    assert after["file_size"] < before["file_size"]
    assert after["parameters"] < before["parameters"]
    assert before["metrics"]["accuracy"] > 0.9
    assert after["metrics"]["accuracy"] > 0.9
    card, table = (folder / "README.md").read_text(), made.table()
    assert "it keeps 22 of 25 word pieces and 24 of 40 feed-forward neurons a layer" in card
    assert "of what it was" in card
    assert is_unedited(card)
    assert "pipeline_tag: text-classification" in card
    assert "25 -> 22, which are 9" in table
    assert (folder / "vocab.txt").read_text().splitlines()[:5] == [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
    ]
    assert not list(folder.glob(".writing*"))


def test_known_text_is_answered_as_by_the_whole_model(
    taught: Result, corpus: str, toy: dict[str, str], tmp_path: Path
) -> None:
    """Pieces must go with their own rows of the embeddings, in the folder as in memory."""
    prune(arguments(taught, toy, tmp_path / "small", vocabulary=17, corpus=[corpus]))
    texts = ["the plot was good", "a great film", "bad cast the"]
    logits = []
    for folder in (taught.output_dir, tmp_path / "small"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        with torch.no_grad():
            logits.append(model(**tokenizer(texts, padding=True, return_tensors="pt")).logits)
    assert torch.equal(*logits)


def test_neurons_alone_are_recovered_from_by_all_losses(
    taught: Result, toy: dict[str, str], tmp_path: Path
) -> None:
    """The vocabulary is the same, so the whole model's embeddings, states, scores and logits all teach."""
    prune(arguments(taught, toy, tmp_path / "small", neurons=2))
    config = DistillationConfig(str(tmp_path / "recovered"), gold_weight=0.1, **QUICK)
    given = DistillArguments(
        **toy,
        teacher=str(taught.output_dir),
        student=str(tmp_path / "small"),
        intermediate_epochs=1,
        prediction_epochs=1,
        max_length=16,
    )
    recovered = distill_task(given, config)
    assert json.loads((tmp_path / "recovered" / "config.json").read_text())["intermediate_size"] == 2
    log = json.loads((tmp_path / "recovered" / "run.json").read_text())["stages"]["intermediate"]["log"]
    named = {name for entry in log for name in entry}
    assert {"eval_embedding_loss", "eval_hidden_3_loss", "eval_attention_3_loss"} <= named
    assert recovered.figures[-1].metrics["accuracy"] > 0.9


def test_another_vocabulary_is_recovered_from_by_predictions(
    taught: Result, corpus: str, toy: dict[str, str], tmp_path: Path
) -> None:
    """Token ids differ: a teacher that read its student's would teach nonsense."""
    prune(arguments(taught, toy, tmp_path / "small", vocabulary=15, neurons=8, corpus=[corpus]))
    given = DistillArguments(
        **toy,
        teacher=str(taught.output_dir),
        student=str(tmp_path / "small"),
        intermediate_epochs=0,
        prediction_epochs=3,
        prediction_learning_rate=3e-3,
        max_length=16,
    )
    recovered = distill_task(given, DistillationConfig(str(tmp_path / "recovered"), **QUICK))
    folder = tmp_path / "recovered"
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.vocab_size == 15
    assert len(AutoTokenizer.from_pretrained(folder)) == 15
    assert recovered.figures[0].metrics["accuracy"] > 0.9  # the teacher read its own ids
    assert recovered.figures[-1].metrics["accuracy"] > 0.6


def test_text_is_read_as_other_commands_read_it(taught: Result, corpus: str, tmp_path: Path) -> None:
    """The same file must be text to one command and text to the other."""
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("sentence1\tsentence2\tlabel\nthe film\tthe good plot\t0\na film\tthe cast\t1\n")
    lines = tmp_path / "more.jsonl"
    lines.write_text('{"review": "the film was good"}\n{"review": "the plot was dull"}\n')
    for source in (corpus, str(pairs), str(lines)):
        given = {"model": str(taught.output_dir), "max_length": 16}
        folder = tmp_path / f"small-{Path(source).suffix}"
        made = prune(
            PruneArguments(**given, output_dir=str(folder), corpus=[source], vocabulary=16, neurons=9)
        )
        assert made.removed["pieces"]["coverage"] > 0.5
        assert made.removed["neurons"]["tokens"] >= 10


SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "films",
            "paragraphs": [
                {
                    "context": "the good film was great with a plot",
                    "qas": [
                        {
                            "id": "1",
                            "question": "was the film good",
                            "answers": [{"text": "good film", "answer_start": 4}],
                        }
                    ],
                }
            ],
        }
    ],
}
ASKED = ["was the film good", "the good film was great with a plot"]
TAGGED = "-DOCSTART- -X- O\n\ngood JJ B-POS\nfilm NN I-POS\n\nthe DT O\nplot NN O\n"
WORDS = [["good film"], ["the plot"]]


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("train.json", json.dumps(SQUAD), [ASKED]),
        ("more/train.json", json.dumps(SQUAD), [ASKED]),  # read as a folder
        ("train.csv", f"id,question,context,answers\n1,{','.join(ASKED)},good film\n", [ASKED]),
        ("train.conll", TAGGED, WORDS),
        ("train.txt", TAGGED, WORDS),
        ("train.txt", "token\tpos\tlabel\ngood\tJJ\tO\n\nfilm\tNN\tO\n", [["good"], ["film"]]),
        ("train.tsv", "token\tlabel\ngood\tB-POS\nfilm\tO\n", [["good film"]]),
        ("running.txt", "good film\na plot\n", [["good film"], ["a plot"]]),  # so many words a line, too
        ("running.tsv", "text\tlabel\ngood film\tO\n", [["good film"]]),
        (
            "train.jsonl",
            '{"id": "a1", "tokens": ["good", "film"], "ner_tags": ["O", "O"]}\n',
            [["good film"]],
        ),
        ("running.jsonl", '{"id": 1, "text": "good film"}\n', [["good film"]]),
    ],
)
def test_the_file_that_a_model_was_trained_on_is_read_as_its_text(
    name: str, content: str, read: list[list[str]], tmp_path: Path
) -> None:
    """Tags, ids and the number of a format's version are text, too, but none that the model will ever see."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    source = str(path.parent if "/" in name else path)
    asked = PruneArguments(model="m", output_dir="o", vocabulary=9, corpus=[source])
    found = _read(asked, "token_classification", ("B-POS", "I-POS", "O"))
    assert [list(row) for row in rows_of(found)] == read


def rows_of(pieces: Iterable[tuple[list[str], list[str] | None]]) -> list[tuple[str, ...]]:
    return [row for texts, pairs in pieces for row in zip(*filter(None, (texts, pairs)), strict=True)]


def test_text_columns_are_of_the_files_that_have_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labelled rows with columns of their own would shut out running text, folders and the hub."""
    row = {"title": "bad", "review": "good film", "summary": "fine plot"}
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "a.txt").write_text("good film\n")
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(json.dumps(row).encode()))
    lines = (",".join(cells) for cells in (row, row.values()))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))

    def load_dataset(*names: str, streaming: bool = False, **options: Any) -> Any:
        rows = datasets.Dataset.from_list([row])
        return rows.to_iterable_dataset() if streaming else rows

    def read(source: str, *columns: str) -> list[tuple[str, ...]]:
        asked = PruneArguments(
            model="m", output_dir="o", vocabulary=9, corpus=[source], text_columns=[*columns] or None
        )
        return rows_of(_read(asked, "classification", ()))

    monkeypatch.chdir(tmp_path)
    assert read("a.txt", "review") == read("a.txt", "review", "summary") == [("good film",)]
    assert read("a.jsonl.bz2", "review") == [("good film",)]
    for source in ("folder", "folder/*.jsonl", "a.csv.gz"):
        assert read(source, "review") == [("good film",)]
        assert read(source, "review", "summary") == [("good film", "fine plot")]
    for source, columns in (("folder", ()), ("a.jsonl.bz2", ())):
        with pytest.raises(InputError, match=r"say which with --text_columns$"):
            read(source, *columns)
    with pytest.raises(InputError, match="is read by one text column, got 'review', 'summary'"):
        read("a.jsonl.bz2", "review", "summary")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("some/name", "review") == [("good film",)]
    assert read("some/name", "review", "summary") == [("good film", "fine plot")]


def test_neurons_are_not_chosen_on_next_to_no_text(
    taught: Result, toy: dict[str, str], tmp_path: Path
) -> None:
    """Two words tell nothing about thirty neurons, and a path typed wrong may well lead to two words."""
    (tmp_path / "few.txt").write_text("good film\n")
    with pytest.raises(InputError, match="has 4 word pieces of text, too few to choose --neurons 30 on"):
        prune(arguments(taught, toy, tmp_path / "small", neurons=30, corpus=[str(tmp_path / "few.txt")]))
    assert not (tmp_path / "small").exists()


def test_overwriting_leaves_the_former_run_until_the_new_one_is_ready_and_nothing_of_it_then(
    taught: Result, toy: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill leaves a model that is whole, or its successor: never one without record, nor two in one."""
    folder = tmp_path / "small"
    prune(arguments(taught, toy, folder, neurons=30))
    (folder / "onnx").mkdir()
    for name in ("report.html", "onnx/model.onnx"):
        (folder / name).write_text("of the former run")
    former = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    scored = iter(("before",))

    def evaluate_once(arguments: EvaluateArguments) -> dict[str, float]:
        if next(scored, None) is None:
            raise KeyboardInterrupt
        return evaluate(arguments)

    again = arguments(taught, toy, folder, neurons=20, data=toy["eval"], overwrite_output_dir=True)
    with monkeypatch.context() as patched:
        patched.setattr("tinybert.prune.evaluate", evaluate_once)
        with pytest.raises(KeyboardInterrupt):
            prune(again)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == former
    prune(again)
    assert not (folder / "report.html").exists()
    assert not (folder / "onnx").exists()
    assert json.loads((folder / "run.json").read_text())["removed"]["neurons"]["after"] == 20


def test_the_record_is_as_that_of_any_run(
    taught: Result, toy: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads one record reads them all, and none may hold a secret that was typed."""
    monkeypatch.setattr("sys.argv", ["tinybert", "prune", "--hub_token", "hf_secret"])
    prune(arguments(taught, toy, tmp_path / "small", vocabulary=22))
    own, other = (
        json.loads((folder / "run.json").read_text()) for folder in (tmp_path / "small", taught.output_dir)
    )
    assert own["command"] == ["tinybert", "prune", "--hub_token", "..."]
    assert own["versions"] == other["versions"]
    assert own.keys() - other.keys() == {"removed"}


def test_half_precision_stays_half(taught: Result, toy: dict[str, str], tmp_path: Path) -> None:
    """Pruning that doubles the file is none."""
    half = tmp_path / "half"
    model = AutoModelForSequenceClassification.from_pretrained(taught.output_dir)
    model.to(torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(taught.output_dir).save_pretrained(half)
    made = prune(arguments(taught, toy, tmp_path / "small", model=str(half), neurons=20))
    before, after = made.result.figures
    assert after.file_size < before.file_size
    on_disk = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert after.file_size < on_disk < after.file_size + 8000
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing would be removed: give --vocabulary, --neurons or both"),
        ({"heads": 2}, "--heads: stock models share their width out among the heads"),
        ({"neurons": 40}, "--neurons is 40: it must be from 1 to 39"),
        ({"vocabulary": 25}, "--vocabulary is 25: there are 25 pieces"),
        ({"vocabulary": 3}, "special tokens and single characters"),
        ({"neurons": 8, "label_column": "label"}, "--label_column has no meaning without --data"),
        ({"vocabulary": 22, "max_length": 16}, "--max_length has no meaning without --neurons or --data"),
        ({"vocabulary": 22, "seed": 1}, "--seed has no meaning without --neurons: leave it out"),
        ({"neurons": 8, "max_length": 65}, "--max_length is 65"),
        ({"neurons": 8, "corpus": ["none.txt"]}, "none.txt: no such file"),
        ({"neurons": 8, "data": "none.csv"}, "none.csv: no such file"),
        ({"neurons": 8, "text_columns": ["nothing"]}, "no column"),
        ({"neurons": 8, "model": "no/such/model"}, "there is no model folder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    taught: Result, toy: dict[str, str], tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    """A half-written folder is taken for a model."""
    with pytest.raises(InputError, match=said) as refused:
        prune(arguments(taught, toy, tmp_path / "small", **options))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "small").exists()


def test_the_command_prints_both_models_and_refuses_to_overwrite_its_input(
    taught: Result, toy: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the command makes, and that the whole model survives it."""
    options = ["--model", str(taught.output_dir), "--corpus", toy["train"], "--neurons", "16"]
    options += ["--max_length", "32"]
    assert main(["prune", *options, "--output_dir", str(tmp_path / "small")]) == 0
    said = capsys.readouterr().out
    assert "before" in said
    assert "40 -> 16" in said
    assert main(["prune", *options, "--output_dir", str(taught.output_dir), "--overwrite_output_dir"]) == 2
    assert "holds the input" in capsys.readouterr().err
    assert main(["prune", *options, "--output_dir", str(tmp_path / "small")]) == 2
    assert "is not empty" in capsys.readouterr().err


def damage(folder: Path, generator: random.Random) -> None:
    """Do one thing to a model folder that disks, editors and downloads do."""
    path = generator.choice(sorted(entry for entry in folder.iterdir() if entry.is_file()))
    content = path.read_bytes()
    match generator.randrange(6):
        case 0:
            path.unlink()
        case 1:
            path.write_bytes(content[: generator.randrange(len(content) + 1)])
        case 2:
            at = generator.randrange(len(content))
            path.write_bytes(content[:at] + bytes(generator.randbytes(3)) + content[at + 3 :])
        case 3:
            path.write_bytes(b"")
        case 4 if path.suffix == ".json":
            _damage_json(path, generator)
        case _:
            place = generator.randrange(len(content))
            path.write_bytes(content[:place] + content[place + generator.randint(1, 9) :])


def _damage_json(path: Path, generator: random.Random) -> None:
    """Exchange one value, somewhere in the depth of a JSON file."""
    state = json.loads(path.read_text(encoding="utf-8"))
    entry = state
    while True:
        keys = list(entry) if isinstance(entry, dict) else list(range(len(entry)))
        if not keys:
            break
        key = generator.choice(keys)
        if isinstance(entry[key], dict | list) and generator.random() < 0.8:
            entry = entry[key]
            continue
        hostile = [None, -1, 0, 10**30, 0.5, "", "x" * 5000, "\0", [], {}, True, [[["a"]]], float("nan")]
        entry[key] = generator.choice(hostile)
        break
    path.write_text(json.dumps(state), encoding="utf-8")


def hostile_options(generator: random.Random, folder: Path, toy: dict[str, str]) -> list[str]:
    """Options as nobody should give them, and text as the world has it."""
    corpus = folder / f"corpus{generator.choice(['.txt', '.csv', '.jsonl', '.tsv', '', '.parquet'])}"
    words = ["good", "the", "\0", "\ufeff", "[CLS]", "é" * 300, "\ud7ff", "x" * 9000, '"', ",", "\r", "text"]
    lines = ["text,label", *(" ".join(generator.choices([*words, *FILLERS, *GOOD], k=5)) for _ in range(20))]
    corpus.write_bytes(generator.choice(["\n".join(lines).encode(), generator.randbytes(200), b""]))
    odd = ["-1", "0", "1", "7", "25", "40", "1e3", "", "nan", str(10**20)]
    odd_sources = [str(corpus), str(corpus), str(folder), "*"]
    options = ["--corpus", generator.choice(odd_sources if generator.random() < 0.3 else [toy["train"]])]
    for name, share, numbers in (
        ("--vocabulary", 0.8, ["16", "20", "22"]),
        ("--neurons", 0.5, ["1", "8", "39"]),
        ("--heads", 0.02, ["1", "2"]),
    ):
        if generator.random() < share:
            options += [name, generator.choice(odd if generator.random() < 0.07 else numbers)]
    if generator.random() < 0.3:
        options += ["--data", generator.choice([toy["eval"], toy["eval"], str(corpus), "none.csv"])]
    if {"--neurons", "--data"} & {*options} or generator.random() < 0.05:
        lengths = odd if generator.random() < 0.07 else ["3", "16", "64"]
        options += ["--max_length", generator.choice(lengths)]
    if generator.random() < 0.1:
        options += ["--text_columns", *generator.choice([["text"], ["label", "text"], ["no"], ["text"] * 3])]
    return options


def check_hostile(
    number: int, model: Path, toy: dict[str, str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> int:
    """Run one damaged case by its number; check how it ends and return the exit status."""
    generator = random.Random(number)
    shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("checkpoints"))
    if generator.random() < 0.8:
        damage(folder / "model", generator)
    output = folder / "small"
    options = ["--model", str(folder / "model"), "--output_dir", str(output)]
    status = main(["prune", *options, *hostile_options(generator, folder, toy)])
    said = capsys.readouterr()
    if status == 0:
        assert (output / "run.json").is_file(), number
        AutoModelForSequenceClassification.from_pretrained(output)
    else:
        assert status == 2, number
        errors = [line for line in said.err.splitlines() if line.startswith("tinybert: error: ")]
        assert len(errors) == 1, (number, said.err)
        assert "Traceback" not in said.err, number
        assert not output.exists() or not any(output.iterdir()), number
    shutil.rmtree(folder / "model")
    shutil.rmtree(output, ignore_errors=True)
    return status


def test_damaged_folders_and_hostile_options_end_in_a_result_or_one_line(
    taught: Result, toy: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stack trace tells a user nothing, and a folder left behind is taken for a model."""
    ends = [check_hostile(number, taught.output_dir, toy, tmp_path, capsys) for number in range(25)]
    assert {0, 2} == set(ends)


@pytest.mark.slow
def test_150_damaged_folders_and_hostile_options_end_in_a_result_or_one_line(
    taught: Result, toy: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As above, with the rarer damage."""
    ends = [check_hostile(number, taught.output_dir, toy, tmp_path, capsys) for number in range(100, 250)]
    assert ends.count(0) > 10
    assert ends.count(2) > 30
