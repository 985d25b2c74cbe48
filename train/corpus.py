"""Text from where it lies to a stream of pieces, each on the training or the held-out side.

Local text is read by the few lines below: they hold one piece of one file in memory and write nothing, where
`datasets` would first copy the whole text into its Arrow cache. Everything else goes through `datasets`, as a stream.
"""

import bz2
import difflib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

BUNDLED = {"tinyshakespeare": Path(__file__).with_name("tinyshakespeare.txt")}
END_OF_TEXT = "<|endoftext|>"  # separates documents in the token stream and, on a line of its own, in text files
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
OPENERS = {".bz2": bz2.open, ".gz": gzip.open, "": lambda raw, _, **text: io.TextIOWrapper(raw, **text)}
HELD_OUT = ("validation", "valid", "val", "dev", "test")  # names of the held-out side, the preferred ones first
SIDE = re.compile(f"(train|{'|'.join(HELD_OUT)})(?![a-z])")
SPLITS = ("tail", "document", "file")
PIECE_CHARS = 1 << 16  # long documents are read and tokenised in pieces of at most this size


class Corpus:
    """The text of a source, its two sides, and a fingerprint of both.

    Args:
        source: a bundled name (`tinyshakespeare`); a text file (`.txt`, `.md`, `.jsonl`, each also `.bz2` or `.gz`); a
            folder of such files; or `hub:NAME[:CONFIG]`, a dataset of the Hugging Face hub or a folder of parquet or
            other data files, which `datasets` streams: nothing of it is stored here.
        text_column: the field that holds the text, in `.jsonl` files and datasets.
        split: what is held out. `tail`: the last `fraction` of the characters, cut at a line end (not of a dataset: a
            stream has no known end). `document`: whole documents, by a hash of their text, so that equal ones always
            fall on the same side. `file`: the files, or the split of the dataset, that are named validation, valid,
            val, dev or test (the first of these that is there; the others are not read); train ones are trained on.
        fraction: the share of the text that `tail` and `document` hold out.
        max_documents: read at most so many documents of each side of `file`, and of the whole otherwise. None: all.

    Raises:
        FileNotFoundError, ValueError: where there is no such source, or the split does not suit it.
    """

    def __init__(
        self,
        source: str,
        text_column: str = "text",
        split: str = "tail",
        fraction: float = 0.1,
        max_documents: int | None = None,
    ):
        if split not in SPLITS:
            raise ValueError(f"val_split {split!r} must be one of {', '.join(SPLITS)}")
        self.source, self.text_column, self.split, self.fraction = source, text_column, split, fraction
        self.max_documents = max_documents
        self.size: int | None = None  # bytes of the files, compressed as they are; of a stream: unknown
        self.position = 0  # how many of them are read
        self._num_chars: int | None = None
        if source.startswith("hub:"):
            self._sides, content = _open_dataset(source, split)
        else:
            self._sides, content = _find_files(source, split)
            self.size = sum(path.stat().st_size for _, path in self._sides)
        rule = {"column": text_column, "split": split, "max_documents": max_documents}
        rule |= {} if split == "file" else {"fraction": fraction}
        self.fingerprint = hashlib.sha256(json.dumps([content, rule]).encode()).hexdigest()

    def pieces(self) -> Iterator[tuple[bool, bool, str]]:
        """Triples (is held out, begins a document, text of at most PIECE_CHARS characters), in the corpus' order."""
        if self.split == "file":
            yield from self._read()
        elif self.split == "tail":
            remaining = round((1 - self.fraction) * self.num_chars)
            for _, begins, text in self._read():
                if 0 < remaining < len(text):
                    cut = text.find("\n", remaining) + 1 or remaining
                    yield False, begins, text[:cut]
                    yield True, True, text[cut:]
                else:
                    yield remaining <= 0, begins, text
                remaining -= len(text)
        else:
            for document in _documents(self._read()):
                digest = hashlib.sha256()
                for text in document:
                    digest.update(text.encode())
                held_out = int.from_bytes(digest.digest()[:8], "big") / 2**64 < self.fraction
                for index, text in enumerate(document):
                    yield held_out, index == 0, text

    @property
    def num_chars(self) -> int:
        """Number of characters of all the text; the first call reads it."""
        if self._num_chars is None:
            self._num_chars = sum(len(text) for _, _, text in self._read())
        return self._num_chars

    def _read(self) -> Iterator[tuple[bool, bool, str]]:
        self.position = 0
        for held_out, place in self._sides:
            start, documents = self.position, 0
            for begins, text in self._read_file(place, start) if isinstance(place, Path) else self._read_rows(place):
                documents += begins
                if self.max_documents is not None and documents > self.max_documents:
                    break
                yield held_out, begins, text
            self.position = start + (place.stat().st_size if isinstance(place, Path) else 0)

    def _read_file(self, path: Path, start: int) -> Iterator[tuple[bool, str]]:
        with open(path, "rb") as raw:
            opener = OPENERS.get(path.suffix, OPENERS[""])
            try:
                with opener(raw, "rt", encoding="utf-8", newline="") as lines:
                    rows = _records(lines, path) if _text_suffix(path) == ".jsonl" else None
                    for piece in _marked_pieces(lines) if rows is None else self._read_rows(rows):
                        self.position = start + raw.tell()
                        yield piece
            except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
                raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error

    def _read_rows(self, rows: Iterable[dict]) -> Iterator[tuple[bool, str]]:
        for number, row in enumerate(rows, 1):
            text = row.get(self.text_column, ...)
            if text is ...:
                raise ValueError(
                    f"row {number} of {self.source} has no column {self.text_column!r} among {sorted(row)}: "
                    "name the one that holds the text (--text_column)"
                )
            if not isinstance(text, str | None):
                raise ValueError(
                    f"row {number} of {self.source}: column {self.text_column!r} holds {repr(text)[:80]}, no text"
                )
            for index, piece in enumerate(pieces(text) if text and not text.isspace() else ()):
                yield index == 0, piece


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most PIECE_CHARS characters, cut where a tokenizer sees a border anyway.

    That is before a line end that follows a letter or digit: no pre-tokenisation in use joins the two, while many join
    line ends with the space or punctuation before them. Where there is none: before any line end; else anywhere.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        limit = start + PIECE_CHARS
        stop = last = text.rfind("\n", start + 1, limit)
        while stop > 0 and not text[stop - 1].isalnum():
            stop = text.rfind("\n", start + 1, stop)
        stop = max(stop, 0) or max(last, 0) or limit
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def _marked_pieces(lines: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """(begins a document, piece) of lines where `<|endoftext|>`, alone, ends a document; blank documents are none."""
    begins, held, length = True, [], 0
    for line in chain(lines, [END_OF_TEXT]):
        ends = line.rstrip("\r\n") == END_OF_TEXT
        if not ends:
            held.append(line)
            length += len(line)
            if length <= PIECE_CHARS:
                continue
        text = "".join(held)
        parts = [] if begins and (not text or (ends and text.isspace())) else list(pieces(text))
        held = [] if ends else [parts.pop()]
        length = sum(map(len, held))
        for part in parts:
            yield begins, part
            begins = False
        begins = begins or ends


def _documents(stream: Iterable[tuple[bool, bool, str]]) -> Iterator[list[str]]:
    document: list[str] = []
    for _, begins, text in stream:
        if begins and document:
            yield document
            document = []
        document.append(text)
    if document:
        yield document


def _records(lines: Iterable[str], path: Path) -> Iterator[dict]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} must be a JSON object, not {line.strip():.80}")
        yield record


