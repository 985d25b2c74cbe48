"""Train a causal language model: one yaml a run, any number of processes, killed and resumed at will.

    python train/train.py configs/train/demo.yaml --learning_rate 1e-3 --model.ffn_type swiglu
    torchrun --nproc_per_node 2 train/train.py configs/train/demo.yaml --device cpu
    accelerate launch --config_file configs/accelerate/fsdp2.yaml train/train.py configs/train/125m.yaml

`--help` lists the settings. The output folder gets

    settings.yaml    what was asked, completed with the defaults
    metrics.jsonl    one line a logged step or evaluation
    checkpoints/     the newest few; the same command goes on from the newest whole one
    model/           the trained model, its tokenizer and its card, for `from_pretrained`
    results.json     the figures of the end

Everything but weights and optimizer moments is a function of (settings, step): data, learning rate, random numbers.
So a run that was killed and resumed ends with the weights of one that was not.

Exit codes: 0 done; 75 stopped by SIGTERM, SIGINT or max_minutes with a checkpoint to go on from; 1 an error.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))

import checkpoint
import settings as settings_module
from data import Batches, Corpus, load_tokenizer, prepare
from report import model_card, peak_memory, trim_metrics, utilisation
from settings import FREE_KEYS, Settings

import kansformer  # noqa: F401 (registers the model with the Auto classes)

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again


def main(arguments: list[str]) -> dict:
    """One run, top to bottom. Returns the figures that `results.json` holds."""
    settings = settings_module.parse(arguments)
    transformers.utils.logging.disable_progress_bar()  # one bar: the run's
    output = Path(settings.output_dir)
    checkpoints = output / "checkpoints"

    # Processes and device
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=on_cpu, mixed_precision=settings.precision, dynamo_backend="inductor" if settings.compile else None
    )
    main_process, world, rank = accelerator.is_main_process, accelerator.num_processes, accelerator.process_index
    check_world(settings, world)
    micro_batch, accumulation = batch_split(settings, world)

    # Text
    corpus = Corpus(
        settings.data, settings.text_column, settings.val_split, settings.val_fraction, settings.max_documents
    )
    tokenizer = load_tokenizer(settings.tokenizer, settings.sequence_length, corpus, settings.cache_dir, progress=True)
    config = settings_module.model_config(settings, tokenizer)
    verify = settings.verify_data and accelerator.is_local_main_process
    train_file, val_file = prepare(corpus, tokenizer, settings.cache_dir, verify=verify, progress=True)
    train = Batches(train_file, settings.sequence_length, settings.batch_size, settings.seed)
    validation = Batches(val_file, settings.sequence_length, settings.batch_size)
    # What must be the same in a run that goes on: settings, model and text
    identity = dataclasses.asdict(settings) | {"tokens": train_file.folder.name}
    identity |= {f"model.{key}": value for key, value in config.to_diff_dict().items() if key != "transformers_version"}

    # Model and optimizer, from the newest checkpoint or from the seed
    resumed = checkpoint.newest(checkpoints, accelerator.print)
    start = 0
    set_seed(settings.seed)
    if resumed is None:
        model = AutoModelForCausalLM.from_config(config)
    else:
        state = checkpoint.read_state(resumed)
        start = state["step"]
        check_resume(settings.resume, identity, state["identity"], resumed)
        model, loading = AutoModelForCausalLM.from_pretrained(resumed, dtype=torch.float32, output_loading_info=True)
        assert not loading["missing_keys"], f"{resumed} lacks {loading['missing_keys']}"
    if settings.gradient_checkpointing:
        # transformers 5.2x renames it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    parameter_count = sum(p.numel() for p in model.parameters())
    flops_per_token = model.flops_per_token(settings.sequence_length) if hasattr(model, "flops_per_token") else None
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings), lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    bare_model = accelerator.unwrap_model(model, keep_torch_compile=False)
    if resumed is not None:
        checkpoint.load_optimizer(resumed, bare_model, optimizer)

    accelerator.print(
        f"{world} process(es) ({accelerator.distributed_type.value}) on {accelerator.device}, precision "
        f"{settings.precision}, batch {settings.batch_size} = {micro_batch} x {accumulation} accumulated x {world}\n"
        f"{config.model_type}: {parameter_count:,} parameters; text: {len(train_file):,} training and "
        f"{len(val_file):,} validation tokens, an epoch is {train.num_windows / settings.batch_size:.0f} steps\n"
        f"from step {start} to {settings.steps}"
        + (f" ({resumed})" if resumed else "")
        + (f"; all of it warm-up, of {settings.warmup_steps}" if settings.warmup_steps >= settings.steps else "")
    )
    if main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / "settings.yaml").write_text(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
        trim_metrics(output / "metrics.jsonl", start)

    def micro_batches(batches: Batches, step: int):
        """This process's share of a global batch, as (inputs, targets) on the device."""
        for index in range(accumulation):
            row = (index * world + rank) * micro_batch
            arrays = batches.rows(step, row, row + micro_batch)
            yield [torch.from_numpy(array).to(accelerator.device, non_blocking=True) for array in arrays]

    def log(**values) -> None:
        if main_process:
            with open(output / "metrics.jsonl", "a") as stream:
                stream.write(json.dumps(values) + "\n")

    def save(step: int) -> None:
        keep = settings.keep_checkpoints
        checkpoint.save(accelerator, bare_model, optimizer, tokenizer, checkpoints, step, identity, keep)

    @torch.no_grad()
    def evaluate() -> dict:
        """Every target of the validation text once: nats a token, bits a byte; the share of inputs off the grids."""
        model.eval()
        nats = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        for step in range(math.ceil(validation.num_windows / settings.batch_size)):
            for inputs, targets in micro_batches(validation, step):
                nats[0] += token_loss(model, inputs, targets, 1)
                nats[1] += (targets >= 0).sum()
        total, count = accelerator.reduce(nats).tolist()
        assert count == validation.num_targets, f"{count} targets evaluated, {validation.num_targets} in the text"
        figures = {"val_loss": total / count, "val_bits_per_byte": bits_per_byte(total, val_file.num_bytes)}
        if hasattr(bare_model, "out_of_grid_fraction"):
            fractions = bare_model.out_of_grid_fraction(input_ids=next(micro_batches(validation, 0))[0])
            if fractions:
                shares = torch.stack(list(fractions.values())).float()
                figures |= {"out_of_grid": shares.mean().item(), "out_of_grid_worst": shares.max().item()}
        model.train()
        return figures

    # The run
    model.train()
    figures: dict = {}
    busy_seconds, busy_tokens, deadline = 0.0, 0, time.monotonic() + 60 * (settings.max_minutes or math.inf)
    run_seconds, run_tokens = 0.0, 0
    progress = tqdm(total=settings.steps, initial=start, disable=not main_process, desc=output.name, unit="step")
    with stop_signals() as stop, progress:
        for step in range(start, settings.steps):
            started = time.perf_counter()
            set_seed((settings.seed * 1_000_003 + step * world + rank) % 2**32)
            lr = learning_rate(settings, step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_ratio"]

            # Gradient of the mean over all targets of the global batch: the sum of every share over their number
            num_targets = int(train.target_counts(step).sum())
            loss = torch.zeros((), device=accelerator.device)
            for index, (inputs, targets) in enumerate(micro_batches(train, step)):
                with nullcontext() if index == accumulation - 1 else accelerator.no_sync(model):
                    share = token_loss(model, inputs, targets, num_targets)
                    accelerator.backward(share * world)  # data parallelism averages gradients over processes
                loss += share.detach()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            grad_norm = whole(torch.nn.utils.get_total_norm(gradients))
            stopping = float(bool(stop) or time.monotonic() > deadline)
            sums = accelerator.reduce(torch.stack([loss, loss.new_tensor(stopping)]))
            loss, stopping, norm = [*sums.tolist(), grad_norm.item()]

            if not (math.isfinite(loss) and math.isfinite(norm)):
                blame = gather_object([first_nonfinite(bare_model, model, micro_batches(train, step))])
                raise FloatingPointError(
                    f"step {step + 1}: loss {loss}, gradient norm {norm}; nothing was applied. First non-finite value: "
                    + "; ".join(f"rank {r}: {place}" for r, place in enumerate(blame))
                    + f". The last good checkpoint is in {checkpoints}; a lower learning_rate, a longer warm-up or "
                    "precision no are the usual cures"
                )
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), settings.max_grad_norm, grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            busy_seconds, busy_tokens = busy_seconds + time.perf_counter() - started, busy_tokens + num_targets
            progress.update()
            if done % settings.log_every == 0 or done == settings.steps:
                run_seconds, run_tokens = run_seconds + busy_seconds, run_tokens + busy_tokens
                speed = busy_tokens / busy_seconds
                line = {"step": done, "tokens": train.targets_before(done), "loss": loss, "lr": lr, "grad_norm": norm}
                line |= {"tokens_per_second": speed, "peak_memory_bytes": peak_memory(accelerator.device)}
                log(**line, **utilisation(flops_per_token, speed, world))
                progress.set_postfix(loss=f"{loss:.3f}", **{"tokens/s": f"{speed:,.0f}"})
                busy_seconds, busy_tokens = 0.0, 0
            if done % settings.eval_every == 0 or done == settings.steps:
                figures = evaluate()
                log(step=done, tokens=train.targets_before(done), **figures)
                progress.write(f"step {done}: " + ", ".join(f"{key} {value:.4f}" for key, value in figures.items()))
            if done % settings.save_every == 0 or done == settings.steps or stopping:
                save(done)
            if stopping and done < settings.steps:
                accelerator.print(
                    f"stopped at step {done} ({stop[0] if stop else 'max_minutes'}); the same command goes on"
                )
                accelerator.end_training()
                raise SystemExit(EXIT_STOPPED)

    figures = figures or evaluate()
    results = {
        "parameters": parameter_count,
        "step": settings.steps,
        "tokens": train.targets_before(settings.steps),
        **figures,
        "tokens_per_second": run_tokens / run_seconds if run_seconds else None,
        "peak_memory_bytes": peak_memory(accelerator.device),
    }
    if hasattr(bare_model, "parameter_counts"):
        results["feed_forward_parameters"] = bare_model.parameter_counts()["feed_forward"]
    checkpoint.save_model(accelerator, bare_model, tokenizer, output / "model")
    if main_process:
        (output / "model" / "README.md").write_text(model_card(settings, results, config))
        (output / "results.json").write_text(json.dumps(results, indent=1))
    accelerator.print(f"model: {output / 'model'}")
    accelerator.end_training()
    return results


