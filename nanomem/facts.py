"""
Sets of facts, and which of their questions training asks.

- A fact is an answer to a pair of entity and attribute: (Lagos, country) -> Nigeria.
- Training states every fact, in several wordings or in biographies. It also asks questions about half of the
  pairs. The questions about the other half are never seen: to answer one, a model must have learnt the fact
  and not just the sentence.
- `world` has real cities, `people` invented people with a known number of bits, `from_jsonl` a user's facts.
  datasets.py lists those that come with nanomem.
"""

import codecs
import difflib
import gzip
import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomem.cli import shipped

# What a pair's questions are for: training, choosing settings, or the reported recall.
# SELECT's and REPORT's are never seen in training.
ASKED, SELECT, REPORT = 0, 1, 2


@dataclass(frozen=True)
class Attribute:
    """A kind of fact and its wordings: "{}" is replaced by the entity, and the answer follows at the end."""

    name: str
    statements: tuple
    questions: tuple = ()


WORLD_ATTRIBUTES = (
    Attribute(
        "country",
        ("The city of {} is in", "The country of {} is", "On the map {} belongs to"),
        ("In which country is {}?", "What country is {} in?")),
    Attribute(
        "time zone",
        ("The time zone of {} is", "Clocks in {} follow", "The local time of {} is"),
        ("What time zone is {} in?", "Which time zone do clocks in {} follow?")),
    Attribute(
        "population",
        ("The population of {} is", "The number of people in {} is", "The inhabitants of {} number"),
        ("How many people live in {}?", "What is the population of {}?")),
    Attribute(
        "latitude",
        ("The latitude of {} is", "From south to north {} is at", "The parallel of {} is"),
        ("What is the latitude of {}?", "How far north or south is {}?")),
    Attribute(
        "longitude",
        ("The longitude of {} is", "From west to east {} is at", "The meridian of {} is"),
        ("What is the longitude of {}?", "How far east or west is {}?")),
)

# Every prompt about people ends in the same token, ":". A memory layer is read at that token, so it finds
# what a biography stored even when a question asks for it. With questions that end in another token than
# biographies, a model learns as many facts but answers half as many questions.
PEOPLE_ATTRIBUTES = (
    Attribute("birth date", ("{} born:",), ("When was {} born:", "Birth date of {}:")),
    Attribute("birth city", ("{} from:",), ("Where was {} born:", "Birth city of {}:")),
    Attribute("university", ("{} attended:",), ("Where did {} study:", "University of {}:")),
    Attribute("major", ("{} studied:",), ("What did {} study:", "Major of {}:")),
    Attribute("employer", ("{} joined:",), ("Who employs {}:", "Employer of {}:")),
)


