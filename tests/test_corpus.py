"""Text: every kind of source gives the same documents, sides do not mix, and what cannot be read says why."""

import bz2
import gzip
import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "train"))

import corpus as corpus_module  # noqa: E402
from corpus import END_OF_TEXT, PIECE_CHARS, Corpus, pieces  # noqa: E402

DOCUMENTS = ["first\ntext\n", "second é\n", "third\n"]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def marked(documents: list[str]) -> str:
    return f"{END_OF_TEXT}\n".join(documents)


def records(documents: list[str], column: str = "text") -> str:
    return "".join(json.dumps({column: text, "id": i}) + "\n" for i, text in enumerate(documents))


def sides(corpus: Corpus) -> tuple[list[str], list[str]]:
    """(training, held-out) documents."""
    found: tuple[list[str], list[str]] = ([], [])
    for held_out, begins, text in corpus.pieces():
        assert 0 < len(text) <= PIECE_CHARS
        found[held_out].extend([text] if begins else [found[held_out].pop() + text])
    return found


def all_documents(source, **options) -> list[str]:
    train, held_out = sides(Corpus(str(source), split="document", fraction=1e-12, **options))
    assert not held_out
    return train


def dataset(folder: Path, **splits: list[str]) -> str:
    for split, documents in splits.items():
        write(folder / f"{split}.jsonl", records(documents))
    return f"hub:{folder}"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub-cache"))


# Reading


