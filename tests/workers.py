"""
What test_sharding.py has several processes do: torchrun ... tests/workers.py FUNCTION JSON, where the first
process prints the function's result as the last line, in JSON.
"""

import functools
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import runs

from nanomem import checkpoint, optim, sharding
from nanomem.cli import UserError
from nanomem.config import GPTConfig
from nanomem.memory import MemoryTable, ProductKeyMemory
from nanomem.model import GPT


def train(settings):
    """Runs train.py with each of these settings, in the same processes."""
    with mock.patch.object(sharding, "stop"):
        for arguments in settings:
            runs.run("train.py", *arguments)


def step_bytes(groups):
    """For each size of group: what one training step of all processes sends, counted from the tensors given
    to torch.distributed, and what it is made of.
    """
    return [_step_bytes(mem_parallel) for mem_parallel in groups]


def _step_bytes(mem_parallel):
    config = GPTConfig(
        vocab_size=50,
        n_layer=3,
        n_embd=24,
        n_head=2,
        block_size=16,
        mem_layers="0,2",
        mem_n_keys=12,
        mem_heads=2,
        mem_knn=3,
    )
    model = _model(config, mem_parallel)
    parallel = sharding.data_parallel(model)
    optimizers = optim.build_optimizer(model)
    torch.manual_seed(dist.get_rank())
    values, sent = sharding.tables(model)[0].values, 0

    def counted(collective, share):
        def call(*tensors, group=None, **options):
            nonlocal sent
            x, n = tensors[-1], dist.get_world_size(group)
            if x.numel() > n:  # a few numbers don't count
                sent += share(n) * x.nbytes
            return collective(*tensors, group=group, **options)
        return call

    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    for _ in range(2):  # DDP makes its buckets anew after the first
        sent, idx = 0, torch.randint(50, (4, 16))
        with (
            mock.patch.object(dist, gather, counted(getattr(dist, gather), lambda n: n - 1)),
            mock.patch.object(
                dist, "all_to_all_single", counted(dist.all_to_all_single, lambda n: (n - 1) / n)
            ),
            mock.patch.object(dist, "all_reduce", counted(dist.all_reduce, lambda n: 2 * (n - 1) / n)),
        ):
            parallel(idx, idx)[1].backward()
            of_group = len(optim.coalesce_gradient_(values)[0])
            sharding.add_replicas(model)
            of_all = len(optim.coalesce_gradient_(values)[0])
            optim.clip_gradients(model, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    everyones = sharding.gather((sent, of_group))
    return {
        "sent": sum(sent for sent, _ in everyones),
        "rows of a group": max(rows for _, rows in everyones),
        "rows": of_all,
        "core": model.count_parameters()[0],
        "tokens": 4 * 16 * dist.get_world_size(),
        "bytes per token": sharding.bytes_per_token(model),
        "table": values.untyped_storage().nbytes(),
    }


def replicas_without_a_gradient(settings):
    """What two replicas' tables are, one of them without a gradient: sparse and dense gradients, then none
    at all.
    """
    torch.manual_seed(0)
    table = sharding.ShardedTable(6, 2, sharding.make_mesh(torch.device("cpu"), 1))
    optimizer = optim.RowAdam([table.values], lr=0.1)
    results = []
    for grad in (
        torch.sparse_coo_tensor([[4, 1, 4]], torch.tensor([[1.0, 2], [3, 4], [5, 6]]), (6, 2)),
        torch.eye(6)[:, 1:3].clone(),
        None,
    ):
        table.values.grad = grad if sharding.rank() == 1 else None
        sharding.add_replicas(table)
        results.append(table.values.grad.to_dense().tolist())
        optimizer.step()
        optimizer.zero_grad()
    everyones = sharding.gather((results, table.values.tolist()))
    assert everyones[0] == everyones[1]
    return results


def dense_gradients_of_columns(settings):
    """Two processes with a column each of a table: after a dense gradient, the same rows of both have
    moved.
    """
    torch.manual_seed(0)
    table = sharding.ShardedTable(4, 2, sharding.make_mesh(torch.device("cpu"), 2))
    before = table.values.detach().clone()
    whole = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [1.0, 1.0]])
    table.values.grad = whole[:, sharding.rank():sharding.rank() + 1].clone()
    optim.RowAdam([table.values], lr=0.1, process_group=table.shard_group).step()
    moved = (table.values.detach() - before).flatten().tolist()
    return sharding.gather(moved)


