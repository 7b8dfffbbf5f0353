"""
Training on several processes: tables too large for one device are split by columns; the rest is data
parallel.

    torchrun --standalone --nproc_per_node=8 train.py

P processes form P / G groups, the replicas, of G = mem_parallel processes, the shards. Each process of a
group holds v_dim / G columns of every slot, so the load is even whichever slots are popular. In the forward
pass,

    1. each process sends the slots and weights of its tokens to its whole group       (all-gather)
    2. each sums its columns of the rows that the group's tokens chose                 (memory_read)
    3. each sends every token's sums to the process that has the token                 (all-to-all)

In the backward pass, 3 sends out the columns of the gradient, 2 computes the gradient of the rows, each
process for its columns, and 1 sends the gradients of the weights back. `bytes_per_token` says what this
costs. (torch's functional collectives have such gradients too, but their names change from release to
release.)

Replicas hold the same columns. After the backward pass they add up the gradients of the rows that any of
them read (`add_replicas`). All gradients are sums over the processes, not means: the loss of a process is
its part of the whole batch's mean.
"""

import contextlib
import hashlib
import math
import os
import sys
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from nanomem import ops
from nanomem.cli import UserError, mistake
from nanomem.memory import MemoryTable, ProductKeyMemory, memory_read
from nanomem.ops import sparse_rows
from nanomem.optim import coalesce_gradient_

# ------------------------------------------------------------------------------------------------
# The split table


class _AllToAll(torch.autograd.Function):
    """Sends block j of x to process j of the group, and receives a block from each: (G * n, ...) -> (G * n,
    ...)
    """

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.group), None  # the blocks go back


def _all_gather(x, group):
    """The x of all processes of the group, one after the other: (n, ...) -> (G * n, ...)"""
    out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    collective = (
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )  # its name before torch 2.13
    collective(out, x.contiguous(), group=group)
    return out


class _Gather(torch.autograd.Function):
    """The rows of all processes of the group: (n, lookups) -> (G * n, lookups)."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx, grad):
        parts = _AllToAll.apply(grad, ctx.group)
        return parts.view(dist.get_world_size(ctx.group), -1, grad.shape[1]).sum(0), None


def _send_home(x, group):
    """From some columns of the group's tokens to all columns of this process's: (G * n, v_dim / G) -> (n,
    v_dim)
    """
    blocks = _AllToAll.apply(x, group).view(dist.get_world_size(group), -1, x.shape[1])  # (G, n, v_dim / G)
    return blocks.transpose(0, 1).flatten(1)


class ShardedTable(MemoryTable):
    """A MemoryTable whose columns are split over a group of processes, which read it together.

    Each forward and backward pass involves the whole group, with the same number of tokens on each process.
    values (n_slots, v_dim / G) start as these columns of the whole table would.

    Args:
        n_slots, v_dim: the size of the whole table.
        mesh: from `make_mesh`.
        dtype: of the values.
    Raises:
        UserError: v_dim can't be split evenly.
    """

    def __init__(self, n_slots: int, v_dim: int, mesh: DeviceMesh, dtype: torch.dtype | None = None):
        shards, shard = mesh["shard"].size(), mesh["shard"].get_local_rank()
        if v_dim % shards:
            nearest = multiples_around(v_dim, shards)
            raise UserError(
                f"values of {v_dim} columns (mem_v_dim, or n_embd) can't be split over {shards} processes; "
                f"nearest: mem_v_dim={nearest}, or mem_parallel=1, not to split them"
            )
        width = v_dim // shards
        # reset_parameters, which MemoryTable.__init__ calls, reads these two.
        self.whole_v_dim, self.columns = v_dim, range(shard * width, (shard + 1) * width)
        super().__init__(n_slots, width, dtype=dtype)
        self.v_dim, self.mesh = v_dim, mesh
        self.shard_group, self.replica_group = mesh.get_group("shard"), mesh.get_group("replica")

    def reset_parameters(self):
        """Initialises these columns as in the whole table."""
        ops.draw_rows(self.values, self.whole_v_dim, self.columns)

    @ops.not_compiled
    def forward(self, indices, weights):
        """indices (n, lookups) int64 and weights (n, lookups) of this process's n tokens -> (n, v_dim)"""
        narrow = torch.int32 if self.n_slots <= 2**31 else torch.int64
        indices = _all_gather(indices.to(narrow), self.shard_group).long()
        weights = _Gather.apply(weights.to(self.values.dtype), self.shard_group)
        return _send_home(memory_read(self.values, indices, weights, self.sparse_grad), self.shard_group)


