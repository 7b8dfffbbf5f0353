"""The learning rate of each model, so that none is compared at another's best."""

import math

from nanomem.config import Config
from nanomem.reproduce.presets import Preset
from nanomem.reproduce.runs import Run, Trainer
from nanomem.reproduce.sizing import at_flops, dense_of, flops


def at_rate(config: Config, rate: float) -> Config:
    """The config with another peak learning rate, and the other rates in proportion."""
    names = "learning_rate", "min_lr", "mem_lr"
    return config.replace(**{name: getattr(config, name) * rate / config.learning_rate for name in names})


def choose_rates(models: dict[str, Config], seeds: list[int], preset: Preset, trainer: Trainer) -> dict:
    """{name: Config} with the best learning rate of each model, by the validation loss.

    For facts, that is the loss on questions that are neither taught nor reported. The tables' rate keeps its
    proportion to the core's. If the highest or lowest rate is the best, one twice as high or half as low is
    tried too, and so on. Then the weight of the mixture's balance loss is chosen in the same way. All runs
    are of full length, since the rate that is best after a quarter of it is not the best at the end.

    A model whose rate is settled goes on to its other seeds while the rest is still searching, so that no
    worker waits.
    """
    tries = {}
    for name, config in models.items():
        tries[name] = [at_rate(config, rate) for rate in preset.rates]
    settled = []
    while True:
        best = best_of(tries, settled, trainer)
        is_done = True
        for name, config in best.items():
            more = next_tries(config, tries[name], preset)
            tries[name] += more
            if more:
                is_done = False
            else:
                settled += [named(name, config.replace(seed=seed)) for seed in seeds]
        if is_done:
            return best


def next_tries(best: Config, tried: list[Config], preset: Preset) -> list[Config]:
    """Configs to try next; [] if the best of those tried is settled."""
    rate = best.learning_rate
    rates = {config.learning_rate for config in tried}
    if len(rates) > 1 and rate == max(rates):
        return [at_rate(best, rate * 2)]
    if len(rates) > 1 and rate == min(rates):
        return [at_rate(best, rate / 2)]
    balances = {config.moe_balance for config in tried}
    if best.ffn == "moe" and len(balances) == 1:
        return [best.replace(moe_balance=best.moe_balance * factor) for factor in preset.balances]
    return []


def best_of(tries: dict[str, list[Config]], others: list[Run], trainer: Trainer) -> dict[str, Config]:
    """Of each name's configs, the one with the lowest validation loss. Trains other runs at the same time."""
    runs = {run.name: run for run in others}  # by name, since a run can be in both
    for name, configs in tries.items():
        if len(configs) > 1:
            runs |= {run.name: run for run in (named(name, config) for config in configs)}
    metrics = trainer.train(list(runs.values()), if_diverged={"val_loss": math.inf})

    def loss(name, config):
        return metrics[named(name, config).name]["val_loss"] if len(tries[name]) > 1 else 0.0

    return {name: min(configs, key=lambda config: loss(name, config)) for name, configs in tries.items()}


def named(name: str, config: Config) -> Run:
    """A Run whose name tells apart all runs of a model."""
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
    dense, wider = base.replace(ffn="dense"), dense_of(base, 2)
    moe = base.replace(ffn="moe")
    rate = base.learning_rate
    return {
        "dense": [*rated(dense, [rate / 2, rate]), dense_of(base, 1), deeper(dense)],
        "dense, 2x": [*rated(wider, [rate / 4, rate / 2, rate]), deeper(wider)],
        "mixture of experts": [*rated(moe, [rate / 2, rate]), moe.replace(moe_k=other_k),
                               moe.replace(moe_experts=16)],
        "Memory+": [*rated(base, [rate, 2 * rate]), base.replace(mem_lr=base.mem_lr / 2),
                    base.replace(mem_dropout=other_dropout)],
    }


def deeper(dense: Config) -> Config:
    """The config with two more layers, and narrower feed-forward layers to make up for them."""
    return at_flops(dense.replace(n_layer=dense.n_layer + 2, ffn_hidden=1), flops(dense))


def rated(config: Config, rates: list[float]) -> list[Config]:
    """The config with each of these peak learning rates; see `at_rate`."""
    return [at_rate(config, rate) for rate in rates]


def search(tries: dict[str, list[Config]], trainer: Trainer) -> dict[str, Config]:
    """{name: the best of its configs}, after half of the updates on a seed that no table reports.

    The best is the one to which answers cost least, over questions that are neither taught nor reported. (The
    validation loss also counts the questions' tokens, so a model that knows more names looks too good by it.)
    """
    runs = {}
    for name, configs in tries.items():
        for i, config in enumerate(configs):
            half = config.replace(max_iters=config.max_iters // 2, seed=config.seed - 1)
            runs[name, i] = Run(f"{name}, try {i}", half)
    metrics = trainer.train(list(runs.values()), if_diverged={"answer_nll_select": math.inf})
    cost = lambda name, i: metrics[runs[name, i].name]["answer_nll_select"]
    best = {}
    for name, configs in tries.items():
        best[name] = configs[min(range(len(configs)), key=lambda i: cost(name, i))]
    return best
