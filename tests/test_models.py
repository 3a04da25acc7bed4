"""Opening model folders: what is there, what is not, and what would run somebody else's code."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertTokenizerFast,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
    XLNetConfig,
)

from conftest import PIECES, make_masked_lm, randomise
from tinybert.errors import InputError, one_line
from tinybert.models import (
    label_names,
    new_task_model,
    open_classifier,
    open_config,
    open_encoder,
    open_masked_lm,
    open_tokenizer,
    open_whole,
    positions_of,
    read_projections,
    task_of,
)
from tinybert.objective import DistillationLoss

Make = Callable[..., PreTrainedModel]
Save = Callable[[PreTrainedModel, Path], Path]
NAMES = ("negative", "positive")
LAYERS, WIDTH, TEACHER_WIDTH = 2, 16, 24
# The fields of a published config.json: no model_type, and some that transformers does not know.
PUBLISHED = {
    "attention_probs_dropout_prob": 0.1,
    "cell": {},
    "emb_size": WIDTH,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "pre_trained": "",
    "structure": [],
    "type_vocab_size": 2,
    "vocab_size": len(PIECES),
}


@pytest.fixture
def classifier_folder(tiny_encoder: Make, save_model: Save, tmp_path: Path) -> Path:
    config = tiny_encoder("bert", id2label=dict(enumerate(NAMES))).config
    return save_model(BertForSequenceClassification(config), tmp_path / "classifier")


@pytest.fixture
def encoder_folder(encoder: PreTrainedModel, save_model: Save, tmp_path: Path) -> Path:
    return save_model(encoder, tmp_path / "encoder")


def write_published(folder: Path, layout: str = "v1", kind: str = "zip") -> BertForPreTraining:
    """Write a checkpoint as the authors published theirs, with ``published_projections(layout)`` in it."""
    model = randomise(BertForPreTraining(BertConfig(**PUBLISHED)))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del weights["cls.predictions.decoder.bias"]  # there was but one bias then
    for name, tensor in published_projections(layout).items():
        weights |= {f"{name}.weight": tensor, f"{name}.bias": torch.full((TEACHER_WIDTH,), 7.0)}
    folder.mkdir()
    if kind == "safetensors":
        save_file(weights, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
    return model


def published_projections(layout: str) -> dict[str, torch.Tensor]:
    """The weights (d, d') by their names: one for all layers (v1), or one a layer and one below them (v2)."""
    generator = torch.Generator().manual_seed(1)
    names = ["fit_dense"] if layout == "v1" else [f"fit_denses.{layer}" for layer in range(LAYERS + 1)]
    return {name: torch.randn(TEACHER_WIDTH, WIDTH, generator=generator) for name in names}


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
    model = new_task_model(str(encoder_folder), "classification", ("a", "b", "c"))
    assert label_names(model.config) == ("a", "b", "c")
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    kept = model.base_model.state_dict()
    shared = [name for name in encoder.state_dict() if "pooler" not in name]
    assert len(shared) > 10
    for name in shared:
        assert torch.equal(kept[name], encoder.state_dict()[name]), name


def test_a_head_of_other_classes_is_new(classifier_folder: Path) -> None:
    """As many logits that mean something else, or the same in another order, are worse than new ones."""
    before = open_classifier(str(classifier_folder)).classifier.weight
    for names in (NAMES, ("Negative", "POSITIVE")):
        model = new_task_model(str(classifier_folder), "classification", names)
        assert torch.equal(model.classifier.weight, before)
    for names in (NAMES[::-1], ("a", "b")):
        model = new_task_model(str(classifier_folder), "classification", names)
        assert (model.classifier.weight != before).all()
        assert 0 < model.classifier.weight.std() < 0.1
        assert not model.classifier.bias.any()


def test_a_new_regression_head_has_one_score_and_no_class_names(classifier_folder: Path) -> None:
    """Two logits for a score would be trained as classes; the old head has another shape and is replaced."""
    model = new_task_model(str(classifier_folder), "regression", ())
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
        (
            "somebody/not-downloaded",
            "cannot open the model somebody/not-downloaded: there is no such folder here, and as a hub name",
        ),
        ("not a name!", "cannot open the model not a name!: "),
    ],
)
def test_what_is_no_model_is_said_in_one_line(source: str, message: str, tmp_path: Path) -> None:
    """A mistyped path must not look like a network problem three frames into a library."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    for opener in (open_config, open_tokenizer, open_encoder, open_classifier):
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


def test_a_multi_label_classifier_says_so(classifier_folder: Path) -> None:
    """Its classes do not exclude each other: a softmax over them would teach something it never said."""
    change_config(classifier_folder, problem_type="multi_label_classification")
    assert task_of(open_classifier(str(classifier_folder))) == ("multi_label", NAMES)
    model = new_task_model(str(classifier_folder), "multi_label", NAMES)
    assert task_of(model) == ("multi_label", NAMES)
    model = new_task_model(str(classifier_folder), "classification", NAMES)
    assert task_of(model) == ("classification", NAMES)


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


@pytest.mark.parametrize("opener", [open_classifier, lambda source: new_task_model(source, "regression", ())])
def test_an_encoder_of_other_sizes_than_its_configuration_says_is_refused(
    classifier_folder: Path, opener: Callable[[str], PreTrainedModel]
) -> None:
    """Where a new head may have another shape, transformers replaces such tensors by noise without a word."""
    change_config(classifier_folder, max_position_embeddings=77)
    with pytest.raises(InputError, match=r"shape|cannot load the weights of"):
        opener(str(classifier_folder))


def test_a_tokenizer_without_a_piece_for_padding_is_refused(classifier_folder: Path) -> None:
    """Found out with the first batch, there would be a folder with half a run in it."""
    backend = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(classifier_folder)
    with pytest.raises(InputError, match="has no piece for padding: set its pad_token and save it"):
        open_tokenizer(str(classifier_folder))


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


def test_opening_leaves_the_folder_as_it_is(classifier_folder: Path, tmp_path: Path) -> None:
    """A teacher's folder may be read-only, or somebody else's."""
    shutil.copytree(classifier_folder, tmp_path / "before")
    open_classifier(str(classifier_folder))
    open_tokenizer(str(classifier_folder))
    before = {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()}
    assert {path.name: path.read_bytes() for path in classifier_folder.iterdir()} == before


KINDS = ("zip", "before 1.6", "safetensors")
# transformers goes, or went, by a model's name where its file does not say what it is.
published = pytest.mark.parametrize("name", ["General_4L_312D", "roberta-student"])


@published
@pytest.mark.parametrize("kind", KINDS)
def test_a_published_checkpoint_gives_the_encoder_that_is_in_it(tmp_path: Path, name: str, kind: str) -> None:
    """The authors' own students must open, or nobody can go on from where the paper ended."""
    written = write_published(tmp_path / name, kind=kind)
    source = str(tmp_path / name)
    assert type(open_config(source)) is BertConfig
    opened = open_encoder(source).eval()
    tokens = torch.randint(len(PIECES), (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (model(tokens, output_hidden_states=True) for model in (written.bert, opened))
    assert len(found.hidden_states) == LAYERS + 1
    assert torch.equal(torch.stack(found.hidden_states), torch.stack(expected.hidden_states))
    assert torch.equal(found.pooler_output, expected.pooler_output)
    with torch.no_grad():
        assert torch.equal(open_masked_lm(source).eval()(tokens).logits, written(tokens).prediction_logits)


@published
@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_a_published_checkpoint_can_be_fine_tuned(tmp_path: Path, name: str, layout: str) -> None:
    """As a student of --student: its encoder under a new head, pooler and all."""
    written = write_published(tmp_path / name, layout)
    model = new_task_model(str(tmp_path / name), "classification", NAMES)
    assert label_names(model.config) == NAMES
    kept, expected = model.base_model.state_dict(), written.bert.state_dict()
    assert kept.keys() == expected.keys()
    assert any("pooler" in part for part in kept)
    for part, tensor in expected.items():
        assert torch.equal(kept[part], tensor), part


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_projections_are_read_from_both_layouts(tmp_path: Path, layout: str, kind: str) -> None:
    """Transposed, or of another layer, they would fit as well and teach the student to be undone."""
    write_published(tmp_path / "student", layout, kind)
    found = read_projections(str(tmp_path / "student"), LAYERS)
    expected = list(published_projections(layout).values()) * (LAYERS + 1 if layout == "v1" else 1)
    assert found is not None
    assert len(found) == len(expected) == LAYERS + 1
    for projection, weight in zip(found, expected, strict=True):
        assert projection.dtype == torch.float32
        assert torch.equal(projection, weight.T)


def test_projections_fit_the_objective(tmp_path: Path) -> None:
    """What the authors' code computes, but for the bias, is what the objective starts from."""
    write_published(tmp_path / "student", "v2")
    objective = DistillationLoss(WIDTH, TEACHER_WIDTH, (1, 2))
    objective.start_projections(read_projections(str(tmp_path / "student"), LAYERS) or [])
    hidden = torch.randn(5, WIDTH)
    assert len(objective.projections) == LAYERS + 1
    for layer, projection in objective.projections.items():
        dense = published_projections("v2")[f"fit_denses.{layer}"]
        assert torch.equal(projection(hidden), torch.nn.functional.linear(hidden, dense))


def test_a_model_without_projections_has_none(encoder_folder: Path, encoder: PreTrainedModel) -> None:
    """Most students have none: they start from the objective's own."""
    assert read_projections(str(encoder_folder), LAYERS) is None
    (encoder_folder / "model.safetensors").unlink()
    encoder.save_pretrained(encoder_folder, max_shard_size="5KB")
    assert (encoder_folder / "model.safetensors.index.json").exists()
    assert read_projections(str(encoder_folder), LAYERS) is None


@pytest.mark.parametrize("layers", [LAYERS - 1, LAYERS + 1])
def test_a_wrong_number_of_projections_is_refused(tmp_path: Path, layers: int) -> None:
    """Paired with the wrong layers they would be worse than none."""
    write_published(tmp_path / "student", "v2")
    message = rf"student has 3 projections \(fit_denses\), where {layers} layers .* need {layers + 1}: "
    with pytest.raises(InputError, match=message):
        read_projections(str(tmp_path / "student"), layers)


def test_projections_in_damaged_or_hostile_files_are_refused(tmp_path: Path) -> None:
    """The same file goes through a second door, and it must be as narrow."""
    folder = tmp_path / "student"
    write_published(folder)
    payload = _Payload(tmp_path / "ran")
    weights = {"fit_dense.weight": torch.ones(3, 2)}
    for content in ({**weights, "payload": payload}, payload, [1, 2], {"fit_dense.weight": "ones"}):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(InputError, match=r"cannot read the projections of .*student: ") as caught:
            read_projections(str(folder), LAYERS)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match="cannot read the projections of"):
        read_projections(str(folder), LAYERS)
    with pytest.raises(InputError, match="there is no model folder"):
        read_projections(str(tmp_path / "nowhere"), LAYERS)
    with pytest.raises(InputError, match="cannot read the projections of not a name!"):
        read_projections("not a name!", LAYERS)


def test_a_config_without_a_type_is_berts_only_if_it_has_all_that_bert_needs(tmp_path: Path) -> None:
    """transformers fills what is missing with BERT-base's figures, and weights of other shapes are lost."""
    folder = tmp_path / "bert-base"
    write_published(folder)
    kept = {name: value for name, value in PUBLISHED.items() if name not in ("hidden_size", "vocab_size")}
    (folder / "config.json").write_text(json.dumps(kept))
    for opener in (open_config, open_tokenizer, open_encoder):
        with pytest.raises(
            InputError, match=r"bert-base: .* no model_type .* no hidden_size, vocab_size"
        ) as caught:
            opener(str(folder))
        assert "\n" not in str(caught.value)


def test_weights_of_another_family_under_a_config_without_a_type_are_refused(
    tiny_encoder: Make, save_model: Save, tmp_path: Path
) -> None:
    """RoBERTa's fields have BERT's names; its weights do not, and BERT's would be made up."""
    roberta = tiny_encoder("roberta")
    folder = save_model(roberta, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"roberta.{name}": tensor for name, tensor in roberta.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    for opener in (open_encoder, lambda source: new_task_model(source, "classification", NAMES)):
        with pytest.raises(InputError, match=r"old lack \d+ encoder tensors"):
            opener(str(folder))


def test_a_bare_encoder_that_lacks_a_part_is_refused(encoder_folder: Path) -> None:
    """Without a head there is no prefix before the names, and the hole must show all the same."""
    weights = open_encoder(str(encoder_folder)).state_dict()
    hole = next(name for name in weights if "layer.1." in name)
    save_file(
        {name: tensor for name, tensor in weights.items() if name != hole},
        encoder_folder / "model.safetensors",
    )
    with pytest.raises(InputError, match=f"lack 1 encoder tensors such as {hole}"):
        open_encoder(str(encoder_folder))


@pytest.mark.parametrize(("extra", "pieces"), [(None, ["film", "##s"]), ("Film", ["Film", "##s"])])
def test_the_pieces_of_a_bare_vocabulary_tell_its_letter_case(
    tmp_path: Path, extra: str | None, pieces: list[str]
) -> None:
    """A cased model that is fed lower case never sees half of its pieces, and nobody is told."""
    write_published(tmp_path / "student")
    if extra:
        with (tmp_path / "student" / "vocab.txt").open("a") as file:
            file.write(f"{extra}\n")
    opened = open_tokenizer(str(tmp_path / "student"))
    assert isinstance(opened, BertTokenizerFast)
    assert opened.tokenize("Films") == pieces
    assert opened("bad Films")["input_ids"][0] == opened.cls_token_id == PIECES.index("[CLS]")


def test_a_tokenizer_config_has_the_last_word_on_letter_case(tmp_path: Path) -> None:
    """Whoever wrote it down knows better than the vocabulary shows."""
    write_published(tmp_path / "student")
    (tmp_path / "student" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert open_tokenizer(str(tmp_path / "student")).tokenize("Film") == ["[UNK]"]


def test_a_published_checkpoint_opens_by_its_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``--student huawei-noah/TinyBERT_General_4L_312D``; here from the cache, without the network."""
    repository = tmp_path / "models--somebody--roberta-student"
    (repository / "snapshots").mkdir(parents=True)
    written = write_published(repository / "snapshots" / ("0" * 40), "v2")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = "somebody/roberta-student"
    opened = open_encoder(source).state_dict()
    for part, tensor in written.bert.state_dict().items():
        assert torch.equal(opened[part], tensor), part
    assert open_tokenizer(source).tokenize("Films") == ["film", "##s"]
    found = read_projections(source, LAYERS)
    assert found is not None
    assert torch.equal(found[1], published_projections("v2")["fit_denses.1"].T)


def test_what_other_libraries_say_is_made_one_line_of_300_characters() -> None:
    """Theirs run over many lines, with whole files in them; ours are read on a terminal."""
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError("x" * 300)) == "x" * 300
    assert one_line(ValueError("x" * 301)) == "x" * 297 + "..."


@pytest.mark.parametrize(
    ("build", "pad"), [(BertConfig, 0), (RobertaConfig, 1), (XLMRobertaConfig, 0), (MPNetConfig, 0)]
)
def test_the_longest_input_is_one_that_the_model_takes(build: type, pad: int) -> None:
    """One piece more is an index error in the middle of an epoch."""
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = build(vocab_size=20, max_position_embeddings=12, pad_token_id=pad, **shape)
    model, longest = AutoModel.from_config(config).eval(), positions_of(config)
    model(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


@pytest.mark.parametrize("config", [T5Config(), XLNetConfig()], ids=["t5", "xlnet"])
def test_models_without_a_table_of_positions_are_refused(config: PreTrainedConfig) -> None:
    """Their longest input is in no field, or -1 is."""
    with pytest.raises(InputError, match=f"{config.model_type} has no table of positions"):
        positions_of(config)


def test_classes_that_are_not_counted_from_0_are_refused(classifier_folder: Path) -> None:
    """Stars from 1 to 5, numbered so by hand: which logit is meant is anybody's guess."""
    change_config(classifier_folder, id2label={"1": "one star", "2": "two stars"})
    model = open_classifier(str(classifier_folder))
    with pytest.raises(InputError, match=r"id2label of config.json numbers \[1, 2\], expected 0 to 1"):
        task_of(model)


def test_a_model_is_opened_whole_with_the_head_it_has(
    tmp_path: Path, save_model: Callable[[PreTrainedModel, Path], Path]
) -> None:
    """A head that is dropped, or made up, when a folder is rewritten is lost for good."""
    masked, encoder = save_model(make_masked_lm(), tmp_path / "a"), tmp_path / "b"
    assert type(open_whole(str(masked))).__name__ == "BertForMaskedLM"
    save_model(open_encoder(str(masked)), encoder)
    assert type(open_whole(str(encoder))).__name__ == "BertModel"
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(InputError, match=r"lack \d+ tensors such as cls\.predictions"):
        open_whole(str(encoder))
    for wrong in ("RobertaModel", "NoSuchModel", "os", 7):
        (encoder / "config.json").write_text(json.dumps(config | {"architectures": [wrong]}))
        with pytest.raises(InputError, match=r"transformers has no such model|cannot open the model"):
            open_whole(str(encoder))
