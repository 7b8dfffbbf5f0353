"""
Operations of the memory layer that torch is slow at on a CPU. The results equal the plain operations'.

    topk     torch.topk, in half its time
    sddmm    dot products with the rows looked up, in an eighth of the time that gathering them takes
"""

import functools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

# The one sparse operation used here is tested.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")

LABEL_BITS = 29  # the bits of a float64 that a float32 leaves empty
FEW_ROWS = 64  # torch.topk is faster with fewer rows: it takes 10 us for one, and this 300
BUCKET = 8


def topk(scores: Tensor, k: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest scores along the last dimension, from high to low, and their labels, or their places.

    scores (..., rows, n), labels of the same shape, int64 -> (..., rows, k), (..., rows, k) int64. Exact.

    torch.topk sorts pairs of a score and a place. Here both are packed into one float64. A float32 leaves its
    29 low bits zero, and a label put there changes the number by less than the spacing of float32, so it
    sorts like the score.
    """
    n = scores.shape[-1]
    if not can_pack(scores, labels):
        return torch_topk(scores, k, labels)
    n_buckets = n // BUCKET
    if labels is None and n % BUCKET == 0 and n_buckets >= 2 * k:
        # The k buckets with the largest maxima contain the k largest scores, so only their members are
        # sorted. Bucket b has the members b, b + n_buckets, b + 2 * n_buckets, ..., so that whole rows are
        # compared.
        maxima = scores.unflatten(-1, (BUCKET, n_buckets)).amax(-2)           # (..., rows, n_buckets)
        _, buckets = topk(maxima, k)                                          # (..., rows, k)
        labels = (buckets[..., None] + torch.arange(0, n, n_buckets)).flatten(-2)
        scores = scores.gather(-1, labels)                                    # (..., rows, k * BUCKET)
    packed = scores.double()
    packed.view(torch.int64).bitwise_or_(torch.arange(n) if labels is None else labels)
    best = largest(packed.flatten(0, -2), k).view(*scores.shape[:-1], k)
    if best.isnan().any():  # an infinite score packed with a label is NaN, which sorts above all others
        return torch_topk(scores, k, labels)
    bits = best.view(torch.int64)
    return (bits & -(2**LABEL_BITS)).view(torch.float64).float(), bits & (2**LABEL_BITS - 1)


def can_pack(scores, labels):
    """Whether packing works for these scores and labels, and is faster than torch.topk."""
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return False
    if scores.numel() < FEW_ROWS * scores.shape[-1]:
        return False
    return labels is None or labels.max() < 2**LABEL_BITS


def torch_topk(scores, k, labels):
    """The same as topk, with torch.topk."""
    best, places = scores.topk(k)
    return best, places if labels is None else labels.gather(-1, places)


def largest(numbers: Tensor, k: int) -> Tensor:
    """The k largest of each row (rows, n), from high to low. Reorders `numbers`.

    NumPy partitions with vector instructions. Each thread takes some of the rows.
    """

    def partition(rows):
        if k < rows.shape[1]:
            rows.partition(rows.shape[1] - k, axis=-1)
        return np.sort(rows[:, -k:], axis=-1)[:, ::-1]

    first, *others = [rows.numpy() for rows in numbers.chunk(torch.get_num_threads())]
    futures = [_threads().submit(partition, rows) for rows in others]
    parts = [partition(first)]
    parts += [future.result() for future in futures]
    return torch.from_numpy(np.concatenate(parts))


@functools.cache
def _threads():
    return ThreadPoolExecutor(os.cpu_count())


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
    os.register_at_fork(after_in_child=_threads.cache_clear)


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
