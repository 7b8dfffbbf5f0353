"""
Operations of the memory layer that torch is slow at on a CPU. The results equal the plain operations'.

    topk     torch.topk, in a third of its time or less
    sddmm    dot products with the rows looked up, in an eighth of the time that gathering them takes
"""

import warnings

import torch
from torch import Tensor

# The one sparse operation used here is tested.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")

PLACE_BITS = 29  # the bits of a float64 that a float32 leaves empty
FEW_ROWS = 64  # torch.topk is faster with fewer rows: it takes 10 us for one, and this 300
SORTED_WHOLE = 256  # NumPy sorts rows up to this long faster than it partitions them


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk(scores, k): the k largest scores of each row, from high to low, and their places. Exact.

    scores (..., rows, n) -> (..., rows, k), (..., rows, k) int64
    """
    n = scores.shape[-1]
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or scores.numel() < FEW_ROWS * n:
        return scores.topk(k)
    bucket = 8 if n >= 32 * k else 4
    n_buckets = n // bucket
    if n % bucket or n_buckets < 2 * k:
        return packed_topk(scores, k)
    # The k buckets with the largest maxima contain the k largest scores, so only their members are sorted.
    # Bucket b has the members b, b + n_buckets, b + 2 * n_buckets, ..., so that whole rows are compared.
    maxima = scores.unflatten(-1, (bucket, n_buckets)).amax(-2)              # (..., rows, n_buckets)
    _, buckets = topk(maxima, k)                                             # (..., rows, k)
    members = (buckets[..., None] + torch.arange(0, n, n_buckets)).flatten(-2)  # (..., rows, k * bucket)
    best, chosen = packed_topk(scores.gather(-1, members), k)
    return best, members.gather(-1, chosen)


def packed_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same, without buckets.

    torch.topk sorts pairs of a score and a place. Here both are packed into one float64. A float32 leaves its
    29 low bits zero, and a place put there changes the number by less than the spacing of float32, so it
    sorts like the score.
    """
    packed = scores.double()
    packed.view(torch.int64).bitwise_or_(torch.arange(scores.shape[-1]))
    best = largest(packed.flatten(0, -2), k).view(*scores.shape[:-1], k)
    if best.isnan().any():  # an infinite score packed with a place is NaN, which sorts above all others
        return scores.topk(k)
    bits = best.view(torch.int64)
    return (bits & -(2**PLACE_BITS)).view(torch.float64).float(), bits & (2**PLACE_BITS - 1)


def largest(numbers: Tensor, k: int) -> Tensor:
    """The k largest of each row (rows, n), from high to low. Reorders `numbers`.

    NumPy sorts and partitions with vector instructions. One thread does it as fast as two, since torch's idle
    threads keep the cores busy while they wait.
    """
    rows = numbers.numpy()
    if rows.shape[1] > SORTED_WHOLE:
        rows.partition(rows.shape[1] - k, axis=-1)
        rows = rows[:, -k:]
    rows.sort(axis=-1)
    return torch.from_numpy(rows[:, ::-1][:, :k].copy())


def sddmm(table: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    """out[t, l] = <table[indices[t, l]], x[t]>.

    table (n_rows, dim), indices (n, lookups) int64, x (n, dim) -> (n, lookups). That is x @ table.T, computed
    only at the entries of a sparse matrix: the rows that were looked up.
    """
    n, lookups = indices.shape
    is_supported = table.device.type == "cpu" and table.dtype in (torch.float32, torch.float64)
    # torch refuses a sparse matrix with more entries than its dense form has.
    if not is_supported or lookups > len(table):
        # One lookup at a time, so that no (n, lookups, dim) tensor is built.
        return torch.stack([(table[rows] * x).sum(-1) for rows in indices.unbind(1)], dim=1)
    starts, zeros = torch.arange(0, n * lookups + 1, lookups), x.new_zeros(n * lookups)
    size = n, len(table)
    entries = torch.sparse_csr_tensor(starts, indices.flatten(), zeros, size, check_invariants=False)
    return torch.sparse.sampled_addmm(entries, x, table.t(), beta=0.0).values().view(n, lookups)
