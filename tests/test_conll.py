"""CoNLL files of every spelling that people have, and those that are none."""

import gzip
from pathlib import Path

import pytest

from tinybert.conll import is_conll, read_conll
from tinybert.errors import InputError

TWO = {
    "words": [["EU", "rejects"], ["Peter", "Blackburn", "."]],
    "tags": [["B-ORG", "O"], ["B-PER", "I-PER", "O"]],
}
FORMS = {
    "spaces.conll": "EU B-ORG\nrejects O\n\nPeter B-PER\nBlackburn I-PER\n. O\n",
    "tabs.bio": "EU\tB-ORG\nrejects\tO\n\nPeter\tB-PER\nBlackburn\tI-PER\n.\tO",
    "header.tsv": "token\tlabel\nEU\tB-ORG\nrejects\tO\n\nPeter\tB-PER\nBlackburn\tI-PER\n.\tO\n",
    "conll2003.txt": (
        "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER\n"
        "Blackburn NNP I-NP I-PER\n. . O O\n\n"
    ),
    "windows.iob2": "\ufeffEU B-ORG\r\nrejects O\r\n \r\nPeter B-PER\r\nBlackburn I-PER\r\n. O\r\n",
    "comments.conll": (
        "# id 1\nEU _ _ B-ORG\nrejects _ _ O\n\n# id 2\nPeter _ _ B-PER\nBlackburn _ _ I-PER\n. _ _ O\n"
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_spelling_of_the_format_gives_the_same_sentences(name: str, tmp_path: Path) -> None:
    """A header taken for a word, or two sentences for one, would train the model on nonsense."""
    path = tmp_path / name
    path.write_text(FORMS[name], encoding="utf-8", newline="")
    assert read_conll(path).to_pydict() == TWO
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(FORMS[name].encode()))
    assert read_conll(packed).to_pydict() == TWO
    assert is_conll(path) == is_conll(packed) == (not name.endswith(".tsv"))


def test_columns_are_chosen_by_number_or_by_the_name_in_the_header(tmp_path: Path) -> None:
    """CoNLL-2003 has three kinds of tags; the last is only the usual one."""
    path = tmp_path / "train.conll"
    path.write_text(FORMS["conll2003.txt"])
    assert read_conll(path, tags="3").to_pydict()["tags"] == [["B-NP", "B-VP"], ["B-NP", "I-NP", "O"]]
    path.write_text("id\tpos\tword\tner\n1\tNNP\tEU\tB-ORG\n")
    assert read_conll(path).to_pydict() == {"words": [["EU"]], "tags": [["B-ORG"]]}
    assert read_conll(path, "id", "pos").to_pydict() == {"words": [["1"]], "tags": [["NNP"]]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "EU B-ORG\nrejects\n",
            r"line 2 has 1 columns and line 1 has 2: expected a word and its tags a line .CoNLL.; correct",
        ),
        ("EU B-ORG\nrejects VBZ O\n", r"line 2 has 3 columns and line 1 has 2"),
        ("EU\nrejects\n", r"line 1 has one column: expected a word and, last, its tag"),
        ("1 EU B-ORG\n2 rejects O\n\n1 Peter B-PER\n", r"numbers alone .* --text_columns 2"),
        ("\n\n", r"has no rows: expected a word and its tag a line"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_line(text: str, message: str, tmp_path: Path) -> None:
    """Half a line lost would shift every tag after it by one word."""
    path = tmp_path / "train.conll"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_conll(path)


def test_a_column_that_is_not_there_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """The last column instead would be trained on without a word."""
    path = tmp_path / "train.conll"
    path.write_text("EU B-ORG\n")
    with pytest.raises(InputError, match="has no column '4'; it has 1, 2: mend --text_columns or --label"):
        read_conll(path, tags="4")
    path.write_bytes("Zürich B-LOC\n".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_conll(path)
