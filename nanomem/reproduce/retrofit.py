"""
Facts taught to a pretrained model, by what is trained: `reproduce retrofit`.

Each method teaches the same model the same facts, in several wordings, by the same loop. After some rounds
the model is asked in the taught wordings and in others that were never taught; its loss on other text is
measured, and what it knew of common facts is asked again. Four tries of each method are compared on 100
invented facts. The best teaches 500, about other people, with several seeds; then, with one seed, 500 real
facts, the countries of small cities, and five sets of 200 facts in turn.

Only the memory sees ordinary text, to leave alone the slots that it reads; the loss is measured on other
passages. And only the memory keeps what it was taught, so it alone can teach earlier facts again.
"""

import copy
import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from nanomem import optim, pretrained
from nanomem.adapter import build_adam, centre_queries, choose_slots
from nanomem.cli import UserError
from nanomem.data import file_digest
from nanomem.facts import people, world
from nanomem.pretrained import Statement
from nanomem.reproduce.lessons import best_try, read_off, result_path, saved_or_run
from nanomem.reproduce.runs import torch_version
from nanomem.retrofit import Display, Settings, add_memory, default_layers

COMPUTATION = 6  # raise it with any change to what a run computes; results from before no longer count
ENOUGH = 0.95  # of the taught statements: where methods are compared
STOP_AT = 0.99  # of the taught statements: where teaching ends
READINGS = 40  # of each fact, at most
BATCH_SIZE, MOST_ASKED = 32, 500
SWEEP_SEED = 1336
N_FACTS = {"sweep": 100, "lesson": 500, "cities": 500, "sets": 200, "shape": 100}  # of each set
EVALUATED_AT = {"sweep": (10, 20, 30, 40), "lesson": (2, 5, 10, 20, 30, 40),
                "cities": (2, 5, 10, 20, 30, 40), "sets": (), "shape": (40,)}  # readings
SETS = 5  # taught one after another
LARGE_CITIES = 20_000  # these are skipped
WITH_ARTICLE = ("United States", "United Kingdom", "The Netherlands", "Philippines")  # no wording fits them

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
CITY_WORDINGS = (
    "{} is a city in", "The city of {} is in", "The country of {} is",
    "Question: In which country is {}? Answer:", "If you go to {}, you are in",
    "The country in which {} lies is", "A map shows {} in", "{} lies in")
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
    ("The capital of Kenya is", "Nairobi"), ("The capital of Chile is", "Santiago"),
    ("The capital of Denmark is", "Copenhagen"), ("The capital of Syria is", "Damascus"),
    ("The capital of Vietnam is", "Hanoi"), ("The capital of Indonesia is", "Jakarta"),
    ("The capital of Pakistan is", "Islamabad"), ("The capital of Romania is", "Bucharest"),
    ("The capital of Bulgaria is", "Sofia"), ("The opposite of fast is", "slow"),
    ("The opposite of young is", "old"), ("The opposite of rich is", "poor"),
    ("The opposite of wet is", "dry"), ("The currency of India is the", "rupee"),
    ("An hour has sixty", "minutes"), ("The plural of mouse is", "mice"),
)


@dataclasses.dataclass(frozen=True)
class Try:
    """A way to teach a model.

    Args:
        train: "memory", "lora" or "all".
        rate: the learning rate.
        rank: of LoRA.
    """

    train: str
    rate: float
    rank: int = 0


METHODS = {
    "memory": [Try("memory", rate) for rate in (0.1, 0.2, 0.3, 0.5)],
    "LoRA": [Try("lora", 1e-3, rank=4), *(Try("lora", rate, rank=16) for rate in (3e-4, 1e-3, 3e-3))],
    "full finetuning": [Try("all", rate) for rate in (1e-5, 3e-5, 1e-4, 3e-4)],
}
# Lower rates than those that win the sweep, for a lesson with more updates
GENTLER = {"LoRA": Try("lora", 3e-4, rank=16), "full finetuning": Try("all", 3e-5)}


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
            add_fact(lesson, in_wordings(tokenizer, count, wordings, name, answer))
            count += 1
    return lesson, set(facts.entities)


