"""
How large the reproduced models are. Their settings are recipes in configs/; what is here is how to run them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What all models of a preset have in common.

    Args:
        recipe: the recipe of the runs on facts.
        text_recipe: the recipe of the runs on text.
        workers: runs at a time.
        threads: CPU threads of each; 0: as many as torch takes.
        rates: learning rates to try first.
        balances: weights of the mixture's balance loss to try too, in multiples of the recipe's.
    """

    recipe: str
    text_recipe: str
    workers: int
    threads: int
    rates: tuple[float, ...]
    balances: tuple[float, ...] = (0.1, 10)


PRESETS = {
    "night": Preset("night", "wikitext-2", workers=2, threads=1, rates=(4e-3, 8e-3, 1.6e-2)),
    "laptop": Preset("laptop", "wikitext-2", workers=2, threads=1, rates=(4e-3, 8e-3, 1.6e-2)),
    "gpu": Preset("gpu", "gpu", workers=1, threads=0, rates=(5e-4, 1e-3, 2e-3)),
}
