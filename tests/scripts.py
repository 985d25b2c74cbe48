"""Scripts in processes of their own, forked where torch and transformers are imported already.

A fresh interpreter takes six seconds to import them, which is most of a small run; a fork takes a tenth. The process
that forks has imported LIBRARIES and run nothing, so no test's patches are there: a script has its own folder first on
sys.path, not the tests', its arguments in sys.argv and its streams in files.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ["torch", "transformers.models.llama.modeling_llama", "accelerate", "datasets", "matplotlib.figure"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*LIBRARIES, "kansformer"])


def run(*arguments, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """`python PATH ARGUMENTS` or `python -m MODULE ARGUMENTS`: its exit status and what it printed."""
    arguments = [str(argument) for argument in arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("out", "err")]
        process = FORKS.Process(target=_main, args=(arguments, cwd, environment, streams), daemon=True)
        process.start()
        process.join(timeout=300)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, 300, *(stream.read_text() for stream in streams))
        return subprocess.CompletedProcess(arguments, process.exitcode, *(stream.read_text() for stream in streams))


def _main(arguments: list[str], cwd: Path, environment: dict[str, str], streams: list[Path]) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    ours = tuple(str(ROOT / name) for name in ("tests", "train", "benchmarks"))  # what tests put there
    paths = [path for path in sys.path if not path.startswith(ours)]
    sys.path[:] = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *paths]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, str(cwd))
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(cwd, arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
