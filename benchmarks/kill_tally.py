"""Kill a training run at random moments, resume it by the same command, and hold it against one that was left alone.

    python benchmarks/kill_tally.py [--kills 20] [--processes 1 2]

A share of the kills (SIGKILL) waits for a checkpoint's temporary folder and strikes a few milliseconds later; the rest
fall uniformly over the time of starting, or over that of training. With several processes every second kill
takes a single rank, the others all processes and the launcher at once, as a power cut does. After each kill the newest
whole checkpoint may lie at most `save_every` steps behind the last logged one, and never behind the one before; each
life must start from that checkpoint; in the end every loss, weight and optimizer moment must equal the other run's,
bit for bit. Anything else raises.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from harness import RESULTS, ROOT, environment, header, markdown, write, write_json
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "train"))

import checkpoint

AIMED_SHARE = 0.3  # of the kills: inside the writing of a checkpoint
TRAINING_SHARE = 0.6  # of the others: uniformly over the time after the first step; the rest over that before it
LOGGED = ("loss", "lr", "grad_norm", "val_loss")
MODEL = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--save_every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = {"kills": options.kills, "steps": options.steps, "save_every": options.save_every, "seed": options.seed}
    env = environment("cpu", **settings) | {"threads": 1}
    print(header(env), flush=True)
    with ThreadPoolExecutor() as pool:
        tallies = list(pool.map(lambda processes: tally(processes, **settings), options.processes))
    text = "\n\n".join([f"# Killed {options.kills} times, and the same in the end", header(env), *map(report, tallies)])
    write(options.output / "kill_tally.md", text + "\n")
    write_json(options.output / "kill_tally.json", {"environment": env, "tallies": tallies})


def tally(processes: int, kills: int, steps: int, save_every: int, seed: int) -> dict:
    """Rows of kills and what the two runs have in common at the end."""
    with tempfile.TemporaryDirectory() as folder:
        return _tally(Path(folder), processes, kills, steps, save_every, random.Random(seed))


def _tally(folder: Path, processes: int, kills: int, steps: int, save_every: int, rng: random.Random) -> dict:
    text = (ROOT / "train/tinyshakespeare.txt").read_text()
    (folder / "text.txt").write_text(text[:12_000])
    alone, killed = (
        Run(folder / name, command(folder, name, processes, steps, save_every)) for name in ("alone", "killed")
    )
    started = time.monotonic()
    alone.start()
    while not alone.metrics.exists():
        time.sleep(0.01)
        alone.raise_if_failed()
    startup = time.monotonic() - started
    alone.finish()
    training = time.monotonic() - started - startup

    rows: list[dict] = []
    aimed = [index < round(AIMED_SHARE * kills) for index in range(kills)]
    rng.shuffle(aimed)
    for number, aim in enumerate(aimed):
        before = rows[-1]["checkpoint"] if rows else 0
        started = time.monotonic()
        killed.start()
        if aim:
            killed.wait_for_writing()
            time.sleep(rng.uniform(0, 0.02))
        else:
            # No life takes more than its share of the steps: there must be as many lives as kills.
            share = steps * (number + 1) // (kills + 1)
            if training_already := rng.random() < TRAINING_SHARE:
                killed.wait_for_training()
            killed.wait(rng.uniform(0, 2 * training / kills if training_already else startup), share)
        single = processes > 1 and number % 2 == 1
        killed.kill(rng.randrange(processes) if single else None)
        row = {"kill": number + 1, "aimed": aim, "victim": "one rank" if single else "all"}
        rows.append(row | {"seconds": time.monotonic() - started} | killed.standing(before, save_every))
        print(json.dumps({"processes": processes} | rows[-1]), flush=True)
    killed.start()
    killed.finish()
    if killed.started_from() != rows[-1]["checkpoint"]:
        raise AssertionError(f"the last life started from {killed.started_from()}, not {rows[-1]['checkpoint']}")
    if found := differences(alone.output, killed.output):
        raise AssertionError(f"the killed run differs from the other: {'; '.join(found)}")
    last = checkpoint.newest(alone.output / "checkpoints")
    same = {
        "steps": len(read_metrics(alone.output)["loss"]),
        "evaluations": len(read_metrics(alone.output)["val_loss"]),
        "weights": len(load_file(last / "model.safetensors")),
        "moments": len(load_file(last / "optimizer.safetensors")),
    }
    return {"processes": processes, "rows": rows, "equal": same}


def command(folder: Path, name: str, processes: int, steps: int, save_every: int) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    values = {"model": ROOT / "configs/models/tiny_kan_gated.json", "data": folder / "text.txt", "device": "cpu"}
    values |= {"cache_dir": folder / f"cache-{name}", "output_dir": folder / name, "processes": processes}
    values |= {"sequence_length": 32, "batch_size": 4, "steps": steps, "warmup_steps": 20, "learning_rate": 3e-3}
    values |= {"log_every": 1, "eval_every": 100, "save_every": save_every, "model.num_hidden_layers": 2}
    values |= {f"model.{key}": value for key, value in MODEL.items()}
    script = [str(ROOT / "train/train.py"), *(f"--{key}={value}" for key, value in values.items())]
    return [sys.executable, *(launch if processes > 1 else []), *script]


class Run:
    """A training run that is started again and again by one command."""

    def __init__(self, output: Path, command: list[str]):
        self.output, self.command = output, command
        self.metrics, self.log = output / "metrics.jsonl", output.with_suffix(".log")

    def start(self) -> None:
        self.leftovers = self.scratch()  # of the last kill, until the next checkpoint is written
        with open(self.log, "w") as log:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=env)

    def raise_if_failed(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"the run ended by itself ({self.process.returncode}):\n{self.log.read_text()[-3000:]}")

    def finish(self) -> None:
        if self.process.wait() != 0:
            self.raise_if_failed()

    def scratch(self) -> set[tuple[str, int]]:
        """Folders of checkpoints that are being written or deleted: names and times of change."""
        with suppress(FileNotFoundError):  # renamed while looked at
            return {(p.name, p.stat().st_ctime_ns) for p in (self.output / "checkpoints").glob(".step-*.tmp")}
        return set()

    def wait_for_training(self) -> None:
        while (start := self.started_from()) is None or max(read_metrics(self.output)["loss"], default=0) <= start:
            self.raise_if_failed()
            time.sleep(0.005)

    def wait(self, seconds: float, step: int) -> None:
        """Until the time is over or a step is logged."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and max(read_metrics(self.output)["loss"], default=0) < step:
            time.sleep(0.02 * random.random())

    def wait_for_writing(self) -> None:
        while not self.scratch() - self.leftovers:
            self.raise_if_failed()
            time.sleep(0.0005)

    def kill(self, rank: int | None) -> None:
        """SIGKILL everything at once, launcher first, or one rank, upon which the launcher ends the others."""
        self.raise_if_failed()
        launcher = psutil.Process(self.process.pid)
        family = [launcher, *launcher.children(recursive=True)]
        ranks = [p for p in family[1:] if "train.py" in " ".join(p.cmdline())]
        for victim in family if rank is None or rank >= len(ranks) else [ranks[rank]]:
            victim.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=60)
        self.process.wait(timeout=60)

    def started_from(self) -> int | None:
        """The step at which this life began, once it has said so."""
        found = re.search(r"^from step (\d+) to", self.log.read_text(), re.MULTILINE)
        return int(found[1]) if found else None

    def standing(self, before: int, save_every: int) -> dict:
        """What a kill left, checked: the last logged step, the newest whole checkpoint, the phase."""
        scratch = [name for name, _ in self.scratch() - self.leftovers]
        whole = checkpoint.newest(self.output / "checkpoints", say=lambda _: None)
        step = checkpoint.read_state(whole)["step"] if whole else 0
        start = self.started_from()
        logged = max(read_metrics(self.output)["loss"], default=0)
        phase = "starting" if start is None else "training"
        if start is not None and scratch:  # what stands below the newest is on its way out
            phase = f"{'writing' if scratch[-1] > f'.step-{step:08d}.tmp' else 'deleting'} a checkpoint"
        if start not in (None, before):
            raise AssertionError(f"started from step {start} with a whole checkpoint of step {before}")
        if step < before or logged - step > save_every:
            raise AssertionError(f"logged to step {logged}, newest whole checkpoint {step}, {before} before the kill")
        return {"phase": phase, "from": start, "logged": logged, "checkpoint": step, "lost": logged - step}


