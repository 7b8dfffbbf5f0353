"""Runs train.py and sample.py with their command lines and a model that trains in seconds."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

from nanomem import checkpoint as checkpoint_files

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "--device=cpu",
    "--data=world",
    "--n_entities=20",
    "--n_layer=2",
    "--n_embd=16",
    "--n_head=2",
    "--block_size=32",
    "--batch_size=4",
    "--mem_layers=1",
    "--mem_n_keys=8",
    "--mem_knn=2",
    "--mem_heads=2",
    "--eval_iters=2",
    "--eval_interval=5",
    "--log_interval=2",
    "--warmup_iters=2",
]


def start(script, *arguments, processes=None, restarts=0, **options):
    """A running process of its own, or so many of torchrun's; its output is text."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    launcher = (
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            f"--max_restarts={restarts}",
        ]
        if processes
        else []
    )
    options = (
        dict(
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        | options
    )
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / script), *map(str, arguments)], **options)


def run(script, *arguments, code=0, input=""):
    """(stdout, stderr) of a script run in this process, which saves importing torch each time, with this
    input and exit code.
    """
    out, err, ended = io.StringIO(), io.StringIO(), 0
    path, lock = ROOT / script, checkpoint_files.lock
    with (
        contextlib.ExitStack() as locks,
        mock.patch.object(sys, "argv", [str(path), *map(str, arguments)]),
        mock.patch.dict(os.environ, COLUMNS="160"),
        mock.patch.object(sys, "stdin", io.StringIO(input)),
        mock.patch.object(checkpoint_files, "lock", lambda folder: locks.enter_context(lock(folder))),
    ):  # it ends with the script
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as stop:
                ended = stop.code or 0
                if isinstance(ended, str):  # sys.exit("message") prints it and exits with 1
                    ended = print(ended, file=err) or 1
    assert ended == code, f"exit code {ended}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def wait_until(condition, process, seconds=60):
    """Returns once condition() is true. Fails if the process ends first, or after this many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the process ended early: {process.communicate()}"
        assert time.monotonic() < deadline, "the condition was never met"
        time.sleep(0.02)


def train(out_dir, *arguments, **options):
    """train.py with the tiny model."""
    return run("train.py", *TINY, f"--out_dir={out_dir}", *arguments, **options)


def checkpoint(out_dir):
    """All tensors of the newest checkpoint, whatever number of processes wrote it; tables put together
    again.
    """
    folder = max(Path(out_dir).glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    parts = [load_file(path) for path in sorted(folder.glob("part-*"))]
    split = parts[-1] if len(parts) > 1 else {}
    return {
        name: torch.cat([part[name] for part in parts], dim=1) if name in split else tensor
        for name, tensor in parts[0].items()
    }


def metrics(out_dir):
    """metrics.jsonl without the times, which differ from run to run."""
    rows = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in ("elapsed_s", "tokens_per_sec", "data_wait")}
        for row in rows
    ]
