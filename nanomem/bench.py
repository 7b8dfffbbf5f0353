"""
Times one training step of a memory layer beside the same layer written with PyTorch's parts.

    python -m nanomem.bench                   on a CPU: 4,096 tokens, d=128, 4 heads, k=16, 1M and 16M slots
    python -m nanomem.bench --device=cuda     on a GPU: that shape and larger ones, up to the paper's
    python -m nanomem.bench --device=cuda --paper=PATH    also the paper's, in a clone of its code
    python -m nanomem.bench --n_keys=256 --knn=32 --dim=256
    python -m nanomem.bench --generation      writing 256 tokens, with and without the key-value cache
    python -m nanomem.bench --prepare=big.txt  speed and memory of data/prepare.py, beside tiktoken alone

A step is forward, backward (to the input, too), and the update of all parameters. All layers have the same
parts (query
projection, qk-norm, gate, output projection; the paper's has no qk-norm) and differ in three places:

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

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nanomem import optim, tokenizer
from nanomem.cli import UserError, one_line_errors, parse, safe_streams, setting
from nanomem.config import GPTConfig, keep_freed_memory, machine_memory, pick_device
from nanomem.memory import MemoryTable, ProductKeyMemory, memory_read, merge_halves, product_key_topk
from nanomem.model import GPT

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("nanomem", "pytorch", "compiled", "paper")
SHAPE = ("tokens", "dim", "heads", "knn", "k_dim", "n_keys")
CPU_SHAPES = [(4096, 128, 4, 16, 128, 1024), (4096, 128, 4, 16, 128, 4096)]
GPU_SHAPES = [
    (4096, 128, 4, 16, 128, 1024),
    (16384, 512, 4, 32, 256, 512),
    (32768, 1024, 4, 32, 512, 1024),
    (32768, 1024, 4, 32, 512, 2048),
]


@dataclass
class BenchConfig:
    """The settings of the benchmark."""

    n_keys: str = setting(
        "auto", "keys a half, one or several: n_keys**2 slots; auto: the shapes above", section="Settings"
    )
    tokens: int = setting(4096, "tokens a step")
    dim: int = setting(128, "width of input, output and values")
    heads: int = setting(4, "lookups a token")
    knn: int = setting(16, "slots read by each head")
    k_dim: int = setting(128, "length of a query and of a key")
    steps: int = setting(10, "steps timed in a process, after 3 that are not")
    rounds: int = setting(3, "processes for each measurement, in turn")
    device: str = setting(
        "auto", "cpu, cuda, cuda:1, mps; auto: the first of cuda, mps and cpu that is there"
    )
    dtype: str = setting(
        "auto",
        "of parameters and activations; auto: bfloat16 on cuda, else float32",
        ("auto", "float32", "bfloat16"),
    )
    paper: str = setting(
        "", "a checkout of facebookresearch/memory, the paper's code, to measure beside", path=True
    )
    generation: bool = setting(False, "time whole models that write 256 tokens in place of layers")
    prepare: str = setting("", "time data/prepare.py on this text file in place of layers", path=True)
    tokenizer: str = setting("bytes", "the tokenizer for --prepare", path=True)
    keep_freed: bool = setting(False, "with --only: call keep_freed_memory first, as train.py does")
    only: str = setting(
        "",
        "measure this in this process and print JSON: what the benchmark calls itself with",
        ("", *KINDS, "kernels"),
    )


# ------------------------------------------------------------------------------------------------
# The layers


class PlainPyTorchTable(MemoryTable):
    """Reads as one would at first."""

    def forward(self, indices, weights):
        return F.embedding_bag(
            indices, self.values, per_sample_weights=weights.to(self.values.dtype), mode="sum"
        )


class PlainPyTorchMemory(ProductKeyMemory):
    """The same layer, its lookup written as one would at first."""

    def lookup(self, x):
        queries = F.normalize(
            self.query_proj(x).view(len(x), self.heads, 2, -1), dim=-1
        ) * self.qk_scale.view(1, -1, 1, 1)
        half_scores = torch.einsum("nhcd,hckd->nhck", queries, F.normalize(self.keys, dim=-1))
        scores, indices = half_scores.topk(self.knn)
        sums = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(-2)
        slots = (indices[:, :, 0, :, None] * self.n_keys + indices[:, :, 1, None, :]).flatten(-2)
        best, chosen = sums.topk(self.knn)
        return slots.gather(-1, chosen), F.softmax(best, dim=-1)


def paper_layer(config, n_keys):
    """The paper's own layer, and the module that reads its values."""
    sys.path.insert(0, config.paper)
    from lingua.product_key.memory import HashingMemory

    layer = HashingMemory(
        config.dim,
        config.dim,
        mem_k_dim=config.k_dim,
        mem_heads=config.heads,
        mem_knn=config.knn,
        mem_n_keys=n_keys,
    )
    layer.reset_parameters()
    return layer, layer.values


