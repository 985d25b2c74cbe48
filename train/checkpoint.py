"""Checkpoints that are whole or absent, and that no unpickling reads.

A checkpoint is a folder `step-00000500`: model, grids, configuration and tokenizer as `save_pretrained` writes them (so
it loads with `from_pretrained`), `optimizer.safetensors`, and `state.json` with the step, what run it belongs to, the
size and SHA-256 of every other file and of itself. It is written beside its place, flushed to the disk and renamed.
Tensors are stored whole under parameter names, so that a checkpoint does not know how many processes wrote it.
Learning rate and data order are functions of (seed, step), random numbers of (seed, step, rank): they need no state.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Collection
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

STATE = "state.json"
BEST = "best.json"


def save_model(accelerator, model: nn.Module, tokenizer, folder: Path) -> None:
    """Write an unwrapped model and its tokenizer for `from_pretrained`. Called on every process, the main one writes.

    Unwrapped of torch.compile too, whose names (`_orig_mod...`) `from_pretrained` would take for another model's.
    """
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        _write_model(model, weights, tokenizer, folder)


def save(
    accelerator,
    model,
    optimizer,
    tokenizer,
    root: Path,
    step: int,
    identity: dict,
    keep: int,
    best: dict | None = None,
) -> Path:
    """Write the checkpoint of `step` under `root`, then delete the older ones but the newest `keep - 1` and the best.

    Called on every process, the main one writes. `best` holds the step and figures of the best evaluation so far; its
    checkpoint is kept, and `best.json` beside the checkpoints says which it is.

    Raises:
        OSError: on every process, if it cannot be written, with the bytes needed and free. The checkpoints that stand
            are left as they are, and nothing unfinished stays.
    """
    weights = accelerator.get_state_dict(model)
    moments = _optimizer_tensors(model, optimizer, accelerator.is_main_process)
    folder, fault = root / _name(step), None
    if accelerator.is_main_process:
        try:
            _write(folder, model, weights, moments, tokenizer, {"step": step, "identity": identity, "best": best})
            if best is not None:
                replace_text(root / BEST, json.dumps({"checkpoint": _name(best["step"]), **best}, indent=1))
            # Newer ones can stand there, broken: `newest` skipped them. They do not count, and are replaced in time.
            older = [path for path in sorted(root.glob("step-*")) if path.name < folder.name]
            for path in older[: max(0, len(older) - (keep - 1))]:
                if best is None or path.name != _name(best["step"]):
                    _discard(path)
        except (OSError, SafetensorError) as error:
            needed = sum({t.data_ptr(): t.nbytes for t in [*weights.values(), *moments.values()]}.values())
            last = [path.name for path in sorted(root.glob("step-*")) if path != folder][-1:]
            fault = (
                f"the checkpoint of step {step} cannot be written to {root} ({error}): it needs about {needed:,} bytes "
                f"and {_free_bytes(root):,} are free; make room and give the same command again, it goes on from "
                f"{last[0] if last else 'nothing: no checkpoint was written yet'}"
            )
    [fault] = broadcast_object_list([fault])
    if fault:
        raise OSError(fault)
    return folder


def copy_model(accelerator, root: Path, step: int, folder: Path) -> None:
    """Write the model and tokenizer of a checkpoint for `from_pretrained`. The main process writes."""
    source = root / _name(step)
    if accelerator.is_main_process:
        if fault := _fault(source):
            raise ValueError(f"the best checkpoint {source} is damaged: {fault}; --final_model last saves the last one")
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(STATE, "optimizer.*"))
    accelerator.wait_for_everyone()


def replace(folder: Path, finished: Path) -> None:
    """Put a finished folder, written beside, in the place of `folder`: the one or the other is there, or neither."""
    if folder.exists():
        _discard(folder)
    finished.rename(folder)


def replace_text(path: Path, text: str) -> None:
    """Write a whole file or leave the one that is there."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text)
    _sync(scratch)
    scratch.replace(path)


def best(root: Path) -> Path | None:
    """The checkpoint of the lowest validation loss under `root`, or None."""
    pointer = root / BEST
    return root / json.loads(pointer.read_text())["checkpoint"] if pointer.is_file() else None


def resume_from(accelerator, root: Path) -> Path | None:
    """`newest` as the main process finds it, on every process.

    Raises:
        ValueError: as `newest` does, or if a process does not see what the main one found.
    """
    found, fault = None, None
    if accelerator.is_main_process:
        try:
            found = newest(root)
        except ValueError as error:
            fault = str(error)
    found, fault = broadcast_object_list([found, fault])
    if fault:
        raise ValueError(fault)
    if found is not None and not (found / STATE).is_file():
        raise ValueError(
            f"{found} is not to be seen from {platform.node()}: output_dir must lie on a disk that all machines share"
        )
    return found


