"""
What test_sharding.py has several processes do.

    torchrun --standalone --nproc_per_node=4 tests/workers.py '[[4, "step_bytes", 2], [2, "wrapped"]]'

runs scenarios, each a number of processes (which may only fall), a function of this file and its arguments.
The last line that process 0 prints is the list of their results, in JSON.
"""

import contextlib
import functools
import json
import os
import resource
import shutil
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


def train(*argument_lists):
    """Runs train.py with each of these lists of arguments."""
    with mock.patch.object(sharding, "stop"):
        for arguments in argument_lists:
            runs.run("train.py", *arguments)


def resume_at_10(out_dir):
    """Repeats iterations 11 to 20 of a run, as if it had been stopped at 10. Returns the number of parts of
    checkpoint-20 before and after.
    """
    newest = Path(out_dir) / "checkpoint-20"
    before = len(list(newest.glob("part-*")))
    dist.barrier()
    if sharding.rank() == 0:
        shutil.rmtree(newest)
    dist.barrier()
    train(["--resume", f"--out_dir={out_dir}"])
    return before, len(list(newest.glob("part-*")))


def step_bytes(mem_parallel):
    """The bytes that all processes send in one training step, counted from the tensors passed to
    torch.distributed; and the numbers from which a formula predicts them.
    """
    model = _model(mem_parallel, n_layer=3, n_embd=24, mem_layers="0,2")
    parallel = sharding.data_parallel(model)
    optimizers = optim.build_optimizer(model)
    torch.manual_seed(dist.get_rank())
    values, sent = sharding.tables(model)[0].values, 0

    def counted(name, share):
        collective = getattr(dist, name)

        def call(*tensors, group=None, **options):
            nonlocal sent
            x, n = tensors[-1], dist.get_world_size(group)
            if x.numel() > n:  # a few numbers don't count
                sent += share(n) * x.nbytes
            return collective(*tensors, group=group, **options)
        return mock.patch.object(dist, name, call)

    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    for _ in range(2):  # DDP rearranges its buckets after the first step
        sent, idx = 0, torch.randint(50, (4, 16))
        with (
            counted(gather, lambda n: n - 1),
            counted("all_to_all_single", lambda n: (n - 1) / n),
            counted("all_reduce", lambda n: 2 * (n - 1) / n),
        ):
            parallel(idx, idx)[1].backward()
            rows_of_group = len(optim.coalesce_gradient_(values)[0])
            sharding.add_replicas(model)
            rows = len(optim.coalesce_gradient_(values)[0])
            optim.clip_gradients(model, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    of_all = sharding.gather((sent, rows_of_group))
    return {
        "sent": sum(sent for sent, _ in of_all),
        "rows of a group": max(rows for _, rows in of_all),
        "rows": rows,
        "core": model.count_parameters()[0],
        "tokens": 4 * 16 * dist.get_world_size(),
        "bytes per token": sharding.bytes_per_token(model),
        "table": values.untyped_storage().nbytes(),
    }


def replicas_without_a_gradient():
    """The summed gradients of two replicas' tables if only one has a gradient, sparse or dense; and if
    neither has one.
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
    of_all = sharding.gather((results, table.values.tolist()))
    assert of_all[0] == of_all[1]
    return results


def dense_gradients_of_columns():
    """How far a step with a dense gradient moves a table that two processes share, a column each."""
    torch.manual_seed(0)
    table = sharding.ShardedTable(4, 2, sharding.make_mesh(torch.device("cpu"), 2))
    before = table.values.detach().clone()
    whole = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [1.0, 1.0]])
    table.values.grad = whole[:, sharding.rank():sharding.rank() + 1].clone()
    optim.RowAdam([table.values], lr=0.1, process_group=table.shard_group).step()
    moved = (table.values.detach() - before).flatten().tolist()
    return sharding.gather(moved)


def wrapped():
    """How far DDP's and FSDP2's training of a layer is from one process's, or the error they raise."""
    from torch.distributed.fsdp import fully_shard
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))
    mine = x[2 * sharding.rank():][:2]

    def make(sparse):
        torch.manual_seed(0)
        return ProductKeyMemory(8, MemoryTable(64, 8, sparse_grad=sparse), heads=2, knn=3, k_dim=8)

    def alone():
        layer = make(sparse=False)
        layer(x).square().mean().backward()
        return layer

    def whole(tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def distance(found, expected, of):
        pairs = zip(found.parameters(), expected.parameters())
        return max((whole(of(p)) - of(q)).abs().max().item() for p, q in pairs)

    def gradient_distance(layer):
        return distance(layer, alone(), lambda p: p.grad)

    def ddp(sparse):
        parallel = torch.nn.parallel.DistributedDataParallel(make(sparse))
        parallel(mine).square().mean().backward()
        return parallel.module

    def fsdp(sparse):
        layer = fully_shard(make(sparse))
        layer(mine).square().mean().backward()
        return layer

    def row_adam():
        for optimizer in optim.build_optimizer(fsdp(sparse=False)):
            optimizer.step()

    def adamw():
        found, expected = fsdp(sparse=False), alone()
        for layer in (found, expected):
            torch.optim.AdamW(layer.parameters(), lr=0.1).step()
        return distance(found, expected, torch.Tensor.detach)

    def clip():
        norms = zip(optim.clip_gradients(fsdp(sparse=False), 0.01), optim.clip_gradients(alone(), 0.01))
        return max(abs(whole(found) - expected).item() for found, expected in norms)

    def meta():
        with torch.device("meta"):
            layer = make(sparse=False)
        fully_shard(layer).to_empty(device="cpu")
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        expected = make(sparse=False)
        values = whole(layer.table.values).std() / expected.table.values.std()
        keys = whole(layer.keys).std() / expected.keys.std()
        scale = whole(layer.qk_scale).mean() / expected.qk_scale.mean()
        return values.item(), keys.item(), scale.item()

    results = {}
    for name, use in {
        "ddp dense": lambda: gradient_distance(ddp(sparse=False)),
        "ddp sparse": lambda: ddp(sparse=True),
        "fsdp dense": lambda: gradient_distance(fsdp(sparse=False)),
        "fsdp sparse": lambda: fsdp(sparse=True),
        "fsdp RowAdam": row_adam,
        "fsdp clip": clip,
        "fsdp meta": meta,
        "fsdp adamw": adamw,
    }.items():
        try:
            results[name] = use()
        except (RuntimeError, ValueError) as error:
            results[name] = str(error)
    return results


def _model(mem_parallel, **config):
    mesh = sharding.make_mesh(torch.device("cpu"), mem_parallel)
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, n_head=2, block_size=16, mem_n_keys=12, mem_heads=2, mem_knn=3)
    return GPT(GPTConfig(**sizes, **config), functools.partial(sharding.ShardedTable, mesh=mesh))


