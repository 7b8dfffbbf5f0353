"""
The tables and figures. Each function gets the recipe's Config and returns the rows: dicts of columns. What
was measured is a list with a number for each seed.
"""

import dataclasses
import hashlib
import itertools
import json
import statistics

import torch

from nanomem.checkpoint import read_json, write_text
from nanomem.config import Config
from nanomem.model import GPT
from nanomem.reproduce.pace import step_seconds
from nanomem.reproduce.runs import Run, Trainer, commit, machine, torch_version
from nanomem.reproduce.sizing import at_flops, flops
from nanomem.reproduce.sweeps import candidates, dense_candidates, named, rated, search


def train_seeds(models: dict[str, Config], seeds: list[int], trainer: Trainer) -> dict[str, list[dict]]:
    """{name: the last metrics of its runs, one for each seed}."""
    runs = runs_of(models, seeds)
    by_seed = zip(*runs.values())
    metrics = trainer.train(list(itertools.chain(*by_seed)))
    return {name: [metrics[run.name] for run in runs[name]] for name in models}


def runs_of(models: dict[str, Config], seeds: list[int]) -> dict[str, list[Run]]:
    """{name: its runs, one for each seed}. Runs of one seed see the same facts in the same batches."""
    return {name: [named(name, config.replace(seed=seed)) for seed in seeds]
            for name, config in models.items()}


def describe(name: str, config: Config) -> dict:
    """The columns that say what a model is."""
    with torch.device("meta"):
        model = GPT(config)
    core, sparse = model.count_parameters()
    return {
        "model": name,
        "params": core + sparse,
        "mem_params": sparse,
        "flops_per_token": model.flops_per_token(),
        "learning_rate": config.learning_rate,
        "mem_lr": config.mem_lr if config.ffn in ("memory", "peer") else None,
    }


def measured(runs: list[dict], **metrics: str) -> dict:
    """The columns of a model's runs: measured(runs, column=metric). Leaves out metrics that any run lacks."""
    found = {}
    for column, metric in metrics.items():
        if all(metric in run for run in runs):
            found[column] = [run[metric] for run in runs]
    return found


RECALL = dict(recall="recall", recall_taught="recall_taught", answer_nll="answer_nll",
              bits_known="bits_known", loss="val_loss", recall_tail="recall_tail")
# Models of facts are chosen by what answers cost, over questions that are neither taught nor reported. The
# validation loss also counts the questions' tokens, so a model that knows more names looks too good by it.
COST_OF_ANSWERS = "answer_nll_select"


def table1(base: Config, seeds: list[int], trainer: Trainer) -> list[dict]:
    """Dense, dense of twice the FLOPs, the mixture and Memory+ on facts."""
    models = search(candidates(base), trainer, COST_OF_ANSWERS)
    return compared(models, seeds, trainer, RECALL, "bits_known")


def text(base: Config, seeds: list[int], trainer: Trainer) -> list[dict]:
    """The same four on text."""
    models = search(candidates(base), trainer, "val_loss")
    columns = dict(loss="val_loss", bits_per_byte="bits_per_byte")
    return compared(models, seeds, trainer, columns, "bits_per_byte")


def compared(models: dict[str, Config], seeds: list[int], trainer: Trainer, columns: dict[str, str],
             metric: str) -> list[dict]:
    """The rows of models beside Memory+, with a t-test of the metric."""
    results = train_seeds(models, seeds, trainer)
    seconds = measured_pace(models, trainer)
    rows = []
    for name, config in models.items():
        row = describe(name, config) | measured(results[name], **columns)
        row["seconds"] = seconds[name] * config.max_iters
        if name != "Memory+" and len(results[name]) > 1:
            row["behind_memory"] = paired(results["Memory+"], results[name], metric)
        rows.append(row)
    return rows


def paired(ours: list[dict], theirs: list[dict], metric: str) -> dict:
    """How far ours are ahead, seed by seed: {"mean": of the differences, "t", "p": of a paired two-sided
    t-test, "n": seeds}.
    """
    from scipy.stats import ttest_rel

    a, b = [run[metric] for run in ours], [run[metric] for run in theirs]
    test = ttest_rel(a, b)
    return {"mean": statistics.mean(a) - statistics.mean(b), "t": float(test.statistic),
            "p": float(test.pvalue), "n": len(a)}


def curves(base: Config, seeds: list[int], trainer: Trainer) -> list[dict]:
    """Recall and bits while training: the models of table1, and Memory+ and dense trained three times as
    long.
    """
    models = search(candidates(base), trainer, COST_OF_ANSWERS)
    for name in ("Memory+", "dense"):
        config = models[name]
        models[f"{name}, three times as long"] = config.replace(max_iters=3 * config.max_iters)
    results = train_seeds(models, seeds, trainer)
    rows = []
    for name, runs in runs_of(models, seeds).items():
        evaluations = [trainer.evaluations(run) for run in runs]
        row = describe(name, models[name]) | measured(results[name], **RECALL)
        row["tokens"] = [0] + [evaluation["tokens"] for evaluation in evaluations[0]]
        for key in ("recall", "recall_taught", "bits_known"):
            row[f"{key}_curve"] = [[0.0] + [found[key] for found in seed] for seed in evaluations]
        rows.append(row)
    return rows


