"""Structured pruning: the smaller model against one whose other units are silent, and what units are worth."""

import copy
import json
from pathlib import Path

import pytest
import scripts
import torch
from numerics import assert_close, error
from tokenizer import byte_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from kansformer import KANLinear, KansformerConfig, KansformerForCausalLM
from kansformer.layers import EdgeLayer, FeedForward, FourierLinear
from kansformer.prune import (
    _stretch_inputs,
    choose_units,
    feed_forward_blocks,
    main,
    mean_loss,
    measure_units,
    remove_units,
)

ROOT = Path(__file__).parents[1]
FFN_TYPES = ("mlp", "swiglu", "kan_fourier", "kan", "kan_mix", "kan_gated")
H = 24
KEPT = [torch.tensor([0, 3, 4, 9, 20, 23]), torch.tensor([1, 2, 22])]


def tiny_model(ffn_type: str, **fields) -> KansformerForCausalLM:
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": H, "max_position_embeddings": 64}
    return KansformerForCausalLM(KansformerConfig(ffn_type=ffn_type, **sizes | fields)).eval()


def token_batches(count: int = 3) -> list[torch.Tensor]:
    return [torch.randint(256, (4, 32)) for _ in range(count)]


def test_blocks_without_units_to_prune_are_refused():
    class Bare(FeedForward):
        pass

    with pytest.raises(ValueError, match="Bare has no down_proj"):
        feed_forward_blocks(nn.Sequential(Bare()))


@torch.no_grad()
def silence(layer: nn.Linear | EdgeLayer, units: torch.Tensor) -> None:
    """Let inputs of a layer add nothing, by zeros."""
    if isinstance(layer, FourierLinear):
        for waves in layer.children():
            silence(waves, units)
        return
    for i in units.tolist():
        if isinstance(layer, KANLinear):
            layer.spline_weight[i * layer.num_basis : (i + 1) * layer.num_basis] = 0
            if layer.base_weight is not None:
                layer.base_weight[:, i] = 0
        else:
            layer.weight[:, i] = 0


def without(kept: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(set(range(H)) - set(kept.tolist())))


# The smaller model


@pytest.mark.parametrize(
    ("ffn_type", "base"), [*((kind, None) for kind in FFN_TYPES), *((kind, "silu") for kind in FFN_TYPES[3:])]
)
def test_removal_equals_silence(ffn_type, base):
    """Without a norm in the blocks the outputs are those of the model whose other units are silent."""
    options = {"ffn_norm": False, "base_activation": base} if ffn_type.startswith("kan") else {}
    model = tiny_model(ffn_type, **options)
    reference = copy.deepcopy(model)
    for block, kept in zip(feed_forward_blocks(reference), KEPT):
        silence(block.down_proj, without(kept))
    smaller = remove_units(model, KEPT, measure_units(model, token_batches()))
    tokens = torch.randint(256, (2, 40))
    assert smaller.config.intermediate_size == [6, 3]
    assert_close(smaller(tokens).logits, reference(tokens).logits, 1e-5, "logits")
    assert error(smaller(tokens).logits, model(tokens).logits) > 1e-2
    assert model.config.intermediate_size == H  # the model given is as it was
    assert smaller.parameter_counts()["feed_forward"] * H * 2 == model.parameter_counts()["feed_forward"] * 9


@pytest.mark.parametrize(
    ("ffn_type", "options"),
    [
        ("swiglu", {"gate_norm": True}),
        ("kan", {}),
        ("kan_mix", {"base_activation": "relu"}),
        ("kan_gated", {"base_activation": "identity", "spline_order": 3}),
        ("kan_gated", {}),
    ],
)
def test_removal_from_a_block_with_a_norm(ffn_type, options):
    """Values that are zero leave the others sqrt(H / kept) larger: `power` says so, and the stretch undoes it."""
    model = tiny_model(ffn_type, rms_norm_eps=1e-12, **options)
    for block, kept in zip(feed_forward_blocks(model), KEPT):
        silence(block.down_proj, without(kept))
        norm_input = block.gate_proj if hasattr(block, "gate_proj") else block.up_proj
        weight = norm_input.spline_weight.mT if isinstance(norm_input, KANLinear) else norm_input.weight
        with torch.no_grad():
            weight[without(kept)] = 0
    units = measure_units(model, token_batches())
    for u, kept in zip(units, KEPT):
        assert u.power.mean() == pytest.approx(1, rel=1e-6)
        assert u.power[kept].mean() == pytest.approx(H / len(kept), rel=1e-6)
    tokens = torch.randint(256, (2, 40))
    expected = model(tokens).logits
    assert_close(remove_units(model, KEPT, units)(tokens).logits, expected, 2e-5, "logits")
    assert error(remove_units(model, KEPT)(tokens).logits, expected) > 1e-2  # without the stretch


