"""Rooms depend on each other one way only: splines, kernels -> functional -> layers -> models -> train, benchmarks."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each room may import of the others.
ALLOWED = {
    "kansformer.splines": set(),
    "kansformer.kernels": {"kansformer.splines"},
    "kansformer.functional": {"kansformer.splines", "kansformer.kernels"},
    "kansformer.layers": {"kansformer.splines", "kansformer.kernels", "kansformer.functional"},
    "kansformer.kan": {"kansformer.splines", "kansformer.kernels", "kansformer.functional", "kansformer.layers"},
    "kansformer.models": {"kansformer.splines", "kansformer.functional", "kansformer.layers"},
    "kansformer.sources": {"kansformer.models"},
    "kansformer.convert": {"kansformer.layers", "kansformer.models", "kansformer.sources"},
    "kansformer.kanify": {"kansformer.layers"},
    "kansformer.inspect": {"kansformer.splines", "kansformer.kernels", "kansformer.layers", "kansformer.kan"},
    "kansformer.prune": {"kansformer.splines", "kansformer.kernels", "kansformer.layers", "kansformer.inspect"},
    "kansformer.__main__": set(),
}

USERS_OF_TRANSFORMERS = ("convert.py", "sources.py", "kanify.py", "inspect/loading.py")


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, relative names resolved."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize(
    "path", [p for p in sources("kansformer") if p.parent != ROOT / "kansformer" or p.stem != "__init__"], ids=str
)
def test_dependency_direction(path):
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert own in ALLOWED, f"{own} is a new room: give it its place in ALLOWED"
    ours = {room(m) for m in imports(path) if m.startswith("kansformer.")} - {own}
    assert ours <= ALLOWED[own], f"{path.name} imports {sorted(ours - ALLOWED[own])}"


@pytest.mark.parametrize("path", sources("kansformer"), ids=str)
def test_the_package_knows_nothing_of_training_and_benchmarks(path):
    assert not {m.split(".")[0] for m in imports(path)} & {"train", "benchmarks", "tests"}


def test_heavy_imports_stay_in_their_rooms():
    for path in sources("kansformer"):
        top = {m.split(".")[0] for m in imports(path)}
        name = path.relative_to(ROOT / "kansformer").as_posix()
        assert "triton" not in top or name.startswith("kernels/triton"), name
        assert "transformers" not in top or name.startswith("models/") or name in USERS_OF_TRANSFORMERS, name
