"""How the Triton kernels are launched: plain functions of sizes, dtype and GPU, nothing timed at run time.

Nothing here has been swept yet. The tiles are what the compiler's report chose: no spilled registers, shared memory
that fits, and on sm_90 products in flight while the next splines are evaluated. Letters as in `triton_kan`.
"""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Config:
    """Sides of a tile, warps and pipeline stages of one launch."""

    BLOCK_M: int
    BLOCK_I: int
    BLOCK_O: int
    num_warps: int
    num_stages: int
    BLOCK_C: int = 1  # functions in a tile; only dx has more than one
    GROUP: int = 8  # rows of tiles that programs in flight share
    maxnreg: int | None = None  # registers a thread at most: 128 let two programs of 8 warps share a multiprocessor


# Bytes of partial sums cost as much as this many FLOPs: 790 bf16 TFLOP/s over 4300 GB/s (H200; benchmarks/roofline.py).
FLOPS_PER_BYTE = 184


def split_count(tiles: int, reduction: int, sms: int, least: int = 512) -> int:
    """Programs that share one tile's reduction, so that the last wave of programs is not mostly empty.

    Minimises waves of programs / splits, plus the price of writing and reading splits * 8 bytes an output against the
    2 * reduction FLOPs that made it. A split keeps at least `least` terms.
    """

    def cost(splits: int) -> float:
        waves = -(-tiles * splits // sms)
        return waves / splits * sms / tiles + (splits > 1) * splits * 8 * FLOPS_PER_BYTE / (2 * reduction)

    return min(range(1, max(1, min(32, reduction // least)) + 1), key=cost)


def choose(
    kernel: str,
    M: int,
    I: int,
    O: int,
    C: int,
    dtype: torch.dtype,
    gated: bool,
    based: bool,
    capability: int,
    tf32: bool = False,
    input_bytes: int = 2,
    order: int = 3,
) -> Config:
    """The configuration of "forward", "backward_x" or "backward_w".

    Chosen by what the compiler made of it and not by a sweep: no spilled registers in any case of
    tests/test_kernels.py, and on sm_90 products that stay in flight while the next splines are evaluated.
    """
    return candidate_configs(kernel, M, I, O, C, dtype, gated, based, capability, tf32, input_bytes, order)[0]


def candidate_configs(
    kernel: str,
    M: int,
    I: int,
    O: int,
    C: int,
    dtype: torch.dtype,
    gated: bool,
    based: bool,
    capability: int,
    tf32: bool = False,
    input_bytes: int = 2,
    order: int = 3,
) -> list[Config]:
    """Configurations worth timing, the shipped one first.

    `tf32`: how float32 products run, on tensor cores or not. `input_bytes`: of an element of x or the gate, the larger.
    `order`: of the splines; 3 takes the most registers.
    """
    block_c = function_block(C)
    if dtype == torch.float32:
        tiles = {
            "forward": [Config(32, 32, 64, 8, 2), Config(128, 32, 128, 8, 2)],
            "backward_x": [
                Config(64, 64 // block_c, 32, 8, 2, block_c),
                Config(128, 128 // block_c, 32, 8, 2, block_c),
            ],
            "backward_w": [Config(32, 64, 64, 4, 2), Config(32, 128, 128, 8, 2)],
        }
        # Narrower tiles have no warpgroup products on sm_90; on sm_100 dx spills in the wide ones.
        return tiles[kernel][::-1] if tf32 and M > 64 and capability // 10 == 9 else tiles[kernel]
    # Tiles 256 wide need the registers that warpgroup products leave free and the shared memory of a data-centre part.
    wide = capability // 10 in (9, 10)
    if kernel == "forward":
        if M <= 64:
            small = Config(16 if M <= 16 else 64, 32, 64, 4, 4)
            return [small, dataclasses.replace(small, BLOCK_O=128), dataclasses.replace(small, num_stages=6)]
        tiles = [Config(128, 32, 256, 8, 4), Config(128, 32, 256, 8, 3), Config(128, 32, 128, 8, 4)]
        if capability in (86, 89) or capability // 10 == 12:  # 99 KiB: float32 x and a gate take 105 in four stages
            return [Config(128, 32, 128, 8, 3)]
        # Half as many steps, each with its addresses and barriers: on sm_90 4162 clocks of issue for 64 features, where
        # two steps of 32 take 5212 and tensor cores 4096 (k = 1, C = 4, gated; 9446, 11760, 8192 for k = 3, C = 8).
        # With both a gate and a base term it spills; with float32 inputs it spills or its products are serialized.
        if capability // 10 == 9 and input_bytes == 2 and not (gated and based) and I > 256:
            tiles.insert(0, Config(128, 64, 256, 8, 3))
        return tiles if wide and O > 128 else tiles[-1:]
    if kernel == "backward_x":
        narrow = Config(128, 128 // block_c, 32, 8, 3, block_c)
        tiles = [narrow, Config(128, 256 // block_c, 64, 8, 3, block_c)]
        # The epilogue's registers decide: these are the cases in which nothing spills.
        bfloat16 = dtype == torch.bfloat16
        plain = not gated and (not based or bfloat16)
        hats = gated and not based and bfloat16 and order == 1 and C == 8
        fits = {8: plain or hats, 4: gated and not based, 2: False}[block_c]
        if capability // 10 != 9:
            return tiles
        if gated and bfloat16 and input_bytes == 2 and C == 8:  # nor at 128 of the 133 to 196 registers it takes
            tiles = [dataclasses.replace(narrow, maxnreg=128), tiles[1], narrow]
        return [tiles[1], tiles[0], *tiles[2:]] if fits else tiles
    tiles = [Config(64, 128, 256, 8, 3), Config(64, 128, 128, 8, 3), Config(32, 128, 128, 8, 3)]
    return tiles if wide and O > 128 else tiles[2:]


def function_block(C: int) -> int:
    """BLOCK_C of the dx kernel, which pads C to its multiple: the cheapest of 8, 4 and 2.

    With 2, dx and dgate take as many registers as dPhi, so tiles are half as wide and move 4/3 of the bytes.
    """
    return min((8, 4, 2), key=lambda block: -(-C // block) * block * (4 / 3 if block == 2 else 1))