def token_loss(model, inputs: torch.Tensor, targets: torch.Tensor, num_targets: int) -> torch.Tensor:
    """Summed cross entropy of the targets in nats, over `num_targets`."""
    count = torch.tensor(num_targets, device=inputs.device)  # a tensor: torch.compile does not specialise on its value
    output = model(input_ids=inputs, labels=targets, shift_labels=targets, num_items_in_batch=count, use_cache=False)
    return output.loss


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Cross entropy summed over a text, in bits per UTF-8 byte of it: comparable between tokenizers."""
    return nats / math.log(2) / num_bytes


def learning_rate(settings: Settings, step: int) -> float:
    """Of the update after `step` updates: linear warm-up, then a cosine from learning_rate to its min_lr_ratio."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - 1 - settings.warmup_steps)
    floor = settings.min_lr_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: torch.nn.Module, settings: Settings) -> list[dict]:
    """Matrices decay; norms, biases and embeddings do not; spline coefficients have a rate and a decay of their own."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    groups = {
        "matrices": {"params": [], "weight_decay": settings.weight_decay, "lr_ratio": 1.0},
        "vectors": {"params": [], "weight_decay": 0.0, "lr_ratio": 1.0},
        "splines": {
            "params": [],
            "weight_decay": settings.spline_weight_decay,
            "lr_ratio": settings.spline_lr_ratio,
        },
    }
    for name, parameter in model.named_parameters():
        if name.endswith("spline_weight"):
            groups["splines"]["params"].append(parameter)
        else:
            vector = parameter.ndim < 2 or id(parameter) in embeddings
            groups["vectors" if vector else "matrices"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def check_world(settings: Settings, world: int) -> None:
    """Stop a run that got other processes than were asked for, by setting or by launcher."""
    asked = settings.processes or int(os.environ.get("WORLD_SIZE", world))
    # `accelerate launch --cpu --num_processes 2` sets a rendezvous address, starts one process and says nothing.
    silent = world == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if asked != world or silent:
        raise ValueError(
            f"{'several' if silent else asked} processes were asked for and {world} started; on CPU launch with "
            "`torchrun --nproc_per_node N train/train.py ...` (accelerate launch --cpu starts a single process)"
        )


def batch_split(settings: Settings, world: int) -> tuple[int, int]:
    """(sequences a process holds at once, times it accumulates), so that the global batch is the same for any split."""
    micro_batch = settings.micro_batch_size or max(1, settings.batch_size // world)
    accumulation, remainder = divmod(settings.batch_size, micro_batch * world)
    if remainder or not accumulation:
        raise ValueError(
            f"batch_size {settings.batch_size} is not a multiple of micro_batch_size {micro_batch} x {world} processes"
        )
    return micro_batch, accumulation


def check_resume(resume: str, identity: dict, saved: dict, folder: Path) -> None:
    """Refuse to go on from a checkpoint of another run."""
    if resume == "none":
        raise ValueError(f"{folder} is there and resume is none: choose another output_dir, or --resume auto")
    identity = json.loads(json.dumps(identity))  # tuples are lists there
    # A key younger than the checkpoint had its default's effect
    saved = json.loads(json.dumps(dataclasses.asdict(Settings()))) | saved
    other = [
        f"{key}: {saved.get(key)!r} -> {identity.get(key)!r}"
        for key in sorted(saved.keys() | identity.keys())
        if key not in FREE_KEYS and saved.get(key) != identity.get(key)
    ]
    if other:
        raise ValueError(
            f"{folder} was made with another text, model or settings ({'; '.join(other)}): choose another output_dir, "
            "or delete that one"
        )


def first_nonfinite(bare_model, model, batches) -> str:
    """Where the first NaN or infinity of a step stands: a parameter, a module's output or a gradient."""
    for name, parameter in bare_model.named_parameters():
        if not whole(parameter.detach()).isfinite().all():
            return f"parameter {name}"
    found: list[str] = []

    def look(name: str, output) -> None:
        if not found and torch.is_tensor(output) and not output.isfinite().all():
            found.append(f"output of {name}")

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in bare_model.named_modules()
    ]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for inputs, targets in batches:
            token_loss(model, inputs, targets, 1)
    for hook in hooks:
        hook.remove()
    broken = [n for n, p in bare_model.named_parameters() if p.grad is not None and not whole(p.grad).isfinite().all()]
    return found[0] if found else f"gradient of {broken[-1]}" if broken else "none here"


@contextmanager
def stop_signals():
    """A list that receives the name of the first SIGTERM or SIGINT; a second one acts as usual."""
    received: list[str] = []

    def receive(number, _):
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main(sys.argv[1:])
