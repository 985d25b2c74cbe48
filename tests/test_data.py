"""Tokens and batches: nothing lost, nothing twice, the same for every split; files whole or absent, and checked."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "train"))

import data as data_module  # noqa: E402
from corpus import PIECE_CHARS, Corpus  # noqa: E402
from data import IGNORED, Batches, prepare  # noqa: E402
from tokenizer import byte_tokenizer  # noqa: E402

EOS = 256


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def tokens_of(stream) -> np.ndarray:
    return np.array(stream.read(0, len(stream)))


def spelled(stream) -> str:
    tokens = tokens_of(stream)
    return bytes(tokens[tokens != EOS].astype(np.uint8)).decode()


# Token files


@pytest.mark.parametrize("shard_tokens", [1 << 26, 100_000, 4_099])
def test_every_byte_is_stored_once_and_a_document_begins_with_end_of_text(tokenizer, tmp_path, shard_tokens):
    documents = ["".join(f"document {d} line {i} é\n" for i in range(n)) for d, n in enumerate((1, 20_000, 7, 20_000))]
    corpus = Corpus(write(tmp_path / "a.txt", "<|endoftext|>\n".join(documents)))
    train, validation = prepare(corpus, tokenizer, tmp_path / "cache", shard_tokens=shard_tokens)
    assert corpus.size > 4 * PIECE_CHARS
    assert spelled(train) + spelled(validation) == "".join(documents)
    assert train.num_bytes + validation.num_bytes == len("".join(documents).encode())
    assert validation.num_bytes == pytest.approx(0.1 * corpus.size, rel=0.01)
    starts = [0, *np.cumsum([len(text.encode()) + 1 for text in documents])[:-1]]
    assert np.flatnonzero(tokens_of(train) == EOS).tolist() == starts
    assert np.flatnonzero(tokens_of(validation) == EOS).tolist() == [0]
    assert (train.num_documents, validation.num_documents) == (4, 1)
    assert spelled(train).endswith("\n")
    assert len(train.shards) == -(-len(train) // shard_tokens)
    assert {shard["num_tokens"] for shard in train.shards[:-1]} <= {shard_tokens}


def test_reading_across_shards_is_reading_one_file(tokenizer, tmp_path):
    corpus = Corpus(write(tmp_path / "a.txt", "".join(f"{i} " for i in range(400))), split="tail", fraction=0.5)
    whole = prepare(corpus, tokenizer, tmp_path / "cache")[0]
    parted = prepare(corpus, tokenizer, tmp_path / "cache", shard_tokens=7)[0]
    assert len(parted.shards) > 90
    expected = tokens_of(whole)
    for start in range(0, len(whole), 5):
        for length in (1, 6, 7, 8, 50):
            stop = min(start + length, len(whole))
            np.testing.assert_array_equal(parted.read(start, stop), expected[start:stop])


def test_a_large_vocabulary_is_stored_in_four_bytes(tokenizer, tmp_path):
    large = byte_tokenizer()
    large.add_tokens([f"<{i}>" for i in range(1 << 16)])
    train, _ = prepare(Corpus(write(tmp_path / "a.txt", "word <65535>\n" * 50)), large, tmp_path / "cache")
    assert train.dtype == np.uint32
    assert tokens_of(train).max() == 258 + 65535
    assert prepare(Corpus(str(tmp_path / "a.txt")), tokenizer, tmp_path / "cache")[0].dtype == np.uint16


def test_the_cache_is_keyed_by_text_tokenizer_and_settings_and_is_not_written_twice(tokenizer, tmp_path, monkeypatch):
    cache, path = tmp_path / "cache", write(tmp_path / "a.txt", "some text\n" * 50)
    first = prepare(Corpus(path), tokenizer, cache)[0].folder
    truncating = byte_tokenizer()
    truncating.backend_tokenizer.enable_truncation(3)
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "_tokenize", None)
        assert prepare(Corpus(path), byte_tokenizer(), cache)[0].folder == first, "an equal tokenizer shares the cache"
        assert prepare(Corpus(path), truncating, cache)[0].folder == first
    named = byte_tokenizer()
    named.add_tokens(["text"])
    others = [prepare(Corpus(path, fraction=0.2), tokenizer, cache), prepare(Corpus(path), named, cache)]
    others += [prepare(Corpus(path), tokenizer, cache, shard_tokens=100)]
    others += [prepare(Corpus(write(tmp_path / "a.txt", "other text\n" * 50)), tokenizer, cache)]
    assert len({first, *(train.folder for train, _ in others)}) == 5
    assert not list(cache.glob("*.tmp"))


def test_the_files_say_what_they_are(tokenizer, tmp_path):
    train, _ = prepare(Corpus(write(tmp_path / "a.txt", "some text\n" * 50)), tokenizer, tmp_path / "cache")
    meta = json.loads((train.folder / "meta.json").read_text())
    assert meta["dtype"] == "uint16"
    assert meta["train"]["num_tokens"] == len(train) == 461
    assert meta["train"]["num_bytes"] == train.num_bytes == 460
    assert [shard["file"] for shard in meta["train"]["shards"]] == ["train-00000.bin"]
    assert {path.name for path in train.folder.iterdir()} == {"meta.json", "train-00000.bin", "validation-00000.bin"}


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00001.bin", Path.unlink, "is missing"),
        ("train-00001.bin", truncate, "has 197 bytes where 200 were written"),
        ("validation-00000.bin", flip, "its digest differs"),
        ("meta.json", Path.unlink, "cannot be read"),
        ("meta.json", truncate, "cannot be read"),
    ],
)
def test_a_damaged_token_file_is_named_with_the_remedy(tokenizer, tmp_path, name, damage, message):
    corpus = Corpus(write(tmp_path / "a.txt", "some text\n" * 50))
    train, _ = prepare(corpus, tokenizer, tmp_path / "cache", shard_tokens=100)
    damage(train.folder / name)
    with pytest.raises(ValueError, match=rf"{name} .*{message}.*: delete the folder {train.folder}"):
        prepare(corpus, tokenizer, tmp_path / "cache", shard_tokens=100)


def test_a_changed_count_is_noticed(tokenizer, tmp_path):
    corpus = Corpus(write(tmp_path / "a.txt", "some text\n" * 50))
    path = prepare(corpus, tokenizer, tmp_path / "cache")[0].folder / "meta.json"
    path.write_text(path.read_text().replace('"num_bytes": 460', '"num_bytes": 461'))
    with pytest.raises(ValueError, match=r"meta\.json is not what was written"):
        prepare(corpus, tokenizer, tmp_path / "cache")


def test_digests_are_checked_only_where_asked(tokenizer, tmp_path):
    corpus = Corpus(write(tmp_path / "a.txt", "some text\n" * 50))
    train, _ = prepare(corpus, tokenizer, tmp_path / "cache")
    flip(train.folder / "train-00000.bin")
    prepare(corpus, tokenizer, tmp_path / "cache", verify=False)
    with pytest.raises(ValueError, match="digest differs"):
        train.verify()


@pytest.mark.parametrize("split", ["tail", "document"])
@pytest.mark.parametrize("text", ["", " \n\n", "one document alone"])
def test_a_side_without_text_is_refused(tokenizer, tmp_path, text, split):
    corpus = Corpus(write(tmp_path / "a.txt", text), split=split, fraction=0.001)
    with pytest.raises(ValueError, match=r"leaves the (train|validation) side without text"):
        prepare(corpus, tokenizer, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


# Full disks, killed and competing processes


def test_a_full_disk_says_how_much_is_needed_and_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "BATCH_PIECES", 2)
    corpus = Corpus(write(tmp_path / "a.txt", "some text\n" * 300_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))  # the system refuses to write beyond
    try:
        with pytest.raises(OSError, match=r"about [\d,]+ bytes are needed, [\d,]+ were written .* are free") as caught:
            prepare(corpus, tokenizer, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    needed = int(str(caught.value).split("about ")[1].split(" bytes")[0].replace(",", ""))
    assert needed == pytest.approx(6_000_000, rel=0.2)  # two bytes a token, a token a byte
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert len(prepare(corpus, tokenizer, tmp_path / "cache")[0]) == 2_700_011


def test_no_space_left_is_told_from_other_errors(tokenizer, tmp_path, monkeypatch):
    corpus = Corpus(write(tmp_path / "a.txt", "some text\n" * 1000))
    for number, message in ((errno.ENOSPC, "make room, or set cache_dir"), (errno.EIO, "broken")):

        def fail(*_, number=number):
            raise OSError(number, "broken")

        monkeypatch.setattr(data_module._ShardWriter, "write", fail)
        with pytest.raises(OSError, match=message) as caught:
            prepare(corpus, tokenizer, tmp_path / "cache")
        assert caught.value.errno == number


PREPARE = """
import os, pathlib, signal, sys
import data, tokenizer
from corpus import Corpus

