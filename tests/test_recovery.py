"""Nothing lost when something breaks: kills, signals, damaged checkpoints, full disks, other numbers of processes."""

import errno
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoint
import psutil
import pytest
import torch
import training
from accelerate.commands.launch import _validate_launch_command, launch_command_parser, prepare_multi_gpu_env
from accelerate.state import AcceleratorState
from settings import Settings, check_world
from training import ROOT, assert_same_run, finish, launch, lines, tensors

import train


def command(workplace: Path, output: Path, **settings) -> list[str]:
    """Cubic edges: those of order 1 have kinks, where rounding decides a gradient and grows to 1e-3 in 100 steps."""
    return training.command(workplace, output, **{"model.spline_order": 3} | settings)


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


def undisturbed(workplace: Path, name: str, **settings) -> Path:
    """The folder of a whole run in this process."""
    output, threads = workplace / name, torch.get_num_threads()
    torch.set_num_threads(1)  # sums are split by threads: launched runs have one too
    train.main(command(workplace, output, **settings))
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    return output


@pytest.fixture(scope="module")
def straight(workplace):
    """60 steps, more than an epoch, that nothing disturbed, in this process, on one thread; every checkpoint kept."""
    return undisturbed(workplace, "straight", steps=60, keep_checkpoints=99, micro_batch_size=4)


@pytest.fixture(scope="module")
def two(workplace):
    """The same 60 steps by two processes, with two micro-batches accumulated in each."""
    arguments = command(workplace, workplace / "two", steps=60, keep_checkpoints=99, micro_batch_size=2, processes=2)
    out, _ = finish(launch(arguments, processes=2))
    assert "2 process(es) (MULTI_CPU)" in out
    return workplace / "two"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start_from(source: Path, step: int, output: Path) -> None:
    """What a run that was killed after `step` left behind: that checkpoint, and a log that went further."""
    name = f"step-{step:08d}"
    shutil.copytree(source / "checkpoints" / name, output / "checkpoints" / name)
    whole = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    after = next(i for i, line in enumerate(whole) if json.loads(line)["step"] > step)
    (output / "metrics.jsonl").write_text("".join(whole[: after + 3]) + '{"step": 99, "lo')  # the last line cut short


# Exactness


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_after_30_of_60_steps_and_resumed(workplace, straight, two, tmp_path, processes):
    micro_batch = {1: 4, 2: 2}[processes]
    settings = {"steps": 60, "keep_checkpoints": 99, "micro_batch_size": micro_batch, "processes": processes}
    arguments = command(workplace, tmp_path, **settings)
    process = launch(arguments, processes)
    while not (tmp_path / "checkpoints/step-00000030").exists() and process.poll() is None:
        time.sleep(0.002)
    for victim in [process, *psutil.Process(process.pid).children(recursive=True)]:
        victim.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not (tmp_path / "results.json").exists()
    out, _ = finish(launch(arguments, processes))
    assert "from step 30 to 60" in out
    assert_same_run(straight if processes == 1 else two, tmp_path)


def test_a_resumed_run_trims_the_log_to_its_checkpoint(workplace, straight, tmp_path):
    start_from(straight, 40, tmp_path)
    train.main(command(workplace, tmp_path, steps=60, keep_checkpoints=99, micro_batch_size=4))
    assert_same_run(straight, tmp_path)