def multiples_around(number: int, factor: int) -> str:
    """The multiples of `factor` next to `number`, in words: "63 or 66" for 64 and 3."""
    below = number // factor * factor
    return f"{below} or {below + factor}" if below else f"{factor}"


def tables(model: nn.Module) -> list[ShardedTable]:
    """The ShardedTables in a module, each once."""
    return [module for module in model.modules() if isinstance(module, ShardedTable)]


@torch.no_grad()
def add_replicas(model: nn.Module):
    """Adds up the tables' gradients over the replicas, which exchange the rows that any of them read.

    All processes must call it. One whose table has no gradient takes part with an empty one.
    """
    for table in tables(model):
        if dist.get_world_size(table.replica_group) == 1 or not table.values.requires_grad:
            continue
        if table.values.grad is None:
            rows, grads = torch.arange(0, device=table.values.device), table.values.detach()[:0]
        else:
            rows, grads = coalesce_gradient_(table.values, table.shard_group)
        touched = _union(rows, table.n_slots, table.replica_group)
        sums = grads.new_zeros(len(touched), grads.shape[1])
        sums.index_copy_(0, torch.searchsorted(touched, rows), grads)
        dist.all_reduce(sums, group=table.replica_group)
        table.values.grad = sparse_rows(touched, sums, table.values.shape)


def _union(rows, n_slots, group):
    """The numbers below n_slots that any process of the group has in `rows`: int64, ascending."""
    counts = _all_gather(torch.tensor([len(rows)], device=rows.device), group)
    dtype = torch.int32 if n_slots < 2**31 else torch.int64
    mine = rows.new_full((counts.max(),), n_slots, dtype=dtype)  # all-gather takes tensors of equal size
    mine[:len(rows)] = rows
    unique = torch.unique(_all_gather(mine, group))
    return unique[unique < n_slots].long()


def bytes_per_token(model: nn.Module) -> int:
    """Bytes that one token of a training step puts on the wire, in all memory layers.

    What its process sends to the others of its group, and they to it. In each layer, with G processes,
    values of b bytes and up to 2**31 slots,

        (G - 1) * lookups * (4 + 2 * b)        slots and weights out, the weights' gradients back
        + (G - 1) / G * v_dim * 2 * b          columns back, and their gradients out

    In addition, each update sends from each process, whatever the number of tokens: (G - 1) / G * 8 bytes
    per row that was read, for the squared norms that RowAdam needs; with R replicas (R - 1) * 4 per row read
    by the group that read most, and (R - 1) / R * 2 * b * v_dim / G per row read by any group; and (P - 1) /
    P * 8 per float32 parameter outside the tables.
    """
    sent = 0
    for layer in model.modules():
        if isinstance(layer, ProductKeyMemory) and isinstance(layer.table, ShardedTable):
            others, b = layer.table.mesh["shard"].size() - 1, layer.table.values.element_size()
            sent += others * layer.heads * layer.knn * (4 + 2 * b)
            sent += others * layer.table.v_dim * 2 * b // (others + 1)
    return sent


# ------------------------------------------------------------------------------------------------
# The processes


_launch = ""


def start():
    """Joins the processes that torchrun started, if it did. GPU tensors go by NCCL, CPU tensors by gloo."""
    global _launch
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys() and not dist.is_initialized():
        store, number, count = next(dist.rendezvous("env://"))
        _launch = store.compare_set("nanomem launch", "", uuid.uuid4().hex).decode()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        own_store = _roll_call(store, number, count)
        dist.init_process_group(backend, store=own_store, rank=number, world_size=count)


def _roll_call(store, number, count):
    """A part of the store that only the processes running now know.

    When torchrun restarts processes it gives them the old store, which still has the addresses of those that
    died; connecting to these can hang (pytorch issue 135712). So each process puts a new name in place of
    its rank's old one, and waits for all others under a hash of all names. If a dead process's name is among
    them, not all arrive, and it reads the names again.
    """
    store.set(f"nanomem {number}", uuid.uuid4().hex)
    while True:
        names = store.multi_get([f"nanomem {i}" for i in range(count)])
        roll = hashlib.sha256(b"".join(names)).hexdigest()
        store.set(f"{roll} {number}", "here")
        with contextlib.suppress(dist.DistStoreError):  # not all came within a second
            store.wait([f"{roll} {i}" for i in range(count)], timedelta(seconds=1))
            return dist.PrefixStore(roll, store)


