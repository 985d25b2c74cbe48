"""Forgetting: what training on new data costs on the old, KAN against MLP.

    python benchmarks/claims/forgetting.py

(a) Five Gaussian peaks on [-1, 1], shown one after another (arXiv:2404.19756, section 3.5; as in pykan's tutorial,
y = sum_i exp(-300 (x - c_i)^2), 100 samples a peak, KAN [1, 1] with G = 200 and no base term). Beside it: the same with
its base term, and deeper KANs, where an edge of the second layer serves every region; and MLPs of equal parameters.

(b) Two corpora of bytes in sequence, Shakespeare, then Python source (this repository's), by transformers that differ
in the feed-forward block alone, at equal parameters. Each block's learning rate is the best of three on Shakespeare;
forgetting is the rise of the validation loss on Shakespeare while Python is learned.

Both optimisers run for each network of (a), and the run that remembers best is its row.
"""

import functools
import math
from pathlib import Path

import numpy as np
import torch
from claim import (
    COLOURS,
    ROOT,
    arguments,
    count,
    criterion,
    environment,
    markdown,
    minimise,
    mlp,
    publish,
    pyplot,
    rmse,
    width_for,
)
from torch import Tensor, nn

from kansformer import KansformerConfig, KansformerForCausalLM
from kansformer.kan import KAN
from kansformer.layers import match_intermediate_size

PEAKS = 5
ARTICLE, DEEP, DENSE = "KAN [1, 1]", "KAN [1, 5, 1]", "MLP"
BLOCKS = {  # KAN blocks in the article's form (cubic, silu base term) and in this repository's
    "mlp": {"ffn_type": "mlp"},
    "swiglu": {"ffn_type": "swiglu"},
    "kan": {"ffn_type": "kan", "grid_size": 5, "spline_order": 3, "base_activation": "silu"},
    "kan_gated": {"ffn_type": "kan_gated"},
}
HIDDEN = 64
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
BLOCK_COLOURS = {"mlp": "#1d4ed8", "swiglu": "#60a5fa", "kan": "#c2410c", "kan_gated": "#f59e0b"}


def main() -> None:
    options = arguments(__doc__).parse_args()
    quick = options.quick
    grid, peak_steps, steps, seeds = (50, 20, 4, 1) if quick else (200, 400, 250, 3)
    rates = LEARNING_RATES[1:2] if quick else LEARNING_RATES
    peaks = peak_rows(grid, peak_steps, seeds)
    language = language_rows(steps, seeds, rates)
    settings = {"seeds": seeds, "peak_steps": peak_steps, "language_steps": steps}
    env = environment("cpu", dtype="float64 (peaks), float32 (language)", **settings)

    by_name = {r["network"]: r for r in peaks}
    article, deep = by_name[ARTICLE], by_name[DEEP]
    dense = min((r for r in peaks if r["network"].startswith(DENSE)), key=lambda r: r["kept"])
    forgets = {name: means(language, name) for name in BLOCKS}
    # Two standard errors of the difference, over seeds.
    gap, noise = difference(language, "mlp", "kan")
    gated_gap, gated_noise = difference(language, "swiglu", "kan_gated")
    criteria = [
        criterion(
            "peaks: the article's KAN [1, 1] keeps the earlier peaks (RMSE <= 0.02)",
            article["kept"],
            article["kept"] <= 0.02,
        ),
        criterion(
            "peaks: the best MLP of equal parameters does not (RMSE >= 10x the KAN's)",
            dense["kept"] / article["kept"],
            dense["kept"] >= 10 * article["kept"],
        ),
        criterion("peaks: a KAN of two layers keeps them too (RMSE <= 0.02)", deep["kept"], deep["kept"] <= 0.02),
        criterion(
            "language: kan forgets less than mlp, beyond two standard errors (nats)", gap, gap > noise, "{:+.3f}"
        ),
        criterion(
            "language: kan_gated forgets less than swiglu, beyond two standard errors (nats)",
            gated_gap,
            gated_gap > gated_noise,
            "{:+.3f}",
        ),
    ]
    ours = (
        f"Peaks: RMSE on the earlier regions at the end is {article['kept']:.1e} for the article's KAN, "
        f"{deep['kept']:.1e} for one of two layers, {dense['kept']:.1e} for the best MLP. Language: after Python, "
        f"Shakespeare costs "
        + ", ".join(f"{f['forgotten']:+.2f} ({name})" for name, f in forgets.items())
        + " nats a byte more than before."
    )
    publish(
        options,
        "forgetting",
        title="Forgetting: a KAN keeps what it learned, an MLP does not",
        paper="KAN: five peaks kept, only the region of new data changes; MLP: all earlier peaks lost (no number)",
        ours=ours,
        criteria=criteria,
        environment=env,
        tables=f"{peaks_table(peaks)}\n\n{language_table(language)}",
        data={"peaks": peaks, "language": language},
        figure=draw(peaks, language),
    )


