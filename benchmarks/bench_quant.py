"""What quantised weights cost in bits per byte: models of KAN and MLP blocks, weight-only int8 and int4.

    python benchmarks/bench_quant.py MODEL_DIR [MODEL_DIR ...] --text FILE     # needs torchao (extra int8)

int8 is torchao's Int8WeightOnlyConfig, one scale a row (of coefficients: a row is one spline of one input), as
transformers' TorchAoConfig applies it. int4 is simulated, the rounded weights kept in float: groups of 32 numbers of a
row share a scale. Embeddings and norms stay as they are. Every model reads the same text in windows of its trained
length; a row also has the loss against the same model in float, the figure to compare between blocks.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import RESULTS, environment, header, markdown, write, write_json
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer

import kansformer  # noqa: F401 (registers the model)

SPLINES, ALL = r"re:.*\.spline_weight", r"re:.*_proj\.(weight|spline_weight)"
GROUP = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders with a tokenizer")
    parser.add_argument("--names", nargs="+", help="for the table; default: the folders' names")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=200_000, help="of the text")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--output", type=Path, default=RESULTS / "quant", help="writes OUTPUT.{json,md}")
    options = parser.parse_args()
    names = options.names or [path.name for path in options.models]
    if len(names) != len(options.models):
        parser.error(f"{len(names)} --names for {len(options.models)} models")
    env = environment("cpu", text=options.text.name, characters=options.characters, length=options.length)
    text = options.text.read_text()[: options.characters]
    rows = []
    for name, path in zip(names, options.models):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        windows = torch.tensor(AutoTokenizer.from_pretrained(path)(text).input_ids)
        windows = windows[: len(windows) // options.length * options.length].view(-1, options.length)
        reference = bits_per_byte(model, windows, len(text.encode()))
        for method, quantize in METHODS.items():
            small = copy.deepcopy(model)
            bits_a_weight = quantize(small)
            if bits_a_weight is None:
                continue
            bits = bits_per_byte(small, windows, len(text.encode()))
            rows.append({"model": name, "weights": method, "bits_a_weight": bits_a_weight, "bits_per_byte": bits})
            rows[-1]["added"] = bits - reference
            print(rows[-1], flush=True)
    columns = ["model", "weights", "bits a weight", "bits a byte", "against float32"]
    cells = [
        [r["model"], r["weights"], f"{r['bits_a_weight']:.2f}", f"{r['bits_per_byte']:.4f}", f"{r['added']:+.4f}"]
        for r in rows
    ]
    report = f"{header(env)}\n\n{markdown(columns, cells)}\n"
    write(options.output.with_suffix(".md"), "# Quantised weights\n\n`python benchmarks/bench_quant.py`\n\n" + report)
    write_json(options.output.with_suffix(".json"), {"environment": env, "rows": rows})
    print(report)
    print(json.dumps({"written": f"{options.output}.{{md,json}}"}))


@torch.inference_mode()
def bits_per_byte(model: nn.Module, windows: Tensor, size: int) -> float:
    """Of all predicted tokens, as if the first of every window cost their mean."""
    nats = 0.0
    for tokens in windows.split(16):
        logits = model(tokens, use_cache=False).logits[:, :-1]
        nats += F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
    return nats / windows[:, 1:].numel() * windows.numel() / size / math.log(2)


def int8(pattern: str) -> Callable[[nn.Module], float | None]:
    def apply(model: nn.Module) -> float | None:
        total = projections(model)
        quantize_(model, FqnToConfig({pattern: Int8WeightOnlyConfig()}), filter_fn=None)
        small = [p for p in model.parameters() if hasattr(p, "qdata")]
        if not small:
            return None
        count = sum(p.numel() for p in small)
        return 32 + (8 * count + 32 * sum(p.scale.numel() for p in small) - 32 * count) / total

    return apply


@torch.no_grad()
def int4(model: nn.Module) -> float:
    for name, weight in model.named_parameters():
        if name.endswith(("_proj.weight", "_proj.spline_weight")):
            groups = F.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
            scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(torch.finfo(weight.dtype).tiny)
            rounded = (groups / scale).round().clamp(-8, 7) * scale
            weight.copy_(rounded.flatten(1)[:, : weight.shape[1]])
    return 4 + 16 / GROUP  # a 16-bit scale a group


def projections(model: nn.Module) -> int:
    endings = ("_proj.weight", "_proj.spline_weight")
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith(endings))


METHODS: dict[str, Callable[[nn.Module], float | None]] = {
    "float32": lambda model: 32.0,
    "int8, splines alone": int8(SPLINES),
    "int8": int8(ALL),
    "int4, groups of 32 (simulated)": int4,
}


if __name__ == "__main__":
    main()
