"""Tokenizers: any text decodes to itself; a BPE knows the training side alone, and is the same wherever it is made."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import kansformer  # noqa: F401 (registers the model, for its configuration)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "train"))

import corpus as corpus_module  # noqa: E402
import settings as settings_module  # noqa: E402
import tokenizer as tokenizer_module  # noqa: E402
from corpus import END_OF_TEXT, Corpus, pieces  # noqa: E402
from settings import Settings  # noqa: E402
from tokenizer import bpe_tokenizer, byte_tokenizer, load_tokenizer  # noqa: E402

GPT2 = ROOT.parent / "shared/data/gpt2-tokenizer"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bpe(cache):
    return bpe_tokenizer(Corpus("tinyshakespeare"), 1024, cache)


def random_text(rng: random.Random, length: int) -> str:
    """Characters of every UTF-8 width, surrogates excepted (they are no text)."""
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length))


def texts() -> list[str]:
    rng = random.Random(0)
    odd = ["", " ", "\n\n", "a b", "é€𝄞", "\x00\x7f", "don't stop , .", "\r\n\t", "\ufeffbom", "e\u0301", "  1914  x"]
    return odd + [random_text(rng, rng.randrange(200)) for _ in range(200)]


# Bytes


def test_tokens_are_bytes_and_decode_to_the_same_text():
    tokenizer = byte_tokenizer()
    for text in texts():
        assert tokenizer(text)["input_ids"] == list(text.encode()), repr(text)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_stand_outside_the_bytes():
    tokenizer = byte_tokenizer()
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 256
    assert tokenizer.pad_token_id == 257
    assert len(tokenizer) == 258
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [97, 256, 98]
    assert tokenizer.decode([97, 256, 98], skip_special_tokens=True) == "ab"


# Byte-level BPE


def test_a_bpe_has_the_size_asked_for_and_decodes_to_the_same_text(bpe):
    assert len(bpe) == bpe.vocab_size == 1024
    assert (bpe.bos_token_id, bpe.eos_token_id, bpe.pad_token_id) == (0, 0, 1)
    assert sorted(bpe.get_vocab().values()) == list(range(1024))
    for text in texts():
        assert bpe.decode(bpe(text)["input_ids"]) == text
    line = "What authority surfeits on would relieve us: if they"
    assert len(bpe(line)["input_ids"]) < len(line) / 2
    assert bpe(f"a{END_OF_TEXT}b")["input_ids"][1] == bpe.eos_token_id


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_round_trip_through_auto_tokenizer(kind, bpe, tmp_path):
    tokenizer = {"byte": byte_tokenizer(), "bpe": bpe}[kind]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "To be, or not to be\n\n" + random_text(random.Random(1), 500)
    assert loaded.is_fast
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_a_bpe_is_the_same_in_any_process(bpe, cache, tmp_path):
    program = "import sys; from corpus import Corpus; from tokenizer import bpe_tokenizer\n"
    program += "bpe_tokenizer(Corpus('tinyshakespeare'), 1024, sys.argv[1])"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "train"), "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"}
    subprocess.run([sys.executable, "-c", program, tmp_path], env=environment, check=True)
    made, again = next(cache.glob("bpe-*.json")), next(tmp_path.glob("bpe-*.json"))
    assert again.name == made.name
    assert again.read_bytes() == made.read_bytes()


def test_a_bpe_does_not_see_the_held_out_side(tmp_path):
    lines = Path(corpus_module.BUNDLED["tinyshakespeare"]).read_text().splitlines(keepends=True)[:4000]

    def trained(name: str, train: list[str], valid: list[str]) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text("".join(train))
        (tmp_path / name / "valid.txt").write_text("".join(valid))
        corpus = Corpus(str(tmp_path / name), split="file")
        return bpe_tokenizer(corpus, 400, tmp_path / "cache").backend_tokenizer.to_str()

    first = trained("a", lines[:2000], lines[2000:])
    assert trained("b", lines[:2000], ["zebra xylophone\n"] * 2000) == first
    assert trained("c", lines[2000:], lines[:2000]) != first
    assert len(list((tmp_path / "cache").glob("bpe-*.json"))) == 3


def test_a_bpe_is_trained_once(bpe, cache, monkeypatch):
    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(tokenizer_module, "_sample", fail)
    again = bpe_tokenizer(Corpus("tinyshakespeare"), 1024, cache)
    assert again.backend_tokenizer.to_str() == bpe.backend_tokenizer.to_str()
    with pytest.raises(AssertionError, match="trained again"):
        bpe_tokenizer(Corpus("tinyshakespeare"), 1025, cache)
    assert not list(cache.glob("*.tmp"))


def test_a_huge_text_is_sampled_from_all_over(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "PIECE_CHARS", 1000)
    monkeypatch.setattr(tokenizer_module, "BPE_CHARS", 20_000)
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i:06d}\n" for i in range(20_000)))
    corpus = Corpus(str(path), split="document", fraction=1e-12)
    sample = list(tokenizer_module._sample(corpus, progress=False))
    numbers = [int(text.split("line ")[1][:6]) for text in sample]
    assert 15_000 < sum(map(len, sample)) < 21_000
    assert numbers[0] < 200
    assert numbers[-1] > 18_000
    corpus.size = None  # a stream does not know its length
    start = list(tokenizer_module._sample(corpus, progress=False))
    assert "".join(start) == path.read_text()[: sum(map(len, start))]
    assert 20_000 <= sum(map(len, start)) < 21_000


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(kind, bpe, monkeypatch):
    if kind == "gpt2" and not GPT2.is_dir():
        pytest.skip("needs ../shared/data/gpt2-tokenizer")
    tokenizer = bpe if kind == "bpe" else load_tokenizer(str(GPT2), 1 << 30)
    text = Path(corpus_module.BUNDLED["tinyshakespeare"]).read_text()[:50_000]
    monkeypatch.setattr(corpus_module, "PIECE_CHARS", 2000)
    parts = list(pieces(text))
    assert len(parts) > 20
    joined = [token for part in parts for token in tokenizer(part)["input_ids"]]
    assert joined == tokenizer(text)["input_ids"]
    careless = [token for i in range(0, len(text), 2000) for token in tokenizer(text[i : i + 2000])["input_ids"]]
    assert careless != joined


# Tokenizers from elsewhere, and errors


def test_gpt2_vocabulary_files_make_a_tokenizer():
    if not GPT2.is_dir():
        pytest.skip("needs ../shared/data/gpt2-tokenizer")
    tokenizer = load_tokenizer(str(GPT2), 128)
    assert len(tokenizer) == 50257
    assert tokenizer.decode(tokenizer("Don't, é!\n\n x")["input_ids"]) == "Don't, é!\n\n x"


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos_token"):
        load_tokenizer(str(tmp_path), 128)


@pytest.mark.parametrize("name", ["bpe:", "bpe:many", "bpe:257", "bpe:-4096"])
def test_a_bpe_of_no_size_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="must be bpe:SIZE, SIZE at least 258"):
        load_tokenizer(name, 128, Corpus("tinyshakespeare"), tmp_path)


def test_a_bpe_without_a_corpus_is_refused():
    with pytest.raises(ValueError, match="'bpe:4096' is trained on a corpus"):
        load_tokenizer("bpe:4096", 128)


def test_too_little_text_for_a_bpe_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a small text, a small text\n" * 9)
    with pytest.raises(ValueError, match=r"yields a BPE of only \d+ tokens: give more text, or .* bpe:4096"):
        load_tokenizer("bpe:4096", 128, Corpus(str(tmp_path / "a.txt")), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("bpe-*.json"))


def test_a_damaged_bpe_is_named_and_a_half_written_one_removed(tmp_path):
    corpus = Corpus("tinyshakespeare", split="document", fraction=1e-12, max_documents=1)
    (tmp_path / "bpe-299-of-a-killed-process.json.tmp").write_text("{")
    bpe_tokenizer(corpus, 300, tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    path = next(tmp_path.glob("bpe-*.json"))
    path.write_text(path.read_text()[:-100])
    with pytest.raises(ValueError, match=f"{path.name} is damaged .* delete it"):
        bpe_tokenizer(corpus, 300, tmp_path)


def test_an_unknown_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of byte, bpe:SIZE"):
        load_tokenizer(str(tmp_path / "absent"), 128)


def test_a_vocabulary_larger_than_the_models_is_refused(bpe):
    settings = Settings(model=str(ROOT / "configs/models/tiny_kan_gated.json"))
    assert settings_module.model_config(settings, bpe).vocab_size == 1024
    settings.model_overrides = {"vocab_size": 512}
    with pytest.raises(ValueError, match="512 is smaller than the tokenizer's 1024 tokens"):
        settings_module.model_config(settings, bpe)
