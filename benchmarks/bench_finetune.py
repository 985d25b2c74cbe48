"""Fine-tune a converted model's splines alone, beside LoRA and full fine-tuning of its source at the same budget.

    python benchmarks/bench_finetune.py SmolLM2-135M-Instruct.gguf --train_text train.txt --valid_text valid.txt

Every method sees the same batches in the same order for the same number of steps, with AdamW, a linear warm-up over a
tenth of them and a linear decay to zero, at a rate of its own (`--rate splines=1e-3`, given several times to try more).
Held-out loss before and after, trainable parameters and seconds go into a table and a json under `--output`.
"""

import argparse
import bz2
import copy
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import RESULTS, environment, header, markdown, write, write_json
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from kansformer.convert import convert
from kansformer.sources import open_source

RATES = {"splines": 1e-4, "lora": 5e-4, "full": 5e-5}  # the best of two each, benchmarks/results/finetune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a folder with safetensors weights, or a .gguf file")
    parser.add_argument("--train_text", type=Path, required=True, help="a text file, .bz2 or not")
    parser.add_argument("--valid_text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--valid_sequences", type=int, default=32)
    parser.add_argument("--grid_size", type=int, default=3)
    parser.add_argument("--spline_order", type=int, default=1)
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--rate", action="append", metavar="METHOD=RATE", help=f"default {RATES}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "finetune", help="a folder, for table.md and table.json"
    )
    options = parser.parse_args()
    runs = [(name, float(rate)) for name, rate in (item.split("=") for item in options.rate or [])] or RATES.items()
    if unknown := {name for name, _ in runs} - RATES.keys():
        parser.error(f"--rate is for {', '.join(RATES)}, not {', '.join(sorted(unknown))}")

    source, tokenizer = load(options.source)
    shape = options.sequence_length, tokenizer
    train = sequences(options.train_text, options.steps * options.batch_size, *shape)
    valid = sequences(options.valid_text, options.valid_sequences, *shape)

    keys = (
        "steps",
        "batch_size",
        "sequence_length",
        "valid_sequences",
        "grid_size",
        "spline_order",
        "lora_rank",
        "seed",
    )
    chosen = {key: getattr(options, key) for key in keys}
    env = environment(options.device, dtype="float32", source=options.source.name, **chosen)
    print(header(env), flush=True)
    results = []
    for name, rate in runs:
        set_seed(options.seed)
        model = prepare(name, source, train[:8], options).to(options.device)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        before = held_out_loss(model, valid)
        seconds = fine_tune(model, train.split(options.batch_size), rate)
        after = held_out_loss(model, valid)
        results.append({"method": name, "rate": rate, "trainable": trainable, "before": before, "after": after})
        results[-1]["seconds"] = seconds
        print(results[-1], flush=True)
    columns = ["method", "rate", "trainable parameters", "held-out loss before", "after", "seconds"]
    formats = ("{}", "{:g}", "{:,}", "{:.4f}", "{:.4f}", "{:.0f}")
    rows = [[form.format(value) for form, value in zip(formats, result.values())] for result in results]
    table = markdown(columns, rows)
    print(f"\n{table}")
    write(options.output / "table.md", f"{header(env)}\n\n{table}\n")
    write_json(options.output / "table.json", {"environment": env, "results": results})


def load(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer, of a folder or a .gguf file."""
    if source.suffix == ".gguf":
        opened = open_source(source)
        return opened.model(), opened.tokenizer
    # In memory: open_source leaves a folder's layers on disk, where nothing trains
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(source)


def prepare(method: str, source: nn.Module, calibration: Tensor, options: argparse.Namespace) -> nn.Module:
    """A model of its own for each method, with `requires_grad` where it trains."""
    if method == "full":
        return copy.deepcopy(source)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        rank = options.lora_rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(copy.deepcopy(source), config)
    model = convert(source, calibration=calibration, grid_size=options.grid_size, spline_order=options.spline_order)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("spline_weight")
    return model


def fine_tune(model: nn.Module, batches: tuple[Tensor, ...], rate: float) -> float:
    """One pass over the batches; the seconds it took."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps, warmup = len(batches), max(1, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    started = time.perf_counter()
    for batch in batches:
        batch = batch.to(model.device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return time.perf_counter() - started


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    """Mean cross entropy in nats a token."""
    model.eval()
    losses = [model(input_ids=row, labels=row, use_cache=False).loss for row in rows.to(model.device).split(4)]
    weights = [len(row) for row in rows.split(4)]
    return sum(loss.item() * weight for loss, weight in zip(losses, weights)) / len(rows)


def sequences(file: Path, rows: int, length: int, tokenizer) -> Tensor:
    """The first `rows` * `length` tokens of a text, as (rows, length)."""
    ids: list[int] = []
    for piece in pieces(file):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(ids) >= rows * length:
            return torch.tensor(ids[: rows * length]).view(rows, length)
    raise ValueError(f"{file} has {len(ids)} tokens, but {rows} rows of {length} were asked for: lower --steps")


def pieces(file: Path, lines: int = 1000) -> Iterator[str]:
    """The text, some lines at a time."""
    with (bz2.open if file.suffix == ".bz2" else open)(file, "rt", encoding="utf-8") as text:
        while piece := "".join(itertools.islice(text, lines)):
            yield piece


if __name__ == "__main__":
    main()
