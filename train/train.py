"""Train a causal language model: one yaml a run, any number of processes, killed and resumed at will.

    python train/train.py configs/train/demo.yaml --model.ffn_type kan_gated --model.grid_size 5
    torchrun --nproc_per_node 2 train/train.py configs/train/demo.yaml --device cpu
    accelerate launch --config_file configs/accelerate/fsdp2.yaml train/train.py configs/train/125m.yaml

`--help` lists the settings. The output folder gets

    settings.yaml    what was asked, completed with the defaults
    metrics.jsonl    one line a logged step, an evaluation, a start or a warning
    checkpoints/     the newest few and the best; the same command goes on from the newest whole one
    model/           the trained model, its tokenizer and its card, for `from_pretrained`
    results.json     the figures of the end
    report.md        curves and tables; `train/report.py` makes it of a run that goes on, and of several side by side

Everything but weights, grids and optimizer moments is a function of (settings, step): data, learning rate, random
numbers, grid updates. So a run that was killed and resumed ends with the weights of one that was not.

Exit codes: 0 done; 75 stopped by SIGTERM, SIGINT or max_minutes with a checkpoint to go on from; 1 an error.
"""

import copy
import dataclasses
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))

import checkpoint
import metrics
import report
import settings as settings_module
from data import Batches, Corpus, load_tokenizer, prepare
from grids import update_grids
from health import Episodes, LossSpikes, first_nonfinite, stop_signals, whole
from metrics import bits_per_byte
from optimizer import learning_rate, optimizer
from settings import Settings, batch_split, check_resume, check_world

import kansformer  # noqa: F401 (registers the model with the Auto classes)

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again


def main(arguments: list[str]) -> dict:
    """One run, top to bottom. Returns the figures that `results.json` holds."""
    settings = settings_module.parse(arguments)
    metrics.check_tracker(settings.tracker)
    run = Run(settings)
    with checkpoint.sole_use(run.output) if run.accelerator.is_main_process else nullcontext():
        try:
            run.start()
            with stop_signals() as run.stop:
                run.deadline = time.monotonic() + 60 * (settings.max_minutes or math.inf)
                run.train(settings.steps)
            return run.finish()
        finally:
            run.close()