def measured_pace(models, trainer):
    """Seconds of each model's training step on this machine, measured once a commit: {name: seconds}."""
    shapes = {name: dataclasses.asdict(config) for name, config in models.items()}
    measured_on = json.dumps([shapes, commit(), torch_version(), machine(), torch.get_num_threads()])
    path = trainer.out_dir / f"pace-{hashlib.sha256(measured_on.encode()).hexdigest()[:8]}.json"
    if not path.exists():
        trainer.out_dir.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(step_seconds(models)))
    return read_json(path)


def scaling(base: Config, seeds: list[int], trainer: Trainer) -> list[dict]:
    """Memory+ of six layers from 1k to 1M slots, all at the rate that is best for base's slots. Nothing else
    changes, so FLOPs rise by the scores of the keys. The dense model has about the FLOPs of the largest.
    """
    three = three_of_six(base)
    sizes = [n_keys for n_keys in (32, 64, 128, 256, 512, 1024) if n_keys >= base.mem_knn]
    # Rounded, so that night's is table 1's dense model of twice the FLOPs and isn't trained again.
    times = round(flops(three.replace(mem_n_keys=sizes[-1])) / flops(base), 1)
    rates = [base.learning_rate / 2, base.learning_rate]
    tries = {"dense": dense_candidates(base, times), "memory": rated(three, rates)}
    models = search(tries, trainer, COST_OF_ANSWERS)
    memory = models.pop("memory")
    for n_keys in sizes:
        models[f"{n_keys**2:,} slots"] = memory.replace(mem_n_keys=n_keys)
    results = train_seeds(models, seeds, trainer)
    rows = []
    for name, config in models.items():
        slots = {"slots": config.mem_n_keys**2 if config.ffn == "memory" else 0}
        rows.append(describe(name, config) | slots | measured(results[name], **RECALL))
    return rows


def three_of_six(base: Config) -> Config:
    """The paper's configuration, small: six layers, of which three read the memory."""
    three = base.replace(n_layer=6, mem_layers="1,3,5")
    return at_flops(three, flops(three))  # which writes its width out


def layers(base: Config, seeds: list[int], trainer: Trainer) -> list[dict]:
    """One and three memory layers in a model of six layers, beside the dense model; and three layers with a
    table of a third each instead of one that they share. Each has the better of two rates.
    """
    six = base.replace(n_layer=6)
    three = three_of_six(base)
    apart = three.replace(mem_share_values=False, mem_n_keys=round(three.mem_n_keys / 3**0.5))
    models = {
        "dense": six.replace(ffn="dense"),
        "one memory layer": six.replace(mem_layers="5"),
        "three, one shared table": three,
        "three, a table of a third each": apart,
    }
    rates = [base.learning_rate / 2, base.learning_rate]
    target = flops(three)
    tries = {name: rated(at_flops(config, target), rates) for name, config in models.items()}
    models = search(tries, trainer, COST_OF_ANSWERS)
    results = train_seeds(models, seeds, trainer)
    return [describe(name, config) | measured(results[name], **RECALL) for name, config in models.items()]


def ablations(base: Config, seeds: list[int], trainer: Trainer) -> list[dict]:
    """Memory+ with one thing changed at a time. Nothing makes up for the FLOPs, which are nearly equal."""
    models = {"Memory+": base}
    for name, change in ablation_changes(base).items():
        models[name] = base.replace(**change)
    results = train_seeds(models, seeds, trainer)
    return [describe(name, config) | measured(results[name], **RECALL) for name, config in models.items()]


def ablation_changes(base: Config) -> dict[str, dict]:
    """{name: the settings that it changes}."""
    heads, knn, k_dim = base.mem_heads, base.mem_knn, base.mem_k_dim or base.n_embd
    changes = {
        "without gate": dict(mem_gated=False),
        "without qk-norm": dict(mem_qk_norm=False),
    }
    for k in (knn // 4, 2 * knn):
        changes[f"k {k}"] = dict(mem_knn=k)
    for factor in (2, 4):
        # All heads together read as many slots, and their queries are as wide.
        changes[f"{factor * heads} heads of k {knn // factor}"] = dict(
            mem_heads=factor * heads, mem_knn=knn // factor, mem_k_dim=k_dim // factor)
    for factor in (0.3, 3):
        changes[f"values' rate x {factor:g}"] = dict(mem_lr=base.mem_lr * factor)
    return changes


COMMANDS = {"curves": curves, "table1": table1, "scaling": scaling, "layers": layers,
            "ablations": ablations, "text": text}