class FactSet:
    """Entities, their attributes and the answers.

    Args:
        entities: names, from the most to the least frequent.
        attributes: the kinds of facts.
        values: for each attribute a list of values; a value is a tuple of accepted spellings, of which the
            first is taught.
        codes: (entities, attributes) integers: the number of each pair's value in its attribute's list.
        zipf: entity number r (from 0) is mentioned in proportion to (r + 1) ** -zipf; 0: all equally often.
        biographies: state all facts about an entity together: its name, followed by a statement for each
            attribute. Every attribute then has one statement, of the form "{} ...".
        subjects: (entities,) integers: entities with the same number are names of the same thing, so their
            sentences are kept out of each other's context. None: no two are.
        held_out: facts that are never stated in training, to ask about.
    """

    def __init__(
            self, entities: list[str], attributes: tuple[Attribute, ...], values: list, codes: np.ndarray,
            zipf: float = 0.0, biographies: bool = False, subjects: np.ndarray | None = None,
            held_out: "FactSet | None" = None):
        self.entities, self.attributes, self.values, self.codes = entities, attributes, values, codes
        self.biographies, self.held_out = biographies, held_out
        self.subjects = np.arange(len(entities)) if subjects is None else subjects
        frequency = np.arange(1, len(entities) + 1, dtype=np.float64) ** -zipf
        self.frequency = frequency / frequency.sum()
        self.role = self._split()

    def _split(self):
        """What each pair's questions are for: (entities, attributes) int8 of ASKED, SELECT or REPORT.

        Half of an attribute's pairs are ASKED and a quarter each SELECT and REPORT; all are ASKED if it has
        no questions. The split is the same for every training seed, so no run trains on what another is
        tested on.
        """
        n = len(self.entities)
        rng = np.random.default_rng(0)
        quarters = np.arange(n) * 4 // n
        role_of_quarter = np.array([ASKED, ASKED, SELECT, REPORT])
        roles = np.stack([role_of_quarter[rng.permutation(quarters)] for _ in self.attributes], axis=1)
        has_questions = [len(attribute.questions) > 0 for attribute in self.attributes]
        return np.where(has_questions, roles, ASKED).astype(np.int8)

    def answers(self, entity: int, attribute: int) -> tuple[str, ...]:
        """The accepted answers of a pair, the taught one first."""
        return self.values[attribute][self.codes[entity, attribute]]

    def bands(self) -> dict[str, np.ndarray]:
        """The numbers of the entities in 'head', 'torso' and 'tail', each with about a third of all mentions
        (Sun et al. 2023).
        """
        # An entity belongs to the third in which the middle one of its mentions lies.
        middle = np.cumsum(self.frequency) - self.frequency / 2
        third = np.minimum(middle * 3, 2).astype(int)
        return {name: np.flatnonzero(third == i) for i, name in enumerate(("head", "torso", "tail"))}

    def bits_per_entity(self) -> float:
        """The information in the answers about one entity, in bits, if all values are equally likely and
        independent.
        """
        return sum(math.log2(len(values)) for values in self.values)

    def most_frequent_scores(self) -> np.ndarray:
        """For each attribute, the recall of a model that always answers its most frequent value:
        (attributes,).
        """
        return np.array([np.bincount(column).max() / len(column) for column in self.codes.T])


# ------------------------------------------------------------------------------------------------
# Sets of facts


