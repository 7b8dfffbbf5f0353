"""
The memory layer's Triton kernels, for GPUs. Loaded as `nanomem.kernels`; nanomem/memory.py has the same in
plain PyTorch.

    merge_halves            the k best slots of each token and head, from the scores of its half keys
    embedding_bag        the weighted sum of the rows each token looks up
    sddmm        the gradient of the weights
    segment_sum       the gradient of the rows: lookups sorted by row, then embedding_bag once more
    key_gradient      the gradient of the half keys
    row_adam          the update of the rows read

`merge_halves` and `key_gradient` are bound by instructions. The others move far more bytes than they do
arithmetic, so each says how many: that over the card's bandwidth is the time to aim at. `python -m
nanomem.bench --device=cuda` measures the share of it that is reached. Sums are accumulated in float32, in
an order that depends on the input alone: no atomics, the same result every time.

Sizes: n tokens, h heads, k slots a head, L = h * k lookups a token, u rows read by any of them, d = v_dim,
e bytes a number.
"""

import functools
import math

import torch
import triton
import triton.language as tl


def _on_its_device(launcher):
    """Triton launches on the current GPU; this makes it that of the launcher's first tensor."""

    @functools.wraps(launcher)
    def call(x, *args, **options):
        with torch.cuda.device_of(x):
            return launcher(x, *args, **options)

    return call


