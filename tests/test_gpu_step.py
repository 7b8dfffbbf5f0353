"""What a step does on a GPU, found out without one: see gpu_step.py."""

import sys
from unittest import mock

import pytest
import torch
from gpu_step import Nothing, Waits, kernels_on_meta, layers_on_meta, no_launch, peak_of_step, step_on_meta
from rich.console import Console
from runs import TINY

from nanomem import kernels

pytest.importorskip("triton", reason="Triton, which only Linux has")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("NANOMEM_KERNELS", "triton")
    torch.manual_seed(0)


@pytest.fixture
def waits(monkeypatch):
    """Watches for waits, but not within the interpreter, which computes what a GPU would."""
    watching = Waits(DEVICE)
    kernel = type(kernels._sddmm_kernel)
    launch = kernel.__getitem__

    def hidden(self, grid):
        def call(*args, **options):
            with watching.paused():
                return launch(self, grid)(*args, **options)
        return call

    if DEVICE == "cpu":
        monkeypatch.setattr(kernel, "__getitem__", hidden)
    return watching


def loop_of(train, console):
    """(job, a function that computes an update as train.train does) of train.py."""
    job = train.set_up(train.given, console)
    forward, parallel = train.wrap(job)
    passes = train.batches_at(job, 0)
    interrupt = mock.Mock(requested=False)

    def step():
        train.set_learning_rates(job)
        losses = train.backward(job, forward, parallel, passes)
        norms = train.clip(job)
        train.check(job, losses, norms, interrupt)
        train.update(job)
    return job, step


@pytest.mark.parametrize("arguments", [
    ["--mem_layers=0,1"],  # more lookups than slots: dense gradients
    ["--mem_n_keys=24", "--gradient_accumulation_steps=2", "--mem_dropout=0.1"],  # sparse ones
    ["--ffn=peer"],
])
def test_an_update_of_train_py_waits_for_the_gpu_once(arguments, waits, tmp_path, monkeypatch):
    arguments = [*TINY, "--batch_size=1", "--grad_clip=0.01", *arguments, f"--device={DEVICE}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, f"--out_dir={tmp_path}"])
    monkeypatch.delitem(sys.modules, "train", raising=False)
    import train
    job, step = loop_of(train, Console(quiet=True))
    before = [p.detach().clone() for p in job.model.parameters()]
    step()  # makes tensors that are kept, such as the optimizers' state
    with waits.watch() as found:
        step()
    assert found == ["tolist"]  # the losses and norms
    assert not any(torch.equal(p, old) for p, old in zip(job.model.parameters(), before))


@pytest.mark.parametrize("n_keys", [16, 512])  # dense and sparse gradients
def test_memory_layers_with_one_table_and_several_passes_do_not_wait_for_the_gpu(n_keys):
    model = layers_on_meta(2, n_keys, dim=8, heads=2, knn=3, k_dim=8)
    with kernels_on_meta(no_launch):
        with Nothing():
            step_on_meta(model, passes=1, n=64)  # makes what is kept
        with Waits("meta").watch() as found:
            step_on_meta(model, passes=2, n=64)
    assert found == []


def test_what_waits_is_noticed():
    x, waits = torch.arange(4), Waits("cpu")
    for wait in (x.sum().item, x.nonzero, x.unique, lambda: x.tolist(), lambda: x.cpu(), lambda: bool(x[0]),
                 lambda: x[x > 1], lambda: torch.tensor([3]), lambda: x.repeat_interleave(x)):
        waits.found.clear()
        with waits.watch() as found:
            wait()
        assert found, wait


def test_eight_passes_of_three_layers_take_little_more_memory_than_one():
    assert peak_of_step(layers=3, passes=8) <= 1.3 * peak_of_step(layers=3, passes=1)
