"""
A Llama-style transformer in which some feed-forward layers can be memory layers.

- RMSNorm before each part, rotary positions (RoPE), SwiGLU feed-forward layers, tied embeddings
- scaled_dot_product_attention, with a plain key-value cache for generation
- --ffn=memory, dense, moe and peer differ only in the layers of mem_layers, and are sized to equal FLOPs
  (`sized`)
- parameters and FLOPs are counted from the modules
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanomem.config import GPTConfig
from nanomem.kinds import KINDS
from nanomem.memory import MemoryTable, ProductKeyMemory
from nanomem.ops import Linear


def rope_tables(length: int, dim: int, device=None, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """The cosines and sines of rotary positions (Su et al. 2021): two (length, dim) tensors."""
    frequencies = base ** -(torch.arange(0, dim, 2, device=device).float() / dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return torch.cat((angles.cos(), angles.cos()), dim=-1), torch.cat((-angles.sin(), angles.sin()), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x[i], x[i + dim/2]) by its position's angle: x (batch, time, 2, head, dim)."""
    return x * cos[:, None, None] + x.roll(x.shape[-1] // 2, -1) * sin[:, None, None]


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout, self.block_size = config.n_head, config.dropout, config.block_size
        self.qkv_proj = Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out_proj = Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: list | None = None) -> Tensor:
        """(batch, time, n_embd) -> the same. cache: earlier tokens' keys and values, extended in place."""
        B, T, C = x.shape
        qkv = self.qkv_proj(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k = rotate(qkv[:, :, :2], cos, sin).transpose(1, 3).unbind(2)  # (batch, head, time, dim) each
        v = qkv[:, :, 2].transpose(1, 2)                                  # (batch, head, time, dim)
        if cache is not None:
            if cache:
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            cache[:] = k, v
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=bool(T > 1), dropout_p=dropout)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))

    def flops_per_token(self) -> int:
        """The projections, and block_size scores and weighted values, as nanoGPT and PaLM count them."""
        n_embd = self.out_proj.in_features
        return 2 * (4 * n_embd**2) + 4 * self.block_size * n_embd


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, n_embd: int, hidden: int):
        super().__init__()
        self.gate_proj = Linear(n_embd, hidden, bias=False)
        self.up_proj = Linear(n_embd, hidden, bias=False)
        self.down_proj = Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, n_embd) -> (batch, time, n_embd)"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def flops_per_token(self) -> int:
        """FLOPs of the forward pass for one token, 2 per multiply-add."""
        return 2 * sum(p.numel() for p in self.parameters())


