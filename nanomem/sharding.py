"""
Training on several processes: a table too large for one device is split by columns, everything else is data
parallel.

    torchrun --standalone --nproc_per_node=8 train.py

P processes form P / G groups, the replicas, of G = mem_parallel processes, the shards. Every process of a
group holds
v_dim / G columns of each table, of all slots, so the load is even whichever slots are popular:

    1. each process sends the slots and weights of its tokens to all of its group      (all-gather)
    2. each sums its columns of the rows that the group's tokens chose                 (memory_read)
    3. each sends every token's sums home, where the columns are put side by side      (all-to-all)

Going back, 3 sends the gradient's columns out, 2 gives the gradient of the rows chosen, each process its
columns of them, and 1 sends the weights' gradients home, a part from each process. What this takes is in
`bytes_per_token`.

(torch's functional collectives have such gradients too, under names that change from release to release.)

Replicas hold the same columns; after the backward pass they add up the gradients of the rows they touched
(`add_replicas`). All gradients are sums over the processes, not means: each process's loss is its part of
the whole batch's mean.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from nanomem import ops
from nanomem.baselines import MixtureOfExperts
from nanomem.cli import UserError, mistake
from nanomem.memory import MemoryTable, ProductKeyMemory, memory_read
from nanomem.ops import sparse_rows
from nanomem.optim import coalesce_gradient_

# ------------------------------------------------------------------------------------------------
# The split table


class _AllToAll(torch.autograd.Function):
    """Block j of x goes to process j of the group, as its block of this process's number: (G * n, ...) ->
    (G * n, ...)
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
    """One process's columns of the group's tokens to all columns of its own: (G * n, v_dim / G) -> (n,
    v_dim).
    """
    return (
        _AllToAll.apply(x, group).view(dist.get_world_size(group), -1, x.shape[1]).transpose(0, 1).flatten(1)
    )


class ShardedTable(MemoryTable):
    """A MemoryTable of which each process of a group holds v_dim / G columns, and which all of them read
    together: every forward and backward pass is one of the whole group, with as many tokens on each
    process.

    values (n_slots, v_dim / G) are the columns that the whole table begins with in the same places.

    Args:
        n_slots, v_dim: of the whole table.
        mesh: from `make_mesh`.
        dtype: of the values.
    Raises:
        UserError: v_dim can't be split over the group.
    """

    def __init__(self, n_slots, v_dim, mesh, dtype=None):
        shards, shard = mesh["shard"].size(), mesh["shard"].get_local_rank()
        if v_dim % shards:
            raise UserError(
                f"values of {v_dim} columns (mem_v_dim, or n_embd) can't be split over {shards} processes; "
                f"nearest: mem_v_dim={' or '.join(map(str, multiples_around(v_dim, shards)))}, or mem_parallel=1, not to split them"
            )
        width = v_dim // shards
        self.whole_v_dim, self.columns = (
            v_dim,
            range(shard * width, (shard + 1) * width),
        )  # reset_parameters reads them
        super().__init__(n_slots, width, dtype=dtype)
        self.v_dim = v_dim
        self.mesh, self.shard_group, self.replica_group = (
            mesh,
            mesh.get_group("shard"),
            mesh.get_group("replica"),
        )

    def reset_parameters(self):
        """Initialises these columns as in the whole table."""
        ops.draw_rows(self.values, self.whole_v_dim, self.columns)

    @ops.not_compiled
    def forward(self, indices, weights):
        """indices (n, lookups) int64 and weights (n, lookups) of this process's tokens -> (n, v_dim)"""
        narrow = torch.int32 if self.n_slots <= 2**31 else torch.int64
        indices = _all_gather(indices.to(narrow), self.shard_group).long()
        weights = _Gather.apply(weights.to(self.values.dtype), self.shard_group)
        return _send_home(memory_read(self.values, indices, weights, self.sparse_grad), self.shard_group)


def multiples_around(number, of):
    """The multiples of `of` next to `number`: (63, 66) for 64, 3."""
    below = number // of * of
    return [below] * (below > 0) + [below + of]


def tables(model):
    """The ShardedTables of a module, each once."""
    return [m for m in model.modules() if isinstance(m, ShardedTable)]


@torch.no_grad()
def add_replicas(model):
    """Adds up the tables' gradients over the replicas, which exchange the rows that any of them touched.

    All processes must call it; one whose table has no gradient takes part with an empty one.
    """
    for table in tables(model):
        if dist.get_world_size(table.replica_group) > 1 and table.values.requires_grad:
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
    mine = rows.new_full(
        (counts.max(),), n_slots, dtype=torch.int32 if n_slots < 2**31 else torch.int64
    )  # all-gather takes equal sizes
    mine[:len(rows)] = rows
    unique = torch.unique(_all_gather(mine, group))
    return unique[unique < n_slots].long()


def bytes_per_token(model):
    """Bytes on the wire for one token of a training step, in all memory layers: what its process sends to
    the others of its group and they to it. In each layer, of G processes, with values of b bytes and up to
    2**31 slots,

        (G - 1) * lookups * (4 + 2 * b)        slots and weights out, the weights' gradients back
        + (G - 1) / G * v_dim * 2 * b          columns back, and their gradients out

    Besides, each update sends, whatever the number of tokens, from each process: (G - 1) / G * 8 bytes for
    each row touched, whose squared norm RowAdam wants; with R replicas (R - 1) * 4 for each row that the
    group touched which touched most, and (R - 1) / R * 2 * b * v_dim / G for each row that any did; and (P
    - 1) / P * 8 a float32 parameter outside the tables.
    """
    sent = 0
    for layer in model.modules():
        if isinstance(layer, ProductKeyMemory) and isinstance(layer.table, ShardedTable):
            shards, value = layer.table.mesh["shard"].size(), layer.table.values.element_size()
            sent += (shards - 1) * layer.heads * layer.knn * (4 + 2 * value) + (
                shards - 1
            ) * layer.table.v_dim * 2 * value // shards
    return sent


