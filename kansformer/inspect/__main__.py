"""python -m kansformer.inspect MODEL_DIR --text FILE --output report.html"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import kansformer
from kansformer.inspect.edges import measure
from kansformer.inspect.formulas import formulas
from kansformer.inspect.loading import load, token_batches
from kansformer.inspect.page import report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kansformer.inspect",
        description="What the edge functions of a trained model do on a text, as one self-contained HTML page.",
    )
    parser.add_argument("model", help="a folder with a model and its tokenizer")
    parser.add_argument("--text", required=True, help="a UTF-8 text file, best one that the model was not trained on")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="default %(default)s")
    parser.add_argument("--tokens", type=int, default=32768, help="of the text to use, at most; default %(default)s")
    parser.add_argument("--sequence_length", type=int, default=256, help="default %(default)s")
    options = parser.parse_args(arguments)
    if options.output.is_dir():
        parser.error(f"--output {options.output} is a folder: name a file")
    try:
        model, tokenizer = load(options.model)
        batches = token_batches(
            tokenizer,
            options.text,
            vocab_size=model.config.vocab_size,
            sequence_length=min(options.sequence_length, model.config.max_position_embeddings),
            max_tokens=options.tokens,
        )
        page = report(measure(model, batches), facts(options, model, batches), formulas)
    except ValueError as error:
        sys.exit(f"error: {error}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    part = options.output.with_name(f"{options.output.name}.part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, options.output)
    print(f"{options.output}: {len(page.encode()) / 1e6:.1f} MB, open it in any browser")


def facts(options: argparse.Namespace, model, batches: Sequence[torch.Tensor]) -> dict[str, str]:
    """What the page's header says."""
    config = model.config
    feed_forward = model.parameter_counts()["feed_forward"] if hasattr(model, "parameter_counts") else None
    return {
        "Model": options.model,
        "Feed-forward block": getattr(config, "ffn_summary", config.model_type),
        "Parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        **({"of these, feed-forward": f"{feed_forward:,}"} if feed_forward else {}),
        "Layers × width": f"{config.num_hidden_layers} × {config.hidden_size}",
        "Text": Path(options.text).name,
        "Tokens": f"{sum(b.numel() for b in batches):,}",
        "Made with": f"kansformer {kansformer.__version__}{_commit()}, torch {torch.__version__}",
    }


def _commit() -> str:
    """The commit, where the package runs from its repository."""
    root = Path(kansformer.__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return f" at {run.stdout.strip()}" if run.returncode == 0 else ""


if __name__ == "__main__":
    main()
