import io
import subprocess
import sys

import runs
import torch
from rich.console import Console

from nanomem.bench import programs
from nanomem.bench.layers import PlainPyTorchMemory
from nanomem.memory import MemoryTable, ProductKeyMemory

SMALL = ["--n_keys=32", "--tokens=64", "--dim=16", "--k_dim=8", "--steps=2", "--rounds=1", "--device=cpu"]


def bench(*arguments):
    """What the benchmark prints."""
    return runs.run("nanomem/bench/__main__.py", *arguments)[0]


def test_the_two_layers_compared_compute_the_same():
    torch.manual_seed(0)
    ours = ProductKeyMemory(8, MemoryTable(256, 8), heads=2, knn=4, k_dim=8).double()
    plain = PlainPyTorchMemory(8, MemoryTable(256, 8), heads=2, knn=4, k_dim=8).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), plain(x))


def test_the_table_shows_both_layers_and_how_many_times_as_fast(monkeypatch):
    calls = []

    def in_this_process(command, **_):
        calls.append(command)
        arguments = [a for a in command[3:] if not a.startswith("--keep_freed")]  # it can't be undone
        return subprocess.CompletedProcess(command, 0, stdout=bench(*arguments))

    monkeypatch.setattr(subprocess, "run", in_this_process)
    out = bench(*SMALL)
    assert all(command[:3] == [sys.executable, "-m", "nanomem.bench"] for command in calls)
    assert out.count("nanomem") >= 2 and out.count("pytorch") >= 2
    assert "1,024 slots" in out and "times as fast" in out


def test_a_measurement_that_fails_is_named_and_the_others_are_shown(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="first\nthe reason\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert bench(*SMALL).count("the reason") == 4


def test_a_measurement_in_a_process_of_its_own():
    command = [sys.executable, "-m", "nanomem.bench", "--only=nanomem", "--keep_freed=true", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True)
    assert '"step": ' in done.stdout and '"peak_gb": ' in done.stdout, done.stderr


def test_the_parts_alone_are_timed():
    out = bench("--only=kernels", *SMALL)
    for name in ("copy_gb_s", "topk", "merge_halves", "read_share", "backward_share", "update_share"):
        assert f'"{name}": ' in out


def test_generation_is_timed_with_the_cache_and_without(monkeypatch):
    monkeypatch.setattr(programs, "WRITERS", {"small": dict(n_layer=2, mem_layers="1", mem_n_keys=32)})
    console = Console(width=120, record=True, file=io.StringIO())
    programs.time_generation(console, torch.device("cpu"), 1, tokens=20)
    row = next(line.split() for line in console.export_text().splitlines() if "small" in line)
    assert row[-1] == "yes" and float(row[2]) > 0


def test_prepare_is_timed_beside_tiktoken_alone(tmp_path):
    (tmp_path / "book.txt").write_text("All work and no play makes Jack a dull boy.\n" * 2000)
    out = bench(f"--prepare={tmp_path / 'book.txt'}")
    assert "MB/s from start to end, peak memory" in out
    assert list(tmp_path.iterdir()) == [tmp_path / "book.txt"]
