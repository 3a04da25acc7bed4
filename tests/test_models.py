"""Opening model folders: what is there, what is not, and what would run somebody else's code."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizerFast,
    PreTrainedModel,
)

from tinybert.errors import InputError
from tinybert.models import (
    check_vocabularies,
    label_names,
    new_classifier,
    open_classifier,
    open_config,
    open_encoder,
    open_tokenizer,
)

Make = Callable[..., PreTrainedModel]
Save = Callable[[PreTrainedModel, Path], Path]
NAMES = ("negative", "positive")


@pytest.fixture
def classifier_folder(tiny_encoder: Make, save_model: Save, tmp_path: Path) -> Path:
    config = tiny_encoder("bert", id2label=dict(enumerate(NAMES))).config
    return save_model(BertForSequenceClassification(config), tmp_path / "classifier")


@pytest.fixture
def encoder_folder(encoder: PreTrainedModel, save_model: Save, tmp_path: Path) -> Path:
    return save_model(encoder, tmp_path / "encoder")


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_encoder_comes_back_as_it_was_saved(encoder: PreTrainedModel, encoder_folder: Path) -> None:
    """A weight lost on the way would be drawn anew, and the teacher would be another one."""
    opened = open_encoder(str(encoder_folder))
    assert type(opened) is type(encoder)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name


def test_half_precision_checkpoints_are_opened_in_float32(
    tiny_encoder: Make, save_model: Save, tmp_path: Path
) -> None:
    """transformers opens a checkpoint in its own precision, and AdamW in bfloat16 learns nothing."""
    folder = save_model(tiny_encoder("bert").to(torch.bfloat16), tmp_path / "half")
    assert {parameter.dtype for parameter in open_encoder(str(folder)).parameters()} == {torch.float32}


def test_a_classifier_comes_with_its_label_names(classifier_folder: Path) -> None:
    """Labels are matched by name: lost names would match by position, and turn 83 % into 10 %."""
    assert label_names(open_classifier(str(classifier_folder)).config) == NAMES


def test_a_new_classifier_keeps_the_encoder_and_names_its_classes(
    encoder: PreTrainedModel, encoder_folder: Path
) -> None:
    """The head is new; if the encoder were too, fine-tuning would start from noise."""
    model = new_classifier(str(encoder_folder), ("a", "b", "c"))
    assert label_names(model.config) == ("a", "b", "c")
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    kept = model.base_model.state_dict()
    shared = [name for name in encoder.state_dict() if "pooler" not in name]
    assert len(shared) > 10
    for name in shared:
        assert torch.equal(kept[name], encoder.state_dict()[name]), name


def test_a_new_regression_head_has_one_score_and_no_class_names(classifier_folder: Path) -> None:
    """Two logits for a score would be trained as classes; the old head has another shape and is replaced."""
    model = new_classifier(str(classifier_folder), ())
    assert model.config.problem_type == "regression"
    assert model.config.num_labels == 1
    assert label_names(model.config) == ()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/nowhere", r"there is no model folder .*nowhere: give an existing folder or a hub name"),
        ("./nowhere", "there is no model folder ./nowhere"),
        ("{tmp}/empty", r"empty is no model folder: it has no config.json"),
        ("{tmp}/file.txt", r"file.txt is a file: give the model folder it lies in"),
        ("somebody/not-downloaded", "cannot open the model somebody/not-downloaded: "),
        ("not a name!", "cannot open the model not a name!: "),
    ],
)
def test_what_is_no_model_is_said_in_one_line(source: str, message: str, tmp_path: Path) -> None:
    """A mistyped path must not look like a network problem three frames into a library."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    for opener in (open_config, open_tokenizer, open_encoder, open_classifier):
        if opener is open_tokenizer and "cannot open" in message:
            continue  # says "cannot load the tokenizer"
        with pytest.raises(InputError, match=message) as caught:
            opener(source.format(tmp=tmp_path))
        assert "\n" not in str(caught.value)


def test_a_model_without_a_task_head_is_refused_as_a_classifier(
    tiny_encoder: Make, save_model: Save, tmp_path: Path
) -> None:
    """transformers would draw a random head with a warning, and the student would learn its noise."""
    config = tiny_encoder("bert").config
    for name, model in (("plain", tiny_encoder("bert")), ("masked", BertForMaskedLM(config))):
        folder = save_model(model, tmp_path / name)
        with pytest.raises(InputError, match=f"{name} has no classification head"):
            open_classifier(str(folder))


def test_a_multi_label_classifier_is_refused(classifier_folder: Path) -> None:
    """Its classes do not exclude each other: a softmax over them would teach something it never said."""
    change_config(classifier_folder, problem_type="multi_label_classification")
    with pytest.raises(InputError, match="is a multi-label classifier, which cannot be distilled"):
        open_classifier(str(classifier_folder))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_weights_are_refused(classifier_folder: Path, damage: str) -> None:
    """Half a download ends in one line, not in a stack of another library's frames."""
    path = classifier_folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"\xff" * 64, "empty": b""}[damage])
    with pytest.raises(InputError, match=r"cannot load the weights of .*classifier: "):
        open_classifier(str(classifier_folder))


