"""Checkpoints that are whole or absent, and that no unpickling reads.

A checkpoint is a folder `step-00000500`: model and tokenizer as `save_pretrained` writes them (so it loads with
`from_pretrained`), `optimizer.safetensors`, and `state.json` with the step, what run it belongs to, and the size and
SHA-256 of every other file. It is written beside its place, flushed to the disk and renamed. Tensors are stored whole
under parameter names, so that a checkpoint does not know how many processes wrote it. Learning rate, data order and
random numbers are functions of (seed, step): they need no state.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

STATE = "state.json"


def save_model(accelerator, model: nn.Module, tokenizer, folder: Path) -> None:
    """Write an unwrapped model and its tokenizer for `from_pretrained`. Called on every process, the main one writes.

    Unwrapped of torch.compile too, whose names (`_orig_mod...`) `from_pretrained` would take for another model's.
    """
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        model.save_pretrained(folder, state_dict=state, is_main_process=True)
        tokenizer.save_pretrained(folder)


def save(accelerator, model, optimizer, tokenizer, root: Path, step: int, identity: dict, keep: int) -> Path:
    """Write the checkpoint of `step` under `root` and delete all but the newest `keep`."""
    folder = root / f"step-{step:08d}"
    scratch = root / f".{folder.name}.tmp"
    tensors = _optimizer_tensors(model, optimizer)
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    save_model(accelerator, model, tokenizer, scratch)
    if accelerator.is_main_process:
        save_file(tensors, scratch / "optimizer.safetensors")
        paths = sorted(p for p in scratch.rglob("*") if p.is_file())
        files = {p.relative_to(scratch).as_posix(): _flushed_digest(p) for p in paths}
        (scratch / STATE).write_text(json.dumps({"step": step, "identity": identity, "files": files}, indent=1))
        _flushed_digest(scratch / STATE)
        shutil.rmtree(folder, ignore_errors=True)  # only a broken one can stand here: see `newest`
        scratch.rename(folder)
        _sync_folder(root)
        for old in sorted(root.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def newest(root: Path, say=print) -> Path | None:
    """The newest whole checkpoint under `root`, or None; what is skipped is said with the reason."""
    for folder in sorted(root.glob("step-*"), reverse=True):
        if (fault := _fault(folder)) is None:
            return folder
        say(f"checkpoint {folder} is skipped: {fault}")
    return None


def read_state(folder: Path) -> dict:
    return json.loads((folder / STATE).read_text())


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer's state of every parameter of an (unwrapped, prepared) model."""
    tensors = load_file(folder / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        state = {}
        for key in [key for key in tensors if key.rpartition("/")[0] == name]:
            value = tensors.pop(key).to(parameter.device)
            if isinstance(parameter, DTensor) and value.dim() > 0:
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            state[key.rpartition("/")[2]] = value
        if state:
            optimizer.state[parameter] = state
    if tensors:
        raise ValueError(f"{folder} holds optimizer state of unknown parameters: {sorted(tensors)[:3]} ...")


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    whole = lambda t: t.full_tensor() if isinstance(t, DTensor) else t  # noqa: E731
    return {
        f"{name}/{key}": whole(value).cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _fault(folder: Path) -> str | None:
    try:
        files = read_state(folder)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{STATE} cannot be read ({type(error).__name__})"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _digest(path) != digest:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flushed_digest(path: Path) -> tuple[int, str]:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
    return path.stat().st_size, _digest(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
