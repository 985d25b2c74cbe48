"""Text to tokens to batches: tokenise once, memory-map for ever, and let (seed, step) alone say what a batch holds.

    documents(source) -> byte_tokenizer() or AutoTokenizer -> prepare(...) -> TokenFile -> Batches

A corpus becomes one stream of tokens, `<eos> document <eos> document ...`, in one file for training and one for
validation. A stream of N tokens has N - 1 targets (token i predicts token i + 1), cut into windows of T: no target is
lost, none is seen twice in an epoch, and the last window is filled up with ignored targets.

Batch `step` is a function of (seed, step): no iterator, no state, nothing to replay on resume, and the same sequences
whatever the number of processes they are spread over.

Letters: N tokens, T sequence length, W windows an epoch, B sequences a global batch.
"""

import bz2
import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast

BUNDLED = {"tinyshakespeare": Path(__file__).with_name("tinyshakespeare.txt")}
END_OF_TEXT = "<|endoftext|>"  # separates documents in the token stream and, on a line of its own, in text files
IGNORED = -100  # a target that no loss counts
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
OPENERS = {".bz2": bz2.open, ".gz": gzip.open}
PIECE_CHARS = 1 << 16  # long documents are tokenised in pieces of about this size, cut after a line end
FORMAT = 1  # raise it when the token files change their meaning: old caches are then not found


def byte_tokenizer(model_max_length: int = 1 << 30) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose token b is the byte b: `decode(encode(text)) == text` for any text.

    256 bytes, then `<|endoftext|>` (beginning and end of a document) and `<|pad|>`: 258 tokens; a model rounds its
    vocabulary up to a multiple of 64.
    """
    # The characters by which ByteLevel writes bytes: printable ones stand for themselves, the rest follow from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in characters)}
    tokenizer = Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token="<|pad|>",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str, model_max_length: int) -> PreTrainedTokenizerBase:
    """`"byte"`, or a folder or hub name that `AutoTokenizer` reads, or a folder with just GPT-2's `vocab.json` and
    `merges.txt`; it must have an end-of-text token."""
    if name == "byte":
        return byte_tokenizer(model_max_length)
    bare_bpe = (Path(name) / "merges.txt").is_file() and not (Path(name) / "tokenizer_config.json").is_file()
    tokenizer = (GPT2TokenizerFast if bare_bpe else AutoTokenizer).from_pretrained(name)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {name!r} is not a fast one (it has no tokenizer.json): convert it first")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no eos_token, which separates documents: set one and save it again")
    tokenizer.model_max_length = model_max_length
    return tokenizer


def text_files(source: str) -> list[Path]:
    """The files that `source` (a bundled name, a file or a folder) stands for, in sorted order."""
    path = BUNDLED.get(source) or Path(source).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"data {source!r} is not a file or folder (looked from {Path.cwd()}) and not a bundled text "
            f"({', '.join(BUNDLED)}); for a dataset of the Hugging Face hub write hub:{source}"
        )
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.with_suffix("").name and _text_suffix(p))
    if not files:
        raise ValueError(
            f"folder {source!r} holds no text: expected files named *{{{','.join(TEXT_SUFFIXES)}}}[.bz2|.gz]"
        )
    return files


def _text_suffix(path: Path) -> str | None:
    name = path.name.removesuffix(path.suffix) if path.suffix in OPENERS else path.name
    return next((suffix for suffix in TEXT_SUFFIXES if name.endswith(suffix)), None)


def file_documents(path: Path, text_column: str = "text") -> Iterator[str]:
    """The documents of one file: lines of a `.jsonl`, or the text between lines `<|endoftext|>` of anything else."""
    opener = OPENERS.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8", newline="") as lines:
        try:
            if _text_suffix(path) == ".jsonl":
                for number, line in enumerate(lines, 1):
                    record = json.loads(line)
                    if text_column not in record:
                        raise ValueError(f"{path}, line {number}: no field {text_column!r} among {sorted(record)}")
                    yield record[text_column]
                return
            document: list[str] = []
            for line in lines:
                if line.rstrip("\r\n") == END_OF_TEXT:
                    yield "".join(document)
                    document.clear()
                else:
                    document.append(line)
            yield "".join(document)
        except (UnicodeDecodeError, EOFError, OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error


class Corpus:
    """The documents of a source and a fingerprint of their text.

    Args:
        source: a bundled name (`tinyshakespeare`), a text file (`.txt`, `.md`, `.jsonl`, each also `.bz2` or `.gz`),
            a folder of such files, or `hub:NAME[:CONFIG]`, the training split of a `datasets` dataset.
        text_column: the field that holds the text, in `.jsonl` files and datasets.
    """

    def __init__(self, source: str, text_column: str = "text"):
        self.source, self.text_column = source, text_column
        if source.startswith("hub:"):
            from datasets import load_dataset  # slow to import, and not needed for local text

            name, _, config = source.removeprefix("hub:").partition(":")
            self._dataset = load_dataset(name, config or None, split="train")
            if text_column not in self._dataset.column_names:
                raise ValueError(f"{source} has no column {text_column!r}, only {self._dataset.column_names}")
            self.fingerprint = self._dataset._fingerprint
        else:
            self._files = text_files(source)
            digest = hashlib.sha256()
            for path in self._files:
                digest.update(f"{path.suffixes}:{path.stat().st_size}:".encode())
                with open(path, "rb") as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
            self.fingerprint = digest.hexdigest()

    def __iter__(self) -> Iterator[str]:
        if self.source.startswith("hub:"):
            texts = (row[self.text_column] for row in self._dataset)
        else:
            texts = (text for path in self._files for text in file_documents(path, self.text_column))
        return (text for text in texts if text.strip())


def split_documents(corpus: Corpus, split: str, fraction: float) -> Iterator[tuple[bool, str]]:
    """Pairs (is validation, document). `tail`: the last `fraction` of the text, cut at a line end; `document`: whole
    documents, by a hash of their text, so that equal documents always land on the same side."""
    if split == "document":
        for text in corpus:
            draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
            yield draw < fraction, text
        return
    remaining = round((1 - fraction) * sum(len(text) for text in corpus))
    for text in corpus:
        if 0 < remaining < len(text):
            cut = text.find("\n", remaining) + 1 or remaining
            yield False, text[:cut]
            yield True, text[cut:]
        else:
            yield remaining <= 0, text
        remaining -= len(text)


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of about PIECE_CHARS characters, each ending with a line where lines allow it."""
    start = 0
    while start < len(text):
        stop = start + PIECE_CHARS
        stop = text.rfind("\n", start, stop) + 1 or stop if stop < len(text) else len(text)
        yield text[start:stop]
        start = stop


