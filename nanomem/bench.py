"""
How long one training step of a memory layer takes, beside what one would write from PyTorch's parts.

    python -m nanomem.bench                     4096 tokens, d=128, 4 heads, k=16, k_dim 128, 1M and 16M slots
    python -m nanomem.bench --n_keys=256 --knn=32 --dim=256

A step is forward, backward (to the input, too), and the update of all parameters. Both layers have the same parts
(query projection, qk-norm, gate, output projection) and differ in three places:

    pytorch   einsum and all k*k candidates     F.embedding_bag     fused AdamW over the table's dense gradient
    nanomem   pruned candidates                 memory_read         RowAdam over the rows read

Each measurement runs in a process of its own, since whichever layer came first would pay for the memory of both;
they take turns, and the table shows medians. On a CPU both are timed twice: with the system's allocator as it is, and
as train.py sets it (nanomem.config.keep_freed_memory), which helps dense gradients most.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nanomem import optim
from nanomem.config import UserError, keep_freed_memory, machine_memory, one_line_errors, parse, pick_device, setting
from nanomem.memory import MemoryTable, ProductKeyMemory

KINDS = ("nanomem", "pytorch")


@dataclass
class BenchConfig:
    """The settings of the benchmark."""

    n_keys: str = setting("1024,4096", "keys a half, one or several: n_keys**2 slots", group="Settings")
    tokens: int = setting(4096, "tokens a step")
    dim: int = setting(128, "width of input, output and values")
    heads: int = setting(4, "lookups a token")
    knn: int = setting(16, "slots read by each head")
    k_dim: int = setting(128, "length of a query and of a key")
    steps: int = setting(10, "steps timed in a process, after 3 that are not")
    rounds: int = setting(3, "processes for each measurement, in turn")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the first of cuda, mps and cpu that is there")
    keep_freed: bool = setting(False, "with --only: call keep_freed_memory first")
    only: str = setting("", "measure this kind in this process and print JSON: what the benchmark calls itself with", ("", *KINDS))


class PlainPyTorchMemory(ProductKeyMemory):
    """The same layer, its lookup and its read written as one would at first."""

    def forward(self, x):
        shape, x = x.shape, x.reshape(-1, self.dim)
        queries = F.normalize(self.query_proj(x).view(len(x), self.heads, 2, -1), dim=-1) * self.qk_scale.view(1, -1, 1, 1)
        half_scores = torch.einsum("nhcd,hckd->nhck", queries, F.normalize(self.keys, dim=-1))
        scores, indices = half_scores.topk(self.knn)
        sums = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(-2)
        slots = (indices[:, :, 0, :, None] * self.n_keys + indices[:, :, 1, None, :]).flatten(-2)
        best, chosen = sums.topk(self.knn)
        weights = F.softmax(best, dim=-1)
        y = F.embedding_bag(slots.gather(-1, chosen).flatten(1), self.table.values, per_sample_weights=weights.flatten(1), mode="sum")
        return self.out_proj(y * F.silu(self.gate_proj(x))).view(shape)


def measure(kind, config, n_keys):
    """One process's timings: {"forward": ms, "backward": ms, "update": ms, "step": ms, "peak_gb": GB}, medians."""
    device = pick_device(config.device)
    if config.keep_freed:
        keep_freed_memory()
    torch.manual_seed(0)
    layer_class = ProductKeyMemory if kind == "nanomem" else PlainPyTorchMemory
    with device:
        table = MemoryTable(n_keys**2, config.dim, sparse_grad=kind == "nanomem")
        layer = layer_class(config.dim, table, config.heads, config.knn, config.k_dim)
    if kind == "nanomem":
        optimizers = optim.build_optimizer(layer)
    else:
        optimizers = [torch.optim.AdamW(layer.parameters(), lr=1e-3, fused=True)]

    def now():
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    rows = []
    for _ in range(3 + config.steps):
        x = torch.randn(1, config.tokens, config.dim, device=device, requires_grad=True)
        grad = torch.randn(1, config.tokens, config.dim, device=device)
        start = now()
        y = layer(x)
        forward = now()
        y.backward(grad)
        backward = now()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        end = now()
        rows.append((forward - start, backward - forward, end - backward, end - start))
    names = ("forward", "backward", "update", "step")
    result = {name: statistics.median(column) * 1e3 for name, column in zip(names, zip(*rows[3:]))}
    on_gpu = device.type == "cuda"
    return result | {"peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else peak_rss()}


def peak_rss():
    """The process's largest resident size so far, in GB."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def in_own_process(kind, keep_freed, config, n_keys):
    """`measure` in a new process. Raises UserError with what it said if it fails."""
    command = [sys.executable, "-m", "nanomem.bench", f"--only={kind}", f"--n_keys={n_keys}", f"--keep_freed={str(keep_freed).lower()}"]
    command += [f"--{name}={getattr(config, name)}" for name in ("tokens", "dim", "heads", "knn", "k_dim", "steps", "device")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[1:])} ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def memory_needed(kind, config, n_keys):
    """Bytes that the table takes in training: values, gradient and two moments, or values and 8 bytes a slot."""
    return n_keys**2 * (config.dim * 16 if kind == "pytorch" else config.dim * 4 + 8)


def main():
    """Runs the measurements in turn and prints the table."""
    config = BenchConfig(**parse(BenchConfig, sys.argv[1:]))
    if not all(n.strip().isdecimal() and int(n) >= max(config.knn, 1) for n in config.n_keys.split(",")):
        raise UserError(f"n_keys must be numbers such as 1024,4096, none below knn = {config.knn}; got {config.n_keys!r}")
    for name in ("tokens", "dim", "heads", "knn", "k_dim", "steps", "rounds"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be 1 or more, got {getattr(config, name)}")
    sizes = [int(n) for n in config.n_keys.split(",")]
    if config.only:
        print(json.dumps(measure(config.only, config, sizes[0])))
        return
    device, console = pick_device(config.device), Console(highlight=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads, {platform.machine()}"
    rows = [(n, kind, kept) for n in sizes for kept in ((False, True) if device.type == "cpu" else (False,)) for kind in KINDS]
    fitting = [row for row in rows if memory_needed(row[1], config, row[0]) < 0.9 * machine_memory(device)]
    results = {row: [] for row in fitting}
    for n, kind, kept in track(fitting * config.rounds, "measuring", console=console, disable=not console.is_terminal):
        results[n, kind, kept].append(in_own_process(kind, kept, config, n))
    median = {row: {key: statistics.median(r[key] for r in found) for key in found[0]} for row, found in results.items()}

    console.print(f"One layer step: {config.tokens} tokens, d={config.dim}, {config.heads} heads, k={config.knn}, k_dim {config.k_dim}; "
                  f"{name}, torch {torch.__version__}", soft_wrap=True)
    table = Table()
    for title in ("slots", "layer", "freed memory", "forward", "backward", "update", "step ms", "peak GB", "times as fast"):
        table.add_column(title, justify="left" if title in ("layer", "freed memory") else "right")
    for n, kind, kept in rows:
        cells = [f"{n**2:,}", kind, "kept" if kept else "given back"]
        if (n, kind, kept) in median:
            row = median[n, kind, kept]
            cells += [f"{row[key]:.1f}" for key in ("forward", "backward", "update", "step", "peak_gb")]
            cells += [f"{median[n, 'pytorch', kept]['step'] / row['step']:.2f}"] if (n, "pytorch", kept) in median else []
        else:
            cells += ["", "", "", "", f"needs {memory_needed(kind, config, n) / 1e9:.0f}"]
        table.add_row(*cells, end_section=kind == KINDS[-1] and kept == rows[-1][2])
    console.print(table)


if __name__ == "__main__":
    with one_line_errors():
        main()