# ------------------------------------------------------------------------------------------------
# The processes


_launch = ""


def start():
    """Joins the processes that torchrun started, if it did. Tensors of a GPU go by NCCL, those of a CPU by
    gloo.
    """
    global _launch
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys() and not dist.is_initialized():
        store, number, count = next(dist.rendezvous("env://"))
        _launch = store.compare_set("nanomem launch", "", uuid.uuid4().hex).decode()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=_roll_call(store, number, count), rank=number, world_size=count
        )


def _roll_call(store, number, count):
    """A part of the store that only these processes know. torchrun gives those it starts again the store of
    those that died, with the addresses these have left in it, and to call there may take for ever (pytorch
    issue 135712). So each puts a new name in the place of the one its rank had before, and waits for all
    others under a hash of all names: where the name of a dead one is among them not all come, and it looks
    again.
    """
    store.set(f"nanomem {number}", uuid.uuid4().hex)
    while True:
        names = store.multi_get([f"nanomem {i}" for i in range(count)])
        roll = hashlib.sha256(b"".join(names)).hexdigest()
        store.set(f"{roll} {number}", "here")
        with contextlib.suppress(dist.DistStoreError):  # the time is up
            store.wait([f"{roll} {i}" for i in range(count)], timedelta(seconds=1))
            return dist.PrefixStore(roll, store)


def launch():
    """A name for what torchrun has launched, the same after it has started processes again; "" without
    torchrun.
    """
    return _launch


def stop(code=0):
    """Leaves them and ends this process, with an exit code."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: a thread of gloo's may still hold a tensor of its last collective, and one that lets
        # go of it while the interpreter closes aborts the process (pytorch pull request 179291).
        os._exit(code)
    sys.exit(code)


def rank():
    """This process's number, 0 when there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def make_mesh(device, mem_parallel):
    """The processes as a DeviceMesh (replica, shard): groups of mem_parallel neighbours, 0 for all in one,
    share a table.

    None without torchrun. Raises UserError unless mem_parallel divides their number.
    """
    if not dist.is_initialized():
        return None
    shards = mem_parallel or size()
    if size() % shards:
        divisors = [n for n in range(size(), 0, -1) if size() % n == 0]
        raise UserError(f"mem_parallel={mem_parallel} must divide the number of processes, {size()}; "
                        f"nearest: {min(divisors, key=lambda n: abs(n - shards))} (0: all of them)")
    return init_device_mesh(device.type, (size() // shards, shards), mesh_dim_names=("replica", "shard"))


def data_parallel(model):
    """torch's DistributedDataParallel around all of the model but the tables; it adds gradients up."""
    values = {id(table.values) for table in tables(model)}
    apart = [name for name, p in model.named_parameters() if id(p) in values]
    constants = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, apart + constants)
    # Experts that no token chose have no gradient, in any process or in this one; DDP must look for them,
    # which costs a pass over the graph.
    some_unused = any(isinstance(module, MixtureOfExperts) for module in model.modules())
    parallel = DistributedDataParallel(model, find_unused_parameters=some_unused)
    parallel.register_comm_hook(None, _add)
    return parallel


def _add(_, bucket):  # DDP's own way with a bucket of gradients is to take their mean
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


def share_of_batch(batch_size, passes):
    """Which part of an update's `passes` batches of batch_size sequences this process computes: (numbers of
    its batches, a range; its rows of each, a slice). Whole batches where they go round, so that a GPU's
    batch is as large as alone; then rows: with two passes for four processes, 0 and 1 have half of batch 0
    each, 2 and 3 of batch 1.

    Raises UserError if they can't be shared evenly.
    """
    at_once = math.gcd(passes, size())
    sharers = size() // at_once  # of one batch
    if batch_size % sharers:
        raise UserError(
            f"{size()} processes can't share batch_size={batch_size} x gradient_accumulation_steps={passes} sequences evenly; "
            f"nearest: batch_size={' or '.join(map(str, multiples_around(batch_size, sharers)))}"
        )
    batch, sharer = divmod(rank(), sharers)
    rows = batch_size // sharers
    return range(batch, passes, at_once), slice(sharer * rows, (sharer + 1) * rows)


# ------------------------------------------------------------------------------------------------
# Agreement


def gather(item):
    """[each process's item]"""
    if not dist.is_initialized():
        return [item]
    items = [None] * size()
    dist.all_gather_object(items, item)
    return items


def add(tensor):
    """Adds up a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def total(*numbers):
    """The sum of each number over all processes."""
    return add(torch.tensor(numbers, dtype=torch.float64)).tolist()


@contextlib.contextmanager
def together():
    """A block that all processes run, at the end of which a mistake that any of them met is raised in all, as a UserError:
    else the others would wait for it for ever.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = mistake(error)
        if problem is None:
            raise
    problems = gather(problem)
    if any(problems):
        first = next(i for i, problem in enumerate(problems) if problem)
        raise UserError(problems[first] if first == 0 else f"process {first}: {problems[first]}")


def check_same(facts):
    """Raises UserError, in all processes, if {name: value} is not the same in all of them."""
    everyones = gather(facts)
    for number, theirs in enumerate(everyones):
        for name, value in everyones[0].items():
            if theirs[name] != value:
                raise UserError(
                    f"all processes must have the same settings and data: {name} is {value} in process 0 "
                    f"and {theirs[name]} in process {number}"
                )