class TokenFile:
    """A memory-mapped stream of tokens and the number of UTF-8 bytes of the text that it spells."""

    def __init__(self, path: Path, dtype: str, num_tokens: int, num_bytes: int):
        self.path, self.num_bytes = path, num_bytes
        size, expected = path.stat().st_size, num_tokens * np.dtype(dtype).itemsize
        if size != expected:
            raise ValueError(f"{path} has {size} bytes where {expected} were written: delete {path.parent}")
        self.tokens = np.memmap(path, dtype=dtype, mode="r", shape=(num_tokens,))

    def __len__(self) -> int:
        return len(self.tokens)


def prepare(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    *,
    split: str = "tail",
    fraction: float = 0.1,
    progress: bool = False,
) -> tuple[TokenFile, TokenFile]:
    """Token files (training, validation) of a corpus, from the cache or written there.

    The cache folder's name is a hash of the text, the tokenizer and the settings; it is written beside its place and
    renamed, so that it is whole or absent, and several processes may prepare the same corpus at once.

    Raises:
        ValueError: if there is no text on one side of the split.
    """
    settings = {"format": FORMAT, "split": split, "fraction": fraction, "text_column": corpus.text_column}
    identity = [corpus.fingerprint, tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, settings]
    folder = Path(cache_dir) / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    if not (folder / "meta.json").exists():
        _tokenize(corpus, tokenizer, folder, split, fraction, progress)
    meta = json.loads((folder / "meta.json").read_text())
    return tuple(TokenFile(folder / f"{side}.bin", meta["dtype"], **meta[side]) for side in ("train", "validation"))


