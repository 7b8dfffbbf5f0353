"""
The kinds of layers that --ffn can put in mem_layers: how each is built, and how it is sized for a fair
comparison.

To add one, write its layer in a file of its own and add an entry to KINDS; docs/extending.md has an
example. torch is imported inside functions only, so that --help is answered at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

from nanomem.cli import setting


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Args:
        help: what it is, for --help.
        build: (config, make_table) yields a module for each layer of mem_layers, in order;
            make_table(n_slots, v_dim, dtype) makes a MemoryTable. None for ordinary feed-forward layers.
        size: (config, flops, params) -> the config with the kind's sizes of 0 filled in, so that one of its
            layers takes this many FLOPs per token and parameters. None if it has no sizes of its own.
        check: (config) raises ValueError for invalid settings.
        sparse: (layer) -> the parameters of which a token uses few, other than MemoryTables.
        sparse_name: what those, or the tables, are called in messages.
        has_tables: whether it has MemoryTables.
        splits_tables: whether several processes can split its tables by columns.
    """

    help: str
    build: Callable | None
    size: Callable | None = None
    check: Callable = lambda config: None
    sparse: Callable = lambda layer: []
    sparse_name: str = "memory tables"
    has_tables: bool = False
    splits_tables: bool = True


# ------------------------------------------------------------------------------------------------
# Memory layers


def build_memory(config, make_table):
    """Memory layers, with one table for all of them or one each."""
    from nanomem.memory import ProductKeyMemory

    size = config.mem_n_keys**2, config.mem_v_dim or config.n_embd
    for table in for_each_layer(config, lambda: make_table(*size, dtype=table_dtype(config))):
        yield ProductKeyMemory(config.n_embd, table, **lookup_options(config), gated=config.mem_gated,
                               dropout=config.mem_dropout)


def for_each_layer(config, make):
    """Yields a make() for each memory layer, the same one for all of them with mem_share_values."""
    made = None
    for _ in config.memory_layer_numbers():
        if made is None or not config.mem_share_values:
            made = make()
        yield made


def lookup_options(config):
    """The settings of the search for slots."""
    k_dim = config.mem_k_dim or config.n_embd
    return dict(heads=config.mem_heads, knn=config.mem_knn, k_dim=k_dim, qk_norm=config.mem_qk_norm)


def table_dtype(config):
    """The torch dtype that mem_dtype names."""
    import torch

    return getattr(torch, config.mem_dtype)


# ------------------------------------------------------------------------------------------------
# Mixtures of experts


@dataclass
class MixtureSettings:
    """The settings of ffn=moe."""

    moe_experts: int = setting(
        0, "experts per layer of ffn=moe; 0: as many parameters as with memory", section="Baselines", least=0)
    moe_hidden: int = setting(0, "width of an expert; 0: as many FLOPs as with memory", least=0)
    moe_k: int = setting(1, "experts per token", least=1)
    moe_balance: float = setting(0.01, "weight of the loss that makes experts be used evenly", least=0)


def build_moe(config, make_table):
    """Mixtures of SwiGLU experts."""
    from nanomem.baselines import MixtureOfExperts

    for _ in config.memory_layer_numbers():
        yield MixtureOfExperts(config.n_embd, config.moe_experts, config.moe_hidden, config.moe_k)


def size_moe(config, flops, params):
    """As many FLOPs and parameters, as nearly as whole numbers allow."""
    from nanomem.baselines import moe_shape

    experts, hidden = moe_shape(config.n_embd, config.moe_k, flops, params)
    return config.replace(moe_experts=config.moe_experts or experts, moe_hidden=config.moe_hidden or hidden)


def check_moe(config):
    """Raises ValueError for more chosen experts than there are."""
    if 0 < config.moe_experts < config.moe_k:
        raise ValueError(f"moe_k must be at most moe_experts = {config.moe_experts}, got {config.moe_k}")


# ------------------------------------------------------------------------------------------------
# PEER


@dataclass
class PeerSettings:
    """The settings of ffn=peer."""

    peer_n_keys: int = setting(
        0, "keys per half of ffn=peer, for peer_n_keys**2 experts of one neuron each; "
        "0: as many parameters as with memory", least=0, below=2**22)


def build_peer(config, make_table):
    """PEER layers, with one pair of tables for all of them or one each."""
    from nanomem.baselines import PEER

    size = config.peer_n_keys**2, config.n_embd
    make_pair = lambda: [make_table(*size, dtype=table_dtype(config)) for _ in range(2)]
    for pair in for_each_layer(config, make_pair):
        yield PEER(config.n_embd, *pair, **lookup_options(config))


def size_peer(config, flops, params):
    """Two tables with as many parameters as the memory's one; the FLOPs follow from that."""
    in_table = config.mem_n_keys**2 * (config.mem_v_dim or config.n_embd)
    n_keys = max(config.mem_knn, round((in_table / (2 * config.n_embd)) ** 0.5))
    return config.replace(peer_n_keys=config.peer_n_keys or n_keys)


def check_peer(config):
    """Raises ValueError for more neurons read than there are keys."""
    if 0 < config.peer_n_keys < config.mem_knn:
        raise ValueError(f"mem_knn must be at most peer_n_keys = {config.peer_n_keys}, got {config.mem_knn}")


# ------------------------------------------------------------------------------------------------

KINDS = {
    "memory": Kind("memory layers", build_memory, has_tables=True),
    "dense": Kind("feed-forward layers, as everywhere else", build=None),
    "moe": Kind("mixtures of experts", build_moe, size_moe, check_moe,
                sparse=lambda layer: layer.experts.parameters(), sparse_name="experts"),
    "peer": Kind("PEER layers", build_peer, size_peer, check_peer, has_tables=True, splits_tables=False),
}
SETTINGS = (MixtureSettings, PeerSettings)  # the kinds' own settings, which GPTConfig inherits


def help_text() -> str:
    """The kinds and what they are, for --help."""
    return "; ".join(f"{name}: {kind.help}" for name, kind in KINDS.items())