def test_weights_that_lack_a_part_of_the_encoder_are_refused(
    classifier_folder: Path, tiny_encoder: Make
) -> None:
    """transformers would fill the hole with noise and a warning that nobody reads."""
    change_config(classifier_folder, num_hidden_layers=4)
    with pytest.raises(InputError, match=r"lack 16 encoder tensors such as bert\.encoder\.layer\.3\."):
        open_classifier(str(classifier_folder))


def test_a_folder_without_weights_is_refused(classifier_folder: Path) -> None:
    """A forgotten file, in one line."""
    (classifier_folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load the weights"):
        open_classifier(str(classifier_folder))


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_pickled_weights_that_run_code_are_refused_and_not_run(
    classifier_folder: Path, tmp_path: Path
) -> None:
    """Whoever shares a model could otherwise run anything on the machine of whoever opens it."""
    weights = torch.nn.Linear(2, 2).state_dict()
    (classifier_folder / "model.safetensors").unlink()
    torch.save({**weights, "payload": _Payload(tmp_path / "ran")}, classifier_folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load the weights"):
        open_classifier(str(classifier_folder))
    assert not (tmp_path / "ran").exists()
    (classifier_folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(tmp_path / "ran")))
    with pytest.raises(InputError, match="cannot load the weights"):
        open_classifier(str(classifier_folder))
    assert not (tmp_path / "ran").exists()
    pickle.loads((classifier_folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "ran").exists(), "the payload is alive: something kept it from running"


@pytest.mark.parametrize("known_type", [True, False])
def test_models_that_bring_their_own_code_are_refused_and_their_code_is_not_run(
    classifier_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_type: bool
) -> None:
    """``auto_map`` names a Python file of the folder: it must neither run nor be asked about."""
    ran = tmp_path / "ran"
    code = f"import os\nos.mkdir({str(ran)!r})\nfrom transformers import BertConfig as Own\n"
    (classifier_folder / "own.py").write_text(code)
    auto_map = {"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.Own"}
    kind = {} if known_type else {"model_type": "own"}
    change_config(classifier_folder, auto_map=auto_map, **kind)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    with pytest.raises(InputError, match=r"needs code of its own, which is never run|cannot open the model"):
        open_classifier(str(classifier_folder))
    assert not ran.exists()


def test_a_tokenizer_that_brings_its_own_code_does_not_run_it(
    classifier_folder: Path, tmp_path: Path
) -> None:
    """The same door, one file further."""
    ran = tmp_path / "ran"
    (classifier_folder / "own.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Own: pass\n")
    path = classifier_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]},
        "tokenizer_class": "Own",
    }
    path.write_text(json.dumps(settings))
    try:
        opened = open_tokenizer(str(classifier_folder))
    except InputError:
        pass
    else:
        assert not type(opened).__name__.startswith("Own")
    assert not ran.exists()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"model_type": "unheard-of"}',
        '{"model_type": "bert", "hidden_size": "wide"}',
        "\udcff",
    ],
)
def test_a_damaged_config_is_refused(classifier_folder: Path, content: str) -> None:
    """Whatever is in the file, the answer is one line that names the folder."""
    (classifier_folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"cannot (open|load) .*classifier") as caught:
        open_classifier(str(classifier_folder))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(classifier_folder: Path) -> None:
    """transformers answers with an empty tokenizer, for which every text is unknown pieces."""
    for path in classifier_folder.glob("*token*"):
        path.unlink()
    with pytest.raises(InputError, match="tokenizer"):
        open_tokenizer(str(classifier_folder))


def test_a_damaged_tokenizer_is_refused(classifier_folder: Path) -> None:
    """The tokenizers library raises bare exceptions; the user sees one line."""
    (classifier_folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot load the tokenizer of"):
        open_tokenizer(str(classifier_folder))


def test_vocabularies_that_differ_are_refused_with_a_piece_that_does(tokenizer: BertTokenizerFast) -> None:
    """States are compared token by token: with other pieces they are of other tokens."""
    vocabulary = tokenizer.get_vocab()
    check_vocabularies(tokenizer, BertTokenizerFast(vocab=dict(vocabulary)))
    swapped = dict(vocabulary) | {"good": vocabulary["bad"], "bad": vocabulary["good"]}
    with pytest.raises(InputError, match=r"different vocabularies \(25 and 25 pieces; 'bad' is 5 and 9\)"):
        check_vocabularies(BertTokenizerFast(vocab=swapped), tokenizer)
    longer = dict(vocabulary) | {"zebra": len(vocabulary)}
    with pytest.raises(InputError, match="'zebra' is 25 and None"):
        check_vocabularies(BertTokenizerFast(vocab=longer), BertTokenizerFast(vocab=vocabulary))


def test_opening_leaves_the_folder_as_it_is(classifier_folder: Path, tmp_path: Path) -> None:
    """A teacher's folder may be read-only, or somebody else's."""
    shutil.copytree(classifier_folder, tmp_path / "before")
    open_classifier(str(classifier_folder))
    open_tokenizer(str(classifier_folder))
    before = {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()}
    assert {path.name: path.read_bytes() for path in classifier_folder.iterdir()} == before