def newest(root: Path, say=print) -> Path | None:
    """The newest whole checkpoint under `root`, or None where none was ever finished; what is skipped is said.

    Raises:
        ValueError: if there are checkpoints and none is whole: to start anew would throw the run away unasked.
    """
    for scratch in sorted(root.glob(".step-*.tmp")):
        say(f"checkpoint {scratch} is skipped: the run ended while it was written or deleted")
    broken = {}
    for folder in sorted(root.glob("step-*"), reverse=True):
        fault = _fault(folder)
        if fault is None:
            return folder
        broken[folder.name] = fault
        say(f"checkpoint {folder} is skipped: {fault}")
    if broken:
        reasons = "; ".join(f"{name}: {fault}" for name, fault in broken.items())
        raise ValueError(
            f"no checkpoint in {root} is whole ({reasons}): mend one or bring back a copy; "
            "to start from nothing delete them, or choose another output_dir"
        )
    return None


def read_state(folder: Path) -> dict:
    return json.loads((folder / STATE).read_text())


def load_optimizer(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, forget: Collection[str] = ()
) -> None:
    """Restore the optimizer's state of every parameter of an (unwrapped, prepared) model but those to `forget`."""
    tensors = load_file(folder / "optimizer.safetensors")
    tensors = {key: tensor for key, tensor in tensors.items() if key.rpartition("/")[0] not in forget}
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


@contextmanager
def sole_use(folder: Path):
    """Keep other runs out of `folder`; the lock is the kernel's, and ends with its process however that ends.

    Raises:
        ValueError: if another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # file systems without locks
                stream.seek(0)
                raise ValueError(
                    f"{folder} is in use by process {stream.read()}: stop that run or choose another output_dir"
                ) from None
        stream.truncate(0)
        stream.write(f"{os.getpid()} on {platform.node()}")
        stream.flush()
        yield


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _write_model(model: nn.Module, weights: dict[str, torch.Tensor], tokenizer, folder: Path) -> None:
    # Gathered shards of tied weights no longer share their memory, by which save_pretrained would know them.
    weights = {name: weight for name, weight in weights.items() if name not in model.all_tied_weights_keys}
    model.save_pretrained(folder, state_dict=weights, is_main_process=True)
    tokenizer.save_pretrained(folder)


def _write(folder: Path, model, weights, moments, tokenizer, state: dict) -> None:
    """The whole folder or nothing: every file and folder reaches the disk before the name does."""
    root = folder.parent
    for stale in root.glob(".step-*.tmp"):
        shutil.rmtree(stale)
    scratch = root / f".{folder.name}.tmp"
    scratch.mkdir(parents=True)
    try:
        _write_model(model, weights, tokenizer, scratch)
        save_file(moments, scratch / "optimizer.safetensors")
        paths = sorted(path for path in scratch.rglob("*") if path.is_file())
        state |= {"files": {p.relative_to(scratch).as_posix(): (p.stat().st_size, _digest(p)) for p in paths}}
        (scratch / STATE).write_text(json.dumps(state | {"sha256": _seal(state)}, indent=1))
        for path in [*scratch.rglob("*"), scratch]:
            _sync(path)
        if folder.exists():  # only a broken one can stand here: see `newest`
            shutil.rmtree(folder)
        scratch.rename(folder)
        _sync(root)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _discard(folder: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves no broken one."""
    scratch = folder.with_name(f".{folder.name}.tmp")
    folder.rename(scratch)
    shutil.rmtree(scratch)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, torch.Tensor]:
    """{parameter/key: whole tensor} where they are kept; every process must call, to gather what is sharded."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if keep:
                tensors[f"{name}/{key}"] = value.cpu().contiguous()
    return tensors


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        state = read_state(folder)
        if state.pop("sha256") != _seal(state):
            return f"{STATE} is not what was written (its SHA-256 differs)"
        if folder.name != _name(state["step"]):
            return f"it is of step {state['step']}"
        for name, (size, digest) in state["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _digest(path) != digest:
                return f"{name} is not what was written (its SHA-256 differs)"
    except OSError as error:
        return f"{Path(error.filename or STATE).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE} cannot be read ({type(error).__name__}: {error})"
    return None


def _seal(state: dict) -> str:
    """SHA-256 of what else `state.json` says."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(folder: Path) -> int:
    folder = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    return shutil.disk_usage(folder).free
