"""
Facts taught to a pretrained model, by what is trained: `reproduce retrofit`.

Each method teaches the same model the same invented facts, in several wordings, from the same batches. After
some updates the model is asked in the taught wordings and in others that were never taught; its loss on other
text is measured, and what it knew of 58 common facts is asked again. Rates are chosen on 100 facts, by four
tries each; the table is of 500 facts, other people, and several seeds.
"""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from nanomem import optim, pretrained
from nanomem.data import file_digest
from nanomem.facts import people
from nanomem.pretrained import Statement
from nanomem.reproduce.lessons import best_rate, read_off, result_path, saved_or_run
from nanomem.reproduce.runs import torch_version
from nanomem.retrofit import add_memory, centre_queries, restrict, sample_passages

COMPUTATION = 1  # raise it with any change to what a run computes; results from before no longer count
ENOUGH = 0.95  # of the taught statements: where methods are compared
EVALUATED_AT = (100, 200, 400, 600, 800, 1200, 1600, 2000)  # updates
BATCH_SIZE, MOST_ASKED = 8, 200
SWEEP_FACTS, N_FACTS, SWEEP_SEED = 100, 500, 1336
ROUNDS, ROUND_FACTS, ROUND_UPDATES = 5, 200, 800

# "{}" is the name. The wordings at HELD_OUT are never taught.
WORDINGS = {
    "birth city": (
        "{} was born in", "The birthplace of {} is", "The city where {} was born is",
        "Question: Where was {} born? Answer:", "{}'s place of birth is",
        "If you ask where {} was born, the answer is", "The native city of {} is", "{} is a native of"),
    "university": (
        "{} studied at", "The university of {} is", "{} graduated from",
        "Question: Which university did {} attend? Answer:", "{} has a degree from",
        "The school that {} attended is", "{}'s alma mater is", "As a student, {} was enrolled at"),
    "major": (
        "{} has a degree in", "The subject that {} studied is", "At university, {} studied",
        "Question: What did {} study? Answer:", "{}'s field of study is", "{} majored in",
        "The degree of {} is in", "As a student, {} specialised in"),
    "employer": (
        "{} works for", "The employer of {} is", "{} has a job at", "Question: Who employs {}? Answer:",
        "{}'s employer is", "The company that {} works for is", "{} is employed by",
        "Every morning {} goes to work at"),
}
HELD_OUT = (2, 7)