def target(x: Tensor) -> Tensor:
    return sum((-300 * (x - c) ** 2).exp() for c in centres())


def centres() -> list[float]:
    return [2 / PEAKS * (i - PEAKS / 2 + 0.5) for i in range(PEAKS)]


def region(i: int, points: int) -> Tensor:
    lo, hi = -1 + 2 / PEAKS * i, -1 + 2 / PEAKS * (i + 1)
    return torch.linspace(lo, hi, points, dtype=torch.float64).unsqueeze(-1)


def networks(grid: int, seed: int) -> dict[str, nn.Module]:
    """The article's KAN (no base term, as in pykan's tutorial), others, and MLPs of its number of parameters."""
    options = {"grid_size": grid, "seed": seed, "dtype": torch.float64}
    kan = KAN([1, 1], base_activation=None, **options)
    size = count(kan)
    found: dict[str, nn.Module] = {ARTICLE: kan, "KAN [1, 1], base": KAN([1, 1], **options)}
    for width in (2, 5):  # with the same number of parameters: a coarser grid on more edges
        coarse = max(3, size // (2 * width) - 4)
        found[f"KAN [1, {width}, 1]"] = KAN([1, width, 1], **options | {"grid_size": coarse})
    for layers in (1, 2, 3):
        width = width_for(size, 1, 1, layers)
        for activation in ("tanh", "silu"):
            found[f"{DENSE} {layers} x {width}, {activation}"] = mlp([1] + [width] * layers + [1], activation, seed)
    return found


def peak_rows(grid: int, steps: int, seeds: int) -> list[dict]:
    """Medians over seeds, the better optimiser of each network."""
    rows = []
    for name in networks(grid, 0):
        runs = {
            o: [learn_peaks(networks(grid, seed)[name], o, steps) for seed in range(seeds)] for o in ("lbfgs", "adam")
        }
        options = [median(name, o, own) for o, own in runs.items()]
        # A network that never learned a peak forgets nothing: what counts is the error at the end over all regions.
        rows.append(min(options, key=lambda r: r["final"]))
    return rows


def learn_peaks(network: nn.Module, optimizer: str, steps: int) -> dict:
    """Learn region after region; errors[phase][region], and the curve at the end of each phase."""
    everywhere = torch.linspace(-1, 1, 401, dtype=torch.float64).unsqueeze(-1)
    if isinstance(network, KAN):
        network.update_grid(everywhere)
    errors, curves = [], []
    for phase in range(PEAKS):
        x = region(phase, 100)
        y = target(x)
        minimise(functools.partial(_loss, network, x, y), network.parameters(), optimizer, steps)
        with torch.no_grad():
            errors.append([rmse(network(region(i, 200)), target(region(i, 200))) for i in range(PEAKS)])
            curves.append(network(everywhere).squeeze(-1).tolist())
    return {"errors": errors, "curves": curves, "parameters": count(network)}


def _loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (network(x) - y).square().mean()


def median(name: str, optimizer: str, runs: list[dict]) -> dict:
    errors = torch.tensor([r["errors"] for r in runs], dtype=torch.float64)  # (seeds, phases, regions)
    return {
        "network": name,
        "optimizer": optimizer,
        "parameters": runs[0]["parameters"],
        "learned": errors.diagonal(dim1=1, dim2=2).square().mean(1).sqrt().median().item(),
        "kept": errors[:, -1, :-1].square().mean(1).sqrt().median().item(),
        "final": errors[:, -1].square().mean(1).sqrt().median().item(),
        "errors": errors.median(0).values.tolist(),
        "curves": runs[0]["curves"],
    }


def corpora() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Bytes for training and, the last tenth, for validation."""
    source = sorted(p for folder in ("kansformer", "train", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
    texts = {
        "Shakespeare": (ROOT / "train" / "tinyshakespeare.txt").read_bytes(),
        "Python": b"\n".join(Path(p).read_bytes() for p in source),
    }
    arrays = {name: np.frombuffer(text, np.uint8).astype(np.int64) for name, text in texts.items()}
    return {name: (a[: len(a) * 9 // 10], a[len(a) * 9 // 10 :]) for name, a in arrays.items()}


def language_rows(steps: int, seeds: int, rates: tuple[float, ...]) -> list[dict]:
    data = corpora()
    rows = []
    for name in BLOCKS:
        # Tuned on the first corpus, seed 0, before anything is forgotten.
        trials = {lr: train(build(name, 0), data["Shakespeare"], steps, lr, seed=0) for lr in rates}
        lr = min(trials, key=lambda lr: trials[lr][1])
        for seed in range(seeds):
            model = trials[lr][0] if seed == 0 else train(build(name, seed), data["Shakespeare"], steps, lr, seed)[0]
            before = {c: validate(model, data[c][1]) for c in data}
            train(model, data["Python"], steps, lr, seed + 100)
            after = {c: validate(model, data[c][1]) for c in data}
            rows.append(
                {"block": name, "seed": seed, "lr": lr, "parameters": count(model), "before": before, "after": after}
                | {"forgotten": after["Shakespeare"] - before["Shakespeare"]}
            )
    return rows


def build(name: str, seed: int) -> KansformerForCausalLM:
    options = dict(BLOCKS[name])
    kind = options.pop("ffn_type")
    # The exact match: rounded to a multiple of 8, as the configuration would, blocks of this size differ by a tenth.
    size = match_intermediate_size(kind, HIDDEN, reference="mlp", multiple_of=1, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = KansformerConfig(
            vocab_size=256,
            hidden_size=HIDDEN,
            intermediate_size=size,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            **BLOCKS[name],
        )
        return KansformerForCausalLM(config)


def train(
    model: KansformerForCausalLM, corpus: tuple[np.ndarray, np.ndarray], steps: int, lr: float, seed: int
) -> tuple[KansformerForCausalLM, float]:
    """AdamW on 32 windows of 64 bytes a step, a tenth of warm-up, then a cosine to a tenth."""
    text, generator = corpus[0], np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, steps // 10)

    def scale(step: int) -> float:
        done = (step - warm) / max(1, steps - warm)
        return (step + 1) / warm if step < warm else 0.55 + 0.45 * math.cos(math.pi * done)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    for _ in range(steps):
        loss = windows_loss(model, text, generator.integers(0, len(text) - 65, 32))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model, validate(model, corpus[1])


def windows_loss(model: KansformerForCausalLM, text: np.ndarray, starts: np.ndarray) -> Tensor:
    ids = torch.from_numpy(np.stack([text[s : s + 65] for s in starts]))
    return model(input_ids=ids, labels=ids).loss


@torch.no_grad()
def validate(model: KansformerForCausalLM, text: np.ndarray, batches: int = 8) -> float:
    """Nats a byte over evenly spaced windows."""
    model.eval()
    starts = np.linspace(0, len(text) - 66, 32 * batches).astype(int).reshape(batches, 32)
    return sum(windows_loss(model, text, s).item() for s in starts) / batches


def means(rows: list[dict], name: str) -> dict:
    own = [r for r in rows if r["block"] == name]
    values = torch.tensor(
        [[r["before"]["Shakespeare"], r["after"]["Shakespeare"], r["after"]["Python"], r["forgotten"]] for r in own],
        dtype=torch.float64,
    )
    mean, spread = values.mean(0).tolist(), values.std(0, correction=len(own) > 1).tolist()
    fields = ("before", "after", "new", "forgotten")
    return dict(zip(fields, mean)) | {f"{f}_std": s for f, s in zip(fields, spread)} | {"lr": own[0]["lr"]}


def difference(rows: list[dict], dense: str, kan: str) -> tuple[float, float]:
    """How much more `dense` forgets than `kan`, and two standard errors of that."""
    a, b = ([r["forgotten"] for r in rows if r["block"] == name] for name in (dense, kan))
    error = math.sqrt((np.var(a, ddof=len(a) > 1) + np.var(b, ddof=len(b) > 1)) / len(a))
    return float(np.mean(a) - np.mean(b)), 2 * error


def peaks_table(rows: list[dict]) -> str:
    errors = ["RMSE when learned", "earlier peaks at end", "all at end"]
    columns = ["five peaks, one after another", "parameters", "optimizer", *errors]
    return markdown(
        columns,
        [
            [r["network"], r["parameters"], r["optimizer"]] + [f"{r[k]:.1e}" for k in ("learned", "kept", "final")]
            for r in rows
        ],
    )


def language_table(rows: list[dict]) -> str:
    losses = ["Shakespeare before", "after", "forgotten", "Python after"]
    columns = ["Shakespeare, then Python", "parameters", "lr", *losses]
    cells = []
    for name in dict.fromkeys(r["block"] for r in rows):
        m = means(rows, name)
        parameters = next(r["parameters"] for r in rows if r["block"] == name)
        cells.append(
            [name, f"{parameters:,}", m["lr"]]
            + [f"{m[k]:.3f} ± {m[k + '_std']:.3f}" for k in ("before", "after", "forgotten", "new")]
        )
    return f"Nats a byte, mean and standard deviation over seeds:\n\n{markdown(columns, cells)}"


def draw(peaks: list[dict], language: list[dict]):
    plt = pyplot()
    figure = plt.figure(figsize=(11, 6.4))
    grid = figure.add_gridspec(4, PEAKS + 3)
    dense = min((r for r in peaks if r["network"].startswith(DENSE)), key=lambda r: r["final"])
    x = torch.linspace(-1, 1, 401, dtype=torch.float64)
    y = target(x)
    shown = [next(r for r in peaks if r["network"] == n) for n in (ARTICLE, "KAN [1, 1], base", DEEP)] + [dense]
    for i, row in enumerate(shown):
        for phase in range(PEAKS):
            axis = figure.add_subplot(grid[i, phase])
            axis.axvspan(-1 + 0.4 * phase, -0.6 + 0.4 * phase, color="#f3f4f6", linewidth=0)
            axis.plot(x, y, color=COLOURS["faint"], linewidth=2.5)
            axis.plot(x, row["curves"][phase], color=COLOURS[row["network"][:3].lower()], linewidth=1.1)
            axis.set(ylim=(-0.6, 1.4), xlim=(-1, 1), xticks=[], yticks=[])
            if i == 0:
                axis.set_title(f"phase {phase + 1}")
            if phase == 0:
                name, _, variant = row["network"].rpartition(", ")
                axis.set_ylabel(f"{name}\n{variant}" if variant.isalpha() else row["network"], fontsize=8)
    bars = figure.add_subplot(grid[:, PEAKS:])
    names = list(dict.fromkeys(r["block"] for r in language))
    for name in names:
        m = means(language, name)
        bars.errorbar(
            m["new"], m["forgotten"], xerr=m["new_std"], yerr=m["forgotten_std"], fmt="o",
            color=BLOCK_COLOURS[name], capsize=3,
        )  # fmt: skip
        bars.annotate(name, (m["new"], m["forgotten"]), (7, 7), textcoords="offset points", color=BLOCK_COLOURS[name])
    bars.margins(0.25)
    bars.set(xlabel="loss on Python after learning it (nats a byte)", ylabel="Shakespeare forgotten (nats a byte)")
    bars.set_title("Two corpora in sequence: mean, std over seeds")
    return figure


if __name__ == "__main__":
    main()
