"""
The paper's claims, small: trains the models of a table or figure with train.py, and writes it.

    python -m nanomem.reproduce table1       dense models, mixture, PEER, plain memory and Memory+
    python -m nanomem.reproduce scaling      recall against the number of slots, at equal FLOPs
    python -m nanomem.reproduce ablations    Memory+ with one thing changed at a time
    python -m nanomem.reproduce text         dense, mixture and Memory+ on text (--text=data/wikitext-103)
    python -m nanomem.reproduce slots        which slots facts use in a model (--run=out/people-memory)

- equal terms: the same facts, tokens, batches and tokenizer; each model's learning rate is the best of a
  small sweep, by the loss on questions that are never reported
- a run that is done is not done again unless its settings or the program changed; one that was stopped goes
  on
- writes assets/NAME.json, NAME.md and NAME.png (pip install -e '.[plot]')
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nanomem import checkpoint, optim
from nanomem.checkpoint import read_json, write_text
from nanomem.cli import UserError, one_line_errors, parse, safe_streams, setting
from nanomem.config import Config, keep_freed_memory, pick_device
from nanomem.data import open_data
from nanomem.datasets import DATASETS
from nanomem.model import GPT
from nanomem.observe import SlotUsage, observe_lookups

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Settings:
    """The command line."""

    arguments = "(table1 | scaling | ablations | text | slots) "
    preset: str = setting(
        "laptop",
        "laptop: 2 cores, about an hour a command; gpu: one H100",
        ("laptop", "gpu"),
        section="Reproduction",
    )
    data: str = setting("people", "what the facts are about", ("people", "world"))
    text: str = setting(
        "data/wikitext-103",
        "what text is trained on: shards that data/prepare.py made, or a text file",
        path=True,
    )
    seeds: int = setting(3, "runs of each model of table1, scaling and text")
    run: str = setting("out/people-memory", "folder of the trained model that slots looks into", path=True)
    out_dir: str = setting("out/reproduce", "folder for the runs", path=True)
    assets: str = setting("assets", "folder for tables and figures", path=True)


@dataclass(frozen=True)
class Preset:
    """What all models of a preset have in common, and how many runs go side by side."""

    base: dict  # settings of train.py
    workers: int  # runs at a time
    threads: int  # CPU threads of each; 0 for torch's own number
    rates: tuple  # learning rates that are tried
    text: dict  # settings of the runs of text, where they differ
    balances: tuple = (
        0.1,
        10,
    )  # and weights of the mixture's balance loss beside the default, in multiples of it


PRESETS = {
    # The default model on 2.6 million tokens about 1,500 people: 70 kbit, to cores of 110,000 parameters,
    # with 262,144 slots.
    "laptop": Preset(
        dict(n_entities=1500, max_iters=1280),
        workers=2,
        threads=1,
        rates=(4e-3, 8e-3, 1.6e-2),
        text=dict(
            n_layer=4,
            n_head=4,
            n_embd=64,
            block_size=128,
            batch_size=16,
            max_iters=1000,
            eval_interval=250,
            eval_iters=50,
            mem_layers="1,3",
            mem_n_keys=256,
        ),
    ),
    # 100 million tokens of 200,000 people: 9.3 Mbit, to cores of 60 million parameters, with 1M slots.
    "gpu": Preset(
        dict(
            n_entities=200_000,
            n_layer=12,
            n_head=10,
            n_embd=640,
            block_size=512,
            batch_size=64,
            max_iters=3100,
            eval_interval=620,
            mem_layers="3,7,11",
            mem_n_keys=1024,
            mem_heads=4,
            mem_knn=32,
            mem_k_dim=256,
            learning_rate=1e-3,
            min_lr=1e-4,
            mem_lr=1e-2,
            moe_k=2,
        ),
        workers=1,
        threads=0,
        rates=(5e-4, 1e-3, 2e-3),
        text=dict(eval_iters=50),
    ),
}


# ------------------------------------------------------------------------------------------------
# Models on equal terms


def flops(config):
    """FLOPs a token of the model that a Config describes, counted without making it."""
    with torch.device("meta"):
        return GPT(config).flops_per_token()


def at_flops(config, target):
    """The config with the feed-forward width at which its model takes `target` FLOPs a token: they grow
    evenly with it.

    Raises UserError where that is more than 2% off, since other parts take too many or too few.
    """
    one, two = (flops(config.replace(ffn_hidden=hidden)) for hidden in (1, 2))
    config = (
        config.replace(ffn_hidden=max(1, 1 + round((target - one) / (two - one)))) if two > one else config
    )
    if abs(flops(config) / target - 1) > 0.02:
        raise UserError(f"no feed-forward width gives {target:,} FLOPs a token beside the rest of {config}")
    return config


def at_flops_if_possible(config, target):
    """The same, or the config as it is where nothing is left to narrow: its row shows other FLOPs."""
    with contextlib.suppress(UserError):
        return at_flops(config, target)
    return config


def dense_of(config, times):
    """A dense model of `times` as many FLOPs a token as the config's: wider in all its parts."""
    target, step = times * flops(config), 2 * config.n_head
    widths = range(config.n_embd, 64 * config.n_embd, step)
    dense = next(c for c in (sized_as_llama(config, n) for n in widths) if flops(c) > target)
    return at_flops(dense.replace(n_embd=dense.n_embd - step), target)


