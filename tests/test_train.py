"""The training script: its figures, its errors, its demonstration."""

import dataclasses
import json
import math
import shutil
import signal
import sys

import checkpoint
import metrics
import pytest
import report
import torch
from accelerate.state import AcceleratorState
from health import Episodes, LossSpikes
from optimizer import parameter_groups
from safetensors.torch import load_file, save_file
from settings import Settings, check_resume, parse
from training import ROOT, SMALL, command, finish, launch, lines, tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# What a run writes


def test_metrics_results_and_falling_loss(straight):
    output, results = straight
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "val_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 61))
    assert [r["step"] for r in evaluations] == [10, 20, 30, 40, 50, 60]
    for record in steps:
        assert set(record) == {
            *("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes"),
            *("activation_memory_bytes", "model_flops_per_second"),
        }
        # 8 x 32 tokens keep 320 logits each, in fp32, and more
        assert 8 * 32 * 320 * 4 < record["activation_memory_bytes"] < record["peak_memory_bytes"]
    for record in evaluations:
        assert set(record) == {"step", "tokens", "val_loss", "val_bits_per_byte", "out_of_grid", "out_of_grid_worst"}
        assert 0 < record["out_of_grid"] <= record["out_of_grid_worst"] < 0.2
    assert steps[0]["loss"] == pytest.approx(math.log(320), rel=0.2)
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] < math.log(320)
    # 60 steps of 8 x 32 targets, but for the shorter window that ends each of the 1.4 epochs
    assert 60 * 8 * 32 - 2 * 31 <= steps[-1]["tokens"] <= 60 * 8 * 32
    assert results == json.loads((output / "results.json").read_text())
    assert results["val_loss"] == evaluations[-1]["val_loss"]
    assert 0 < results["feed_forward_parameters"] < results["parameters"]


def test_the_saved_model_loads_and_generates(straight):
    folder = straight[0] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("First", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokens.shape == (1, 13)
    assert tokenizer.decode(tokens[0]).startswith("First")
    card = (folder / "README.md").read_text()
    assert "from_pretrained" in card
    assert "learning_rate: 0.003" in card
    assert not list(folder.rglob("*.bin"))  # nothing that would be unpickled


def test_a_stock_model_trains_too(workplace, tmp_path):
    fields = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 64, **SMALL}
    (tmp_path / "llama.json").write_text(json.dumps(fields))
    arguments = command(workplace, tmp_path / "run", model="tiny_swiglu", steps=10)
    results = train.main([*arguments, f"--model={tmp_path / 'llama.json'}"])
    assert results["val_loss"] < math.log(320)
    assert "out_of_grid" not in results


def test_gradient_checkpointing_changes_nothing(workplace, straight, tmp_path):
    train.main(command(workplace, tmp_path, steps=60, gradient_checkpointing="true", max_minutes=10, save_every=60))
    assert lines(tmp_path, "loss") == pytest.approx(lines(straight[0], "loss"), abs=1e-5)


def test_bf16_autocast_trains(workplace, tmp_path):
    results = train.main(command(workplace, tmp_path, precision="bf16"))
    assert results["val_loss"] < math.log(320)
    assert tensors(tmp_path)["model.embed_tokens.weight"].dtype == torch.float32


