"""
LoRA: trains a low-rank change to each linear layer's weight, W + B A, and nothing else (Hu et al. 2021, arXiv
2106.09685). What `reproduce forgetting` compares teaching through the memory with.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class LoRALinear(nn.Module):
    """A linear layer whose weight stays, with a trainable change of rank r: y = W x + b + 2 B A x.

    A (r, in) starts as in nn.Linear and B (out, r) at zero, so that the layer starts unchanged. The change is
    scaled by 2, as with the usual alpha = 2 r.
    """

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return self.linear(x) + 2 * F.linear(F.linear(x, self.A), self.B)


def add_lora(model: nn.Module, rank: int):
    """Freezes a GPT and adds LoRA to all linear layers in its blocks, those of memory layers included; not to
    the output layer, which is the embedding.
    """
    model.requires_grad_(False)
    for parent in list(model.blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank))
