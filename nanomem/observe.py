"""
What memory layers read: observers that are called at each lookup, and a measure of how evenly the slots are
used.
"""

import contextlib
import functools
import math

import torch


@contextlib.contextmanager
def observe_lookups(model: torch.nn.Module, observer):
    """While open, each memory layer of the model calls observer(layer, indices, weights) in each forward
    pass.

    indices and weights are (n, heads, knn), for the n tokens of the pass.
    """
    layers = [module for module in model.modules() if hasattr(module, "observer")]
    for layer in layers:
        layer.observer = functools.partial(observer, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = None


@torch.no_grad()
def lookups_of(model: torch.nn.Module, tokens: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """What a GPT's memory layers read for tokens (batch, time) int64: {layer number: (indices, weights)}.

    indices (n, heads, knn) int64 and weights (n, heads, knn) float32, for the n = batch * time tokens, on the
    CPU; a head's weights add up to 1.
    """
    number_of = {layer: number for number, layer in model.memory_layers().items()}
    seen = {}

    def keep(layer, indices, weights):
        seen[number_of[layer]] = indices.cpu(), weights.float().cpu()

    with observe_lookups(model, keep):
        model(tokens)
    return seen


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
