"""
Times one training step of a memory layer beside the same layer written with PyTorch's parts.

    python -m nanomem.bench                   on a CPU: 4,096 tokens, d=128, 4 heads, k=16, 1M and 16M slots
    python -m nanomem.bench --device=cuda     on a GPU: that shape and larger ones, up to the paper's
    python -m nanomem.bench --device=cuda --paper=PATH    the paper's layer too, in a clone of its code
    python -m nanomem.bench --n_keys=256 --knn=32 --dim=256
    python -m nanomem.bench --generation      writing 256 tokens, with and without the key-value cache
    python -m nanomem.bench --prepare=big.txt  speed and memory of data/prepare.py, beside tiktoken alone

A step is forward, backward (to the input, too), and the update of all parameters. All layers have the same
parts (query projection, qk-norm, gate, output projection; the paper's has no qk-norm) and differ in three
places:

    nanomem   pruned candidates                 memory_read         RowAdam over the rows read
    pytorch   einsum and all k*k candidates     F.embedding_bag     fused AdamW over a dense gradient
    compiled  the same, compiled                by torch.compile    (on a GPU)
    paper     einsum and all k*k candidates     its Triton kernels  fused AdamW over a dense gradient

Each measurement runs in its own process, because the first layer would pay for allocating memory that the
others reuse. They take turns, and the table shows medians. "Read" includes the gate and the output
projection. On a CPU, each is timed with the default allocator and with train.py's allocator settings
(nanomem.config.keep_freed_memory), which help dense gradients most. On a GPU, a second table shows how near
the kernels come to what the card can do: the bytes they must move over their time, as a share of what a copy
reaches in the same process.

docs/log.md says what was tried to make it faster.
"""

import dataclasses
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from nanomem.bench.settings import BenchConfig, Shape, shapes_of
from nanomem.cli import UserError, one_line_errors, parse, safe_streams

given = None
if __name__ == "__main__":
    safe_streams()
    with one_line_errors():
        given = parse(BenchConfig, sys.argv[1:])  # before torch is imported, which takes seconds

import torch
from rich.console import Console
from rich.progress import track

from nanomem.bench.layers import measure
from nanomem.bench.parts import measure_parts
from nanomem.bench.programs import time_generation, time_prepare
from nanomem.bench.tables import show_parts, show_steps
from nanomem.config import machine_memory, pick_device


def time_layers(console, config, shapes, device):
    """Measures all layers at all shapes in turn, and prints a table for each shape."""
    is_cuda, dtype = device.type == "cuda", config.torch_dtype(device)
    cores = f"{torch.get_num_threads()} threads, {platform.machine()}"
    name = torch.cuda.get_device_name(device) if is_cuda else cores
    console.print(f"One training step of a memory layer; {name}, {dtype}, torch {torch.__version__}")
    kinds = ["nanomem", "pytorch"]
    if is_cuda:
        kinds.append("compiled")
    if config.paper:
        kinds.append("paper")
    tasks = []
    for shape in shapes:
        for keeps_freed in (False, True) if device.type == "cpu" else (None,):
            tasks += [(shape, kind, keeps_freed) for kind in kinds]
        if is_cuda:
            tasks.append((shape, "kernels", None))
    found = {task: [] for task in tasks}
    turns = tasks * config.rounds
    for task in track(turns, "measuring", console=console, disable=not console.is_terminal):
        found[task].append(measure_one(*task, config, device, dtype))

    for shape in shapes:
        medians = {task[1:]: median(results) for task, results in found.items() if task[0] == shape}
        parts = medians.pop(("kernels", None), None)
        show_steps(console, shape, medians)
        if parts:
            show_parts(console, parts)


def measure_one(shape, kind, keeps_freed, config, device, dtype):
    """One process's measurement; {"failed": reason} if it needs too much memory or fails."""
    needed = memory_needed(kind, shape, dtype.itemsize)
    if needed > 0.9 * machine_memory(device):
        return {"failed": f"{needed / 1e9:.0f} GB"}
    settings = dataclasses.asdict(shape) | {"only": kind, "keep_freed": str(bool(keeps_freed)).lower()}
    settings |= {name: getattr(config, name) for name in ("steps", "device", "dtype", "paper")}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "nanomem.bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": said[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def memory_needed(kind: str, shape: Shape, itemsize: int) -> int:
    """Bytes that a table takes in training: values and 8 per slot, or values, gradient and two moments."""
    if kind == "kernels":
        return 0  # it leaves out what doesn't fit
    per_slot = shape.dim * itemsize + 8 if kind == "nanomem" else 4 * shape.dim * itemsize
    return shape.n_keys**2 * per_slot


def median(results: list[dict]) -> dict:
    """The median of each number; the first failure if one failed."""
    for result in results:
        if "failed" in result:
            return result
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def check_paper(config, device):
    """Raises UserError if --paper can't be measured."""
    if not config.paper:
        return
    if not Path(config.paper, "lingua", "product_key", "memory.py").exists():
        raise UserError(f"--paper={config.paper} has no lingua/product_key/memory.py: "
                        "expected a clone of facebookresearch/memory")
    if device.type != "cuda" or config.heads < 2:
        raise UserError(f"--paper needs --device=cuda and 2 heads or more, got {device} and {config.heads}: "
                        "the paper's layer needs both")


def main(given: dict):
    """Runs the measurements that the command line asks for."""
    config = BenchConfig(**given)
    device, console = pick_device(config.device), Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 110)
    shapes = shapes_of(config, given, device.type == "cuda")
    if config.only == "kernels":
        print(json.dumps(measure_parts(config, shapes[0])))
    elif config.only:
        print(json.dumps(measure(config.only, config, shapes[0])))
    elif config.prepare:
        time_prepare(console, config)
    elif config.generation:
        time_generation(console, device, config.rounds)
    else:
        check_paper(config, device)
        time_layers(console, config, shapes, device)


if __name__ == "__main__":
    with one_line_errors():
        main(given)