def build(kind, config, n_keys, device, dtype):
    """(the layer, the module in it that reads values, its optimizers)"""
    with device:
        if kind == "paper":
            layer, table = paper_layer(config, n_keys)
        else:
            layer_class, table_class = (
                (ProductKeyMemory, MemoryTable)
                if kind == "nanomem"
                else (PlainPyTorchMemory, PlainPyTorchTable)
            )
            table = table_class(n_keys**2, config.dim, dtype=dtype)
            layer = layer_class(config.dim, table, config.heads, config.knn, config.k_dim)
    layer.to(dtype)
    if kind == "nanomem":
        return layer, table, optim.build_optimizer(layer)
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=1e-3, fused=True)]
    return (torch.compile(layer) if kind == "compiled" else layer), table, optimizers


# ------------------------------------------------------------------------------------------------
# Measuring


class Clock:
    """Moments in time, on the GPU's own clock where there is one."""

    def __init__(self, device):
        self.on_gpu, self.on_mps, self.moments = device.type == "cuda", device.type == "mps", []

    def mark(self, *_):
        if self.on_mps:
            torch.mps.synchronize()
        if self.on_gpu:
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())

    def read(self):
        """Milliseconds between one moment and the next, and from first to last; forgets them."""
        if self.on_gpu:
            torch.cuda.synchronize()
        moments, self.moments = self.moments, []
        between = (lambda a, b: a.elapsed_time(b)) if self.on_gpu else (lambda a, b: 1e3 * (b - a))
        return [between(a, b) for a, b in [*zip(moments, moments[1:]), (moments[0], moments[-1])]]