def launch() -> str:
    """A name for this launch of torchrun, the same after it has restarted processes; "" without torchrun."""
    return _launch


def stop(code: int = 0):
    """Leaves the other processes and ends this one, with an exit code."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: a thread of gloo may still hold a tensor of its last collective, and releasing that
        # while the interpreter closes aborts the process (pytorch pull request 179291).
        os._exit(code)
    sys.exit(code)


def rank() -> int:
    """This process's number, 0 if there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def make_mesh(device: torch.device, mem_parallel: int) -> DeviceMesh | None:
    """The processes as a DeviceMesh (replica, shard): groups of mem_parallel neighbours share a table; 0:
    all do.

    None without torchrun. Raises UserError unless mem_parallel divides the number of processes.
    """
    if not dist.is_initialized():
        return None
    shards = mem_parallel or size()
    if size() % shards:
        divisors = [n for n in range(size(), 0, -1) if size() % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - shards))
        raise UserError(f"mem_parallel={mem_parallel} must divide the number of processes, {size()}; "
                        f"nearest: {nearest} (0: all of them)")
    return init_device_mesh(device.type, (size() // shards, shards), mesh_dim_names=("replica", "shard"))


def data_parallel(model: nn.Module) -> DistributedDataParallel:
    """torch's DistributedDataParallel around everything but the tables. It adds gradients up."""
    values = {id(table.values) for table in tables(model)}
    in_tables = [name for name, p in model.named_parameters() if id(p) in values]
    constants = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, in_tables + constants)
    # Experts that no token chose have no gradient. DDP must look for them, which costs a pass over the
    # graph.
    may_skip = any(getattr(module, "may_skip_parameters", False) for module in model.modules())
    parallel = DistributedDataParallel(model, find_unused_parameters=may_skip)
    parallel.register_comm_hook(None, _add)
    return parallel


def _add(_, bucket):  # by default DDP takes the mean of a bucket of gradients
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def share_of_batch(batch_size: int, passes: int) -> tuple[range, slice]:
    """(the numbers of an update's batches that this process computes, its sequences of each).

    Whole batches if there are enough for all, so that a GPU's batch is as large as it is alone; otherwise
    parts: with two passes for four processes, 0 and 1 compute half of batch 0 each, 2 and 3 of batch 1.
    Raises UserError if they can't be shared evenly.
    """
    at_once = math.gcd(passes, size())
    sharers = size() // at_once  # of one batch
    if batch_size % sharers:
        sequences = f"batch_size={batch_size} x gradient_accumulation_steps={passes} sequences"
        raise UserError(f"{size()} processes can't share {sequences} evenly; "
                        f"nearest: batch_size={multiples_around(batch_size, sharers)}")
    batch, sharer = divmod(rank(), sharers)
    share = batch_size // sharers
    return range(batch, passes, at_once), slice(sharer * share, (sharer + 1) * share)


# ------------------------------------------------------------------------------------------------
# Agreement


def gather(item) -> list:
    """Each process's item."""
    if not dist.is_initialized():
        return [item]
    items = [None] * size()
    dist.all_gather_object(items, item)
    return items


def add(tensor: torch.Tensor) -> torch.Tensor:
    """Adds up a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def total(*numbers: float) -> list[float]:
    """The sum of each number over all processes."""
    return add(torch.tensor(numbers, dtype=torch.float64)).tolist()


@contextlib.contextmanager
def together():
    """A block that all processes run. A mistake that any of them meets is raised in all, as a UserError, at
    its end.

    Otherwise the others would wait for it forever.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = mistake(error)
        if problem is None:
            raise
    problems = gather(problem)
    for number, problem in enumerate(problems):
        if problem:
            raise UserError(problem if number == 0 else f"process {number}: {problem}")


def check_same(facts: dict):
    """Raises UserError, in all processes, if {name: value} is not the same in all of them."""
    everyones = gather(facts)
    for number, theirs in enumerate(everyones):
        for name, value in everyones[0].items():
            if theirs[name] != value:
                raise UserError(
                    f"all processes must have the same settings and data: {name} is {value} in process 0 "
                    f"and {theirs[name]} in process {number}"
                )