def read_metrics(output: Path) -> dict[str, dict[int, float]]:
    """{name: {step: value}} of what is logged; a line cut short by a kill is no line."""
    found: dict[str, dict[int, float]] = {name: {} for name in LOGGED}
    path = output / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        for name in record.keys() & found.keys():
            found[name][record["step"]] = record[name]
    return found


def differences(first: Path, second: Path) -> list[str]:
    """Where two finished runs differ in anything logged, in a weight or in a moment, by a single bit."""
    a, b = read_metrics(first), read_metrics(second)
    found = [f"{name} is logged differently" for name in LOGGED if a[name] != b[name] or not a[name]]
    last = [checkpoint.newest(output / "checkpoints") for output in (first, second)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(folder / name) for folder in last)
        if a.keys() != b.keys():
            found.append(f"{name} holds other tensors")
        found += [f"{key} of {name}" for key in a.keys() & b.keys() if not torch.equal(a[key], b[key])]
    return found


def report(tally: dict) -> str:
    rows = [
        (r["kill"], r["victim"], r["phase"], f"{r['seconds']:.1f}", r["logged"], r["checkpoint"], r["lost"])
        for r in tally["rows"]
    ]
    columns = ("kill", "killed", "while", "seconds after launch", "last step", "newest checkpoint", "steps lost")
    phases = [row["phase"] for row in tally["rows"]]
    counted = ", ".join(f"{phases.count(phase)} while {phase}" for phase in sorted(set(phases)))
    equal = ", ".join(f"{count} {name}" for name, count in tally["equal"].items())
    text = (
        f"## {tally['processes']} process(es)\n\n{len(rows)} kills: {counted}. At most "
        f"{max(row['lost'] for row in tally['rows'])} steps lost, no hand needed. "
        f"Bit-equal to the run left alone: {equal}."
    )
    text = f"{text}\n\n{markdown(columns, rows)}"
    print(text, flush=True)
    return text


if __name__ == "__main__":
    main()
