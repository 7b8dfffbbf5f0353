import torch

import runs
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
    assert out.count("nanomem") >= 2 and out.count("pytorch") >= 2 and "1,024" in out and "times as fast" in out
