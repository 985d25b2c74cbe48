"""A saved model and a text, checked before any work is done."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# Characters read for each token wanted: the longest average of a tokenizer on plain text is about five.
CHARACTERS_PER_TOKEN = 16


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a folder that `save_pretrained` wrote.

    Raises:
        ValueError: if the folder does not hold both, saying what is missing.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        nested = sorted(path.parent for path in folder.glob("*/config.json"))
        hint = f"; did you mean {nested[0]}?" if nested else ""
        raise ValueError(f"{folder} is not a model folder: it has no config.json{hint}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{folder} has no tokenizer: save the model's own there with tokenizer.save_pretrained")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks weights ({sorted(info['missing_keys'])[0]}, ...): is it a whole checkpoint?")
    return model.eval(), tokenizer


def token_batches(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path,
    *,
    vocab_size: int,
    sequence_length: int = 256,
    batch_size: int = 8,
    max_tokens: int = 32768,
) -> list[Tensor]:
    """The first `max_tokens` tokens of a UTF-8 text file, as int64 (batch, sequence) batches; the last may be smaller.

    Args:
        vocab_size: the model's.
        sequence_length: tokens of a sequence, at most what the model is meant for.
    Raises:
        ValueError: if a number is too small, the file is missing, not text or has fewer than two tokens, or the
            tokenizer is not the model's.
    """
    if sequence_length < 2 or max_tokens < 2:
        raise ValueError(f"{max_tokens} tokens in sequences of {sequence_length}: a prediction needs at least two")
    text = Path(text)
    if not text.is_file():
        raise ValueError(f"text {str(text)!r} is not a file (looked from {Path.cwd()})")
    try:
        with open(text, encoding="utf-8") as stream:
            words = stream.read(CHARACTERS_PER_TOKEN * max_tokens)
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not UTF-8 text: {error}") from error
    tokens = torch.tensor(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    tokens = tokens[:max_tokens]
    if len(tokens) < 2:
        raise ValueError(f"{text} has {len(tokens)} tokens: give a text of a few thousand")
    if tokens.max() >= vocab_size:
        raise ValueError(
            f"the tokenizer makes token {tokens.max()}, the model knows {vocab_size}: they do not belong together"
        )
    whole = len(tokens) // sequence_length
    batches = list(tokens[: whole * sequence_length].view(-1, sequence_length).split(batch_size)) if whole else []
    rest = tokens[whole * sequence_length :]
    return [*batches, rest.unsqueeze(0)] if len(rest) > 1 else batches
