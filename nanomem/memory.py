"""
The product-key memory layer of "Memory Layers at Scale" (Berges et al. 2024, arXiv 2412.09764).

A memory layer is a key-value lookup with trainable keys and values. It takes the place of a
feed-forward layer and holds far more parameters than one, since a token reads only a few of them:

    q   = W_q x                              a query per head
    I   = the k best of <q, K_i>             among N = n_keys**2 slots
    s   = softmax(<q, K_I>)                  over the k slots chosen, per head
    y   = sum of s_i V_i                     over all heads' chosen slots
    out = W_out (y * silu(W_gate x))         Memory+'s input-dependent gate

Read it in this order:
    gather_sum ...      the arithmetic: reading rows, and what flows back from it
    product_key_topk    finds the best k of N slots in sqrt(N) time, exactly
    memory_read         sums the chosen values; its gradients touch only the rows that were read
    MemoryTable         owns the values, so that several layers can share them
    ProductKeyMemory    the layer; every part of Memory+ can be switched off
and leave out, at first, use_kernels (on a GPU, Triton kernels compute the same) and what is registered for torch.compile.
"""

import contextlib
import functools
import importlib.util
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad

from nanomem import cpu, kernels


def use_kernels(x):
    """Whether the Triton kernels (kernels.py) compute with x, or plain PyTorch does, as here.

    They do for 16- and 32-bit floats on a CUDA or ROCm GPU where Triton is installed. The environment variable NANOMEM_KERNELS
    forces either: "triton" (on a CPU that takes Triton's interpreter, TRITON_INTERPRET=1) or "torch".
    Raises ValueError for another value of it.
    """
    choice = os.environ.get("NANOMEM_KERNELS", "auto")
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"NANOMEM_KERNELS must be auto, triton or torch, got {choice!r}")
    if choice == "auto":
        choice = "triton" if x.is_cuda and _has_triton() else "torch"
    if choice == "triton" and not (_has_triton() and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")):
        raise ValueError(f"NANOMEM_KERNELS=triton needs Triton and a GPU, or Triton's interpreter (TRITON_INTERPRET=1); the tensor is on {x.device}")
    return choice == "triton" and x.dtype != torch.float64


@functools.cache
def _has_triton():
    return importlib.util.find_spec("triton") is not None


# ------------------------------------------------------------------------------------------------
# The lookup's arithmetic is one form, linear in each of its three arguments. Of n tokens, token t reads the rows rows[t, l] of a
# table, numbers of slots, with weights[t, l], for l below lookups = heads * knn:
#
#     T(table, weights, x) = sum over tokens t and lookups l of  weights[t, l] * <table[rows[t, l]], x[t]>
#
# and its three derivatives are the three functions below. Reading values is the derivative by x; what
# flows back is the other two. Key scores have the same gradients (_product_key_topk_backward): there the rows are half keys.


def gather_sum(table, rows, weights):
    """dT/dx: out[t] = sum over l of weights[t, l] * table[rows[t, l]].

    table (n_rows, dim), rows (n, lookups) int64, weights (n, lookups) -> (n, dim)
    """
    if use_kernels(table):
        return kernels.gather_sum(table, rows, weights)
    return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")


def gather_dot(table, rows, x):
    """dT/dweights: out[t, l] = <table[rows[t, l]], x[t]>.

    table (n_rows, dim), rows (n, lookups) int64, x (n, dim) -> (n, lookups)
    """
    if use_kernels(table):
        return kernels.gather_dot(table, rows, x)
    if cpu.can_gather_dot(table, rows):
        return cpu.gather_dot(table, rows, x)
    # One lookup of every token at a time, so that no (n, lookups, dim) tensor is ever built.
    return torch.stack([(table[rows[:, l]] * x).sum(-1) for l in range(rows.shape[1])], dim=1)


def narrowest_integer(n):
    """The dtype of the fewest bytes that holds the numbers below n: it sorts the fastest."""
    return torch.int16 if n <= 2**15 else torch.int32 if n <= 2**31 else torch.int64


def scatter_sum(rows, weights, x, n_rows):
    """dT/dtable, of the rows that occur: sums[i] = sum over all (t, l) with rows[t, l] == unique[i] of weights[t, l] * x[t].

    rows (n, lookups) int64 below n_rows, weights (n, lookups), x (n, dim) -> unique (u,) int64 ascending, sums (u, dim)

    Sorting the lookups by row puts each row's share in one segment, and summing a segment is a read again,
    with tokens and rows swapped: no atomics, the same result every time, and no (n, lookups, dim) tensor.
    """
    if use_kernels(x):
        return kernels.scatter_sum(rows, weights, x, n_rows)[:2]
    rows, order = torch.sort(rows.flatten().to(narrowest_integer(n_rows)), stable=True)  # a CPU's radix sort goes byte by byte
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = rows[1:] != rows[:-1]
    starts = first.nonzero().squeeze(1)
    tokens, weights = order // weights.shape[1], weights.flatten().index_select(0, order)
    sums = F.embedding_bag(tokens, x, offsets=starts, per_sample_weights=weights, mode="sum")
    return rows[starts].long(), sums


# ------------------------------------------------------------------------------------------------
# Finding slots


@functools.lru_cache
def candidate_pairs(knn, device):
    """Ranks (a, b) of first and second halves that can be among the best knn sums: two (n_pairs,) int32 tensors.

    Both lists of half scores are sorted, so the pair at ranks (a, b) is beaten or equalled by all
    (a + 1) * (b + 1) - 1 pairs of no higher ranks. It is needed only if they leave room for it: 119 pairs
    instead of 1,024 for knn = 32. Row a of the table of pairs keeps its first knn // (a + 1) entries.
    """
    pairs = [(a, b) for a in range(knn) for b in range(knn // (a + 1))]
    return tuple(ranks.contiguous() for ranks in torch.tensor(pairs, dtype=torch.int32, device=device).unbind(1))


def _half_scores(queries, keys):
    """<queries[t, h, c], keys[h, c, i]>: queries (n, heads, 2, half), keys (heads, 2, n_keys, half) -> (heads, 2, n, n_keys).

    float32 even from 16-bit operands, whose products are exact in it: rounded scores would change the weights by percents.
    """
    q, k = queries.flatten(1, 2).transpose(0, 1), keys.flatten(0, 1).transpose(1, 2)
    with torch.autocast(q.device.type, enabled=False):
        if q.dtype in (torch.float32, torch.float64):
            scores = torch.bmm(q, k)
        elif q.is_cuda and torch.version.hip is None:
            scores = torch.bmm(q, k, out_dtype=torch.float32)
        else:
            scores = torch.bmm(q.float(), k.float())
    return scores.view(*keys.shape[:2], len(queries), keys.shape[2])


def select(half_scores, knn):
    """The knn best sums of a first and a second half score, from the pairs that can be among them.

    half_scores (heads, 2, n, n_keys) -> scores (n, heads, knn), from high to low, and the slots they are of, int64
    """
    n_keys = half_scores.shape[-1]
    a, b = candidate_pairs(knn, half_scores.device)
    if use_kernels(half_scores):
        return kernels.select(half_scores, knn, (a, b))
    best, indices = cpu.topk(half_scores, knn)  # (heads, 2, n, knn)
    sums = best[:, 0].index_select(-1, a) + best[:, 1].index_select(-1, b)
    slots = indices[:, 0].index_select(-1, a) * n_keys + indices[:, 1].index_select(-1, b)
    scores, slots = cpu.topk(sums, knn, slots)  # (heads, n, knn): the best sums, and of each its slot
    return scores.transpose(0, 1), slots.transpose(0, 1)  # views


# Registered with torch.library, so that torch.compile takes the search for one operation and goes on around it.
@torch.library.custom_op("nanomem::product_key_topk", mutates_args=())
def _product_key_topk(queries: torch.Tensor, keys: torch.Tensor, knn: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores, slots = zip(*(select(_half_scores(chunk, keys), knn) for chunk in queries.split(_chunk_size(keys))))
    return torch.cat(scores), torch.cat(slots)


def _chunk_size(keys):
    """So many tokens at a time that their half scores (heads, 2, tokens, n_keys) take 16 MB on a CPU, where they stay in cache
    and a lookup takes a fifth less time than all at once, or 128 MB on a GPU, which is kept busy. All are never there.
    """
    return max(1, 2**(22 if keys.device.type == "cpu" else 25) // keys[..., 0].numel())


@_product_key_topk.register_fake  # for torch.compile: what comes out, without computing it
def _(queries, keys, knn):
    n, heads = queries.shape[:2]
    scores = queries.new_empty(n, heads, knn, dtype=torch.float64 if queries.dtype == torch.float64 else torch.float32)
    return scores, scores.new_empty(n, heads, knn, dtype=torch.int64)


@torch.library.custom_op("nanomem::product_key_topk_backward", mutates_args=())
def _product_key_topk_backward(grad_scores: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor,
                               slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # A score is <q1, K1[i]> + <q2, K2[j]> for the slot (i, j) chosen. Only the chosen ones have a gradient,
    # so the queries' is a read of the keys and the keys' a scatter of the queries, weighted by grad_scores.
    n, heads, _, half = queries.shape
    n_keys, knn = keys.shape[2], grad_scores.shape[-1]
    first = slots // n_keys
    half_indices = torch.stack([first, slots - first * n_keys], dim=2)  # (n, heads, 2, knn)
    base = torch.arange(heads * 2, device=keys.device).view(heads, 2, 1) * n_keys
    rows = (half_indices + base).view(n * heads * 2, knn)
    weights = grad_scores.to(keys.dtype).unsqueeze(2).expand(n, heads, 2, knn).reshape(rows.shape)
    grad_queries = gather_sum(keys.reshape(-1, half), rows, weights).view(queries.shape)
    if use_kernels(keys):  # few rows, each of many lookups: there is a faster way than sorting them
        return grad_queries, kernels.key_gradient(half_indices, grad_scores, queries, n_keys)
    unique, sums = scatter_sum(rows, weights, queries.reshape(-1, half), heads * 2 * n_keys)
    grad_keys = keys.new_zeros(heads * 2 * n_keys, half).index_copy_(0, unique, sums)
    return grad_queries, grad_keys.view(keys.shape)


@_product_key_topk_backward.register_fake
def _(grad_scores, queries, keys, slots):
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape)


class _FirstDerivative(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(operation, *inputs):
        return operation(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("a memory layer has no second derivative: expected a loss without gradient "
                                  "penalties, Hessian products or other gradients of gradients through it")


def first_derivative(operation, *inputs):
    """operation(*inputs) for a backward pass, whose own derivative raises NotImplementedError.

    torch's once_differentiable would take what the forward pass saved for constants, and give a wrong number.
    """
    if torch.compiler.is_compiling():  # torch.compile refuses second derivatives by itself
        return operation(*inputs)
    return _FirstDerivative.apply(operation, *inputs)


class _Search(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(queries, keys, knn):
        return _product_key_topk(queries, keys, knn)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad_scores, _):
        return *first_derivative(_product_key_topk_backward, grad_scores, *ctx.saved_tensors), None


def product_key_topk(queries, keys, knn):
    """The knn slots with the highest scores among n_keys**2, exactly (Lample et al. 2019, section 3.2).

    Slot (i, j), numbered i * n_keys + j, has the key [keys[h, 0, i] ; keys[h, 1, j]], so its score is the sum of
    two halves. The best knn sums are made of the best knn of each half: 2 * n_keys scores, not n_keys**2.

    Args:
        queries: (n, heads, 2, k_dim / 2), the two halves of each head's query.
        keys: (heads, 2, n_keys, k_dim / 2), of the same dtype.
        knn: how many slots to choose for each token and head.
    Returns:
        scores (n, heads, knn), float32 for 16-bit queries, sorted from high to low, differentiable in queries and keys, and
        indices (n, heads, knn) int64: distinct slots that have these scores.
    Raises:
        ValueError: shapes or dtypes that don't fit each other, or knn outside 1..n_keys.
    """
    if queries.dim() != 4 or keys.dim() != 4 or queries.shape[1:3] != keys.shape[:2] or queries.shape[3] != keys.shape[3] \
            or queries.shape[2] != 2 or 0 in keys.shape:
        raise ValueError("expected queries (n, heads, 2, k_dim/2) and keys (heads, 2, n_keys, k_dim/2), "
                         f"got {tuple(queries.shape)} and {tuple(keys.shape)}")
    if queries.dtype != keys.dtype:
        raise ValueError(f"expected queries and keys of one dtype, got {queries.dtype} and {keys.dtype}")
    if not 1 <= knn <= keys.shape[2]:
        raise ValueError(f"knn must be from 1 to n_keys = {keys.shape[2]}, got {knn}")
    if queries.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")  # for the tensor cores; the scores are float32 all the same
        queries, keys = queries.to(dtype), keys.to(dtype)
    if torch.compiler.is_compiling() and forward_ad._current_level >= 0:  # it would drop tangents silently
        raise NotImplementedError("product_key_topk has no forward-mode derivative: use backward() or jacrev")
    return _Search.apply(queries, keys, knn)


# ------------------------------------------------------------------------------------------------
# Reading them


@torch.library.custom_op("nanomem::memory_read", mutates_args=())
def _memory_read(values: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return gather_sum(values, indices, weights)


@_memory_read.register_fake
def _(values, indices, weights):
    return values.new_empty(indices.shape[0], values.shape[1])


@torch.library.custom_op("nanomem::memory_read_backward", mutates_args=())
def _memory_read_backward(
        grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor,
        sparse_grad: bool, values_need_it: bool, weights_need_it: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # The gradient of values, as table_gradient takes it, and that of weights; empty where it is not needed.
    grad = grad.contiguous()
    rows, sums, grad_weights = indices.new_empty(0), values.new_empty(0), weights.new_empty(0)
    if values_need_it and weights_need_it and use_kernels(values):
        rows, sums, grad_weights = kernels.scatter_sum(indices, weights, grad, len(values), dot_with=values)  # in one pass
    else:
        if values_need_it:
            rows, sums = scatter_sum(indices, weights, grad, len(values))
        if weights_need_it:
            grad_weights = gather_dot(values, indices, grad)
    if values_need_it and not sparse_grad:
        rows, sums = rows[:0], values.new_zeros(values.shape).index_copy_(0, rows, sums)
    return rows, sums, grad_weights


def table_gradient(values, rows, grad, sparse):
    """The gradient of values for autograd: `grad` (n_slots, v_dim), or if sparse, `grad` (u, v_dim) of its rows (u,)."""
    if not sparse:
        return grad
    return torch.sparse_coo_tensor(rows[None], grad, values.shape, is_coalesced=True, check_invariants=False)


class _MemoryRead(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values, indices, weights, sparse_grad):
        return _memory_read(values, indices, weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.sparse_grad = inputs[3]

    @staticmethod
    def backward(ctx, grad):
        values, indices, weights = ctx.saved_tensors
        values_need_it, _, weights_need_it, _ = ctx.needs_input_grad
        rows, sums, grad_weights = first_derivative(
            _memory_read_backward, grad, values, indices, weights, ctx.sparse_grad, values_need_it, weights_need_it)
        grad_values = table_gradient(values, rows, sums, ctx.sparse_grad) if values_need_it else None
        return grad_values, None, grad_weights if weights_need_it else None, None


def check_lookups(values, indices):
    """Raises ValueError unless values are (n_slots, v_dim) and indices (n, lookups) integers, lookups 1 or more."""
    if values.dim() != 2 or indices.dim() != 2 or 0 in (*values.shape, indices.shape[1]):
        raise ValueError("expected values (n_slots, v_dim) and indices (n, lookups) with one lookup or more, "
                         f"got {tuple(values.shape)} and {tuple(indices.shape)}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expected indices of dtype int64, got {indices.dtype}")


@torch.compiler.disable  # the gradient of values is sparse, of as many rows as were read, and torch.compile takes neither
def memory_read(values, indices, weights, sparse_grad=False):
    """The weighted sum of the rows each token looks up: out[t] = sum over l of weights[t, l] * values[indices[t, l]].

    Args:
        values: (n_slots, v_dim).
        indices: (n, lookups) int64; a slot may occur several times.
        weights: (n, lookups), of the values' dtype.
        sparse_grad: the gradient of values becomes a sparse tensor of the rows read, each row once, so that the
            cost doesn't grow with n_slots. Off by default, as in torch.nn.functional.embedding; MemoryTable turns it on.
    Returns:
        (n, v_dim), differentiable in values and weights.
    Raises:
        ValueError: shapes or dtypes that don't fit each other.
    """
    check_lookups(values, indices)
    if weights.shape != indices.shape or weights.dtype != values.dtype:
        raise ValueError(f"expected weights (n, lookups) of the indices' shape {tuple(indices.shape)} and the values' "
                         f"dtype {values.dtype}, got {tuple(weights.shape)} and {weights.dtype}")
    return _MemoryRead.apply(values, indices, weights, sparse_grad)


# ------------------------------------------------------------------------------------------------
# The modules


class MemoryTable(nn.Module):
    """The values of a memory: n_slots rows of v_dim numbers. Several layers may share one table, as in Memory+.

    Train it with `nanomem.optim.build_optimizer`, whose update touches only the rows read, and rounds bfloat16 values
    stochastically (dtype=torch.bfloat16; torch's default dtype otherwise). With
    sparse_grad=False its gradient is dense and any torch optimizer will do, at a cost that grows with n_slots.
    `columns` (a range) holds only these: sharding.py splits a table over processes. A single process has all of them.
    """

    group = None  # the processes that hold the other columns

    def __init__(self, n_slots, v_dim, sparse_grad=True, dtype=None, columns=None):
        super().__init__()
        if n_slots < 1 or v_dim < 1:
            raise ValueError(f"n_slots and v_dim must be 1 or more, got {n_slots} and {v_dim}")
        self.n_slots, self.v_dim, self.sparse_grad = n_slots, v_dim, sparse_grad
        self.columns = range(v_dim) if columns is None else columns
        self.values = nn.Parameter(torch.empty(n_slots, len(self.columns), dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Draws the values: when built, and after `to_empty` for a table built on torch's device "meta"."""
        std = self.v_dim**-0.5
        if self.values.is_meta or type(self.values.data) is not torch.Tensor:  # nothing to draw, or FSDP's DTensor
            self.values.normal_(std=std)
            return
        # Whole rows are drawn, so that a column begins the same however they are split.
        for rows in self.values.split(2**16):
            whole = rows.new_empty(len(rows), self.v_dim).normal_(std=std)
            rows.copy_(whole[:, self.columns.start:self.columns.stop])

    @torch.compiler.disable  # so that a compiled model has one graph break a memory layer, here
    def forward(self, indices, weights):
        """indices (n, lookups) int64 and weights (n, lookups) -> (n, v_dim)"""
        return memory_read(self.values, indices, weights.to(self.values.dtype), self.sparse_grad)


class Linear(nn.Linear):
    """nn.Linear whose weight `init` fills in: when built, and in reset_parameters after torch's device "meta"."""

    def __init__(self, in_features, out_features, bias=True, init=None):
        self.init = init  # nn.Linear's __init__ calls reset_parameters
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self):
        super().reset_parameters()
        if self.init is not None:
            self.init(self.weight)


class ProductKeyMemory(nn.Module):
    """The memory layer: (batch, time, dim) -> (batch, time, dim), in place of a feed-forward layer.

    With the defaults it is the paper's Memory+ (section 3.3); with qk_norm=False and gated=False the plain
    product-key memory of Lample et al. 2019. Layers given the same table share their values; the keys and
    projections are each layer's own.

    Args:
        dim: the model's width.
        table: a MemoryTable with a square number of slots, n_keys**2.
        heads: independent lookups a token; their results are summed.
        knn: slots read by each head.
        k_dim: length of a query and of a key, even; None for dim.
        qk_norm: compare directions: halves of queries and keys are scaled to unit length, times a learned scale a head.
        gated: multiply what was read by silu(W_gate x) before the output projection.
    Raises:
        ValueError: a setting that can't be.
    """

    def __init__(self, dim, table, heads=4, knn=32, k_dim=None, qk_norm=True, gated=True):
        super().__init__()
        k_dim = dim if k_dim is None else k_dim
        n_keys = math.isqrt(table.n_slots)
        if n_keys**2 != table.n_slots:
            raise ValueError(f"the table must have a square number of slots, such as {n_keys}**2 = {n_keys**2}, got {table.n_slots}")
        if not 1 <= knn <= n_keys:
            raise ValueError(f"knn must be from 1 to n_keys = {n_keys}, got {knn}")
        if k_dim < 2 or k_dim % 2:
            raise ValueError(f"k_dim must be even, to be split into two halves, got {k_dim}")
        if heads < 1:
            raise ValueError(f"heads must be 1 or more, got {heads}")
        self.dim, self.heads, self.knn, self.k_dim, self.n_keys = dim, heads, knn, k_dim, n_keys
        self.table = table

        # Initialised as the paper's code does.
        normal = functools.partial(nn.init.normal_, std=dim**-0.5)
        self.query_proj = Linear(dim, heads * k_dim, init=nn.init.xavier_uniform_)
        self.keys = nn.Parameter(torch.empty(heads, 2, n_keys, k_dim // 2))
        self.qk_scale = nn.Parameter(torch.empty(heads)) if qk_norm else None
        self.reset_parameters()
        self.gate_proj = Linear(dim, table.v_dim, init=normal) if gated else None
        self.out_proj = Linear(table.v_dim, dim, init=normal) if gated or table.v_dim != dim else None
        self.observer = None  # set by `observe_lookups`

    def reset_parameters(self):
        """Fills in the keys and their scale. Projections and table have a reset_parameters of their own."""
        nn.init.uniform_(self.keys, -(self.k_dim**-0.5), self.k_dim**-0.5)
        if self.qk_scale is not None:
            nn.init.constant_(self.qk_scale, self.k_dim**0.5)

    def lookup(self, x):
        """x (n, dim) -> the slots to read and their weights: indices (n, heads, knn) int64, weights (n, heads, knn)."""
        keys = self.keys
        queries = self.query_proj(x).view(-1, self.heads, 2, self.k_dim // 2).to(keys.dtype)
        if self.qk_scale is not None:
            queries = F.normalize(queries, dim=-1) * self.qk_scale.view(1, -1, 1, 1)
            keys = F.normalize(keys, dim=-1)
        scores, indices = product_key_topk(queries, keys, self.knn)
        return indices, F.softmax(scores.float() if scores.dtype != torch.float64 else scores, dim=-1)

    def forward(self, x):
        """(batch, time, dim), or any shape that ends in dim, to the same shape. Raises ValueError for another width."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"expected input of width dim = {self.dim}, got {tuple(x.shape)}")
        shape, x = x.shape, x.reshape(-1, self.dim)
        indices, weights = self.lookup(x)
        if self.observer is not None:
            self.observer(indices, weights)
        y = self.table(indices.flatten(1), weights.flatten(1)).to(x.dtype)  # the heads' sums are summed: one read
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(x))
        if self.out_proj is not None:
            y = self.out_proj(y)
        return y.view(shape)

    def flops_per_token(self):
        """Multiply-adds * 2 of the forward pass for a token. Grows with n_keys, the square root of the number of slots."""
        linear = sum(m.weight.numel() for m in (self.query_proj, self.gate_proj, self.out_proj) if m is not None)
        key_scores = self.heads * self.n_keys * self.k_dim
        read = self.heads * self.knn * self.table.v_dim
        return 2 * (linear + key_scores + read)


# ------------------------------------------------------------------------------------------------
# Looking inside


@contextlib.contextmanager
def observe_lookups(model, observer):
    """While open, each memory layer of the model calls observer(layer, indices, weights) at each forward pass,
    with indices and weights (n, heads, knn) of its n tokens.
    """
    layers = [m for m in model.modules() if isinstance(m, ProductKeyMemory)]
    for layer in layers:
        layer.observer = functools.partial(observer, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = None


class SlotUsage:
    """An observer that measures how evenly the slots are used (Lample et al. 2019, section 4.4): see `usage` and `kl`."""

    def __init__(self):
        self.weight = {}  # table -> (n_slots,) sum of the weights each slot was read with

    def __call__(self, layer, indices, weights):
        if layer.table not in self.weight:
            self.weight[layer.table] = torch.zeros(layer.table.n_slots, dtype=torch.float64)
        self.weight[layer.table].index_add_(0, indices.flatten().cpu(), weights.detach().flatten().cpu().double())

    def usage(self):
        """The share of slots read at least once, over all tables."""
        return sum((w > 0).sum().item() for w in self.weight.values()) / sum(map(len, self.weight.values()))

    def kl(self):
        """The Kullback-Leibler divergence of the slots' shares of weight from uniform, in nats, mean over tables."""
        shares = [w / w.sum() for w in self.weight.values()]
        return sum(math.log(len(z)) + torch.special.xlogy(z, z).sum().item() for z in shares) / len(shares)
