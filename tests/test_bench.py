import io

import runs
import torch
from rich.console import Console

from nanomem import bench
from nanomem.bench import PlainPyTorchMemory
from nanomem.memory import MemoryTable, ProductKeyMemory


def test_the_two_layers_compared_compute_the_same():
    torch.manual_seed(0)
    ours = ProductKeyMemory(8, MemoryTable(256, 8), heads=2, knn=4, k_dim=8).double()
    plain = PlainPyTorchMemory(8, MemoryTable(256, 8), heads=2, knn=4, k_dim=8).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), plain(x))


def test_the_table_shows_both_and_how_many_times_as_fast():
    out, _ = runs.run("nanomem/bench.py", "--n_keys=32", "--tokens=64", "--dim=16", "--k_dim=8", "--steps=2",
                      "--rounds=1", "--device=cpu")
    assert (
        out.count("nanomem") >= 2 and out.count("pytorch") >= 2 and "1,024" in out and "times as fast" in out
    )


def test_generation_is_timed_with_the_cache_and_without(monkeypatch):
    monkeypatch.setattr(bench, "WRITERS", {"small": dict(n_layer=2, mem_layers="1", mem_n_keys=32)})
    console = Console(width=120, record=True, file=io.StringIO())
    bench.time_generation(console, torch.device("cpu"), 1, tokens=20)
    row = next(line.split() for line in console.export_text().splitlines() if "small" in line)
    assert row[-1] == "yes" and float(row[2]) > 0


def test_prepare_is_timed_beside_tiktoken_alone(tmp_path):
    (tmp_path / "book.txt").write_text("All work and no play makes Jack a dull boy.\n" * 2000)
    out, _ = runs.run("nanomem/bench.py", f"--prepare={tmp_path / 'book.txt'}")
    assert "MB/s from start to end, peak memory" in out and list(tmp_path.iterdir()) == [
        tmp_path / "book.txt"
    ]