def test_a_compiled_model_is_saved_and_resumed_under_its_own_names(workplace, straight, tmp_path, monkeypatch):
    accelerator = train.Accelerator
    monkeypatch.setattr(train, "Accelerator", lambda **kwargs: accelerator(**kwargs | {"dynamo_backend": "eager"}))
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(straight[0] / "checkpoints/step-00000050", tmp_path / "checkpoints/step-00000050")
    train.main(command(workplace, tmp_path, steps=60, compile="true"))
    assert tensors(tmp_path).keys() == tensors(straight[0]).keys()
    late = {step: loss for step, loss in lines(straight[0], "loss").items() if step > 50}
    assert lines(tmp_path, "loss") == pytest.approx(late, abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(model.lm_head.weight, tensors(tmp_path)["model.embed_tokens.weight"])


# Figures checked by hand


def test_bits_per_byte_of_a_known_distribution(workplace, tmp_path, monkeypatch):
    """A model whose embeddings are zero (and tied) gives every one of its 320 tokens the same probability."""
    from_config = AutoModelForCausalLM.from_config

    def uniform(config):
        model = from_config(config)
        torch.nn.init.zeros_(model.get_input_embeddings().weight)
        return model

    monkeypatch.setattr(train.AutoModelForCausalLM, "from_config", uniform)
    results = train.main(command(workplace, tmp_path, steps=1, warmup_steps=0, learning_rate=1e-30))
    # A byte is a token, and each byte of the text, the first too, is a target: bits per byte are bits per token.
    assert results["val_loss"] == pytest.approx(math.log(320), rel=1e-6)
    assert results["val_bits_per_byte"] == pytest.approx(math.log2(320), rel=1e-6)
    # "é" is one character and two bytes: three equally likely choices for it cost log2(3)/2 bits a byte.
    assert train.bits_per_byte(math.log(3), len("é".encode())) == pytest.approx(math.log2(3) / 2)


def test_evaluation_equals_the_mean_over_the_held_out_text(straight):
    """The reported loss against one computed window by window from the text itself."""
    folder = straight[0] / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = (straight[0].parent / "text.txt").read_text()
    held_out = text[text.index("\n", round(0.9 * len(text))) + 1 :]
    tokens = torch.tensor([tokenizer.eos_token_id, *tokenizer(held_out)["input_ids"]])
    nats = 0.0
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start : start + 33]
        logits = model(input_ids=window[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert straight[1]["val_loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert straight[1]["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / len(held_out.encode()), rel=1e-5)


def test_learning_rate_schedule():
    settings = Settings(steps=100, warmup_steps=10, learning_rate=2.0, min_lr_ratio=0.1)
    rates = [train.learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[99] == pytest.approx(0.2)


def test_parameter_groups_by_name(straight):
    model = AutoModelForCausalLM.from_pretrained(straight[0] / "model")
    names = {id(p): name for name, p in model.named_parameters()}
    settings = Settings(weight_decay=0.2, spline_weight_decay=0.3, spline_lr_ratio=0.5)
    groups = parameter_groups(model, settings)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)
    kinds = {(g["weight_decay"], g["lr_ratio"]): [names[id(p)] for p in g["params"]] for g in groups}
    assert len(kinds) == len(groups) == 3
    matrices, vectors, splines = kinds[0.2, 1.0], kinds[0.0, 1.0], kinds[0.3, 0.5]
    assert all(name.endswith("_proj.weight") for name in matrices)
    assert all("norm" in name or name == "model.embed_tokens.weight" for name in vectors)
    assert splines == [f"model.layers.{layer}.mlp.down_proj.spline_weight" for layer in (0, 1)]


# Health


def test_nonfinite_loss_stops_before_the_step(workplace, tmp_path):
    """A huge rate breaks the gradients of the second step (the norms keep its loss finite): nothing is applied."""
    arguments = command(workplace, tmp_path, learning_rate=1e30, warmup_steps=0, save_every=1)
    with pytest.raises(
        FloatingPointError, match=r"step 2: .*norm nan; nothing was applied.*rank 0: gradient of model\."
    ):
        train.main(arguments)
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest.name == "step-00000001"
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())


def test_no_step_is_applied_from_the_first_nonfinite_one_on(workplace, tmp_path):
    """On a GPU the host sees a step's figures when the next one is under way: neither changes anything."""
    run = train.Run(parse(command(workplace, tmp_path, learning_rate=1e30, warmup_steps=0)))
    run.training_step(0)
    before = {name: tensor.clone() for name, tensor in run.bare_model.state_dict().items()}
    assert not run.training_step(1).isfinite().all()
    run.training_step(2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.bare_model.state_dict().items())
    assert {state["step"].item() for state in run.optimizer.state.values()} == {1}


def test_looking_a_step_late_changes_nothing(workplace, straight, tmp_path, monkeypatch):
    init = train.Run.__init__

    def late(run, settings):
        init(run, settings)
        run.lag = 1

    monkeypatch.setattr(train.Run, "__init__", late)
    train.main(command(workplace, tmp_path, steps=60, log_every=4, eval_every=60, save_every=60))
    assert lines(tmp_path, "loss") == {step: x for step, x in lines(straight[0], "loss").items() if step % 4 == 0}
    assert all(torch.equal(tensor, tensors(straight[0])[name]) for name, tensor in tensors(tmp_path).items())
    broken = command(workplace, tmp_path / "broken", learning_rate=1e30, warmup_steps=0, log_every=20)
    with pytest.raises(FloatingPointError, match=r"step 2: .*norm nan; nothing was applied.*rank 0: gradient of model"):
        train.main(broken)


def test_a_run_starts_from_a_saved_model(straight, workplace, tmp_path):
    saved = straight[0] / "model"
    asked = [word for word in command(workplace, tmp_path / "on", steps=1, warmup_steps=0) if "--model" not in word]
    asked += [f"--model={saved}", "--learning_rate=1e-12"]
    train.main(asked)
    for name, tensor in tensors(tmp_path / "on").items():
        torch.testing.assert_close(tensor, tensors(straight[0])[name], rtol=0, atol=1e-9)
    bare = tmp_path / "bare"
    shutil.copytree(saved, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({"nothing": torch.zeros(1)}, bare / "model.safetensors", {"format": "pt"})
    for words, message in {
        "--tokenizer=bpe:300": "tokenizer 'bpe:300' is not that of .*: give --tokenizer",
        "--steps=2 --coarse_grids=[[1,1]]": "starts from new weights",
        f"--model={tmp_path}": "is no json file and no saved model",
        f"--model={bare}": "lack .*embed_tokens",
        "--model.intermediate_size=8": "ignore_mismatched_sizes",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=message):
            train.main([*asked, *words.split(), f"--output_dir={tmp_path / 'refused'}"])


def test_the_first_nonfinite_value_is_named(straight):
    model = AutoModelForCausalLM.from_pretrained(straight[0] / "model")
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    first = lambda: train.first_nonfinite(model, lambda: model(input_ids=tokens, labels=tokens).loss.backward())  # noqa: E731
    assert first() == "none here"
    layer = model.model.layers[1].mlp.gate_proj
    hook = layer.register_forward_hook(lambda _, __, output: output / 0)
    assert first() == "output of model.layers.1.mlp.gate_proj"
    hook.remove()
    hook = layer.weight.register_hook(lambda gradient: gradient + math.inf)
    assert first() == "gradient of model.layers.1.mlp.gate_proj.weight"
    hook.remove()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    assert first() == "parameter model.norm.weight"


def test_loss_spikes_are_told_from_noise_and_falling_losses():
    noise = torch.randn(400, dtype=torch.float64) * 0.05
    watch = LossSpikes(100)
    assert max(watch(4 / (1 + step / 50) + noise[step].item()) for step in range(300)) < 6
    level = 4 / 7
    assert watch(level + 1.0) > 10
    assert watch(level) < 6  # one spike does not widen the spread
    flat = LossSpikes(100)
    assert max(flat(2 + 1e-9 * step) for step in range(100)) < 1


def test_an_episode_is_warned_of_once():
    episodes = Episodes()
    assert [episodes.begins("a", on) for on in (0, 1, 1, 0, 1)] == [False, True, False, False, True]
    assert episodes.begins("b", True)


def test_spikes_and_inputs_off_the_grids_are_warnings_in_the_log(workplace, tmp_path):
    train.main(command(workplace, tmp_path, spike_window=1, spike_threshold=1e-9, out_of_grid_threshold=1e-9))
    warnings = [record for record in records(tmp_path) if record.get("event") == "warning"]
    losses = lines(tmp_path, "loss")
    rises = [s for s in range(2, 21) if losses[s] > losses[s - 1] and not (s > 2 and losses[s - 1] > losses[s - 2])]
    assert [w["step"] for w in warnings if w["alarm"] == "loss_spike"] == rises != []
    assert [w["step"] for w in warnings if w["alarm"] == "out_of_grid"] == [10]  # at 20 it is the same episode
    assert "mlp.down_proj lie outside its grid" in next(w["message"] for w in warnings if w["alarm"] == "out_of_grid")


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="fp16 is not supported: its loss scale"):
        Settings(precision="fp16")
    with pytest.raises(ValueError, match="final_model = 'best' needs keep_best"):
        Settings(final_model="best", keep_best=False)
    with pytest.raises(ValueError, match=r"grid_update_steps = \[-1\] must be a list of steps"):
        Settings(grid_update_steps=[-1])
    for wrong in ([500, 3], [[500]], [[500, 3], [400, 5]], [[500, 3], [600, 3]], [[1000, 3]], [[500, 0]], ["500"]):
        with pytest.raises(ValueError, match=r"coarse_grids = .* must be pairs \[step, grid_size\], both rising"):
            Settings(coarse_grids=wrong)


@pytest.mark.parametrize(
    ("model", "message"),
    [("tiny_kan_gated", "below the model's grid_size, which is 3"), ("tiny_swiglu", "needs a block of splines")],
)
def test_coarse_grids_that_are_no_coarser_are_refused(workplace, tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        train.main(command(workplace, tmp_path, model=model, coarse_grids="[[10, 3]]"))
    assert not (tmp_path / "checkpoints").exists()


def test_a_key_younger_than_the_checkpoint_had_its_default(tmp_path):
    old = dataclasses.asdict(Settings())
    del old["grid_update_spread"]
    check_resume("auto", dataclasses.asdict(Settings()), old, tmp_path)
    with pytest.raises(ValueError, match=r"grid_update_spread: 4\.0 -> 3\.0"):
        check_resume("auto", dataclasses.asdict(Settings(grid_update_spread=3)), old, tmp_path)


def test_too_long_a_sequence_and_an_uneven_batch_are_refused(workplace, tmp_path):
    with pytest.raises(ValueError, match="sequence_length 1024 exceeds"):
        train.main(command(workplace, tmp_path, sequence_length=1024))
    with pytest.raises(ValueError, match="batch_size 8 is not a multiple of micro_batch_size 3 x 1"):
        train.main(command(workplace, tmp_path, micro_batch_size=3))
    (tmp_path / "short.txt").write_text("a few words\n" * 20)
    with pytest.raises(ValueError, match="tokens, fewer than"):
        train.main(command(workplace, tmp_path, data=tmp_path / "short.txt"))


# Grids


def test_grids_follow_the_inputs_on_schedule_and_resume_exactly(workplace, straight, tmp_path):
    settings = {"steps": 30, "grid_update_steps": "[10, 15]", "keep_checkpoints": 9, "save_every": 5}
    train.main(command(workplace, tmp_path / "whole", **settings))
    whole = {name: t for name, t in tensors(tmp_path / "whole").items() if name.endswith("grid")}
    start = tensors(straight[0])
    assert len(whole) == 2
    assert all((whole[name] != start[name]).all() for name in whole)
    updates = [record["step"] for record in records(tmp_path / "whole") if record.get("event") == "grid_update"]
    assert updates == [10, 15]
    # Until the first update nothing differs; the edge functions are kept, so the loss stays near
    losses, undisturbed = lines(tmp_path / "whole", "loss"), lines(straight[0], "loss")
    assert losses[10] == pytest.approx(undisturbed[10], rel=0.02)
    # A checkpoint of step 15 is from before that update; moments start over with it
    moments = load_file(tmp_path / "whole/checkpoints/step-00000020/optimizer.safetensors")
    counts = {name: t.item() for name, t in moments.items() if name.endswith("/step")}
    assert {count for name, count in counts.items() if "spline_weight" in name} == {5}
    assert {count for name, count in counts.items() if "spline_weight" not in name} == {20}
    (tmp_path / "again/checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "whole/checkpoints/step-00000015", tmp_path / "again/checkpoints/step-00000015")
    train.main(command(workplace, tmp_path / "again", **settings))
    assert all(torch.equal(t, tensors(tmp_path / "whole")[name]) for name, t in tensors(tmp_path / "again").items())


def test_grids_are_equal_on_all_processes_and_for_any_split(workplace, tmp_path):
    settings = {"steps": 8, "grid_update_steps": "[3, 6]", "micro_batch_size": 2, "eval_every": 8}
    train.main(command(workplace, tmp_path / "one", **settings))
    arguments = [str(tmp_path), *command(workplace, tmp_path / "two", **settings)]
    finish(launch(arguments, 2, "tests/rank_weights.py"))
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(tensor, ranks[1][name]) for name, tensor in ranks[0].items())
    for name, tensor in tensors(tmp_path / "one").items():
        torch.testing.assert_close(ranks[0][name], tensor, rtol=0, atol=1e-4)
    for key in ("loss", "val_loss", "out_of_grid"):
        assert lines(tmp_path / "two", key) == pytest.approx(lines(tmp_path / "one", key), abs=1e-4)


def test_a_schedule_for_a_model_without_grids_is_refused(workplace, tmp_path):
    with pytest.raises(ValueError, match="has no grids"):
        train.main(command(workplace, tmp_path, model="tiny_swiglu", grid_update_steps="[1]"))


# The best checkpoint


def test_the_best_checkpoint_is_kept_found_and_used(workplace, tmp_path, monkeypatch):
    """Validation losses as told: the best is neither the last nor among the newest, and found again on resume."""
    told = {5: 3.0, 10: 2.0, 15: 2.5, 20: 2.1, 25: 2.2}
    evaluate = train.Run.evaluate
    monkeypatch.setattr(train.Run, "evaluate", lambda run: evaluate(run) | {"val_loss": told[run.step]})
    arguments = command(
        workplace, tmp_path, steps=25, eval_every=5, save_every=5, keep_checkpoints=1, final_model="best"
    )
    step = train.Run.training_step

    def interrupt(run, index):
        if index == 17:
            signal.raise_signal(signal.SIGTERM)
        return step(run, index)

    monkeypatch.setattr(train.Run, "training_step", interrupt)
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000010", "step-00000018"]
    monkeypatch.setattr(train.Run, "training_step", step)
    results = train.main(arguments)
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000010", "step-00000025"]
    best = checkpoint.best(tmp_path / "checkpoints")
    assert best.name == "step-00000010"
    saved = tensors(tmp_path)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in load_file(best / "model.safetensors").items())
    assert not (tmp_path / "model/optimizer.safetensors").exists()
    assert (results["step"], results["val_loss"], results["best_step"]) == (10, 2.0, 10)
    assert "the weights of the best evaluation" in (tmp_path / "model/README.md").read_text()
    starts = [record for record in records(tmp_path) if record.get("event") == "start"]
    assert [start["step"] for start in starts] == [0, 18]
    assert all(start["world_size"] == 1 and start["torch"] == torch.__version__ for start in starts)


# Tracking and reports


def test_tensorboard_gets_the_numbers_of_the_log(workplace, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.main(command(workplace, tmp_path, tracker="tensorboard", steps=10))
    events = EventAccumulator(str(tmp_path / "tracker" / tmp_path.name)).Reload()
    for key in ("loss", "val_loss"):
        assert {event.step: event.value for event in events.Scalars(key)} == pytest.approx(lines(tmp_path, key))


def test_a_tracker_that_is_not_there_stops_the_run_before_it_starts(workplace, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"tracker = 'tensorbord' must be null or one .*tensorboard"):
        train.main(command(workplace, tmp_path / "run", tracker="tensorbord"))
    monkeypatch.setattr(metrics, "get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match="tracker wandb needs its package: pip install wandb"):
        train.main(command(workplace, tmp_path / "run", tracker="wandb"))
    assert not (tmp_path / "run").exists()


def test_the_report_of_a_run(straight):
    page = (straight[0] / "report.md").read_text()
    results = straight[1]
    for text in (f"{results['val_loss']:.4f}", f"{results['parameters']:,}", "| starts | 1 |", "(curves.png)"):
        assert text in page
    assert torch.__version__ in page
    assert (straight[0] / "curves.png").stat().st_size > 30_000


def test_the_report_of_several_runs_also_unfinished_ones(straight, tmp_path):
    running = tmp_path / "running"
    running.mkdir()
    shutil.copy(straight[0] / "settings.yaml", running)
    log = (straight[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
    warning = {"step": 9, "event": "warning", "alarm": "loss_spike", "message": "loss 9 is a spike"}
    (running / "metrics.jsonl").write_text("".join(log[:20]) + json.dumps(warning) + '\n{"step": 21, "lo')
    report.main([str(straight[0]), str(running), "--output", str(tmp_path / "both")])
    page = (tmp_path / "both/report.md").read_text()
    assert page.startswith("# straight and running")
    assert "| steps | 60 | 18 of 60 |" in page
    assert "- step 9: loss 9 is a spike" in page
    assert (tmp_path / "both/curves.png").stat().st_size > 30_000
    with pytest.raises(FileNotFoundError, match=r"holds no metrics\.jsonl"):
        report.main([str(tmp_path)])


def test_saved_bytes_are_those_of_the_activations():
    layer = torch.nn.Linear(8, 16)
    x = torch.randn(4, 8)
    with metrics.saved_bytes(layer) as kept:
        layer(x).sigmoid()
    assert kept == [4 * (4 * 8 + 4 * 16)]  # the input of one, the output of the other


def test_utilisation_where_the_device_is_known_and_where_not(monkeypatch):
    assert metrics.utilisation(None, 100.0, 1) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert metrics.utilisation(10**9, 989e3, 2) == {"model_flops_per_second": 989e12, "mfu": 0.5}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some other device")
    assert metrics.utilisation(10**9, 989e3, 2) == {"model_flops_per_second": 989e12}


# The demonstration


@pytest.mark.filterwarnings("ignore:constrained_layout not applied:UserWarning")  # three steps make no curve
@pytest.mark.usefixtures("forked")
def test_demo(tmp_path, monkeypatch, capsys):
    import demo
    import matplotlib.pyplot as plt

    (tmp_path / "demo.yaml").write_text(demo.SETTINGS.read_text() + "val_fraction: 0.01\n")
    monkeypatch.setattr(demo, "SETTINGS", tmp_path / "demo.yaml")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--steps", "3", "--output_dir", str(tmp_path / "demo")])
    with plt.rc_context():
        demo.main()
    plt.close("all")
    printed = capsys.readouterr().out
    assert printed.startswith(f"Python {sys.version_info.major}.{sys.version_info.minor}")
    results = json.loads((tmp_path / "demo/table.json").read_text())
    assert results["kan_fourier"]["parameters"] == pytest.approx(results["swiglu"]["parameters"], rel=0.01)
    for column in ("feed-forward parameters", "bits per byte", "tokens/s", "peak memory (MB)"):
        assert column in printed
    for picture in ("loss.png", "edges_kan_fourier.png"):
        assert (tmp_path / "demo" / picture).stat().st_size > 20_000


def test_evaluation_of_some_batches(workplace, tmp_path):
    """eval_batches counts what it read, spreads over the text, and is the whole of it where it asks for more."""
    results = {}
    for count in ("null", "3", "100000"):
        arguments = command(workplace, tmp_path / count, steps=2, eval_every=2, eval_batches=count)
        results[count] = train.main(arguments)
    assert results["100000"]["val_loss"] == results["null"]["val_loss"]
    assert results["3"]["val_loss"] != results["null"]["val_loss"]
    assert results["3"]["val_loss"] == pytest.approx(results["null"]["val_loss"], rel=0.05)
    ratios = [figures["val_bits_per_byte"] / figures["val_loss"] for figures in results.values()]
    assert ratios == pytest.approx([ratios[0]] * 3)
