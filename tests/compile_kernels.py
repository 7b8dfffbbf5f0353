"""
Compiles every kernel for a GPU that need not be there: python tests/compile_kernels.py sm_90 default odd

A memory layer, PEER and RowAdam take a step on the device "meta", where tensors have shapes but no numbers,
with Triton's launch replaced by its compilation. So what is compiled is what would run, with the same sizes
and dtypes. SHAPES says how large the layer is; without names all of them are compiled. Prints a line of JSON
for each kernel:

    kernel, row_length       its name, and the length of the rows it reads
    shared, wide_loads       its shared memory in bytes, and whether it loads 16 bytes at once
    registers, spills        of a thread, and bytes of local memory; from here on for NVIDIA only
    instructions, in_loops   in the compiled code, and how many of these are within loops
    programs, warps          of a launch, and of a program
    warp_instructions        what a launch executes in all its warps, in millions: an estimate
    megabytes                what a launch must move: each number read once per use, each result written once
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from gpu_step import Nothing, kernels_on_meta
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nanomem import kernels, optim
from nanomem.baselines import PEER
from nanomem.memory import MemoryTable, ProductKeyMemory

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = {  # (tokens, n_keys, heads, knn, k_dim, v_dim, dtype of the keys, dtype of the values)
    "default": (2048, 512, 1, 32, 64, 128, BF16, FP32),  # train.py's model, under autocast
    "odd": (50, 100, 1, 7, 50, 101, BF16, BF16),  # nothing can be loaded 16 bytes at once
    "one token": (1, 512, 1, 32, 64, 128, FP32, FP32),  # as in sample.py
    "bench": (4096, 1024, 4, 16, 128, 128, BF16, BF16),  # the first shape of `python -m nanomem.bench`
    "paper": (32768, 1024, 4, 32, 512, 1024, BF16, BF16),  # a million slots
    "wide": (32768, 512, 4, 32, 512, 4096, BF16, BF16),  # rows of more than one tile
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
target = GPUTarget(*TARGETS[sys.argv[1]])


class NoDevice:
    """What Triton asks of a driver in order to compile."""

    def get_current_target(self):
        return target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def megabytes(kernel, named):
    """What a launch of a kernel with these arguments must move."""
    def rows(table, count):
        return table.element_size() * named["dim"] * count

    def whole(*names):
        return sum(named[name].nbytes for name in names if named[name] is not None)

    if kernel == "_merge_halves_kernel":
        moved = whole("half_scores", "scores", "slots")
    elif kernel == "_spread_weights_kernel":
        moved = whole("half_indices", "weights", "out")
    elif kernel in ("_embedding_bag_kernel", "_sddmm_kernel"):
        moved = rows(named["table"], named["rows"].numel()) + whole("rows", "out")
        moved += whole("weights") if "weights" in named else whole("x")
    elif kernel == "_segment_sum_kernel":
        moved = rows(named["x"], len(named["order"])) + whole("order", "weights", "starts", "out", "dots")
        moved += 0 if named["values"] is None else rows(named["values"], len(named["rows"]))
    elif kernel == "_join_parts_kernel":
        moved = whole("parts")
    else:
        assert kernel == "_row_adam_kernel", kernel
        count = len(named["grads"])
        moved = whole("grads", "rows", "mean_square") + rows(named["values"], 2 * count) + 16 * count
    return moved / 1e6


def trips(kernel, named):
    """How often a program runs through its loops, on average. (Loops that are unrolled don't count.)"""
    if kernel == "_segment_sum_kernel":
        block = named["BLOCK_ROWS"]  # the last one of a segment is half full
        return len(named["order"]) / len(named["out"]) / block + (block - 1) / (2 * block)
    if kernel in ("_embedding_bag_kernel", "_sddmm_kernel"):
        return math.ceil(named["rows"].shape[1] / named["BLOCK_ROWS"])
    return 1


def read_code(cubin):
    """(registers, bytes of spills, instructions, instructions in loops) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ask = [TOOLS / "cuobjdump", "-sass", "-res-usage", file.name]
        text = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    code = {int(at, 16): line for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S[^;]*);", text)}
    in_loops = set()
    for at, line in code.items():
        goes_to = re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", line)
        if goes_to and int(goes_to[1], 16) < at:
            in_loops.update(range(int(goes_to[1], 16), at + 1))
    padding = sum("NOP" in line for line in code.values())
    registers, spills = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "LOCAL"))
    return registers, spills, len(code) - padding, sum(at in in_loops for at in code)


def compile_only(kernel, grid):
    """In place of kernel[grid]."""

    def call(*args, **options):
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        named = dict(zip(kernel.arg_names, args)) | options
        assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        wide = re.search(r"ld\.global\S*\.v[48]\.b32|(global|buffer)_load_dwordx4", assembly)
        row = {
            "shape": shape,
            "kernel": kernel.__name__,
            "row_length": named.get("dim", named.get("n_keys")),
            "shared": compiled.metadata.shared,
            "wide_loads": wide is not None,
        }
        if target.backend == "cuda":
            registers, spills, total, in_loops = read_code(compiled.asm["cubin"])
            programs, warps = math.prod(grid), compiled.metadata.num_warps
            each = total - in_loops + in_loops * trips(kernel.__name__, named)
            row |= dict(registers=registers, spills=spills, instructions=total, in_loops=in_loops,
                        programs=programs, warps=warps,
                        warp_instructions=round(programs * warps * each / 1e6, 3),
                        megabytes=round(megabytes(kernel.__name__, named), 3))
        results.add(json.dumps(row))

    return call


def step(layer, x):
    """A forward and a backward pass, and RowAdam's update: of whole rows, and of columns as sharding.py has
    them.
    """
    layer(x).sum().backward()
    for table in optim.tables_of(layer):
        values, n_slots = table.values, table.n_slots
        state = torch.zeros(n_slots), torch.zeros(n_slots, dtype=torch.int32)
        rows, grads, scale = torch.arange(n_slots), torch.zeros_like(values), torch.zeros(())
        options = values.detach(), rows, grads, *state, 0.01, 0.99, 1e-10, 0
        kernels.row_adam(*options, grad_scale=scale)
        kernels.row_adam(*options, torch.zeros(n_slots), table.v_dim, grad_scale=scale)


driver.set_active(NoDevice())
torch.version.hip = "compiled for" if target.backend == "hip" else None  # a launcher asks
results = set()
for shape in sys.argv[2:] or SHAPES:
    n, n_keys, heads, knn, k_dim, v_dim, keys_dtype, values_dtype = SHAPES[shape]
    lookup = dict(heads=heads, knn=knn, k_dim=k_dim)
    with torch.device("meta"), kernels_on_meta(compile_only), Nothing():
        x = torch.zeros(n, v_dim, dtype=keys_dtype)
        layer = ProductKeyMemory(v_dim, MemoryTable(n_keys**2, v_dim), **lookup)
        peer = PEER(v_dim, MemoryTable(n_keys**2, v_dim), MemoryTable(n_keys**2, v_dim), **lookup)
        for each in (layer, peer):
            each.to(keys_dtype)
            for table in optim.tables_of(each):
                table.to(values_dtype)
            step(each, x)
        layer.table.requires_grad_(False)
        layer(x).sum().backward()  # the gradient of the weights without that of the values
print("\n".join(sorted(results)))
