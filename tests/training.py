"""What the tests of training share: a small run's command, and what it wrote."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
SMALL |= {"num_hidden_layers": 2}


def command(workplace: Path, output: Path, model="tiny_kan_gated", **settings) -> list[str]:
    """Arguments of train.py for a model of a few thousand parameters and sequences of 32 bytes."""
    values = {"model": ROOT / f"configs/models/{model}.json", "data": workplace / "text.txt", "device": "cpu"}
    values |= {"cache_dir": workplace / "cache", "output_dir": output, "sequence_length": 32, "batch_size": 8}
    values |= {"steps": 20, "warmup_steps": 5, "learning_rate": 3e-3, "log_every": 1, "eval_every": 10}
    values |= {"save_every": 10} | {f"model.{key}": value for key, value in SMALL.items()} | settings
    return [f"--{key}={value}" for key, value in values.items()]


def launch(arguments: list[str], processes: int = 1, script: str = "train/train.py", **environment: str):
    """Start a script as a user does, with torchrun where there are several processes; one thread each."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(ranks if processes > 1 else []), str(ROOT / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | environment,
        start_new_session=True,
    )


def finish(process, code: int = 0) -> tuple[str, str]:
    """What a launched run printed, once it has ended with `code`. One that hangs says where, and all of it is ended."""
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # every process prints its stacks
        out, err = process.communicate()
    assert process.returncode == code, err[-3000:]
    return out, err


def lines(output: Path, key: str) -> dict[int, float]:
    """{step: value} of the lines of metrics.jsonl that hold a key."""
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record[key] for record in records if key in record}


def tensors(output: Path, file: str = "model/model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(output / file)


def assert_same_run(first: Path, second: Path) -> None:
    """Bit-equal losses, evaluations, weights and optimizer state."""
    for key in ("loss", "lr", "grad_norm", "tokens", "val_loss"):
        assert lines(first, key) == lines(second, key)
    last = sorted((first / "checkpoints").glob("step-*"))[-1].name
    for file in ("model/model.safetensors", f"checkpoints/{last}/optimizer.safetensors"):
        a, b = tensors(first, file), tensors(second, file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
