"""
What memory layers are compared with: two other ways to add parameters of which a token uses few.

- MixtureOfExperts: many feed-forward networks; a router chooses k of them for each token
- PEER: a million experts of one neuron each, found by product keys ("Mixture of a Million Experts", He
  2024)
- `moe_shape` sizes a mixture to a memory layer's FLOPs and parameters

A token's experts depend on that token alone, so both are causal, and no token is dropped.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from nanomem import ops
from nanomem.memory import MemoryTable, ProductKeyMemory, embedding_bag, sddmm, segment_sum
from nanomem.model import FeedForward
from nanomem.ops import Linear


class MixtureOfExperts(nn.Module):
    """A token-choice mixture of experts (Shazeer et al. 2017; Fedus et al. 2021).

        p   = softmax(W_router x)                          over all experts
        out = sum of p_e expert_e(x)                       over the k experts with the highest p

    (batch, time, dim) -> (batch, time, dim). An expert takes all tokens that choose it: there is no
    capacity limit.

    Args:
        dim: the model's width.
        n_experts: how many experts.
        hidden: their width; each is a SwiGLU layer.
        k: experts per token.
    Raises:
        ValueError: k outside 1..n_experts.
    """

    def __init__(self, dim: int, n_experts: int, hidden: int, k: int):
        super().__init__()
        if not 1 <= k <= n_experts:
            raise ValueError(f"moe_k must be from 1 to the number of experts, {n_experts}, got {k}")
        self.k, self.n_experts = k, n_experts
        self.router = Linear(dim, n_experts, bias=False, init=functools.partial(nn.init.normal_, std=0.02))
        self.experts = Experts(dim, n_experts, hidden)
        self.routing = None  # the last forward pass's p (tokens, experts) and chosen experts (tokens, k)
        self.with_grad = True  # whether that pass recorded gradients

    def __getstate__(self):  # for deepcopy, which refuses tensors that have a graph
        return super().__getstate__() | {"routing": None}

    @ops.not_compiled  # how many tokens an expert gets is known only at run time
    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)"""
        if torch.jit.is_tracing() or get_proxy_mode() is not None:
            raise NotImplementedError("tracing would hard-code this batch's choice of experts")
        shape, x = x.shape, x.reshape(-1, x.shape[-1])                    # (n, dim)
        logits = self.router(x)
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        weights, chosen = p.topk(self.k)
        self.routing, self.with_grad = (p, chosen), torch.is_grad_enabled()
        order = chosen.flatten().argsort(stable=True)                     # (n * k,), by expert
        counts = torch.bincount(chosen.flatten(), minlength=self.n_experts)
        out = self.experts(x[order // self.k], counts)                    # (n * k, dim)
        out = out[order.argsort()].view(len(x), self.k, x.shape[1])       # (n, k, dim), by token again
        return (out * weights.to(out.dtype)[..., None]).sum(1).view(shape)

    def balance_loss(self, counted: Tensor) -> Tensor:
        """How unevenly the last forward pass used the experts (Fedus et al. 2021, section 2.2).

        E * sum over e of f_e * P_e, for E experts: f_e is the share of choices of e, and P_e its mean
        probability. 1 if all are used evenly, E if all tokens choose the same. counted (tokens,) bool: the
        tokens to look at. With several processes, f is over all their tokens.
        """
        p, chosen = self.routing
        if torch.is_grad_enabled() and not self.with_grad:
            raise RuntimeError("balance_loss has no gradient: the last forward pass ran under no_grad, "
                               "as in reentrant checkpointing; pass use_reentrant=False to checkpoint")
        f = torch.bincount(chosen[counted].flatten(), minlength=self.n_experts).to(p.dtype)
        if dist.is_initialized():
            dist.all_reduce(f)
        f = f / f.sum().clamp(min=1)
        return len(f) * (f * p[counted].sum(0)).sum() / counted.sum().clamp(min=1)

    def flops_per_token(self) -> int:
        """FLOPs of the forward pass for one token: the router and k experts."""
        return 2 * self.router.weight.numel() + self.k * self.experts.flops_per_token()


class Experts(FeedForward):  # so that GPT._init_weights finds its projections
    """SwiGLU layers of one shape, each for some of the tokens: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, dim: int, n_experts: int, hidden: int):
        nn.Module.__init__(self)
        self.gate_proj = GroupedLinear(n_experts, dim, hidden)
        self.up_proj = GroupedLinear(n_experts, dim, hidden)
        self.down_proj = GroupedLinear(n_experts, hidden, dim)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x (n, dim), of which the first expert takes counts[0] tokens, and so on -> (n, dim)"""
        return self.down_proj(F.silu(self.gate_proj(x, counts)) * self.up_proj(x, counts), counts)

    def flops_per_token(self) -> int:
        """FLOPs of the forward pass of one expert for one token."""
        return super().flops_per_token() // len(self.up_proj.weight)


class GroupedLinear(nn.Module):
    """Linear layers of one shape, without bias, each for some of the tokens."""

    def __init__(self, n_groups: int, in_features: int, out_features: int):
        super().__init__()
        self.init = functools.partial(nn.init.normal_, std=0.02)
        self.weight = nn.Parameter(torch.empty(n_groups, out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self):
        """Initialises the weights, as Linear does."""
        self.init(self.weight)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x (n, in_features), of which the first layer takes counts[0], and so on -> (n, out_features)"""
        weight = self.weight.transpose(1, 2)                              # (n_groups, in, out)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        if can_group(x, self.weight):
            return F.grouped_mm(x, weight, offs=counts.cumsum(0).int())
        parts = x.split(counts.tolist())
        return torch.cat([part @ matrix for part, matrix in zip(parts, weight)])


def can_group(x, weight):
    """Whether torch has a grouped matrix product for these: it wants rows that are multiples of 16 bytes."""
    is_supported = x.device.type in ("cpu", "cuda") and x.dtype != torch.float64
    return is_supported and all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])


def moe_shape(dim: int, k: int, flops: float, params: float) -> tuple[int, int]:
    """(number of experts, their width) of a MixtureOfExperts with about these FLOPs per token and
    parameters.

    The experts are SwiGLU layers. Takes the fewest experts that come within 1% of both, or else the
    nearest: choosing among very many experts costs FLOPs itself, so both can't always be met. A multiple of
    8 up to 2% off is preferred, since grouped matrix products need one.
    """
    def shape(hidden):
        experts = max(k, round(params / (dim * (3 * hidden + 1))))
        off_flops = abs(2 * dim * (3 * hidden * k + experts) / flops - 1)
        off_params = abs(experts * dim * (3 * hidden + 1) / params - 1)
        return max(off_flops, off_params, 0.01), experts, hidden

    widest = max(1, round(flops / (6 * dim * k)))
    _, experts, hidden = min(shape(hidden) for hidden in range(1, widest + 1))
    multiple = 8 * round(hidden / 8)
    if abs(multiple - hidden) <= 0.02 * hidden:
        _, experts, hidden = shape(multiple)
    return experts, hidden


class PEER(ProductKeyMemory):
    """Parameter-efficient expert retrieval (He 2024): (batch, time, dim) -> (batch, time, dim).

        out = sum of s_i gelu(<u_i, x>) v_i                over all heads' chosen experts

    Expert i is one neuron, gelu(<u_i, x>) v_i. Experts are found as a memory layer finds its slots; a
    memory layer is what remains if all activations are 1.

    Args: those of ProductKeyMemory, with a table for u and one for v, whose rows are as wide as the model.
    """

    def __init__(self, dim: int, down: MemoryTable, up: MemoryTable, heads: int = 4, knn: int = 32,
                 k_dim: int | None = None, qk_norm: bool = True):
        if down.v_dim != dim or up.v_dim != dim:
            widths = f"{down.v_dim} and {up.v_dim}"
            raise ValueError(f"PEER's tables must be as wide as the model, {dim}, got {widths}")
        super().__init__(dim, up, heads, knn, k_dim, qk_norm, gated=False)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)"""
        shape, x = x.shape, x.reshape(-1, self.dim)                       # (n, dim)
        indices, weights = self.lookup(x)                                 # (n, heads, knn) each
        if self.observer is not None:
            self.observer(indices, weights)
        indices, down = indices.flatten(1), self.down.values
        neurons = F.gelu(memory_dot(down, indices, x.to(down.dtype), self.down.sparse_grad))  # (n, lookups)
        return self.table(indices, weights.flatten(1) * neurons).to(x.dtype).view(shape)

    def flops_per_token(self) -> int:
        """FLOPs of the forward pass for one token: those of a memory layer, and the products with u."""
        return super().flops_per_token() + 2 * self.heads * self.knn * self.dim


@ops.reads_table(ops.dot_shape)
def memory_dot(values: Tensor, indices: Tensor, x: Tensor, sparse_grad: bool = False) -> Tensor:
    """The product of each token with the rows it looks up: out[t, l] = <values[indices[t, l]], x[t]>.

    values (n_slots, dim), indices (n, lookups) int64, x (n, dim) -> (n, lookups), differentiable in values
    and x. Raises ValueError for shapes or dtypes that don't fit each other.
    """
    return sddmm(values, indices, x)


@memory_dot.register_gradient
def dot_gradients(grad, values, indices, x, values_need_it, x_needs_it):
    """The gradient of values, as rows (u,) and their sums (u, dim), and that of x (n, dim); None where not
    needed.
    """
    rows, sums = segment_sum(indices, grad, x, len(values)) if values_need_it else (None, None)
    grad_x = embedding_bag(values, indices, grad) if x_needs_it else None
    return rows, sums, grad_x
