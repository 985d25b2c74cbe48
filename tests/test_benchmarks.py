"""The benchmark scripts run end to end, at sizes that measure nothing, and write what they promise."""

import argparse
import functools
import json
import os
import shlex
import sys
import tarfile
from pathlib import Path

import pytest
import scripts
import torch

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str) -> str:
    done = scripts.run(f"benchmarks/{script}", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_files(folder: Path, name: str) -> dict:
    assert not list(folder.glob("*.part*"))
    assert (folder / f"{name}.png").stat().st_size > 10_000
    result = json.loads((folder / f"{name}.json").read_text())
    header = (folder / f"{name}.md").read_text()
    for key in ("commit", "device", "torch", "transformers"):
        assert str(result["environment"][key]) in header
    return result


def test_bench_ffn(tmp_path):
    small = ["--hidden_size", "128", "--decode_size", "128", "--tokens", "64", "--rounds", "2"]
    printed = run("bench_ffn.py", *small, "--output", str(tmp_path))
    result = check_files(tmp_path, "ffn_cpu")
    assert json.loads(printed.splitlines()[-1])["environment"] == result["environment"]
    rows = {row["block"]: row for row in result["training"]}
    assert rows["mlp"]["step_ratio"] == rows["mlp"]["saved_ratio"] == 1
    for row in rows.values():
        assert row["parameters"] == pytest.approx(rows["mlp"]["parameters"], rel=0.1)
        assert row["step_ms"]["q20"] <= row["step_ms"]["median"] <= row["step_ms"]["q80"]
    assert rows["kan k=3 C=8"]["saved_ratio"] <= 0.5  # counted, not timed: true at any size
    decoding = {row["block"]: row["bytes_ratio"] for row in result["decoding"]}
    assert decoding["kan k=1 C=8"] == pytest.approx(3 / 9, rel=0.1)
    assert decoding["kan_gated k=1 C=4"] == pytest.approx(4 / 6, rel=0.1)


def test_bench_train(tmp_path):
    small = ["--rounds", "2", "--steps", "2", "--batch_size", "4", "--sequence_length", "32", "--device", "cpu"]
    printed = run(
        "bench_train.py",
        *small,
        "--micro_batch_size",
        "2",
        "--cache_dir",
        str(tmp_path / "cache"),
        "--output",
        str(tmp_path),
    )
    result = json.loads((tmp_path / "train_cpu.json").read_text())
    assert str(result["environment"]["commit"]) in (tmp_path / "train_cpu.md").read_text()
    assert float(printed.splitlines()[-1]) == result["ratio"] > 0
    assert result["tokens_a_step"] == 4 * 32
    for side in ("bare", "loop"):  # both count the same tokens
        speed, step = result["tokens_per_second"][side], result["milliseconds_a_step"][side]
        assert speed["q20"] <= 4 * 32 / step * 1e3 <= speed["q80"]


def test_bench_decode(tmp_path):
    small = ["--hidden_size", "64", "--batches", "1", "2", "--models", "tiny", "--rounds", "2"]
    run("bench_decode.py", *small, "--output", str(tmp_path))
    result = check_files(tmp_path, "decode_cpu")
    assert {row["batch"] for row in result["blocks"]} == {1, 2}
    assert {row["model"] for row in result["models"]} == {"tiny swiglu", "tiny kan_gated"}


def test_bench_models(tmp_path):
    small = ["--models", "tiny", "--rounds", "1", "--batch_size", "1", "--sequence_length", "16", "--growth", "G"]
    run("bench_models.py", *small, "--output", str(tmp_path))
    result = json.loads((tmp_path / "models_cpu.json").read_text())
    assert str(result["environment"]["commit"]) in (tmp_path / "models_cpu.md").read_text()
    swiglu, *others = result["models"]
    assert swiglu["ratio"] == 1
    assert [row["kind"] for row in others] == ["kan_gated", "kan_fourier"]
    for kan in others:
        assert kan["compiled_ratio"] is swiglu["compiled_ms"] is None
        assert kan["parameters"] == pytest.approx(swiglu["parameters"], rel=0.02)
        assert kan["saved_bytes"] > 0
    sizes = [row["parameters"] for row in result["growth"]]  # G grows, the parameters stay
    assert sizes == pytest.approx([sizes[0]] * 4, rel=0.02)


def test_bench_models_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench_models

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    kinds = ("swiglu", "kan_gated")
    configs = {kind: bench_models.KansformerConfig(**sizes, ffn_type=kind, intermediate_size=24) for kind in kinds}
    options = argparse.Namespace(device="cpu", rounds=1)
    swiglu, kan = bench_models.compare(configs, 1, 16, torch.float32, options, {}, compiled=True)
    assert swiglu["compiled_ratio"] == 1
    assert kan["compiled_ratio"] == kan["compiled_ms"]["median"] / swiglu["compiled_ms"]["median"] > 0


def test_synthetic(tmp_path):
    run(
        "synthetic.py",
        "--steps",
        "3",
        "--batch_size",
        "8",
        "--rates",
        "1e-2",
        "--seeds",
        "2",
        "--output",
        str(tmp_path),
    )
    result = json.loads((tmp_path / "synthetic.json").read_text())
    assert str(result["environment"]["commit"]) in (tmp_path / "synthetic.md").read_text()
    sizes = {row["block"]: row["parameters"] for row in result["rows"]}
    assert list(sizes.values()) == pytest.approx([sizes["swiglu"]] * 5, rel=0.05)
    for row in result["rows"]:
        assert len(row["errors"]) == 2
        assert row["errors"][0] != row["errors"][1]


@pytest.mark.parametrize(
    ("kan", "mlp", "words"),
    [
        ((0.1, 0.12), (0.4, 0.42), "as expected"),
        ((0.4, 0.42), (0.1, 0.12), "not as"),
        ((0.1, 0.5), (0.2, 0.3), "no diff"),
    ],
)
def test_synthetic_verdicts_follow_the_figures(kan, mlp, words):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import synthetic

    rows = [{"block": "kan", "errors": kan}, {"block": "mlp", "errors": mlp}]
    assert words in synthetic.verdict(rows, "additive")


def test_bench_distill(tmp_path):
    """On a random Llama: sizes are what was asked, closed forms beat nothing, and steps beat the closed forms."""
    from tokenizer import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, initializer_range=0.2, **sizes)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text = str(ROOT / "train" / "tinyshakespeare.txt")
    small = ["--layers", "0", "1", "--shares", "0.5", "--tokens", "2048", "--steps", "40", "--valid_sequences", "2"]
    texts = ["--train_text", text, "--valid_text", text, "--output", str(tmp_path / "out"), "--sequence_length", "64"]
    run("bench_distill.py", str(tmp_path / "model"), *small, *texts)
    result = json.loads((tmp_path / "out" / "table.json").read_text())
    assert (tmp_path / "out" / "curve.png").stat().st_size > 10_000
    rows = {row["method"]: row for row in result["rows"]}
    for method in ("svd", "swiglu", "kan_gated"):
        assert rows[method]["parameters"] == pytest.approx(0.5, rel=0.05)
        assert rows[method]["error"] < rows[method]["closed_form"] < 1