def _tokenize(corpus, tokenizer, folder: Path, split: str, fraction: float, progress: bool) -> None:
    dtype = np.dtype("uint16" if len(tokenizer) <= 1 << 16 else "uint32")
    counts = {side: {"num_tokens": 0, "num_bytes": 0} for side in ("train", "validation")}
    parts = (
        ("validation" if held_out else "train", index == 0, piece)
        for held_out, text in split_documents(corpus, split, fraction)
        for index, piece in enumerate(pieces(text))
    )
    scratch = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            streams = {side: stack.enter_context(open(scratch / f"{side}.bin", "wb")) for side in counts}
            bar = tqdm(desc=f"tokenising {corpus.source}", unit="B", unit_scale=True, disable=not progress)
            stack.enter_context(bar)
            while batch := list(islice(parts, 64)):
                ids = tokenizer([piece for _, _, piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
                for (side, first, piece), tokens in zip(batch, ids):
                    tokens = [tokenizer.eos_token_id] * first + tokens
                    streams[side].write(np.asarray(tokens, dtype).tobytes())
                    counts[side]["num_tokens"] += len(tokens)
                    counts[side]["num_bytes"] += len(piece.encode())
                bar.update(sum(count["num_bytes"] for count in counts.values()) - bar.n)
        for side, count in counts.items():
            if count["num_bytes"] == 0:
                raise ValueError(
                    f"data {corpus.source!r} leaves the {side} side without text (split={split!r}, "
                    f"fraction={fraction}): give more text, or another val_split or val_fraction"
                )
        meta = {"source": corpus.source, "dtype": dtype.name, **counts}
        (scratch / "meta.json").write_text(json.dumps(meta, indent=1))
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "meta.json").exists():  # else another process was first: its files are the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class Batches:
    """What each step sees, from (seed, step) alone.

    Every epoch draws a rotation of the stream (so that windows start elsewhere) and an order of the windows:
    sequence e of the run is window `order[e % W]` of epoch `e // W`, target i of window w stands at place
    `(rotation + w * T + i) mod (N - 1)`. Validation uses no rotation and the natural order.

    Args:
        file: the tokens. sequence_length: T. batch_size: B, over all processes. seed: None for validation.

    Raises:
        ValueError: if there are fewer than T + 1 tokens.
    """

    def __init__(self, file: TokenFile, sequence_length: int, batch_size: int, seed: int | None = None):
        if len(file) < sequence_length + 1:
            raise ValueError(
                f"{file.path.stem} text has {len(file)} tokens, fewer than the {sequence_length + 1} of one sequence: "
                "give more text or a smaller sequence_length"
            )
        self.tokens, self.sequence_length, self.batch_size, self.seed = file.tokens, sequence_length, batch_size, seed
        self.num_targets = len(file) - 1
        self.num_windows = -(-self.num_targets // sequence_length)
        self._epoch: tuple[int, int, np.ndarray] | None = None  # (epoch, rotation, order) of the last call

    def _draw(self, epoch: int) -> tuple[int, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            if self.seed is None:
                rotation, order = 0, np.arange(self.num_windows)
            else:
                rng = np.random.default_rng([self.seed, epoch])
                rotation, order = int(rng.integers(self.num_targets)), rng.permutation(self.num_windows)
            self._epoch = (epoch, rotation, order)
        return self._epoch[1:]

    def target_counts(self, step: int) -> np.ndarray:
        """Number of counted targets of each of the B sequences of a step, (B,) int."""
        return np.array([self._span(step * self.batch_size + row)[1] for row in range(self.batch_size)])

    def targets_before(self, step: int) -> int:
        """Number of targets that the first `step` steps count."""
        epochs, rest = divmod(step * self.batch_size, self.num_windows)
        counted = (self._span(epochs * self.num_windows + position)[1] for position in range(rest))
        return epochs * self.num_targets + sum(counted)

    def _span(self, sequence: int) -> tuple[int, int]:
        """(place of the first target, before the modulus; number of targets) of a sequence of the run."""
        epoch, position = divmod(sequence, self.num_windows)
        if self.seed is None and epoch > 0:
            return 0, 0  # validation ends after one pass: the batch is filled up with sequences that count nothing
        rotation, order = self._draw(epoch)
        start = int(order[position]) * self.sequence_length
        return rotation + start, min(self.sequence_length, self.num_targets - start)

    def rows(self, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 (stop - start, T), of sequences start..stop-1 of the global batch of `step`."""
        inputs = np.empty((stop - start, self.sequence_length), np.int64)
        targets = np.full_like(inputs, IGNORED)
        for row in range(start, stop):
            place, count = self._span(step * self.batch_size + row)
            places = np.arange(place, place + self.sequence_length) % self.num_targets
            inputs[row - start] = self.tokens[places]
            targets[row - start, :count] = self.tokens[places[:count] + 1]
        return inputs, targets
