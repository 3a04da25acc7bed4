"""CoNLL files of every spelling that people have, and those that are none."""

import gzip
from pathlib import Path

import pytest

from tinybert.conll import is_conll, read_conll
from tinybert.data import load_data
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
    "lone_breaks.txt": (
        "-DOCSTART-\n\nEU B-ORG\nrejects O\n\n-DOCSTART-\n\n# doc2\nPeter B-PER\nBlackburn I-PER\n. O\n"
    ),
    "two_cells.txt": (
        "# doc1\n# two lines of it\nEU B-ORG\nrejects O\n\n# doc2\nPeter B-PER\nBlackburn I-PER\n. O\n"
    ),
    "comments.tsv": (
        "# id 1\ntoken\tlabel\nEU\tB-ORG\nrejects\tO\n\n# id 2\nPeter\tB-PER\nBlackburn\tI-PER\n.\tO\n"
    ),
    "conllu.txt": (
        "# text = EU rejects\nID\tFORM\tNER\n1\tEU\tB-ORG\n2-3\trejects-\t_\n2\trejects\tO\n\n"
        "1\tPeter\tB-PER\n2\tBlackburn\tI-PER\n3\t.\tO\n3.1\tsaid\t_\n"
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


FRENCH = (
    "# text = du pain\n1-2\tdu\t_\t_\tSpaceAfter=No\n1\tde\tde\tADP\t_\n2\tle\tle\tDET\t_\n"
    "3\tpain\tpain\tNOUN\t_\n3.1\tblanc\t_\tADJ\t_\n\n"
)


def test_the_ranges_of_conllu_are_no_words(tmp_path: Path) -> None:
    """One of them hid that the first column has numbers alone; with columns named, it was a word itself."""
    path = tmp_path / "fr.conll"
    path.write_text(FRENCH)
    with pytest.raises(InputError, match=r"numbers alone .* --text_columns 2 --label_column 4"):
        read_conll(path)
    assert read_conll(path, "2", "4").to_pydict() == {
        "words": [["de", "le", "pain"]],
        "tags": [["ADP", "DET", "NOUN"]],
    }
    # What looks like one is a word where words are not numbered, or where the numbers are the words.
    path.write_text("1996-97 O\n1.5 O\nseason B-EV\n")
    assert read_conll(path).to_pydict()["words"] == [["1996-97", "1.5", "season"]]
    path.write_text("1.5 X\n2 Y\n")
    assert read_conll(path, "1").to_pydict()["words"] == [["1.5", "2"]]


def test_a_number_sign_may_be_a_word(tmp_path: Path) -> None:
    """As the first word of a file it was dropped for a comment; `# doc1` within one was read as a word."""
    path = tmp_path / "a.txt"
    path.write_text("# O\n1 O\n\n#EU B-ORG\n# O\n\n# doc2\nfans O\n")
    assert read_conll(path).to_pydict()["words"] == [["#", "1"], ["#EU", "#"], ["fans"]]
    path.write_text("#\tO\n1\tO\n")
    assert read_conll(path).to_pydict()["words"] == [["#", "1"]]


@pytest.mark.parametrize("header", ["token\tlabel\n", ""])
def test_a_tsv_is_read_as_lines_where_its_header_or_the_kind_says_so(header: str, tmp_path: Path) -> None:
    """As a table, whose every line must have as many cells, a file with comments was refused."""
    body = FORMS["comments.tsv"].replace("token\tlabel\n", header)
    (tmp_path / "rows").mkdir()
    for path in (tmp_path / "a.tsv", tmp_path / "rows/train.tsv"):
        path.write_text(body)
        if header:
            assert load_data(path).rows["words"][:] == TWO["words"]
    for source in (tmp_path / "a.tsv", tmp_path / "rows"):
        data = load_data(source, split="train", kind="token_classification")
        assert data.rows["words"][:] == TWO["words"]
    table = tmp_path / "b.tsv"
    table.write_text("token\tlabel\ngood\tyes\nbad\tno\n")
    texts = load_data(table, kind="classification", text_columns=["token"])
    assert texts.rows["text"][:] == ["good", "bad"]


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_gzip_file_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    """gzip has errors of its own kind for it, which showed as a traceback."""
    packed = bytearray(gzip.compress("".join(f"w{n} B-{n * 7919 % 1013}\n" for n in range(999)).encode()))
    if damage == "cut":
        del packed[len(packed) // 2 :]
    else:
        packed[99:149] = b"\0" * 50
    path = tmp_path / "a.conll.gz"
    path.write_bytes(packed)
    with pytest.raises(InputError, match=r"a\.conll\.gz cannot be read .*correct the file") as caught:
        read_conll(path)
    assert "\n" not in str(caught.value)


def test_two_columns_of_one_name_in_a_header_are_refused(tmp_path: Path) -> None:
    """The first was read for the last."""
    path = tmp_path / "a.conll"
    path.write_text("word\tner\tner\nEU\tX\tB-ORG\n")
    with pytest.raises(InputError, match="has more than one column called 'ner'"):
        read_conll(path)


def test_one_column_of_words_is_asked_for(tmp_path: Path) -> None:
    """Of several names all but the first were dropped in silence."""
    path = tmp_path / "a.conll"
    path.write_text("1 EU B-ORG\n")
    with pytest.raises(InputError, match="--text_columns is '2', '1': expected one, that of words"):
        load_data(path, text_columns=["2", "1"])
