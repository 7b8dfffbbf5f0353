"""
Which shape of memory suits a pretrained model: `reproduce shapes`.

Each memory differs from the default one of retrofit.py in one thing: the layers, the number of slots, or k
(with a higher lookup, the layers of the values rise, too). Each is taught 100 invented facts with several
seeds, as in `reproduce retrofit`, at one learning rate.
"""

from collections.abc import Iterator

from nanomem.cli import UserError
from nanomem.reproduce.retrofit import Teacher, Try
from nanomem.retrofit import default_layers

WAY = Try("memory", 0.5)


def shapes(n_layers: int) -> dict[str, dict]:
    """Memories for a model of n_layers: {what differs from the default one: arguments of add_memory}.

    Raises UserError if the model is too shallow.
    """
    lookup, layers = default_layers(n_layers)
    lower, higher = lookup // 2, 2 * lookup
    if lookup == 0:
        raise UserError(f"shapes needs a model of 10 layers or more; this one has {n_layers}")
    above, fewer = [layer + higher - lookup for layer in layers], layers[::2]
    return {
        "default": {},
        f"lookup in layer {lower}": {"lookup": lower},
        f"lookup in layer {higher}, values in {listed(above)}": {"lookup": higher, "layers": above},
        f"values in {listed(fewer)}": {"layers": fewer},
        "65,536 slots": {"n_slots": 256**2},
        "1,048,576 slots": {"n_slots": 1024**2},
        "k = 3": {"knn": 3},
        "k = 12": {"knn": 12},
    }


def listed(layers: list[int]) -> str:
    """The numbers of layers, joined by commas."""
    return ", ".join(map(str, layers))


def compare(teacher: Teacher, seeds: list[int]) -> Iterator[list[dict]]:
    """Yields the table's rows, one for each shape, after each seed. A row has the numbers trained and the
    curve of each seed.
    """
    memories = shapes(teacher.untaught.model.config.num_hidden_layers)
    rows = [{"memory": name, "trained": [], "curves": []} for name in memories]
    for seed in seeds:
        for row, (name, shape) in zip(rows, memories.items()):
            result = teacher.run("shape", name, WAY, seed, shape)
            row["trained"].append(result["trained"])
            row["curves"].append(result["curve"])
        yield rows