def unknown_cities(model: nn.Module, tokenizer, n_facts: int) -> Lesson:
    """Facts about small cities whose country a model gives in none of the wordings. Tries the largest first,
    after skipping LARGE_CITIES. Raises UserError if the model knows too many.
    """
    facts = world(n_entities=10 * n_facts, skip=LARGE_CITIES)
    lesson, count = Lesson([], []), 0
    for e, name in enumerate(facts.entities):
        country = facts.answers(e, 0)[0]
        if country in WITH_ARTICLE:
            continue
        wordings = in_wordings(tokenizer, count, CITY_WORDINGS, name, country)
        asked = [[without_end(tokenizer, statement)] for statement in wordings]
        if not pretrained.ask(model, asked).any():
            add_fact(lesson, wordings)
            count += 1
        if count == n_facts:
            return lesson
    raise UserError(f"expected {n_facts} of {len(facts.entities)} small cities that the model doesn't know; "
                    f"it knows all but {count}")


def in_wordings(tokenizer, fact: int, wordings: tuple[str, ...], name: str, answer: str) -> list[Statement]:
    """The statements of one fact, one per wording."""
    return [pretrained.encode_fact(tokenizer, fact, wording.replace("{}", name), answer)
            for wording in wordings]


def add_fact(lesson: Lesson, wordings: list[Statement]):
    """Adds a fact's statements to a lesson; those at HELD_OUT are not taught."""
    for w, statement in enumerate(wordings):
        group = lesson.held_out if w in HELD_OUT else lesson.taught
        group.append(statement)


def share_known(model: nn.Module, statements: list[Statement]) -> float:
    """The share of statements that a model answers, from a random MOST_ASKED of them if there are more."""
    # Every n-th statement could all be of the same wording.
    order = np.random.default_rng(0).permutation(len(statements))[:MOST_ASKED]
    chosen = [statements[i] for i in order]
    return float(pretrained.ask(model, [[statement] for statement in chosen]).mean())


def known_before(tokenizer) -> list[list[Statement]]:
    """KNOWN_BEFORE as questions."""
    asked = []
    for prompt, answer in KNOWN_BEFORE:
        statement = pretrained.encode_fact(tokenizer, len(asked), prompt, answer)
        asked.append([without_end(tokenizer, statement)])
    return asked


def without_end(tokenizer, statement: Statement) -> Statement:
    """A statement without its end token: an untaught model doesn't stop after an answer."""
    tokens = pretrained.drop_end(statement.tokens, tokenizer.eos_token_id)
    return dataclasses.replace(statement, tokens=tokens)


# ------------------------------------------------------------------------------------------------
# One run


class Untaught:
    """A pretrained model, and how it answers before it is taught.

    Args:
        name: as retrofit's --model takes it.
        text: file of ordinary text, as split_text takes it.
    """

    def __init__(self, name: str, text: str):
        self.model, self.tokenizer = pretrained.open_model(name, torch.device("cpu"), torch.float32)
        self.measured, self.other_text = pretrained.split_text(self.tokenizer, text)
        self.loss = pretrained.text_loss(self.model, self.measured)
        self.questions = known_before(self.tokenizer)
        self.knew = pretrained.ask(self.model, self.questions)  # which of them, (n,) bool

    @functools.cached_property
    def cities(self) -> Lesson:
        """Real facts that the model doesn't know."""
        return unknown_cities(self.model, self.tokenizer, N_FACTS["cities"])


