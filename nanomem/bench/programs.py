"""The speed of whole programs: generation with and without the key-value cache, and data/prepare.py."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from nanomem import tokenizer
from nanomem.bench.settings import BenchConfig
from nanomem.cli import UserError
from nanomem.config import GPTConfig
from nanomem.model import GPT

PREPARE = Path(__file__).resolve().parent.parent.parent / "data" / "prepare.py"
WRITERS = {
    "the default model": dict(),
    "12 layers, 512 wide": dict(n_layer=12, n_head=8, n_embd=512, mem_layers="3,7,11"),
}


# ------------------------------------------------------------------------------------------------
# Generation


@torch.no_grad()
def time_generation(console: Console, device: torch.device, rounds: int, tokens: int = 256):
    """Prints the seconds that models take to write tokens one at a time, with and without the cache."""
    title = f"Writing {tokens} tokens after a prompt of 8, {device}, seconds (medians of {rounds})"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for column in ("model", "parameters", "with the cache", "without", "times as fast", "the same tokens"):
        table.add_column(column, justify="right")
    for name, shape in WRITERS.items():
        torch.manual_seed(0)
        with device:
            model = GPT(GPTConfig(block_size=tokens + 8, **shape)).eval()
            prompt = torch.randint(model.config.vocab_size, (1, 8))
        fast, slow, are_equal = time_model(model, prompt, rounds, tokens)
        parameters = sum(model.count_parameters())
        table.add_row(name, f"{parameters:,}", f"{fast:.2f}", f"{slow:.2f}", f"{slow / fast:.1f}",
                      "yes" if are_equal else "no")
    console.print(table)


def time_model(model, prompt, rounds, tokens):
    """(seconds with the cache, seconds without, whether both wrote the same tokens)"""
    seconds, written = {True: [], False: []}, {}
    for is_cached in (True, False) * rounds:
        started = time.perf_counter()
        write = write_with_cache if is_cached else write_without_cache
        written[is_cached] = write(model, prompt, tokens).tolist()  # waits for a GPU
        seconds[is_cached].append(time.perf_counter() - started)
    fast, slow = statistics.median(seconds[True]), statistics.median(seconds[False])
    return fast, slow, written[True] == written[False]


def write_with_cache(model, idx, tokens):
    """The prompt (1, t) and the likeliest tokens after it: (1, t + tokens)."""
    return torch.cat([idx, *model.generate(idx, tokens, temperature=0)], dim=1)


def write_without_cache(model, idx, tokens):
    """The same, computing all tokens again for each new one."""
    for _ in range(tokens):
        logits, _ = model(idx)
        idx = torch.cat([idx, logits[:, -1:].argmax(-1)], dim=1)
    return idx


# ------------------------------------------------------------------------------------------------
# data/prepare.py


def time_prepare(console: Console, config: BenchConfig, sample: int = 2**25):
    """Prints how fast data/prepare.py turns a text file into shards, and its memory.

    Beside it, how fast tiktoken alone is on the first `sample` bytes, in one thread and in as many as there
    are workers, before and after: cores may share parts.
    """
    import resource  # not on Windows

    encoding, workers = tokenizer.by_name(config.tokenizer), os.cpu_count()
    with open(config.prepare, "rb") as file:
        text = file.read(sample).decode(errors="ignore")
    before = {threads: tiktoken_speed(encoding, text, threads) for threads in (1, workers)}
    seconds = run_prepare(config, workers)
    after = {threads: tiktoken_speed(encoding, text, threads) for threads in (1, workers)}

    speed = Path(config.prepare).stat().st_size / seconds / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    console.print(f"data/prepare.py with {workers} workers: {speed:.1f} MB/s from start to end, "
                  f"peak memory {peak / 1e6:.0f} MB")
    for threads in before:
        threads_text = "1 thread" if threads == 1 else f"{threads} threads"
        bound = f"{workers} times as much" if threads == 1 else "it"
        share = speed * threads / workers / statistics.mean([before[threads], after[threads]])
        console.print(f"tiktoken alone, {threads_text}: {before[threads]:.1f} and {after[threads]:.1f} MB/s, "
                      f"so that is {share:.0%} of {bound}")


def tiktoken_speed(encoding, text, threads):
    """MB/s at which this many threads encode the text, all of it each."""
    segments = [text[i:i + 2**20] for i in range(0, len(text), 2**20)]

    def encode_all():
        for segment in segments:
            encoding.encode_to_numpy(segment, disallowed_special=())

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(encode_all) for _ in range(threads)]
        for future in futures:
            future.result()
    return threads * len(text.encode()) / (time.perf_counter() - started) / 1e6


def run_prepare(config, workers):
    """The seconds that data/prepare.py takes. Raises UserError with its message if it fails."""
    with tempfile.TemporaryDirectory(dir=Path(config.prepare).resolve().parent) as folder:
        started = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, str(PREPARE), config.prepare, f"--out={folder}/shards", f"--workers={workers}",
             f"--tokenizer={config.tokenizer}"],
            capture_output=True, encoding="utf-8")
        if ended.returncode:
            raise UserError(f"data/prepare.py failed: {ended.stderr.strip()}")
        return time.perf_counter() - started