def test_bench_kernels_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    program = "import interpreter, bench_kernels as b; b.DECODE += ({'BLOCK': 8},); b.main()"  # one that must fail
    (tmp_path / "interpreted.py").write_text(program)
    small = ["--device", "cpu", "--tokens", "32", "--width", "16", "--rounds", "1", "--output", tmp_path]
    paths = os.pathsep.join(str(ROOT / name) for name in ("tests", "benchmarks", "."))
    done = scripts.run(tmp_path / "interpreted.py", *small, TRITON_INTERPRET="1", PYTHONPATH=paths)
    assert done.returncode == 1, done.stderr
    rows = json.loads((tmp_path / "kernels_cpu.json").read_text())["rows"]
    assert all("TypeError" in row["failed"] for row in rows if row["piece"] == "decode BLOCK 8")
    rows = [row for row in rows if row["piece"] != "decode BLOCK 8"]
    pieces = {"phi", "fold", "product", "forward", "dx", "dW", "dense, one token", "waves", "fold and waves"}
    assert {row["piece"] for row in rows} > pieces
    assert max(row["error"] for row in rows) < 1e-5
    assert len({row["layer"] for row in rows}) == 6


def test_the_steps_of_the_gpu_script_exist(tmp_path):
    printed = run("gpu.py", "--output", str(tmp_path), "--print").splitlines()
    assert len(printed) == 5
    marked = {path.name for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark." + "gpu" in path.read_text()}
    assert marked == {Path(word).name for word in shlex.split(printed[0]) if word.endswith(".py")}
    for line in printed[1:]:
        script, *arguments = line.split()[1:]
        known = run(Path(script).name, "--help")
        assert all(argument in known for argument in arguments if argument.startswith("--")), line


def test_the_gpu_script_leaves_an_archive_when_its_time_is_over(tmp_path):
    out, archive = tmp_path / "out", tmp_path / "gpu.tar.gz"
    run("gpu.py", "--output", str(out), "--archive", str(archive), "--seconds", "1", "--only", "kernels", "decode")
    with tarfile.open(archive) as packed:
        names = set(map(os.path.basename, packed.getnames()))
        steps = json.load(packed.extractfile("./gpu.json"))["steps"]
    assert {"kernels.log", "decode.log", "gpu.json"} <= names
    assert [(step["step"], step["exit"]) for step in steps] == [("kernels", 124), ("decode", 124)]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "gpu.tar.gz"}