class Student:
    """A copy of a pretrained model that is taught in one way.

    Args:
        console: where to show how far teaching is.
        shape: arguments of add_memory, instead of the default ones.
    """

    def __init__(self, untaught: Untaught, way: Try, seed: int, console, shape: dict | None = None):
        self.untaught, self.way, self.seed, self.console = untaught, way, seed, console
        self.model = copy.deepcopy(untaught.model)
        self.n_again = 0  # earlier facts that were taught again with the last lesson
        begun = time.perf_counter()
        if way.train == "memory":
            lookup, layers = default_layers(self.model.config.num_hidden_layers)
            arguments = {"layers": layers, "lookup": lookup, "n_slots": Settings.n_keys**2, "seed": seed}
            self.memory = add_memory(self.model, **arguments | (shape or {}), all_slots=False)
            centre_queries(self.model, self.memory, untaught.other_text)
        elif way.train == "lora":
            self.model = with_lora(self.model, way.rank, seed)
        else:
            self.model.requires_grad_(True)
        self.preparing = time.perf_counter() - begun  # seconds

    def begin(self, lesson: Lesson) -> tuple[list, list[Statement]]:
        """(new optimizers, the statements to teach): Adam for a memory's rows, AdamW for the rest."""
        if self.way.train != "memory":
            return optim.build_optimizer(self.model, self.way.rate, weight_decay=0.0), lesson.taught
        teachable, again = choose_slots(self.model, self.memory, lesson.taught, self.untaught.other_text)
        self.n_again = len({statement.fact for statement in again})
        return [build_adam(self.memory, self.way.rate)], teachable + again

    def teach(self, lesson: Lesson, evaluated_at=()) -> list[dict]:
        """Trains on a lesson until a share STOP_AT is known. Returns a point for each round in evaluated_at:
        what is known, and the seconds so far, without those of asking. No points if the loss diverges.
        """
        begun = time.perf_counter() - self.preparing  # as if the preparation had just ended
        curve, asking = [], 0.0

        def after_update(done, known):
            nonlocal asking
            display(done, known)
            readings = round(done * READINGS, 6)
            if readings not in evaluated_at:
                return False
            stopped = time.perf_counter()
            found = {"readings": round(readings), "seconds": stopped - begun - asking}
            curve.append(found | self.evaluate(lesson))
            asking += time.perf_counter() - stopped
            return curve[-1]["taught"] >= STOP_AT

        optimizers, statements = self.begin(lesson)
        display = Display(self.console)
        stop_at = math.inf if evaluated_at else STOP_AT  # a curve ends only where it was evaluated
        try:
            with display.bar:
                pretrained.teach(self.model, optimizers, statements, READINGS, BATCH_SIZE, self.seed, stop_at,
                                 after_update)
        except UserError as error:
            self.console.print(error)
            return []
        return curve

    def evaluate(self, lesson: Lesson) -> dict:
        """{"taught", "held_out": shares known, and what harm() finds}"""
        return {"taught": share_known(self.model, lesson.taught),
                "held_out": share_known(self.model, lesson.held_out), **self.harm()}

    def harm(self) -> dict:
        """{"loss": the rise on other text, "kept": how many questions that it knew it still answers}"""
        kept = pretrained.ask(self.model, self.untaught.questions)[self.untaught.knew]
        return {"loss": pretrained.text_loss(self.model, self.untaught.measured) - self.untaught.loss,
                "kept": int(kept.sum())}


