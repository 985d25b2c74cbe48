"""Compile kernels for a GPU that is not there, and read what the compiler made of them. Needs TRITON_INTERPRET unset.

Tensors live on the meta device: a launcher runs as it is, only the launch itself is recorded instead of made.
"""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch: a kernel and what it was called with."""

    kernel: JITFunction
    grid: tuple
    args: tuple
    kwargs: dict[str, Any]

    def variant(self, capability: int) -> tuple:
        """(signature, constants, attributes, options): launches equal in these share one compiled kernel."""
        backend = make_backend(GPUTarget("cuda", capability, 32))
        kernel = self.kernel
        kwargs = self.kwargs | {"debug": False}
        bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
            *self.args, **kwargs
        )
        options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
        return signature, constants, attributes, options

    def compile(self, capability: int) -> "Resources":
        signature, constants, attributes, options = self.variant(capability)
        source = ASTSource(self.kernel, signature, constants, attributes)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=options.__dict__)
        return Resources.read(self.kernel.__name__, compiled)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What ptxas made of one kernel."""

    kernel: str
    registers: int
    stack: int  # bytes of local memory a thread, where spilled registers go
    shared: int  # bytes

    @staticmethod
    def read(name: str, compiled) -> "Resources":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            usage = _run("cuobjdump", "--dump-resource-usage", cubin.name)
            registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
            # Half a second a kernel, so only where there is something to read: without a stack nothing is stored there.
            sass = _run("nvdisasm", "-c", cubin.name) if int(stack) else ""
        return Resources(
            kernel=name,
            registers=int(registers),
            stack=int(stack) + sass.count("STL"),
            shared=compiled.metadata.shared,
        )


def _run(tool: str, *args: str) -> str:
    return subprocess.run([str(BIN / tool), *args], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches made inside the block instead of making them."""
    launches: list[Launch] = []

    def record(self, *args, grid, warmup, **kwargs):
        launches.append(Launch(self, grid, args, kwargs))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run


def launches(case: "Case", capability: int) -> list[Launch]:
    """Every launch of the package for one layer and one of waves, at training, prefill and decoding lengths."""
    from kansformer.kernels import triton_kan, triton_waves

    C = case.grid_size + case.spline_order
    dtype = getattr(torch, case.dtype)
    triton_kan.device_properties = lambda index: (capability, 132)
    settings = (case.grid_size, case.spline_order, "silu")
    norm_eps = 1e-6 if case.norm else None
    weight = torch.empty(INPUTS * C, OUTPUTS, dtype=dtype, device="meta")
    wave = torch.empty(OUTPUTS, INPUTS, dtype=dtype, device="meta")
    base = wave if case.base else None
    grid = torch.empty(INPUTS, 2, device="meta")
    with recording() as made:
        for rows in case.rows:
            x = torch.empty(rows, INPUTS, dtype=getattr(torch, case.x or case.dtype), device="meta")
            gate = torch.empty(rows, INPUTS, dtype=dtype, device="meta") if case.gate else None
            if rows == 1:
                triton_kan.decode(x, gate, weight, grid, base, *settings)
                scale = torch.empty(INPUTS * C, dtype=dtype, device="meta")
                triton_kan.decode_int8(x, gate, weight.to(torch.int8), scale, grid, base, *settings)
                continue
            triton_kan.forward(x, gate, weight, grid, base, *settings, norm_eps)
            if rows > 64:
                dy = torch.empty(rows, OUTPUTS, dtype=dtype, device="meta")
                needs = (True, case.gate, True, case.base)
                triton_kan.backward(dy, x, gate, weight, grid, base, *settings, needs, norm_eps)
                for inputs in (INPUTS, 136):  # whole tiles, and rows as a compiler pads them
                    z = torch.empty(rows, 2 * INPUTS, dtype=x.dtype, device="meta")[:, :inputs] if inputs < 1024 else x
                    triton_waves.forward(z, wave[:, :inputs], wave[:, :inputs], 1.5)
                    for needs in ((True, True, True), (True, False, False)):
                        triton_waves.backward(dy, z, wave[:, :inputs], wave[:, :inputs], 1.5, needs)
    return made


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer whose kernels are compiled."""

    dtype: str
    spline_order: int
    grid_size: int
    gate: bool
    base: bool
    rows: tuple[int, ...] = (1, 16, 4096)
    x: str | None = None  # its dtype where it is another one: float32 behind a norm under autocast
    norm: bool = False


INPUTS, OUTPUTS = 1024, 2048


def main() -> None:
    """python aot.py CAPABILITY: cases as json on stdin, one json line on stdout for each kernel compiled."""
    capability = int(sys.argv[1])
    for case in json.load(sys.stdin):
        for launch in launches(Case(**case), capability):
            resources = launch.compile(capability)
            print(json.dumps({"case": case, **dataclasses.asdict(resources)}), flush=True)


if __name__ == "__main__":
    main()
