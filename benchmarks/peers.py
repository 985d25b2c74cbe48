"""Blocks to compare with, of other projects and an MLP's, as `ffn_type`s for a sweep: their functions, all else shared.

    python benchmarks/peers.py configs/train/demo.yaml --model.ffn_type gr_kan    # what train/train.py takes

The first two are down(f2(up f1(x))): an MLP whose activations are learned, one function for each of 8 groups of
channels, where a KAN has one an edge. f1 starts at the identity, f2 at silu. The third is the MLP of `kan_fourier`'s
functions: one wave for all edges of a unit. Without biases, as every block here, but for the waves' phases.

    gr_kan      f(x) = (a0 + ... + a5 x^5) / (1 + |b1 x + ... + b4 x^4|)      KAT (Yang & Wang 2024, arXiv:2409.10594)
    chebyshev   f(x) = sum_n a_n T_n(tanh x), n to 5                          kan-lm-study (2026); arXiv:2405.07200
    sine        down(sin(1.5 up x + phase))                             SIREN (Sitzmann et al. 2020, arXiv:2006.09661)

KAT's paper shares the b among groups and its code the a: here each group has its own of both. The KAN of efficient-kan
and kan-gpt, cubic splines and silu on every edge, is the library's `kan` with spline_order=3, base_activation="silu".
A saved model has no code of these blocks: import this file before it is loaded.
"""

import math
import sys
from collections.abc import Callable

import torch
from harness import ROOT
from torch import Tensor, nn

from kansformer.layers import FFN_TYPES, MLP, FeedForward, KANFourier

GROUPS = 8
DENOMINATOR = (0.0, 0.115, 0.0, 0.001)  # b at the start: silu to 1.2e-4, the identity exactly


class Rational(nn.Module):
    """A rational function of degrees 5 and 4 for each group of channels."""

    flops = 21  # two polynomials by Horner, x times the second, its absolute value, the sum and the quotient

    def __init__(self, target: str, **factory: object) -> None:
        super().__init__()
        b = torch.tensor(DENOMINATOR, device="cpu")
        a = fitted(target, lambda x: x ** torch.arange(6, device="cpu") / (1 + x * horner(b, x)))
        self.numerator = nn.Parameter(a.repeat(GROUPS).to(**factory))
        self.denominator = nn.Parameter(b.repeat(GROUPS).to(**factory))

    @torch.compile  # as one kernel, which the peers have too
    def forward(self, x: Tensor) -> Tensor:
        a, b = by_channel(self.numerator, x), by_channel(self.denominator, x)
        return horner(a, x) / (1 + (x * horner(b, x)).abs())


class Chebyshev(nn.Module):
    """A sum of the first six Chebyshev polynomials of tanh x for each group of channels."""

    flops = 24  # tanh, five steps of Clenshaw's recurrence and its end

    def __init__(self, target: str, **factory: object) -> None:
        super().__init__()
        a = fitted(target, lambda x: torch.cos(torch.arange(6, device="cpu") * x.tanh().acos()))
        self.coefficients = nn.Parameter(a.repeat(GROUPS).to(**factory))

    @torch.compile
    def forward(self, x: Tensor) -> Tensor:
        a, x = by_channel(self.coefficients, x), x.tanh()
        last = before = torch.zeros_like(x)
        for coefficient in a[1:].flip(0):  # Clenshaw's recurrence
            last, before = coefficient + 2 * x * last - before, last
        return a[0] + x * last - before


def fitted(target: str, basis: Callable[[Tensor], Tensor]) -> Tensor:
    """Coefficients of the six functions `basis` closest to the target on [-3, 3]."""
    x = torch.linspace(-3, 3, 601, dtype=torch.float64, device="cpu").unsqueeze(-1)
    y = x if target == "identity" else nn.functional.silu(x)
    return torch.linalg.lstsq(basis(x), y).solution.squeeze(-1).to(torch.get_default_dtype())


def by_channel(coefficients: Tensor, x: Tensor) -> Tensor:
    """(n, channels) of the groups' (GROUPS * n,)."""
    group = torch.arange(x.shape[-1], device=x.device) * GROUPS // x.shape[-1]
    return coefficients.view(GROUPS, -1).t()[:, group]


def horner(coefficients: Tensor, x: Tensor) -> Tensor:
    """sum_n coefficients[n] x^n."""
    total = coefficients[-1]
    for coefficient in coefficients[:-1].flip(0):
        total = total * x + coefficient
    return total


class _Grouped(MLP):
    fields = ()

    def __init__(self, hidden_size: int, intermediate_size: int, init_gain: float = 1.0, **factory: object) -> None:
        super().__init__(hidden_size, intermediate_size, "silu", init_gain, **factory)
        self.input_function, self.function = self.kind("identity", **factory), self.kind("silu", **factory)
        self.elementwise_flops = (hidden_size + intermediate_size) * self.kind.flops

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.function(self.up_proj(self.input_function(x))))


class GRKAN(_Grouped):
    """KAT's block."""

    kind = Rational


class ChebyshevKAN(_Grouped):
    """kan-lm-study's best KAN block."""

    kind = Chebyshev


class Sine(FeedForward):
    """The MLP with sine activations; phases are learned, from anywhere in a turn."""

    frequency = 1.5  # that of kan_fourier

    def __init__(self, hidden_size: int, intermediate_size: int, init_gain: float = 1.0, **factory: object) -> None:
        super().__init__()
        like = KANFourier(hidden_size, intermediate_size, self.frequency, math.sqrt(2) * init_gain, **factory)
        self.up_proj, self.down_proj = like.up_proj, like.down_proj.sin_proj  # a sine's mean square is 1/2
        self.phase = nn.Parameter(torch.rand(intermediate_size, **factory) * 2 * math.pi)
        self.elementwise_flops = 3 * intermediate_size

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj((self.frequency * self.up_proj(x) + self.phase).sin())


BLOCKS = {"gr_kan": GRKAN, "chebyshev": ChebyshevKAN, "sine": Sine}
FFN_TYPES.update(BLOCKS)


if __name__ == "__main__":
    sys.path.append(str(ROOT / "train"))
    import train

    train.main(sys.argv[1:])
