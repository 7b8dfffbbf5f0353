"""
A memory layer in its plainest form: score every slot, keep the best k, sum their values.

Its cost grows with the number of slots. memory.py computes the same from 2 sqrt(N) scores.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_memory(queries: Tensor, keys: Tensor, values: Tensor, knn: int) -> Tensor:
    """queries (n, heads, k_dim), keys (heads, n_slots, k_dim), values (n_slots, v_dim) -> (n, v_dim)"""
    scores = torch.einsum("nhd,hsd->nhs", queries, keys)  # (n, heads, n_slots): every slot is scored
    scores, slots = scores.topk(knn)                      # (n, heads, knn): the k best
    weights = F.softmax(scores, dim=-1)                   # (n, heads, knn)
    return torch.einsum("nhk,nhkv->nv", weights, values[slots])  # their values (n, heads, knn, v_dim), summed


def product_keys(keys: Tensor) -> Tensor:
    """The keys of all slots: half keys (heads, 2, n_keys, k_dim / 2) -> (heads, n_keys**2, k_dim).

    Slot i * n_keys + j has the key [keys[h, 0, i] ; keys[h, 1, j]].
    """
    n_keys = keys.shape[2]
    first = keys[:, 0].repeat_interleave(n_keys, dim=1)  # each first half n_keys times in a row
    second = keys[:, 1].repeat(1, n_keys, 1)             # all second halves, n_keys times over
    return torch.cat([first, second], dim=-1)
