"""
A Llama-style transformer whose feed-forward layers may be memory layers.

- RMSNorm before each part, rotary positions (RoPE), SwiGLU feed-forward, tied embeddings
- scaled_dot_product_attention, with a plain key-value cache for generation
- ffn="memory", "dense", "moe" and "peer" share all but the layers of mem_layers, and are sized to equal FLOPs (`sized`)
- parameters and FLOPs are counted from the modules
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanomem.baselines import PEER, MixtureOfExperts, moe_shape
from nanomem.config import GPTConfig
from nanomem.memory import MemoryTable, ProductKeyMemory
from nanomem.ops import Linear


def rope_tables(length, dim, device=None, base=10000.0):
    """Cosines and sines of rotary positions (Su et al. 2021), as `rotate` wants them: two (length, dim) tensors."""
    frequencies = base ** -(torch.arange(0, dim, 2, device=device).float() / dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return torch.cat((angles.cos(), angles.cos()), dim=-1), torch.cat((-angles.sin(), angles.sin()), dim=-1)


def rotate(x, cos, sin):
    """Rotates each pair (x[i], x[i + dim/2]) by its position's angle: x (batch, time, any, head, dim)."""
    return x * cos[:, None, None] + x.roll(x.shape[-1] // 2, -1) * sin[:, None, None]


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout, self.block_size = config.n_head, config.dropout, config.block_size
        self.qkv_proj = Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out_proj = Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None):
        """x (batch, time, n_embd); cache, if any, is a list of the keys and values so far, extended in place."""
        B, T, C = x.shape
        qkv = self.qkv_proj(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k = rotate(qkv[:, :, :2], cos, sin).transpose(1, 3).unbind(2)  # (batch, head, time, dim)
        v = qkv[:, :, 2].transpose(1, 2)
        if cache is not None:
            if cache:
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            cache[:] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=bool(T > 1), dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))

    def flops_per_token(self):
        """Projections, and block_size scores and weighted values, as nanoGPT and PaLM count them."""
        n_embd = self.out_proj.in_features
        return 2 * (4 * n_embd**2) + 4 * self.block_size * n_embd


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, n_embd, hidden):
        super().__init__()
        self.gate_proj = Linear(n_embd, hidden, bias=False)
        self.up_proj = Linear(n_embd, hidden, bias=False)
        self.down_proj = Linear(hidden, n_embd, bias=False)

    def forward(self, x):
        """(batch, time, n_embd) -> (batch, time, n_embd)"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def flops_per_token(self):
        """Multiply-adds * 2 of the forward pass for a token."""
        return 2 * sum(p.numel() for p in self.parameters())


class Embedding(nn.Embedding):
    """nn.Embedding that begins as GPT-2's."""

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

    def forward(self, x, cos, sin, cache=None):
        """(batch, time, n_embd) -> (batch, time, n_embd)"""
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, cache))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class GPT(nn.Module):
    """The language model. Raises ValueError for a config that can't be (config.check says which setting).

    make_table(n_slots, v_dim, dtype=...) makes its memory tables; several processes split theirs with a ShardedTable.
    """

    def __init__(self, config: GPTConfig, make_table=MemoryTable):
        super().__init__()
        config.check()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, ffn) for ffn in feed_forwards(sized(config), make_table))
        self.norm = nn.RMSNorm(config.n_embd)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.embedding.weight
        self._make_rope_tables()
        self.register_load_state_dict_post_hook(_after_loading)
        self._init_weights()

    def reset_parameters(self):
        """Makes what no module of the model's owns: the tied weight and RoPE's tables. `to_empty` undoes both."""
        self.lm_head.weight = self.embedding.weight
        self._make_rope_tables(self.embedding.weight.device)

    def _make_rope_tables(self, device=None):
        cos, sin = rope_tables(self.config.block_size, self.config.n_embd // self.config.n_head, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _init_weights(self):
        # As GPT-2: normal(0.02), and the projections into the residual stream smaller by the root of their number.
        # Memory layers keep the initialisation of the paper's code, which they gave themselves.
        normal = functools.partial(nn.init.normal_, std=0.02)
        residual = functools.partial(nn.init.normal_, std=0.02 / (2 * len(self.blocks)) ** 0.5)
        self.embedding.reset_parameters()
        self.lm_head.init = normal  # its weight is the embedding's: for a later reset_parameters
        for module in self.blocks.modules():
            if isinstance(module, (Attention, FeedForward)):
                for name, linear in module.named_children():
                    linear.init = residual if name in ("out_proj", "down_proj") else normal
                    linear.init(linear.weight)

    def forward(self, idx, targets=None, cache=None):
        """Logits of the next token at each position, and the mean loss in nats; while training, with moe's balance loss.

        Args:
            idx: (batch, time) int64 tokens, time at most block_size.
            targets: (batch, time) int64, -1 where there is nothing to predict.
            cache: from `new_cache`, when generating: idx is the prompt, and then one token at a time.
        Returns:
            logits (batch, time, vocab_size), and the loss, None without targets, 0 if all of them are -1.
        Raises:
            ValueError: more than block_size tokens, or several at once after the prompt.
        """
        start = cache[0][0].shape[2] if cache and cache[0] else 0
        if start + idx.shape[1] > self.config.block_size or (start and idx.shape[1] > 1):
            raise ValueError(f"expected at most block_size={self.config.block_size} tokens, and one at a time after the first "
                             f"that a cache holds; got {idx.shape[1]} after {start}")
        cos, sin = self.cos[start:start + idx.shape[1]], self.sin[start:start + idx.shape[1]]
        x = self.embedding(idx)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache[i] if cache else None)
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return logits, None
        scores = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        counted = targets.flatten() >= 0
        count = counted.sum().clamp(min=1)  # a process's share of a batch may have none
        loss = F.cross_entropy(scores, targets.flatten(), ignore_index=-1, reduction="sum") / count
        if self.training:
            mixtures = [block.ffn for block in self.blocks if isinstance(block.ffn, MixtureOfExperts)]
            loss = loss + self.config.moe_balance * sum(mixture.balance_loss(counted) for mixture in mixtures)
        return logits, loss

    def new_cache(self):
        """An empty key-value cache for `forward`: a list for each layer."""
        return [[] for _ in self.blocks]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop=None, generator=None, top_p=1.0, never=()):
        """Yields the next token, (batch, 1) int64, max_new_tokens times or until every row has said `stop`; how it is chosen
        says `choose`.

        idx (batch, time) int64 is what to go on from. Past block_size tokens the model sees the last half of its window, and the
        cache starts anew from there. never: tokens that are not chosen, such as tokenizer.unassigned(encoding).
        """
        if idx.dim() != 2 or idx.shape[1] == 0:
            raise ValueError(f"expected idx (batch, time) with one token or more to go on from, got {tuple(idx.shape)}")
        was_training = self.training
        self.eval()
        never = torch.tensor(never, dtype=torch.int64, device=idx.device)
        cache, unread = self.new_cache(), idx[:, -self.config.block_size:]
        window, stopped = unread, torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        try:
            for _ in range(max_new_tokens):
                if window.shape[1] > self.config.block_size:
                    window = window[:, -max(self.config.block_size // 2, 1):]
                    cache, unread = self.new_cache(), window
                logits = self(unread, cache=cache)[0][:, -1].float()
                logits[:, never] = -torch.inf
                unread = choose(logits, temperature, top_k, top_p, generator)
                window = torch.cat((window, unread), dim=1)
                yield unread
                stopped |= unread == stop if stop is not None else False
                if stopped.all():
                    break
        finally:  # also when the caller stops early
            self.train(was_training)

    def memory_layers(self):
        """{layer number: ProductKeyMemory}"""
        return {i: block.ffn for i, block in enumerate(self.blocks) if isinstance(block.ffn, ProductKeyMemory)}

    def count_parameters(self):
        """(parameters that every token uses, or a key; parameters in memory tables and experts, of which it uses few), each
        counted once, whichever process holds them.
        """
        tables = [m for m in self.modules() if isinstance(m, MemoryTable)]
        experts = sum(p.numel() for m in self.modules() if isinstance(m, MixtureOfExperts) for p in m.experts.parameters())
        core = sum(p.numel() for p in self.parameters()) - sum(table.values.numel() for table in tables) - experts
        return core, sum(table.n_slots * table.v_dim for table in tables) + experts

    def beside_memory(self):
        """(FLOPs a token, parameters) of this model, as multiples of those of ffn="memory" with the same settings."""
        with torch.device("meta"):
            memory = GPT(self.config.replace(ffn="memory", ffn_hidden=0))
        return self.flops_per_token() / memory.flops_per_token(), sum(self.count_parameters()) / sum(memory.count_parameters())

    def flops_per_token(self):
        """FLOPs of the forward pass for one token of a full block: 2 a multiply-add. Training takes three times as many."""
        return 2 * self.lm_head.weight.numel() + sum(b.attention.flops_per_token() + b.ffn.flops_per_token() for b in self.blocks)


def _after_loading(model, _):
    if model.lm_head.weight is not model.embedding.weight or model.cos.is_meta:  # load_state_dict(..., assign=True)
        model.reset_parameters()


def choose(logits, temperature=1.0, top_k=None, top_p=1.0, generator=None):
    """A token of each row of logits (batch, vocab_size): the likeliest at temperature 0, else one drawn from softmax(logits /
    temperature), among the top_k likeliest and, of those, the fewest likeliest that have top_p of the probability (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    p = F.softmax(logits / temperature, dim=-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # the first stays, whatever top_p is
    return tokens.gather(-1, torch.multinomial(p, 1, generator=generator))


def feed_forwards(config, make_table=MemoryTable):
    """A feed-forward module for each layer: what config.ffn says in mem_layers, SwiGLU elsewhere. The config is a `sized` one."""
    modules, tables = [], None
    for i in range(config.n_layer):
        if config.ffn == "dense" or i not in config.memory_layer_numbers():
            modules.append(FeedForward(config.n_embd, config.ffn_hidden))
            continue
        if config.ffn == "moe":
            experts = [FeedForward(config.n_embd, config.moe_hidden) for _ in range(config.moe_experts)]
            modules.append(MixtureOfExperts(config.n_embd, experts, config.moe_k))
            continue
        peer = config.ffn == "peer"
        if tables is None or not config.mem_share_values:
            n_slots, v_dim = (config.peer_n_keys**2, config.n_embd) if peer else (config.mem_n_keys**2, config.mem_v_dim or config.n_embd)
            tables = [make_table(n_slots, v_dim, dtype=getattr(torch, config.mem_dtype)) for _ in range(2 if peer else 1)]
        lookup = dict(heads=config.mem_heads, knn=config.mem_knn, k_dim=config.mem_k_dim or config.n_embd, qk_norm=config.mem_qk_norm)
        modules.append(PEER(config.n_embd, *tables, **lookup) if peer
                       else ProductKeyMemory(config.n_embd, *tables, **lookup, gated=config.mem_gated))
    return modules


def sized(config):
    """The config with its widths of 0 filled in. Feed-forward layers beside memory layers have Llama's 8/3 n_embd. The other kinds
    are sized to the memory model of the same settings, so that a comparison is fair by default: dense takes as many FLOPs a
    token; moe and peer as many FLOPs and parameters, as nearly as whole numbers allow, if need be at the cost of the layers beside
    them: to choose among very many experts is itself work.
    """
    n, layers = config.n_embd, len(config.memory_layer_numbers())
    llama = max(8, 8 * round(n / 3))
    if config.ffn == "memory" or (config.ffn == "dense" and config.ffn_hidden):
        return config.replace(ffn_hidden=config.ffn_hidden or llama)
    with torch.device("meta"):  # counts without allocating
        memory = nn.ModuleList(feed_forwards(config.replace(ffn="memory", ffn_hidden=llama)))
        flops, params = sum(m.flops_per_token() for m in memory), sum(p.numel() for p in memory.parameters())
        if config.ffn == "dense":
            return config.replace(ffn_hidden=width(n, flops / config.n_layer))
        if config.ffn == "moe":
            rest = FeedForward(n, config.ffn_hidden or llama)
            share = [(total - (config.n_layer - layers) * each) / layers
                     for total, each in ((flops, rest.flops_per_token()), (params, sum(p.numel() for p in rest.parameters())))]
            experts, hidden = moe_shape(n, config.moe_k, *share)
            config = config.replace(moe_experts=config.moe_experts or experts, moe_hidden=config.moe_hidden or hidden)
        else:
            of_tables = config.mem_n_keys**2 * (config.mem_v_dim or n)
            config = config.replace(peer_n_keys=config.peer_n_keys or max(config.mem_knn, round((of_tables / (2 * n)) ** 0.5)))
        sparse = sum(m.flops_per_token() for m in feed_forwards(config.replace(ffn_hidden=llama)) if not isinstance(m, FeedForward))
        left = width(n, (flops - sparse) / (config.n_layer - layers)) if layers < config.n_layer else llama
        return config.replace(ffn_hidden=config.ffn_hidden or left)


def width(n_embd, flops):
    """The width at which a FeedForward takes so many FLOPs a token: a multiple of 8, which multiplies up to a sixth faster,
    unless that is more than 1% off.
    """
    exact = flops / (6 * n_embd)
    multiple = 8 * round(exact / 8)
    return multiple if abs(multiple - exact) <= 0.01 * exact else max(1, round(exact))
