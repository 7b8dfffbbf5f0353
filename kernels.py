"""
The memory layer's Triton kernels, for GPUs. Loaded as `nanomem.kernels`; nanomem/memory.py has the same in
plain PyTorch.

    merge_halves      the k best slots of each token and head, from the scores of its half keys
    embedding_bag     the weighted sum of the rows that each token looks up
    sddmm             the gradient of the weights (SDDMM: a dense product sampled at sparse positions)
    segment_sum       the gradient of the rows: sort the lookups by row, then sum each row's segment
    spread_weights    the matrix whose product with the queries is the gradient of the half keys
    row_adam          the update of the rows that were read

`merge_halves` is bound by instructions. The others are bound by memory, so each says how many bytes it moves:
that over the card's bandwidth is the time to aim for. `python -m nanomem.bench --device=cuda` measures how
much of the bandwidth each reaches. Sums are accumulated in float32, in an order that depends only on the
input: there are no atomics, so the result is the same every time. No launcher waits for the GPU.

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


WIDEST = 8192  # numbers in the widest rows that a program sees at once


def _tile(dim, widest=2048):
    """(rows, columns, warps) of the tile that a program reads at a time, for rows of dim numbers.

    16 bytes per thread, and several loads in flight.
    """
    columns = min(triton.next_power_of_2(dim), widest)
    return max(2, min(8, 4096 // columns)), columns, max(1, min(widest // 256, columns // 256))


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
    # 16 packed numbers per thread leave registers for many warps, and so do 8 buckets, whose members are all
    # loaded at once. A warp by itself sorts without barriers.
    widest = max(n_buckets, K * bucket, pairs)
    block = min(max(1, 512 // widest), max(1, 256 // n_buckets), triton.next_power_of_2(n))
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
        x, order, weights, starts, owners, out, parts, values, rows, dots, dim, n_blocks,
        LOOKUPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """out[s] = sum over the lookups i of segment s of weights[i] * x[i // LOOKUPS].

    x (n, d), weights (m,), out (segments, d). Sorted by row, lookup order[j] is the j-th, and segment s
    has those from j = starts[s] to starts[s + 1]; it may be empty. With values (n_slots, d), also
    dots[i] = <values[rows[s]], x[i // LOOKUPS]>, for which a program must see whole rows: BLOCK_DIM >= d.

    The sorted lookups form n_blocks blocks of BLOCK. A segment that runs past its block's end is cut there:
    its beginning goes to parts[0, b], where block b is the next one, and what lies in block b to
    parts[1, b]; parts (2, n_blocks, d) float32. Block b begins within segment owners[b]. The first n_blocks
    programs do the rest of the segments cut, since these can be the longest, and the others a segment each.
    """
    block = tl.program_id(0)
    segment = block - n_blocks
    is_rest = block < n_blocks
    if is_rest:
        segment = tl.load(owners + block)
    start, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    if is_rest:
        end = tl.where(start < block * BLOCK, end, start)  # nothing is left of a segment that begins here
        start = block * BLOCK
    else:
        block = start // BLOCK + 1
    is_cut = is_rest | (end > block * BLOCK)
    end = tl.minimum(end, (block + is_rest.to(tl.int32)) * BLOCK)

    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    if values is not None:
        row = tl.load(rows + segment)
        width = tl.where(start < end, dim, 0)  # of an empty segment, no value is read
        value = tl.load(values + row * dim + column, column < width, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for j in range(start, end, BLOCK_ROWS):
        place = j + tl.arange(0, BLOCK_ROWS)
        lookup = tl.load(order + place, place < end, other=0).to(tl.int32)
        weight = tl.load(weights + lookup, place < end, other=0.0).to(tl.float32)
        mask = (place < end)[:, None] & (column < dim)[None, :]
        at = (lookup // LOOKUPS).to(tl.int64)[:, None] * dim + column[None, :]
        grad = tl.load(x + at, mask, other=0.0).to(tl.float32)
        total += weight[:, None] * grad
        if values is not None:
            tl.store(dots + lookup, tl.sum(grad * value[None, :], axis=1), place < end)
    total = tl.sum(total, axis=0)
    if is_cut:
        part = (is_rest.to(tl.int32) * n_blocks + block).to(tl.int64)
        tl.store(parts + part * dim + column, total, column < dim)
    else:
        tl.store(out + segment.to(tl.int64) * dim + column, total, column < dim)


@triton.jit
def _join_parts_kernel(
        parts, starts, owners, out, dim, n_blocks, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Adds up the parts of the segment that begins in the block before this program's and is cut there."""
    block = tl.program_id(0)
    segment = tl.load(owners + block)
    start, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    if (start < block * BLOCK) & (start >= (block - 1) * BLOCK):
        column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
        total = tl.load(parts + block.to(tl.int64) * dim + column, column < dim, other=0.0)
        for b in range(block, (end - 1) // BLOCK + 1):
            part = parts + (n_blocks + b).to(tl.int64) * dim
            total += tl.load(part + column, column < dim, other=0.0)
        tl.store(out + segment.to(tl.int64) * dim + column, total, column < dim)


def _segments(key, n_rows):
    """The rows to make a gradient for, and where each begins in the sorted row numbers key (m,).

    -> rows (s,) int64, ascending and distinct; starts (s + 1,) int32

    How many rows were read is known on the GPU only, and asking it would mean waiting for it. So s does not
    depend on that: it is n_rows, or m if that is less than half of them. Row r, the i-th of u rows read, then
    has place min(r, m - u + i): to make up the number, the first rows are all there, read or not.
    """
    m = len(key)
    rows = torch.arange(n_rows if 2 * m >= n_rows else m, device=key.device)
    if len(rows) < n_rows:
        number = torch.nn.functional.pad((key[1:] != key[:-1]).cumsum(0), (1, 0))  # (m,), i of each lookup
        rows[torch.minimum(key, m - 1 - number[-1] + number)] = key.long()
    ends = torch.nn.functional.pad(rows, (0, 1), value=n_rows)                     # (s + 1,)
    return rows, torch.searchsorted(key, ends.to(key.dtype), out_int32=True)


@_on_its_device
def segment_sum(rows, weights, x, n_rows, dot_with=None):
    """sums[i] = sum over all (t, l) with rows[t, l] == unique[i] of weights[t, l] * x[t].

    rows (n, L) int64 below n_rows, weights (n, L), x (n, d); dot_with: a table (n_rows, d), or None
    -> unique (s,) int64 ascending, sums (s, d) of x's dtype, and dots (n, L) = <dot_with[rows[t, l]], x[t]>,
    or None. Besides the u rows read there can be others, whose sums are 0: see _segments.

    Once the lookups are sorted by row, each row's lookups are a segment. Segments are cut at every multiple
    of about sqrt(n * L) lookups, so that no program does more, however few rows get most of the lookups;
    another launch adds the parts up. With dot_with, the gradients of values and weights share a pass that
    reads each value once per row instead of once per lookup. Bytes: e * d * (n * L + u + s), of which x's
    n * L rows come from the L2 cache if it holds x. Raises ValueError for 2**30 lookups or more.
    """
    (n, lookups), dim = rows.shape, x.shape[1]
    m = n * lookups
    if m >= 2**30:  # the kernels count lookups in int32
        raise ValueError(f"expected fewer than 2**30 = {2**30:,} lookups, got {m:,}")
    if m == 0:
        no_dots = None if dot_with is None else x.new_empty(n, lookups)
        return rows.new_empty(0), x.new_empty(0, dim), no_dots
    if dot_with is not None and dim > WIDEST:  # too wide for a program to see whole rows
        unique, sums, _ = segment_sum(rows, weights, x, n_rows)
        return unique, sums, sddmm(dot_with, rows, x)

    narrow = torch.int32 if n_rows < 2**31 else torch.int64  # sorts faster
    key, order = torch.sort(rows.flatten().to(narrow), stable=True)                # (m,) each
    unique, starts = _segments(key, n_rows)                                        # (s,), (s + 1,)
    block = triton.next_power_of_2(math.isqrt(m))  # of lookups; to divide by it is to shift
    begins = torch.arange(0, m, block, dtype=torch.int32, device=x.device)         # (n_blocks,)
    n_blocks = len(begins)
    owners = torch.searchsorted(starts, begins, right=True, out_int32=True) - 1
    parts = x.new_empty(2, n_blocks, dim, dtype=torch.float32)
    sums = x.new_empty(len(unique), dim)
    values = dots = None
    if dot_with is not None:
        values, dots = dot_with.contiguous(), x.new_empty(n, lookups)
    block_rows, block_dim, warps = _tile(dim, 2048 if dot_with is None else WIDEST)
    tiles, sizes = triton.cdiv(dim, block_dim), dict(BLOCK=block, BLOCK_DIM=block_dim, num_warps=warps)
    _segment_sum_kernel[n_blocks + len(unique), tiles](
        x.contiguous(), order, weights.contiguous(), starts, owners, sums, parts, values, unique, dots,
        dim, n_blocks, LOOKUPS=lookups, BLOCK_ROWS=block_rows, **sizes)
    _join_parts_kernel[n_blocks, tiles](parts, starts, owners, sums, dim, n_blocks, **sizes)
    return unique, sums, dots


@triton.jit
def _spread_weights_kernel(
        half_indices, weights, out, n, n_keys, knn, K: tl.constexpr, BLOCK: tl.constexpr):
    """out[h, c, t, half_indices[t, h, c, r]] = the sum of weights[t, h, q] over the ranks q with the same
    half index as r.

    half_indices (n, heads, 2, knn) integers, weights (n, heads, knn), out (heads, 2, n, n_keys), zeros
    before. A program does BLOCK tokens of a half of a head. It compares ranks with each other, not with all
    keys. Ranks with the same key store the same number, so their order is of no account.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    half, n_halves = tl.program_id(1), tl.num_programs(1)
    rank = tl.arange(0, K)[None, :]
    mask = (token < n) & (rank < knn)
    token = token.to(tl.int64)
    index = tl.load(half_indices + (token * n_halves + half) * knn + rank, mask, other=-1)
    weight = tl.load(weights + (token * (n_halves // 2) + half // 2) * knn + rank, mask, other=0.0)
    is_same = index[:, :, None] == index[:, None, :]
    total = tl.sum(tl.where(is_same, weight.to(tl.float32)[:, None, :], 0.0), axis=2)
    tl.store(out + (half.to(tl.int64) * n + token) * n_keys + index, total, mask)


@_on_its_device
def spread_weights(half_indices, weights, n_keys, dtype):
    """Each token's weights at the half keys they belong to, and zeros elsewhere.

    half_indices (n, heads, 2, knn) integers, which may repeat, weights (n, heads, knn)
    -> (heads, 2, n, n_keys) of this dtype
    """
    n, heads, _, knn = half_indices.shape
    out = torch.zeros(heads, 2, n, n_keys, dtype=dtype, device=weights.device)
    if n:
        K = triton.next_power_of_2(knn)
        block = max(1, 1024 // K**2)
        _spread_weights_kernel[triton.cdiv(n, block), heads * 2](
            half_indices.contiguous(), weights.contiguous(), out, n, n_keys, knn, K=K, BLOCK=block,
            num_warps=max(1, min(8, block * K**2 // 1024)))
    return out


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
        values, rows, grads, second_moment, reads, mean_square, row_scale, grad_scale, lr, beta2, log2_beta2,
        eps, seed, first_column, dim, STOCHASTIC: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """RowAdam's update (nanomem/optim.py) of the row rows[i] by grads[i], where i is the program.

    values (n_slots, d), rows (u,) int64, grads (u, d), second_moment (n_slots,) float32, reads (n_slots,)
    int32; mean_square (u,) float32 of the gradients' whole rows, or None to compute it from grads; row_scale
    (n_slots,) float32, what to multiply lr by, or None; grad_scale () float32, what to multiply the gradients
    by, or None.

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
    if grad_scale is not None:
        scale = tl.load(grad_scale)
        mean *= scale * scale
    moment = tl.load(second_moment + row)
    has_gradient = tl.where(mean != 0.0, 1, 0)  # a row without one stays as it is
    moment += has_gradient * (1.0 - beta2) * (mean - moment)
    count = tl.load(reads + row) + has_gradient
    bias = 1.0 - tl.exp2(tl.maximum(count, 1).to(tl.float32) * log2_beta2)  # 1 - beta2 ** n_r
    factor = lr / (tl.sqrt(moment / bias) + eps)
    if row_scale is not None:
        factor *= tl.load(row_scale + row)
    if grad_scale is not None:
        factor *= scale
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
        row_scale=None, grad_scale=None):
    """Updates values (n_slots, d), second_moment (n_slots,) float32 and reads (n_slots,) int32 in place.

    rows (u,) int64, each once; grads (u, d); a row whose gradient is zero stays as it is. bfloat16 values are
    rounded stochastically. If values are the columns of a wider table from first_column on, mean_square (u,)
    float32 is that of the gradient's whole rows. row_scale (n_slots,) float32: what to multiply each row's lr
    by. grad_scale () float32: what to multiply the gradients by. Raises ValueError unless values are
    contiguous.
    """
    if not values.is_contiguous():
        raise ValueError(f"values must be contiguous, got strides {values.stride()}")
    _, block_dim, warps = _tile(values.shape[1])
    log2_beta2 = math.log2(beta2) if beta2 else -math.inf
    if len(rows):
        _row_adam_kernel[len(rows),](
            values, rows, grads.contiguous(), second_moment, reads, mean_square, row_scale, grad_scale,
            float(lr), beta2, log2_beta2, eps, seed, first_column, values.shape[1], BLOCK_DIM=block_dim,
            num_warps=warps, STOCHASTIC=values.dtype == torch.bfloat16)
        # A backward pass that needs the old values raises.
        torch.autograd.graph.increment_version(values)
