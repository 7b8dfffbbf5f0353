"""
Training on several processes. Tables too large for one device are split by columns; everything else is
data parallel.

    torchrun --standalone --nproc_per_node=8 train.py

G = mem_parallel processes form a group that shares one table: each holds v_dim / G columns of every slot, so
the load is even whichever slots are popular. P processes make P / G such groups, the replicas. In the
forward pass,

    1. each process sends its tokens' slots and weights to its whole group           (all-gather)
    2. each sums its columns of the rows that the group's tokens chose               (memory_read)
    3. each returns every token's sums to the process that has the token             (all-to-all)

The backward pass runs these in reverse: 3 sends out the columns of the gradient, 2 computes the gradient of
the rows, each process for its columns, and 1 returns the weights' gradients. `bytes_per_token` says what
this costs. (torch's functional collectives have such gradients too, but their names change from release to
release.)

Replicas hold the same columns. After the backward pass they add up the gradients of the rows that any of
them read (`add_replicas`). All gradients are summed over the processes, not averaged, because each process's
loss is its part of the whole batch's mean.
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
    """Sends block j of x (G * n, ...) to process j, and returns the blocks received: (G * n, ...)."""

    @staticmethod
    def forward(ctx, x, process_group):
        ctx.process_group = process_group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=process_group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.process_group), None  # each block returns to its sender


def _all_gather(x, process_group):
    """Every process's x, one after the other: (n, ...) -> (G * n, ...)."""
    out = x.new_empty(dist.get_world_size(process_group) * len(x), *x.shape[1:])
    # all_gather_into_tensor is its name before torch 2.13.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(out, x.contiguous(), group=process_group)
    return out


class _Gather(torch.autograd.Function):
    """_all_gather of (n, lookups), with a gradient."""

    @staticmethod
    def forward(ctx, x, process_group):
        ctx.process_group = process_group
        return _all_gather(x, process_group)

    @staticmethod
    def backward(ctx, grad):
        parts = _AllToAll.apply(grad, ctx.process_group)                           # (G * n, lookups)
        return parts.view(dist.get_world_size(ctx.process_group), -1, grad.shape[1]).sum(0), None


def _send_home(x, process_group):
    """Trades columns for tokens: these columns of all the group's tokens, (G * n, v_dim / G), become all
    columns of this process's tokens, (n, v_dim).
    """
    blocks = _AllToAll.apply(x, process_group)                                     # (G * n, v_dim / G)
    blocks = blocks.view(dist.get_world_size(process_group), -1, x.shape[1])       # (G, n, v_dim / G)
    return blocks.transpose(0, 1).flatten(1)                                       # (n, v_dim)