def _find_files(source: str, split: str) -> tuple[list[tuple[bool, Path]], str]:
    """Pairs (is held out, file) of a local source, in sorted order, and a digest of their contents."""
    root = BUNDLED.get(source) or Path(source).expanduser()
    if not root.exists():
        known = [*BUNDLED, *(str(path) for path in root.parent.glob("*"))]
        close = difflib.get_close_matches(source, known, n=1)
        raise FileNotFoundError(
            f"data {source!r} is neither a file or folder (looked from {Path.cwd()}) nor a bundled text "
            f"({', '.join(BUNDLED)})"
            + (f"; did you mean {close[0]!r}?" if close else "")
            + f"; for a dataset of the Hugging Face hub write hub:{source}"
        )
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file() and _text_suffix(p))
    if not files:
        raise ValueError(
            f"folder {source!r} holds no text: expected files named *{{{','.join(TEXT_SUFFIXES)}}}[.bz2|.gz]; "
            f"for parquet and other data files write hub:{source}"
        )
    named = {path: _side(path.relative_to(root)) for path in files} if root.is_dir() else {}
    held_out = next((name for name in HELD_OUT if name in named.values()), None)
    both = held_out and "train" in named.values()
    if split == "file":
        if not both:
            raise ValueError(f"val_split file needs a folder with train.* and valid.* files; {source!r} has none such")
        sides = [(name == held_out, path) for path, name in named.items() if name in ("train", held_out)]
    elif both:
        raise ValueError(
            f"{source!r} has its own {held_out} files, which val_split {split} would train on: use val_split file, or "
            "give the training file alone as data"
        )
    else:
        sides = [(False, path) for path in files]
    digest = hashlib.sha256()
    for held_out, path in sides:
        digest.update(f"{held_out}:{''.join(path.suffixes[-2:])}:{path.stat().st_size}:".encode())
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return sides, digest.hexdigest()


def _side(path: Path) -> str | None:
    """`train`, or the name of the held-out side, that the nearest part of a path begins with."""
    matches = (SIDE.match(part.lower()) for part in reversed(path.parts))
    return next((match[1] for match in matches if match), None)


def _text_suffix(path: Path) -> str | None:
    name = path.name.removesuffix(path.suffix) if path.suffix in (".bz2", ".gz") else path.name
    return next((suffix for suffix in TEXT_SUFFIXES if name.endswith(suffix) and name != suffix), None)


def _open_dataset(source: str, split: str) -> tuple[list[tuple[bool, Iterable[dict]]], dict]:
    """Pairs (is held out, stream of rows) of a dataset, and what its content depends on: its files and revision."""
    from datasets import load_dataset_builder  # slow to import, and not needed for local text

    name, _, config = source.removeprefix("hub:").partition(":")
    if split == "tail":
        raise ValueError(
            f"val_split tail needs the length of the text, which the stream {source} does not tell: use document, or "
            "file where the dataset has a validation split"
        )
    try:
        builder = load_dataset_builder(name, config or None)
        streams = builder.as_streaming_dataset()
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be opened by datasets: {error}") from error
    held_out = next((side for side in HELD_OUT if side in streams), None)
    if "train" not in streams or (split == "file" and held_out is None):
        wanted = "train and validation" if split == "file" else "train"
        raise ValueError(f"{source} must have splits named {wanted}, and has {sorted(streams)}")
    sides = ["train", held_out] if split == "file" else ["train"]
    # The addresses of hub files hold their revision, and the origins of local ones their time of change.
    files = {str(side): [list(names), names.origin_metadata] for side, names in builder.config.data_files.items()}
    content = {"name": name, "config": builder.config.name, "files": files}
    return [(side == held_out, streams[side]) for side in sides], content
