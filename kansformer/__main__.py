"""python -m kansformer: what can be done from the command line."""

import argparse
import importlib.util

# Modules of the package, and scripts of the repository.
COMMANDS = {
    "python -m kansformer.convert SRC DST": "a pretrained Llama, Mistral, Qwen or SmolLM model, with the same outputs",
    "python -m kansformer.inspect MODEL --text FILE": "what the edge functions of a model do on a text, as a page",
    "python -m kansformer.prune MODEL --text FILE --share 0.3 --output DST": "a smaller model of the units that matter",
    "python train/train.py CONFIG": "train a model on text",
    "python train/demo.py": "train a KAN and a SwiGLU model of equal size on Shakespeare, and compare them",
    "python benchmarks/param_efficiency.py SWEEP": "what a baseline needs to match a KAN block: sizes, rates, seeds",
    "python benchmarks/bench_finetune.py MODEL": "fine-tune a converted model: its splines alone, LoRA, or all of it",
}


def main() -> None:
    rows = [
        f"  {command:<50}{what}"
        for command, what in COMMANDS.items()
        if not command.startswith("python -m") or importlib.util.find_spec(command.split()[2])
    ]
    listed = "\n".join(["commands (--help on each says more; train/ and benchmarks/ are in the repository):", *rows])
    parser = argparse.ArgumentParser(
        "python -m kansformer",
        description="Transformers whose feed-forward blocks are Kolmogorov-Arnold layers.",
        epilog=listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    main()