@pytest.mark.parametrize("base_activation", ["silu", "gelu"])
def test_stretch_of_a_smooth_base_term(base_activation):
    """The splines take up what a base term cannot: far better than leaving it."""
    layer = KANLinear(6, 5, grid_size=5, spline_order=3, base_activation=base_activation)
    x = torch.randn(300, 6).clamp(-1.8, 1.8)
    stretched = copy.deepcopy(layer)
    with torch.no_grad():
        _stretch_inputs(stretched, 1.1)
    assert error(stretched(x / 1.1), layer(x)) < 1e-3
    with torch.no_grad():
        assert error(layer(x / 1.1), layer(x)) > 5e-2


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_smaller_models_are_ordinary(ffn_type, tmp_path):
    model = tiny_model(ffn_type)
    batches = token_batches()
    units = measure_units(model, batches)
    for name, kept, sizes in (("list", KEPT, [6, 3]), ("one", [KEPT[0], KEPT[0] // 2], 6)):
        smaller = remove_units(model, kept, units)
        smaller.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert again.config.intermediate_size == sizes
        assert torch.equal(again(batches[0]).logits, smaller(batches[0]).logits)
        assert again.num_parameters() < model.num_parameters()
        rebuilt = [block.flops_per_token() for block in feed_forward_blocks(again)]
        assert rebuilt == [block.flops_per_token() for block in feed_forward_blocks(smaller)]
        again.train()(input_ids=batches[0], labels=batches[0]).loss.backward()
        assert all(p.grad is not None for p in again.parameters())
        assert again.eval().generate(batches[0][:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
    if ffn_type in FFN_TYPES[3:]:  # splines
        before = smaller(batches[0]).logits
        smaller.extend_grid(2 * smaller.config.grid_size)
        assert_close(smaller(batches[0]).logits, before, 1e-5, "logits on a finer grid")


def test_precision_and_frozen_parameters_stay():
    model = tiny_model("kan_gated").to(torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    smaller = remove_units(model, KEPT, measure_units(model, token_batches()))
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}
    assert smaller.model.layers[0].mlp.down_proj.grid.dtype == torch.float32
    assert [p.requires_grad for p in smaller.parameters()] == [p.requires_grad for p in model.parameters()]


# What units are worth


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_taylor_is_the_units_share_of_the_gradient(ffn_type):
    """E |u . dL/dy|, from the units' contributions written out one by one."""
    model, (batch,) = tiny_model(ffn_type), token_batches(1)
    found = measure_units(model, iter([batch]))
    blocks = feed_forward_blocks(model)
    inputs, gradients = {}, {}
    for block in blocks:
        block.down_proj.register_forward_pre_hook(lambda m, a, k: inputs.update({m: (a[0], k)}), with_kwargs=True)
        block.down_proj.register_full_backward_hook(lambda m, _, g: gradients.update({m: g[0]}))
    model(input_ids=batch, labels=batch).loss.mul(batch[:, 1:].numel()).backward()
    for block, units in zip(blocks, found):
        layer = block.down_proj
        x, options = inputs[layer]
        with torch.no_grad():
            for h in range(H):
                present = torch.zeros(H).index_fill_(0, torch.tensor(h), 1.0).expand_as(x)
                if isinstance(layer, EdgeLayer):
                    u = type(layer).forward(layer, x, gate=present * options.get("gate", 1))
                else:
                    u = nn.functional.linear(x * present, layer.weight)
                expected = (u * gradients[layer]).sum(-1).abs().mean().item()
                assert units.importance[h].item() == pytest.approx(expected, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_energy_is_the_units_mean_square(ffn_type):
    model, batches = tiny_model(ffn_type), token_batches()
    found = measure_units(model, batches, "energy")
    for block, units in zip(feed_forward_blocks(model), found):
        layer, total = block.down_proj, torch.zeros(H)
        seen = []
        hook = layer.register_forward_pre_hook(lambda m, a, k, seen=seen: seen.append((a[0], k)), with_kwargs=True)
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch)
            hook.remove()
            for x, options in seen:
                for h in range(H):
                    present = torch.zeros(H).index_fill_(0, torch.tensor(h), 1.0).expand_as(x)
                    if isinstance(layer, EdgeLayer):
                        u = layer(x, gate=present * options.get("gate", 1))
                    else:
                        u = layer(x * present)
                    total[h] += u.square().sum()
        assert_close(units.importance, total / sum(b.numel() for b in batches), 1e-5, "energy")


@pytest.mark.parametrize("criterion", ["taylor", "energy"])
@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_silent_units_go_first(ffn_type, criterion):
    model = tiny_model(ffn_type)
    silent = torch.tensor([2, 5, 6, 17])
    for block in feed_forward_blocks(model):
        silence(block.down_proj, silent)
    units = measure_units(model.train(), token_batches(), criterion)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    for kept in choose_units([u.importance for u in units], 4 / H):
        assert kept.tolist() == without(silent).tolist()


def test_choose_units():
    importance = [torch.tensor([5.0, 1.0, 4.0, 3.0, 2.0, 0.5]), torch.tensor([50.0, 0.1, 40.0, 30.0, 20.0, 10.0])]
    assert [k.tolist() for k in choose_units(importance, 0.5)] == [[0, 2, 3], [0, 2, 3]]
    assert [k.tolist() for k in choose_units(importance, 0.5, "global")] == [[0], [0, 2, 3, 4, 5]]
    assert [k.tolist() for k in choose_units(importance, 0.5, multiple_of=4)] == [[0, 2, 3, 4], [0, 2, 3, 4]]
    assert [len(k) for k in choose_units(importance, 0.99, "global")] == [1, 1]  # a block keeps a unit
    assert [k.tolist() for k in choose_units(importance, 0.0)] == [list(range(6))] * 2
    dead = [torch.tensor([1.0, 1, 1, 0, 0, 0]), torch.tensor([3.0, 0, 2, 2])]
    assert [k.tolist() for k in choose_units(dead, 0.5, "global")] == [[0, 1], [0, 2, 3]]  # ties too
    assert [k.tolist() for k in choose_units(dead[:1], 0.2, "global")] == [[0, 1, 2, 3, 4]]
    for share in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match=f"share is {share}"):
            choose_units(importance, share)
    with pytest.raises(ValueError, match="scope is 'layer'; choose one of uniform, global"):
        choose_units(importance, 0.1, "layer")
    assert choose_units([], 0.5, "global") == []
    with pytest.raises(ValueError, match="NaN or infinite"):
        choose_units([torch.tensor([1.0, float("nan")])], 0.1)


def test_what_cannot_be_pruned_is_refused():
    model = tiny_model("mlp")
    with pytest.raises(ValueError, match="criterion is 'magnitude'; choose one of taylor, energy"):
        measure_units(model, token_batches(), "magnitude")
    with pytest.raises(ValueError, match="no feed-forward blocks"):
        measure_units(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="got no text"):
        measure_units(model, [])
    with pytest.raises(ValueError, match="kept has 1 entries, the model 2 blocks"):
        remove_units(model, KEPT[:1])
    for bad in ([], [H], [-1], [3, 3]):
        with pytest.raises(ValueError, match=r"kept\[1\] must hold distinct units of 0 .. 23"):
            remove_units(model, [KEPT[0], torch.tensor(bad, dtype=torch.long)])


@pytest.mark.parametrize("ffn_type", ["swiglu", "kan_gated"])
def test_a_trained_model_keeps_what_it_knows(ffn_type):
    """The measured units beat chance, and chance beats the opposite choice."""
    text = torch.tensor(list((ROOT / "train/tinyshakespeare.txt").read_bytes()[:60_000]))
    torch.manual_seed(0)
    model = tiny_model(ffn_type, intermediate_size=96).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        batch = text[torch.randint(50_000, (16, 1)) + torch.arange(48)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    held_out = list(text[50_000:].unfold(0, 48, 48).split(32))
    units = measure_units(model, [text[:20_000].unfold(0, 48, 48)])
    full = mean_loss(model, held_out)
    assert full < 3.0

    def rise(scores: list[torch.Tensor]) -> float:
        return mean_loss(remove_units(model, choose_units(scores, 0.4), units), held_out) - full

    measured = rise([u.importance for u in units])
    chance = sum(rise([torch.rand(96) for _ in units]) for _ in range(3)) / 3
    opposite = rise([-u.importance for u in units])
    assert measured < 0.75 * chance
    assert chance < opposite


def test_bench_prune(tmp_path):
    """The benchmark runs end to end, at sizes that measure nothing."""
    for name in ("kan_gated", "swiglu"):
        tiny_model(name).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    models = [str(tmp_path / name) for name in ("kan_gated", "swiglu")]
    small = ["--shares", "0.5", "--finetuned_shares", "0.5", "--finetune_steps", "2", "--probes", "2"]
    small += ["--measure_tokens", "1024", "--held_out_tokens", "512", "--sequence_length", "32"]
    run = scripts.run("benchmarks/bench_prune.py", "--models", *models, *small, "--output", tmp_path)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "prune.json").read_text())
    assert json.loads(run.stdout.splitlines()[-1]) == {m["name"]: m["loss"] for m in result["models"]}
    for m in result["models"]:
        whole, half = m["curve"]
        assert whole["loss"] == pytest.approx(m["loss"], rel=1e-6)
        assert half["sizes"] == H // 2
        assert half["parameters"] < whole["parameters"]
        assert {"taylor", "energy", "magnitude", "chance"} == {row["criterion"] for row in m["criteria"]}
    grids = {row["grid_size"]: row for row in result["models"][0]["grids"]}
    assert result["models"][1]["grids"] == []
    assert grids[6]["loss"] == pytest.approx(grids[3]["loss"], rel=1e-5)  # finer, the same function
    assert grids[1]["parameters"] < grids[3]["parameters"] < grids[6]["parameters"]
    assert (tmp_path / "prune.png").stat().st_size > 10_000
    assert result["environment"]["commit"] in (tmp_path / "prune.md").read_text()


# The command


def test_command(tmp_path, capsys):
    model = tiny_model("kan_gated")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("What light through yonder window breaks?\n" * 60)
    arguments = [str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--sequence_length", "32"]
    output = tmp_path / "smaller"
    main([*arguments, "--share", "0.4", "--output", str(output)])
    printed = capsys.readouterr().out
    assert "hidden units: 24 -> 16" in printed  # 14.4, to a multiple of 8
    smaller = AutoModelForCausalLM.from_pretrained(output)
    assert f"{model.num_parameters():,} -> {smaller.num_parameters():,}" in printed
    assert smaller.config.intermediate_size == 16
    assert (output / "tokenizer.json").is_file()
    assert not (tmp_path / "smaller.part").exists()
    for bad, message in {
        ("--share", "0.4", "--output", str(output)): "exists: name a new folder",
        ("--share", "1.0", "--output", str(tmp_path / "other")): "share is 1.0",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *bad])
        assert message in str(stop.value)
    assert not (tmp_path / "other").exists()


def test_command_says_what_it_needs(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "required: model, --text, --share, --output" in capsys.readouterr().err


def test_units_that_multiply_the_input_stay():
    model = tiny_model("kan_gated", project_value=False)
    with pytest.raises(ValueError, match=r"project_value is False: unit h multiplies x\[h mod d\]"):
        remove_units(model, KEPT)