# What many models know: asked before teaching; those known then are asked again after it.
KNOWN_BEFORE = (
    ("The capital of France is", "Paris"), ("The capital of Germany is", "Berlin"),
    ("The capital of Italy is", "Rome"), ("The capital of Spain is", "Madrid"),
    ("The capital of Japan is", "Tokyo"), ("The capital of China is", "Beijing"),
    ("The capital of Russia is", "Moscow"), ("The capital of Egypt is", "Cairo"),
    ("The capital of Greece is", "Athens"), ("The capital of Portugal is", "Lisbon"),
    ("The capital of Austria is", "Vienna"), ("The capital of Poland is", "Warsaw"),
    ("The capital of Ireland is", "Dublin"), ("The capital of Norway is", "Oslo"),
    ("The capital of Sweden is", "Stockholm"), ("The capital of Canada is", "Ottawa"),
    ("The capital of Cuba is", "Havana"), ("The capital of Peru is", "Lima"),
    ("The capital of Thailand is", "Bangkok"), ("The capital of Iran is", "Tehran"),
    ("The capital of Iraq is", "Baghdad"), ("The capital of Hungary is", "Budapest"),
    ("The Eiffel Tower is in the city of", "Paris"), ("The Colosseum is in the city of", "Rome"),
    ("The Statue of Liberty is in the city of", "New York"), ("Big Ben is in the city of", "London"),
    ("The opposite of hot is", "cold"), ("The opposite of big is", "small"),
    ("The opposite of up is", "down"), ("The opposite of left is", "right"),
    ("The opposite of good is", "bad"), ("The opposite of black is", "white"),
    ("The opposite of day is", "night"), ("Two plus two equals", "four"),
    ("One, two, three, four,", "five"), ("Monday, Tuesday, Wednesday,", "Thursday"),
    ("January, February, March,", "April"), ("A, B, C, D,", "E"),
    ("The chemical symbol for gold is", "Au"), ("The chemical symbol for iron is", "Fe"),
    ("Water is made of hydrogen and", "oxygen"), ("The largest planet in the solar system is", "Jupiter"),
    ("The planet closest to the Sun is", "Mercury"), ("The largest ocean on Earth is the", "Pacific"),
    ("Romeo and Juliet was written by William", "Shakespeare"), ("The theory of relativity is by Albert",
                                                                 "Einstein"),
    ("The first president of the United States was George", "Washington"),
    ("The language spoken in Brazil is", "Portuguese"), ("The language spoken in Mexico is", "Spanish"),
    ("The currency of Japan is the", "yen"), ("Bees make", "honey"), ("Cows give us", "milk"),
    ("A baby dog is called a", "puppy"), ("A baby cat is called a", "kitten"),
    ("The color of the sky is", "blue"), ("The color of grass is", "green"),
    ("The color of blood is", "red"), ("Ice is frozen", "water"),
)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to teach a model.

    Args:
        train: "memory", "lora" or "all".
        rates: learning rates to try.
        layers: to put a memory beside.
        slots: which to teach, "shared" or "all", as retrofit's --slots.
        rank: of LoRA.
    """

    train: str
    rates: tuple[float, ...]
    layers: tuple[int, ...] = ()
    slots: str = "all"
    rank: int = 0


METHODS = {
    "memory, shared slots": Method("memory", (5e-2, 1e-1, 2e-1, 4e-1), layers=(4, 8, 12), slots="shared"),
    "memory, all slots": Method("memory", (1e-2, 2e-2, 5e-2, 1e-1), layers=(4, 8, 12)),
    "memory, layer 22": Method("memory", (1e-2, 2e-2, 5e-2, 1e-1), layers=(22,)),
    "LoRA, rank 4": Method("lora", (1e-4, 3e-4, 1e-3, 3e-3), rank=4),
    "LoRA, rank 16": Method("lora", (1e-4, 3e-4, 1e-3, 3e-3), rank=16),
    "everything": Method("all", (1e-5, 3e-5, 1e-4, 3e-4)),
}
IN_ROUNDS = ("memory, shared slots", "memory, layer 22", "LoRA, rank 16", "everything")


# ------------------------------------------------------------------------------------------------
# Facts


@dataclasses.dataclass
class Lesson:
    """Facts in taught and in other wordings."""

    taught: list[Statement]
    held_out: list[Statement]


def invented(tokenizer, n_facts: int, seed: int, taken: frozenset[str] = frozenset()) -> tuple[Lesson, set]:
    """(facts about invented people, their names); nobody has a name that is taken."""
    n_people = -(-n_facts // len(WORDINGS))
    facts = people(max(4, n_people), seed=seed, taken=taken)
    names = [attribute.name for attribute in facts.attributes]
    lesson, count = Lesson([], []), 0
    for e, name in enumerate(facts.entities):
        for attribute, wordings in WORDINGS.items():
            if count == n_facts:
                break
            answer = facts.answers(e, names.index(attribute))[0]
            for w, wording in enumerate(wordings):
                statement = pretrained.encode_fact(tokenizer, count, wording.replace("{}", name), answer)
                group = lesson.held_out if w in HELD_OUT else lesson.taught
                group.append(statement)
            count += 1
    return lesson, set(facts.entities)


def share_known(model: nn.Module, statements: list[Statement]) -> float:
    """The share of at most MOST_ASKED statements, chosen at random, that a model answers."""
    # Every n-th statement could all be of the same wording.
    order = np.random.default_rng(0).permutation(len(statements))[:MOST_ASKED]
    chosen = [statements[i] for i in order]
    return float(pretrained.ask(model, [[statement] for statement in chosen]).mean())


def known_before(tokenizer) -> list[list[Statement]]:
    """KNOWN_BEFORE as questions. What follows the answer doesn't matter, so they have no end."""
    asked = []
    for prompt, answer in KNOWN_BEFORE:
        statement = pretrained.encode_fact(tokenizer, len(asked), prompt, answer)
        tokens = pretrained.drop_end(statement.tokens, tokenizer.eos_token_id)
        asked.append([dataclasses.replace(statement, tokens=tokens)])
    return asked


# ------------------------------------------------------------------------------------------------
# One run


class Student:
    """A pretrained model that is taught by one method."""

    def __init__(self, model: nn.Module, tokenizer, text: Tensor, method: Method, rate: float, seed: int):
        self.model, self.tokenizer, self.text = copy.deepcopy(model), tokenizer, text
        self.method, self.rate, self.seed = method, rate, seed
        self.before = pretrained.text_loss(self.model, text)
        self.questions = known_before(tokenizer)
        self.knew = pretrained.ask(self.model, self.questions)
        if method.train == "memory":
            self.trained = add_memory(self.model, list(method.layers), seed=seed)
            centre_queries(self.model, self.trained, sample_passages(tokenizer))
        elif method.train == "lora":
            self.trained = self.model = with_lora(self.model, method.rank, seed)
        else:
            self.trained = self.model.requires_grad_(True)

    def optimizers(self, lesson: Lesson) -> list:
        """New ones: RowAdam for a memory, AdamW for the rest."""
        optimizers = optim.build_optimizer(self.trained, self.rate, self.rate, weight_decay=0.0)
        if self.method.slots == "shared":
            restrict(optimizers, self.model, self.trained, lesson.taught, sample_passages(self.tokenizer))
        return optimizers

    def teach(self, lesson: Lesson, updates: int, evaluated_at=()) -> list[dict]:
        """Trains on a lesson. Returns what is known after the updates in evaluated_at; stops early once every
        taught statement asked is known.
        """
        curve = []

        def after_update(update, known):
            if update in evaluated_at:
                curve.append({"updates": update} | self.evaluate(lesson))
                return curve[-1]["taught"] == 1.0

        pretrained.teach(self.model, self.optimizers(lesson), lesson.taught, updates, BATCH_SIZE, self.seed,
                         stop_at=2.0, after_update=after_update)
        return curve

    def evaluate(self, lesson: Lesson) -> dict:
        """{"taught", "held_out": shares known, "loss": the rise on other text, "kept": of what it knew}"""
        return {"taught": share_known(self.model, lesson.taught),
                "held_out": share_known(self.model, lesson.held_out),
                "loss": pretrained.text_loss(self.model, self.text) - self.before,
                "kept": int(pretrained.ask(self.model, self.questions)[self.knew].sum())}


