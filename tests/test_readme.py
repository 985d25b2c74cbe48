"""What the README shows is run as it stands; only the number of training steps is lowered."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import scripts

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import sweeps  # noqa: E402

README = (ROOT / "README.md").read_text()


def blocks() -> list[tuple[str, str]]:
    """(language, code) of every fenced block, top to bottom."""
    return re.findall(r"```(python|bash)\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clone's folders, with room for what the commands write."""
    path = tmp_path_factory.mktemp("readme")
    for name in ("train", "configs", "benchmarks"):
        (path / name).symlink_to(ROOT / name)
    return path


@pytest.mark.slow
def test_commands_and_code(folder):
    printed = {}
    for language, text in blocks():
        if language == "python":
            (folder / "block.py").write_text(text.replace("range(50)", "range(2)"))
            printed[text] = run(["block.py"], folder)
            continue
        for line in text.strip().splitlines():
            words = shlex.split(re.sub(r"--steps \d+", "--steps 2 --warmup_steps 1 --val_fraction 0.01", line))
            assert words[0] in ("python", "torchrun"), line
            launcher = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
            printed[line] = run([*launcher, *words[1:]], folder)
    assert any("ROMEO:" in output for output in printed.values())
    assert any("exp(y**2 + sin(3.14" in output for output in printed.values())


def run(arguments: list[str], folder: Path) -> str:
    done = scripts.run(*arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        path = ROOT / (name or "README.md")
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in titles], target


def test_the_sweeps_are_those_on_their_page():
    results = sweeps.load(ROOT / "benchmarks/results")
    assert sweeps.headline(results) in README
    assert sweeps.table(results) in (ROOT / "benchmarks/results/sweeps.md").read_text()


def test_no_number_is_left_open():
    assert "@@" not in README
