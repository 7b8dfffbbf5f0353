"""
Optimizers for models with memory layers.

- AdamW for everything but the tables; RowAdam for the tables, whose cost a step is that of the rows read
- clipping of the two apart, since torch's clip_grad_norm_ can't take a sparse gradient
- the learning rate's schedule
"""

import math

import torch
import torch.distributed as dist

from nanomem import kernels
from nanomem.memory import MemoryTable, segment_sum
from nanomem.ops import sparse_rows, use_kernels


def squared_norms(grads, group=None):
    """The squared norm of each row, float32 at least: grads (u, columns) -> (u,), over all columns if a
    group of processes has them split.
    """
    squares = torch.linalg.vector_norm(
        grads, dim=1, dtype=torch.promote_types(grads.dtype, torch.float32)
    ).square()
    if group is not None:
        dist.all_reduce(squares, group=group)
    return squares


def coalesce_gradient_(values, group=None):
    """The gradient of a table as (rows, gradients): rows (u,) int64 ascending, each once, gradients (u,
    v_dim).

    Of a dense gradient these are the rows that are not zero, in any column if a group of processes has the
    columns split. Rows that a sparse gradient has several times are summed in values.grad itself, so the
    work is done once, and what is done to `gradients` in place is done to values.grad.
    """
    grad = values.grad
    if not grad.is_sparse:
        touched = grad.any(dim=1).int()
        if group is not None:
            dist.all_reduce(touched, dist.ReduceOp.MAX, group=group)
        rows = touched.nonzero().squeeze(1)
        return rows, grad[rows]
    rows, grads = grad._indices()[0], grad._values()
    if not (
        rows[1:] > rows[:-1]
    ).all():  # slots that several layers or accumulated batches read (torch's flag gets lost)
        rows, grads = segment_sum(rows[:, None], grads.new_ones(len(rows), 1), grads, len(values))
        values.grad = sparse_rows(rows, grads, values.shape)
    return rows, grads


class RowAdam(torch.optim.Optimizer):
    """Adam without momentum and with one second moment a row, for tables of which a step reads few rows.

        v_r     <- beta2 * v_r + (1 - beta2) * mean(g_r ** 2)        for each row r with a gradient
        V_r     <- V_r - lr * g_r / (sqrt(v_r / (1 - beta2 ** n_r)) + eps)

    n_r counts the steps in which row r had a gradient, so every row has a clock of its own. A row whose
    gradient is missing or zero keeps its value, moment and count; nothing decays. A row's first step has a
    root mean square of lr, however late it comes. (On Adam's own clock, a row first read at step 10,000
    would move 1 / sqrt(1 - beta2) times as far, 10 times here.) Later steps are not held to lr: where a
    gradient is larger than the row's earlier ones, step n_r can be sqrt(n_r) * lr, up to lr / sqrt(1 -
    beta2). 8 bytes of state a row.

    bfloat16 tables are rounded stochastically: up or down by chance, so that the expectation is right and
    steps smaller than bfloat16's spacing are not all lost. The noise is a function of seed, row, n_r and
    column.

    Takes sparse gradients, or dense ones, of which it updates the rows that are not zero. `group`: the
    processes that the tables' columns are split over (sharding.py); the squares are then of whole rows, and
    the noise that of the whole table.
    """

    CHUNK = 2**18  # numbers updated at a time: temporaries stay in cache, 1.5 times as fast as all at once

    def __init__(self, params, lr=1e-2, beta2=0.99, eps=1e-10, seed=0, process_group=None):
        super().__init__(params, dict(lr=lr, beta2=beta2, eps=eps, seed=seed))
        self.process_group = process_group

    def add_param_group(self, param_group):
        """torch's; raises ValueError for a parameter that is not a table."""
        super().add_param_group(param_group)
        for values in self.param_groups[-1]["params"]:
            if values.dim() != 2 or values.numel() == 0:
                raise ValueError(f"RowAdam expects tables (n_rows, columns), got shape {tuple(values.shape)}")
            if hasattr(values, "full_tensor"):
                raise ValueError(
                    "RowAdam expects plain tensors, got one of FSDP's DTensors; use torch.optim.AdamW"
                )

    @torch.no_grad()
    def step(self, closure=None):
        """Updates the rows that have a gradient. closure(), if given, computes loss and gradients; returns
        the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is not None:
                    self._update(values, group["lr"], group["beta2"], group["eps"], group["seed"] % 2**31)
        return loss

    def __getstate__(self):  # for copies; torch's leaves the group out
        return super().__getstate__() | {"process_group": self.process_group}

    def load_state_dict(self, state_dict):
        """Loads what state_dict() returned, keeping its dtypes: torch would turn the counts into the
        table's dtype.
        """
        super().load_state_dict(state_dict)
        tables = [values for group in self.param_groups for values in group["params"]]
        for number, saved in state_dict["state"].items():
            self.state[tables[number]] = {
                key: tensor.clone().to(tables[number].device) for key, tensor in saved.items()
            }

    def _update(self, values, lr, beta2, eps, seed):
        state = self.state[values]
        if not state:
            state["second_moment"] = torch.zeros(len(values), dtype=torch.float32, device=values.device)
            state["reads"] = torch.zeros(len(values), dtype=torch.int32, device=values.device)
        rows, grads = coalesce_gradient_(values, self.process_group)
        mean_square, first_column = None, 0
        if self.process_group is not None:
            mean_square = squared_norms(grads, self.process_group) / (
                grads.shape[1] * dist.get_world_size(self.process_group)
            )
            first_column = grads.shape[1] * dist.get_rank(self.process_group)
        if use_kernels(values):
            kernels.row_adam(
                values,
                rows,
                grads,
                state["second_moment"],
                state["reads"],
                lr,
                beta2,
                eps,
                seed,
                mean_square,
                first_column,
            )
            return
        if mean_square is None:
            mean_square = squared_norms(grads) / grads.shape[1]
        has_gradient = mean_square != 0  # a NaN has one too, and must show
        if not has_gradient.all():
            rows, grads, mean_square = rows[has_gradient], grads[has_gradient], mean_square[has_gradient]
        moment = state["second_moment"][rows]
        reads = state["reads"][rows] + 1
        moment.lerp_(mean_square.float(), 1 - beta2)
        state["second_moment"][rows] = moment
        state["reads"][rows] = reads
        factor = lr / ((moment / (1 - beta2**reads)).sqrt() + eps)
        size = max(1, self.CHUNK // values.shape[1])
        wide = torch.promote_types(values.dtype, torch.float32)  # lr / sqrt(v) is more than float16 holds
        for r, g, f, n in zip(*(t.split(size) for t in (rows, grads, factor, reads))):
            new = values.index_select(0, r).to(wide).addcmul_(g.to(wide), f[:, None].to(wide), value=-1)
            if values.dtype == torch.bfloat16:
                new = stochastic_round(new, seed, r, n, first_column)
            values.index_copy_(0, r, new.to(values.dtype))


def stochastic_round(new, seed, rows, reads, first_column=0):
    """float32 numbers (u, v_dim) to bfloat16, up with the probability that makes the expectation right.

    bfloat16 is the upper half of a float32: adding 16 random bits to the lower half carries into it just as
    often as it should. The bits are a hash of seed, row (u,) int64, its reads (u,) int32, and column,
    counted from first_column: the same each time.
    """
    column = torch.arange(first_column, first_column + new.shape[1], device=new.device)
    row_seed = _mix(_mix(_mix(reads.long() ^ seed) ^ (rows & 0xFFFFFFFF)) ^ (rows >> 32))
    noise = _mix((row_seed[:, None] + column * 0x9E3779B9) & 0xFFFFFFFF) >> 16
    bits = new.view(torch.int32)
    bits = torch.where(new.isfinite(), bits + noise.int(), bits)
    return (bits & -0x10000).view(torch.float32).bfloat16()


def _mix(x):
    """A hash of 32-bit integers, held in int64, whose every output bit depends on every input bit."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def process_group_of(table):
    """The processes that a ShardedTable's columns are split over; None for a table in one piece."""
    return getattr(table, "shard_group", None)