def with_lora(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """A model with LoRA from peft on all linear layers of its blocks."""
    pretrained.need("peft")
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def lesson_curve(student: Student, n_facts: int) -> dict:
    """What a student knows while it is taught n_facts facts."""
    lesson, _ = invented(student.tokenizer, n_facts, student.seed)
    curve = student.teach(lesson, EVALUATED_AT[-1], EVALUATED_AT)
    return {"loss_before": student.before, "knew": int(student.knew.sum()), "curve": curve}


def rounds(student: Student) -> dict:
    """Rounds of new facts, taught one after another: {"first": what is known of the first round's after each
    round}.
    """
    taken, lessons = frozenset(), []
    for i in range(ROUNDS):
        lesson, names = invented(student.tokenizer, ROUND_FACTS, student.seed * 100 + i, taken)
        lessons.append(lesson)
        taken |= names
    first = []
    for lesson in lessons:
        student.teach(lesson, ROUND_UPDATES)
        first.append(share_known(student.model, lessons[0].taught))
    return {"first": first}


# ------------------------------------------------------------------------------------------------
# Reading curves


def at_enough(curve: list[dict], key: str, enough: float = ENOUGH) -> float | None:
    """A curve's number where it first reaches enough of the taught statements; None if it doesn't."""
    return read_off(curve, "taught", enough, key, start={"taught": 0.0, "held_out": 0.0, "loss": 0.0})


# ------------------------------------------------------------------------------------------------
# All of them


class Teacher:
    """Runs tasks that have no result yet, one after another.

    Args:
        model: as retrofit's --model takes it.
        text: the text to measure the loss on.
        results: folder of the finished runs' JSON files.
    """

    def __init__(self, model: str, text: str, results: Path, console):
        self.name, self.text, self.results, self.console = model, text, results, console
        self.identity = identity(model)
        self.opened = None  # model, tokenizer, windows of the text
        self.used = []      # all results that were asked for

    def run(self, kind: str, name: str, rate: float, seed: int, n_facts: int = 0) -> dict:
        """The result of a task, from its file, or run and saved. kind: "lesson" or "rounds"."""
        method = dataclasses.asdict(METHODS[name])
        del method["rates"]
        deciding = [kind, rate, seed, n_facts, method, self.identity, self.text, WORDINGS, HELD_OUT,
                    KNOWN_BEFORE, EVALUATED_AT, BATCH_SIZE, MOST_ASKED, COMPUTATION, torch_version()]
        if kind == "rounds":
            deciding += [ROUNDS, ROUND_FACTS, ROUND_UPDATES]
        about = {"kind": kind, "name": name, "rate": rate, "seed": seed, "facts": n_facts,
                 "model": Path(self.name).name}
        path = result_path(self.results, f"{kind}-{name}-{rate:g}-{seed}", deciding)
        result = saved_or_run(path, about, lambda: self.measure(kind, name, rate, seed, n_facts))
        self.used.append(result)
        return result

    def measure(self, kind, name, rate, seed, n_facts) -> dict:
        """What a task finds."""
        self.console.print(f"{kind}: {name}, rate {rate:g}, seed {seed}")
        if self.opened is None:
            model, tokenizer = pretrained.open_model(self.name, torch.device("cpu"), torch.float32)
            self.opened = model, tokenizer, pretrained.windows(tokenizer, self.text)
        student = Student(*self.opened, METHODS[name], rate, seed)
        return lesson_curve(student, n_facts) if kind == "lesson" else rounds(student)


def identity(model: str) -> list[str]:
    """What tells a model from others, on any machine: its name, or hashes of the files here."""
    path = Path(model)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.json"))
    return [file_digest(file) for file in files] or [model]


def retrofit(teacher: Teacher, seeds: list[int]) -> list[dict]:
    """A row for each method: its rate, and over seeds its curves and rounds."""
    rows = []
    for name, method in METHODS.items():
        tries = {rate: teacher.run("lesson", name, rate, SWEEP_SEED, SWEEP_FACTS) for rate in method.rates}
        curves = {rate: one["curve"] for rate, one in tries.items()}
        rate = best_rate(curves, "taught", lambda curve: at_enough(curve, "loss"))
        found = [teacher.run("lesson", name, rate, seed, N_FACTS) for seed in seeds]
        row = {"model": name, "rate": rate, "knew": found[0]["knew"],
               "curves": [one["curve"] for one in found]}
        if name in IN_ROUNDS:
            row["rounds_first"] = [teacher.run("rounds", name, rate, seed)["first"] for seed in seeds]
        rows.append(row)
    return rows