def _tile(dim):
    """(rows, columns, warps) of the tile that a program reads at once: 16 bytes a thread and several loads
    in flight.
    """
    columns = min(triton.next_power_of_2(dim), 2048)
    return max(2, min(8, 4096 // columns)), columns, max(1, min(8, columns // 256))


# ------------------------------------------------------------------------------------------------
# Choosing slots
#
# A score and where it came from are packed into one int64 that sorts like the score, so that a plain top-k
# of integers finds both. Ties are broken the same way every time.


@triton.jit
def _pack(score, index):
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards as integers: flip them
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _score(packed):
    bits = (packed >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index(packed):
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _best_half(half_scores, tokens, n, n_keys, GROUP: tl.constexpr, N_GROUPS: tl.constexpr, K: tl.constexpr):
    """The K best of each token's n_keys half scores, packed: (BLOCK, K).

    Sorting networks are the kernel's cost, so they see few numbers: the K groups with the largest maxima
    hold the K largest scores, and only their members are sorted, K * GROUP in place of n_keys. (Group g has
    the members g, g + n_groups, g + 2 * n_groups ...: its maximum is one of whole rows, and those loads are
    contiguous.)
    """
    NONE: tl.constexpr = -(2**63)  # sorts below every score, NaN too
    row = half_scores + tokens[:, None].to(tl.int64) * n_keys
    there = tokens[:, None] < n
    n_groups = tl.cdiv(n_keys, GROUP)
    group = tl.arange(0, N_GROUPS)[None, :]
    largest = tl.full((tokens.shape[0], N_GROUPS), -float("inf"), tl.float32)
    for j in tl.static_range(GROUP):
        key = group + j * n_groups
        largest = tl.maximum(
            largest, tl.load(row + key, there & (group < n_groups) & (key < n_keys), other=-float("inf"))
        )
    best = tl.topk(tl.where(group < n_groups, _pack(largest, group), NONE), K)
    if GROUP > 1:
        members = _index(best)[:, :, None] + (tl.arange(0, GROUP) * n_groups)[None, None, :]
        members = tl.reshape(members, (tokens.shape[0], K * GROUP))
        scores = tl.load(row + members, there & (members < n_keys), other=-float("inf"))
        best = tl.topk(tl.where(members < n_keys, _pack(scores, members), NONE), K)
    return best


@triton.jit
def _merge_halves_kernel(
    half_scores,
    pair_a,
    pair_b,
    scores,
    slots,
    n,
    n_keys,
    knn,
    n_pairs,
    GROUP: tl.constexpr,
    N_GROUPS: tl.constexpr,
    K: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """half_scores (h, 2, n, n_keys) float32; pair_a, pair_b (n_pairs,) int32, the ranks (a, b) that can be
    among the best sums. Writes scores (n, h, knn) float32, from high to low, and slots (n, h, knn) int64.

    A program does BLOCK tokens of one head, both halves and their sums: what lies between, k * k candidates
    at worst, is never written. Reads 4 * n_keys * 2 bytes a token and head, and those of the chosen groups
    again, from cache.
    """
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    first = _best_half(half_scores + head * 2 * n * n_keys, tokens, n, n_keys, GROUP, N_GROUPS, K)
    second = _best_half(half_scores + (head * 2 + 1) * n * n_keys, tokens, n, n_keys, GROUP, N_GROUPS, K)

    pair = tl.arange(0, PAIRS)[None, :] + tl.zeros((BLOCK, PAIRS), tl.int32)
    a = tl.load(pair_a + pair, pair < n_pairs, other=0)
    b = tl.load(pair_b + pair, pair < n_pairs, other=0)
    sums = tl.gather(_score(first), a, 1) + tl.gather(_score(second), b, 1)
    best = tl.topk(tl.where(pair < n_pairs, _pack(sums, pair), -(2**63)), K)

    chosen = tl.minimum(_index(best), n_pairs - 1)  # lanes past knn may hold no pair
    first = tl.gather(_index(first), tl.load(pair_a + chosen), 1)
    second = tl.gather(_index(second), tl.load(pair_b + chosen), 1)
    rank = tl.arange(0, K)[None, :]
    place = (tokens[:, None].to(tl.int64) * tl.num_programs(1) + head) * knn + rank
    mask = (tokens[:, None] < n) & (rank < knn)
    tl.store(scores + place, _score(best), mask)
    tl.store(slots + place, first.to(tl.int64) * n_keys + second, mask)


def _merge_halves_sizes(n, n_keys, knn, n_pairs):
    """The kernel's tile sizes. Groups are as large as leaves at least twice as many as are chosen."""
    K = triton.next_power_of_2(knn)
    group = next((g for g in (8, 4, 2) if n_keys // g >= 2 * K), 1)
    n_groups, pairs = (
        max(K, triton.next_power_of_2(triton.cdiv(n_keys, group))),
        max(K, triton.next_power_of_2(n_pairs)),
    )
    # 16 packed numbers a thread leave registers for many warps; a warp to itself sorts without barriers.
    widest = max(n_groups, K * group, pairs)
    block = min(max(1, 512 // widest), triton.next_power_of_2(n))
    return dict(
        GROUP=group,
        N_GROUPS=n_groups,
        K=K,
        PAIRS=pairs,
        BLOCK=block,
        num_warps=min(8, max(1, widest // 1024)),
    )


@_on_its_device
def merge_halves(half_scores, knn, pairs):
    """The knn best sums of a first and a second half score.

    half_scores (heads, 2, n, n_keys) float32; pairs: (a, b), two (n_pairs,) int32 tensors from
    memory.candidate_pairs -> scores (n, heads, knn) float32, from high to low, and the slots they are of,
    int64
    """
    heads, _, n, n_keys = half_scores.shape
    a, b = pairs
    scores = half_scores.new_empty(n, heads, knn)
    slots = torch.empty(n, heads, knn, dtype=torch.int64, device=half_scores.device)
    if scores.numel():
        sizes = _merge_halves_sizes(n, n_keys, knn, len(a))
        _merge_halves_kernel[triton.cdiv(n, sizes["BLOCK"]), heads](
            half_scores.contiguous(), a, b, scores, slots, n, n_keys, knn, len(a), **sizes)
    return scores, slots


# ------------------------------------------------------------------------------------------------
# Reading rows


@triton.jit
def _embedding_bag_kernel(
    table,
    rows,
    weights,
    starts,
    ends,
    out,
    out_rows,
    values,
    slots,
    dots,
    dim,
    LOOKUPS: tl.constexpr,
    PLACED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """out[o] = sum over the lookups i of a bag of weights[i] * table[rows[i]], for each bag.

    table (n_rows, d); rows, weights (m,). A bag has the lookups from starts[bag] to ends[bag], or LOOKUPS
    of them, bag after bag, if that is not 0. o is the bag's number, or out_rows[bag] if PLACED. DOT: also
    dots[i] = <values[slots[bag]], table[rows[i]]>, while the row is at hand.

    A program sums one bag, BLOCK_ROWS rows at a time so that their loads overlap. Bytes: e * d * (m +
    bags), once.
    """
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    if LOOKUPS:
        start = bag * LOOKUPS
        end = start + LOOKUPS
    else:
        start = tl.load(starts + bag)
        end = tl.load(ends + bag)
    if DOT:
        value = tl.load(
            values + tl.load(slots + bag).to(tl.int64) * dim + column, column < dim, other=0.0
        ).to(tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for i in range(start, end, BLOCK_ROWS):
        lookup = i + tl.arange(0, BLOCK_ROWS)
        row = tl.load(rows + lookup, lookup < end, other=0).to(
            tl.int64
        )  # past 2**31 numbers a 32-bit address would wrap
        weight = tl.load(weights + lookup, lookup < end, other=0.0).to(tl.float32)
        mask = (lookup < end)[:, None] & (column < dim)[None, :]
        x = tl.load(table + row[:, None] * dim + column[None, :], mask, other=0.0).to(tl.float32)
        total += weight[:, None] * x
        if DOT:
            tl.store(dots + lookup, tl.sum(x * value[None, :], axis=1), lookup < end)
    place = tl.load(out_rows + bag).to(tl.int64) if PLACED else bag
    tl.store(out + place * dim + column, tl.sum(total, axis=0), column < dim)


def _embedding_bag(
    table,
    rows,
    weights,
    out,
    n_bags,
    lookups=0,
    bags=(None, None),
    out_rows=None,
    dot_with=(None, None, None),
):
    """Launches the kernel: bags (starts, ends), dot_with (values, slots, dots)."""
    dim = table.shape[1]
    block_rows, block_dim, warps = _tile(dim)
    if n_bags and dim:
        _embedding_bag_kernel[n_bags, triton.cdiv(dim, block_dim)](
            table,
            rows,
            weights,
            *bags,
            out,
            out_rows,
            *dot_with,
            dim,
            LOOKUPS=lookups,
            PLACED=out_rows is not None,
            DOT=dot_with[0] is not None,
            BLOCK_ROWS=block_rows,
            BLOCK_DIM=block_dim,
            num_warps=warps,
        )
    return out


@_on_its_device
def embedding_bag(table, rows, weights):
    """out[t] = sum over l of weights[t, l] * table[rows[t, l]].

    table (n_rows, d), rows (n, L) integers, weights (n, L) -> (n, d) of the table's dtype
    """
    n, lookups = rows.shape
    out = table.new_empty(n, table.shape[1])
    return _embedding_bag(table.contiguous(), rows.contiguous(), weights.contiguous(), out, n, lookups)


@triton.jit
def _sddmm_kernel(table, rows, x, out, dim, lookups, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """out[t, l] = <table[rows[t, l]], x[t]>: table (n_rows, d), rows and out (n, lookups), x (n, d).

    A program does one token. Bytes: e * d * (n * L + n).
    """
    token = tl.program_id(0).to(tl.int64)
    for i in range(0, lookups, BLOCK_ROWS):
        lookup = i + tl.arange(0, BLOCK_ROWS)
        row = tl.load(rows + token * lookups + lookup, lookup < lookups, other=0).to(tl.int64)
        total = tl.zeros((BLOCK_ROWS,), tl.float32)
        for c in range(0, dim, BLOCK_DIM):
            column = c + tl.arange(0, BLOCK_DIM)
            mask = (lookup < lookups)[:, None] & (column < dim)[None, :]
            value = tl.load(table + row[:, None] * dim + column[None, :], mask, other=0.0).to(tl.float32)
            grad = tl.load(x + token * dim + column, column < dim, other=0.0).to(tl.float32)
            total += tl.sum(value * grad[None, :], axis=1)
        tl.store(out + token * lookups + lookup, total, lookup < lookups)


@_on_its_device
def sddmm(table, rows, x):
    """out[t, l] = <table[rows[t, l]], x[t]>.

    table (n_rows, d), rows (n, L) integers, x (n, d) -> (n, L) of x's dtype
    """
    n, lookups = rows.shape
    out = x.new_empty(n, lookups)
    block_rows, block_dim, warps = _tile(table.shape[1])
    if out.numel():
        _sddmm_kernel[n,](table.contiguous(), rows.contiguous(), x.contiguous(), out, table.shape[1], lookups,
                               BLOCK_ROWS=block_rows, BLOCK_DIM=block_dim, num_warps=warps)
    return out


# ------------------------------------------------------------------------------------------------
# Writing rows


def _pieces(key):
    """Cuts sorted row numbers (m,) into pieces of one row and at most sqrt(m) lookups.

    -> starts and ends (pieces,) int64, and whether a piece is its row's first. Waits for the GPU to count
    them.
    """
    m = len(key)
    is_first = torch.ones(m, dtype=torch.bool, device=key.device)
    is_first[1:] = key[1:] != key[:-1]
    place_in_row = torch.arange(m, device=key.device) - is_first.nonzero().squeeze(1)[is_first.cumsum(0) - 1]
    starts = (place_in_row % math.ceil(m**0.5) == 0).nonzero().squeeze(1)
    return starts, torch.cat([starts[1:], starts.new_full((1,), m)]), is_first[starts]


@_on_its_device
def segment_sum(rows, weights, x, n_rows, dot_with=None):
    """sums[i] = sum over all (t, l) with rows[t, l] == unique[i] of weights[t, l] * x[t].

    rows (n, L) int64 below n_rows, weights (n, L), x (n, d); dot_with: a table (n_rows, d) -> unique (u,)
    int64 ascending, sums (u, d) of x's dtype, and dots (n, L) = <dot_with[rows[t, l]], x[t]>, None without

    Once the lookups are sorted by row, a row's sum is a bag of tokens. Rows with more than sqrt(n * L)
    lookups are cut into pieces of that many, so that no program does more however few rows take most
    lookups; another launch adds the pieces up. With dot_with, the gradients of values and of weights share
    a pass, in which a value is read once a row, not once a lookup. Bytes: e * d * (n * L + 2 * u), of which
    x's n * L rows come from the L2 cache as far as it holds x.
    """
    n, lookups = rows.shape
    m = n * lookups
    if m == 0:
        return (
            rows.new_empty(0),
            x.new_empty(0, x.shape[1]),
            x.new_empty(n, lookups) if dot_with is not None else None,
        )
    if (
        dot_with is not None and _tile(x.shape[1])[1] < x.shape[1]
    ):  # too wide for a program to see the whole row
        return *segment_sum(rows, weights, x, n_rows)[:2], sddmm(dot_with, rows, x)

    key, order = torch.sort(rows.flatten().to(torch.int32 if n_rows <= 2**31 else torch.int64), stable=True)
    tokens, weights, x = order // lookups, weights.flatten()[order], x.contiguous()
    starts, ends, begins = _pieces(key)
    slots, number = key[starts], begins.cumsum(0) - 1  # a piece's row, and the place of that in `unique`
    unique = slots[begins].long()
    alone = begins & torch.cat([begins[1:], begins.new_ones(1)])  # a piece that is the whole row
    sums, dots = x.new_empty(len(unique), x.shape[1]), x.new_empty(m) if dot_with is not None else None

    def sum_pieces(chosen, out, out_rows=None):
        dot = (None, None, None) if dot_with is None else (dot_with.contiguous(), slots[chosen], dots)
        _embedding_bag(
            x,
            tokens,
            weights,
            out,
            len(chosen),
            bags=(starts[chosen], ends[chosen]),
            out_rows=out_rows,
            dot_with=dot,
        )

    whole = alone.nonzero().squeeze(1)
    sum_pieces(whole, sums, out_rows=number[whole])
    if len(whole) < len(starts):
        cut = (~alone).nonzero().squeeze(1)
        pieces = x.new_empty(len(cut), x.shape[1], dtype=torch.float32)
        sum_pieces(cut, pieces)
        first_piece = begins[cut].nonzero().squeeze(1)
        bags = first_piece, torch.cat([first_piece[1:], first_piece.new_full((1,), len(cut))])
        ones = torch.ones(len(cut), device=x.device)
        _embedding_bag(
            pieces,
            torch.arange(len(cut), device=x.device),
            ones,
            sums,
            len(first_piece),
            bags=bags,
            out_rows=number[cut][first_piece],
        )
    if dots is not None:
        dots = torch.empty_like(dots).index_copy_(0, order, dots).view(n, lookups)  # back from sorted order
    return unique, sums, dots


@triton.jit
def _key_gradient_kernel(
    half_indices,
    grad,
    queries,
    out,
    n,
    n_keys,
    half,
    knn,
    n_split,
    BLOCK_N: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[s, h, c, i] = sum over tokens t of part s, and ranks r with half_indices[t, h, c, r] == i, of
    grad[t, h, r] * queries[t, h, c].

    half_indices (n, heads, 2, knn) integers, grad (n, heads, knn), queries (n, heads, 2, half), out (parts,
    heads, 2, n_keys, half).

    With few keys and very many lookups of each, sorting would cost more than multiplying: a program lays
    the weights of BLOCK_N tokens out as a matrix (BLOCK_N, BLOCK_KEYS), mostly zeros, made of comparisons
    in registers, and has the tensor cores multiply it with their queries: in tf32, which holds 16-bit
    queries exactly and rounds the weights to 11 bits, or three times for float32's digits.
    """
    key = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    head_half, n_head_halves, n_blocks = tl.program_id(1), tl.num_programs(1), tl.cdiv(half, BLOCK_HALF)
    part = tl.program_id(2) // n_blocks
    column = tl.program_id(2) % n_blocks * BLOCK_HALF + tl.arange(0, BLOCK_HALF)
    total = tl.zeros((BLOCK_KEYS, BLOCK_HALF), tl.float32)
    end = tl.minimum(n, (part + 1) * n_split)
    for start in range(part * n_split, end, BLOCK_N):
        token = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        chosen = half_indices + (token * n_head_halves + head_half) * knn
        weight = grad + (token * (n_head_halves // 2) + head_half // 2) * knn
        matrix = tl.zeros((BLOCK_N, BLOCK_KEYS), tl.float32)
        for r in range(knn):
            index = tl.load(chosen + r, token < end, other=-1)
            w = tl.load(weight + r, token < end, other=0.0).to(tl.float32)
            matrix += tl.where(index[:, None] == key[None, :], w[:, None], 0.0)
        mask = (token < end)[:, None] & (column < half)[None, :]
        query = tl.load(
            queries + ((token * n_head_halves + head_half) * half)[:, None] + column[None, :], mask, other=0.0
        )
        total = tl.dot(tl.trans(matrix), query.to(tl.float32), total, input_precision=PRECISION)
    place = (part * n_head_halves + head_half).to(tl.int64) * n_keys + key
    tl.store(
        out + place[:, None] * half + column[None, :],
        total,
        (key < n_keys)[:, None] & (column < half)[None, :],
    )


@_on_its_device
def key_gradient(half_indices, grad, queries, n_keys):
    """The gradient of the half keys: each key sums the queries that chose it, weighted by the score's
    gradient.

    half_indices (n, heads, 2, knn) integers, grad (n, heads, knn), queries (n, heads, 2, k_dim / 2)
    -> (heads, 2, n_keys, k_dim / 2) of the queries' dtype
    """
    n, heads, _, half = queries.shape
    parts = max(1, min(8, n // 512))  # enough programs to fill a GPU; added up below, in order
    n_split, block_half = -(-n // parts), max(16, min(256, triton.next_power_of_2(half)))
    out = torch.zeros(parts, heads, 2, n_keys, half, dtype=torch.float32, device=queries.device)
    precision = "ieee" if torch.version.hip else "tf32x3" if queries.dtype == torch.float32 else "tf32"
    if n:
        _key_gradient_kernel[triton.cdiv(n_keys, 64), heads * 2, parts * triton.cdiv(half, block_half)](
            half_indices.contiguous(),
            grad.contiguous(),
            queries.contiguous(),
            out,
            n,
            n_keys,
            half,
            half_indices.shape[3],
            n_split,
            BLOCK_N=32,
            BLOCK_KEYS=64,
            BLOCK_HALF=block_half,
            PRECISION=precision,
            num_warps=8 if block_half >= 128 else 4,
        )
    return out.sum(0).to(queries.dtype)


# ------------------------------------------------------------------------------------------------
# Updating rows


@triton.jit
def _mix(x):
    """A hash of 32-bit integers whose every output bit depends on every input bit."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["seed", "first_column"])
def _row_adam_kernel(
    values,
    rows,
    grads,
    second_moment,
    reads,
    mean_square,
    lr,
    beta2,
    log2_beta2,
    eps,
    seed,
    first_column,
    dim,
    STOCHASTIC: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """RowAdam's update (nanomem/optim.py) of row rows[i] by grads[i], i the program: values (n_slots, d),
    rows (u,) int64, grads (u, d), second_moment (n_slots,) float32, reads (n_slots,) int32, mean_square
    (u,) float32 of the gradients' rows, or None to compute it from grads.

    STOCHASTIC: values are bfloat16, and rounded up with the probability that makes the expectation right;
    the noise is a hash of seed, slot, count of reads and column. Bytes: u * (d * (2 * values' e +
    gradients' e) + 24), in one pass (4 u more with mean_square).
    """
    row = tl.load(rows + tl.program_id(0))
    grad_row = grads + tl.program_id(0).to(tl.int64) * dim
    column = tl.arange(0, BLOCK_DIM)
    if mean_square is None:
        squares = tl.zeros((BLOCK_DIM,), tl.float32)
        for c in range(0, dim, BLOCK_DIM):
            g = tl.load(grad_row + c + column, c + column < dim, other=0.0).to(tl.float32)
            squares += g * g
        mean = tl.sum(squares, axis=0) / dim
    else:
        mean = tl.load(mean_square + tl.program_id(0))
    moment = tl.load(second_moment + row)
    has_gradient = tl.where(mean != 0.0, 1, 0)  # a row without one stays as it is
    moment += has_gradient * (1.0 - beta2) * (mean - moment)
    count = tl.load(reads + row) + has_gradient
    factor = lr / (tl.sqrt(moment / (1.0 - tl.exp2(tl.maximum(count, 1).to(tl.float32) * log2_beta2))) + eps)
    tl.store(second_moment + row, moment)
    tl.store(reads + row, count)
    row_seed = _mix(_mix(_mix(count.to(tl.uint32) ^ seed) ^ row.to(tl.uint32)) ^ (row >> 32).to(tl.uint32))
    for c in range(0, dim, BLOCK_DIM):
        mask = c + column < has_gradient * dim
        g = tl.load(grad_row + c + column, mask, other=0.0).to(tl.float32)  # from L1 the second time
        place = values + row * dim + c + column
        new = tl.load(place, mask, other=0.0).to(tl.float32) - factor * g
        if STOCHASTIC:
            noise = _mix(row_seed + (first_column + c + column).to(tl.uint32) * 0x9E3779B9) >> 16
            bits = new.to(tl.uint32, bitcast=True)
            finite = (bits & 0x7F800000) != 0x7F800000
            new = tl.where(finite, bits + noise, bits)  # bfloat16 is the upper half of a float32
            new = (new & 0xFFFF0000).to(tl.float32, bitcast=True)
        tl.store(place, new, mask)


@_on_its_device
def row_adam(
    values, rows, grads, second_moment, reads, lr, beta2, eps, seed, mean_square=None, first_column=0
):
    """Updates values (n_slots, d), second_moment (n_slots,) float32 and reads (n_slots,) int32 in place.

    rows (u,) int64, each once; grads (u, d). bfloat16 values are rounded stochastically. Where values are
    the columns of a table from first_column on, mean_square (u,) float32 is that of the gradient's whole
    rows. Raises ValueError unless values are contiguous.
    """
    if not values.is_contiguous():
        raise ValueError(f"values must be contiguous, got strides {values.stride()}")
    _, block_dim, warps = _tile(values.shape[1])
    if len(rows):
        _row_adam_kernel[len(rows),](
            values,
            rows,
            grads.contiguous(),
            second_moment,
            reads,
            mean_square,
            float(lr),
            beta2,
            math.log2(beta2) if beta2 else -math.inf,
            eps,
            seed,
            first_column,
            values.shape[1],
            STOCHASTIC=values.dtype == torch.bfloat16,
            BLOCK_DIM=block_dim,
            num_warps=warps,
        )
        torch.autograd.graph.increment_version(
            values
        )  # so that a backward pass that wants the old values raises
