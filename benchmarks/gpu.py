"""Everything that needs a GPU, in one call: correctness, kernels, blocks, decoding, models. Continues past a failure.

    python benchmarks/gpu.py --output FOLDER --seconds 580 --archive gpu.tar.gz        # --only for a part of it

Each step has its own limit in seconds, or what is left of all seconds; its output in FOLDER/STEP.log, its tables in
FOLDER. The archive holds FOLDER, and is written anew after every step: what was done is there whatever happens next.
Blocks (a process a width), models and kernels are compiled beside the tests: that is most of the time, and the timed
steps find them in the compilers' caches. The package need not be installed. The summary, last, is one JSON line: step,
exit status (124: over its limit) and seconds. On 16 cores and an H200 all but decoding takes some seven minutes.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import GPU_TESTS, ROOT, write_json

BLOCKS = ["benchmarks/bench_ffn.py", "--device", "cuda", "--no_tests"]
KERNELS = ["benchmarks/bench_kernels.py", "--rounds"]
MODELS = ["benchmarks/bench_models.py", "--device", "cuda", "--models", "125m", "--compiled", "--growth"]
MODELS += ["--batch_size", "16", "--sequence_length", "1024"]
AHEAD = [[*BLOCKS, "--rounds", "1", "--hidden_size", d] for d in ("768", "1024", "2048", "4096")]
AHEAD += [[*MODELS, "--rounds", "1"], [*KERNELS, "1"]]
# name: (seconds, arguments)
STEPS = {
    "tests": (200, [*GPU_TESTS, "--numprocesses", "8"]),
    "blocks": (200, [*BLOCKS, "--rounds", "9", "--profile"]),
    "models": (200, MODELS),
    "kernels": (125, [*KERNELS, "9"]),
    "decode": (250, ["benchmarks/bench_decode.py", "--device", "cuda", "--models", "125m"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800, help="for all steps")
    parser.add_argument("--archive", type=Path, help="a .tar.gz of the output, for a machine that is soon gone")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--print", action="store_true", help="the commands, and run nothing")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    options.output.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    done = []
    ahead = compile_ahead(env) if "blocks" in options.only and not options.print else []
    for name in options.only:
        limit, arguments = STEPS[name]
        if name != "tests":
            arguments = [*arguments, "--output", str(options.output.resolve())]
        if options.print:
            print(shlex.join(["python", *arguments]))
            continue
        if name != "tests":
            finish(ahead, end)
        start = time.monotonic()
        limit = max(1.0, min(limit, end - start))
        with open(options.output / f"{name}.log", "w") as log:
            try:
                command = [sys.executable, *arguments]
                run = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=limit)
                code = run.returncode
            except subprocess.TimeoutExpired:
                code = 124
        done.append({"step": name, "exit": code, "seconds": round(time.monotonic() - start, 1)})
        print(done[-1], flush=True)
        if code:
            print("\n".join((options.output / f"{name}.log").read_text().splitlines()[-15:]), flush=True)
        write_json(options.output / "gpu.json", {"steps": done})
        if options.archive:
            pack(options.output, options.archive)
    if done:
        print(json.dumps({"steps": done}))


def compile_ahead(env: dict[str, str]) -> list[subprocess.Popen]:
    nowhere = tempfile.gettempdir()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [
        subprocess.Popen([sys.executable, *arguments, "--output", f"{nowhere}/ahead_{at}"], cwd=ROOT, env=env, **quiet)
        for at, arguments in enumerate(AHEAD)
    ]


def finish(processes: list[subprocess.Popen], end: float) -> None:
    """Nothing else runs beside a timed step."""
    end = min(end, time.monotonic() + 120.0)
    while processes:
        process = processes.pop()
        try:
            process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def pack(folder: Path, archive: Path) -> None:
    with tempfile.TemporaryDirectory(dir=archive.resolve().parent) as beside:
        made = shutil.make_archive(f"{beside}/gpu", "gztar", folder)
        os.replace(made, archive)


if __name__ == "__main__":
    main()
