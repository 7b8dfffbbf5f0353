"""What is tried for each model, so that none is compared at another's best settings."""

import math

from nanomem.config import Config
from nanomem.reproduce.runs import Run, Trainer
from nanomem.reproduce.sizing import at_flops, dense_of, flops


def at_rate(config: Config, rate: float) -> Config:
    """The config with another peak learning rate, and the other rates in proportion."""
    names = "learning_rate", "min_lr", "mem_lr"
    return config.replace(**{name: getattr(config, name) * rate / config.learning_rate for name in names})


def named(name: str, config: Config) -> Run:
    """A Run with a name that no other run of the model has."""
    balance = f", balance={config.moe_balance:g}" if config.ffn == "moe" else ""
    return Run(f"{name}, lr={config.learning_rate:g}{balance}, seed={config.seed}", config)


def candidates(base: Config) -> dict[str, list[Config]]:
    """What is tried for each model of a table, four configs each: rates; for memory also the values' rate and
    dropped lookups; for dense models another shape, wider in all parts or deeper; for the mixture another
    number of experts per token, or few experts.

    All have the FLOPs of base or, "dense, 2x", twice as many.
    """
    other_dropout = 0.0 if base.mem_dropout else 0.2
    other_k = 1 if base.moe_k == 2 else 2
    dense = base.replace(ffn="dense")
    moe = base.replace(ffn="moe")
    rate = base.learning_rate
    return {
        "dense": [*rated(dense, [rate / 2, rate]), dense_of(base, 1), deeper(dense)],
        "dense, 2x": dense_candidates(base, 2),
        "mixture of experts": [*rated(moe, [rate / 2, rate]), moe.replace(moe_k=other_k),
                               moe.replace(moe_experts=16)],
        "Memory+": [*rated(base, [rate, 2 * rate]), base.replace(mem_lr=base.mem_lr / 2),
                    base.replace(mem_dropout=other_dropout)],
    }


def dense_candidates(base: Config, times: float) -> list[Config]:
    """What is tried for a dense model of `times` as many FLOPs: three rates, and a deeper model."""
    wider, rate = dense_of(base, times), base.learning_rate
    return [*rated(wider, [rate / 4, rate / 2, rate]), deeper(wider)]


def deeper(dense: Config) -> Config:
    """The config with two more layers, and narrower feed-forward layers to make up for them."""
    return at_flops(dense.replace(n_layer=dense.n_layer + 2), flops(dense))


def rated(config: Config, rates: list[float]) -> list[Config]:
    """The config with each of these peak learning rates; see `at_rate`."""
    return [at_rate(config, rate) for rate in rates]


def search(tries: dict[str, list[Config]], trainer: Trainer, cost: str) -> dict[str, Config]:
    """{name: the best of its configs}: the one with the lowest `cost`, a metric, after half of the updates on
    a seed that no table reports.
    """
    runs = {}
    for name, configs in tries.items():
        for i, config in enumerate(configs):
            half = config.replace(max_iters=config.max_iters // 2, seed=config.seed - 1)
            runs[name, i] = Run(f"{name}, try {i}", half)
    metrics = trainer.train(list(runs.values()), if_diverged={cost: math.inf})
    best = {}
    for name, configs in tries.items():
        costs = [metrics[runs[name, i].name][cost] for i in range(len(configs))]
        best[name] = configs[costs.index(min(costs))]
    return best