def sized_as_llama(config, n_embd):
    """A dense config of this width."""
    return config.replace(ffn="dense", n_embd=n_embd, ffn_hidden=max(8, 8 * round(n_embd / 3)))


# ------------------------------------------------------------------------------------------------
# Runs


@dataclass(eq=False)
class Run:
    """One training of a model."""

    name: str
    config: Config

    def folder(self, out_dir):
        """Where it goes: a folder whose name changes when its settings, the program or torch do, or that of
        the same run by another name.
        """
        same = {
            key: value
            for key, value in dataclasses.asdict(self.config).items()
            if key not in ("out_dir", "resume")
        }
        digest = short_hash(same, program(), torch.__version__, *contents(self.config.data))
        own = Path(out_dir) / f"{''.join(c if c.isalnum() or c in '.=' else '-' for c in self.name)}-{digest}"
        return own if own.exists() else next(Path(out_dir).glob(f"*-{digest}"), own)

    def size(self):
        """Its share of the work, for the progress bar: FLOPs, and as much again for what is not
        multiplying.
        """
        return self.config.max_iters * self.config.batch_size * (flops(self.config) + 3e5)


def short_hash(*things):
    """Eight digits that tell JSON's things from others."""
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:8]


@functools.cache
def contents(data):
    """A hash of a text's tokens, in a list; facts come with the program."""
    return [] if data in DATASETS else [open_data(Config(data=data)).digest()]


@functools.cache
def program():
    """A hash of all that decides what a run computes: train.py and what it imports, without comments and
    docstrings, and the data.
    """
    total = hashlib.sha256()
    sources = [ROOT / "train.py", ROOT / "kernels.py"] + [
        path for path in (ROOT / "nanomem").glob("*.py") if path.stem not in ("bench", "export", "reproduce")
    ]
    for path in sorted(sources):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if (
                isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                and ast.get_docstring(node) is not None
            ):
                del node.body[0]
        total.update(ast.dump(tree).encode())
    for path in sorted((*(ROOT / "data" / "people").iterdir(), *(ROOT / "data" / "world").iterdir())):
        total.update(path.read_bytes() if path.suffix in (".json", ".tiktoken", ".gz") else b"")
    return total.hexdigest()


def rows_of(folder):
    """metrics.jsonl so far, as dicts."""
    rows = []
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    return rows