def measure(kind, config, n_keys):
    """One process's timings in ms, medians: {"lookup", "read", "backward", "update", "step"}, and
    "peak_gb".
    """
    device = pick_device(config.device)
    dtype = dtype_of(config, device)
    if config.keep_freed:
        keep_freed_memory()
    torch.manual_seed(0)
    layer, table, optimizers = build(kind, config, n_keys, device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # not that of building the layer
    clock = Clock(device)
    hooked = kind != "compiled"  # torch.compile sees no parts
    if hooked:
        table.register_forward_pre_hook(clock.mark)
    names = (
        ("lookup", "read", "backward", "update", "step")
        if hooked
        else ("forward", "backward", "update", "step")
    )

    rows = []
    for _ in range(3 + config.steps):
        x = torch.randn(1, config.tokens, config.dim, device=device, dtype=dtype, requires_grad=True)
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
        rows.append(clock.read())
    result = {name: statistics.median(column) for name, column in zip(names, zip(*rows[3:]))}
    return result | {
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else peak_rss()
    }


def measure_kernels(config, n_keys):
    """The parts alone, on a GPU: milliseconds, and bytes they must move over time as a share of what a copy
    reaches.

    Reads and gradients are of slots drawn evenly; "scattered" of 100,000 slots spread over ever larger
    tables. The share of the backward pass counts each gradient that is gathered, so it can exceed 1 where
    the L2 cache holds them.
    """
    device = pick_device(config.device)
    dtype, tokens, dim, heads, knn = (
        dtype_of(config, device),
        config.tokens,
        config.dim,
        config.heads,
        config.knn,
    )
    clock, lookups, size = Clock(device), heads * knn, dtype.itemsize

    def ms(function):
        for _ in range(3):
            function()
        clock.mark()
        for _ in range(config.steps):  # one after the other, so that the CPU can run ahead of the GPU
            function()
        clock.mark()
        return clock.read()[0] / config.steps

    torch.manual_seed(0)
    source = torch.randn(2**28 if device.type == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / ms(lambda: target.copy_(source))  # bytes a millisecond
    source = target = None  # frees them

    queries = torch.randn(tokens, heads, 2, config.k_dim // 2, device=device, dtype=dtype)
    keys = torch.randn(heads, 2, n_keys, config.k_dim // 2, device=device, dtype=dtype)
    half_scores = torch.einsum("nhcd,hckd->hcnk", queries.float(), keys.float()).contiguous()
    candidates = torch.randn(tokens, heads, knn * knn, device=device)
    result = {"copy_gb_s": copied / 1e6, "topk": ms(lambda: product_key_topk(queries, keys, knn)),
              "select": ms(lambda: merge_halves(half_scores, knn)),
              "two_torch_topk": ms(lambda: (half_scores.topk(knn), candidates.topk(knn)))}
    half_scores = candidates = None  # frees them
    scores, _ = product_key_topk(queries.requires_grad_(), keys.requires_grad_(), knn)
    grad_scores = torch.randn_like(scores)
    result["topk_backward"] = ms(
        lambda: torch.autograd.grad(scores, (queries, keys), grad_scores, retain_graph=True)
    )

    def read_and_update(n_slots, unique):
        with device:
            table = MemoryTable(n_slots, dim, dtype=dtype)
        optimizer, weights = (
            optim.RowAdam([table.values]),
            torch.rand(tokens, lookups, device=device, dtype=dtype),
        )
        indices = torch.randint(unique, (tokens, lookups), device=device) * (n_slots // unique)
        grad = torch.randn(tokens, dim, device=device, dtype=dtype)
        with torch.no_grad():
            read = ms(lambda: memory_read(table.values, indices, weights))
        weights.requires_grad_()
        y = table(indices, weights)
        backward = ms(lambda: torch.autograd.grad(y, (table.values, weights), grad, retain_graph=True))
        table.values.grad = torch.autograd.grad(y, table.values, grad)[0]
        return read, backward, ms(optimizer.step), len(indices.unique())

    read, backward, update, unique = read_and_update(n_keys**2, n_keys**2)
    row = size * dim
    result |= {
        "read": read,
        "read_share": row * tokens * (lookups + 1) / read / copied,
        "backward": backward,
        "backward_share": row * (tokens * (lookups + 1) + 2 * unique) / backward / copied,
        "update": update,
        "update_share": unique * (3 * row + 24) / update / copied,
    }
    scattered = {
        n: read_and_update(n**2, 10**5)
        for n in (512, 1024, 2048, 4096)
        if n**2 * (2 * row + 8) < 0.8 * machine_memory(device)
    }
    return result | {f"scattered_{n**2:,}": sum(times[:3]) for n, times in scattered.items()}


def dtype_of(config, device):
    """The torch dtype that --dtype means on this device."""
    name = config.dtype if config.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def peak_rss():
    """The process's largest resident size so far, in GB."""
    import resource  # not on Windows

    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    )


def in_own_process(kind, shape, config, keep_freed=False):
    """`measure` or `measure_kernels` in a new process; {"failed": the last line it said} if it did, so that
    no other result is lost.
    """
    settings = dict(zip(SHAPE, shape)) | {"only": kind, "keep_freed": str(keep_freed).lower()}
    settings |= {name: getattr(config, name) for name in ("steps", "device", "dtype", "paper")}
    command = [
        sys.executable,
        "-m",
        "nanomem.bench",
        *(f"--{name}={value}" for name, value in settings.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def memory_needed(kind, shape, item_size):
    """Bytes that the table takes in training: values, gradient and two moments, or values and 8 bytes a
    slot.
    """
    _, dim, _, _, _, n_keys = shape
    return n_keys**2 * (dim * item_size + 8 if kind == "nanomem" else dim * item_size * 4)


# ------------------------------------------------------------------------------------------------
# Showing


def shapes_of(config, given, device):
    """The shapes to measure, as tuples in the order of SHAPE. Raises UserError for settings that can't
    be.
    """
    for name in ("tokens", "dim", "heads", "knn", "k_dim", "steps", "rounds"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be 1 or more, got {getattr(config, name)}")
    if not given.keys() & set(SHAPE):
        return GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    sizes = "1024,4096" if config.n_keys == "auto" else config.n_keys
    if not all(n.strip().isdecimal() and int(n) >= config.knn for n in sizes.split(",")):
        raise UserError(
            f"n_keys must be numbers such as 1024,4096, none below knn = {config.knn}; got {sizes!r}"
        )
    if config.k_dim % 2:
        raise UserError(f"k_dim must be even, to be split into two halves, got {config.k_dim}")
    return [(*(getattr(config, name) for name in SHAPE[:-1]), int(n)) for n in sizes.split(",")]


def title_of(shape):
    """A line that says what a table's rows are of."""
    tokens, dim, heads, knn, k_dim, n_keys = shape
    return f"{n_keys**2:,} slots: {tokens:,} tokens, d={dim}, {heads} heads, k={knn}, k_dim {k_dim}"


def show_steps(console, shape, rows):
    """A table of the layers' steps; rows {(kind, kept): medians, or {"failed": why}}."""
    table = Table(title=title_of(shape), box=box.SIMPLE, padding=(0, 1), title_justify="left")
    for title in (
        "layer",
        "memory",
        "lookup",
        "read",
        "backward",
        "update",
        "step ms",
        "peak GB",
        "times as fast",
    ):
        table.add_column(title, justify="left" if title in ("layer", "allocator") else "right")
    for (kind, kept), row in rows.items():
        cells = [kind, {None: "", True: "train.py's", False: "default"}[kept]]
        if "failed" in row:
            table.add_row(*cells, row["failed"])
            continue
        cells += (
            [f"{row['lookup']:.1f}", f"{row['read']:.1f}"]
            if "lookup" in row
            else [f"{row['forward']:.1f}", ""]
        )
        cells += [f"{row[key]:.1f}" for key in ("backward", "update", "step", "peak_gb")]
        plain = rows.get(("pytorch", kept), {})
        table.add_row(*cells, f"{plain['step'] / row['step']:.2f}" if "step" in plain else "")
    console.print(table)
    ours, plain = rows.get(("nanomem", True), {}), rows.get(("pytorch", False), {})
    if "step" in ours and "step" in plain:
        console.print(
            "  nanomem with train.py's allocator settings, pytorch with the default allocator: "
            f"{plain['step'] / ours['step']:.2f} times as fast\n"
        )


def show_kernels(console, row):
    """What the kernels alone reach."""
    if "failed" in row:
        console.print(f"the parts alone: {row['failed']}")
        return
    console.print(
        f"copy {row['copy_gb_s']:,.0f} GB/s   scores and top-k {row['topk']:.2f} ms, "
        f"their gradients {row['topk_backward']:.2f} ms; "
        f"top-k alone {row['select']:.2f} ms, the two torch.topk in its place {row['two_torch_topk']:.2f} ms"
    )
    console.print(
        "   ".join(
            f"{name} {row[name]:.2f} ms, {row[name + '_share']:.0%} of the copy's bandwidth"
            for name in ("read", "backward", "update")
        )
    )
    scattered = {
        name.removeprefix("scattered_"): ms for name, ms in row.items() if name.startswith("scattered_")
    }
    console.print(
        "read, backward and update of 100,000 slots scattered over "
        + ", ".join(f"{n}: {ms:.2f} ms" for n, ms in scattered.items())
        + "\n"
    )


WRITERS = {
    "the default model": dict(),
    "12 layers, 512 wide": dict(n_layer=12, n_head=8, n_embd=512, mem_layers="3,7,11"),
}


@torch.no_grad()
def time_generation(console, device, rounds, tokens=256):
    """A table of seconds that models take to write so many tokens, one at a time, with the cache and
    without, in turn.
    """
    table = Table(
        title=f"Writing {tokens} tokens after a prompt of 8, {device}, seconds (medians of {rounds})",
        box=box.SIMPLE,
        title_justify="left",
    )
    for title in ("model", "parameters", "with the cache", "without", "times as fast", "the same tokens"):
        table.add_column(title, justify="right")
    for name, shape in WRITERS.items():
        torch.manual_seed(0)
        with device:
            model = GPT(GPTConfig(block_size=tokens + 8, **shape)).eval()
            prompt = torch.randint(model.config.vocab_size, (1, 8))
        seconds, written = {True: [], False: []}, {}
        for cached in (True, False) * rounds:
            started, idx = time.perf_counter(), prompt
            if cached:
                idx = torch.cat([idx, *model.generate(idx, tokens, temperature=0)], dim=1)
            for _ in range(0 if cached else tokens):
                idx = torch.cat([idx, model(idx)[0][:, -1:].argmax(-1)], dim=1)
            written[cached] = idx.tolist()  # waits for a GPU
            seconds[cached].append(time.perf_counter() - started)
        fast, slow = (statistics.median(seconds[cached]) for cached in (True, False))
        table.add_row(
            name,
            f"{sum(model.count_parameters()):,}",
            f"{fast:.2f}",
            f"{slow:.2f}",
            f"{slow / fast:.1f}",
            "yes" if written[True] == written[False] else "no",
        )
    console.print(table)


def time_prepare(console, config, sample=2**25):
    """Says how fast data/prepare.py turns a text file into shards and the memory it takes, and how fast
    tiktoken alone is in one thread and in as many threads as there are workers, each on the first `sample`
    bytes, before and after: cores may share what is in them.
    """
    import resource  # which Windows doesn't have

    encoding, workers = tokenizer.by_name(config.tokenizer), os.cpu_count()
    with open(config.prepare, "rb") as file:
        text = file.read(sample).decode(errors="ignore")
    segments = [text[i:i + 2**20] for i in range(0, len(text), 2**20)]

    def alone(threads):
        """MB/s of them all."""
        started = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            for done in [
                pool.submit(
                    lambda: [encoding.encode_to_numpy(segment, disallowed_special=()) for segment in segments]
                )
                for _ in range(threads)
            ]:
                done.result()
        return threads * len(text.encode()) / (time.perf_counter() - started) / 1e6

    one, many = [alone(1)], [alone(workers)]
    with tempfile.TemporaryDirectory(dir=Path(config.prepare).resolve().parent) as folder:
        started = time.perf_counter()
        ended = subprocess.run(
            [
                sys.executable,
                str(ROOT / "data" / "prepare.py"),
                config.prepare,
                f"--out={folder}/shards",
                f"--workers={workers}",
                f"--tokenizer={config.tokenizer}",
            ],
            capture_output=True,
            encoding="utf-8",
        )
        if ended.returncode:
            raise UserError(f"data/prepare.py failed: {ended.stderr.strip()}")
        speed = Path(config.prepare).stat().st_size / (time.perf_counter() - started) / 1e6
    one.append(alone(1))
    many.append(alone(workers))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    console.print(
        f"data/prepare.py with {workers} workers: {speed:.1f} MB/s from start to end, "
            f"peak memory {peak / 1e6:.0f} MB"
    )
    for threads, speeds in ((1, one), (workers, many)):
        threads_text = "1 thread" if threads == 1 else f"{threads} threads"
        bound = f"{workers} times as much" if threads == 1 else "it"
        share = speed * threads / workers / statistics.mean(speeds)
        before, after = speeds
        console.print(f"tiktoken alone, {threads_text}: {before:.1f} and {after:.1f} MB/s, so that is "
                      f"{share:.0%} of {bound}")


def main():
    """Runs the measurements in turn and prints the tables."""
    given = parse(BenchConfig, sys.argv[1:])
    config = BenchConfig(**given)
    device, console = pick_device(config.device), Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 110)
    shapes = shapes_of(config, given, device)
    if config.only:
        result = (
            measure_kernels(config, shapes[0][-1])
            if config.only == "kernels"
            else measure(config.only, config, shapes[0][-1])
        )
        print(json.dumps(result))
        return
    if config.prepare:
        time_prepare(console, config)
        return
    if config.generation:
        time_generation(console, device, config.rounds)
        return
    on_cpu, on_gpu = device.type == "cpu", device.type == "cuda"
    if config.paper and not Path(config.paper, "lingua", "product_key", "memory.py").exists():
        raise UserError(
            f"--paper={config.paper} has no lingua/product_key/memory.py: "
            "expected a clone of facebookresearch/memory"
        )
    if config.paper and (not on_gpu or config.heads < 2):
        raise UserError(
            f"--paper needs --device=cuda and 2 heads or more, got {device} and {config.heads}: "
            "the paper's layer needs both"
        )
    name = (
        torch.cuda.get_device_name(device)
        if on_gpu
        else f"{torch.get_num_threads()} threads, {platform.machine()}"
    )
    dtype = dtype_of(config, device)
    console.print(f"One training step of a memory layer; {name}, {dtype}, torch {torch.__version__}")
    kinds = [kind for kind in KINDS if (kind != "compiled" or on_gpu) and (kind != "paper" or config.paper)]
    tasks = [
        (shape, kind, kept)
        for shape in shapes
        for kept in ((False, True) if on_cpu else (None,))
        for kind in kinds
    ]
    tasks += [(shape, "kernels", None) for shape in shapes if on_gpu]
    found = {task: [] for task in tasks}
    for shape, kind, kept in track(
        tasks * config.rounds, "measuring", console=console, disable=not console.is_terminal
    ):
        if kind != "kernels" and (
            needed := memory_needed(kind, shape, dtype.itemsize)
        ) > 0.9 * machine_memory(device):
            found[shape, kind, kept].append({"failed": f"{needed / 1e9:.0f} GB"})
        else:
            found[shape, kind, kept].append(in_own_process(kind, shape, config, bool(kept)))

    def median(rows):
        return next((r for r in rows if "failed" in r), None) or {
            key: statistics.median(r[key] for r in rows) for key in rows[0]}

    for shape in shapes:
        show_steps(
            console,
            shape,
            {
                (kind, kept): median(rows)
                for (s, kind, kept), rows in found.items()
                if s == shape and kind != "kernels"
            },
        )
        if on_gpu:
            show_kernels(console, median(found[shape, "kernels", None]))


if __name__ == "__main__":
    safe_streams()
    with one_line_errors():
        main()