class ShardedTable(MemoryTable):
    """A MemoryTable whose columns are split over a group of processes, which read it together.

    All processes of the group must call forward and backward together, with equally many tokens. values
    (n_slots, v_dim / G) are initialised to the same numbers as these columns of an unsplit table.

    Args:
        n_slots, v_dim: size of the whole table.
        mesh: from `make_mesh`.
        dtype: dtype of the values.
    Raises:
        UserError: v_dim can't be split evenly.
    """

    def __init__(self, n_slots: int, v_dim: int, mesh: DeviceMesh, dtype: torch.dtype | None = None):
        shards, shard = mesh["shard"].size(), mesh["shard"].get_local_rank()
        if v_dim % shards:
            raise UserError(
                f"values of {v_dim} columns (mem_v_dim, or n_embd) can't be split over {shards} processes; "
                f"nearest: mem_v_dim={multiples_around(v_dim, shards)}, or mem_parallel=1, not to split them"
            )
        width = v_dim // shards
        # Set before MemoryTable.__init__, which calls reset_parameters.
        self.whole_v_dim, self.columns = v_dim, range(shard * width, (shard + 1) * width)
        super().__init__(n_slots, width, dtype=dtype)
        self.v_dim, self.mesh = v_dim, mesh
        self.shard_group, self.replica_group = mesh.get_group("shard"), mesh.get_group("replica")

    def reset_parameters(self):
        """Initialises these columns to the same numbers as in the whole table."""
        ops.draw_rows(self.values, self.whole_v_dim, self.columns)

    @ops.not_compiled
    def forward(self, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """This process's indices (n, lookups) int64 and weights (n, lookups) -> (n, v_dim)."""
        sent_as = torch.int32 if self.n_slots <= 2**31 else torch.int64
        indices = _all_gather(indices.to(sent_as), self.shard_group).long()            # (G * n, lookups)
        weights = _Gather.apply(weights.to(self.values.dtype), self.shard_group)
        sums = memory_read(self.values, indices, weights, self.sparse_grad)            # (G * n, v_dim / G)
        return _send_home(sums, self.shard_group)


def multiples_around(number: int, factor: int) -> str:
    """The multiples of `factor` nearest to `number`, in words: "63 or 66" for 64 and 3."""
    below = number // factor * factor
    return f"{below} or {below + factor}" if below else f"{factor}"


def tables(model: nn.Module) -> list[ShardedTable]:
    """All ShardedTables of a model, each once."""
    return [module for module in model.modules() if isinstance(module, ShardedTable)]


@torch.no_grad()
def add_replicas(model: nn.Module):
    """Adds up the tables' gradients over the replicas, which exchange the rows that any of them read.

    All processes must call it, even those whose tables have no gradient.
    """
    for table in tables(model):
        values = table.values
        if dist.get_world_size(table.replica_group) == 1 or not values.requires_grad:
            continue
        if values.grad is None:
            rows, grads = torch.arange(0, device=values.device), values.detach()[:0]   # no rows
        else:
            rows, grads = coalesce_gradient_(values, table.shard_group)                # (u,), (u, columns)
        all_rows = _union(rows, table.n_slots, table.replica_group)                    # (all,)
        sums = grads.new_zeros(len(all_rows), grads.shape[1])                          # (all, columns)
        sums.index_copy_(0, torch.searchsorted(all_rows, rows), grads)
        dist.all_reduce(sums, group=table.replica_group)
        values.grad = sparse_rows(all_rows, sums, values.shape)


def _union(rows, n_slots, process_group):
    """All rows, numbered below n_slots, that any process of the group passes: int64, ascending, distinct."""
    counts = _all_gather(torch.tensor([len(rows)], device=rows.device), process_group)
    dtype = torch.int32 if n_slots < 2**31 else torch.int64
    # All-gather takes tensors of equal size: the shorter ones are filled up with n_slots, which is no row.
    padded = rows.new_full((counts.max(),), n_slots, dtype=dtype)
    padded[:len(rows)] = rows
    unique = torch.unique(_all_gather(padded, process_group))
    return unique[unique < n_slots].long()


def bytes_per_token(model: nn.Module) -> int:
    """Bytes that a training step sends between processes per token, in all memory layers.

    With G processes to a table, values of b bytes and up to 2**31 slots, a layer sends

        (G - 1) * lookups * (4 + 2 * b)        slots and weights out, the weights' gradients back
        + (G - 1) / G * v_dim * 2 * b          columns back, and their gradients out

    Not counted is what each process sends once per update, however many tokens there are:

        (G - 1) / G * 8                        per row read by any group, for RowAdam's squared norms
        (R - 1) * 4                            with R replicas: per row of the group that read most
        + (R - 1) / R * 2 * b * v_dim / G      with R replicas: per row read by any group
        (P - 1) / P * 8                        per float32 parameter outside the tables
    """
    sent = 0
    for layer in model.modules():
        if isinstance(layer, ProductKeyMemory) and isinstance(layer.table, ShardedTable):
            table, lookups = layer.table, layer.heads * layer.knn
            G, b = table.mesh["shard"].size(), table.values.element_size()
            sent += (G - 1) * lookups * (4 + 2 * b)
            sent += (G - 1) * table.v_dim * 2 * b // G
    return sent


# ------------------------------------------------------------------------------------------------
# The processes


_launch = ""


def start():
    """Connects the processes that torchrun started; does nothing without torchrun.

    GPU tensors go through NCCL, CPU tensors through gloo.
    """
    global _launch
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys() and not dist.is_initialized():
        store, number, count = next(dist.rendezvous("env://"))
        # Each process proposes a name. The store keeps the one that arrives first, and all get that.
        _launch = store.compare_set("nanomem launch", "", uuid.uuid4().hex).decode()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        own_store = _roll_call(store, number, count)
        dist.init_process_group(backend, store=own_store, rank=number, world_size=count)


def _roll_call(store, number, count):
    """A part of the store that only the processes alive now use.

    When torchrun restarts processes, it gives them the old store, which still holds the addresses of those
    that died. Connecting to these can hang (pytorch issue 135712). So each process replaces its rank's name
    with a new one, and waits for all others under a hash of all names. If it read a dead process's name, not
    all arrive there, and it reads the names again.
    """
    store.set(f"nanomem {number}", uuid.uuid4().hex)
    while True:
        names = store.multi_get([f"nanomem {i}" for i in range(count)])
        roll = hashlib.sha256(b"".join(names)).hexdigest()
        store.set(f"{roll} {number}", "here")
        with contextlib.suppress(dist.DistStoreError):  # not all arrived within a second
            store.wait([f"{roll} {i}" for i in range(count)], timedelta(seconds=1))
            return dist.PrefixStore(roll, store)


def launch() -> str:
    """A name for this launch of torchrun, kept when it restarts processes; "" without torchrun."""
    return _launch


def stop(code: int = 0):
    """Disconnects from the other processes and ends this one with an exit code."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: a thread of gloo may still hold a tensor of its last collective, and releasing that
        # while the interpreter closes aborts the process (pytorch pull request 179291).
        os._exit(code)
    sys.exit(code)


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def make_mesh(device: torch.device, mem_parallel: int) -> DeviceMesh | None:
    """The processes as a DeviceMesh (replica, shard), or None without torchrun.

    Groups of mem_parallel neighbours share a table; 0: all processes do. Raises UserError unless mem_parallel
    divides the number of processes.
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


def data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    """torch's DistributedDataParallel (DDP) for everything but the tables. It sums gradients.

    None if only tables are trained.
    """
    values = {id(table.values) for table in tables(model)}
    if not any(p.requires_grad and id(p) not in values for p in model.parameters()):
        return None
    in_tables = [name for name, p in model.named_parameters() if id(p) in values]
    constants = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, in_tables + constants)
    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, _add)
    return parallel


