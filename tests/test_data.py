"""Text to tokens to batches: nothing lost, nothing twice, the same for every split, and clear errors."""

import bz2
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "train"))

from data import IGNORED, PIECE_CHARS, Batches, Corpus, byte_tokenizer, load_tokenizer, pieces, prepare  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def random_text(rng: random.Random, length: int) -> str:
    """Characters of every UTF-8 width, surrogates excepted (they are no text)."""
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


# The tokenizer


def test_tokens_are_bytes_and_decode_to_the_same_text(tokenizer):
    rng = random.Random(0)
    texts = ["", " ", "\n\n", "a b", "é€𝄞", "\x00\x7f", "don't stop , .", "\r\n\t", "\ufeffbom", "e\u0301"]
    for text in texts + [random_text(rng, rng.randrange(200)) for _ in range(200)]:
        assert tokenizer(text)["input_ids"] == list(text.encode()), repr(text)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_stand_outside_the_bytes(tokenizer):
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 256
    assert tokenizer.pad_token_id == 257
    assert len(tokenizer) == 258
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [97, 256, 98]
    assert tokenizer.decode([97, 256, 98], skip_special_tokens=True) == "ab"


def test_tokenizer_round_trip_through_auto_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = random_text(random.Random(1), 500)
    assert loaded.is_fast
    assert loaded(text)["input_ids"] == list(text.encode())
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_tokenizer_without_end_of_text_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos_token"):
        load_tokenizer(str(tmp_path), 128)


def test_gpt2_vocabulary_files_make_a_tokenizer():
    folder = ROOT.parent / "shared/data/gpt2-tokenizer"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/gpt2-tokenizer")
    tokenizer = load_tokenizer(str(folder), 128)
    assert len(tokenizer) == 50257
    assert tokenizer.decode(tokenizer("Don't, é!\n\n x")["input_ids"]) == "Don't, é!\n\n x"


# Token files


def test_every_byte_is_stored_once_and_a_document_begins_with_end_of_text(tokenizer, tmp_path):
    text = "".join(f"line {i} é\n" for i in range(40_000))  # longer than one piece
    assert len(text) > 4 * PIECE_CHARS
    train, validation = prepare(Corpus(write(tmp_path / "a.txt", text)), tokenizer, tmp_path / "cache")
    assert train.tokens[0] == validation.tokens[0] == 256
    stored = bytes(train.tokens[1:].astype(np.uint8)) + bytes(validation.tokens[1:].astype(np.uint8))
    assert stored.decode() == text
    assert train.num_bytes + validation.num_bytes == len(text.encode())
    assert validation.num_bytes == pytest.approx(0.1 * len(text.encode()), rel=0.01)
    assert bytes(train.tokens[-1:].astype(np.uint8)) == b"\n"  # cut at a line end


def test_pieces_join_to_the_text_whatever_its_lines():
    rng = random.Random(0)
    for text in ("", "x" * (3 * PIECE_CHARS + 7), "\n" * (2 * PIECE_CHARS), random_text(rng, PIECE_CHARS + 1)):
        parts = list(pieces(text))
        assert "".join(parts) == text
        assert all(0 < len(part) <= PIECE_CHARS for part in parts)


def test_all_kinds_of_files_give_the_same_documents(tmp_path):
    documents = ["first\ntext\n", "second é\n", "third\n"]
    (tmp_path / "plain").mkdir()
    marked = "<|endoftext|>\n".join(documents)
    (tmp_path / "b.txt.bz2").write_bytes(bz2.compress(marked.encode()))
    lines = "".join(json.dumps({"body": text}) + "\n" for text in documents)
    for number, text in enumerate(documents):
        write(tmp_path / "plain" / f"{number}.txt", text)
    (tmp_path / "plain" / "notes.bin").write_bytes(b"\xff not text")
    assert list(Corpus(write(tmp_path / "a.txt", marked))) == documents
    assert list(Corpus(str(tmp_path / "b.txt.bz2"))) == documents
    assert list(Corpus(write(tmp_path / "c.jsonl", lines), "body")) == documents
    assert list(Corpus(str(tmp_path / "plain"))) == documents


def test_the_cache_is_keyed_by_text_tokenizer_and_settings_and_is_not_written_twice(tokenizer, tmp_path):
    cache, path = tmp_path / "cache", tmp_path / "a.txt"
    write(path, "some text\n" * 50)
    first, _ = prepare(Corpus(str(path)), tokenizer, cache)
    stamp = first.path.stat().st_mtime_ns
    again, _ = prepare(Corpus(str(path)), tokenizer, cache)
    assert again.path == first.path
    assert again.path.stat().st_mtime_ns == stamp
    other = {prepare(Corpus(str(path)), tokenizer, cache, fraction=0.2)[0].path}
    other.add(prepare(Corpus(str(path)), byte_tokenizer(), cache)[0].path)
    write(path, "other text\n" * 50)
    other.add(prepare(Corpus(str(path)), tokenizer, cache)[0].path)
    assert len(other | {first.path}) == 3  # an equal tokenizer shares the cache
    assert not list(cache.glob("*.tmp-*"))


