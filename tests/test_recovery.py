"""Nothing lost when something breaks: kills, signals, damaged checkpoints, and other numbers of processes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoint
import pytest
import torch
from accelerate.state import AcceleratorState
from settings import Settings
from training import ROOT, assert_same_run, command, lines

import train


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a short text and, soon, its token files."""
    folder = tmp_path_factory.mktemp("train")
    text = (ROOT / "train/tinyshakespeare.txt").read_text()
    (folder / "text.txt").write_text(text[:12_000])
    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def straight(workplace):
    """A run of 60 steps that nothing disturbed, with every checkpoint kept."""
    output = workplace / "straight"
    results = train.main(command(workplace, output, steps=60, keep_checkpoints=9))
    AcceleratorState._reset_state(reset_partial_state=True)
    return output, results


def test_resume_is_exact(workplace, straight, tmp_path):
    """What a kill after step 30 leaves, resumed: bit-equal to the run that was not killed."""
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(straight[0] / "checkpoints/step-00000030", tmp_path / "checkpoints/step-00000030")
    first = (straight[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(first[:40]) + '{"step": 38, "lo')  # lines past 30, one cut short
    train.main(command(workplace, tmp_path, steps=60, keep_checkpoints=9))
    assert_same_run(straight[0], tmp_path)


def test_kill_and_resume(workplace, straight, tmp_path):
    script = [sys.executable, str(ROOT / "train/train.py")]
    arguments = command(workplace, tmp_path, steps=60, keep_checkpoints=9)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums are split by threads: the same number
    process = subprocess.Popen([*script, *arguments], stderr=subprocess.DEVNULL, env=os.environ | threads)
    while not (tmp_path / "checkpoints/step-00000010").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train.main(arguments)
    assert_same_run(straight[0], tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_its_own_code(workplace, straight, tmp_path, monkeypatch, number):
    rate = train.learning_rate

    def interrupt(settings, step):
        if step == 33:
            signal.raise_signal(number)
        return rate(settings, step)

    arguments = command(workplace, tmp_path, steps=60, keep_checkpoints=9)
    handler = signal.getsignal(number)
    monkeypatch.setattr(train, "learning_rate", interrupt)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == train.EXIT_STOPPED == 75
    assert signal.getsignal(number) == handler
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-00000034"
    monkeypatch.undo()
    train.main(arguments)
    assert_same_run(straight[0], tmp_path)


def test_time_limit_saves_and_stops(workplace, tmp_path):
    with pytest.raises(SystemExit):
        train.main(command(workplace, tmp_path, max_minutes=1e-9))
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-00000001"


def damage(file: str, how: str):
    def apply(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        if how == "missing":
            (folder / file).unlink()
            return
        if how == "truncated":
            data = data[: len(data) // 2]
        if how == "flipped":
            data[len(data) // 2] ^= 1
        (folder / file).write_bytes(data)

    return apply


@pytest.mark.parametrize(
    ("file", "how", "reason"),
    [
        ("model.safetensors", "truncated", "bytes instead of"),
        ("optimizer.safetensors", "flipped", "SHA-256"),
        ("config.json", "missing", "config.json is missing"),
        ("tokenizer.json", "flipped", "SHA-256"),
        ("state.json", "truncated", "state.json cannot be read"),
        ("state.json", "missing", "state.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_the_reason(straight, tmp_path, file, how, reason):
    for name in ("step-00000010", "step-00000020"):
        shutil.copytree(straight[0] / "checkpoints" / name, tmp_path / name)
    (tmp_path / ".step-00000030.tmp").mkdir()  # what a kill while writing leaves
    damage(file, how)(tmp_path / "step-00000020")
    said = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step-00000010"
    assert len(said) == 1
    assert "step-00000020 is skipped" in said[0]
    assert reason in said[0]


def test_old_checkpoints_are_deleted_and_a_finished_run_is_not_repeated(workplace, tmp_path):
    arguments = command(workplace, tmp_path, save_every=5, keep_checkpoints=2)
    results = train.main(arguments)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000015", "step-00000020"]
    metrics = (tmp_path / "metrics.jsonl").read_text()
    again = train.main(arguments)
    assert again["val_loss"] == results["val_loss"]
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: 0.003 -> 0.001"),
        ({"model.grid_size": 4}, "model.grid_size: 3 -> 4"),
        ({"resume": "none"}, "resume is none"),
        ({}, "tokens: '.*' -> "),
    ],
)
def test_another_runs_folder_is_refused(workplace, tmp_path, settings, message):
    text = tmp_path / "text.txt"
    shutil.copy(workplace / "text.txt", text)
    arguments = {"steps": 6, "data": text}
    train.main(command(workplace, tmp_path / "run", **arguments))
    if not settings:
        text.write_text(text.read_text().replace("the", "that"))
    with pytest.raises(ValueError, match=message):
        train.main(command(workplace, tmp_path / "run", **arguments | settings))


# Processes


def test_fewer_processes_than_asked_is_an_error(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    train.check_world(Settings(), 1)
    with pytest.raises(ValueError, match="2 processes were asked for and 1 started"):
        train.check_world(Settings(processes=2), 1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # as accelerate launch --cpu --num_processes 2 leaves it
    with pytest.raises(ValueError, match=r"several processes were asked for and 1 started.*torchrun"):
        train.check_world(Settings(), 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were asked for and 1 started"):
        train.check_world(Settings(), 1)


def test_two_processes_equal_one(workplace, tmp_path):
    """2 processes x 2 accumulated = 1 process x 4 accumulated; a checkpoint of two resumes in two and in one."""
    one, two = tmp_path / "one", tmp_path / "two"
    train.main(command(workplace, one, micro_batch_size=2))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    arguments = command(workplace, two, micro_batch_size=2, processes=2, keep_checkpoints=9)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launch, str(ROOT / "train/train.py"), *arguments], capture_output=True, env=environment)
    assert run.returncode == 0, run.stderr.decode()[-3000:]
    assert "2 process(es) (MULTI_CPU)" in run.stdout.decode()
    for key in ("loss", "val_loss", "grad_norm"):
        assert lines(two, key) == pytest.approx(lines(one, key), abs=1e-5)
    assert lines(two, "tokens") == lines(one, "tokens")

    again = tmp_path / "again"
    shutil.copytree(two / "checkpoints/step-00000010", again / "checkpoints/step-00000010")
    shutil.copy(two / "metrics.jsonl", again)
    subprocess.run(
        [*launch, str(ROOT / "train/train.py"), *arguments, f"--output_dir={again}"],
        capture_output=True,
        env=environment,
        check=True,
    )
    assert_same_run(two, again)

    resumed = tmp_path / "resumed"
    shutil.copytree(two / "checkpoints/step-00000010", resumed / "checkpoints/step-00000010")
    train.main(command(workplace, resumed))
    late = {step: loss for step, loss in lines(one, "loss").items() if step > 10}
    assert lines(resumed, "loss") == pytest.approx(late, abs=1e-5)
