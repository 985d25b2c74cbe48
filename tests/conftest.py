import os
import subprocess
import sys

import pytest
import scripts
import torch

# Kernels run in triton's interpreter where there is no GPU; it must be asked for before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Deterministic products of cuBLAS, which poison_empty asks for, need it; it is read at the first one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Hugging Face libraries must not look for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def forked(monkeypatch):
    """Python scripts that a script starts by subprocess.run are forked, see `scripts`."""
    run = subprocess.run

    def fork(command, check=False, **options):
        if command[0] != sys.executable:
            return run(command, check=check, **options)
        done = scripts.run(*command[1:])
        if check:
            done.check_returncode()
        return done

    monkeypatch.setattr(subprocess, "run", fork)


@pytest.fixture
def poison_empty():
    """Fill uninitialised memory with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
