"""The layers to compare, and one process's measurement of each."""

import statistics
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from nanomem import optim
from nanomem.bench.settings import BenchConfig, Shape
from nanomem.config import keep_freed_memory, pick_device
from nanomem.memory import MemoryTable, ProductKeyMemory

WARM_UP = 3  # steps before those that count


class PlainPyTorchTable(MemoryTable):
    """Reads with torch's embedding_bag."""

    def forward(self, indices, weights):
        weights = weights.to(self.values.dtype)
        return F.embedding_bag(indices, self.values, per_sample_weights=weights, mode="sum")


class PlainPyTorchMemory(ProductKeyMemory):
    """The same layer, with its lookup written as one would write it first: all k * k candidates."""

    def lookup(self, x):
        queries = self.query_proj(x).view(len(x), self.heads, 2, -1)
        queries = F.normalize(queries, dim=-1) * self.qk_scale.view(1, -1, 1, 1)
        half_scores = torch.einsum("nhcd,hckd->nhck", queries, F.normalize(self.keys, dim=-1))
        scores, indices = half_scores.topk(self.knn)                                # (n, heads, 2, knn)
        sums = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(-2)    # (n, heads, knn * knn)
        slots = (indices[:, :, 0, :, None] * self.n_keys + indices[:, :, 1, None, :]).flatten(-2)
        best, chosen = sums.topk(self.knn)                                          # (n, heads, knn)
        return slots.gather(-1, chosen), F.softmax(best, dim=-1)


def paper_layer(config: BenchConfig, shape: Shape):
    """The paper's own layer, and the module that reads its values."""
    sys.path.insert(0, config.paper)
    from lingua.product_key.memory import HashingMemory

    layer = HashingMemory(
        shape.dim, shape.dim, mem_k_dim=shape.k_dim, mem_heads=shape.heads, mem_knn=shape.knn,
        mem_n_keys=shape.n_keys)
    layer.reset_parameters()
    return layer, layer.values


def build(kind: str, config: BenchConfig, shape: Shape, device, dtype):
    """(the layer, the module in it that reads values, its optimizers)"""
    lookup = dict(heads=shape.heads, knn=shape.knn, k_dim=shape.k_dim)
    with device:
        if kind == "paper":
            layer, table = paper_layer(config, shape)
        elif kind == "nanomem":
            table = MemoryTable(shape.n_keys**2, shape.dim, dtype=dtype)
            layer = ProductKeyMemory(shape.dim, table, **lookup)
        else:
            table = PlainPyTorchTable(shape.n_keys**2, shape.dim, dtype=dtype)
            layer = PlainPyTorchMemory(shape.dim, table, **lookup)
    layer.to(dtype)
    if kind == "nanomem":
        return layer, table, optim.build_optimizer(layer)
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=1e-3, fused=True)]
    if kind == "compiled":
        layer = torch.compile(layer)
    return layer, table, optimizers


class Clock:
    """Moments in time, taken on the GPU's own clock if there is one."""

    def __init__(self, device: torch.device):
        self.device_type, self.moments = device.type, []

    def mark(self, *_):
        """Notes this moment."""
        if self.device_type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.moments.append(event)
            return
        if self.device_type == "mps":
            torch.mps.synchronize()
        self.moments.append(time.perf_counter())

    def read(self) -> list[float]:
        """Milliseconds from each moment to the next, and from the first to the last; forgets them."""
        moments, self.moments = self.moments, []
        pairs = [*zip(moments, moments[1:]), (moments[0], moments[-1])]
        if self.device_type == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairs]
        return [1e3 * (b - a) for a, b in pairs]


def measure(kind: str, config: BenchConfig, shape: Shape) -> dict[str, float]:
    """Median times of a step's parts, in ms: {"lookup", "read", "backward", "update", "step"}; and "peak_gb".

    A compiled layer has "forward" instead of "lookup" and "read".
    """
    device = pick_device(config.device)
    dtype = config.torch_dtype(device)
    if config.keep_freed:
        keep_freed_memory()
    torch.manual_seed(0)
    layer, table, optimizers = build(kind, config, shape, device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # building the layer doesn't count
    clock = Clock(device)
    names = ["lookup", "read", "backward", "update", "step"]
    if kind == "compiled":  # its lookup and read can't be told apart
        names[:2] = ["forward"]
    else:
        table.register_forward_pre_hook(clock.mark)
    times = list(steps(layer, optimizers, clock, config.steps, (1, shape.tokens, shape.dim), device, dtype))
    result = {name: statistics.median(column) for name, column in zip(names, zip(*times[WARM_UP:]))}
    result["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else peak_rss()
    return result


def steps(layer, optimizers, clock, n_steps, size, device, dtype) -> Iterator[list[float]]:
    """Trains for some steps and yields what the clock says of each."""
    for _ in range(WARM_UP + n_steps):
        x = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn_like(x)
        clock.mark()
        y = layer(x)
        clock.mark()
        y.backward(grad)
        clock.mark()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        clock.mark()
        yield clock.read()


def peak_rss() -> float:
    """The process's largest resident size so far, in GB."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