def train(runs, preset, out_dir, console, diverged=None):
    """Trains what is not done yet, preset.workers at a time, and returns {run name: the last line of its
    metrics}.

    diverged: what stands for that where training came apart. Raises UserError with the last line of a run
    that failed, or without it did that.
    """
    folders = {run: run.folder(out_dir) for run in runs}
    results = {
        run: rows[-1]
        for run in runs
        if (rows := rows_of(folders[run])) and rows[-1]["iter"] == run.config.max_iters
    }
    running, sizes = {}, {run: run.size() for run in runs}
    waiting = sorted(
        (run for run in runs if run not in results), key=sizes.get, reverse=True
    )  # the longest first: less time with one worker left
    bar = Progress(
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=600,
    )
    task = bar.add_task("", total=sum(sizes.values()), completed=sum(sizes[run] for run in results))
    try:
        with bar:
            while waiting or running:
                while waiting and len(running) < preset.workers:
                    run = waiting.pop(0)
                    running[run] = start(run, folders[run], preset)
                time.sleep(0.5)
                for run, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[run]
                    if process.returncode:
                        log = Path(f"{folders[run]}.log")
                        said = log.read_text(encoding="utf-8", errors="replace").strip()
                        if not (diverged and said.endswith("A lower learning_rate or mem_lr may help.")):
                            raise UserError(
                                f"{run.name} failed: "
                                f"{said.splitlines()[-1] if said else process.returncode} (see {log})"
                            )
                    results[run] = diverged if process.returncode else rows_of(folders[run])[-1]
                work = {
                    run: sizes[run]
                    * (rows[-1]["iter"] / run.config.max_iters if (rows := rows_of(folders[run])) else 0)
                    for run in running
                }
                done = sum(work.values()) + sum(sizes[run] for run in results)
                bar.update(
                    task,
                    completed=done,
                    description=f"{len(results)}/{len(runs)} runs; now "
                    + ", ".join(run.name for run in running),
                )
    finally:
        for process in running.values():  # Ctrl-C has reached them too; they save and end
            process.terminate()
        for process in running.values():
            process.wait()
    return {run.name: results[run] for run in runs}


