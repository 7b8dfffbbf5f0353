"""Models that take equal FLOPs per token, so that a comparison is fair."""

import torch

from nanomem.cli import UserError
from nanomem.config import Config
from nanomem.model import GPT, llama_width


def flops(config: Config) -> int:
    """FLOPs per token of a config's model, counted from its modules on the meta device."""
    with torch.device("meta"):
        return GPT(config).flops_per_token()


def at_flops(config: Config, target: float) -> Config:
    """The config with the feed-forward width at which its model takes `target` FLOPs per token.

    Raises UserError if no width comes within 2%.
    """
    # FLOPs are linear in the width, so two widths determine the line.
    one = flops(config.replace(ffn_hidden=1))
    per_unit = flops(config.replace(ffn_hidden=2)) - one
    if per_unit > 0:
        width = 1 + round((target - one) / per_unit)
        config = config.replace(ffn_hidden=max(1, width))
    if abs(flops(config) / target - 1) > 0.02:
        raise UserError(f"no feed-forward width gives {target:,} FLOPs per token with the rest of {config}")
    return config


def dense_of(config: Config, times: float) -> Config:
    """A dense model of `times` as many FLOPs per token as the config's, wider in all its parts."""
    target = times * flops(config)
    n_embd, step = config.n_embd, 2 * config.n_head
    while flops(dense_of_width(config, n_embd + step)) <= target:
        n_embd += step
    return at_flops(dense_of_width(config, n_embd), target)


def dense_of_width(config: Config, n_embd: int) -> Config:
    """A dense config of this width, with Llama's feed-forward layers."""
    return config.replace(ffn="dense", n_embd=n_embd, ffn_hidden=llama_width(n_embd))
