"""Muon: what it does to a matrix, to a KAN layer's coefficients, to what it leaves alone; on two processes, resumed."""

import optimizer
import pytest
import torch
import training
from accelerate.state import AcceleratorState
from settings import Settings
from test_recovery import fsdp2_environment, start_from
from training import ROOT, assert_same_run, finish, launch, lines

import train
from kansformer import KansformerConfig, KansformerForCausalLM


def tiny(**fields) -> KansformerForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes["intermediate_size"] = 24
    return KansformerForCausalLM(KansformerConfig(**sizes, **fields))


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)], ids=str)
def test_singular_values_are_brought_together(shape):
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(optimizer.orthogonalise(matrix))
    assert (values > 0.65).all()
    assert (values < 1.28).all()
    assert not (torch.linalg.svdvals(matrix) / torch.linalg.svdvals(matrix)[0] > 0.65).all()  # they were not before


def test_coefficients_are_orthogonalised_function_by_function():
    coefficients = torch.randn(20 * 4, 32) * torch.tensor([1.0, 0.1, 5.0, 0.0]).repeat(20)[:, None]
    done = optimizer.orthogonalise(coefficients, functions=4)
    for c in range(4):
        torch.testing.assert_close(done[c::4], optimizer.orthogonalise(coefficients[c::4].contiguous()))
    assert (done[3::4] == 0).all()


def test_one_step_is_torchs_own_for_a_matrix_and_adamw_for_the_rest():
    """torch.optim.Muon orthogonalises in bfloat16, whose rounding of small singular values five steps magnify."""
    settings = Settings(optimizer="muon", learning_rate=1e-2, weight_decay=0.2)
    ours = tiny(ffn_type="swiglu", tie_word_embeddings=False)
    theirs = tiny(ffn_type="swiglu", tie_word_embeddings=False)
    theirs.load_state_dict(ours.state_dict())
    hidden = [name for name, p in ours.named_parameters() if p.ndim == 2 and "_proj" in name]
    plain = [name for name, _ in ours.named_parameters() if name not in hidden]
    assert {"lm_head.weight", "model.embed_tokens.weight"} < set(plain)
    parameters = dict(theirs.named_parameters())
    muon = torch.optim.Muon(
        [parameters[n] for n in hidden], lr=1e-2, weight_decay=0.2, adjust_lr_fn="match_rms_adamw", momentum=0.95
    )
    adamw = torch.optim.AdamW(
        [{"params": [parameters[n]], "weight_decay": 0.2 if n == "lm_head.weight" else 0.0} for n in plain],
        lr=1e-2, betas=(settings.beta1, settings.beta2),
    )  # fmt: skip
    both = optimizer.optimizer(ours, settings)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for _ in range(2):
        tokens = torch.randint(64, (4, 16))
        ours(input_ids=tokens, labels=tokens).loss.backward()
        for name, p in ours.named_parameters():
            parameters[name].grad = p.grad.clone()
        both.step(), both.zero_grad()
        muon.step(), adamw.step(), muon.zero_grad(), adamw.zero_grad()
    for name, p in ours.named_parameters():
        moved, wanted = p - before[name], parameters[name] - before[name]
        assert (moved - wanted).norm() < (0.05 if name in hidden else 1e-6) * wanted.norm(), name
        assert wanted.norm() > 0
    assert all(
        state.keys() == {"momentum_buffer"} for p, state in both.state.items() if p.ndim == 2 and p.shape[0] != 64
    )


def test_groups_know_the_functions_of_a_layer():
    model = tiny(ffn_type="kan", grid_size=5, base_activation="silu", tie_word_embeddings=False)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer.parameter_groups(model, Settings())
    functions = {names[id(p)]: group["functions"] for group in groups for p in group["params"]}
    assert functions.keys() == set(names.values())
    assert functions["model.layers.0.mlp.down_proj.spline_weight"] == 6
    assert functions["model.layers.0.mlp.down_proj.base_weight"] == 1
    assert functions["model.layers.0.self_attn.q_proj.weight"] == 1
    assert functions["lm_head.weight"] == functions["model.embed_tokens.weight"] == functions["model.norm.weight"] == 0


def test_nothing_moves_where_a_gradient_is_not_finite():
    model = tiny(ffn_type="kan_gated")
    muon = optimizer.optimizer(model, Settings(optimizer="muon"))
    muon.found_inf = torch.zeros(())
    tokens = torch.randint(64, (4, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    muon.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    momenta = [state["momentum_buffer"].clone() for state in muon.state.values() if "momentum_buffer" in state]
    assert momenta
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    muon.found_inf.fill_(1)
    muon.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    after = [state["momentum_buffer"] for state in muon.state.values() if "momentum_buffer" in state]
    assert all(map(torch.equal, momenta, after))


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="optimizer = 'sgd' must be one of adamw, muon"):
        Settings(optimizer="sgd")


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_shards(tmp_path):
    """Cubic edges, as in test_recovery: rounding must not be magnified by a hat's kinks."""
    (tmp_path / "text.txt").write_text((ROOT / "train/tinyshakespeare.txt").read_text()[:12_000])

    def command(output, **settings):
        fixed = {"model.spline_order": 3, "optimizer": "muon", "steps": 20, "save_every": 10, "keep_checkpoints": 9}
        return training.command(tmp_path, output, **fixed, **settings)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    straight, again, sharded = (tmp_path / name for name in ("straight", "again", "sharded"))
    try:
        train.main(command(straight))
        AcceleratorState._reset_state(reset_partial_state=True)
        start_from(straight, 10, again)
        train.main(command(again))
        assert_same_run(straight, again)
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
    losses = lines(straight, "loss")
    assert losses[20] < losses[1] - 0.5
    environment = fsdp2_environment() | {"ACCELERATE_TORCH_DEVICE": "cpu"}
    out, _ = finish(launch(command(sharded), 2, "tests/fsdp_on_cpu.py", **environment))
    assert "2 process(es) (FSDP) on cpu" in out
    assert lines(sharded, "loss") == pytest.approx(losses, abs=1e-4)
