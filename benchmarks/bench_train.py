"""What the training loop costs: train.py against its model's bare step, in turns in one run.

    python benchmarks/bench_train.py [--config configs/train/demo.yaml] [--rounds 15] [--steps 20] [--KEY VALUE ...]

KEY is any setting of train.py.

Both sides have the same model, the same optimizer and the same number of tokens in a step:

    loop    `Run.train` as a user runs it: batches from the token file, learning rate, gradient norm, the check of
            every loss, metrics.jsonl and the progress bar; no evaluation, no checkpoint
    bare    forward, backward, clipping, AdamW on one batch that lies on the device, and nothing else

A ratio is the median over rounds of loop's tokens/s over bare's; 1 means that the loop costs nothing.
"""

import argparse
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

import torch
from harness import RESULTS, ROOT, environment, header, markdown, quantile, ratio, side_by_side, summary, write_json
from harness import write as write_text

sys.path.insert(0, str(ROOT / "train"))

import settings as settings_module

import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/train/demo.yaml"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="of each side in a round")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options, overrides = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as folder:
        # Neither side evaluates or saves: no multiple of these is reached
        never = ["--steps", "1e9", "--eval_every", "1e9", "--save_every", "1e9", "--output_dir", f"{folder}/run"]
        settings = settings_module.parse([options.config, *overrides, *never])
        run = train.Run(settings)
        run.start()
        result = measure(run, options.rounds, options.steps)
        env = environment(
            run.device.type,
            dtype="fp32" if settings.precision == "no" else settings.precision,
            compile=settings.compile,
            model=Path(settings.model).stem,
            sequences=settings.batch_size,
            micro_batch=run.micro_batch,
            sequence_length=settings.sequence_length,
            steps=options.steps,
            rounds=options.rounds,
        )
    result = {"environment": env, **result}
    name = f"train_{run.device.type}"
    text = f"{header(env)}\n\n{table(result)}\n"
    print(text)
    write_text(options.output / f"{name}.md", text)
    write_json(options.output / f"{name}.json", result)
    print(result["ratio"])


def measure(run: train.Run, rounds: int, steps: int) -> dict:
    """Tokens/s of both sides and their ratio."""
    batches = list(run.micro_batches(run.batches, 0))
    tokens = sum(int((targets >= 0).sum()) for _, targets in batches)
    parameters = list(run.bare_model.parameters())

    def bare() -> None:
        for _ in range(steps):
            for inputs, targets in batches:
                train.token_loss(run.model, inputs, targets, tokens).backward()
            if run.settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, run.settings.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)

    def loop() -> None:
        run.train(run.step + steps)

    with open(Path(run.output) / "progress", "w") as stream, redirect_stderr(stream):
        times = side_by_side({"bare": bare, "loop": loop}, rounds, run.device.type)
    speeds = {name: [1e3 * steps * tokens / ms for ms in values] for name, values in times.items()}
    return {
        "tokens_a_step": tokens,
        "tokens_per_second": {name: summary(values) for name, values in speeds.items()},
        "ratio": ratio(speeds["loop"], speeds["bare"]),
        "ratio_q20_q80": [quantile([a / b for a, b in zip(speeds["loop"], speeds["bare"])], q) for q in (0.2, 0.8)],
        "milliseconds_a_step": {name: quantile(values, 0.5) / steps for name, values in times.items()},
    }


def table(result: dict) -> str:
    rows = []
    for name, speed in result["tokens_per_second"].items():
        low, high = result["ratio_q20_q80"]
        against = f"{result['ratio']:.3f}x ({low:.3f}-{high:.3f})" if name == "loop" else "1"
        cells = [f"{speed[key]:,.0f}" for key in ("median", "q20", "q80")]
        rows.append([name, *cells, f"{result['milliseconds_a_step'][name]:.2f}", against])
    return markdown(["side", "tokens/s", "q20", "q80", "ms a step", "of bare"], rows)


if __name__ == "__main__":
    main()
