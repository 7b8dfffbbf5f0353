"""
What the memory layer needs on a CPU and torch is slow at. The results are those of the plain operations
that they stand for.

    topk         torch.topk, in half its time
    sddmm   dot products with the rows looked up, in an eighth of the time of gathering them
"""

import functools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

warnings.filterwarnings(
    "ignore", "Sparse CSR tensor support is in beta"
)  # the one operation used here is tested

LABEL_BITS = 29  # what a float32 leaves empty in a float64
FEW_ROWS = 64  # with fewer torch.topk is faster: of a single row it takes 10 us, and this 300


def topk(scores, k, labels=None):
    """The k largest scores along the last dimension, from high to low, and the labels they have there, or
    their places.

    scores and int64 labels, both of one shape (..., rows, n) -> (..., rows, k), (..., rows, k) int64.
    Exact. On other devices, for other dtypes than float32, for few rows, for infinite scores and for labels
    of 2**29 or more it is torch.topk.

    torch.topk sorts pairs of a score and a place. Here both are packed into one float64: a float32 leaves
    its 29 low bits zero, and a label put there changes the number by less than the spacing of float32, so
    it sorts like the score.
    """
    n = scores.shape[-1]
    if (
        scores.device.type != "cpu"
        or scores.dtype != torch.float32
        or scores.numel() < FEW_ROWS * n
        or (labels is not None and labels.max() >= 2**LABEL_BITS)
    ):
        return _torch_topk(scores, k, labels)
    n_groups = n // 8
    if labels is None and n % 8 == 0 and n_groups >= 2 * k:
        # The k groups with the largest maxima hold the k largest numbers, so only their members are looked
        # at. Group g has the members g, g + n_groups, g + 2 * n_groups, ...: its maximum is one of whole
        # rows.
        _, groups = topk(scores.unflatten(-1, (8, n_groups)).amax(-2), k)
        labels = (groups[..., None] + torch.arange(0, n, n_groups)).flatten(-2)
        scores = scores.gather(-1, labels)
    packed = scores.double()
    packed.view(torch.int64).bitwise_or_(torch.arange(n) if labels is None else labels)
    best = largest(packed.flatten(0, -2), k).view(*scores.shape[:-1], k)
    if best.isnan().any():  # an infinity with a label is a NaN, which sorts above all: so none goes unseen
        return _torch_topk(scores, k, labels)
    bits = best.view(torch.int64)
    return (bits & -(2**LABEL_BITS)).view(torch.float64).float(), bits & (2**LABEL_BITS - 1)


def _torch_topk(scores, k, labels):
    best, places = scores.topk(k)
    return best, places if labels is None else labels.gather(-1, places)


def largest(numbers, k):
    """The k largest of each row (rows, n), from high to low; their order in `numbers` is lost.

    NumPy partitions with vector instructions, and on several threads at once, each of which gets a share of
    the rows.
    """

    def partition(rows):
        if k < rows.shape[1]:
            rows.partition(rows.shape[1] - k, axis=-1)
        return np.sort(rows[:, -k:], axis=-1)[:, ::-1]

    first, *others = (rows.numpy() for rows in numbers.chunk(torch.get_num_threads()))
    under_way = [_threads().submit(partition, rows) for rows in others]
    return torch.from_numpy(np.concatenate([partition(first), *(share.result() for share in under_way)]))


@functools.cache
def _threads():
    return ThreadPoolExecutor(os.cpu_count())


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
    os.register_at_fork(after_in_child=_threads.cache_clear)


def sddmm(table, indices, x):
    """out[t, l] = <table[indices[t, l]], x[t]>: table (n_rows, dim), indices (n, lookups) int64, x (n,
    dim).

    That is x @ table.T, computed only where a sparse matrix has its entries: the rows that were looked up.
    """
    n, lookups = indices.shape
    # torch refuses sparse matrices with more entries than a dense one has.
    if (
        table.device.type != "cpu"
        or table.dtype not in (torch.float32, torch.float64)
        or lookups > len(table)
    ):
        # One lookup at a time, so that no (n, lookups, dim) tensor is built.
        return torch.stack([(table[rows] * x).sum(-1) for rows in indices.unbind(1)], dim=1)
    starts, zeros = torch.arange(0, n * lookups + 1, lookups), x.new_zeros(n * lookups)
    wanted = torch.sparse_csr_tensor(
        starts, indices.flatten(), zeros, (n, len(table)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(wanted, x, table.t(), beta=0.0).values().view(n, lookups)
