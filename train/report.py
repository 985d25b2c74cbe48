"""What a run says about itself: metrics.jsonl, memory and speed figures, the model card."""

import dataclasses
import json
import resource
import sys
from pathlib import Path

import torch
import transformers
import yaml
from settings import Settings

# Dense bf16 FLOP/s from the vendors' data sheets, for model FLOPs utilisation.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def trim_metrics(path: Path, step: int) -> None:
    """Drop what a killed run logged after the checkpoint (and a half-written last line)."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(kept))
    scratch.replace(path)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def utilisation(flops_per_token: int | None, tokens_per_second: float, world: int) -> dict:
    """Model FLOP/s over all devices, and their share of the peak where the device is known."""
    if flops_per_token is None:
        return {}
    rate = {"model_flops_per_second": flops_per_token * tokens_per_second}
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
        if peak:
            rate["mfu"] = rate["model_flops_per_second"] / peak / world
    return rate


def model_card(settings: Settings, results: dict, config) -> str:
    figures = "\n".join(
        f"| {key} | {value:,.4f} |" if isinstance(value, float) else f"| {key} | {value:,} |"
        for key, value in results.items()
        if value is not None
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [kansformer, kan]
---
# {Path(settings.output_dir).name}

A `{config.model_type}` language model (feed-forward: `{getattr(config, "ffn_type", "of the architecture")}`), trained
by `train/train.py` on `{settings.data}`, tokenizer `{settings.tokenizer}`.

| figure | value |
|---|---|
{figures}

`val_loss` is in nats per token, `val_bits_per_byte` in bits per UTF-8 byte of the held-out text ({settings.val_split},
{settings.val_fraction:.0%}); every token of it counts once.

```python
import kansformer
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

Settings:

```yaml
{yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False).strip()}
```

Made with torch {torch.__version__}, transformers {transformers.__version__}.
"""
