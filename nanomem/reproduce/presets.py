"""
How each preset's models are run. Their settings are recipes in configs/.
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
    """

    recipe: str
    text_recipe: str
    workers: int
    threads: int


PRESETS = {
    "night": Preset("night", "wikitext-2", workers=2, threads=1),
    "laptop": Preset("laptop", "wikitext-2", workers=2, threads=1),
    "gpu": Preset("gpu", "gpu", workers=1, threads=0),
}