def wrapped(settings):
    """What DDP and FSDP2 make of a bare layer: how far it is from one process's, or what they raise."""
    from torch.distributed.fsdp import fully_shard
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))
    mine = x[2 * sharding.rank():][:2]

    def make(sparse):
        torch.manual_seed(0)
        return ProductKeyMemory(8, MemoryTable(64, 8, sparse_grad=sparse), heads=2, knn=3, k_dim=8)

    def alone():
        layer = make(False)
        layer(x).square().mean().backward()
        return layer

    def whole(tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def distance(layer, of=lambda p: p.grad):
        return max(
            (whole(of(p)) - of(q)).abs().max().item()
            for p, q in zip(layer.parameters(), expected.parameters())
        )

    def ddp(sparse):
        parallel = torch.nn.parallel.DistributedDataParallel(make(sparse))
        parallel(mine).square().mean().backward()
        return distance(parallel.module)

    def fsdp(sparse):
        layer = fully_shard(make(sparse))
        layer(mine).square().mean().backward()
        return layer

    def adamw():
        layer = fsdp(False)
        for each in (layer, expected):
            torch.optim.AdamW(each.parameters(), lr=0.1).step()
        return distance(layer, lambda p: p.detach())

    def clip():
        layer, other = fsdp(False), alone()
        return max(
            abs(whole(a) - b).item()
            for a, b in zip(optim.clip_gradients(layer, 0.01), optim.clip_gradients(other, 0.01))
        )

    def meta():
        with torch.device("meta"):
            layer = make(False)
        fully_shard(layer).to_empty(device="cpu")
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return [
            (whole(a).std() / b.std()).item()
            for a, b in ((layer.table.values, expected.table.values), (layer.keys, expected.keys))
        ] + [(whole(layer.qk_scale) / expected.qk_scale).mean().item()]

    told = {}
    for name, use in {
        "ddp dense": lambda: ddp(False),
        "ddp sparse": lambda: ddp(True),
        "fsdp dense": lambda: distance(fsdp(False)),
        "fsdp sparse": lambda: fsdp(True),
        "fsdp RowAdam": lambda: [o.step() for o in optim.build_optimizer(fsdp(False))],
        "fsdp clip": clip,
        "fsdp meta": meta,
        "fsdp adamw": adamw,
    }.items():
        expected = alone()
        try:
            told[name] = use()
        except (RuntimeError, ValueError) as error:
            told[name] = f"{error}"
    return told


def _model(config, mem_parallel):
    mesh = sharding.make_mesh(torch.device("cpu"), mem_parallel)
    torch.manual_seed(0)
    return GPT(config, functools.partial(sharding.ShardedTable, mesh=mesh))


def disagree(folder):
    """What each process is told where one's settings, data or files differ."""
    told = {}
    for name, arguments in {
        "settings": [f"--learning_rate=0.{1 + sharding.rank()}"],
        "data": ["--data=book.txt"],
        "file": ["--data=only0.txt"],
        "share": ["--batch_size=5"],
        "columns": ["--mem_v_dim=31"],
        "group": ["--mem_parallel=5"],
    }.items():
        here = Path(folder) / str(sharding.rank())
        here.mkdir(parents=True, exist_ok=True)
        (here / "book.txt").write_text(f"{sharding.rank()} and the like " * 100)
        if sharding.rank() == 0:
            (here / "only0.txt").write_text("here and not there " * 100)
        os.chdir(here)
        # Each prints, as on a machine of its own, and none ends.
        with mock.patch.dict(os.environ, LOCAL_RANK="0"), mock.patch.object(sharding, "stop", sys.exit):
            told[name] = runs.run("train.py", *runs.TINY, "--out_dir=out", *arguments, code=2)[1]
    everyones = sharding.gather(told)
    assert all(theirs == everyones[0] for theirs in everyones), everyones
    return told


def full_disk(folder):
    """What is said and what is left where one process, not the first, can't write its part of a
    checkpoint.
    """
    import resource

    config = GPTConfig(
        vocab_size=50,
        n_layer=2,
        n_embd=32,
        n_head=2,
        block_size=16,
        mem_layers="0,1",
        mem_n_keys=12,
        mem_heads=2,
        mem_knn=3,
    )
    model = _model(config, 0)
    checkpoint.save(folder, model, [], {"config": {}, "iteration": 1})
    if sharding.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        checkpoint.save(folder, model, [], {"config": {}, "iteration": 2})
    except UserError as error:
        told = str(error)
    assert sharding.gather(told) == [told] * sharding.size()
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    sharding.start()
    result = globals()[sys.argv[1]](json.loads(sys.argv[2]))
    if os.environ["RANK"] == "0":
        print(json.dumps(result))
    sharding.stop()
