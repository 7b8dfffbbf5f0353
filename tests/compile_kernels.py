"""
Compiles every kernel for a GPU that need not be there: python tests/compile_kernels.py sm_90 default odd

A memory layer, PEER and RowAdam take a step on CPU tensors, with Triton's launch replaced by its
compilation, so what is compiled is what would run, with the same dtypes. SHAPES says how large the layer
is; without names all of them are compiled. Prints a line of JSON for each kernel: its name, the length of
the rows it reads, its shared memory in bytes, and whether it loads 16 bytes at once.
"""

import json
import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nanomem import kernels, memory, optim
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
    "default": (64, 512, 1, 32, 64, 128, BF16, FP32),  # train.py's model, under autocast
    "odd": (50, 100, 1, 7, 50, 101, BF16, BF16),  # nothing can be loaded 16 bytes at once
    "one token": (1, 512, 1, 32, 64, 128, FP32, FP32),  # as in sample.py
    "paper": (64, 1024, 4, 32, 512, 1024, BF16, BF16),  # a million slots
    "wide": (64, 40, 2, 4, 128, 2100, FP32, FP32),  # rows of more than one tile
}
results = set()
target = GPUTarget(*TARGETS[sys.argv[1]])


class NoDevice:
    """What Triton asks of a driver in order to compile."""

    def get_current_target(self):
        return target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(kernel, grid):
    """In place of kernel[grid]."""

    def call(*args, **options):
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        named = dict(zip(kernel.arg_names, args))
        assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        results.add(
            json.dumps(
                {
                    "kernel": kernel.__name__,
                    "row_length": named.get("dim", named.get("half_dim")),
                    "shared": compiled.metadata.shared,
                    "wide_loads": re.search(
                        r"ld\.global\S*\.v[48]\.b32|(global|buffer)_load_dwordx4", assembly
                    )
                    is not None,
                }
            )
        )

    return call


def merge_halves(half_scores, knn, pairs):
    """kernels.merge_halves, whose results are not computed: half of the tokens get slot 0, which makes a
    row of many lookups.
    """
    scores, slots = launch_merge(half_scores, knn, pairs)
    slots.random_(half_scores.shape[-1]**2)[::2] = 0
    return scores.zero_(), slots


def step(layer, x):
    """A forward and a backward pass, and RowAdam's update: of whole rows, and of columns as sharding.py has
    them.
    """
    layer(x).sum().backward()
    for table in optim.tables_of(layer):
        values = table.values
        values.grad = values.grad + values.grad  # rows that occur twice are summed
        rows, grads = optim.coalesce_gradient_(values)
        state = torch.zeros(table.n_slots), torch.zeros(table.n_slots, dtype=torch.int32)
        kernels.row_adam(values.detach(), rows, grads, *state, 0.01, 0.99, 1e-10, 0)
        kernels.row_adam(
            values.detach(), rows, grads, *state, 0.01, 0.99, 1e-10, 0, torch.zeros(len(rows)), table.v_dim
        )


JITFunction.__getitem__ = compile_only
driver.set_active(NoDevice())
torch.version.hip = "compiled for" if target.backend == "hip" else None  # a launcher asks
launch_merge, kernels.merge_halves = kernels.merge_halves, merge_halves
memory.use_kernels = optim.use_kernels = lambda x: True

for name in sys.argv[2:] or SHAPES:
    n, n_keys, heads, knn, k_dim, v_dim, keys_dtype, values_dtype = SHAPES[name]
    lookup = dict(heads=heads, knn=knn, k_dim=k_dim)
    x = torch.zeros(n, v_dim, dtype=keys_dtype)
    with torch.device("meta"):  # to_empty then takes no time to fill a table in
        layer = ProductKeyMemory(v_dim, MemoryTable(n_keys**2, v_dim), **lookup)
        peer = PEER(v_dim, MemoryTable(n_keys**2, v_dim), MemoryTable(n_keys**2, v_dim), **lookup)
    for each in (layer, peer):
        each.to(keys_dtype)
        for table in optim.tables_of(each):
            table.to(values_dtype)
        each.to_empty(device="cpu")
        step(each, x)
    layer.table.requires_grad_(False)
    layer(x).sum().backward()  # the gradient of the weights without that of the values
print("\n".join(sorted(results)))
