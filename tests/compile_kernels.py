"""
Compiles every kernel for a GPU that need not be there: python tests/compile_kernels.py sm_90

The kernels' own launchers are called, on CPU tensors, with Triton's launch replaced by its compilation, so what is compiled is
what would run. Prints a line of JSON for each: kernel, dtype, shared memory in bytes, and whether it loads 16 bytes at once.
"""

import json
import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nanomem import kernels
from nanomem.memory import candidate_pairs

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
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
        assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        wide = re.search(r"ld\.global\S*\.v[48]\.b32|(global|buffer)_load_dwordx4", assembly) is not None
        print(json.dumps({"kernel": kernel.__name__, "dtype": str(dtype), "v_dim": v_dim, "shared": compiled.metadata.shared, "wide_loads": wide}), flush=True)

    return call


JITFunction.__getitem__ = compile_only
driver.set_active(NoDevice())
torch.version.hip = "compiled for" if target.backend == "hip" else None  # a launcher asks

n, heads, knn, n_keys, n_slots = 64, 1, 7, 64, 64**2  # 7 lookups a token: their numbers can't be loaded 16 bytes at once
for dtype, v_dim in ((torch.bfloat16, 1024), (torch.float32, 128), (torch.bfloat16, 101)):
    values, x = torch.zeros(n_slots, v_dim, dtype=dtype), torch.zeros(n, v_dim, dtype=dtype)
    slots, weights = torch.randint(n_slots, (n, heads * knn)), torch.zeros(n, heads * knn, dtype=dtype)
    for k in (1, knn):
        kernels.select(torch.zeros(heads, 2, n, n_keys), k, candidate_pairs(k, x.device))
    kernels.gather_sum(values, slots, weights)
    kernels.gather_dot(values, slots, x)
    kernels.scatter_sum(slots, weights, x, n_slots, dot_with=values)
    kernels.scatter_sum(torch.zeros_like(slots), weights, x, n_slots)  # all in one row, which is cut into pieces
    kernels.key_gradient(torch.zeros(n, heads, 2, knn, dtype=torch.int32), torch.zeros(n, heads, knn), torch.zeros(n, heads, 2, 64, dtype=dtype), n_keys)
    kernels.row_adam(values, torch.arange(n), x, torch.zeros(n_slots), torch.zeros(n_slots, dtype=torch.int32), 0.01, 0.99, 1e-10, 0)
    kernels.row_adam(values, torch.arange(n), x, torch.zeros(n_slots), torch.zeros(n_slots, dtype=torch.int32), 0.01, 0.99, 1e-10, 0,
                     torch.zeros(n), v_dim)
