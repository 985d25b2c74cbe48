"""What `shakespeare_bytes` reads: the last tenth of the text, in pieces that a small model's context holds."""

from datasets import Dataset


def tail(documents: Dataset, share: float = 0.1, length: int = 256, limit: int = 128) -> Dataset:
    """Up to `limit` evenly spread pieces of `length` characters of the last `share` of the text."""
    text = "".join(documents["text"])
    text = text[int((1 - share) * len(text)) :]
    starts = range(0, len(text) - length, length)
    chosen = list(starts)[:: max(1, len(starts) // limit)][:limit]
    return Dataset.from_dict({"text": [text[start : start + length] for start in chosen]})