def start(run, folder, preset):
    """train.py in a process of its own, going on where an earlier one was stopped."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    default = Config()
    arguments = [
        f"--{name}={value}"
        for name, value in dataclasses.asdict(run.config).items()
        if value != getattr(default, name)
    ]
    environment = os.environ | ({"OMP_NUM_THREADS": str(preset.threads)} if preset.threads else {})
    resume = ["--resume"] if checkpoint.folders(folder) else []
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments, f"--out_dir={folder}", *resume],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
        )


# ------------------------------------------------------------------------------------------------
# Pace


def pace(configs, steps=4, rounds=6):
    """Seconds a training step takes, {name: median}, for each of {name: Config}: side by side, a few steps
    of one model after a few of the next, with all of the machine and nothing else running.
    """
    device, made = pick_device("auto"), {}
    data = open_data(next(iter(configs.values())))  # all have the same
    for name, config in configs.items():
        with device:
            model = GPT(config)
        made[name] = (
            model,
            optim.build_optimizer(
                model, config.learning_rate, config.mem_lr, config.weight_decay, mem_beta2=config.mem_beta2
            ),
            [t.to(device) for t in data.batch("train", 0, config.batch_size)],
        )
    seconds = {name: [] for name in configs}
    for turn in range(rounds + 1):
        for name, (model, optimizers, (x, y)) in made.items():
            started = time.perf_counter()
            for _ in range(steps):
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                    loss = model(x, y)[1]
                loss.backward()
                optim.clip_gradients(model, 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            loss.item()  # waits for a GPU
            seconds[name] += (
                [(time.perf_counter() - started) / steps] if turn else []
            )  # the first turn warms up
    return {name: statistics.median(times) for name, times in seconds.items()}


# ------------------------------------------------------------------------------------------------
# The learning rate of each model


def at_rate(config, rate):
    """The config with another peak learning rate, and others in proportion."""
    return config.replace(
        **{
            key: getattr(config, key) * rate / config.learning_rate
            for key in ("learning_rate", "min_lr", "mem_lr")
        }
    )


def choose_rates(models, seeds, preset, out_dir, console):
    """{name: Config} with the best learning rate of each model, by the loss on questions that are neither
    taught nor reported; the tables' rate keeps its proportion to it. Where the highest or lowest rate is
    the best, one twice as high or half as low is tried too, until it isn't. Then the weight of the
    mixture's balance loss. Runs are of full length: after a quarter of it no model answers anything yet,
    and the rate that is best there is not the best in the end. Runs of the other seeds begin where a model
    is settled, so that no worker waits.
    """
    tries, settled = (
        {name: [at_rate(config, rate) for rate in preset.rates] for name, config in models.items()},
        [],
    )
    while True:
        best = best_of(tries, settled, preset, out_dir, console)
        more = {name: further(best[name], tries[name], preset) for name in models}
        if not any(more.values()):
            return best
        tries = {name: tries[name] + more[name] for name in models}
        settled = [
            named(name, best[name].replace(seed=seed)) for name in models if not more[name] for seed in seeds
        ]


def further(best, tried, preset):
    """Configs to try after these, of which one was the best; [] where it is settled."""
    rates = {config.learning_rate for config in tried}
    if len(rates) > 1 and best.learning_rate in (min(rates), max(rates)):
        return [at_rate(best, best.learning_rate * (2 if best.learning_rate == max(rates) else 0.5))]
    if best.ffn == "moe" and len({config.moe_balance for config in tried}) == 1:
        return [best.replace(moe_balance=best.moe_balance * factor) for factor in preset.balances]
    return []


def best_of(tries, others, preset, out_dir, console):
    """{name: the config of its list with the lowest validation loss}; the other runs are trained beside."""
    tried = {
        name: [named(name, config) for config in configs]
        for name, configs in tries.items()
        if len(configs) > 1
    }
    runs = {run.name: run for run in sum(tried.values(), others)}  # each once
    results = train(list(runs.values()), preset, out_dir, console, diverged={"val_loss": math.inf})
    best = {
        name: min(runs, key=lambda run: results[run.name]["val_loss"]).config for name, runs in tried.items()
    }
    return {name: best.get(name, configs[0]) for name, configs in tries.items()}


def named(name, config):
    """A Run whose name tells what may differ between runs of a model."""
    balance = f", balance={config.moe_balance:g}" if config.ffn == "moe" else ""
    return Run(f"{name}, lr={config.learning_rate:g}{balance}, seed={config.seed}", config)


# ------------------------------------------------------------------------------------------------
# The commands


def seeds_of(base, settings):
    """The seeds of a command that takes --seeds."""
    return range(base.seed, base.seed + settings.seeds)


def trained(models, seeds, preset, out_dir, console):
    """{name: the last metrics of its runs, one a seed}; of a seed, all models see the same people in the
    same batches.
    """
    runs = {
        (name, seed): named(name, config.replace(seed=seed))
        for seed in seeds
        for name, config in models.items()
    }
    results = train(list(runs.values()), preset, out_dir, console)
    return {name: [results[runs[name, seed].name] for seed in seeds] for name in models}


def described(name, config):
    """What a row of any table says of a model."""
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


def measured(results):
    """The columns that runs of a model give, each a list over them."""
    return {"recall": [r["recall"] for r in results], "recall_taught": [r["recall_taught"] for r in results],
            "loss": [r["val_loss"] for r in results], "recall_tail": [r["recall_tail"] for r in results]}


def table1(base, preset, settings, out_dir, console):
    """The rows of table1."""
    target = flops(base)
    one_layer = base.memory_layer_numbers()[len(base.memory_layer_numbers()) // 2]
    plain = base.replace(mem_gated=False, mem_qk_norm=False, mem_layers=str(one_layer))
    models = {
        "dense": base.replace(ffn="dense"),
        "dense, 2x": dense_of(base, 2),
        "dense, 4x": dense_of(base, 4),
        "mixture of experts": base.replace(ffn="moe"),
        "PEER": base.replace(ffn="peer"),
        "plain memory": at_flops(plain, target),
        "Memory+": base,
    }
    models = choose_rates(models, seeds_of(base, settings), preset, out_dir, console)
    results = trained(models, seeds_of(base, settings), preset, out_dir, console)

    shapes = {name: dataclasses.asdict(config) for name, config in models.items()}
    seconds = cached(
        out_dir / f"pace-{short_hash(shapes, program(), machine(), torch.get_num_threads())}.json",
        lambda: pace(models),
    )
    equal_time = {}
    for name, config in models.items():
        iters = max(1, round(config.max_iters * seconds["Memory+"] / seconds[name]))
        equal_time[name] = Run(f"{name}, equal time", config.replace(max_iters=iters, eval_interval=iters))
    equal_time["Memory+"] = named("Memory+", models["Memory+"])
    in_equal_time = train(list(equal_time.values()), preset, out_dir, console)
    return [
        described(name, config)
        | measured(results[name])
        | {
            "seconds": seconds[name] * config.max_iters,
            "recall_equal_time": in_equal_time[equal_time[name].name]["recall"],
        }
        for name, config in models.items()
    ]


def scaling(base, preset, settings, out_dir, console):
    """The rows of scaling: Memory+ from 1k to 1M slots, and the dense model of the same FLOPs. What the
    scores of fewer keys save, the feed-forward layers have; where those of more keys take more than these
    have, the model stays above.
    """
    models = {"no memory": base.replace(ffn="dense")}
    for n_keys in (32, 64, 128, 256, 512, 1024):
        if n_keys >= base.mem_knn:
            config = base.replace(mem_n_keys=n_keys)
            models[f"{n_keys**2:,} slots"] = (
                config if n_keys == base.mem_n_keys else at_flops_if_possible(config, flops(base))
            )
    results = trained(models, seeds_of(base, settings), preset, out_dir, console)
    return [
        described(name, config)
        | {"slots": config.mem_n_keys**2 if config.ffn == "memory" else 0}
        | measured(results[name])
        for name, config in models.items()
    ]


def ablations(base, preset, settings, out_dir, console):
    """The rows of ablations: Memory+ with one thing changed, at its FLOPs where a feed-forward width can
    make up for the change.
    """
    memory, last = base.memory_layer_numbers(), base.n_layer - 1
    several = memory if len(memory) > 1 else [last - 1, last]
    listed, every = ",".join(map(str, several)), ",".join(map(str, range(base.n_layer)))
    heads, knn, k_dim, v_dim = (
        base.mem_heads,
        base.mem_knn,
        base.mem_k_dim or base.n_embd,
        base.mem_v_dim or base.n_embd,
    )
    changes = {
        "without gate": dict(mem_gated=False),
        "without qk-norm": dict(mem_qk_norm=False),
        "without both": dict(mem_gated=False, mem_qk_norm=False),
        **{f"layer {i} only": dict(mem_layers=str(i)) for i in range(base.n_layer)},
        f"layers {listed}": dict(mem_layers=listed),
        f"layers {listed}, values not shared, as many in all": dict(
            mem_layers=listed, mem_share_values=False, mem_n_keys=round(base.mem_n_keys / len(several) ** 0.5)
        ),
        f"layers {every}": dict(mem_layers=every),
        **{
            f"heads x knn: {h} x {k}": dict(
                mem_heads=h, mem_knn=k, mem_k_dim=k_dim * heads // h
            )  # queries as wide in all
            for h, k in ((2 * heads, knn // 2), (4 * heads, knn // 4), (heads, knn // 4), (heads, 4 * knn))
        },
        **{f"keys of {dim}": dict(mem_k_dim=dim) for dim in (k_dim // 2, k_dim * 2)},
        **{f"values of {dim}": dict(mem_v_dim=dim) for dim in (v_dim // 2, v_dim * 2)},
        **{f"value learning rate x {factor:g}": dict(mem_lr=base.mem_lr * factor) for factor in (0.3, 3)},
        **{f"second moment: beta2 = {beta2:g}": dict(mem_beta2=beta2) for beta2 in (0, 0.999)},
    }
    same = at_flops(base, flops(base))
    changed = {
        name: at_flops_if_possible(base.replace(**change), flops(base)) for name, change in changes.items()
    }
    models = {"Memory+": base} | {name: config for name, config in changed.items() if config != same}
    results = trained(models, [base.seed], preset, out_dir, console)
    return [described(name, config) | measured(results[name]) for name, config in models.items()]


def text(base, preset, settings, out_dir, console):
    """The rows of text."""
    base = base.replace(data=settings.text, **preset.text)
    base.vocab_size = open_data(base).encoding.n_vocab
    models = {
        "dense": base.replace(ffn="dense"),
        "mixture of experts": base.replace(ffn="moe"),
        "Memory+": base,
    }
    models = choose_rates(models, seeds_of(base, settings), preset, out_dir, console)
    results = trained(models, seeds_of(base, settings), preset, out_dir, console)
    return [
        described(name, config)
        | {
            "loss": [r["val_loss"] for r in results[name]],
            "bits_per_byte": [r["bits_per_byte"] for r in results[name]],
        }
        for name, config in models.items()
    ]


def cached(path, compute):
    """compute(), or what it gave before."""
    if not path.exists():
        value = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(value))
    return read_json(path)


# ------------------------------------------------------------------------------------------------
# Looking into a memory


def overlap(one, other):
    """The share of two tokens' lookups that is in common: the sum over slots of the smaller weight, from 0
    to 1 a head.

    one, other: (indices (heads, knn), weights (heads, knn)); returns the mean over heads.
    """
    found = [Counter(), Counter()]  # slot -> its weight in all heads
    for weight_of, (indices, weights) in zip(found, (one, other)):
        for slot, weight in zip(indices.flatten().tolist(), weights.flatten().tolist()):
            weight_of[slot] += weight
    return (found[0] & found[1]).total() / len(one[0])


@torch.no_grad()
def slots(run, facts_looked_at=100, batches=20):
    """What a trained model's memory layers read: rows {"layer", "share used", "kl", "sorted", "overlaps"},
    and after how many updates.

    share used and kl (Lample et al. 2019, section 4.4) are over `batches` training batches, sorted their
    weights a slot from high to low. overlaps[position][with] is the mean overlap of a fact's lookups, in a
    taught wording, with those in another taught wording, in a question, for another attribute of the
    entity, and for another entity; position "name" is the last token of the entity's name, where a memory
    can know the entity, and "answer" the last one before the answer, where it can know the fact. Raises
    UserError for a run without facts or memory.
    """
    folder, header, _ = checkpoint.newest(Path(run))
    if header is None:
        raise UserError(f"--run={run} has no checkpoint yet")
    config = Config.from_saved(header["config"], run)
    data = open_data(config, Path(run) / "tokenizer.tiktoken")
    model = GPT(config).eval()
    checkpoint.load(folder, model)
    if not data.facts or not model.memory_layers():
        raise UserError(
            f"--run={run} must be a run with facts and with memory layers, got data={config.data} "
            f"and ffn={config.ffn}"
        )
    numbers = {layer: number for number, layer in model.memory_layers().items()}

    usages = {number: SlotUsage() for number in numbers.values()}
    with observe_lookups(model, lambda layer, *read: usages[numbers[layer]](layer, *read)):
        for i in range(batches):
            model(data.batch("train", i * config.batch_size, config.batch_size)[0])
    rows = {
        number: {
            "layer": number,
            "share used": usage.usage(),
            "kl": usage.kl(),
            "overlaps": {"name": {}, "answer": {}},
            "sorted": sorted(next(iter(usage.weight.values())).tolist(), reverse=True),
        }
        for number, usage in usages.items()
    }

    def lookups(entity, wording):
        """{(layer, position): (indices, weights)} of a prompt."""
        sentences, read = data.sentences, {}
        before = sentences.pieces[wording][0]
        tokens = [sentences.end] + sentences.prompt(entity, wording)
        places = {"name": len(before) + len(sentences.names[bool(before)][entity]), "answer": len(tokens) - 1}
        with observe_lookups(
            model, lambda layer, indices, weights: read.update({numbers[layer]: (indices, weights)})
        ):
            model(torch.tensor([tokens]))
        return {
            (number, name): (indices[at], weights[at])
            for number, (indices, weights) in read.items()
            for name, at in places.items()
        }

    rng, sums = np.random.default_rng(0), Counter()
    attributes, entities = data.facts.attributes, len(data.facts.entities)
    for _ in range(facts_looked_at):
        entity, other, a = (
            int(rng.integers(entities)),
            int(rng.integers(entities)),
            int(rng.integers(len(attributes))),
        )
        taught = attributes[a].statements
        prompts = {"another entity": (other, taught[0])}
        prompts |= {"another taught wording": (entity, taught[1])} if len(taught) > 1 else {}
        prompts |= {"a question": (entity, attributes[a].questions[0])} if attributes[a].questions else {}
        prompts |= (
            {"another attribute": (entity, attributes[a - 1].statements[0])} if len(attributes) > 1 else {}
        )
        fact = lookups(entity, taught[0])
        for compared, prompt in prompts.items():
            for place, read in lookups(*prompt).items():
                sums[place, compared] += overlap(fact[place], read) / facts_looked_at
    for ((number, position), compared), value in sums.items():
        rows[number]["overlaps"][position][compared] = value
    return list(rows.values()), header["iteration"]


def pyplot():
    """matplotlib.pyplot, to draw into files. Raises UserError where it isn't installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("figures need matplotlib: pip install -e '.[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def show_slots(rows, path):
    """`slots` as a figure; returns it as Markdown."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 1 + len(rows), figsize=(4 + 3.6 * len(rows), 3.2))
    lines = [
        "| layer | slots used | KL from uniform, nats | at the token | overlap with: "
        + " | ".join(rows[0]["overlaps"]["name"])
        + " |"
    ]
    lines += ["| --- | ---: | ---: | --- |" + " ---: |" * len(rows[0]["overlaps"]["name"])]
    for row, axis in zip(rows, axes[1:]):
        used = [weight for weight in row["sorted"] if weight]
        total = sum(used)
        axes[0].loglog(
            range(1, len(used) + 1),
            [weight / total for weight in used],
            label=f"layer {row['layer']}: {row['share used']:.0%} used",
        )
        names = list(row["overlaps"]["name"])
        for i, (position, overlaps) in enumerate(row["overlaps"].items()):
            axis.barh(
                [j + 0.4 * i - 0.2 for j in range(len(names))],
                [overlaps[name] for name in names],
                0.38,
                label=f"at the {position}",
            )
            lines.append(
                f"| {row['layer']} | {row['share used']:.1%} | {row['kl']:.2f} | {position} | "
                + " | ".join(f"{overlaps[name]:.2f}" for name in names)
                + " |"
            )
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlim(0, 1)
        axis.set_title(f"layer {row['layer']}: lookups in common with", fontsize=9)
        axis.legend(fontsize=7)
    axes[0].set_xlabel("slots, most read first")
    axes[0].set_title("share of all weight", fontsize=9)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------
# Showing


def mean(numbers):
    """'71.2%', or with several numbers their mean and the farthest from it: '71.2% ± 1.3'."""
    middle = statistics.mean(numbers)
    return f"{middle:.1%}" + (
        f" ± {100 * max(abs(x - middle) for x in numbers):.1f}" if len(numbers) > 1 else ""
    )


def markdown(command, rows, about):
    """The rows as a Markdown table under the command and a line about it."""
    columns = {
        "model": lambda r: r["model"],
        "FLOPs a token": lambda r: f"{r['flops_per_token'] / 1e6:.3f} million",
        "parameters": lambda r: f"{r['params']:,}",
        "in tables or experts": lambda r: f"{r['mem_params']:,}",
    }
    if "recall" in rows[0]:
        columns |= {
            "recall": lambda r: mean(r["recall"]),
            "in a taught wording": lambda r: mean(r["recall_taught"]),
        }
    columns |= {"val loss": lambda r: f"{statistics.mean(r['loss']):.3f}"}
    if "bits_per_byte" in rows[0]:
        columns |= {
            "bits per byte, of each seed": lambda r: ", ".join(f"{x:.3f}" for x in r["bits_per_byte"]),
            "learning rate": lambda r: f"{r['learning_rate']:g}",
        }
    if "recall_equal_time" in rows[0]:
        columns |= {
            "learning rate": lambda r: f"{r['learning_rate']:g}",
            "seconds": lambda r: f"{r['seconds']:.0f}",
            "recall at equal wall-clock": lambda r: f"{r['recall_equal_time']:.1%}",
        }
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    lines += ["| " + " | ".join(text(row) for text in columns.values()) + " |" for row in rows]
    return "\n".join([f"`python -m nanomem.reproduce {command}`: {about}", "", *lines, ""])


def draw(command, rows, path):
    """The rows as a figure."""
    plt = pyplot()
    titles = {
        "recall": "recall of facts never asked about",
        "recall_taught": "recall in a taught wording",
        "loss": "validation loss",
        "bits_per_byte": "bits per byte of text",
    }
    if command == "scaling":
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
        points = [row for row in rows if row["slots"]]
        for axis, key in zip(axes, ("recall", "recall_taught", "loss")):
            axis.plot(
                [row["slots"] for row in points],
                [statistics.mean(row[key]) for row in points],
                "o-",
                color="#d9822b",
            )
            axis.axhline(statistics.mean(rows[0][key]), color="#8a9ba8", linestyle="--", label="no memory")
            for row in points:
                axis.plot([row["slots"]] * len(row[key]), row[key], "k.", markersize=4)
                axis.annotate(
                    f"{row['flops_per_token'] / 1e6:.2f}",
                    (row["slots"], statistics.mean(row[key])),
                    textcoords="offset points",
                    xytext=(0, 6),
                    fontsize=7,
                )
            axis.set_xscale("log", base=2)
            axis.set_xlabel("slots (at each point: million FLOPs a token)")
            axis.set_title(titles[key], fontsize=10)
            axis.legend(fontsize=7)
    else:
        keys = ("recall", "recall_taught") if "recall" in rows[0] else ("bits_per_byte",)
        figure, axes = plt.subplots(
            1, len(keys), figsize=(5 + 4 * len(keys), 0.32 * len(rows) + 1), sharey=True, squeeze=False
        )
        names = [row["model"] for row in rows]
        colors = ["#8a9ba8" if name.startswith(("dense", "mixture")) else "#d9822b" for name in names]
        for axis, key in zip(axes[0], keys):
            middle = [statistics.mean(row[key]) for row in rows]
            if (
                key == "bits_per_byte"
            ):  # hundredths apart: marks on an axis that needn't begin at 0, as that of bars must
                axis.scatter(middle, range(len(rows)), 400, colors, marker="|", linewidths=4)
                axis.margins(y=0.3)
            else:
                axis.barh(range(len(rows)), middle, color=colors)
            axis.set_xlabel(titles[key])
            for i, row in enumerate(rows):
                axis.plot(row[key], [i] * len(row[key]), "k.", markersize=4)
                if key == "recall" and "recall_equal_time" in row:
                    axis.plot(row["recall_equal_time"], i, "wD", markeredgecolor="black", markersize=5)
        axes[0][0].set_yticks(range(len(rows)), names)
        axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def machine():
    """A few words about this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        name = next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    return f"{os.cpu_count()} cores, {name}"


COMMANDS = {"table1": table1, "scaling": scaling, "ablations": ablations, "text": text}


def main():
    """One command."""
    arguments = sys.argv[1:]
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    settings = Settings(**parse(Settings, arguments))
    if command not in (*COMMANDS, "slots"):
        raise UserError(
            f"expected what to reproduce, one of {', '.join(COMMANDS)}, slots; got {command or 'nothing'}"
        )
    pyplot()  # told before hours of training, not after
    keep_freed_memory()
    if settings.seeds < 1:
        raise UserError(f"seeds must be 1 or more, got {settings.seeds}")
    preset, console, started = (
        PRESETS[settings.preset],
        Console(highlight=False, soft_wrap=True),
        time.monotonic(),
    )
    assets = Path(settings.assets)
    assets.mkdir(parents=True, exist_ok=True)
    if command == "slots":
        rows, iteration = slots(settings.run)
        shown = [
            {key: value for key, value in row.items() if key != "sorted"} for row in rows
        ]  # a number a slot: for the figure alone
        write_text(assets / "slots.json", json.dumps(shown, indent=1) + "\n")
        text = show_slots(rows, assets / "slots.png")
        write_text(
            assets / "slots.md",
            f"`python -m nanomem.reproduce slots --run={settings.run}`, {iteration:,} updates\n\n{text}",
        )
        console.print(text)
        return
    base, out_dir = Config(data=settings.data, **preset.base), Path(settings.out_dir) / settings.preset
    base.vocab_size = open_data(
        base
    ).encoding.n_vocab  # FLOPs are those of the tokenizer that train.py will use
    about = Run("seconds", base.replace(data=settings.text) if command == "text" else base)
    spent = out_dir / f"{command}-{about.folder('').name}.json"  # by it and those that were stopped before
    before = read_json(spent) or 0
    try:
        rows = COMMANDS[command](base, preset, settings, out_dir, console)
    finally:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_text(spent, json.dumps(before + time.monotonic() - started))
    minutes = read_json(spent) / 60
    changed = [
        f"--{f.name}={value}"
        for f in dataclasses.fields(Settings)
        if f.name in ("preset", "data", "text", "seeds") and (value := getattr(settings, f.name)) != f.default
    ]
    name = "-".join(
        [command] + [value for value in (settings.data, settings.preset) if value not in ("people", "laptop")]
    )
    text = markdown(
        " ".join([command, *changed]), rows, f"{machine()}, torch {torch.__version__}, {minutes:.0f} minutes"
    )
    write_text(assets / f"{name}.json", json.dumps(rows, indent=1) + "\n")
    write_text(assets / f"{name}.md", text)
    draw(command, rows, assets / f"{name}.png")
    console.print(text)


if __name__ == "__main__":
    safe_streams()
    with one_line_errors():
        main()