def tables_of(model):
    """The memory tables in a module, each once."""
    return [m for m in model.modules() if isinstance(m, MemoryTable)]


def build_optimizer(
    model, learning_rate=1e-3, mem_lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), mem_beta2=0.99
):
    """The optimizers for any module that contains memory layers: a list, to step and zero one after the
    other.

    [AdamW for all but the tables, RowAdam for the tables], the second only where there are tables. Weight
    decay is for matrices: not for vectors, keys or values.
    """
    tables = tables_of(model)
    in_tables = {id(table.values) for table in tables}
    core = [p for p in model.parameters() if p.requires_grad and id(p) not in in_tables]
    groups = [dict(params=[p for p in core if p.dim() == 2], weight_decay=weight_decay),
              dict(params=[p for p in core if p.dim() != 2], weight_decay=0.0)]
    optimizers = []
    if core:
        fused = all(p.device.type in ("cpu", "cuda") for p in core)
        optimizers.append(
            torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=fused)
        )
    if tables:
        optimizers.append(
            RowAdam(
                [table.values for table in tables],
                lr=mem_lr,
                beta2=mem_beta2,
                process_group=process_group_of(tables[0]),
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]  # for a schedule to scale, as train.py's does
    return optimizers


@torch.no_grad()
def clip_gradients(model, max_norm):
    """Scales the tables' gradients, and all others, to a norm of at most max_norm each: two groups, clipped
    apart.

    Repeated slots are summed before their norm is taken. Returns (norm of the others, norm of the tables').
    """
    tables = tables_of(model)
    in_tables = {id(table.values) for table in tables}
    core_norm = torch.nn.utils.clip_grad_norm_(
        [p for p in model.parameters() if id(p) not in in_tables], max_norm
    )
    read = [table.values for table in tables if table.values.grad is not None]
    grads = [coalesce_gradient_(values)[1] if values.grad.is_sparse else values.grad for values in read]
    table_norm = torch.tensor(0.0)
    if grads:
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads
        ]
        squares = torch.stack(norms).square().sum()
        process_group = process_group_of(tables[0])
        if process_group is not None:  # sum over all columns
            dist.all_reduce(squares, group=process_group)
        table_norm = squares.sqrt()
    if table_norm > max_norm:
        for g in grads:
            g.mul_(max_norm / (table_norm + 1e-6))
    return core_norm, table_norm


def schedule(step, warmup_iters, max_iters, min_ratio):
    """What to multiply peak learning rates with: a linear warm-up, then a cosine from 1 down to
    min_ratio.
    """
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    progress = min(1.0, (step - warmup_iters) / max(1, max_iters - warmup_iters))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