def test_documents_are_held_out_whole_and_equal_ones_on_one_side(tokenizer, tmp_path):
    documents = [f"document {i % 100}\n" for i in range(400)]
    path = write(tmp_path / "a.txt", "<|endoftext|>\n".join(documents))
    sides = prepare(Corpus(path), tokenizer, tmp_path / "cache", split="document", fraction=0.3)
    train, held_out = ("".join(map(chr, file.tokens)).split(chr(256))[1:] for file in sides)
    assert sorted(train + held_out) == sorted(documents)
    assert not set(train) & set(held_out)
    assert 0.15 < len(held_out) / len(documents) < 0.45


def test_a_truncated_token_file_is_named(tokenizer, tmp_path):
    path = write(tmp_path / "a.txt", "some text\n" * 50)
    train, _ = prepare(Corpus(path), tokenizer, tmp_path / "cache")
    train.path.write_bytes(train.path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"where .* were written: delete"):
        prepare(Corpus(path), tokenizer, tmp_path / "cache")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda d: str(d / "absent.txt"), FileNotFoundError, "is not a file or folder .* hub:"),
        (lambda d: write(d / "a.txt", " \n\n"), ValueError, "without text"),
        (lambda d: write(d / "a.txt", ""), ValueError, "without text"),
        (lambda d: str(d), ValueError, "holds no text"),
        (lambda d: write(d / "a.jsonl", '{"body": "x"}\n'), ValueError, "no field 'text' among"),
        (lambda d: write(d / "a.jsonl", '{"text": "x"\n'), ValueError, "cannot be read"),
    ],
)
def test_unusable_text_is_refused_with_the_reason(tokenizer, tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        prepare(Corpus(make(tmp_path)), tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def test_bytes_that_are_not_utf8_are_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt cannot be read as UTF-8"):
        prepare(Corpus(str(tmp_path / "a.txt")), tokenizer, tmp_path / "cache")


# Batches


class Stream:
    """N distinct tokens, so that each target can be told from the others."""

    path = Path("train.bin")

    def __init__(self, length: int):
        self.tokens = np.arange(length)

    def __len__(self) -> int:
        return len(self.tokens)


@pytest.mark.parametrize("length", [9, 16, 17, 100, 257])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_an_epoch_covers_each_target_once(length, seed):
    batches = Batches(Stream(length), sequence_length=8, batch_size=1, seed=seed)
    seen = []
    for step in range(batches.num_windows):
        inputs, targets = batches.rows(step, 0, 1)
        counted = targets != IGNORED
        assert (targets[counted] == inputs[counted] + 1).all()
        assert counted.sum() == batches.target_counts(step).sum()
        seen += targets[counted].tolist()
    assert sorted(seen) == list(range(1, length))
    assert batches.targets_before(batches.num_windows) == length - 1


def test_the_global_batch_is_the_same_for_every_split():
    def step_rows(processes: int, accumulation: int, step: int):
        batches = Batches(Stream(1000), sequence_length=16, batch_size=8, seed=3)
        micro = 8 // (processes * accumulation)
        starts = [(a * processes + rank) * micro for a in range(accumulation) for rank in range(processes)]
        return sorted(tuple(row) for start in starts for row in batches.rows(step, start, start + micro)[0])

    for step in (0, 6, 7, 8, 1000):  # 63 windows: step 7 spans two epochs
        whole = step_rows(1, 1, step)
        assert len(set(whole)) == 8
        assert step_rows(1, 8, step) == step_rows(2, 4, step) == step_rows(8, 1, step) == whole


def test_a_batch_is_a_function_of_seed_and_step():
    first = Batches(Stream(1000), 16, 8, seed=3)
    walked = [first.rows(step, 0, 8)[1].tolist() for step in range(20)]
    fresh = Batches(Stream(1000), 16, 8, seed=3)
    assert fresh.rows(15, 0, 8)[1].tolist() == walked[15]
    assert fresh.rows(2, 0, 8)[1].tolist() == walked[2]
    assert Batches(Stream(1000), 16, 8, seed=4).rows(2, 0, 8)[1].tolist() != walked[2]
    assert len({str(rows) for rows in walked}) == 20  # another order and other windows every epoch


def test_validation_ends_after_one_pass():
    batches = Batches(Stream(50), sequence_length=8, batch_size=4)
    inputs, targets = batches.rows(1, 0, 4)  # windows 4, 5, 6 and one that is not there
    assert (targets[3] == IGNORED).all()
    assert (targets != IGNORED).sum() == 8 + 8 + 1
    assert (inputs >= 0).all()


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match="train text has 8 tokens, fewer than the 9 of one sequence"):
        Batches(Stream(8), sequence_length=8, batch_size=1)
