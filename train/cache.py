"""Files that take long to make: made by one process, whole or absent, whatever is killed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout


def made_once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, a file or folder that `make(scratch)` writes where it does not exist yet.

    Of several processes that ask at once, one makes it and the others wait: on a lock that the system takes back from a
    process that dies, so that no barrier with a time limit is needed. What is made stands at `path`.tmp, is flushed to
    disk and renamed. What a killed process left behind is ignored, and removed when something is made beside it.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.tmp")
    with FileLock(f"{path}.lock"):
        if path.exists():
            return path
        for leftover in path.parent.glob("*.tmp"):
            if leftover != scratch:
                _remove_if_abandoned(leftover)
        _remove(scratch)
        try:
            make(scratch)
            for written in (*scratch.iterdir(), scratch) if scratch.is_dir() else (scratch,):
                _flush(written)
            scratch.rename(path)
            _flush(path.parent)
        finally:
            _remove(scratch)
    return path


def _remove_if_abandoned(scratch: Path) -> None:
    try:
        with FileLock(f"{scratch.with_suffix('')}.lock", timeout=0):
            _remove(scratch)
    except Timeout:
        pass  # its maker lives


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
