"""
What a model forgets while it is taught something new, by what is trained: `reproduce forgetting`.

A model that knows 1,500 people is taught 200 more. Each method trains the same model on the same batches.
After some updates the model is asked the new facts and the old ones, in questions that neither training has
asked. Then ten such sets are taught one after another.
"""

import dataclasses
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from nanomem import optim, recall, teaching
from nanomem.config import DESCRIBES_DATA, Config
from nanomem.data import FactData, named_facts, open_data
from nanomem.facts import ASKED, REPORT
from nanomem.model import GPT
from nanomem.observe import observe_lookups
from nanomem.reproduce.lessons import best_try, read_off, result_path, saved_or_run
from nanomem.reproduce.lora import add_lora
from nanomem.reproduce.runs import COMPUTATION, torch_version

ENOUGH = 0.9  # of the new facts: where methods are compared
EVALUATED_AT = (5, 10, 20, 40, 70, 100, 150, 200)  # updates
N_PEOPLE, BATCH_SIZE = 200, 32
SWEEP_SEED = 1336  # of the new people with which rates are chosen
ROUNDS, ROUND_UPDATES = 10, 100


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to teach a model.

    Args:
        model: "memory" or "dense".
        train: "all", "values", "core", or "lora".
        rates: peak learning rates to try. The tables' values get VALUES_RATE times this one in "all".
        rank: of LoRA.
        mem_idf, top_slots, rehearse: as train.py's settings mem_idf, mem_top_slots and rehearse.
    """

    model: str
    train: str
    rates: tuple[float, ...]
    rank: int = 0
    mem_idf: float = 0.0
    top_slots: int = 0
    rehearse: float = 0.0


VALUES_RATE = 10  # of "all": the values' rate over the core's. The default run has 3.75.
CORE_RATES = (2.5e-4, 1e-3, 4e-3, 1.6e-2)
LORA_RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2)
VALUE_RATES = (1e-2, 2e-2, 4e-2, 8e-2)
SPARING_RATES = (8e-2, 1.6e-1, 3.2e-1, 6.4e-1)
METHODS = {
    "everything, dense model of 4 times the FLOPs": Method("dense", "all", CORE_RATES),
    "everything": Method("memory", "all", CORE_RATES),
    "all but the table": Method("memory", "core", CORE_RATES),
    "LoRA, rank 4": Method("memory", "lora", LORA_RATES, rank=4),
    "LoRA, rank 16": Method("memory", "lora", LORA_RATES, rank=16),
    "values": Method("memory", "values", VALUE_RATES),
    "values, 2,000 top slots": Method("memory", "values", SPARING_RATES, top_slots=2000),
    "values, 8,000 top slots": Method("memory", "values", VALUE_RATES, top_slots=8000),
    "values, 32,000 top slots": Method("memory", "values", VALUE_RATES, top_slots=32000),
    "values, sparing old slots": Method("memory", "values", SPARING_RATES, mem_idf=1.0),
    "values, sparing and rehearsing": Method("memory", "values", SPARING_RATES, mem_idf=1.0, rehearse=0.5),
}
IN_ROUNDS = ("everything", "LoRA, rank 16", "values, sparing old slots", "values, sparing and rehearsing")


# ------------------------------------------------------------------------------------------------
# One lesson


class Student:
    """A trained model that is taught by one method."""

    def __init__(self, folder: str, method: Method, rate: float):
        trained = teaching.find(folder, "--run")
        self.config, self.method = trained.config, method
        self.model = GPT(self.config)
        trained.load(self.model)
        self.counts, self.data = trained.counts(), open_data(self.config, trained.tokenizer())
        self.rate = rate
        self.earlier = [self.data]  # what to rehearse
        torch.manual_seed(0)  # of dropped lookups and of LoRA
        if method.train == "lora":
            add_lora(self.model, method.rank)
        else:
            teaching.freeze(self.model, method.train)

    def teach(self, data: FactData, updates: int, evaluate_at=(), evaluate=None) -> list:
        """Trains on the first batches of data, with a cosine schedule and new optimizers. Returns what
        evaluate() returned after the updates in evaluate_at.
        """
        method, model, new = self.method, self.model, data
        if method.rehearse:
            data = teaching.Rehearsal(data, self.earlier, method.rehearse)
        mem_lr = self.rate * VALUES_RATE if method.train == "all" else self.rate
        optimizers = optim.build_optimizer(model, self.rate, mem_lr)
        if method.mem_idf:
            teaching.spare_slots(model, optimizers, self.counts, method.mem_idf)
        top_slots = teaching.TopSlots(model, self.counts, method.top_slots) if method.top_slots else None
        found = []
        model.train()
        for step in range(updates):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * optim.schedule(step, 0, updates, 0.1)
            with observe_lookups(model, top_slots):
                model(*data.batch("train", step * BATCH_SIZE, BATCH_SIZE))[1].backward()
            if top_slots:
                top_slots.restrict()
            optim.clip_gradients(model, self.config.grad_clip or math.inf)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if step + 1 in evaluate_at:
                found.append(evaluate())
        self.counts = teaching.count(model, optimizers, updates, self.counts)
        self.earlier = [*self.earlier, new]
        return found

    def knows(self, data: FactData, role_at_least: int) -> np.ndarray:
        """Which of the questions with such a role it answers: (n,) bool."""
        pairs = np.argwhere(data.facts.role >= role_at_least)
        known, _ = recall.ask(self.model, data.sentences, pairs, questions=True)
        return known


def new_people(config: Config, encoding, people_seed: int, before: tuple[int, ...] = ()) -> FactData:
    """200 people that no model has been taught, other than those of config and of the seeds before."""
    first = {name: getattr(config, name) for name in DESCRIBES_DATA}
    settings = dict(n_entities=N_PEOPLE, zipf=0.0)
    earlier = [first, *[first | settings | {"people_seed": seed} for seed in before]]
    config = config.replace(people_seed=people_seed, earlier=earlier, **settings)
    return FactData(named_facts(config), encoding, config.block_size, people_seed)


def lesson(folder: str, method: Method, rate: float, people_seed: int) -> dict:
    """The curve of one method at one rate: updates, the share of new facts known, the share kept of the old
    ones that were known before.
    """
    student = Student(folder, method, rate)
    data = new_people(student.config, student.data.encoding, people_seed)
    before = student.knows(student.data, REPORT)

    def evaluate():
        new = student.knows(data, ASKED + 1).mean()  # those for choosing settings are never asked either
        kept = student.knows(student.data, REPORT)[before].mean()
        return {"new": float(new), "kept": float(kept)}

    curve = student.teach(data, EVALUATED_AT[-1], EVALUATED_AT, evaluate)
    points = [{"updates": n} | point for n, point in zip(EVALUATED_AT, curve)]
    return {"known_before": float(before.mean()), "curve": points}


def rounds(folder: str, method: Method, rate: float, people_seed: int) -> dict:
    """Ten rounds of new people, taught one after another: {"first": what is known of the first round's after
    each, "old": of the first people, before and after each, "at_end": of each round's after the last}.
    """
    student = Student(folder, method, rate)
    seeds = [people_seed * 100 + i for i in range(1, ROUNDS + 1)]
    sets = []
    for i, seed in enumerate(seeds):
        sets.append(new_people(student.config, student.data.encoding, seed, tuple(seeds[:i])))
    first_known, old_known = [], [float(student.knows(student.data, REPORT).mean())]
    for data in sets:
        student.teach(data, ROUND_UPDATES)
        first_known.append(float(student.knows(sets[0], ASKED + 1).mean()))
        old_known.append(float(student.knows(student.data, REPORT).mean()))
    at_end = [float(student.knows(data, ASKED + 1).mean()) for data in sets]
    return {"first": first_known, "old": old_known, "at_end": at_end}


# ------------------------------------------------------------------------------------------------
# Reading curves


def kept_at(curve: list[dict], enough: float = ENOUGH) -> float | None:
    """The share kept where a curve first reaches enough of the new facts; None if it doesn't."""
    return read_off(curve, "new", enough, "kept", start={"new": 0.0, "kept": 1.0})


def share_lost(curve: list[dict]) -> float | None:
    """1 - kept_at(curve), or None."""
    kept = kept_at(curve)
    return None if kept is None else 1 - kept


# ------------------------------------------------------------------------------------------------
# All of them


def run_saved(task: dict, results: Path) -> dict:
    """The result of a task, from its file, or run and saved. task: {"kind", "name", "folder", "rate", "seed",
    "model"}.
    """
    def run():
        torch.set_num_threads(1)
        function = {"lesson": lesson, "rounds": rounds}[task["kind"]]
        return function(task["folder"], METHODS[task["name"]], task["rate"], task["seed"])

    about = {name: task[name] for name in ("kind", "name", "rate", "seed", "model")}
    return saved_or_run(task_path(task, results), about, run)


def task_path(task: dict, results: Path) -> Path:
    """The file of a task's result."""
    method = METHODS[task["name"]]
    method = {f.name: getattr(method, f.name) for f in dataclasses.fields(Method)
              if f.name != "rates" and getattr(method, f.name) != f.default}
    deciding = [task[name] for name in ("kind", "rate", "seed", "model")]
    deciding += [method, EVALUATED_AT, ROUND_UPDATES, COMPUTATION, torch_version()]
    return result_path(results, f"{task['kind']}-{task['name']}-{task['rate']:g}-{task['seed']}", deciding)


def run_all(tasks: list[dict], results: Path, workers: int, console) -> list[dict]:
    """The results of tasks, some processes at a time, with a progress bar."""
    from rich.progress import track

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(run_saved, task, results) for task in tasks]
        try:
            for future in track(running, "teaching", console=console, disable=not console.is_terminal):
                future.result()
        except BaseException:  # Ctrl-C, or a task that failed: the rest isn't begun
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in running]


