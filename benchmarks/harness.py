"""What every benchmark shares: where it ran, side-by-side timing, and whole files of results.

These machines are shared and noisy, so variants take turns within a round and a ratio is the median over rounds of the
ratio within a round: a slow minute slows both sides of it.
"""

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What of the tests runs on a GPU; kernels compiled ahead of time need none
GPU_TESTS = ["-m", "pytest", "-q", "-m", "gpu and not exhaustive", "-k", "not compiles", "-W", "default"]
GPU_TESTS += ["tests/test_kernels.py", "tests/test_models.py"]


def environment(device: str, **settings: object) -> dict:
    """Commit, dirty flag, device, versions and settings: the header beside every figure."""

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:  # no git
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    code = ("kansformer", "benchmarks", "train", ":(exclude)*.md", ":(exclude)benchmarks/results")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return {
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": "unknown" if changed is None else bool(changed),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    } | settings


def header(env: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in env.items())


def side_by_side(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    before: Callable[[], object] | None = None,
    launches: bool = True,
) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round; the variants take turns, after one round that does not count.

    `before` runs, untimed, ahead of every call. Without `launches` a GPU's time is its own: the launches queue behind a
    wait of some milliseconds, as they do behind the rest of a model's work. With them, it is the processor's too.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 1):
        for name, run in variants.items():
            if before is not None:
                before()
            milliseconds = _time(run, device, launches)
            if i > 0:
                times[name].append(milliseconds)
    return times


def quantile(values: Sequence[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": quantile(values, 0.5), "q20": quantile(values, 0.2), "q80": quantile(values, 0.8)}


def ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """The median over rounds of values / reference."""
    return quantile([v / r for v, r in zip(values, reference)], 0.5)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table, the first column left-aligned, the others right-aligned, readable as text too."""
    cells = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def write(path: Path, text: str) -> None:
    """Write a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    os.replace(part, path)


def write_json(path: Path, result: dict) -> None:
    write(path, json.dumps(result, indent=1) + "\n")


def write_figure(path: Path, figure: "Figure", env: dict) -> None:
    """Save a matplotlib figure, titled with where its numbers come from."""
    figure.suptitle(f"{env['device']}, {env['dtype']}, torch {env['torch']}, {env['date']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=150)
    os.replace(part, path)


def _time(run: Callable[[], object], device: str, launches: bool) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if not launches:
            torch.cuda._sleep(10**7)  # cycles, about 5 ms
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name")) + " CPU"
    except (OSError, StopIteration):
        return platform.processor() or "CPU"