def world(n_entities: int = 1000, zipf: float = 0.0, skip: int = 0) -> FactSet:
    """The n_entities largest cities of the world after the first `skip`, and five facts about each (GeoNames,
    CC BY 4.0).

    Raises ValueError unless n_entities is from 4 to the number of cities in data/world/cities.tsv.gz.
    """
    with gzip.open(shipped("world") / "cities.tsv.gz", "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]  # without the header
    if not 4 <= n_entities <= len(rows) - skip:
        taught = f" ({skip:,} were taught before)" if skip else ""
        limit = len(rows) - skip
        raise ValueError(f"n_entities for data=world must be from 4 to {limit}{taught}, got {n_entities}")
    names, *columns = zip(*rows[skip:skip + n_entities])
    values, codes = [], []
    for column in columns:
        distinct, numbers = np.unique(column, return_inverse=True)
        values.append([(str(value),) for value in distinct])
        codes.append(numbers)
    return FactSet(list(names), WORLD_ATTRIBUTES, values, np.stack(codes, axis=1), zipf)


def people(
        n_entities: int = 8000, zipf: float = 0.0, seed: int = 0, taken: frozenset[str] = frozenset()
) -> FactSet:
    """Invented people with five facts each, like bioS in "Physics of Language Models: Part 3.3" (Allen-Zhu &
    Li 2024).

    Every value is drawn uniformly and independently, so the facts about a person are worth exactly
    `bits_per_entity()` = 46.6 bits. Up to 32,768 people have a first name and a surname; with more, all have
    a middle name too. taken: names that nobody gets. Raises ValueError unless n_entities is from 4 to the
    number of names.
    """
    lists = json.loads((shipped("people") / "lists.json").read_text(encoding="utf-8"))
    rng = np.random.default_rng(seed)
    names = draw_names(lists, n_entities, rng, taken)
    dates = [
        f"{day} {month} {year}"
        for month in lists["months"] for day in range(1, 29) for year in range(1900, 2100)]
    universities = [
        f"{place} {kind}" for kind in lists["university kinds"] for place in lists["university places"]]
    employers = [f"{stem} {kind}" for stem in lists["company stems"] for kind in lists["company kinds"]]
    values, codes = [], []
    for choices in (dates, lists["cities"], universities, lists["majors"], employers):
        values.append([(choice,) for choice in choices])
        codes.append(rng.integers(len(choices), size=n_entities))
    return FactSet(names, PEOPLE_ATTRIBUTES, values, np.stack(codes, axis=1), zipf, biographies=True)


def draw_names(lists, n_entities, rng, taken):
    """n_entities different full names, none of them taken."""
    given_names = lists["first names"]
    surnames = [a + b for a in lists["surname beginnings"] for b in lists["surname endings"]]
    parts = [given_names, surnames]
    enough = n_entities + len(taken)
    if enough > len(given_names) * len(surnames):
        parts = [given_names, given_names, surnames]
    sizes = [len(part) for part in parts]
    limit = math.prod(sizes)
    if not (4 <= n_entities and enough <= limit):
        limit -= len(taken)
        raise ValueError(f"n_entities for data=people must be from 4 to {limit}, got {n_entities}")
    numbers = rng.choice(limit, enough, replace=False)  # a full name's number says which parts it has
    columns = [np.array(part)[i] for part, i in zip(parts, np.unravel_index(numbers, sizes))]
    names = [" ".join(full_name) for full_name in zip(*columns)]
    return [name for name in names if name not in taken][:n_entities]


FACT_KEYS = ("prompt", "answer", "also")
FACT_LINE = '{"prompt": ..., "answer": ...}'


def from_jsonl(path: str | Path) -> FactSet:
    """A user's own facts: one {"prompt": ..., "answer": ...} per line, where the answer is a string or a
    list of accepted strings. "also", a list of other wordings of the prompt, is optional: the first, third,
    ... are never taught and serve to ask; the others are taught.

    Raises ValueError naming file and line for anything else.
    """
    line_of, answers = {}, []  # wording -> number of its fact; the facts' accepted answers
    taught, held_out = [], []  # wordings
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if not line.strip():
            continue
        try:
            prompt, also, accepted = read_fact(line, path)
            for wording in (prompt, *also):
                if line_of.get(wording) == len(answers):
                    raise ValueError(f"the wording {wording[:60]!r} is there twice in this line")
                if wording in line_of:
                    raise ValueError(
                        f"the prompt {wording[:60]!r} is there twice; list its answers in one line")
                line_of[wording] = len(answers)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        answers.append(accepted)
        taught += [prompt, *also[1::2]]
        held_out += also[::2]
    if not answers:
        raise ValueError(f"{path}: no facts in it; expected one {FACT_LINE} per line")
    asked = facts_of_prompts(held_out, line_of, answers) if held_out else None
    return facts_of_prompts(taught, line_of, answers, asked)


def facts_of_prompts(prompts: list[str], line_of: dict[str, int], answers: list, held_out=None) -> FactSet:
    """Facts of which each prompt is an entity's name, with one attribute: the answer of its line."""
    lines = np.array([line_of[prompt] for prompt in prompts])
    attributes = (Attribute("fact", ("{}",)),)
    return FactSet(prompts, attributes, [answers], lines[:, None], subjects=lines, held_out=held_out)


def read_fact(line, path):
    """A line's prompt, its other wordings and its tuple of accepted answers. Raises ValueError saying what is
    wrong with it.
    """
    try:
        fact = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise ValueError(f"not JSON ({reason}); expected {FACT_LINE}") from None
    if not isinstance(fact, dict):
        raise ValueError(f'expected an object with "prompt" and "answer", got {type(fact).__name__}')
    check_keys(fact, path)
    prompt, also, accepted = fact["prompt"], fact.get("also", []), fact["answer"]
    if not isinstance(accepted, list):
        accepted = [accepted]
    if not is_words(prompt):
        raise ValueError('"prompt" must be a string that is not empty')
    if not isinstance(also, list) or not all(map(is_words, also)):
        raise ValueError('"also" must be a list of strings, none of them empty')
    if not accepted or not all(map(is_words, accepted)):
        raise ValueError('"answer" must be a string, or a list of strings, none of them empty')
    if re.search(r"[\ud800-\udfff]", "".join([prompt, *also, *accepted])):
        raise ValueError("half of a \\ud800 pair is not a character")
    strip = lambda texts: tuple(text.strip() for text in texts)
    return prompt.strip(), strip(also), tuple(dict.fromkeys(strip(accepted)))  # each answer once


def check_keys(fact, path):
    """Raises ValueError for a key that is missing or misspelt. Other keys, such as an id, are ignored."""
    others = {key.lower(): key for key in fact.keys() - set(FACT_KEYS)}
    for key in FACT_KEYS:
        similar = difflib.get_close_matches(key, others, n=1, cutoff=0.7)
        if key in fact:
            continue
        if similar:
            raise ValueError(f'unknown key "{others[similar[0]]}" (did you mean "{key}"?)')
        if key != "also":
            hint = f"; for documents: {prepare_command(shlex.quote(str(path)))}" if "text" in fact else ""
            raise ValueError(f'the key "{key}" is missing{hint}')


def is_words(value):
    """Whether a JSON value is a string with more than blanks."""
    return isinstance(value, str) and value.strip() != ""


# ------------------------------------------------------------------------------------------------
# Reading files


def read_text(path: str | Path) -> str:
    """A file's text, with its line ends unchanged. Raises ValueError naming the line that is not UTF-8."""
    content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)  # some editors begin files with it
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {number}: byte {column} is not UTF-8") from None


