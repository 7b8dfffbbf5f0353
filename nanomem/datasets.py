"""
The sets of facts that come with nanomem, which --data takes by name.

To add one, write a function that makes its FactSet and add an entry to DATASETS; nothing else needs to know.
Files that it reads go in data/NAME, which nanomem.cli.shipped(NAME) finds. A tokenizer.tiktoken there is
what tokenizer=auto uses; without one, it uses one token per byte. numpy and torch are imported inside
functions only, so that --help is answered at once.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class DataSet:
    """A set of facts.

    Args:
        help: what it is about, for --help.
        make: (config) -> its FactSet, with config's n_entities, zipf and seed, leaving out the entities of
            config.earlier. Raises ValueError for a number of entities that it can't have.
    """

    help: str
    make: Callable


def make_people(config):
    """Invented people, different ones for each seed, with no name that an earlier set has."""
    from nanomem import facts

    taken = frozenset()
    for earlier in config.earlier:
        if earlier["data"] == "people":
            seed = earlier["people_seed"] or earlier["seed"]
            taken |= set(facts.people(earlier["n_entities"], seed=seed, taken=taken).entities)
    return facts.people(config.n_entities, config.zipf, config.people_seed or config.seed, taken)


def make_world(config):
    """The largest cities of the world after those of earlier sets."""
    from nanomem import facts

    earlier = sum(earlier["n_entities"] for earlier in config.earlier if earlier["data"] == "world")
    return facts.world(config.n_entities, config.zipf, skip=earlier)


DATASETS = {
    "people": DataSet("invented", make_people),
    "world": DataSet("cities", make_world),
}


def teaches_facts(data: str) -> bool:
    """Whether --data teaches facts rather than a text."""
    return data in DATASETS or is_own_facts(data)


def is_own_facts(data: str) -> bool:
    """Whether --data is a user's file of facts: a name that ends in .jsonl, in any letter case."""
    return data.lower().endswith(".jsonl")


def help_text() -> str:
    """The sets and what they are about, for --help."""
    return ", ".join(f"{name} ({dataset.help})" for name, dataset in DATASETS.items())
