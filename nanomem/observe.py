"""
What memory layers read: observers that are called at each lookup, the lookups of given tokens and of the
training data, and a measure of how evenly the slots are used.
"""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def observe_lookups(model: torch.nn.Module, observer):
    """While open, each memory layer of the model calls observer(layer, indices, weights) in each forward
    pass.

    indices and weights are (n, heads, knn), for the n tokens of the pass. Without an observer, does nothing.
    """
    if observer is None:
        yield
        return
    layers = [module for module in model.modules() if hasattr(module, "observer")]
    for layer in layers:
        layer.observer = functools.partial(observer, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = None


@torch.no_grad()
def run_observed(
        model: torch.nn.Module, tokens: torch.Tensor
) -> tuple[torch.Tensor, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """(the logits of a GPT for tokens (batch, time) int64, what its memory layers read for them).

    The second is {layer number: (indices, weights)}: indices (n, heads, knn) int64 and weights
    (n, heads, knn) float32, for the n = batch * time tokens, on the CPU; a head's weights add up to 1.
    """
    number_of = {layer: number for number, layer in model.memory_layers().items()}
    seen = {}

    def keep(layer, indices, weights):
        seen[number_of[layer]] = indices.cpu(), weights.float().cpu()

    with observe_lookups(model, keep):
        logits, _ = model(tokens)
    return logits, seen


def lookups_of(model: torch.nn.Module, tokens: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """What a GPT's memory layers read for tokens (batch, time) int64: the second of `run_observed`."""
    return run_observed(model, tokens)[1]


def training_lookups(
        model: torch.nn.Module, data, n_batches: int, batch_size: int, start: int = 0
) -> Iterator[tuple[torch.Tensor, dict]]:
    """Yields batches of the training data, from sequence `start` on: tokens (batch_size, time), and what
    `lookups_of` returns for them.
    """
    device = next(model.parameters()).device
    for i in range(n_batches):
        tokens, _ = data.batch("train", start + i * batch_size, batch_size)
        yield tokens, lookups_of(model, tokens.to(device))


def slot_shares(indices: torch.Tensor, weights: torch.Tensor) -> Counter:
    """{slot: its share of the weight} in lookups (..., knn) of some tokens and heads: they add up to 1."""
    total, n_lookups = Counter(), indices[..., 0].numel()
    for slot, weight in zip(indices.flatten().tolist(), weights.flatten().tolist()):
        total[slot] += weight / n_lookups
    return total


class SlotUsage:
    """An observer that measures how evenly slots are used (Lample et al. 2019, section 4.4)."""

    def __init__(self):
        self.weight = {}  # table -> (n_slots,), the sum of the weights each slot was read with

    def __call__(self, layer, indices, weights):
        if layer.table not in self.weight:
            self.weight[layer.table] = torch.zeros(layer.table.n_slots, dtype=torch.float64)
        weights = weights.detach().flatten().cpu().double()
        self.weight[layer.table].index_add_(0, indices.flatten().cpu(), weights)

    def usage(self) -> float:
        """The share of slots read at least once, over all tables."""
        n_read = sum((weight > 0).sum().item() for weight in self.weight.values())
        return n_read / sum(len(weight) for weight in self.weight.values())

    def kl(self) -> float:
        """The KL divergence of the slots' shares of weight from uniform, in nats; the mean over tables."""
        divergences = []
        for weight in self.weight.values():
            share = weight / weight.sum()
            divergences.append(math.log(len(share)) + torch.special.xlogy(share, share).sum().item())
        return sum(divergences) / len(divergences)