def _add(_, bucket):
    """What DDP does with a bucket of gradients: sums them. By default it averages."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def share_of_batch(batch_size: int, passes: int) -> tuple[range, slice]:
    """What this process computes of an update: (the numbers of its batches, its sequences of each).

    Whole batches if there are enough for all processes, so that a GPU's batch is as large as in a run of its
    own. Otherwise parts: with two passes on four processes, 0 and 1 compute half of batch 0 each, 2 and 3
    half of batch 1. Raises UserError if the sequences can't be shared evenly.
    """
    at_once = math.gcd(passes, size())  # batches that are computed at the same time
    sharers = size() // at_once  # processes to a batch
    if batch_size % sharers:
        raise UserError(
            f"{size()} processes can't share batch_size={batch_size} x gradient_accumulation_steps={passes} "
            f"sequences evenly; nearest: batch_size={multiples_around(batch_size, sharers)}"
        )
    batch, sharer = divmod(rank(), sharers)
    share = batch_size // sharers
    return range(batch, passes, at_once), slice(sharer * share, (sharer + 1) * share)


# ------------------------------------------------------------------------------------------------
# Agreement


def gather(item: object) -> list:
    """The items of all processes, in the order of their numbers."""
    if not dist.is_initialized():
        return [item]
    items = [None] * size()
    dist.all_gather_object(items, item)
    return items


def add(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def total(*numbers: float) -> list[float]:
    """The sum of each number over all processes."""
    if not dist.is_initialized():
        return [float(number) for number in numbers]
    return add(torch.tensor(numbers, dtype=torch.float64)).tolist()


@contextlib.contextmanager
def together():
    """A block that all processes run. If any of them meets a mistake there, all raise it as a UserError at
    the end of the block, so that none waits for another forever.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = mistake(error)
        if problem is None:
            raise
    for number, theirs in enumerate(gather(problem)):
        if theirs:
            raise UserError(theirs if number == 0 else f"process {number}: {theirs}")


def check_same(mine: dict):
    """Raises UserError, in all processes, unless all pass the same {name: value}."""
    gathered = gather(mine)
    for number, theirs in enumerate(gathered):
        for name, value in gathered[0].items():
            if theirs[name] != value:
                raise UserError(
                    f"all processes must have the same settings and data: {name} is {value} in process 0 "
                    f"and {theirs[name]} in process {number}"
                )