def disagree(folder):
    """What each process prints where settings, data or files differ between them or can't be shared."""
    here = Path(folder) / str(sharding.rank())
    here.mkdir(parents=True)
    (here / "book.txt").write_text(f"{sharding.rank()} and the like " * 100)
    if sharding.rank() == 0:
        (here / "only0.txt").write_text("here and not there " * 100)
    messages = {}
    for name, setting in {
        "settings": f"--learning_rate=0.{1 + sharding.rank()}",
        "data": "--data=book.txt",
        "file": "--data=only0.txt",
        "share": "--batch_size=5",
        "columns": "--mem_v_dim=31",
        "group": "--mem_parallel=5",
    }.items():
        with (
            contextlib.chdir(here),
            mock.patch.dict(os.environ, LOCAL_RANK="0"),  # all print, as on machines of their own
            mock.patch.object(sharding, "stop", sys.exit),  # none ends
        ):
            messages[name] = runs.run("train.py", *runs.TINY, "--out_dir=out", setting, code=2)[1]
    of_all = sharding.gather(messages)
    assert of_all == [messages] * sharding.size(), of_all
    return messages


def full_disk(folder):
    """The error, in all processes, if process 1 can't write its part of a checkpoint."""
    model = _model(0, n_layer=2, n_embd=32, mem_layers="0,1")
    checkpoint.save(folder, model, [], {"config": {}, "iteration": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if sharding.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        checkpoint.save(folder, model, [], {"config": {}, "iteration": 2})
    except UserError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sharding.gather(message) == [message] * sharding.size()
    return message


def keep_only(processes):
    """Continues with this many of the processes; the others end."""
    rank = sharding.rank()
    if rank >= processes:
        sharding.stop()
    dist.destroy_process_group()
    store, *_ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"{processes} processes", store)  # the store still has the old addresses
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)


def main(scenarios):
    """Runs [number of processes, function, its arguments...] one after the other."""
    torch.set_num_threads(1)
    sharding.start()
    results = []
    for processes, function, *arguments in scenarios:
        if processes < sharding.size():
            keep_only(processes)
        results.append(globals()[function](*arguments))
    if sharding.rank() == 0:
        print(json.dumps(results))
    sharding.stop()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