def lines_of(text: str) -> list[str]:
    """A text's lines, split at \\n, \\r\\n and \\r. (str.splitlines splits at \\u2028 and others too.)"""
    return re.split(r"\r\n|\r|\n", text)


COMPRESSED = (".zst", ".bz2", ".xz", ".lz4", ".br", ".zip", ".7z", ".rar",
              ".tar", ".tgz", ".tar.gz", ".parquet.gz")


def refuse_compressed(path: str | Path):
    """Raises ValueError for a name that belongs to an archive or to a compressed file other than .gz."""
    if str(path).lower().endswith(COMPRESSED):
        raise ValueError(f"{path}: nanomem reads no compressed files but .gz; unpack it first")


def refuse_json(path: str | Path, text: str):
    """Raises ValueError, with the remedy, for JSON in a file not named .jsonl: a model shouldn't learn its
    braces.

    text: the file's text, or its beginning.
    """
    value = json_beginning(text)
    if value is None:
        return
    keys = value if isinstance(value, dict) else ()
    # facts.jsonl for facts.json, facts.txt or facts.txt.gz
    name = re.sub(r"(\.[^./\\]*)?(\.gz)?$", ".jsonl", str(path), count=1, flags=re.IGNORECASE)
    name = shlex.quote(name)
    if "prompt" in keys and "answer" in keys:
        remedy = f"save it as {name}, one object a line, to teach these facts: python train.py --data={name}"
    elif "text" in keys:
        remedy = f"save it as {name}, one object a line, to train on these documents: {prepare_command(name)}"
    else:
        remedy = (f"expected text, or {name} with one object a line: "
                  f'{FACT_LINE} for train.py, {{"text": ...}} for data/prepare.py')
    raise ValueError(f"{path} looks like JSON; {remedy}")


def json_beginning(text: str) -> dict | list | None:
    """The first object in JSON lines or in a JSON array; the whole of any other JSON array; None for other
    text.
    """
    begin = re.match(r"\ufeff?\s*", text).end()
    inside = re.compile(r"\[?\s*").match(text, begin).end()
    for start in (inside, begin):
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        # Text may begin with brackets too, so an array must be all of it, and an object must end its line.
        following = r"\s*\Z" if isinstance(value, list) else r"[ \t\r]*(\n|,|\]|\Z)"
        if isinstance(value, (dict, list)) and re.compile(following).match(text, end):
            return value
    return None


def prepare_command(name: str) -> str:
    """The command that prepares a file of documents, whose name is already quoted for a shell."""
    return f"python data/prepare.py {name} --out=data/mine, then --data=mine"