@pytest.mark.slow
def test_kill_tally(tmp_path):
    options = ["--kills", "2", "--processes", "1", "--steps", "100", "--save_every", "10", "--output", str(tmp_path)]
    script = [sys.executable, str(ROOT / "benchmarks/kill_tally.py")]
    run = subprocess.run([*script, *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads((tmp_path / "kill_tally.json").read_text())
    rows = result["tallies"][0]["rows"]
    assert len(rows) == 2
    assert any(row["aimed"] for row in rows)
    assert all(row["lost"] <= 10 for row in rows)
    assert result["tallies"][0]["equal"]["steps"] == 100
    assert result["environment"]["commit"] in (tmp_path / "kill_tally.md").read_text()


def test_the_tally_sees_one_changed_number(straight, tmp_path, monkeypatch):
    """The negative control of its comparison: a log, then a weight, that differ in one place."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import kill_tally

    shutil.copytree(straight, tmp_path / "copy")
    assert kill_tally.differences(straight, tmp_path / "copy") == []
    changed = (tmp_path / "copy/metrics.jsonl").read_text().replace('"lr": 0.0006', '"lr": 0.0007')
    (tmp_path / "copy/metrics.jsonl").write_text(changed)
    assert kill_tally.differences(straight, tmp_path / "copy") == ["lr is logged differently"]
    load = kill_tally.load_file

    def perturbed(path):
        found = load(path)
        if path.is_relative_to(tmp_path) and path.name == "model.safetensors":
            found["model.norm.weight"][0] += 1e-7
        return found

    monkeypatch.setattr(kill_tally, "load_file", perturbed)
    assert "model.norm.weight of model.safetensors" in kill_tally.differences(straight, tmp_path / "copy")


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_its_own_code(workplace, straight, tmp_path, monkeypatch, number):
    rate = train.learning_rate

    def interrupt(settings, step):
        if step == 33:
            signal.raise_signal(number)
        return rate(settings, step)

    arguments = command(workplace, tmp_path, steps=60, keep_checkpoints=99, micro_batch_size=4)
    handler = signal.getsignal(number)
    monkeypatch.setattr(train, "learning_rate", interrupt)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == train.EXIT_STOPPED == 75
    assert signal.getsignal(number) == handler
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-00000034"
    monkeypatch.undo()
    train.main(arguments)
    assert_same_run(straight, tmp_path)


def test_time_limit_saves_and_stops(workplace, tmp_path):
    with pytest.raises(SystemExit):
        train.main(command(workplace, tmp_path, max_minutes=1e-9))
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-00000001"


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(workplace, straight, tmp_path, monkeypatch):
    write = checkpoint._write

    def interrupt(folder, *rest):
        if folder.name == "step-00000030":
            signal.raise_signal(signal.SIGTERM)
        write(folder, *rest)

    monkeypatch.setattr(checkpoint, "_write", interrupt)
    with pytest.raises(SystemExit):
        train.main(command(workplace, tmp_path, steps=60))
    names = [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))]
    assert names[-2:] == ["step-00000030", "step-00000031"]
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-00000031"


def test_two_processes_save_and_stop_on_a_signal_to_one(workplace, two, tmp_path):
    arguments = command(workplace, tmp_path, steps=60, keep_checkpoints=99, micro_batch_size=4, processes=2)
    process = launch(arguments, processes=2)
    while len(lines(tmp_path, "loss") if (tmp_path / "metrics.jsonl").exists() else ()) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "train.py" in " ".join(p.cmdline())]
    ranks[-1].send_signal(signal.SIGTERM)
    _, err = finish(process, code=1)  # torchrun's own
    assert "exitcode  : 75" in err
    stopped = checkpoint.read_state(checkpoint.newest(tmp_path / "checkpoints"))["step"]
    assert stopped == max(lines(tmp_path, "loss")) < 60


# Damage


def damage(file: str, how: str):
    def apply(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        if how == "missing":
            (folder / file).unlink()
            return
        if how == "garbage":
            data = b'[1, "no state"]'
        if how == "folder":
            (folder / file).unlink()
            (folder / file).mkdir()
            return
        if how == "truncated":
            data = data[: len(data) // 2]
        if how == "flipped":
            data[len(data) // 2] ^= 1
        (folder / file).write_bytes(data)

    return apply


FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"]


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "folder"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_skipped_with_the_reason(straight, tmp_path, file, how):
    for name in ("step-00000010", "step-00000020"):
        shutil.copytree(straight / "checkpoints" / name, tmp_path / name)
    damage(file, how)(tmp_path / "step-00000020")
    said = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step-00000010"
    assert len(said) == 1
    assert f"step-00000020 is skipped: {file} " in said[0]


def test_any_flipped_byte_is_seen(straight, tmp_path):
    """Every file of a checkpoint, at its first, its last and random places; but white space that says the same."""
    folder = shutil.copytree(straight / "checkpoints/step-00000010", tmp_path / "step-00000010")
    assert checkpoint._fault(folder) is None
    generator = torch.Generator().manual_seed(0)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        places = torch.randint(len(data), (20,), generator=generator).tolist()
        for place in [0, len(data) - 1, *places]:
            if not (path.name == checkpoint.STATE and chr(data[place]).isspace()):
                path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
                assert checkpoint._fault(folder) is not None, f"{path.name}, byte {place}"
        path.write_bytes(data)
    assert checkpoint._fault(folder) is None


def test_folders_that_are_no_checkpoints_are_skipped(straight, tmp_path, monkeypatch):
    shutil.copytree(straight / "checkpoints/step-00000010", tmp_path / "step-00000010")
    shutil.copytree(straight / "checkpoints/step-00000020", tmp_path / "step-00000025")  # renamed by a hand
    shutil.copytree(straight / "checkpoints/step-00000030", tmp_path / "step-00000030")
    damage("state.json", "garbage")(tmp_path / "step-00000030")
    shutil.copytree(straight / "checkpoints/step-00000040", tmp_path / "step-00000040")
    (tmp_path / "step-00000050").mkdir()
    (tmp_path / ".step-00000060.tmp").mkdir()  # what a kill while writing leaves
    load = checkpoint.read_state

    def read(folder):  # root may read anything: tests cannot take the permission away
        if folder.name == "step-00000040":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder / "state.json"))
        return load(folder)

    monkeypatch.setattr(checkpoint, "read_state", read)
    said = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step-00000010"
    reasons = [line.rpartition("is skipped: ")[2] for line in said]
    assert reasons[:3] == [
        "the run ended while it was written or deleted",
        "state.json cannot be read (No such file or directory)",
        "state.json cannot be read (Permission denied)",
    ]
    assert reasons[3].startswith("state.json cannot be read (")
    assert reasons[4] == "it is of step 20"


def test_a_run_whose_checkpoints_are_all_broken_is_not_started_anew(workplace, straight, tmp_path):
    for step in (10, 20):
        name = f"step-{step:08d}"
        damage("model.safetensors", "flipped")(
            shutil.copytree(straight / "checkpoints" / name, tmp_path / "checkpoints" / name)
        )
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole \(step-00000020: model.*delete them"):
        train.main(command(workplace, tmp_path, steps=60))
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2


def test_a_broken_newest_does_not_count_as_one_kept(workplace, straight, tmp_path):
    """Resumed from 10 beside a broken 30, keeping one: what is written at 11 stays, though 30 is newer by name."""
    for step in (10, 30):
        start_from(straight, step, tmp_path)
    damage("optimizer.safetensors", "truncated")(tmp_path / "checkpoints/step-00000030")
    arguments = {"steps": 60, "keep_checkpoints": 1, "micro_batch_size": 4}
    with pytest.raises(SystemExit):
        train.main(command(workplace, tmp_path, **arguments, max_minutes=1e-9))
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-00000011"
    train.main(command(workplace, tmp_path, **arguments))
    left = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert left[-1].name == "step-00000060"
    assert len(left) <= 2  # the last and the best
    assert [checkpoint._fault(folder) for folder in left] == [None] * len(left)


def test_a_full_disk_leaves_the_last_good_checkpoint(workplace, straight, tmp_path):
    """Files may grow to a byte less than the optimizer's: the model still fits."""
    start_from(straight, 10, tmp_path)
    size = (tmp_path / "checkpoints/step-00000010/optimizer.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
    try:
        with pytest.raises(OSError, match="step 20 cannot be written") as failure:
            train.main(command(workplace, tmp_path, steps=60, micro_batch_size=4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(failure.value)
    assert str(tmp_path / "checkpoints") in message
    assert "bytes and" in message
    assert "are free" in message
    assert "goes on from step-00000010" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-00000010"
    train.main(command(workplace, tmp_path, steps=60, keep_checkpoints=99, micro_batch_size=4))
    assert_same_run(straight, tmp_path)


def test_a_folder_in_use_is_refused_and_a_dead_runs_is_taken_over(workplace, tmp_path):
    arguments = command(workplace, tmp_path, steps=100_000, save_every=1000)
    first = launch(arguments)
    while not (tmp_path / "metrics.jsonl").exists() and first.poll() is None:
        time.sleep(0.01)
    with pytest.raises(ValueError, match=rf"{tmp_path} is in use by process {first.pid} on "):
        train.main(arguments)
    first.kill()
    first.communicate()
    train.main(command(workplace, tmp_path, steps=2))


def test_old_checkpoints_are_deleted_and_a_finished_run_is_not_repeated(workplace, tmp_path):
    arguments = command(workplace, tmp_path, save_every=5, keep_checkpoints=2)
    results = train.main(arguments)
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000015", "step-00000020"]
    metrics = (tmp_path / "metrics.jsonl").read_text()
    again = train.main(arguments)
    assert again["val_loss"] == results["val_loss"]
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def test_a_run_goes_on_where_text_and_model_lie_elsewhere_and_keeps_what_it_cost(workplace, tmp_path):
    text, output = tmp_path / "elsewhere.txt", tmp_path / "run"
    results = train.main(command(workplace, output, keep_best=False))
    shutil.copy(workplace / "text.txt", text)
    again = train.main(command(workplace, output, data=text, keep_best=False))
    for key in ("tokens_per_second", "peak_memory_bytes", "val_loss"):
        assert again[key] == results[key] is not None
    assert json.loads((output / "results.json").read_text()) == again
    with pytest.raises(ValueError, match=r"final_model is best, and .*run keeps no best checkpoint: .*keep_best"):
        train.main(command(workplace, output, final_model="best"))


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
    check_world(Settings(), 1)
    with pytest.raises(ValueError, match="2 processes were asked for and 1 started"):
        check_world(Settings(processes=2), 1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # as accelerate launch --cpu --num_processes 2 leaves it
    with pytest.raises(ValueError, match=r"several processes were asked for and 1 started.*torchrun"):
        check_world(Settings(), 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were asked for and 1 started"):
        check_world(Settings(), 1)
    check_world(Settings(), 2, "MULTI_CPU")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_world(Settings(), 2, "FSDP")
    with pytest.raises(ValueError, match="FSDP was asked for and accelerate gives MULTI_CPU"):
        check_world(Settings(), 2, "MULTI_CPU")


def test_accelerate_launch_on_cpu_starts_one_process_and_the_run_says_so(workplace, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    arguments = command(workplace, tmp_path)
    run = subprocess.run([*launcher, str(ROOT / "train/train.py"), *arguments], capture_output=True, text=True)
    assert run.returncode == 1
    assert "processes were asked for and 1 started; on CPU launch with `torchrun --nproc_per_node" in run.stderr
    assert not tmp_path.joinpath("metrics.jsonl").exists()


def test_the_split_does_not_matter(workplace, two, tmp_path):
    """1 process x 4 accumulated = 2 processes x 2 accumulated, over 60 steps, to fp32 rounding."""
    train.main(command(workplace, tmp_path, steps=60, micro_batch_size=2))
    for key in ("loss", "val_loss", "grad_norm"):
        assert len(lines(two, key)) >= 6
        assert lines(two, key) == pytest.approx(lines(tmp_path, key), abs=1e-5)
    assert lines(two, "tokens") == lines(tmp_path, "tokens")


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_with_another_number_of_processes(workplace, straight, two, tmp_path, processes):
    """2 -> 1 and 1 -> 2."""
    start_from(two if processes == 1 else straight, 30, tmp_path)
    out, _ = finish(launch(command(workplace, tmp_path, steps=60, micro_batch_size=4), processes))
    assert f"{processes} process(es)" in out
    assert "from step 30 to 60" in out
    for key in ("loss", "val_loss"):
        assert lines(tmp_path, key) == pytest.approx(lines(straight, key), abs=1e-5)


def fsdp2_environment() -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` tells its processes."""
    file = str(ROOT / "configs/accelerate/fsdp2.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", file, "--num_processes", "2", "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    return {k: v for k, v in environment.items() if k.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.mark.slow
def test_fsdp2_in_bfloat16_keeps_losses_and_gradients_whole(workplace, tmp_path):
    environment = fsdp2_environment() | {"ACCELERATE_TORCH_DEVICE": "cpu"}
    sharded, copied = tmp_path / "sharded", tmp_path / "copied"
    for output, script, extra in ((sharded, "tests/fsdp_on_cpu.py", environment), (copied, "train/train.py", {})):
        finish(launch(command(workplace, output, steps=10, precision="bf16"), 2, script, **extra))
    losses = lines(sharded, "loss")
    exact = torch.tensor(list(losses.values()))
    assert not torch.equal(exact, exact.bfloat16().float())
    assert losses == pytest.approx(lines(copied, "loss"), abs=5e-3)


@pytest.mark.slow
def test_fsdp2_trains_checkpoints_resumes_and_reshards(workplace, straight, tmp_path):
    """By accelerate's own route in two processes: 2 -> 2 bit-equal; 2 -> 1, 1 -> 2 and the run of one to rounding."""
    environment = fsdp2_environment() | {"ACCELERATE_TORCH_DEVICE": "cpu"}
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"

    def run(output: Path, **settings) -> None:
        arguments = command(workplace, output, steps=60, keep_checkpoints=99, micro_batch_size=4, **settings)
        out, _ = finish(launch(arguments, 2, "tests/fsdp_on_cpu.py", **environment))
        assert "2 process(es) (FSDP) on cpu" in out

    sharded, again, gathered, scattered = (tmp_path / name for name in ("sharded", "again", "gathered", "scattered"))
    run(sharded)
    for key in ("loss", "val_loss", "grad_norm"):
        assert lines(sharded, key) == pytest.approx(lines(straight, key), abs=1e-5)
    assert {k: v.shape for k, v in tensors(sharded).items()} == {k: v.shape for k, v in tensors(straight).items()}

    start_from(sharded, 30, again)
    run(again)
    assert_same_run(sharded, again)

    start_from(sharded, 30, gathered)
    train.main(command(workplace, gathered, steps=60, micro_batch_size=4))
    assert lines(gathered, "loss") == pytest.approx(lines(straight, "loss"), abs=1e-5)

    start_from(straight, 30, scattered)
    run(scattered)
    assert lines(scattered, "loss") == pytest.approx(lines(straight, "loss"), abs=1e-5)


# Grids refined on the way


REFINED = {"steps": 30, "save_every": 5, "keep_checkpoints": 99, "coarse_grids": "[[10, 1], [20, 2]]"}


@pytest.fixture(scope="module")
def refined(workplace):
    """30 steps with 1, then 2, then 3 intervals, in this process."""
    return undisturbed(workplace, "refined", **REFINED, resume="none")  # its own checkpoints are no other run's


def test_grids_are_refined_at_their_steps(refined):
    for step, size in {5: 1, 10: 1, 15: 2, 20: 2, 25: 3, 30: 3}.items():  # refined before the step that comes
        folder = refined / "checkpoints" / f"step-{step:08d}"
        assert json.loads((folder / "config.json").read_text())["grid_size"] == size
    assert lines(refined, "grid_size") == {10: 2, 20: 3}
    assert json.loads((refined / "model/config.json").read_text())["grid_size"] == 3
    moments = tensors(refined, "checkpoints/step-00000015/optimizer.safetensors")
    steps = {name.split("/")[0].rpartition(".")[2]: int(v) for name, v in moments.items() if name.endswith("/step")}
    assert steps["spline_weight"] == 5, "the moments of the old coefficients are forgotten"
    assert steps["weight"] == 15


@pytest.mark.parametrize("step", [5, 10, 15, 20, 25])
def test_a_run_with_refined_grids_resumes_bit_for_bit(workplace, refined, tmp_path, step):
    start_from(refined, step, tmp_path)
    train.main(command(workplace, tmp_path, **REFINED))
    assert_same_run(refined, tmp_path)


def test_two_processes_refine_as_one_does(workplace, refined, tmp_path):
    finish(launch(command(workplace, tmp_path, **REFINED), 2))
    assert lines(tmp_path, "loss") == pytest.approx(lines(refined, "loss"), abs=1e-5)


@pytest.mark.slow
def test_fsdp2_refines_as_one_does(workplace, refined, tmp_path):
    environment = fsdp2_environment() | {"ACCELERATE_TORCH_DEVICE": "cpu"}
    finish(launch(command(workplace, tmp_path, **REFINED), 2, "tests/fsdp_on_cpu.py", **environment))
    assert lines(tmp_path, "loss") == pytest.approx(lines(refined, "loss"), abs=1e-5)
