"""
What memory layers are compared with: two other ways to give a model parameters that a token uses few of.

- MixtureOfExperts: many feed-forward networks, of which a router chooses k for each token
- PEER: a million experts of one neuron each, chosen by product keys ("Mixture of a Million Experts", He 2024)
- `moe_shape` sizes a mixture to a memory layer's FLOPs and parameters; model.py's `sized` does so for whole models

A token's choice depends on that token alone, so both are causal as they stand, and no token is dropped. Neither makes a gradient
for parameters that no token used: experts are modules of their own, and PEER's two tables are MemoryTables.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from nanomem import ops
from nanomem.memory import ProductKeyMemory, embedding_bag, sddmm, segment_sum
from nanomem.ops import Linear


class MixtureOfExperts(nn.Module):
    """Token-choice mixture of experts (Shazeer et al. 2017; Fedus et al. 2021): (batch, time, dim) -> (batch, time, dim).

        p   = softmax(W_router x)                          over all experts
        out = sum of p_e expert_e(x)                       over the k experts of the highest p

    No capacity limit: an expert takes all tokens that choose it.

    Args:
        dim: the model's width.
        experts: a list of modules (n, dim) -> (n, dim), each with flops_per_token().
        k: experts a token.
    Raises:
        ValueError: k outside 1..number of experts.
    """

    def __init__(self, dim, experts, k):
        super().__init__()
        if not 1 <= k <= len(experts):
            raise ValueError(f"moe_k must be from 1 to the number of experts, {len(experts)}, got {k}")
        self.k = k
        self.router = Linear(dim, len(experts), bias=False, init=functools.partial(nn.init.normal_, std=0.02))
        self.experts = nn.ModuleList(experts)
        self.routing = None  # of the last forward pass: (tokens, experts) p and (tokens, k) choices
        self.with_grad = True  # whether that pass recorded gradients

    def __getstate__(self):  # for deepcopy, which refuses tensors that have a graph
        return super().__getstate__() | {"routing": None}

    @torch.compiler.disable  # how many tokens an expert has is known only at run time
    def forward(self, x):
        """(batch, time, dim), or any shape that ends in dim, to the same shape."""
        if torch.jit.is_tracing() or get_proxy_mode() is not None:
            raise NotImplementedError("a traced mixture would send every later batch to this one's experts")
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        logits = self.router(x)
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        weights, chosen = p.topk(self.k)
        self.routing, self.with_grad = (p, chosen), torch.is_grad_enabled()
        if not len(x):
            return x.view(shape)
        order = chosen.flatten().argsort(stable=True)  # by expert
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        parts = x[order // self.k].split(counts)
        out = torch.cat([expert(part) for expert, part in zip(self.experts, parts) if len(part)])
        out = out[order.argsort()].view(len(x), self.k, -1)  # by token again
        return (out * weights.to(out.dtype)[..., None]).sum(1).view(shape)

    def balance_loss(self, counted):
        """How unevenly the last forward pass used the experts (Fedus et al. 2021, section 2.2): E * sum over e of f_e * P_e, with f_e
        the share of choices that fell on e, P_e its mean probability; 1 when even, and E when all choose the same.

        counted (tokens,) bool: the tokens it is about. Of several processes, f is that of all their tokens.
        """
        p, chosen = self.routing
        if torch.is_grad_enabled() and not self.with_grad:
            raise RuntimeError("balance_loss would have no gradient: the last forward pass ran without, as it does in "
                               "torch.utils.checkpoint; expected use_reentrant=False")
        f = torch.bincount(chosen[counted].flatten(), minlength=len(self.experts)).to(p.dtype)
        if dist.is_initialized():
            dist.all_reduce(f)
        f = f / f.sum().clamp(min=1)
        return len(f) * (f * p[counted].sum(0)).sum() / counted.sum().clamp(min=1)

    def flops_per_token(self):
        """Multiply-adds * 2 of the forward pass for a token: the router and k experts."""
        return 2 * self.router.weight.numel() + self.k * self.experts[0].flops_per_token()


def moe_shape(dim, k, flops, params):
    """(number of experts, their width) of the MixtureOfExperts of SwiGLU experts that takes so many FLOPs a token and parameters: the
    one of fewest experts that is within 1% of both, or else the nearest. Both can't always be met: routing to very many
    experts is itself work.
    """
    def shape(hidden):
        experts = max(k, round(params / (dim * (3 * hidden + 1))))
        miss = max(abs(2 * dim * (3 * hidden * k + experts) / flops - 1), abs(experts * dim * (3 * hidden + 1) / params - 1))
        return max(miss, 0.01), experts, hidden

    widest = max(1, round(flops / (6 * dim * k)))
    return min(shape(hidden) for hidden in range(1, widest + 1))[1:]


class PEER(ProductKeyMemory):
    """Parameter-efficient expert retrieval (He 2024): (batch, time, dim) -> (batch, time, dim).

    Expert i is one neuron, gelu(<u_i, x>) v_i. They are found as a memory layer's slots are, so a memory layer is what is left
    when each neuron's activation is 1:

        out = sum of s_i gelu(<u_i, x>) v_i                over all heads' chosen experts

    Args: as ProductKeyMemory's, with a table for the u and one for the v, of rows as wide as the model.
    """

    def __init__(self, dim, down, up, heads=4, knn=32, k_dim=None, qk_norm=True):
        if down.v_dim != dim or up.v_dim != dim:
            raise ValueError(f"PEER's tables must be as wide as the model, {dim}, got {down.v_dim} and {up.v_dim}")
        super().__init__(dim, up, heads, knn, k_dim, qk_norm, gated=False)
        self.down = down

    def forward(self, x):
        """(batch, time, dim), or any shape that ends in dim, to the same shape."""
        shape, x = x.shape, x.reshape(-1, self.dim)
        indices, weights = self.lookup(x)
        if self.observer is not None:
            self.observer(indices, weights)
        indices, down = indices.flatten(1), self.down.values
        neurons = F.gelu(memory_dot(down, indices, x.to(down.dtype), self.down.sparse_grad))
        return self.table(indices, weights.flatten(1) * neurons).to(x.dtype).view(shape)

    def flops_per_token(self):
        """Multiply-adds * 2 of the forward pass for a token: a memory layer's, and the product with u."""
        return super().flops_per_token() + 2 * self.heads * self.knn * self.dim


@ops.reads_table(ops.dot_shape)
def memory_dot(values: Tensor, indices: Tensor, x: Tensor, sparse_grad: bool = False) -> Tensor:
    """The product of each token with the rows it looks up: out[t, l] = <values[indices[t, l]], x[t]>.

    values (n_slots, dim), indices (n, lookups) int64, x (n, dim) -> (n, lookups), differentiable in values and x.
    Raises ValueError for shapes or dtypes that don't fit each other.
    """
    return sddmm(values, indices, x)


@memory_dot.register_gradient
def dot_gradients(grad, values, indices, x, values_need_it, x_needs_it):
    """The gradient of values, as rows (u,) and their sums (u, dim), and that of x (n, dim); None where not needed."""
    rows, sums = segment_sum(indices, grad, x, len(values)) if values_need_it else (None, None)
    grad_x = embedding_bag(values, indices, grad) if x_needs_it else None
    return rows, sums, grad_x