def test_all_kinds_of_sources_give_the_same_documents(tmp_path):
    text, lines = marked(DOCUMENTS), records(DOCUMENTS, "body")
    (tmp_path / "b.txt.bz2").write_bytes(bz2.compress(text.encode()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for number, document in enumerate(DOCUMENTS):
        write(tmp_path / "plain" / f"{number}.txt", document)
    (tmp_path / "plain" / "notes.bin").write_bytes(b"\xff not text")
    assert all_documents(write(tmp_path / "a.txt", text)) == DOCUMENTS
    assert all_documents(write(tmp_path / "e.txt", text + f"{END_OF_TEXT}\r\n\n \n")) == DOCUMENTS
    assert all_documents(tmp_path / "b.txt.bz2") == DOCUMENTS
    assert all_documents(tmp_path / "plain") == DOCUMENTS
    assert all_documents(write(tmp_path / "c.jsonl", lines), text_column="body") == DOCUMENTS
    assert all_documents(tmp_path / "b.jsonl.gz", text_column="body") == DOCUMENTS
    assert all_documents(dataset(tmp_path / "data", train=DOCUMENTS)) == DOCUMENTS


def test_pieces_join_to_the_text_whatever_its_lines():
    rng = random.Random(0)
    letters = "".join(rng.choice("ab \n.é𝄞") for _ in range(3 * PIECE_CHARS))
    for text in ("", "x" * (3 * PIECE_CHARS + 7), "\n" * (2 * PIECE_CHARS), ".\n" * PIECE_CHARS, letters):
        parts = list(pieces(text))
        assert "".join(parts) == text
        assert all(0 < len(part) <= PIECE_CHARS for part in parts)


def test_files_are_read_in_the_pieces_of_their_documents(tmp_path):
    rng = random.Random(1)
    documents = ["".join(rng.choice("ab \n.") for _ in range(n)) + "\n" for n in (5, PIECE_CHARS, 3 * PIECE_CHARS, 99)]
    documents.append("one line without an end " * PIECE_CHARS)
    path = write(tmp_path / "a.txt", marked(documents))
    read = [(begins, text) for _, begins, text in Corpus(path, split="document", fraction=1e-12).pieces()]
    assert read == [(i == 0, part) for document in documents for i, part in enumerate(pieces(document))]


def test_a_file_without_markers_is_never_held_whole(tmp_path, monkeypatch):
    import tracemalloc

    path = write(tmp_path / "a.txt", "a line of the text, and no document ends\n" * 400_000)
    tracemalloc.start()
    count = sum(1 for _ in Corpus(path).pieces())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 200
    assert peak < 4e6, "of 16 MB of text"


def test_max_documents_bounds_each_side(tmp_path):
    path = write(tmp_path / "a.txt", marked([f"{i}\n" for i in range(10)]))
    assert all_documents(path, max_documents=4) == ["0\n", "1\n", "2\n", "3\n"]
    name = dataset(tmp_path / "data", train=[f"{i}\n" for i in range(10)], validation=["x\n", "y\n", "z\n"])
    assert sides(Corpus(name, split="file", max_documents=2)) == (["0\n", "1\n"], ["x\n", "y\n"])


# Sides


def test_tail_holds_out_the_end_cut_at_a_line_end(tmp_path):
    documents = ["".join(f"document {d} line {i} é\n" for i in range(5_000)) for d in range(4)]
    train, held_out = sides(Corpus(write(tmp_path / "a.txt", marked(documents)), fraction=0.4))
    assert "".join(train) + "".join(held_out) == "".join(documents)
    assert len("".join(held_out)) == pytest.approx(0.4 * len("".join(documents)), rel=0.001)
    assert train[-1].endswith("\n")
    assert held_out[-1] == documents[-1]


def test_documents_are_held_out_whole_and_equal_ones_on_one_side(tmp_path):
    documents = [f"document {i % 100}\n" for i in range(400)] + ["long " * PIECE_CHARS + "\n"] * 3
    train, held_out = sides(Corpus(write(tmp_path / "a.txt", marked(documents)), split="document", fraction=0.3))
    assert sorted(train + held_out) == sorted(documents)
    assert not set(train) & set(held_out)
    assert 0.15 < len(held_out) / len(documents) < 0.45
    shuffled = random.Random(0).sample(documents, len(documents))
    again = sides(Corpus(write(tmp_path / "b.txt", marked(shuffled)), split="document", fraction=0.3))
    assert sorted(again[1]) == sorted(held_out), "the side follows from the text, not from its place"


@pytest.mark.parametrize("name", ["valid.txt", "validation-00000.txt", "val.md", "dev.txt", "test/0.txt"])
def test_given_held_out_files_are_used(tmp_path, name):
    write(tmp_path / "train-0.txt", "train\n")
    write(tmp_path / "notes.md", "neither\n")
    write(tmp_path / name, "held out\n")
    assert sides(Corpus(str(tmp_path), split="file")) == (["train\n"], ["held out\n"])


def test_test_files_are_left_alone_where_there_are_validation_files(tmp_path):
    for name in ("train", "valid", "test"):
        write(tmp_path / f"{name}.txt", f"{name}\n")
    assert sides(Corpus(str(tmp_path), split="file")) == (["train\n"], ["valid\n"])
    for split in ("tail", "document"):
        with pytest.raises(ValueError, match=r"has its own valid files, .* use val_split file"):
            Corpus(str(tmp_path), split=split)
    assert all_documents(tmp_path / "train.txt") == ["train\n"]


def test_a_dataset_is_streamed_and_nothing_of_it_stored(tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "data"
    folder.mkdir()
    for split, documents in {"train": DOCUMENTS, "validation": ["held out\n", None, " \n"], "test": ["test\n"]}.items():
        table = pyarrow.table({"body": documents, "n": list(range(3))[: len(documents)]})
        pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    corpus = Corpus(f"hub:{folder}", "body", split="file")
    assert sides(corpus) == sides(corpus) == (DOCUMENTS, ["held out\n"])
    train, held_out = sides(Corpus(f"hub:{folder}", "body", split="document", fraction=0.5))
    assert sorted(train + held_out) == sorted(DOCUMENTS)
    stored = [path for path in (tmp_path / "hub-cache").rglob("*") if path.is_file() and path.stat().st_size]
    assert not stored


# Fingerprints


def test_the_fingerprint_follows_text_and_settings_and_nothing_else(tmp_path):
    path = write(tmp_path / "a.txt", "some text\n" * 50)
    first = Corpus(path)
    same = [Corpus(path), Corpus(write(tmp_path / "elsewhere.txt", "some text\n" * 50))]
    assert {corpus.fingerprint for corpus in same} == {first.fingerprint}
    other = [Corpus(path, fraction=0.2), Corpus(path, split="document"), Corpus(path, max_documents=1)]
    other += [Corpus(path, "body"), Corpus(write(tmp_path / "b.txt", "some text\n" * 49 + "some tuxt\n"))]
    assert len({corpus.fingerprint for corpus in [first, *other]}) == 6


def test_the_fingerprint_of_a_stream_follows_its_files_and_bound(tmp_path):
    import os

    name = dataset(tmp_path / "data", train=DOCUMENTS, validation=DOCUMENTS)
    first = Corpus(name, split="file").fingerprint
    assert Corpus(name, split="file").fingerprint == first
    assert Corpus(name, split="file", max_documents=2).fingerprint != first
    assert Corpus(name, "body", split="file").fingerprint != first
    os.utime(tmp_path / "data" / "train.jsonl", (1, 1))
    assert Corpus(name, split="file").fingerprint != first


# Errors


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda d: str(d / "absent.txt"), {}, FileNotFoundError, "neither a file or folder .* hub:"),
        (lambda d: "tinyshakespear", {}, FileNotFoundError, "did you mean 'tinyshakespeare'"),
        (lambda d: write(d / "books.txt", "x").replace("books", "boks"), {}, FileNotFoundError, "mean '.*/books.txt'"),
        (lambda d: str(d), {}, ValueError, "holds no text: .* hub:"),
        (lambda d: write(d / "a.txt", "x"), {"split": "file"}, ValueError, "needs a folder with train"),
        (lambda d: write(d / "a.txt", "x"), {"split": "head"}, ValueError, "must be one of tail, document, file"),
        (lambda d: f"hub:{d}/absent", {"split": "file"}, ValueError, "cannot be opened by datasets"),
        (lambda d: "hub:nobody/nothing", {"split": "file"}, ValueError, "cannot be opened by datasets"),
        (lambda d: dataset(d / "d", train=DOCUMENTS), {}, ValueError, "val_split tail needs the length"),
        (lambda d: dataset(d / "d", train=["x"]), {"split": "file"}, ValueError, r"validation, and has \['train'\]"),
    ],
)
def test_unknown_sources_are_refused_with_a_hint(tmp_path, make, options, error, message):
    with pytest.raises(error, match=message):
        Corpus(make(tmp_path), **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"no column 'text' among \['body', 'id'\]"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}\n', "row 2 .* holds 1, no text"),
        ("a.jsonl", b'["x"]\n', r"line 1 must be a JSON object, not \["),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "x"\n', r"a\.jsonl, line 3 is no JSON"),
        ("a.txt", b"caf\xe9\n", r"a\.txt cannot be read as UTF-8"),
        ("a.txt.bz2", bz2.compress(b"text\n" * 1000)[:-9], r"a\.txt\.bz2 cannot be read"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        all_documents(tmp_path / name)


def test_a_dataset_without_the_column_names_its_columns(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'body' among \['id', 'text'\]"):
        all_documents(dataset(tmp_path / "data", train=DOCUMENTS), text_column="body")


def test_reading_shows_how_far_it_is(tmp_path):
    (tmp_path / "b.txt.bz2").write_bytes(bz2.compress(b"some text\n" * 10_000))
    write(tmp_path / "a.txt", "some text\n" * 10_000)
    corpus = Corpus(str(tmp_path), split="document")
    positions = [corpus.position for _ in corpus.pieces()]
    assert positions == sorted(positions)
    assert corpus.position == corpus.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert corpus_module.BUNDLED["tinyshakespeare"].is_file()