def forgetting(models: dict[str, list[tuple[str, Path]]], seeds: list[int], results: Path, workers: int,
               console) -> tuple[list[dict], list[dict]]:
    """(A row for each method: its rate, and over seeds its curves and what is known after each round; all
    results that this is made of).

    models: {"memory" or "dense": name and folder of its trained models, one for each seed}. The first seed's
    models also serve to choose rates, on other new people.
    """
    def task(kind, name, rate, seed, number):
        model, folder = models[METHODS[name].model][number]
        return {"kind": kind, "name": name, "rate": rate, "seed": seed, "folder": str(folder), "model": model}

    sweeps = []
    for name, method in METHODS.items():
        sweeps += [task("lesson", name, rate, SWEEP_SEED, 0) for rate in method.rates]
    tries = run_all(sweeps, results, workers, console)
    rates = {}
    for name in METHODS:
        curves = {one["rate"]: one["curve"] for one in tries if one["name"] == name}
        rates[name] = best_try(curves, "new", share_lost)
    tasks = []
    for kind, names in (("lesson", METHODS), ("rounds", IN_ROUNDS)):
        for i, seed in enumerate(seeds):
            tasks += [task(kind, name, rates[name], seed, i) for name in names]
    found = run_all(tasks, results, workers, console)
    rows = []
    for name in METHODS:
        lessons = [one for one in found if (one["kind"], one["name"]) == ("lesson", name)]
        row = {"model": name, "rate": rates[name],
               "known_before": [one["known_before"] for one in lessons],
               "curves": [one["curve"] for one in lessons],
               "kept": [kept_at(one["curve"]) for one in lessons]}
        for one in found:
            if (one["kind"], one["name"]) == ("rounds", name):
                for key in ("first", "old", "at_end"):
                    row.setdefault(f"rounds_{key}", []).append(one[key])
        rows.append(row)
    return rows, tries + found
