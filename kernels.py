"""
The memory layer's Triton kernels, for GPUs. Loaded as `nanomem.kernels`; nanomem/memory.py has the same in
plain PyTorch.

    merge_halves      the k best slots of each token and head, from the scores of its half keys
    embedding_bag     the weighted sum of the rows that each token looks up
    sddmm             the gradient of the weights (SDDMM: a dense product sampled at sparse positions)
    segment_sum       the gradient of the rows: sort the lookups by row, then sum each row's segment
    key_gradient      the gradient of the half keys
    row_adam          the update of the rows that were read

`merge_halves` and `key_gradient` are bound by instructions. The others are bound by memory, so each says how
many bytes it moves: that over the card's bandwidth is the time to aim for. `python -m nanomem.bench
--device=cuda` measures how much of the bandwidth each reaches. Sums are accumulated in float32, in an order
that depends only on the input: there are no atomics, so the result is the same every time.

Sizes: n tokens, h heads, k slots per head, L = h * k lookups per token, u distinct rows read, d = v_dim, e
bytes per number.
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
    """(rows, columns, warps) of the tile that a program reads at a time, for rows of dim numbers.

    16 bytes per thread, and several loads in flight.
    """
    columns = min(triton.next_power_of_2(dim), 2048)
    return max(2, min(8, 4096 // columns)), columns, max(1, min(8, columns // 256))


# ------------------------------------------------------------------------------------------------
# Choosing slots
#
# A score and the place it came from are packed into one int64 that sorts like the score, so an ordinary top-k
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
def _best_half(
        half_scores, tokens, n, n_keys, BUCKET: tl.constexpr, N_BUCKETS: tl.constexpr, K: tl.constexpr):
    """The K best of each token's n_keys half scores, packed: (BLOCK, K).

    Sorting is what the kernel spends its time on, so it sorts as little as possible. The K buckets with the
    largest maxima contain the K largest scores. Only their members are sorted: K * BUCKET instead of n_keys.
    Bucket b has the members b, b + n_buckets, b + 2 * n_buckets ..., so that loads are contiguous.
    """
    NONE: tl.constexpr = -(2**63)  # sorts below every score, even NaN
    row = half_scores + tokens[:, None].to(tl.int64) * n_keys
    is_token = tokens[:, None] < n
    n_buckets = tl.cdiv(n_keys, BUCKET)
    bucket = tl.arange(0, N_BUCKETS)[None, :]
    largest = tl.full((tokens.shape[0], N_BUCKETS), -float("inf"), tl.float32)
    for j in tl.static_range(BUCKET):
        key = bucket + j * n_buckets
        mask = is_token & (bucket < n_buckets) & (key < n_keys)
        largest = tl.maximum(largest, tl.load(row + key, mask, other=-float("inf")))
    best = tl.topk(tl.where(bucket < n_buckets, _pack(largest, bucket), NONE), K)
    if BUCKET > 1:
        members = _index(best)[:, :, None] + (tl.arange(0, BUCKET) * n_buckets)[None, None, :]
        members = tl.reshape(members, (tokens.shape[0], K * BUCKET))
        scores = tl.load(row + members, is_token & (members < n_keys), other=-float("inf"))
        best = tl.topk(tl.where(members < n_keys, _pack(scores, members), NONE), K)
    return best


@triton.jit
def _merge_halves_kernel(
        half_scores, pair_a, pair_b, scores, slots, n, n_keys, knn, n_pairs,
        BUCKET: tl.constexpr, N_BUCKETS: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr,
        BLOCK: tl.constexpr):
    """half_scores (h, 2, n, n_keys) float32; pair_a, pair_b (n_pairs,) int32, the ranks (a, b) whose sums can
    be among the best. Writes scores (n, h, knn) float32, from high to low, and slots (n, h, knn) int64.

    A program does BLOCK tokens of one head: both halves and their sums, so that the candidates never leave
    the chip. Reads 4 * n_keys * 2 bytes per token and head, and the chosen buckets again, from cache.
    """
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    first = _best_half(half_scores + head * 2 * n * n_keys, tokens, n, n_keys, BUCKET, N_BUCKETS, K)
    second = _best_half(half_scores + (head * 2 + 1) * n * n_keys, tokens, n, n_keys, BUCKET, N_BUCKETS, K)

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
    """The kernel's tile sizes. Buckets are as large as possible with at least twice as many as are chosen."""
    K = triton.next_power_of_2(knn)
    bucket = 1
    while bucket < 8 and n_keys // (2 * bucket) >= 2 * K:
        bucket *= 2
    n_buckets = max(K, triton.next_power_of_2(triton.cdiv(n_keys, bucket)))
    pairs = max(K, triton.next_power_of_2(n_pairs))
    # 16 packed numbers per thread leave registers for many warps; a warp by itself sorts without barriers.
    widest = max(n_buckets, K * bucket, pairs)
    block = min(max(1, 512 // widest), triton.next_power_of_2(n))
    warps = min(8, max(1, widest // 1024))
    return dict(BUCKET=bucket, N_BUCKETS=n_buckets, K=K, PAIRS=pairs, BLOCK=block, num_warps=warps)


@_on_its_device
def merge_halves(half_scores, knn, pairs):
    """The knn best sums of a first and a second half score.

    half_scores (heads, 2, n, n_keys) float32; pairs: (a, b), two (n_pairs,) int32 tensors from
    memory.candidate_pairs -> scores (n, heads, knn) float32, from high to low, and their slots, int64
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
def _weights_and_rows(table, rows, weights, lookup, end, column, dim):
    """Of the lookups `lookup` (BLOCK_ROWS,) below end: their weights (BLOCK_ROWS,), and table[rows[lookup],
    column] (BLOCK_ROWS, BLOCK_DIM), both float32.
    """
    weight = tl.load(weights + lookup, lookup < end, other=0.0).to(tl.float32)
    # int64, since a 32-bit address would wrap at 2**31 numbers.
    row = tl.load(rows + lookup, lookup < end, other=0).to(tl.int64)
    mask = (lookup < end)[:, None] & (column < dim)[None, :]
    x = tl.load(table + row[:, None] * dim + column[None, :], mask, other=0.0).to(tl.float32)
    return weight, x


@triton.jit
def _sum_bag(
        table, rows, weights, start, end, column, dim, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """sum over the lookups i from start to end of weights[i] * table[rows[i]]: its columns `column`, float32.

    Takes BLOCK_ROWS rows at a time so that their loads overlap.
    """
    total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for i in range(start, end, BLOCK_ROWS):
        lookup = i + tl.arange(0, BLOCK_ROWS)
        weight, x = _weights_and_rows(table, rows, weights, lookup, end, column, dim)
        total += weight[:, None] * x
    return tl.sum(total, axis=0)


@triton.jit
def _embedding_bag_kernel(
        table, rows, weights, out, dim,
        LOOKUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """out[t] = sum over l of weights[t, l] * table[rows[t, l]]: table (n_rows, d), rows and weights (n, L).

    A program does one token. Bytes: e * d * (n * L + n).
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    start = token * LOOKUPS
    total = _sum_bag(
        table, rows, weights, start, start + LOOKUPS, column, dim, BLOCK_ROWS, BLOCK_DIM)
    tl.store(out + token * dim + column, total, column < dim)


@_on_its_device
def embedding_bag(table, rows, weights):
    """out[t] = sum over l of weights[t, l] * table[rows[t, l]].

    table (n_rows, d), rows (n, L) integers, weights (n, L) -> (n, d) of the table's dtype
    """
    (n, lookups), dim = rows.shape, table.shape[1]
    out = table.new_empty(n, dim)
    block_rows, block_dim, warps = _tile(dim)
    if out.numel():
        _embedding_bag_kernel[n, triton.cdiv(dim, block_dim)](
            table.contiguous(), rows.contiguous(), weights.contiguous(), out, dim,
            LOOKUPS=lookups, BLOCK_ROWS=block_rows, BLOCK_DIM=block_dim, num_warps=warps)
    return out


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
    (n, lookups), dim = rows.shape, table.shape[1]
    out = x.new_empty(n, lookups)
    block_rows, block_dim, warps = _tile(dim)
    if out.numel():
        _sddmm_kernel[n,](
            table.contiguous(), rows.contiguous(), x.contiguous(), out, dim, lookups,
            BLOCK_ROWS=block_rows, BLOCK_DIM=block_dim, num_warps=warps)
    return out


# ------------------------------------------------------------------------------------------------
# Writing rows


@triton.jit
def _segment_sum_kernel(
        x, tokens, weights, starts, ends, places, out, dim,
        BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """out[places[s]] = sum over the lookups i of segment s of weights[i] * x[tokens[i]].

    x (n, d); tokens and weights (m,), sorted by row; segment s has the lookups from starts[s] to ends[s].
    A program does one segment.
    """
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    start, end = tl.load(starts + segment), tl.load(ends + segment)
    total = _sum_bag(x, tokens, weights, start, end, column, dim, BLOCK_ROWS, BLOCK_DIM)
    place = tl.load(places + segment).to(tl.int64)
    tl.store(out + place * dim + column, total, column < dim)


@triton.jit
def _segment_sum_and_dots_kernel(
        x, tokens, weights, starts, ends, places, out, values, slots, dots, dim,
        BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The same, and dots[i] = <values[slots[s]], x[tokens[i]]>, while x[tokens[i]] is at hand.

    values (n_rows, d); slots: each segment's row. A program sees whole rows: BLOCK_DIM >= d.
    """
    segment = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_DIM)
    start, end = tl.load(starts + segment), tl.load(ends + segment)
    slot = tl.load(slots + segment).to(tl.int64)
    value = tl.load(values + slot * dim + column, column < dim, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for i in range(start, end, BLOCK_ROWS):
        lookup = i + tl.arange(0, BLOCK_ROWS)
        weight, grad = _weights_and_rows(x, tokens, weights, lookup, end, column, dim)
        total += weight[:, None] * grad
        tl.store(dots + lookup, tl.sum(grad * value[None, :], axis=1), lookup < end)
    place = tl.load(places + segment).to(tl.int64)
    tl.store(out + place * dim + column, tl.sum(total, axis=0), column < dim)


def _sum_segments(x, tokens, weights, starts, ends, places, out, dots_with=None):
    """Launches one of the two kernels. dots_with: (values, slots, dots)."""
    dim = x.shape[1]
    block_rows, block_dim, warps = _tile(dim)
    tiles = dict(BLOCK_ROWS=block_rows, BLOCK_DIM=block_dim, num_warps=warps)
    arguments = x, tokens, weights, starts, ends, places, out
    if len(starts) == 0 or dim == 0:
        return
    if dots_with is None:
        _segment_sum_kernel[len(starts), triton.cdiv(dim, block_dim)](*arguments, dim, **tiles)
    else:
        _segment_sum_and_dots_kernel[len(starts),](*arguments, *dots_with, dim, **tiles)


def _pieces(key):
    """Cuts sorted row numbers (m,) into pieces of one row and at most sqrt(m) lookups.

    -> starts and ends (pieces,) int64, and whether a piece is its row's first. Waits for the GPU to count
    them.
    """
    m = len(key)
    is_first = torch.ones(m, dtype=torch.bool, device=key.device)
    is_first[1:] = key[1:] != key[:-1]
    first_of_row = is_first.nonzero().squeeze(1)                                   # (u,)
    place_in_row = torch.arange(m, device=key.device) - first_of_row[is_first.cumsum(0) - 1]
    starts = (place_in_row % math.ceil(m**0.5) == 0).nonzero().squeeze(1)
    return starts, _ends(starts, m), is_first[starts]


def _ends(starts, end):
    """Where segments that begin at `starts` end, the last one at `end`."""
    return torch.cat([starts[1:], starts.new_full((1,), end)])


@_on_its_device
def segment_sum(rows, weights, x, n_rows, dot_with=None):
    """sums[i] = sum over all (t, l) with rows[t, l] == unique[i] of weights[t, l] * x[t].

    rows (n, L) int64 below n_rows, weights (n, L), x (n, d); dot_with: a table (n_rows, d), or None
    -> unique (u,) int64 ascending, sums (u, d) of x's dtype, and dots (n, L) = <dot_with[rows[t, l]], x[t]>,
    or None

    Once the lookups are sorted by row, each row's lookups are a segment. Segments of more than sqrt(n * L)
    lookups are cut into pieces of that many, so that no program does more, however few rows get most of the
    lookups; another launch adds the pieces up. With dot_with, the gradients of values and weights share a
    pass that reads each value once per row instead of once per lookup. Bytes: e * d * (n * L + 2 * u), of
    which x's n * L rows come from the L2 cache if it holds x.
    """
    (n, lookups), dim = rows.shape, x.shape[1]
    m = n * lookups
    if m == 0:
        no_dots = None if dot_with is None else x.new_empty(n, lookups)
        return rows.new_empty(0), x.new_empty(0, dim), no_dots
    _, block_dim, _ = _tile(dim)
    if dot_with is not None and block_dim < dim:  # too wide for a program to see whole rows
        unique, sums, _ = segment_sum(rows, weights, x, n_rows)
        return unique, sums, sddmm(dot_with, rows, x)

    narrow = torch.int32 if n_rows <= 2**31 else torch.int64  # sorts faster
    key, order = torch.sort(rows.flatten().to(narrow), stable=True)                # (m,) each
    tokens, weights, x = order // lookups, weights.flatten()[order], x.contiguous()
    starts, ends, is_first = _pieces(key)                                          # (pieces,) each
    slots, places = key[starts], is_first.cumsum(0) - 1  # each piece's row, and the place of that in `unique`
    unique = slots[is_first].long()                                                # (u,)
    sums = x.new_empty(len(unique), dim)
    dots = None if dot_with is None else x.new_empty(m)

    def sum_pieces(pieces, out_places, out):
        dots_with = None if dot_with is None else (dot_with.contiguous(), slots[pieces], dots)
        _sum_segments(x, tokens, weights, starts[pieces], ends[pieces], out_places, out, dots_with)

    is_last = torch.cat([is_first[1:], is_first.new_ones(1)])
    is_whole = is_first & is_last  # a piece that is its whole row
    whole, cut = is_whole.nonzero().squeeze(1), (~is_whole).nonzero().squeeze(1)
    sum_pieces(whole, places[whole], sums)
    if len(cut):
        numbers = torch.arange(len(cut), device=x.device)
        parts = x.new_empty(len(cut), dim, dtype=torch.float32)
        sum_pieces(cut, numbers, parts)
        firsts = is_first[cut].nonzero().squeeze(1)
        ones = torch.ones(len(cut), device=x.device)
        _sum_segments(parts, numbers, ones, firsts, _ends(firsts, len(cut)), places[cut][firsts], sums)
    if dots is not None:
        dots = torch.empty_like(dots).index_copy_(0, order, dots).view(n, lookups)  # back from sorted order
    return unique, sums, dots


@triton.jit
def _key_gradient_kernel(
        half_indices, grad, queries, out, n, n_keys, half_dim, knn, tokens_per_part,
        BLOCK_N: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr, PRECISION: tl.constexpr):
    """out[p, h, c, i] = sum of grad[t, h, r] * queries[t, h, c] over the tokens t of part p and the ranks r
    with half_indices[t, h, c, r] == i.

    half_indices (n, heads, 2, knn) integers, grad (n, heads, knn), queries (n, heads, 2, half_dim), out
    (parts, heads, 2, n_keys, half_dim).

    There are few keys, each with very many lookups, so sorting would cost more than multiplying. A program
    lays out the weights of BLOCK_N tokens as a matrix (BLOCK_N, BLOCK_KEYS), mostly zeros, made in registers
    by comparison, and multiplies it with their queries on the tensor cores: in tf32, which holds 16-bit
    queries exactly and rounds the weights to 11 bits, or three times for the digits of float32.
    """
    key = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    head_half, n_head_halves, n_blocks = tl.program_id(1), tl.num_programs(1), tl.cdiv(half_dim, BLOCK_DIM)
    part = tl.program_id(2) // n_blocks
    column = tl.program_id(2) % n_blocks * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    total = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)
    end = tl.minimum(n, (part + 1) * tokens_per_part)
    for start in range(part * tokens_per_part, end, BLOCK_N):
        token = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        chosen = half_indices + (token * n_head_halves + head_half) * knn
        weight = grad + (token * (n_head_halves // 2) + head_half // 2) * knn
        matrix = tl.zeros((BLOCK_N, BLOCK_KEYS), tl.float32)
        for r in range(knn):
            index = tl.load(chosen + r, token < end, other=-1)
            w = tl.load(weight + r, token < end, other=0.0).to(tl.float32)
            matrix += tl.where(index[:, None] == key[None, :], w[:, None], 0.0)
        mask = (token < end)[:, None] & (column < half_dim)[None, :]
        query_row = queries + (token * n_head_halves + head_half) * half_dim
        query = tl.load(query_row[:, None] + column[None, :], mask, other=0.0)
        total = tl.dot(tl.trans(matrix), query.to(tl.float32), total, input_precision=PRECISION)
    place = (part * n_head_halves + head_half).to(tl.int64) * n_keys + key
    mask = (key < n_keys)[:, None] & (column < half_dim)[None, :]
    tl.store(out + place[:, None] * half_dim + column[None, :], total, mask)


@_on_its_device
def key_gradient(half_indices, grad, queries, n_keys):
    """The gradient of the half keys: each key sums the queries that chose it, weighted by the score's
    gradient.

    half_indices (n, heads, 2, knn) integers, grad (n, heads, knn), queries (n, heads, 2, k_dim / 2)
    -> (heads, 2, n_keys, k_dim / 2) of the queries' dtype
    """
    n, heads, _, half_dim = queries.shape
    parts = max(1, min(8, n // 512))  # enough programs to fill a GPU; added up below, in order
    block_dim = max(16, min(256, triton.next_power_of_2(half_dim)))
    out = torch.zeros(parts, heads, 2, n_keys, half_dim, dtype=torch.float32, device=queries.device)
    if torch.version.hip:
        precision = "ieee"
    else:
        precision = "tf32x3" if queries.dtype == torch.float32 else "tf32"
    if n:
        _key_gradient_kernel[triton.cdiv(n_keys, 64), heads * 2, parts * triton.cdiv(half_dim, block_dim)](
            half_indices.contiguous(), grad.contiguous(), queries.contiguous(), out, n, n_keys, half_dim,
            half_indices.shape[3], triton.cdiv(n, parts), BLOCK_N=32, BLOCK_KEYS=64, BLOCK_DIM=block_dim,
            PRECISION=precision, num_warps=8 if block_dim >= 128 else 4)
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
        values, rows, grads, second_moment, reads, mean_square, row_scale, lr, beta2, log2_beta2, eps, seed,
        first_column, dim, STOCHASTIC: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """RowAdam's update (nanomem/optim.py) of the row rows[i] by grads[i], where i is the program.

    values (n_slots, d), rows (u,) int64, grads (u, d), second_moment (n_slots,) float32, reads (n_slots,)
    int32; mean_square (u,) float32 of the gradients' whole rows, or None to compute it from grads; row_scale
    (n_slots,) float32, what to multiply lr by, or None.

    STOCHASTIC: values are bfloat16 and are rounded up or down at random, with the right expectation; the
    noise is a hash of seed, slot, count of reads and column. Bytes, in one pass: u * (d * (2 * values' e +
    gradients' e) + 24), and 4 * u with mean_square.
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
    bias = 1.0 - tl.exp2(tl.maximum(count, 1).to(tl.float32) * log2_beta2)  # 1 - beta2 ** n_r
    factor = lr / (tl.sqrt(moment / bias) + eps)
    if row_scale is not None:
        factor *= tl.load(row_scale + row)
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
            is_finite = (bits & 0x7F800000) != 0x7F800000
            new = tl.where(is_finite, bits + noise, bits)  # bfloat16 is the upper half of a float32
            new = (new & 0xFFFF0000).to(tl.float32, bitcast=True)
        tl.store(place, new, mask)


@_on_its_device
def row_adam(
        values, rows, grads, second_moment, reads, lr, beta2, eps, seed, mean_square=None, first_column=0,
        row_scale=None):
    """Updates values (n_slots, d), second_moment (n_slots,) float32 and reads (n_slots,) int32 in place.

    rows (u,) int64, each once; grads (u, d). bfloat16 values are rounded stochastically. If values are the
    columns of a wider table from first_column on, mean_square (u,) float32 is that of the gradient's whole
    rows. row_scale (n_slots,) float32: what to multiply each row's lr by. Raises ValueError unless values
    are contiguous.
    """
    if not values.is_contiguous():
        raise ValueError(f"values must be contiguous, got strides {values.stride()}")
    _, block_dim, warps = _tile(values.shape[1])
    log2_beta2 = math.log2(beta2) if beta2 else -math.inf
    if len(rows):
        _row_adam_kernel[len(rows),](
            values, rows, grads.contiguous(), second_moment, reads, mean_square, row_scale, float(lr), beta2,
            log2_beta2, eps, seed, first_column, values.shape[1], BLOCK_DIM=block_dim, num_warps=warps,
            STOCHASTIC=values.dtype == torch.bfloat16)
        # A backward pass that needs the old values raises.
        torch.autograd.graph.increment_version(values)
