"""What a run measures: metrics.jsonl, trackers, memory and speed."""

import datetime
import json
import math
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import accelerate
import torch
import transformers
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

import kansformer

# Dense bf16 FLOP/s from the vendors' data sheets, for model FLOPs utilisation; the first name that matches counts.
PEAK_FLOPS = {
    **{"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12},
    **{"RTX 5090": 209.5e12, "RTX 4090": 165e12},
}


class Metrics:
    """A line of JSON for each event of a run, and the same numbers to a tracker. The main process writes.

        {"step": 10, "loss": ...}   {"step": 10, "val_loss": ...}   {"step": 0, "event": "start", ...}

    Lines without `event` hold the figures of a logged step or of an evaluation; events are start, grid_update and
    warning. What a killed run logged after the checkpoint from which it goes on is dropped, but for its starts.
    """

    def __init__(self, path: Path, accelerator, start: int):
        self.path, self.accelerator = path, accelerator
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read(path) if line["step"] <= start or line.get("event") == "start"]
            scratch = path.with_suffix(".tmp")
            scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
            scratch.replace(path)

    def log(self, step: int, **values) -> None:
        if self.accelerator.is_main_process:
            with open(self.path, "a") as stream:
                stream.write(json.dumps({"step": step, **values}) + "\n")
        if "event" not in values:
            self.accelerator.log(values, step=step)


def read(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl that are whole: a kill can cut the last one short."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def check_tracker(name: str | None) -> None:
    """Refuse a tracker that accelerate does not know or that is not installed: it would leave it out without a word."""
    if name is None:
        return
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    if name not in known:
        raise ValueError(f"tracker = {name!r} must be null or one that accelerate knows: {', '.join(known)}")
    if name not in map(str, get_available_trackers()):
        raise ImportError(f"tracker {name} needs its package: pip install {name}, or run without a tracker")


def start_tracker(accelerator, name: str | None, run_name: str, settings: dict, start: int) -> None:
    """Begin to track, with the settings as hyperparameters; on resume TensorBoard drops what came after `start`."""
    if name is None:
        return
    flat = {
        key: value if isinstance(value, (int, float, str)) else json.dumps(value) for key, value in settings.items()
    }
    options = {"tensorboard": {"purge_step": start + 1}} if name == "tensorboard" else {}
    accelerator.init_trackers(run_name, config=flat, init_kwargs=options)


def provenance(accelerator) -> dict:
    """Where a run starts: processes, device, versions, and the commit if this is a checkout."""
    git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    device = (
        torch.cuda.get_device_name() if accelerator.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "world_size": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "device": device,
        "precision": accelerator.mixed_precision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "kansformer": kansformer.__version__,
        "commit": commit or None,
    }


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Cross entropy summed over a text, in bits per UTF-8 byte of it: comparable between tokenizers."""
    return nats / math.log(2) / num_bytes


def on_host(values: torch.Tensor) -> Callable[[], list[float]]:
    """Start to copy `values` to the host; what is returned waits for that copy, not for what the device does next."""
    if values.device.type != "cuda":
        return values.tolist
    copied, copy = torch.cuda.Event(), values.to("cpu", non_blocking=True)
    copied.record()

    def fetch() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return fetch


def memory(device: torch.device, activation_bytes: int | None) -> dict:
    """The peak, and the activations' share of it where it is known.

    On a GPU the peak is the allocator's, and what lies above the weights and moments that stay between steps is
    activations, with the gradients that replace them. On a CPU the peak is the process's resident set, and the
    activations are what a forward pass was seen to keep (`saved_bytes`).
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        return {"peak_memory_bytes": peak, "activation_memory_bytes": peak - torch.cuda.memory_allocated(device)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    figures = {"peak_memory_bytes": peak}
    return figures if activation_bytes is None else figures | {"activation_memory_bytes": activation_bytes}


@contextmanager
def saved_bytes(model: torch.nn.Module):
    """A list that gets the bytes that a forward pass keeps for its backward pass: each storage once, no parameters."""
    kept: dict[int, int] = {}
    total: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    for own in (*model.parameters(), *model.buffers()):
        kept.pop(own.untyped_storage().data_ptr(), None)
    total.append(sum(kept.values()))


def utilisation(flops_per_token: int | None, tokens_per_second: float, world: int) -> dict:
    """Model FLOP/s over all devices, and their share of the peak in bf16 where the device is known."""
    if flops_per_token is None:
        return {}
    rate = {"model_flops_per_second": flops_per_token * tokens_per_second}
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
        if peak:
            rate["mfu"] = rate["model_flops_per_second"] / peak / world
    return rate