class Run:
    """Everything that a run is made of, ready for its next step: from the newest checkpoint, or from the seed."""

    def __init__(self, settings: Settings):
        self.settings = settings
        transformers.utils.logging.disable_progress_bar()  # one bar: the run's
        self.output = Path(settings.output_dir)
        self.checkpoints = self.output / "checkpoints"

        # Processes and device
        on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
        self.accelerator = accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=settings.precision,
            dynamo_backend="inductor" if settings.compile else None,
            log_with=settings.tracker,
            project_dir=self.output / "tracker",
        )
        if settings.precision == "bf16" and (plugin := getattr(accelerator.state, "fsdp_plugin", None)):
            # accelerate's own would round the loss, and what processes add up of gradients, to bfloat16 as well
            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
        self.world, self.rank, self.device = accelerator.num_processes, accelerator.process_index, accelerator.device
        check_world(settings, self.world, accelerator.distributed_type.value)
        self.micro_batch, self.accumulation = batch_split(settings, self.world)

        # Text
        corpus = Corpus(
            settings.data, settings.text_column, settings.val_split, settings.val_fraction, settings.max_documents
        )
        self.tokenizer = load_tokenizer(
            settings.tokenizer, settings.sequence_length, corpus, settings.cache_dir, progress=True
        )
        self.config = settings_module.model_config(settings, self.tokenizer)
        verify = settings.verify_data and accelerator.is_local_main_process
        train_text, self.val_text = prepare(corpus, self.tokenizer, settings.cache_dir, verify=verify, progress=True)
        self.batches = Batches(train_text, settings.sequence_length, settings.batch_size, settings.seed)
        self.val_batches = Batches(self.val_text, settings.sequence_length, settings.batch_size)
        # What must be the same in a run that goes on: settings, model and text
        self.identity = dataclasses.asdict(settings) | {"tokens": train_text.folder.name}
        fields = self.config.to_diff_dict()
        made = {"transformers_version", "match_ffn", "match_reference", "match_reference_size"}  # what widths came from
        self.identity |= {f"model.{key}": value for key, value in fields.items() if key not in made}

        # Model and optimizer, from the newest checkpoint or from the seed
        self.step, self.best = 0, None  # optimizer steps done; the figures of the best evaluation and its step
        self.open(settings.resume)
        self.lag = 1 if self.device.type == "cuda" else 0  # steps by which the host sees figures late
        self.spikes, self.episodes = LossSpikes(settings.spike_window), Episodes()
        self.figures: dict = {}  # of the last evaluation
        self.activation_bytes: int | None = None
        self.seconds, self.tokens = 0.0, 0  # of training since this start
        self.stop: list[str] = []  # holds a signal's name when the run must stop
        self.deadline = math.inf

    def open(self, resume: str) -> None:
        """Model and optimizer, from the newest checkpoint or from the seed, with the grids of the step that comes."""
        settings, accelerator = self.settings, self.accelerator
        self.resumed = checkpoint.resume_from(accelerator, self.checkpoints)
        set_seed(settings.seed)
        if self.resumed is None:
            config = copy.deepcopy(self.config)
            if settings.coarse_grids:
                config.grid_size = self.grid_size()
            model = settings_module.initial_model(settings, config)
        else:
            state = checkpoint.read_state(self.resumed)
            check_resume(resume, self.identity, state["identity"], self.resumed)
            self.step, self.best = state["step"], state.get("best")
            model, loading = AutoModelForCausalLM.from_pretrained(
                self.resumed, dtype=torch.float32, output_loading_info=True
            )
            assert not loading["missing_keys"], f"{self.resumed} lacks {loading['missing_keys']}"
        if settings.grid_update_steps and not any(getattr(model, "kan_layers", tuple)()):
            raise ValueError(f"grid_update_steps = {settings.grid_update_steps}, but {settings.model} has no grids")
        refined = ()
        if settings.coarse_grids and model.config.grid_size != self.grid_size():
            model.extend_grid(self.grid_size())
            refined = [f"{name}.spline_weight" for name, _ in model.kan_layers()]
        if settings.gradient_checkpointing:
            # transformers 5.2x renames it
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        self.parameter_count = sum(p.numel() for p in model.parameters())
        count = getattr(model, "flops_per_token", lambda _: None)  # a stock model does not know
        self.flops_per_token = count(settings.sequence_length)
        self.optimizer = optimizer(model, settings)
        # A flag on the device that it obeys: no step is applied from the first non-finite one on, and no step waits
        # until the host has looked at its loss.
        self.optimizer.found_inf = torch.zeros((), device=self.device)
        self.model, _ = accelerator.prepare(model, self.optimizer)
        self.bare_model = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.resumed is not None:
            checkpoint.load_optimizer(self.resumed, self.bare_model, self.optimizer, forget=refined)
        self.model.train()

    def grid_size(self) -> int:
        """Intervals of the grids in the step that comes."""
        coarse = (size for until, size in self.settings.coarse_grids if self.step < until)
        return next(coarse, self.config.grid_size)

    def refine_grids(self) -> None:
        """Go on with finer grids from the checkpoint of this step, as a run does that is started from it."""
        self.release()
        self.open("auto")
        self.metrics.log(self.step, event="grid_extension", grid_size=self.grid_size(), parameters=self.parameter_count)

    def release(self) -> None:
        """Let go of the model and its data parallel wrapper."""
        self.model = self.bare_model = self.optimizer = None
        self.accelerator.free_memory()

    def start(self) -> None:
        """Say what runs, and open the books."""
        settings, accelerator = self.settings, self.accelerator
        late = [step for step in settings.grid_update_steps if step >= settings.steps]
        origin = self.resumed or (f"weights of {settings.model}" if Path(settings.model).is_dir() else "new weights")
        accelerator.print(
            f"{self.world} process(es) ({accelerator.distributed_type.value}) on {self.device}, precision "
            f"{settings.precision}, batch {settings.batch_size} = {self.micro_batch} x {self.accumulation} accumulated "
            f"x {self.world}\n"
            f"{self.config.model_type}: {self.parameter_count:,} parameters; text: {self.batches.num_targets + 1:,} "
            f"training and {self.val_batches.num_targets + 1:,} validation tokens, an epoch is "
            f"{self.batches.num_windows / settings.batch_size:.0f} steps\n"
            f"from step {self.step} to {settings.steps} ({origin})"
            + (f"; all of it warm-up, of {settings.warmup_steps}" if settings.warmup_steps >= settings.steps else "")
            + (f"; no grid update at {late}: that is the end or later" if late else "")
        )
        asked = dataclasses.asdict(settings)
        if accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            checkpoint.replace_text(self.output / "settings.yaml", yaml.safe_dump(asked, sort_keys=False))
        self.metrics = metrics.Metrics(self.output / "metrics.jsonl", accelerator, self.step)
        if self.step < settings.steps:  # else it is done already
            where = metrics.provenance(accelerator)
            self.metrics.log(self.step, event="start", **where, parameters=self.parameter_count)
            metrics.start_tracker(accelerator, settings.tracker, self.output.name, asked, self.step)
        plain = accelerator.distributed_type.value in ("NO", "MULTI_CPU") and not settings.compile
        if self.device.type == "cpu" and plain and not settings.gradient_checkpointing:
            inputs, targets = next(self.micro_batches(self.batches, self.step))
            with metrics.saved_bytes(self.bare_model) as kept:
                token_loss(self.bare_model, inputs, targets, 1)
            self.activation_bytes = sum(kept)

    def train(self, stop_at: int) -> None:
        """Train until `stop_at` steps are done. Exits with EXIT_STOPPED, after a checkpoint, if it must stop before."""
        settings, batches = self.settings, self.batches
        every = (settings.log_every, settings.eval_every, settings.save_every)
        pending: deque[tuple[int, Callable[[], list[float]]]] = deque()  # steps whose figures the host has not seen
        logged = batches.targets_before(self.step)
        seconds, mark = 0.0, time.perf_counter()
        quiet = not self.accelerator.is_main_process
        progress = tqdm(total=stop_at, initial=self.step, disable=quiet, desc=self.output.name, unit="step")
        with progress:
            while self.step < stop_at:
                if self.step in settings.grid_update_steps:
                    self.update_grids()
                pending.append((self.step, metrics.on_host(self.training_step(self.step))))
                self.step += 1
                done, last = self.step, self.step == settings.steps
                logging, evaluating, saving = (done % n == 0 or last for n in every)
                refining = done in dict(settings.coarse_grids)
                catch_up, stopping = logging or evaluating or saving or refining or done == stop_at, False
                while pending and (catch_up or stopping or len(pending) > self.lag):
                    loss, norm, stop_now = self.check(*pending.popleft())
                    stopping = stopping or (stop_now and not last)
                progress.update()
                if not (catch_up or stopping):
                    continue
                seconds += time.perf_counter() - mark
                tokens = batches.targets_before(done)
                if logging:
                    self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens - logged
                    speed = (tokens - logged) / seconds
                    line = {"tokens": tokens, "loss": loss, "lr": self.lr, "grad_norm": norm}
                    line |= {"tokens_per_second": speed} | metrics.memory(self.device, self.activation_bytes)
                    self.metrics.log(done, **line, **metrics.utilisation(self.flops_per_token, speed, self.world))
                    progress.set_postfix(loss=f"{loss:.3f}", **{"tokens/s": f"{speed:,.0f}"})
                    seconds, logged = 0.0, tokens
                if evaluating:
                    self.figures = self.evaluate()
                    self.metrics.log(done, tokens=tokens, **self.figures)
                    self.say(f"step {done}: " + ", ".join(f"{k} {v:.4f}" for k, v in self.figures.items()))
                    if (
                        settings.keep_best
                        and self.figures["val_loss"] < (self.best or {"val_loss": math.inf})["val_loss"]
                    ):
                        self.best, saving = {"step": done, **self.figures}, True
                if saving or stopping or refining:
                    self.save()
                if stopping:
                    reason = self.stop[0] if self.stop else "another process's signal, or max_minutes"
                    self.accelerator.print(f"stopped at step {done} ({reason}); the same command goes on")
                    raise SystemExit(EXIT_STOPPED)
                if refining:
                    self.refine_grids()
                mark = time.perf_counter()

    def training_step(self, step: int) -> torch.Tensor:
        """One optimizer step, not waited for: (loss, gradient norm, number of processes that must stop), on the device.

        From the first non-finite step on none is applied, here or later.
        """
        self.lr = learning_rate(self.settings, step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["lr_ratio"]
        loss = self.gradients(step)
        gradients = [p.grad for p in self.bare_model.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        stopping = float(bool(self.stop) or time.monotonic() > self.deadline)
        loss, stopping = self.accelerator.reduce(torch.stack([loss, torch.full_like(loss, stopping)]))
        broken = ~(loss.isfinite() & norm.isfinite())
        self.optimizer.found_inf.add_(broken).clamp_(max=1)
        if self.settings.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.bare_model.parameters(), self.settings.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss, norm, stopping])

    def gradients(self, step: int) -> torch.Tensor:
        """Accumulate the gradient of the mean loss over all targets of the global batch; this process's share of it."""
        torch.manual_seed((self.settings.seed * 1_000_003 + step * self.world + self.rank) % 2**32)
        num_targets = self.batches.targets_before(step + 1) - self.batches.targets_before(step)
        total = torch.zeros((), device=self.device)
        for index, (inputs, targets) in enumerate(self.micro_batches(self.batches, step)):
            with nullcontext() if index == self.accumulation - 1 else self.accelerator.no_sync(self.model):
                share = token_loss(self.model, inputs, targets, num_targets)
                self.accelerator.backward(share * self.world)  # data parallelism averages gradients over processes
            total += share.detach()
        return total

    def micro_batches(self, batches: Batches, step: int):
        """This process's share of a global batch, as (inputs, targets) on the device."""
        for index in range(self.accumulation):
            row = (index * self.world + self.rank) * self.micro_batch
            tensors = map(torch.from_numpy, batches.rows(step, row, row + self.micro_batch))
            if self.device.type == "cuda":  # the copy of pageable memory would wait for the device
                tensors = (tensor.pin_memory() for tensor in tensors)
            yield [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def check(self, step: int, fetch: Callable[[], list[float]]) -> tuple[float, float, bool]:
        """(loss, gradient norm, whether to stop) of a step, or FloatingPointError where they are not finite."""
        loss, norm, stopping = fetch()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            blame = gather_object([first_nonfinite(self.bare_model, lambda: self.gradients(step))])
            places = "; ".join(f"rank {rank}: {place}" for rank, place in enumerate(blame))
            raise FloatingPointError(
                f"step {step + 1}: loss {loss}, gradient norm {norm}; nothing was applied. First non-finite value: "
                + (places if set(blame) != {"none here"} else "the norm, of finite gradients")
                + f". The last good checkpoint is in {self.checkpoints}; a lower learning_rate, a longer warm-up or "
                "precision no are the usual cures"
            )
        z, threshold = self.spikes(loss), self.settings.spike_threshold
        if threshold is not None:
            self.warn(
                "loss_spike", z > threshold, step + 1, f"loss {loss:.4f} is a spike, {z:.0f} robust deviations up"
            )
        return loss, norm, bool(stopping)

    def say(self, message: str) -> None:
        """A line above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(message)

    def warn(self, alarm: str, on: bool, step: int, message: str) -> None:
        if self.episodes.begins(alarm, on):
            self.say(f"warning: step {step}: {message}")
            self.metrics.log(step, event="warning", alarm=alarm, message=message)

    def update_grids(self) -> None:
        """Fit the grids to the inputs that the layers get on the last step's batch.

        Not on the coming step's: its extreme inputs would lie on the new bounds, where rounding decides their gradient.
        """
        tokens = self.settings.batch_size * self.settings.sequence_length
        shares = (inputs for inputs, _ in self.micro_batches(self.batches, max(self.step - 1, 0)))
        update_grids(self.bare_model, self.optimizer, shares, tokens, self.settings.grid_update_spread)
        self.metrics.log(self.step, event="grid_update")

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Every target of the validation text once: nats a token, bits a byte; the share of inputs off the grids.

        With `eval_batches`, so many batches in its place, evenly spread, and the bytes of an average token.
        """
        self.model.eval()
        nats = torch.zeros(2, dtype=torch.float64, device=self.device)
        batches = math.ceil(self.val_batches.num_windows / self.settings.batch_size)
        chosen = min(batches, self.settings.eval_batches or batches)
        steps = [index * batches // chosen for index in range(chosen)]
        before = self.val_batches.targets_before
        expected = sum(before(step + 1) - before(step) for step in steps)
        for step in steps:
            for inputs, targets in self.micro_batches(self.val_batches, step):
                nats[0] += token_loss(self.model, inputs, targets, 1)
                nats[1] += (targets >= 0).sum()
        total, count = self.accelerator.reduce(nats).tolist()
        assert count == expected, f"{count} of {expected} targets evaluated"
        num_bytes = self.val_text.num_bytes * count / self.val_batches.num_targets
        figures = {"val_loss": total / count, "val_bits_per_byte": bits_per_byte(total, num_bytes)}
        if shares := self.out_of_grid():
            worst, limit = max(shares, key=shares.get), self.settings.out_of_grid_threshold
            figures |= {"out_of_grid": sum(shares.values()) / len(shares), "out_of_grid_worst": shares[worst]}
            message = f"{shares[worst]:.0%} of the inputs of {worst} lie outside its grid: consider grid_update_steps"
            self.warn("out_of_grid", limit is not None and shares[worst] > limit, self.step, message)
        self.model.train()
        return figures

    def out_of_grid(self) -> dict[str, float]:
        """The share of the inputs of each layer of splines outside its grid, on the validation text's first batch."""
        if not any(getattr(self.bare_model, "kan_layers", tuple)()):
            return {}
        batch = self.micro_batches(self.val_batches, 0)
        shares = [self.bare_model.out_of_grid_fraction(input_ids=inputs) for inputs, _ in batch]
        means = {name: torch.stack([share[name] for share in shares]).mean() for name in shares[0]}
        return {name: mean.item() for name, mean in self.accelerator.reduce(means, reduction="mean").items()}

    def save(self) -> None:
        checkpoint.save(
            self.accelerator,
            self.bare_model,
            self.optimizer,
            self.tokenizer,
            self.checkpoints,
            self.step,
            self.identity,
            self.settings.keep_checkpoints,
            best=self.best,
        )

    def finish(self) -> dict:
        """The model, its card, the figures and the report."""
        settings, figures = self.settings, {"step": self.step, **(self.figures or self.evaluate())}
        if settings.final_model == "best":
            if self.best is None:
                raise ValueError(
                    f"final_model is best, and {self.output} keeps no best checkpoint: it was trained with keep_best: "
                    "false. Set final_model: last, or train anew"
                )
            figures = self.best
        costs = {"tokens_per_second": self.tokens / self.seconds if self.seconds else None}
        costs |= metrics.memory(self.device, self.activation_bytes)
        earlier = self.output / "results.json"
        if not self.seconds and earlier.is_file():  # trained by an earlier start: its costs
            before = json.loads(earlier.read_text())
            costs = {key: before.get(key) for key in costs}
        tokens = self.batches.targets_before(figures["step"])
        results = {"parameters": self.parameter_count, "tokens": tokens, **figures, **costs}
        if self.best:
            results |= {"best_step": self.best["step"], "best_val_loss": self.best["val_loss"]}
        if hasattr(self.bare_model, "parameter_counts"):
            results["feed_forward_parameters"] = self.bare_model.parameter_counts()["feed_forward"]
        finished = self.output / ".model.new"
        if settings.final_model == "best":
            checkpoint.copy_model(self.accelerator, self.checkpoints, self.best["step"], finished)
        else:
            checkpoint.save_model(self.accelerator, self.bare_model, self.tokenizer, finished)
        if self.accelerator.is_main_process:
            (finished / "README.md").write_text(report.model_card(settings, results, self.config))
            checkpoint.replace(self.output / "model", finished)
            checkpoint.replace_text(self.output / "results.json", json.dumps(results, indent=1))
            try:
                written = report.write([self.output], self.output)
            except ImportError as error:  # all is saved: a missing picture is no failed run
                written = f"none ({error})"
            self.accelerator.print(f"model: {self.output / 'model'}\nreport: {written}")
        return results

    def close(self) -> None:
        """End trackers and the process group, the data parallel wrapper before it.

        The wrapper's destructor keeps the interpreter's lock. Were it the last to hold the group, it would wait for
        the group's threads, and they, with a tensor of Python's to drop, for that lock (pytorch issue 56297).
        """
        self.release()
        self.accelerator.end_training()


def token_loss(model, inputs: torch.Tensor, targets: torch.Tensor, num_targets: int) -> torch.Tensor:
    """Summed cross entropy of the targets in nats, over `num_targets`."""
    # A tensor: torch.compile does not specialise on its value. Filled there: a copy would wait for the device.
    count = torch.full((), num_targets, device=inputs.device)
    output = model(input_ids=inputs, labels=targets, shift_labels=targets, num_items_in_batch=count, use_cache=False)
    return output.loss


if __name__ == "__main__":
    main(sys.argv[1:])
