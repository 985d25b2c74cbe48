"""What watches a run: signals, the first non-finite value, loss spikes, one warning an episode."""

import signal
import statistics
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

MAD_TO_STD = 1.4826  # of a normal distribution, over its median absolute deviation
SPIKE_MIN_STEPS = 20  # fewer say nothing about the spread


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


def first_nonfinite(model: torch.nn.Module, gradients: Callable[[], object]) -> str:
    """Where the first NaN or infinity of a step stands: a parameter, a module's output or a gradient.

    Args:
        model: the modules, not wrapped.
        gradients: runs the forward and backward passes of the step once more.
    """
    for name, parameter in model.named_parameters():
        if not whole(parameter.detach()).isfinite().all():
            return f"parameter {name}"
    found: list[str] = []

    def look(name: str, output) -> None:
        if not found and torch.is_tensor(output) and not output.isfinite().all():
            found.append(f"output of {name}")

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    model.zero_grad()
    with torch.compiler.set_stance("force_eager"):  # compiled code would not call the hooks
        gradients()
    for hook in hooks:
        hook.remove()
    broken = [n for n, p in model.named_parameters() if p.grad is not None and not whole(p.grad).isfinite().all()]
    # The backward pass goes from the last parameter to the first
    return found[0] if found else f"gradient of {broken[-1]}" if broken else "none here"


class LossSpikes:
    """How far each loss lies above the losses before it, in robust standard deviations of theirs.

        z = (loss - median) / (1.4826 * median |loss_i - median|),    over the last `window` losses

    A falling loss gives z < 0; the spread counts at least a thousandth of the median, so that a flat curve's grain is
    no spike. 0 until there are enough losses.
    """

    def __init__(self, window: int):
        self.losses: deque[float] = deque(maxlen=window)

    def __call__(self, loss: float) -> float:
        z = 0.0
        if len(self.losses) >= min(SPIKE_MIN_STEPS, self.losses.maxlen):
            median = statistics.median(self.losses)
            spread = MAD_TO_STD * statistics.median(abs(value - median) for value in self.losses)
            z = (loss - median) / max(spread, 1e-3 * abs(median))
        self.losses.append(loss)
        return z


class Episodes:
    """Whether an alarm is new: one warning when it goes on, the next only after it went off."""

    def __init__(self):
        self.on: set[str] = set()

    def begins(self, alarm: str, on: bool) -> bool:
        new = on and alarm not in self.on
        (self.on.add if on else self.on.discard)(alarm)
        return new


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
