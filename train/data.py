"""Text to tokens to batches: tokenise once, memory-map for ever, and let (seed, step) alone say what a batch holds.

    Corpus(source, ...) -> load_tokenizer(name, ...) -> prepare(...) -> TokenStream -> Batches

    python train/data.py configs/train/small_30m.yaml --data FOLDER --tokenizer bpe:8192

prepares what the same arguments would train on, checks it and says how large it is, for instance before a launch on
many nodes.

A corpus becomes two streams of tokens, `<eos> document <eos> document ...`, for training and validation. A stream of N
tokens has N - 1 targets (token i predicts token i + 1), cut into windows of T: no target is lost, none is seen twice in
an epoch, and the last window is filled up with ignored targets. Documents are packed: a window that spans several
attends across their borders, which `<eos>` marks, and no token is padding or lost.

Batch `step` is a function of (seed, step): no iterator, no state, nothing to replay on resume, and the same sequences
whatever the number of processes they are spread over.

Letters: N tokens, T sequence length, W windows an epoch, B sequences a global batch.
"""

import errno
import hashlib
import json
import shutil
import sys
import time
import zlib
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
from cache import made_once
from corpus import Corpus
from tokenizer import load_tokenizer
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a target that no loss counts
SIDES = ("train", "validation")
SHARD_TOKENS = 1 << 26  # 128 MiB of a vocabulary below 65,536
BATCH_PIECES = 64  # tokenised at once, on all cores; they bound the memory
FORMAT = 2  # raise it when the token files change their meaning: old caches are then not found