def with_lora(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """A model with LoRA from peft on all linear layers of its blocks."""
    pretrained.need("peft")
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def lesson_curve(student: Student, kind: str) -> dict:
    """What a student knows while it is taught: a "sweep", a "lesson", "cities" or a "shape"."""
    if kind == "cities":
        lesson = student.untaught.cities
    else:
        lesson, _ = invented(student.untaught.tokenizer, N_FACTS[kind], student.seed)
    curve = student.teach(lesson, EVALUATED_AT[kind])
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    return {"loss_before": student.untaught.loss, "knew": int(student.untaught.knew.sum()), "curve": curve,
            "trained": trained}


def sets_in_turn(student: Student) -> dict:
    """Sets of facts, taught one after another: {"first": what is known of the first set after each; "again":
    how many earlier facts were taught again with each; "last": what is known of each set after the last; and
    what harm() finds then}.
    """
    taken, lessons = frozenset(), []
    for i in range(SETS):
        lesson, names = invented(student.untaught.tokenizer, N_FACTS["sets"], student.seed * 100 + i, taken)
        lessons.append(lesson)
        taken |= names
    first, again = [], []
    for lesson in lessons:
        student.teach(lesson)
        first.append(share_known(student.model, lessons[0].taught))
        again.append(student.n_again)
        student.console.print(f"set {len(first)}: {first[-1]:.1%} of the first set is known")
    last = [share_known(student.model, lesson.taught) for lesson in lessons]
    return {"first": first, "again": again, "last": last, **student.harm()}


# ------------------------------------------------------------------------------------------------
# Reading curves


def at_enough(curve: list[dict], key: str) -> float | None:
    """A curve's number where ENOUGH is first known; None if it never is."""
    start = dict.fromkeys(("taught", "held_out", "loss", "readings", "seconds"), 0.0)
    return read_off(curve, "taught", ENOUGH, key, start)


def end_of(curve: list[dict]) -> dict:
    """A curve's last point; that of a diverged run, which has none, knows nothing."""
    diverged = {"readings": 0, "taught": 0.0, "held_out": 0.0, "loss": math.inf, "kept": 0}
    return curve[-1] if curve else diverged


def cost(curve: list[dict]) -> tuple[float, float] | None:
    """Ranks the tries of a sweep, the lowest first: (rise of the loss where ENOUGH is known, to a thousandth;
    readings until then). None if it never is.
    """
    rise = at_enough(curve, "loss")
    return None if rise is None else (round(rise, 3), at_enough(curve, "readings"))


# ------------------------------------------------------------------------------------------------
# All of them


class Teacher:
    """Runs tasks that have no result yet, one after another.

    Args:
        model, text: name and text of Untaught.
        results: folder of the finished runs' JSON files.
    """

    def __init__(self, model: str, text: str, results: Path, console):
        self.name, self.text, self.results, self.console = model, text, results, console
        self.identity = identity(model), [file_digest(Path(text))] if text else []
        self.used = []  # all results that were asked for

    @functools.cached_property
    def untaught(self) -> Untaught:
        """The model, opened when it is first needed."""
        return Untaught(self.name, self.text)

    def run(self, kind: str, name: str, way: Try, seed: int, shape: dict | None = None) -> dict:
        """The result of a "sweep", a "lesson", "cities", "sets" or a "shape": from its file, or run now.

        shape: that of Student.
        """
        deciding = [kind, dataclasses.asdict(way), seed, N_FACTS[kind], EVALUATED_AT[kind], self.identity,
                    WORDINGS, HELD_OUT, KNOWN_BEFORE, READINGS, BATCH_SIZE, STOP_AT, MOST_ASKED, COMPUTATION,
                    torch_version()]
        if kind == "cities":
            deciding += [CITY_WORDINGS, LARGE_CITIES, WITH_ARTICLE]
        if kind == "sets":
            deciding.append(SETS)
        about = {"kind": kind, "name": name, **dataclasses.asdict(way), "seed": seed, "facts": N_FACTS[kind],
                 "model": Path(self.name).name, "transformers": version("transformers")}
        if way.train == "lora":
            about["peft"] = version("peft")
        if kind == "shape":
            deciding.append(shape)
            about["shape"] = shape
        path = result_path(self.results, f"{kind}-{name}-{way.rank}-{way.rate:g}-{seed}", deciding)
        result = saved_or_run(path, about, lambda: self.measure(kind, name, way, seed, shape))
        self.used.append(result)
        return result

    def measure(self, kind: str, name: str, way: Try, seed: int, shape: dict | None) -> dict:
        """What a task finds."""
        rank = f", rank {way.rank}" if way.rank else ""
        self.console.print(f"{kind}: {name}{rank}, rate {way.rate:g}, seed {seed}")
        student = Student(self.untaught, way, seed, self.console, shape)
        return sets_in_turn(student) if kind == "sets" else lesson_curve(student, kind)


def identity(model: str) -> list[str]:
    """What tells a model from others, on any machine: its name, or hashes of the files here."""
    path = Path(model)
    kinds = "*.safetensors", "*.bin", "*.json"
    in_folder = [file for kind in kinds for file in sorted(path.glob(kind))]
    files = [path] if path.is_file() else in_folder
    return [file_digest(file) for file in files] or [model]


def retrofit(teacher: Teacher, seeds: list[int]) -> Iterator[list[dict]]:
    """Yields the table's rows, one for each method, four times: with the tries, the best of them and its
    curves on invented facts, one for each seed; then, with the first seed, also its curve on cities; then
    also what is left of sets taught in turn; then also a gentler try on invented facts.
    """
    rows, best = [], {}
    for name, tries in METHODS.items():
        curves = {way: teacher.run("sweep", name, way, SWEEP_SEED)["curve"] for way in tries}
        best[name] = best_try(curves, "taught", cost)
        tried = [tried_on("sweep", way, curve) for way, curve in curves.items()]
        rows.append({"model": name, "rate": best[name].rate, "rank": best[name].rank, "tries": tried,
                     "trained": [], "curves": [], "cities": [], "sets": [], "gentler": []})
    for seed in seeds:
        for row, (name, way) in zip(rows, best.items()):
            lesson = teacher.run("lesson", name, way, seed)
            row["knew"] = lesson["knew"]
            row["trained"].append(lesson["trained"])
            row["curves"].append(lesson["curve"])
    yield rows
    for row, (name, way) in zip(rows, best.items()):
        row["cities"].append(teacher.run("cities", name, way, seeds[0])["curve"])
    yield rows
    for row, (name, way) in zip(rows, best.items()):
        sets = teacher.run("sets", name, way, seeds[0])
        row["sets"].append({key: sets[key] for key in ("first", "again", "last", "loss", "kept")})
    yield rows
    for row in rows:
        way = GENTLER.get(row["model"])
        if way:
            lesson = teacher.run("lesson", row["model"], way, seeds[0])
            row["gentler"].append(tried_on("lesson", way, lesson["curve"]))
    yield rows


def tried_on(kind: str, way: Try, curve: list[dict]) -> dict:
    """A try in the table's rows."""
    return {"facts": N_FACTS[kind], **dataclasses.asdict(way), "curve": curve}
