"""
Optimizers for models with memory layers.

- RowAdam for the tables, whose step costs only as much as the rows that were read; AdamW for the rest
- gradient clipping, separately for tables and the rest
- the learning-rate schedule
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from nanomem import kernels
from nanomem.memory import MemoryTable, segment_sum
from nanomem.ops import is_distinct, mix, sparse_rows, use_kernels


def squared_norms(grads: Tensor, process_group: "dist.ProcessGroup | None" = None) -> Tensor:
    """The squared norm of each row, in float32 at least: grads (u, columns) -> (u,).

    process_group: the processes that hold the other columns; the norms are then those of whole rows.
    """
    dtype = torch.promote_types(grads.dtype, torch.float32)
    squares = torch.linalg.vector_norm(grads, dim=1, dtype=dtype).square()
    if process_group is not None:
        dist.all_reduce(squares, group=process_group)
    return squares


def coalesce_gradient_(
    values: Tensor, process_group: "dist.ProcessGroup | None" = None
) -> tuple[Tensor, Tensor]:
    """The rows that have a gradient, (u,) int64, ascending and distinct; and their gradients (u, columns).

    Sums repeated rows of a sparse values.grad in place; the gradients returned share its memory, and some of
    them can be zero. Of a dense one, returns copies of the rows that are not zero in the columns of any
    process of process_group, or all rows where the Triton kernels compute.
    """
    grad = values.grad
    if not grad.is_sparse:
        if use_kernels(values):  # to look for rows of zeros would mean waiting for the GPU
            return torch.arange(len(grad), device=grad.device), grad
        touched = grad.any(dim=1).int()
        if process_group is not None:
            dist.all_reduce(touched, dist.ReduceOp.MAX, group=process_group)
        rows = touched.nonzero().squeeze(1)
        return rows, grad[rows]
    rows, grads = grad._indices()[0], grad._values()
    # Rows repeat if several layers or accumulated batches read them. On a GPU, looking whether they do would
    # mean waiting for it.
    if not is_distinct(grad) and (use_kernels(values) or not (rows[1:] > rows[:-1]).all()):
        rows, grads = segment_sum(rows[:, None], grads.new_ones(len(rows), 1), grads, len(values))
        values.grad = sparse_rows(rows, grads, values.shape)
    return rows, grads


class RowAdam(torch.optim.Optimizer):
    """Adam without momentum and with one second moment per row, for tables where a step reads few rows.

        v_r     <- beta2 * v_r + (1 - beta2) * mean(g_r ** 2)        for each row r with a gradient
        V_r     <- V_r - lr * g_r / (sqrt(v_r / (1 - beta2 ** n_r)) + eps)

    n_r counts the steps in which row r got a gradient, so every row has its own clock. A row whose gradient
    is missing or zero keeps its value, moment and count; nothing decays. State: 8 bytes per row.

    A row's first step has a root mean square of lr, however late it comes. (With Adam's clock, a row first
    read at step 10,000 would move 1 / sqrt(1 - beta2) = 10 times as far.) Later steps can exceed lr: step n_r
    can reach sqrt(n_r) * lr, up to lr / sqrt(1 - beta2), if its gradient is larger than the row's earlier
    ones.

    bfloat16 tables are rounded up or down at random, with the right expectation, so that steps smaller than
    bfloat16's spacing still add up. The noise depends only on seed, row, n_r and column.

    Takes sparse gradients; of a dense one it updates the rows that are not zero. A row whose squared norm
    underflows to 0 in float32 counts as zero. process_group: the processes that share the tables' columns
    (sharding.py); moments are then those of whole rows, and the noise is the whole table's.

    row_scale[values], (n_rows,) float32, multiplies the lr of each row of a table. grad_scale[values], (),
    multiplies the table's gradient in the next step; clip_gradients sets it. Neither is saved.
    """

    CHUNK = 2**18  # numbers updated at a time, so that temporaries stay in cache: 1.5 times as fast

    def __init__(self, params, lr: float = 1e-2, beta2: float = 0.99, eps: float = 1e-10, seed: int = 0,
                 process_group: "dist.ProcessGroup | None" = None):
        super().__init__(params, dict(lr=lr, beta2=beta2, eps=eps, seed=seed))
        self.process_group, self.row_scale, self.grad_scale = process_group, {}, {}

    def add_param_group(self, param_group: dict):
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
    def step(self, closure: Callable | None = None):
        """Updates the rows that have a gradient. Returns closure()'s loss, as torch's optimizers do."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is not None:
                    self._update(values, group["lr"], group["beta2"], group["eps"], group["seed"] % 2**31)
        return loss

    def _update(self, values, lr, beta2, eps, seed):
        state = self.state[values]
        if not state:
            state["second_moment"] = values.new_zeros(len(values), dtype=torch.float32)
            state["reads"] = values.new_zeros(len(values), dtype=torch.int32)
        second_moment, reads = state["second_moment"], state["reads"]           # v and n: (n_rows,) each
        row_scale = self.row_scale.get(values)                                  # (n_rows,)
        grad_scale = self.grad_scale.pop(values, None)                          # ()

        rows, grads = coalesce_gradient_(values, self.process_group)            # (u,), (u, columns)
        if grad_scale is not None and not use_kernels(values):
            grads = grads * grad_scale
        columns, first_column, mean_square = grads.shape[1], 0, None
        if self.process_group is not None:  # these are some of the columns
            v_dim = columns * dist.get_world_size(self.process_group)
            first_column = columns * dist.get_rank(self.process_group)
            mean_square = squared_norms(grads, self.process_group) / v_dim      # (u,), of whole rows

        if use_kernels(values):
            kernels.row_adam(values, rows, grads, second_moment, reads, lr, beta2, eps, seed, mean_square,
                             first_column, row_scale, grad_scale)
            return

        if mean_square is None:
            mean_square = squared_norms(grads) / columns
        has_gradient = mean_square != 0  # true for NaN, which must not go unnoticed
        if not has_gradient.all():
            rows, grads, mean_square = rows[has_gradient], grads[has_gradient], mean_square[has_gradient]
        v = second_moment[rows].lerp_(mean_square.float(), 1 - beta2)           # (u,)
        n = reads[rows] + 1                                                     # (u,)
        second_moment[rows], reads[rows] = v, n
        factor = lr / ((v / (1 - beta2**n)).sqrt() + eps)                       # (u,)
        if row_scale is not None:
            factor = factor * row_scale[rows]

        wide = torch.promote_types(values.dtype, torch.float32)  # lr / sqrt(v) can overflow float16
        size = max(1, self.CHUNK // columns)
        for r, g, f, n_r in zip(rows.split(size), grads.split(size), factor.split(size), n.split(size)):
            new = values.index_select(0, r).to(wide).addcmul_(g.to(wide), f[:, None].to(wide), value=-1)
            if values.dtype == torch.bfloat16:
                new = stochastic_round(new, seed, r, n_r, first_column)
            values.index_copy_(0, r, new.to(values.dtype))

    def zero_grad(self, set_to_none: bool = True):
        """As in torch; forgets what clip_gradients set for a step that was left out."""
        self.grad_scale.clear()
        super().zero_grad(set_to_none)

    def __getstate__(self):  # for copies; torch's own leaves the process group out
        ours = {name: getattr(self, name) for name in ("process_group", "row_scale", "grad_scale")}
        return super().__getstate__() | ours

    def load_state_dict(self, state_dict: dict):
        """Loads what state_dict() returned. Unlike torch's, keeps dtypes: the counts stay int32."""
        super().load_state_dict(state_dict)
        tables = [values for group in self.param_groups for values in group["params"]]
        for number, saved in state_dict["state"].items():
            device = tables[number].device
            self.state[tables[number]] = {key: tensor.clone().to(device) for key, tensor in saved.items()}


def stochastic_round(new: Tensor, seed: int, rows: Tensor, reads: Tensor, first_column: int = 0) -> Tensor:
    """Rounds float32 numbers (u, columns) to bfloat16, up or down at random, with the right expectation.

    bfloat16 is the upper half of a float32. Adding 16 random bits to the lower half carries into the upper
    just as often as it should. The bits are a hash of seed, rows (u,) int64, reads (u,) int32 and column, so
    they are the same each time. first_column: the number of new's first column in the whole table.
    """
    column = torch.arange(first_column, first_column + new.shape[1], device=new.device)
    row_seed = mix(mix(mix(reads.long() ^ seed) ^ (rows & 0xFFFFFFFF)) ^ (rows >> 32))
    noise = mix((row_seed[:, None] + column * 0x9E3779B9) & 0xFFFFFFFF) >> 16
    bits = new.view(torch.int32)
    bits = torch.where(new.isfinite(), bits + noise.int(), bits)
    return (bits & -0x10000).view(torch.float32).bfloat16()


def process_group_of(table: MemoryTable) -> "dist.ProcessGroup | None":
    """The processes that share a ShardedTable's columns; None for a table that is not split."""
    return getattr(table, "shard_group", None)


def tables_of(model: nn.Module) -> list[MemoryTable]:
    """The memory tables of a model, each once."""
    return [module for module in model.modules() if isinstance(module, MemoryTable)]


def named_tables(model: nn.Module) -> list[tuple[str, MemoryTable]]:
    """(name of its values, table) for each memory table, each once."""
    table_of = {id(table.values): table for table in tables_of(model)}
    return [(name, table_of[id(p)]) for name, p in model.named_parameters() if id(p) in table_of]


def _outside_tables(model):
    """The parameters of a model other than its tables' values."""
    in_tables = {id(table.values) for table in tables_of(model)}
    return [p for p in model.parameters() if id(p) not in in_tables]


def build_optimizer(model: nn.Module, learning_rate: float = 1e-3, mem_lr: float = 1e-2,
                    weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95),
                    mem_beta2: float = 0.99) -> list[torch.optim.Optimizer]:
    """The optimizers for any module with memory layers: [AdamW, RowAdam for the tables].

    Each needs its step() and zero_grad(). A model without trainable tables has no RowAdam, one without other
    trainable parameters no AdamW. Weight decay applies to matrices and stacks of them, not to vectors, keys
    or values.
    """
    core = [p for p in _outside_tables(model) if p.requires_grad]
    matrices = dict(params=[p for p in core if p.dim() in (2, 3)], weight_decay=weight_decay)
    others = dict(params=[p for p in core if p.dim() not in (2, 3)], weight_decay=0.0)
    optimizers = []
    if core:
        fused = all(p.device.type in ("cpu", "cuda") for p in core)
        groups = [group for group in (matrices, others) if group["params"]]
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused))
    tables = [table for table in tables_of(model) if table.values.requires_grad]
    if tables:
        values, process_group = [table.values for table in tables], process_group_of(tables[0])
        optimizers.append(RowAdam(values, lr=mem_lr, beta2=mem_beta2, process_group=process_group))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]  # what a schedule scales, as in train.py
    return optimizers


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float,
                   optimizers: Iterable[torch.optim.Optimizer] = ()) -> tuple[Tensor, Tensor]:
    """Scales the tables' gradients, and all others, to a norm of at most max_norm each.

    Returns both norms before scaling: (of the others, of the tables'). Sums repeated rows first. optimizers:
    those that step next. Where the Triton kernels compute, RowAdam then does the tables' scaling in its step,
    which saves a pass over their gradients.
    """
    core = [p for p in _outside_tables(model) if p.grad is not None]
    zero = torch.zeros((), device=next(model.parameters()).device)
    core_norm = torch.nn.utils.clip_grad_norm_(core, max_norm) if core else zero
    tables = [table for table in tables_of(model) if table.values.grad is not None]
    if not tables:
        return core_norm, zero
    grads = [_coalesced(table.values) for table in tables]
    norms = [torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
             for grad in grads]
    squares = torch.stack(norms).square().sum()
    process_group = process_group_of(tables[0])
    if process_group is not None:  # add the squares of the other processes' columns
        dist.all_reduce(squares, group=process_group)
    table_norm = squares.sqrt()
    scale = torch.where(table_norm > max_norm, max_norm / (table_norm + 1e-6), 1.0)
    row_adams = {}  # values -> the RowAdam that updates them
    for optimizer in optimizers:
        if isinstance(optimizer, RowAdam):
            for param_group in optimizer.param_groups:
                row_adams |= dict.fromkeys(param_group["params"], optimizer)
    for table, grad in zip(tables, grads):
        if table.values in row_adams and use_kernels(grad):
            row_adams[table.values].grad_scale[table.values] = scale
        elif grad.device.type != "cpu" or scale != 1:  # on a GPU, checking would mean waiting
            grad.mul_(scale)
    return core_norm, table_norm


def _coalesced(values):
    """All numbers of a gradient: a dense one as it is, the rows of a sparse one, each once."""
    return coalesce_gradient_(values)[1] if values.grad.is_sparse else values.grad


def schedule(step: int, warmup_iters: int, max_iters: int, min_ratio: float) -> float:
    """What to multiply the peak learning rates by: a linear warm-up, then a cosine from 1 to min_ratio."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    progress = min(1.0, (step - warmup_iters) / max(1, max_iters - warmup_iters))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
