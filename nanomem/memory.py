"""
The product-key memory layer of "Memory Layers at Scale" (Berges et al. 2024, arXiv 2412.09764).

A memory layer takes the place of a feed-forward layer. It has a large trainable table of values, and each
token reads only a few dozen of its rows, so the layer adds many parameters to a model but little work.

    q   = W_q x                              one query per head
    I   = top-k of <q, K_i>                  over N = n_keys**2 slots
    s   = softmax(<q, K_I>)                  over the k chosen slots, per head
    y   = sum over heads and chosen slots of s_i V_i
    out = W_out (y * silu(W_gate x))         Memory+'s input-dependent gate

Each projection W also adds a bias. Memory+ also normalises both halves of queries and keys (qk-norm) and
multiplies each head's queries by a learned number. naive.py has the core of it in 15 lines, with every slot
scored.

In shapes, n is the number of tokens, batch * time, and lookups = heads * knn is the number of rows read per
token, counting a row again if several heads choose it.

Here follow:
    ProductKeyMemory    the layer
    product_key_topk    finds the k best of N slots with 2 sqrt(N) scores
    memory_read         the weighted sum of the chosen values
    MemoryTable         the values; several layers may share one table
    *_gradient          the backward passes; skip them and ops.py at first reading
We write the gradients by hand: autograd would store all (n, lookups, v_dim) values read, and a gradient as
large as the table. ops.py's decorators turn a function into an operation of autograd, and register_gradient
gives it a backward pass. On a GPU, kernels.py computes the same.
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanomem import cpu, kernels, ops
from nanomem.observe import observe_lookups  # noqa: F401 (for those who import it from here)
from nanomem.ops import use_kernels


class ProductKeyMemory(nn.Module):
    """The memory layer: (batch, time, dim) -> (batch, time, dim). Raises ValueError for an invalid setting.

    The defaults are the paper's Memory+ (section 3.3); qk_norm=False, gated=False is close to Lample et
    al.'s (2019), which also has batch norm. Layers given the same table share its values, but not keys and
    projections.

    Args:
        dim: width of the model.
        table: a MemoryTable with a square number of slots, n_keys**2.
        heads: independent lookups per token; their results are added up.
        knn: slots read by each head, k in the formulas.
        k_dim: length of a query and of a key, an even number; None for dim.
        qk_norm: scale both halves of queries and keys to length 1, and queries by a learned factor per head.
        gated: multiply what was read by silu(W_gate x). Without it, W_out is left out, too, if v_dim is dim.
        dropout: share of a token's lookups dropped while training. A fact then has to lie in several slots,
            so other wordings, which read only some of them, find it too.
    """

    def __init__(self, dim: int, table: "MemoryTable", heads: int = 4, knn: int = 32,
                 k_dim: int | None = None, qk_norm: bool = True, gated: bool = True, dropout: float = 0.0):
        super().__init__()
        self.dim, self.heads, self.knn, self.table, self.dropout = dim, heads, knn, table, dropout
        self.k_dim = dim if k_dim is None else k_dim
        self.n_keys = math.isqrt(table.n_slots)
        ops.check_layer(self)
        normal = functools.partial(nn.init.normal_, std=dim**-0.5)  # initialised as in the paper's code
        self.query_proj = ops.Linear(dim, heads * self.k_dim, init=nn.init.xavier_uniform_)
        self.keys = nn.Parameter(torch.empty(heads, 2, self.n_keys, self.k_dim // 2))
        self.qk_scale = nn.Parameter(torch.empty(heads)) if qk_norm else None
        self.reset_parameters()
        self.gate_proj = ops.Linear(dim, table.v_dim, init=normal) if gated else None
        self.out_proj = ops.Linear(table.v_dim, dim, init=normal) if gated or table.v_dim != dim else None
        self.observer = None  # set by observe_lookups
        # The number of training tokens before x, a scalar int64 tensor. It seeds dropout, so that a resumed
        # run drops the same lookups.
        self.first_token = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim). Raises ValueError for an x of another width."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"expected input of width dim = {self.dim}, got {tuple(x.shape)}")
        tokens = x.reshape(-1, self.dim)                                     # (n, dim)
        indices, weights = self.lookup(tokens)                               # (n, heads, knn) each
        if self.observer is not None:
            self.observer(indices, weights)
        if self.training and self.dropout:
            weights = ops.drop_lookups(weights, self.dropout, self.first_token)
        # The heads' sums are added up, so one read of heads * knn rows serves all heads.
        y = self.table(indices.flatten(1), weights.flatten(1)).to(x.dtype)   # (n, v_dim)
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(tokens))
        if self.out_proj is not None:
            y = self.out_proj(y)                                             # (n, dim)
        return y.view(x.shape)

    def lookup(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The slots to read and their weights: x (n, dim) -> (n, heads, knn) int64 and (n, heads, knn)."""
        keys = self.keys                                                       # (heads, 2, n_keys, k_dim / 2)
        queries = self.query_proj(x).to(keys.dtype).view(-1, self.heads, 2, self.k_dim // 2)
        if self.qk_scale is not None:
            queries = F.normalize(queries, dim=-1) * self.qk_scale.view(1, -1, 1, 1)
            keys = F.normalize(keys, dim=-1)
        scores, indices = product_key_topk(queries, keys, self.knn)            # (n, heads, knn) each
        return indices, F.softmax(scores, dim=-1)

    def reset_parameters(self):
        """Initialises the keys and their scale. The projections and the table initialise themselves.

        Normalised halves alone give scores from -2 to 2, for which a softmax is nearly flat. The factor
        sqrt(k_dim) stretches them.
        """
        nn.init.uniform_(self.keys, -(self.k_dim**-0.5), self.k_dim**-0.5)
        if self.qk_scale is not None:
            nn.init.constant_(self.qk_scale, self.k_dim**0.5)

    def flops_per_token(self) -> int:
        """FLOPs of the forward pass for one token, 2 per multiply-add. They grow with n_keys."""
        layers = (self.query_proj, self.gate_proj, self.out_proj)
        linear = sum(layer.weight.numel() for layer in layers if layer is not None)
        key_scores, read = self.n_keys * self.k_dim, self.knn * self.table.v_dim  # of each head, both halves
        return 2 * (linear + self.heads * (key_scores + read))


# -------------------------------- Finding the k best of N slots --------------------------------


@ops.search
def product_key_topk(queries: Tensor, keys: Tensor, knn: int) -> tuple[Tensor, Tensor]:
    """The knn slots with the highest scores among all n_keys**2, exactly (Lample et al. 2019, section 3.2).

    Slot (i, j), numbered i * n_keys + j, has the key [keys[h, 0, i] ; keys[h, 1, j]]. Its score is the sum of
    two half scores, so the best slots combine the best half keys, found with 2 * n_keys scores. The result
    equals a topk over all slots, as in naive.py. For example, with knn = 2, first half scores 5, 2, 1 and
    second ones 4, 3, 0, only three pairs can win: 5 + 4, 5 + 3 and 2 + 4. Slots (0, 0) and (0, 1) do.

    queries (n, heads, 2, k_dim / 2) and keys (heads, 2, n_keys, k_dim / 2), of the same dtype
    -> scores (n, heads, knn), from high to low, float32 at least, differentiable; and distinct slots, int64.
    Raises ValueError for shapes or dtypes that don't fit each other and for a knn outside 1..n_keys.
    """
    chunks = queries.split(ops.tokens_at_once(keys))  # so that half scores stay in the cache
    found = [merge_halves(score_halves(chunk, keys), knn) for chunk in chunks]
    scores, slots = zip(*found)
    return torch.cat(scores), torch.cat(slots)


def score_halves(queries, keys):
    """Every half query times every half key of its head and half -> (heads, 2, n, n_keys) in float32."""
    q = queries.flatten(1, 2).transpose(0, 1)                                # (heads * 2, n, k_dim / 2)
    k = keys.flatten(0, 1).transpose(1, 2)                                   # (heads * 2, k_dim / 2, n_keys)
    return ops.bmm_float32(q, k).view(*keys.shape[:2], len(queries), keys.shape[2])


def merge_halves(half_scores, knn):
    """The knn best sums of a first and a second half score, from high to low.

    half_scores (heads, 2, n, n_keys) -> scores (n, heads, knn) and slots (n, heads, knn) int64
    """
    a, b = candidate_pairs(knn, half_scores.device)                          # ranks, (n_pairs,) each
    if use_kernels(half_scores):
        return kernels.merge_halves(half_scores, knn, (a, b))
    best, half_keys = cpu.topk(half_scores, knn)                             # (heads, 2, n, knn) each, sorted
    sums = best[:, 0].index_select(-1, a) + best[:, 1].index_select(-1, b)   # (heads, n, n_pairs)
    scores, winners = cpu.topk(sums, knn)                                    # (heads, n, knn) each
    # a[winners] are the ranks of the winners' first halves; half_keys has the half key of each rank.
    i = half_keys[:, 0].gather(-1, a[winners].long())                        # (heads, n, knn)
    j = half_keys[:, 1].gather(-1, b[winners].long())
    return scores.transpose(0, 1), (i * half_scores.shape[-1] + j).transpose(0, 1)


@functools.lru_cache
def candidate_pairs(knn: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The ranks (a, b) of half scores whose sum can be among the knn best: two (n_pairs,) int32 tensors.

    Ranks begin at 0 with the highest score, so (a + 1) * (b + 1) pairs, (a, b) among them, have sums at least
    as high as (a, b). If there are more than knn of them, (a, b) can be skipped. For knn = 32 that leaves 119
    pairs of 1,024.
    """
    pairs = [(a, b) for a in range(knn) for b in range(knn // (a + 1))]  # (a + 1) * (b + 1) <= knn
    return torch.tensor(pairs, dtype=torch.int32, device=device).T.contiguous().unbind(0)


# ---------------------------------- Reading the chosen values ----------------------------------


@ops.reads_table(ops.read_shape)
def memory_read(values: Tensor, indices: Tensor, weights: Tensor, sparse_grad: bool = False) -> Tensor:
    """The weighted sum of the rows each token looks up, differentiable in values and weights.

    values (n_slots, v_dim), indices (n, lookups) int64, weights (n, lookups) of the values' dtype
    -> (n, v_dim).
    sparse_grad: make the gradient of values a sparse tensor of the rows that were read, whose cost does not
    grow with n_slots (off by default, as in F.embedding). With at least half as many lookups as slots, the
    kernels return a dense one anyway. Raises ValueError for shapes that don't fit.
    """
    return embedding_bag(values, indices, weights)


def embedding_bag(table, indices, weights):
    """out[t] = sum over l of weights[t, l] * table[indices[t, l]]: (n_rows, dim), (n, lookups) -> (n, dim)"""
    if use_kernels(table):
        return kernels.embedding_bag(table, indices, weights)
    return F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")


class MemoryTable(nn.Module):
    """The values of a memory: n_slots rows of v_dim numbers. Raises ValueError for a size below 1.

    indices (n, lookups) int64, weights (n, lookups) -> (n, v_dim); see memory_read.

    Train it with nanomem.optim.build_optimizer, whose update touches only the rows that were read. With
    sparse_grad=False the gradient is dense: any optimizer takes it, at a cost that grows with n_slots.
    """

    def __init__(self, n_slots: int, v_dim: int, sparse_grad: bool = True, dtype: torch.dtype | None = None):
        super().__init__()
        ops.check_table(n_slots, v_dim)
        self.n_slots, self.v_dim, self.sparse_grad = n_slots, v_dim, sparse_grad
        self.values = nn.Parameter(torch.empty(n_slots, v_dim, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        """Initialises the values: normal, with a standard deviation of v_dim ** -0.5."""
        ops.draw_rows(self.values, self.v_dim, range(self.v_dim))  # all columns

    @ops.not_compiled  # so that a compiled model has one graph break per memory layer, here
    def forward(self, indices: Tensor, weights: Tensor) -> Tensor:
        return memory_read(self.values, indices, weights.to(self.values.dtype), self.sparse_grad)


# ------------------------------- The gradients: skip them at first ------------------------------
# Of the read, out[t] = sum over l of w[t, l] V[indices[t, l]]:
#     dw[t, l] = <V[indices[t, l]], dout[t]>                     an SDDMM, a sampled dense-dense product
#     dV[i]    = sum over (t, l) with indices[t, l] = i of  w[t, l] dout[t]       a sort, then a segment sum


@memory_read.register_gradient
def read_gradients(grad, values, indices, weights, values_need_it, weights_need_it):
    """dV as its rows (u,) and their gradients (u, v_dim), and dw (n, lookups); None where not needed."""
    if use_kernels(values) and values_need_it and weights_need_it:  # both in one pass
        return kernels.segment_sum(indices, weights, grad, len(values), dot_with=values)
    rows, sums = segment_sum(indices, weights, grad, len(values)) if values_need_it else (None, None)
    grad_weights = sddmm(values, indices, grad) if weights_need_it else None
    return rows, sums, grad_weights


def sddmm(table, indices, x):
    """out[t, l] = <table[indices[t, l]], x[t]>: (n_rows, dim), (n, lookups), (n, dim) -> (n, lookups)"""
    if use_kernels(table):
        return kernels.sddmm(table, indices, x)
    return cpu.sddmm(table, indices, x)


def segment_sum(indices, weights, x, n_rows):
    """sums[i] = sum over (t, l) with indices[t, l] == rows[i] of weights[t, l] * x[t].

    indices (n, lookups) below n_rows, weights (n, lookups), x (n, dim)
    -> rows (u,) that occur, sums (u, dim). The kernels may add rows that don't occur, whose sums are 0.
    """
    if use_kernels(x):
        return kernels.segment_sum(indices, weights, x, n_rows)[:2]
    # Sort by row, then sum each row's segment in order: without atomics, results are reproducible.
    rows, order = torch.sort(indices.flatten().to(ops.narrowest_integer(n_rows)), stable=True)
    rows, counts = torch.unique_consecutive(rows, return_counts=True)        # one segment per row
    starts = counts.cumsum(0) - counts
    tokens = torch.arange(len(x), device=x.device).repeat_interleave(indices.shape[1]).index_select(0, order)
    weights = weights.flatten().index_select(0, order)
    # Here x is the table: bag i sums the x of the tokens that read rows[i].
    sums = F.embedding_bag(tokens, x, offsets=starts, per_sample_weights=weights, mode="sum")
    return rows.long(), sums


@product_key_topk.register_gradient
def search_gradient(
        grad_scores: Tensor, queries: Tensor, keys: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """dq[t, h, p] = sum over l of dscores[t, h, l] keys[h, p, c(t, h, p, l)] and
    dkeys[h, p, i] = sum over (t, l) with c(t, h, p, l) = i of dscores[t, h, l] q[t, h, p],
    for token t, head h and half p, where c is the number of the half key in the l-th slot chosen.

    These are an embedding bag and a segment sum, as in the read and its gradient, with the half keys as the
    table.
    """
    (n, heads, _, half_dim), n_keys, knn = queries.shape, keys.shape[2], grad_scores.shape[-1]
    chosen = torch.stack([slots // n_keys, slots % n_keys], dim=2)           # (n, heads, 2, knn)
    # All half keys are rows of one table: key i of head h and half p is row (2 h + p) n_keys + i.
    start = torch.arange(heads * 2, device=keys.device).view(heads, 2, 1) * n_keys
    rows = (chosen + start).view(n * heads * 2, knn)
    weights = grad_scores.to(keys.dtype).unsqueeze(2).expand(n, heads, 2, knn).reshape(rows.shape)
    grad_queries = embedding_bag(keys.reshape(-1, half_dim), rows, weights).view(queries.shape)
    if use_kernels(keys):
        return grad_queries, key_gradient(chosen, grad_scores, queries, keys)
    used, sums = segment_sum(rows, weights, queries.reshape(-1, half_dim), heads * 2 * n_keys)
    grad_keys = keys.new_zeros(heads * 2 * n_keys, half_dim).index_copy_(0, used, sums)
    return grad_queries, grad_keys.view(keys.shape)


def key_gradient(chosen, grad_scores, queries, keys):
    """dkeys on a GPU, as matrix products: multiplying mostly zeros there is faster than sorting.

    dkeys[h, p] = W[h, p]^T q[:, h, p]. Row t of W[h, p] (n, n_keys) is zero except at the half keys that
    token t chose, chosen (n, heads, 2, knn), where it holds their dscores.
    """
    total = torch.zeros_like(keys, dtype=torch.float32).flatten(0, 1)
    size = ops.tokens_at_once(keys)
    for half_keys, grad, q in zip(chosen.split(size), grad_scores.split(size), queries.split(size)):
        matrix = kernels.spread_weights(half_keys, grad, keys.shape[2], keys.dtype)  # (heads, 2, n, n_keys)
        q = q.flatten(1, 2).transpose(0, 1)                                      # (heads * 2, n, k_dim / 2)
        total += ops.bmm_float32(matrix.flatten(0, 1).transpose(1, 2), q)
    return total.view(keys.shape).to(keys.dtype)
