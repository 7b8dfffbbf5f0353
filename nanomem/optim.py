"""
Optimizers for models with memory layers.

- AdamW for everything but the tables; RowAdam for the tables, at the cost of the rows that were read
- clipping, separately for tables and the rest: torch's clip_grad_norm_ doesn't take sparse gradients
- the schedule of the learning rate
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from nanomem import kernels
from nanomem.memory import MemoryTable, segment_sum
from nanomem.ops import sparse_rows, use_kernels


def squared_norms(grads: Tensor, process_group=None) -> Tensor:
    """The squared norm of each row, float32 at least: grads (u, columns) -> (u,).

    If the processes of a group hold different columns, the norms are those of whole rows.
    """
    dtype = torch.promote_types(grads.dtype, torch.float32)
    squares = torch.linalg.vector_norm(grads, dim=1, dtype=dtype).square()
    if process_group is not None:
        dist.all_reduce(squares, group=process_group)
    return squares


def coalesce_gradient_(values: Tensor, process_group=None) -> tuple[Tensor, Tensor]:
    """Sums repeated rows of a sparse values.grad in place. Returns (its rows, their gradients).

    rows (u,) int64 ascending and distinct, gradients (u, columns). Changing a sparse gradient's `gradients`
    in place changes values.grad. For a dense gradient, returns a copy of the rows that are not zero (in any
    process's columns).
    """
    grad = values.grad
    if not grad.is_sparse:
        touched = grad.any(dim=1).int()
        if process_group is not None:
            dist.all_reduce(touched, dist.ReduceOp.MAX, group=process_group)
        rows = touched.nonzero().squeeze(1)
        return rows, grad[rows]
    rows, grads = grad._indices()[0], grad._values()
    # Several layers or accumulated batches may have read the same row (torch's own flag for that gets lost).
    is_coalesced = (rows[1:] > rows[:-1]).all()
    if not is_coalesced:
        rows, grads = segment_sum(rows[:, None], grads.new_ones(len(rows), 1), grads, len(values))
        values.grad = sparse_rows(rows, grads, values.shape)
    return rows, grads


class RowAdam(torch.optim.Optimizer):
    """Adam without momentum and with one second moment per row, for tables of which a step reads few rows.

        v_r     <- beta2 * v_r + (1 - beta2) * mean(g_r ** 2)        for each row r with a gradient
        V_r     <- V_r - lr * g_r / (sqrt(v_r / (1 - beta2 ** n_r)) + eps)

    n_r counts the steps in which row r had a gradient: every row has its own clock. A row whose gradient is
    missing or zero keeps its value, moment and count; nothing decays. A row's first step has a root mean
    square of lr, however late it comes. (With Adam's clock, a row first read at step 10,000 would move 1 /
    sqrt(1 - beta2) = 10 times as far.) Later steps can exceed lr: if a gradient is larger than the row's
    earlier ones, step n_r can be sqrt(n_r) * lr, up to lr / sqrt(1 - beta2). State: 8 bytes per row.

    bfloat16 tables are rounded stochastically, up or down by chance, so that the expectation is right and
    steps smaller than bfloat16's spacing are not all lost. The noise depends only on seed, row, n_r and
    column.

    Takes sparse gradients, and dense ones, of which it updates the rows that are not zero. A row whose
    squared gradient is 0 in float32 counts as zero. process_group: the processes that share the tables'
    columns (sharding.py); moments are then those of whole rows, and the noise is that of the whole table.
    """

    CHUNK = 2**18  # numbers updated at a time: temporaries stay in cache, 1.5 times as fast as all at once

    def __init__(self, params, lr: float = 1e-2, beta2: float = 0.99, eps: float = 1e-10, seed: int = 0,
                 process_group=None):
        super().__init__(params, dict(lr=lr, beta2=beta2, eps=eps, seed=seed))
        self.process_group = process_group

    def add_param_group(self, param_group):
        """As in torch. Raises ValueError for a parameter that is not a table."""
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
        """Updates the rows that have a gradient. Returns the loss of closure(), which computes it and
        gradients.
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

    def __getstate__(self):  # for copies; torch's own leaves the process group out
        return super().__getstate__() | {"process_group": self.process_group}

    def load_state_dict(self, state_dict):
        """Loads what state_dict() returned and keeps its dtypes; torch would cast the counts to the table's
        dtype.
        """
        super().load_state_dict(state_dict)
        tables = [values for group in self.param_groups for values in group["params"]]
        for number, saved in state_dict["state"].items():
            device = tables[number].device
            self.state[tables[number]] = {key: tensor.clone().to(device) for key, tensor in saved.items()}

    def _update(self, values, lr, beta2, eps, seed):
        state = self.state[values]
        if not state:
            state["second_moment"] = torch.zeros(len(values), dtype=torch.float32, device=values.device)
            state["reads"] = torch.zeros(len(values), dtype=torch.int32, device=values.device)
        rows, grads = coalesce_gradient_(values, self.process_group)  # (u,), (u, columns)
        columns = grads.shape[1]
        mean_square, first_column = None, 0  # of whole rows, if processes share the columns
        if self.process_group is not None:
            v_dim = columns * dist.get_world_size(self.process_group)
            mean_square = squared_norms(grads, self.process_group) / v_dim
            first_column = columns * dist.get_rank(self.process_group)
        if use_kernels(values):
            kernels.row_adam(values, rows, grads, state["second_moment"], state["reads"], lr, beta2, eps,
                             seed, mean_square, first_column)
            return
        if mean_square is None:
            mean_square = squared_norms(grads) / columns
        has_gradient = mean_square != 0  # true for NaN, which must not go unnoticed
        if not has_gradient.all():
            rows, grads, mean_square = rows[has_gradient], grads[has_gradient], mean_square[has_gradient]
        moment = state["second_moment"][rows].lerp_(mean_square.float(), 1 - beta2)
        reads = state["reads"][rows] + 1
        state["second_moment"][rows] = moment
        state["reads"][rows] = reads
        factor = lr / ((moment / (1 - beta2**reads)).sqrt() + eps)
        wide = torch.promote_types(values.dtype, torch.float32)  # lr / sqrt(v) can overflow float16
        size = max(1, self.CHUNK // values.shape[1])
        for r, g, f, n in zip(rows.split(size), grads.split(size), factor.split(size), reads.split(size)):
            new = values.index_select(0, r).to(wide).addcmul_(g.to(wide), f[:, None].to(wide), value=-1)
            if values.dtype == torch.bfloat16:
                new = stochastic_round(new, seed, r, n, first_column)
            values.index_copy_(0, r, new.to(values.dtype))


def stochastic_round(new: Tensor, seed: int, rows: Tensor, reads: Tensor, first_column: int = 0) -> Tensor:
    """float32 numbers (u, columns) to bfloat16, up with the probability that makes the expectation right.

    bfloat16 is the upper half of a float32: adding 16 random bits to the lower half carries into it just as
    often as it should. The bits are a hash of seed, rows (u,) int64, reads (u,) int32 and column, counted
    from first_column, so they are the same each time.
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
    """The processes that share a ShardedTable's columns; None for a table in one piece."""
    return getattr(table, "shard_group", None)


def tables_of(model: nn.Module) -> list[MemoryTable]:
    """The memory tables in a module, each once."""
    return [module for module in model.modules() if isinstance(module, MemoryTable)]


def build_optimizer(model: nn.Module, learning_rate: float = 1e-3, mem_lr: float = 1e-2,
                    weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95),
                    mem_beta2: float = 0.99) -> list[torch.optim.Optimizer]:
    """The optimizers for any module that contains memory layers: [AdamW, and RowAdam for the tables].

    Step and zero each of them. The second exists only if there are tables. Weight decay is for matrices, not
    for vectors, keys or values.
    """
    tables = tables_of(model)
    in_tables = {id(table.values) for table in tables}
    core = [p for p in model.parameters() if p.requires_grad and id(p) not in in_tables]
    matrices = dict(params=[p for p in core if p.dim() == 2], weight_decay=weight_decay)
    others = dict(params=[p for p in core if p.dim() != 2], weight_decay=0.0)
    optimizers = []
    if core:
        fused = all(p.device.type in ("cpu", "cuda") for p in core)
        param_groups = [group for group in (matrices, others) if group["params"]]
        optimizers.append(torch.optim.AdamW(param_groups, lr=learning_rate, betas=betas, fused=fused))
    if tables:
        values = [table.values for table in tables]
        process_group = process_group_of(tables[0])
        optimizers.append(RowAdam(values, lr=mem_lr, beta2=mem_beta2, process_group=process_group))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]  # what a schedule scales, as in train.py
    return optimizers


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> tuple[Tensor, Tensor]:
    """Scales the tables' gradients, and all others, to a norm of at most max_norm each.

    Repeated rows are summed before their norm is taken. Returns (norm of the others, norm of the tables').
    """
    tables = tables_of(model)
    in_tables = {id(table.values) for table in tables}
    core = [p for p in model.parameters() if id(p) not in in_tables]
    core_norm = torch.nn.utils.clip_grad_norm_(core, max_norm)
    grads = []
    for table in tables:
        grad = table.values.grad
        if grad is not None:
            grads.append(coalesce_gradient_(table.values)[1] if grad.is_sparse else grad)
    table_norm = torch.tensor(0.0)
    if grads:
        norms = []
        for grad in grads:
            wide = torch.promote_types(grad.dtype, torch.float32)
            norms.append(torch.linalg.vector_norm(grad, dtype=wide))
        squares = torch.stack(norms).square().sum()
        process_group = process_group_of(tables[0])
        if process_group is not None:  # add up those of all columns
            dist.all_reduce(squares, group=process_group)
        table_norm = squares.sqrt()
    if table_norm > max_norm:
        for g in grads:
            g.mul_(max_norm / (table_norm + 1e-6))
    return core_norm, table_norm


def schedule(step: int, warmup_iters: int, max_iters: int, min_ratio: float) -> float:
    """The factor of the peak learning rates: a linear warm-up, then a cosine from 1 down to min_ratio."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    progress = min(1.0, (step - warmup_iters) / max(1, max_iters - warmup_iters))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