path, cache, moment = sys.argv[1:]

def dying(at, function, name):
    def replacement(*arguments, **options):
        if moment == f"before {name}":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if moment == f"after {name}":
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(at, name, replacement)

dying(data._ShardWriter, data._ShardWriter.write, "write")
dying(data, data._digest, "_digest")
dying(pathlib.Path, pathlib.Path.rename, "rename")
made = data._tokenize
data._tokenize = lambda *arguments: (print("made", flush=True), made(*arguments))
print("ready", flush=True)
sys.stdin.readline()
train, validation = data.prepare(Corpus(path), tokenizer.byte_tokenizer(), cache, shard_tokens=20_000)
print(train.folder.name, len(train))
"""


def start(*arguments) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "train")}
    command = [sys.executable, "-c", PREPARE, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", ["after write", "before _digest", "before rename", "after rename"])
def test_a_killed_preparation_leaves_a_cache_that_is_whole_or_absent(tokenizer, tmp_path, moment):
    path, cache = write(tmp_path / "a.txt", "some text\n" * 1000), tmp_path / "cache"
    with start(path, cache, moment) as process:
        process.communicate("\n")
    assert process.returncode == -9
    folders = [p for p in cache.iterdir() if p.is_dir()]
    assert [p.suffix for p in folders] == ["" if moment == "after rename" else ".tmp"]
    # Something else is made beside the leftover: it goes away
    prepare(Corpus(path, fraction=0.3), tokenizer, cache)
    assert not list(cache.glob("*.tmp"))
    train, _ = prepare(Corpus(path), tokenizer, cache, shard_tokens=20_000)
    assert len(train) == 9011
    assert spelled(train) == "some text\n" * 901


def test_of_many_processes_one_prepares_and_all_have_it(tmp_path):
    path = write(tmp_path / "a.txt", "some text\n" * 100_000)
    processes = [start(path, tmp_path / "cache", "never") for _ in range(3)]
    assert all(process.stdout.readline() == "ready\n" for process in processes)
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    printed = [process.communicate()[0].split("\n") for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sum("made" in lines for lines in printed) == 1
    assert len({lines[-2] for lines in printed}) == 1
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_the_command_prepares_what_a_run_trains_on(tokenizer, tmp_path, capsys):
    cache = tmp_path / "cache"
    data_module.main(["--val_fraction", "0.2", "--cache_dir", str(cache), "--sequence_length", "128"])
    printed = capsys.readouterr().out
    train, validation = prepare(Corpus("tinyshakespeare", fraction=0.2), tokenizer, cache)
    assert f"{train.num_bytes:,} bytes, {len(train):,} tokens, 1.000 bytes/token" in printed
    assert f"{len(validation):,} tokens" in printed
    assert str(train.folder) in printed
    assert "peak memory" in printed


# Batches


class Stream:
    """N distinct tokens, so that each target can be told from the others."""

    def __init__(self, length: int):
        self.tokens = np.arange(length)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= len(self)
        return self.tokens[start:stop]


@pytest.mark.parametrize("length", [9, 16, 17, 100, 257])
@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("split", [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_an_epoch_covers_each_target_once_over_all_processes(length, seed, split):
    processes, accumulation = split
    batches = [Batches(Stream(length), sequence_length=8, batch_size=4, seed=seed) for _ in range(processes)]
    windows, micro = batches[0].num_windows, 4 // (processes * accumulation)
    seen: list[list[int]] = []
    for step in range(-(-windows // 4)):
        rows: list[list[int]] = []
        for index in range(accumulation):
            for rank, own in enumerate(batches):
                begin = (index * processes + rank) * micro
                inputs, targets = own.rows(step, begin, begin + micro)
                counted = targets != IGNORED
                assert (targets[counted] == inputs[counted] + 1).all()
                assert (counted.sum(1) == own.target_counts(step)[begin : begin + micro]).all()
                rows += [row[row != IGNORED].tolist() for row in targets]
        seen += rows
    epoch = [target for row in seen[:windows] for target in row]
    assert sorted(epoch) == list(range(1, length))
    if seed is None:
        assert not any(seen[windows:])


def test_targets_before_counts_what_the_steps_count():
    for length, seed in ((50, None), (50, 0), (49, 3), (1000, 1)):
        batches, total = Batches(Stream(length), sequence_length=8, batch_size=5, seed=seed), 0
        for step in range(40):
            assert batches.targets_before(step) == total
            total += batches.target_counts(step).sum()


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


def test_a_batch_is_a_function_of_seed_and_step_so_that_the_position_needs_no_replay():
    first = Batches(Stream(1000), 16, 8, seed=3)
    walked = [first.rows(step, 0, 8)[1].tolist() for step in range(20)]
    for step in (15, 2, 7):
        fresh = Batches(Stream(1000), 16, 8, seed=3)
        assert fresh.rows(step, 0, 8)[1].tolist() == walked[step]
    assert Batches(Stream(1000), 16, 8, seed=4).rows(2, 0, 8)[1].tolist() != walked[2]
    assert len({str(rows) for rows in walked}) == 20  # another order and other windows every epoch


@pytest.mark.parametrize("seed", [None, 5])
def test_batches_do_not_depend_on_the_shards(tokenizer, tmp_path, seed):
    corpus = Corpus(write(tmp_path / "a.txt", "".join(f"{i} " for i in range(400))), fraction=0.1)
    whole = Batches(prepare(corpus, tokenizer, tmp_path / "cache")[0], 16, 4, seed)
    parted = Batches(prepare(corpus, tokenizer, tmp_path / "cache", shard_tokens=11)[0], 16, 4, seed)
    for step in range(60):  # more than two epochs
        for expected, found in zip(whole.rows(step, 0, 4), parted.rows(step, 0, 4)):
            np.testing.assert_array_equal(found, expected)


def test_validation_ends_after_one_pass():
    batches = Batches(Stream(50), sequence_length=8, batch_size=4)
    inputs, targets = batches.rows(1, 0, 4)  # windows 4, 5, 6 and one that is not there
    assert (targets[3] == IGNORED).all()
    assert (targets != IGNORED).sum() == 8 + 8 + 1
    assert (inputs >= 0).all()


@pytest.mark.parametrize(("seed", "side"), [(0, "training"), (None, "validation")])
def test_too_short_a_text_is_refused(seed, side):
    with pytest.raises(ValueError, match=f"the {side} text has 8 tokens, fewer than the 9 of one sequence"):
        Batches(Stream(8), sequence_length=8, batch_size=1, seed=seed)
