"""Tokenizers: bytes, a byte-level BPE trained on the corpus itself, or any that `AutoTokenizer` reads."""

import hashlib
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from cache import made_once
from corpus import END_OF_TEXT, Corpus
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD = "<|pad|>"
# How Llama 3 cuts text into words before BPE (its tokenizer.json; GPT-4's, without the possessive quantifiers).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BPE_FORMAT = 1  # raise it when the training of a BPE changes: old ones are then not found
BPE_CHARS = 1 << 30  # a BPE is trained on at most this much text


def load_tokenizer(
    name: str,
    model_max_length: int,
    corpus: Corpus | None = None,
    cache_dir: str | Path = "runs/cache",
    *,
    progress: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a run.

    Args:
        name: `byte`; `bpe:SIZE`, trained on the training side of `corpus` and kept in `cache_dir`; or a folder or hub
            name that `AutoTokenizer` reads, or a folder with just GPT-2's `vocab.json` and `merges.txt`.

    Raises:
        ValueError: if it is not a fast tokenizer or has no end-of-text token, or SIZE does not suit the corpus.
    """
    if name == "byte":
        return byte_tokenizer(model_max_length)
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        if corpus is None:
            raise ValueError(
                f"tokenizer {name!r} is trained on a corpus, and there is none here: name one that is made"
            )
        if not size.isdecimal() or int(size) < 258:
            raise ValueError(f"tokenizer {name!r} must be bpe:SIZE, SIZE at least 258 (256 bytes and 2 special tokens)")
        return bpe_tokenizer(corpus, int(size), cache_dir, model_max_length, progress=progress)
    bare_bpe = (Path(name) / "merges.txt").is_file() and not (Path(name) / "tokenizer_config.json").is_file()
    try:
        tokenizer = (GPT2TokenizerFast if bare_bpe else AutoTokenizer).from_pretrained(name)
    except OSError as error:
        raise ValueError(f"tokenizer {name!r} is none of byte, bpe:SIZE, one AutoTokenizer reads: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {name!r} is not a fast one (it has no tokenizer.json): convert it first")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no eos_token, which separates documents: set one and save it again")
    tokenizer.model_max_length = model_max_length
    return tokenizer


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
    return _pretrained(tokenizer, model_max_length)


def bpe_tokenizer(
    corpus: Corpus, size: int, cache_dir: str | Path, model_max_length: int = 1 << 30, *, progress: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens, trained on the training side of a corpus: any text decodes to itself.

    `<|endoftext|>` and `<|pad|>` are tokens 0 and 1; then come the 256 bytes and the merges. Words are cut as in
    Llama 3. Memory is that of the counts of the distinct words. Of local text longer than BPE_CHARS characters every
    n-th piece is used, with the least n that suffices; of a stream, whose length is unknown, the first BPE_CHARS.

    Raises:
        ValueError: if the text does not yield so many tokens, or the cached file is damaged.
    """
    identity = [BPE_FORMAT, corpus.fingerprint, size, WORDS, BPE_CHARS]
    name = f"bpe-{size}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]}.json"

    def train(path: Path) -> None:
        tokenizer = Tokenizer(models.BPE())
        words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_sample(corpus, progress), trainer)
        if tokenizer.get_vocab_size() < size:
            raise ValueError(
                f"data {corpus.source!r} yields a BPE of only {tokenizer.get_vocab_size()} tokens: "
                f"give more text, or a tokenizer smaller than bpe:{size}"
            )
        tokenizer.save(str(path))

    path = made_once(Path(cache_dir) / name, train)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} is damaged ({error}): delete it, and the next start makes it again") from error
    return _pretrained(tokenizer, model_max_length)


def _sample(corpus: Corpus, progress: bool) -> Iterator[str]:
    """At most BPE_CHARS characters of the training side, from all over it where its length is known."""
    stride = 1 if corpus.size is None else max(1, math.ceil(corpus.num_chars / BPE_CHARS))
    texts = (text for held_out, _, text in corpus.pieces() if not held_out)
    remaining = BPE_CHARS
    with tqdm(desc="reading for BPE", total=corpus.size, unit="B", unit_scale=True, disable=not progress) as bar:
        for text in islice(texts, 0, None, stride):
            yield text
            bar.update(corpus.position - bar.n)
            remaining -= len(text)
            if remaining <= 0:
                break


def _pretrained(tokenizer: Tokenizer, model_max_length: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