def prepare(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    *,
    verify: bool = True,
    progress: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> tuple["TokenStream", "TokenStream"]:
    """The token streams (training, validation) of a corpus, from the cache or written there.

    The cache folder's name is a hash of the text, the tokenizer and the settings; any number of processes may ask for
    it at once (see `made_once`). It holds shards of `shard_tokens` tokens and a meta.json with their digests. That
    every file is there and whole in size is checked whenever it is opened; `verify` checks their digests too. A
    preparation that was killed starts anew.

    Raises:
        ValueError: if there is no text on one side of the split, or a file is missing or damaged.
        OSError: if the disk is full, with the bytes that are needed and free; nothing is left behind.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    identity = [FORMAT, corpus.fingerprint, backend.to_str(), tokenizer.eos_token_id, shard_tokens]
    folder = Path(cache_dir) / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    made_once(
        folder, lambda scratch: _tokenize(corpus, backend, tokenizer.eos_token_id, scratch, shard_tokens, progress)
    )
    meta = _read_meta(folder)
    streams = tuple(TokenStream(folder, meta[side], meta["dtype"]) for side in SIDES)
    for stream in streams if verify else ():
        stream.verify()
    return streams


def _tokenize(
    corpus: Corpus, backend: Tokenizer, eos_token_id: int, folder: Path, shard_tokens: int, progress: bool
) -> None:
    folder.mkdir()
    dtype = np.dtype("uint16" if max(backend.get_vocab().values()) < 1 << 16 else "uint32")
    writers = {side: _ShardWriter(folder, side, dtype, shard_tokens) for side in SIDES}
    stream = corpus.pieces()
    done = 0  # bytes of the source
    try:
        with tqdm(
            desc=f"tokenising {corpus.source}", total=corpus.size, unit="B", unit_scale=True, disable=not progress
        ) as bar:
            while batch := list(islice(stream, BATCH_PIECES)):
                encodings = backend.encode_batch_fast([text for _, _, text in batch], add_special_tokens=False)
                for (held_out, begins, text), encoding in zip(batch, encodings):
                    writer = writers["validation" if held_out else "train"]
                    if begins or writer.num_tokens == 0:
                        writer.num_documents += 1
                        writer.write(np.array([eos_token_id], dtype))
                    writer.write(np.array(encoding.ids, dtype))
                    writer.num_bytes += len(text.encode())
                bar.update(corpus.position - done)
                done = corpus.position
        for side, writer in writers.items():
            if writer.num_bytes == 0:
                raise ValueError(
                    f"data {corpus.source!r} leaves the {side} side without text (val_split {corpus.split}, "
                    f"val_fraction {corpus.fraction}): give more text, or another val_split or val_fraction"
                )
        meta = {"source": corpus.source, "dtype": dtype.name} | {side: w.finish() for side, w in writers.items()}
        meta["sha256"] = _digest(meta)
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        written = dtype.itemsize * sum(writer.num_tokens for writer in writers.values())
        needed = f"about {written / done * corpus.size:,.0f}" if corpus.size and done else f"more than {written:,}"
        raise OSError(
            error.errno,
            f"no room for the tokens of {corpus.source!r}: {needed} bytes are needed, {written:,} were written before "
            f"the disk was full, and with those removed again {shutil.disk_usage(folder).free + written:,} are free: "
            "make room, or set cache_dir to another disk",
            str(folder.parent),
        ) from error
    finally:
        for writer in writers.values():
            with suppress(OSError):  # of a full disk, once more
                writer.close()


class _ShardWriter:
    """Appends tokens to SIDE-00000.bin, SIDE-00001.bin, ..., each of `shard_tokens` tokens but the last."""

    def __init__(self, folder: Path, side: str, dtype: np.dtype, shard_tokens: int):
        self.folder, self.side, self.dtype, self.shard_tokens = folder, side, dtype, shard_tokens
        self.num_tokens = self.num_bytes = self.num_documents = 0
        self.shards: list[dict] = []
        self._file = None

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            room = self.shard_tokens - self.num_tokens % self.shard_tokens
            if room == self.shard_tokens:
                self.close()
                self.shards.append({"file": f"{self.side}-{len(self.shards):05d}.bin", "num_tokens": 0, "crc32": 0})
                self._file = open(self.folder / self.shards[-1]["file"], "wb")  # noqa: SIM115 (closed when full)
            part, tokens = tokens[:room].tobytes(), tokens[room:]
            self._file.write(part)
            shard, count = self.shards[-1], len(part) // self.dtype.itemsize
            shard["num_tokens"] += count
            shard["crc32"] = zlib.crc32(part, shard["crc32"])
            self.num_tokens += count

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def finish(self) -> dict:
        self.close()
        counts = {name: getattr(self, name) for name in ("num_tokens", "num_bytes", "num_documents", "shard_tokens")}
        return {**counts, "shards": self.shards}


def _digest(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _read_meta(folder: Path) -> dict:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        digest = meta.pop("sha256")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_damaged(folder / "meta.json", f"cannot be read ({error})")) from error
    if digest != _digest(meta):
        raise ValueError(_damaged(folder / "meta.json", "is not what was written: its digest differs"))
    return meta


def _damaged(path: Path, what: str) -> str:
    return f"token file {path} {what}: delete the folder {path.parent}, and the next start prepares it again"


class TokenStream:
    """One side's tokens, memory-mapped shard by shard, and what they spell.

    Attributes: num_tokens N; num_bytes, of the text in UTF-8; num_documents.

    Raises:
        ValueError: if a shard is missing or not of the size that was written.
    """

    def __init__(self, folder: Path, meta: dict, dtype: str):
        self.folder, self.dtype = folder, np.dtype(dtype)
        self.num_tokens, self.num_bytes = meta["num_tokens"], meta["num_bytes"]
        self.num_documents, self.shard_tokens, self.shards = meta["num_documents"], meta["shard_tokens"], meta["shards"]
        self._mapped: list[np.ndarray | None] = [None] * len(self.shards)
        for shard in self.shards:
            path, expected = folder / shard["file"], shard["num_tokens"] * self.dtype.itemsize
            if not path.is_file():
                raise ValueError(_damaged(path, "is missing"))
            if path.stat().st_size != expected:
                raise ValueError(_damaged(path, f"has {path.stat().st_size} bytes where {expected} were written"))

    def __len__(self) -> int:
        return self.num_tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1, a view where they lie in one shard."""
        first, last = start // self.shard_tokens, (stop - 1) // self.shard_tokens
        parts = []
        for index in range(first, last + 1):
            offset = index * self.shard_tokens
            parts.append(self._map(index)[max(start - offset, 0) : stop - offset])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _map(self, index: int) -> np.ndarray:
        if self._mapped[index] is None:
            # A plain array on the map: slices of np.memmap itself cost five times as much.
            self._mapped[index] = np.asarray(np.memmap(self.folder / self.shards[index]["file"], self.dtype, "r"))
        return self._mapped[index]

    def verify(self) -> None:
        """Read every byte and compare digests (CRC-32: finds any change within 32 neighbouring bits).

        Raises:
            ValueError: naming the first shard that is not what was written.
        """
        for shard in self.shards:
            path, crc32 = self.folder / shard["file"], 0
            with open(path, "rb") as stream:
                while block := stream.read(1 << 20):
                    crc32 = zlib.crc32(block, crc32)
            if crc32 != shard["crc32"]:
                raise ValueError(_damaged(path, "is not what was written: its digest differs"))


class Batches:
    """What each step sees, from (seed, step) alone.

    Every epoch draws a rotation of the stream (so that windows start elsewhere) and an order of the windows:
    sequence e of the run is window `order[e % W]` of epoch `e // W`, target i of window w stands at place
    `(rotation + w * T + i) mod (N - 1)`. Validation uses no rotation and the natural order. The order of one epoch is
    kept: 8 W bytes a process, 4 MB for 10^9 tokens at T = 2,048.

    Args:
        stream: the tokens. sequence_length: T. batch_size: B, over all processes. seed: None for validation.

    Raises:
        ValueError: if there are fewer than T + 1 tokens.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, batch_size: int, seed: int | None = None):
        if len(stream) < sequence_length + 1:
            raise ValueError(
                f"the {'validation' if seed is None else 'training'} text has {len(stream)} tokens, fewer than the "
                f"{sequence_length + 1} of one sequence: give more text or a smaller sequence_length"
            )
        self.stream, self.sequence_length, self.batch_size, self.seed = stream, sequence_length, batch_size, seed
        self.num_targets = len(stream) - 1
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
        return self._spans(step, 0, self.batch_size)[1]

    def targets_before(self, step: int) -> int:
        """Number of targets that the first `step` steps count."""
        epoch, rest = divmod(step * self.batch_size, self.num_windows)
        if self.seed is None and epoch > 0:
            return self.num_targets
        _, order = self._draw(epoch)
        missing = self.num_windows * self.sequence_length - self.num_targets  # of the stream's last window
        short = missing if self.num_windows - 1 in order[:rest] else 0
        return epoch * self.num_targets + rest * self.sequence_length - short

    def _spans(self, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(place of the first target, before the modulus; number of targets) of sequences start..stop-1 of a step."""
        epochs, positions = np.divmod(step * self.batch_size + np.arange(start, stop), self.num_windows)
        places, counts = np.zeros_like(positions), np.zeros_like(positions)
        for epoch in np.unique(epochs):
            if self.seed is None and epoch > 0:
                continue  # validation ends after one pass: the batch is filled up with sequences that count nothing
            rotation, order = self._draw(int(epoch))
            here = epochs == epoch
            begins = order[positions[here]] * self.sequence_length
            places[here] = rotation + begins
            counts[here] = np.minimum(self.sequence_length, self.num_targets - begins)
        return places, counts

    def rows(self, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 (stop - start, T), of sequences start..stop-1 of the global batch of `step`."""
        inputs = np.empty((stop - start, self.sequence_length), np.int64)
        targets = np.empty_like(inputs)
        for row, (place, count) in enumerate(np.stack(self._spans(step, start, stop), axis=1).tolist()):
            filled = 0
            while filled < self.sequence_length:  # twice where the window goes round the end of the stream
                begin = (place + filled) % self.num_targets
                taken = min(self.sequence_length - filled, self.num_targets - begin)
                tokens = self.stream.read(begin, begin + taken + 1)
                inputs[row, filled : filled + taken] = tokens[:-1]
                targets[row, filled : filled + taken] = tokens[1:]
                filled += taken
            targets[row, count:] = IGNORED
        return inputs, targets


def main(arguments: list[str]) -> None:
    """Prepare and verify the text of a run, and print what it is."""
    import resource

    from settings import parse

    started, settings = time.perf_counter(), parse(arguments)
    corpus = Corpus(
        settings.data, settings.text_column, settings.val_split, settings.val_fraction, settings.max_documents
    )
    tokenizer = load_tokenizer(settings.tokenizer, settings.sequence_length, corpus, settings.cache_dir, progress=True)
    streams = prepare(corpus, tokenizer, settings.cache_dir, progress=True)
    seconds = time.perf_counter() - started
    for side, stream in zip(SIDES, streams):
        print(
            f"{side:>10}: {stream.num_documents:,} documents, {stream.num_bytes:,} bytes, {len(stream):,} tokens, "
            f"{stream.num_bytes / len(stream):.3f} bytes/token, {len(stream.shards)} shard(s)"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{len(tokenizer):,} tokens of {settings.tokenizer}; {streams[0].folder}, digests verified")
    print(f"{seconds:.1f} s, peak memory {peak / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main(sys.argv[1:])
