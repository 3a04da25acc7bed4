"""Words and tags: read from lists and lines, matched by name, put on first pieces."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import BertTokenizerFast, RobertaConfig, RobertaTokenizerFast

from tinybert.data import TaskData, load_data, tokenize
from tinybert.errors import InputError
from tinybert.models import open_tokenizer

NAMES = ("B-NEG", "B-POS", "I-NEG", "I-POS", "O")
WORDS = [["good", "films", "."], ["the", "plot", "was", "awful"]]
TAGS = [["B-POS", "I-POS", "O"], ["O", "O", "O", "B-NEG"]]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def named(data: TaskData) -> list[list[str]]:
    return [[data.label_names[place] for place in row] for row in data.rows["label"]]


def test_lists_and_lines_give_the_same_rows(tmp_path: Path) -> None:
    """What the tags are called, what they are kept in, and whether they are ids is the file's affair."""
    pairs = list(zip(WORDS, TAGS, strict=True))
    lines = "\n\n".join("\n".join(map("\t".join, zip(*pair, strict=True))) for pair in pairs)
    (tmp_path / "a.conll").write_text(lines)
    (tmp_path / "b.tsv").write_text(f"word\ttag\n{lines}")
    write(tmp_path / "c.jsonl", [{"tokens": words, "ner_tags": tags} for words, tags in pairs])
    write(tmp_path / "d.jsonl", [{"words": words, "tags": tags, "id": "x"} for words, tags in pairs])
    order = ("O", "B-POS", "I-POS", "B-NEG")
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=list(order))),
        }
    )
    ids = [[order.index(tag) for tag in tags] for tags in TAGS]
    rows = datasets.Dataset.from_dict({"tokens": WORDS, "ner_tags": ids}, features)
    rows.to_parquet(str(tmp_path / "e.parquet"))
    for path in sorted(tmp_path.iterdir()):
        data = load_data(path)
        assert (data.kind, data.metric) == ("token_classification", "f1")
        assert data.rows["words"][:] == WORDS
        assert named(data) == TAGS
        assert data.label_names == (order if path.suffix == ".parquet" else NAMES)
        # A teacher's order of tags wins, and is met by name.
        given = load_data(path, kind="token_classification", label_names=NAMES[::-1])
        assert given.label_names == NAMES[::-1]
        assert named(given) == TAGS


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"tokens": ["a", "film"], "ner_tags": ["O"]},
            "sentence 2 has 2 words and 1 tags: give each word one",
        ),
        ({"tokens": [], "ner_tags": []}, "sentence 2 has no words: fill it or remove it"),
        ({"tokens": ["a", " "], "ner_tags": ["O", "O"]}, "sentence 2 has an empty word: fill it or remove"),
        (
            {"tokens": ["a"], "ner_tags": ["B-LOC"]},
            "tag 'B-LOC' in sentence 2 is not one of the known labels",
        ),
        ({"tokens": ["a"], "ner_tags": [""]}, "tag '' in sentence 2 is empty"),
        ({"tokens": ["a"], "ner_tags": None}, "column 'ner_tags' is empty in sentence 2: fill it or remove"),
    ],
)
def test_rows_that_cannot_be_read_are_refused_in_one_line(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Padded or cut to fit instead, every later tag would be on the wrong word."""
    path = write(tmp_path / "a.jsonl", [{"tokens": WORDS[0], "ner_tags": TAGS[0]}, row])
    with pytest.raises(InputError, match=message) as caught:
        load_data(path, label_names=NAMES)
    assert "\n" not in str(caught.value)


def test_files_of_another_form_are_refused_with_what_is_expected(tmp_path: Path) -> None:
    """A teacher of tags on a file of labelled texts."""
    path = tmp_path / "a.csv"
    path.write_text("text,label\na film,good\n")
    with pytest.raises(
        InputError, match="no columns of lists of words and of tags, such as tokens and ner_tags"
    ):
        load_data(path, kind="token_classification")
    (tmp_path / "a.conll").write_text("good B-POS\n")
    with pytest.raises(
        InputError, match="is for token_classification by its form, and regression is expected"
    ):
        load_data(tmp_path / "a.conll", kind="regression")
    with pytest.raises(InputError, match="--label_columns is for multi_label"):
        load_data(tmp_path / "a.conll", label_columns=["a", "b"])


def test_two_columns_of_one_name_and_two_columns_of_words_are_refused(tmp_path: Path) -> None:
    """There is no telling which is meant; and the second was dropped in silence."""
    cells = [pa.array([["a", "b"]]), pa.array([["a", "b"]]), pa.array([["B-X", "O"]])]
    pq.write_table(pa.Table.from_arrays(cells, ["tokens", "tokens", "ner_tags"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="more than one column called 'tokens'"):
        load_data(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_arrays(cells, ["tokens", "words", "ner_tags"]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="--text_columns is 'words', 'tokens': expected one, that of words"):
        load_data(tmp_path / "b.parquet", text_columns=["words", "tokens"])
    assert load_data(tmp_path / "b.parquet", text_columns="words").rows["words"][:] == [["a", "b"]]


def test_lists_beside_texts_and_tags_that_differ_by_case_are_spoken_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The ones were said to be empty; the others become two kinds of entity."""
    mixed = [{"tokens": ["a"], "ner_tags": ["O"]}, {"tokens": ["a"], "ner_tags": "O"}]
    with pytest.raises(InputError, match="column 'ner_tags' is empty or mixes texts with lists"):
        load_data(write(tmp_path / "a.jsonl", mixed))
    assert not caplog.records
    load_data(write(tmp_path / "b.jsonl", [{"tokens": ["a", "b", "c"], "ner_tags": ["B-LOC", "b-loc", "O"]}]))
    (record,) = caplog.records
    assert "tag 'B-LOC' in sentence 1 differs from another by letter case alone" in record.getMessage()


def test_tags_that_are_no_entities_are_scored_by_accuracy(tmp_path: Path) -> None:
    """Parts of speech are token classification, too."""
    path = write(tmp_path / "a.jsonl", [{"tokens": ["a", "film"], "tags": ["DET", "NOUN"]}])
    assert load_data(path).metric == "accuracy"


def test_a_words_first_piece_has_its_tag_and_words_cut_off_are_counted(
    tmp_path: Path, tokenizer: BertTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """A tag on every piece would count long words twice; and what is cut must not vanish unsaid."""
    path = write(tmp_path / "a.jsonl", [{"tokens": w, "tags": t} for w, t in zip(WORDS, TAGS, strict=True)])
    data = load_data(path)
    rows = tokenize(data, tokenizer, 16)
    assert tokenizer.convert_ids_to_tokens(rows["input_ids"][0]) == [
        "[CLS]",
        "good",
        "film",
        "##s",
        ".",
        "[SEP]",
    ]
    names = [*NAMES, "-"]
    labels = [[names[-1 if label == -100 else label] for label in row] for row in rows["labels"]]
    assert labels == [["-", "B-POS", "I-POS", "-", "O", "-"], ["-", "O", "O", "O", "B-NEG", "-"]]
    assert not caplog.records
    cut = tokenize(data, tokenizer, 5)
    assert [np.sum(np.array(row) != -100) for row in cut["labels"]] == [2, 3]
    assert (
        "2 words of 2 sentences are neither trained on nor scored: they lie beyond --max_length 5"
        in caplog.text
    )


def test_robertas_words_keep_the_space_before_them(tmp_path: Path) -> None:
    """Without it "good a" is read as "gooda", in pieces that no text has."""
    pieces = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
        "g",
        "o",
        "d",
        "Ġ",
        "a",
        "Ġg",
        "Ġa",
        "oo",
        "Ġgoo",
        "Ġgood",
    ]
    merges = [("o", "o"), ("Ġ", "g"), ("Ġ", "a"), ("Ġg", "oo"), ("Ġgoo", "d")]
    tokenizer = RobertaTokenizerFast(
        vocab={piece: place for place, piece in enumerate(pieces)}, merges=merges
    )
    tokenizer.save_pretrained(tmp_path)
    RobertaConfig(vocab_size=len(pieces)).save_pretrained(tmp_path)
    plain, spaced = open_tokenizer(str(tmp_path)), open_tokenizer(str(tmp_path), kind="token_classification")
    read = [
        t.convert_ids_to_tokens(t(["good", "a"], is_split_into_words=True).input_ids) for t in (plain, spaced)
    ]
    assert read == [["<s>", "g", "oo", "d", "a", "</s>"], ["<s>", "Ġgood", "Ġa", "</s>"]]
    spaced.save_pretrained(tmp_path / "student")
    RobertaConfig(vocab_size=len(pieces)).save_pretrained(tmp_path / "student")
    again = open_tokenizer(str(tmp_path / "student"))
    assert again.convert_ids_to_tokens(again("good a").input_ids) == ["<s>", "Ġgood", "Ġa", "</s>"]