class Embedding(nn.Embedding):
    """nn.Embedding with GPT-2's initialisation."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)


class Block(nn.Module):
    """Attention, then a feed-forward or memory layer, each on a normalised copy of the residual stream."""

    def __init__(self, config, ffn):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.n_embd)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.n_embd)
        self.ffn = ffn
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: list | None = None) -> Tensor:
        """(batch, time, n_embd) -> (batch, time, n_embd)"""
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, cache))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class GPT(nn.Module):
    """The language model. Raises ValueError for an invalid config.

    make_table(n_slots, v_dim, dtype=...) makes its memory tables; several processes split theirs with a
    ShardedTable.
    """

    def __init__(self, config: GPTConfig, make_table=MemoryTable):
        super().__init__()
        config.check()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.n_embd)
        layers = feed_forwards(sized(config), make_table)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in layers)
        self.norm = nn.RMSNorm(config.n_embd)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.embedding.weight
        self._make_rope_tables()
        self.register_load_state_dict_post_hook(_after_loading)
        self._init_weights()

    def reset_parameters(self):
        """Restores what `to_empty` undoes and no submodule owns: the tied weight and RoPE's tables."""
        self.lm_head.weight = self.embedding.weight
        self._make_rope_tables(self.embedding.weight.device)

    def _make_rope_tables(self, device=None):
        cos, sin = rope_tables(self.config.block_size, self.config.n_embd // self.config.n_head, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _init_weights(self):
        # As in GPT-2: normal(0.02), and smaller by the root of their number for projections into the
        # residual stream. Memory layers keep their own initialisation, which is that of the paper's code.
        normal = functools.partial(nn.init.normal_, std=0.02)
        residual = functools.partial(nn.init.normal_, std=0.02 / (2 * len(self.blocks)) ** 0.5)
        self.embedding.reset_parameters()
        self.lm_head.init = normal  # only for a later reset_parameters: its weight is the embedding's
        for module in self.blocks.modules():
            if isinstance(module, (Attention, FeedForward)):
                for name, linear in module.named_children():
                    linear.init = residual if name in ("out_proj", "down_proj") else normal
                    linear.init(linear.weight)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: list | None = None):
        """Logits of the next token at each position, and the mean loss in nats (in training with the
        balance loss of moe).

        Args:
            idx: (batch, time) int64 tokens, time at most block_size.
            targets: (batch, time) int64, -1 where there is nothing to predict.
            cache: from `new_cache`, when generating: idx is the prompt, and then one token at a time.
        Returns:
            logits (batch, time, vocab_size); the loss, None without targets, 0 if all of them are -1.
        Raises:
            ValueError: more than block_size tokens, or several at once after the prompt.
        """
        start = cache[0][0].shape[2] if cache and cache[0] else 0
        T, most = idx.shape[1], self.config.block_size
        if start + T > most or (start and T > 1):
            raise ValueError(f"expected at most block_size={most} tokens, and one at a time after the first "
                             f"that a cache holds; got {T} after {start}")
        cos, sin = self.cos[start:start + T], self.sin[start:start + T]
        x = self.embedding(idx)                                   # (batch, time, n_embd)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache[i] if cache else None)
        logits = self.lm_head(self.norm(x))                       # (batch, time, vocab_size)
        loss = None if targets is None else self._loss(logits, targets)
        return logits, loss

    def _loss(self, logits, targets):
        scores = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        counted = targets.flatten() >= 0
        count = counted.sum().clamp(min=1)  # a process's share of a batch may have no targets
        loss = F.cross_entropy(scores, targets.flatten(), ignore_index=-1, reduction="sum") / count
        if self.training:
            mixtures = [block.ffn for block in self.blocks if hasattr(block.ffn, "balance_loss")]
            loss = loss + self.config.moe_balance * sum(mixture.balance_loss(counted) for mixture in mixtures)
        return loss

    def new_cache(self) -> list[list]:
        """An empty key-value cache for `forward`: a list for each layer."""
        return [[] for _ in self.blocks]

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 stop: int | None = None, generator: torch.Generator | None = None, top_p: float = 1.0,
                 never=()) -> Iterator[Tensor]:
        """Yields the next token, (batch, 1) int64, max_new_tokens times or until every sequence has a
        `stop`.

        idx (batch, time) int64 is the prompt. temperature, top_k and top_p are those of `choose`. never:
        tokens that are not chosen, such as tokenizer.unassigned(encoding). Past block_size tokens, the
        model continues from the last half of its window with a new cache.
        """
        if idx.dim() != 2 or idx.shape[1] == 0:
            raise ValueError(f"expected idx (batch, time) with one token or more, got {tuple(idx.shape)}")
        was_training = self.training
        self.eval()
        never = torch.tensor(never, dtype=torch.int64, device=idx.device)
        stopped = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        window = idx[:, -self.config.block_size:]  # what the model sees
        cache, not_in_cache = self.new_cache(), window
        try:
            for _ in range(max_new_tokens):
                if window.shape[1] > self.config.block_size:
                    window = window[:, -max(self.config.block_size // 2, 1):]
                    cache, not_in_cache = self.new_cache(), window
                logits = self(not_in_cache, cache=cache)[0][:, -1].float()  # (batch, vocab_size)
                logits[:, never] = -torch.inf
                token = choose(logits, temperature, top_k, top_p, generator)  # (batch, 1)
                window, not_in_cache = torch.cat((window, token), dim=1), token
                yield token
                if stop is not None:
                    stopped |= token == stop
                    if stopped.all():
                        break
        finally:  # also when the caller stops early
            self.train(was_training)

    def memory_layers(self) -> dict[int, ProductKeyMemory]:
        """{layer number: ProductKeyMemory}"""
        layers = {i: block.ffn for i, block in enumerate(self.blocks)}
        return {i: layer for i, layer in layers.items() if isinstance(layer, ProductKeyMemory)}

    def count_parameters(self) -> tuple[int, int]:
        """(parameters that every token uses, parameters in tables and experts, of which it uses few).

        Each is counted once, and tables are counted whole, even if several processes hold them.
        """
        layers = [block.ffn for block in self.blocks if not isinstance(block.ffn, FeedForward)]
        in_experts = sum(p.numel() for layer in layers for p in KINDS[self.config.ffn].sparse(layer))
        tables = [module for module in self.modules() if isinstance(module, MemoryTable)]
        in_tables = sum(table.n_slots * table.v_dim for table in tables)
        held_in_tables = sum(table.values.numel() for table in tables)
        core = sum(p.numel() for p in self.parameters()) - held_in_tables - in_experts
        return core, in_tables + in_experts

    def beside_memory(self) -> tuple[float, float]:
        """(FLOPs per token, parameters) as multiples of those of ffn="memory" with the same settings."""
        with torch.device("meta"):
            memory = GPT(self.config.replace(ffn="memory", ffn_hidden=0))
        flops = self.flops_per_token() / memory.flops_per_token()
        return flops, sum(self.count_parameters()) / sum(memory.count_parameters())

    def flops_per_token(self) -> int:
        """Forward FLOPs for a token of a full block, 2 per multiply-add. Training takes 3 times that."""
        in_blocks = sum(b.attention.flops_per_token() + b.ffn.flops_per_token() for b in self.blocks)
        return 2 * self.lm_head.weight.numel() + in_blocks


def _after_loading(model, _):
    # load_state_dict(..., assign=True) unties the weights.
    if model.lm_head.weight is not model.embedding.weight or model.cos.is_meta:
        model.reset_parameters()


def choose(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
           generator: torch.Generator | None = None) -> Tensor:
    """One token for each sequence: logits (batch, vocab_size) -> (batch, 1) int64.

    The likeliest at temperature 0; otherwise drawn from softmax(logits / temperature), among the top_k
    likeliest, and among the fewest likeliest that together have a probability of top_p (Holtzman et al.
    2020).
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    p = F.softmax(logits / temperature, dim=-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # the likeliest stays: top_p is above 0
    return tokens.gather(-1, torch.multinomial(p, 1, generator=generator))


# ------------------------------------------------------------------------------------------------
# Feed-forward layers, sized for a fair comparison


def feed_forwards(config: GPTConfig, make_table=MemoryTable) -> list[nn.Module]:
    """A feed-forward module for each layer: layers of kind config.ffn in mem_layers, SwiGLU elsewhere.

    config has no sizes of 0 left (`sized` fills them in).
    """
    numbers, layers, kind = [], [], KINDS[config.ffn]
    if kind.build is not None:
        numbers, of_kind = config.memory_layer_numbers(), kind.build(config, make_table)
    for i in range(config.n_layer):
        layers.append(next(of_kind) if i in numbers else FeedForward(config.n_embd, config.ffn_hidden))
    return layers


def sized(config: GPTConfig) -> GPTConfig:
    """The config with its widths of 0 filled in, so that a comparison with memory is fair by default.

    Feed-forward layers beside memory layers have Llama's 8/3 n_embd. Models of another kind take the FLOPs
    per token of the memory model with the same settings: their own layers as far as possible, the
    feed-forward layers beside them the rest.
    """
    kind, llama = KINDS[config.ffn], llama_width(config.n_embd)
    if config.ffn == "memory" or (config.ffn == "dense" and config.ffn_hidden):
        return config.replace(ffn_hidden=config.ffn_hidden or llama)
    n_of_kind = len(config.memory_layer_numbers())
    with torch.device("meta"):  # counts without allocating
        flops, params = count(feed_forwards(config.replace(ffn="memory", ffn_hidden=llama)))
        if kind.size is not None:
            ffn_flops, ffn_params = count([FeedForward(config.n_embd, config.ffn_hidden or llama)])
            n_ffn = config.n_layer - n_of_kind
            flops_each = (flops - n_ffn * ffn_flops) / n_of_kind
            params_each = (params - n_ffn * ffn_params) / n_of_kind
            config = kind.size(config, flops_each, params_each)
        layers = feed_forwards(config.replace(ffn_hidden=llama))
    ordinary = [layer for layer in layers if isinstance(layer, FeedForward)]
    others = [layer for layer in layers if not isinstance(layer, FeedForward)]
    left = flops - count(others)[0]  # for the ordinary ones
    hidden = width(config.n_embd, left / len(ordinary)) if ordinary else llama
    return config.replace(ffn_hidden=config.ffn_hidden or hidden)


def llama_width(n_embd: int) -> int:
    """The width of Llama's feed-forward layers: about 8/3 n_embd, a multiple of 8."""
    return max(8, 8 * round(n_embd / 3))


def count(layers: list[nn.Module]) -> tuple[int, int]:
    """(FLOPs per token, parameters) of some layers; shared tables count once."""
    flops = sum(layer.flops_per_token() for layer in layers)
    return flops, sum(p.numel() for p in nn.ModuleList(layers).parameters())


def width(n_embd: int, flops: float) -> int:
    """The width at which a FeedForward takes this many FLOPs per token.

    A multiple of 8, which is up to a sixth faster, unless that is more than 1% off.
    """
    exact = flops / (6 * n_embd)
    multiple = 8 * round(exact / 8)
    return multiple if abs(multiple - exact) <= 0.01 * exact else max(1, round(exact))
