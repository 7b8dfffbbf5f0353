"""
Sets of facts, the sentences that state them, and how much of them a model recalls.

- A fact is an (entity, attribute) pair with an answer: (Lagos, country) -> Nigeria.
- Every fact is stated, in several wordings or in biographies. Half of the pairs are also asked as questions
  while training; the questions of the other half are never seen, so answering one takes the fact itself and
  not the sentence.
- `world` has real cities, `people` invented biographies with a known number of bits, `from_jsonl` a user's
  facts.
"""

import codecs
import gzip
import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanomem import tokenizer

PACKAGE = Path(__file__).resolve().parent
INSTALLED, CLONE = PACKAGE / "shipped", PACKAGE.parent / "data"
DATA = INSTALLED if INSTALLED.exists() else CLONE
ASKED, SELECT, REPORT = (
    0,
    1,
    2,
)  # a pair's questions: asked while training; never, and for choosing settings; never, and reported


@dataclass(frozen=True)
class Attribute:
    """A kind of fact and its wordings: "{}" stands for the entity, the answer comes at the end."""

    name: str
    statements: tuple
    questions: tuple = ()


WORLD_ATTRIBUTES = (
    Attribute("country",
              ("The city of {} is in", "The country of {} is", "On the map {} belongs to"),
              ("In which country is {}?", "What country is {} in?")),
    Attribute("time zone",
              ("The time zone of {} is", "Clocks in {} follow", "The local time of {} is"),
              ("What time zone is {} in?", "Which time zone do clocks in {} follow?")),
    Attribute("population",
              ("The population of {} is", "The number of people in {} is", "The inhabitants of {} number"),
              ("How many people live in {}?", "What is the population of {}?")),
    Attribute("latitude",
              ("The latitude of {} is", "From south to north {} is at", "The parallel of {} is"),
              ("What is the latitude of {}?", "How far north or south is {}?")),
    Attribute("longitude",
              ("The longitude of {} is", "From west to east {} is at", "The meridian of {} is"),
              ("What is the longitude of {}?", "How far east or west is {}?")),
)

# Every prompt ends in the same token, so that what a model keeps at the place where it answers is found again whatever the wording:
# with questions that end otherwise than biographies, a memory layer keeps as many facts and answers half as
# many questions.
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
        attributes: Attribute, ...
        values: for each attribute a list of values; a value is a tuple of accepted spellings, the first one
        taught.
        codes: (entities, attributes) integers, which value each pair has.
        zipf: entity number r (from 0) is mentioned in proportion to (r + 1) ** -zipf; 0 mentions all alike.
        biographies: facts are stated together, the statements of all attributes after an entity's name:
            each has one, "{} ...".
    """

    def __init__(self, entities, attributes, values, codes, zipf=0.0, biographies=False):
        self.entities, self.attributes, self.values, self.codes = entities, attributes, values, codes
        self.biographies = biographies
        frequency = np.arange(1, len(entities) + 1, dtype=np.float64) ** -zipf
        self.frequency = frequency / frequency.sum()
        self.role = self._split()

    def _split(self):
        """(entities, attributes) of ASKED, SELECT or REPORT: a half and two quarters of each attribute's
        pairs.

        The same for every training seed, so that no run was ever taught what another is asked.
        """
        n = len(self.entities)
        rng = np.random.default_rng(0)
        quarters = np.arange(n) * 4 // n  # 0 and 1: asked, 2: for choosing, 3: reported
        roles = np.stack([np.maximum(rng.permutation(quarters) - 1, ASKED) for _ in self.attributes], axis=1)
        has_questions = [len(a.questions) > 0 for a in self.attributes]
        return np.where(has_questions, roles, ASKED).astype(np.int8)

    def answers(self, entity, attribute):
        """The accepted answers of a pair, the taught one first."""
        return self.values[attribute][self.codes[entity, attribute]]

    def bands(self):
        """'head', 'torso' and 'tail' -> the entities that make up a third of all mentions each (Sun et al.
        2023).
        """
        third = np.minimum((np.cumsum(self.frequency) - self.frequency / 2) * 3, 2).astype(int)
        return {name: np.flatnonzero(third == i) for i, name in enumerate(("head", "torso", "tail"))}

    def bits_per_entity(self):
        """The information in an entity's answers, if its values were drawn evenly and apart."""
        return sum(math.log2(len(values)) for values in self.values)

    def most_frequent_scores(self):
        """For each attribute the recall of a model that always answers its most frequent value:
        (attributes,).
        """
        return np.array([np.bincount(column).max() / len(column) for column in self.codes.T])


def world(n_entities=1000, zipf=0.0):
    """The n_entities largest cities of the world and five facts about each (GeoNames, CC BY 4.0).

    Raises ValueError if n_entities is not between 4 and the number of cities in data/world/cities.tsv.gz.
    """
    with gzip.open(DATA / "world" / "cities.tsv.gz", "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    if not 4 <= n_entities <= len(rows):
        raise ValueError(f"n_entities for data=world must be from 4 to {len(rows)}, got {n_entities}")
    names, *columns = zip(*rows[:n_entities])
    unique = [np.unique(column, return_inverse=True) for column in columns]
    values = [[(str(value),) for value in distinct] for distinct, _ in unique]
    return FactSet(
        list(names), WORLD_ATTRIBUTES, values, np.stack([code for _, code in unique], axis=1), zipf
    )


def people(n_entities=8000, zipf=0.0, seed=0):
    """Invented people with five facts each, like bioS of "Physics of Language Models: Part 3.3" (Allen-Zhu
    & Li 2024).

    Every value is drawn evenly and on its own, so a person is worth exactly `bits_per_entity()` bits, 46.6.
    Up to 32,768 people have a first name and a surname, more of them a middle name too.
    """
    lists = json.loads((DATA / "people" / "lists.json").read_text(encoding="utf-8"))
    first = lists["first names"]
    last = [a + b for a in lists["surname beginnings"] for b in lists["surname endings"]]
    parts = [first, last] if n_entities <= len(first) * len(last) else [first, first, last]
    if not 4 <= n_entities <= math.prod(map(len, parts)):
        raise ValueError(
            f"n_entities for data=people must be from 4 to {math.prod(map(len, parts))}, got {n_entities}"
        )
    rng = np.random.default_rng(seed)
    numbers = rng.choice(math.prod(map(len, parts)), n_entities, replace=False)
    names = [" ".join(part[i] for part, i in zip(parts, index))
             for index in zip(*np.unravel_index(numbers, [len(part) for part in parts]))]
    months = lists["months"]
    values = [
        [
            (f"{day} {month} {year}",)
            for month in months
            for day in range(1, 29)
            for year in range(1900, 2100)
        ],
        [(city,) for city in lists["cities"]],
        [(f"{place} {kind}",) for kind in lists["university kinds"] for place in lists["university places"]],
        [(major,) for major in lists["majors"]],
        [(f"{stem} {kind}",) for stem in lists["company stems"] for kind in lists["company kinds"]],
    ]
    codes = np.stack([rng.integers(len(choices), size=n_entities) for choices in values], axis=1)
    return FactSet(names, PEOPLE_ATTRIBUTES, values, codes, zipf, biographies=True)


def teaches_facts(data):
    """Whether --data teaches facts and not a text: world, people, or a file named .jsonl, in any letter
    case.
    """
    return data in ("world", "people") or data.lower().endswith(".jsonl")


def from_jsonl(path):
    """A user's own facts: one {"prompt": ..., "answer": ...} a line, the answer a string or a list of
    accepted strings.

    Raises ValueError naming file and line for anything else.
    """
    answers = {}  # prompt -> accepted answers
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fact = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{where}: not JSON ({getattr(error, 'msg', error)}); expected {{\"prompt\": ..., \"answer\": ...}}"
            ) from None
        if not isinstance(fact, dict):
            raise ValueError(
                f"{where}: expected an object with \"prompt\" and \"answer\", got {type(fact).__name__}"
            )
        for key in ("prompt", "answer"):
            if key not in fact:
                hint = f"; for documents: {prepare_command(shlex.quote(str(path)))}" if "text" in fact else ""
                raise ValueError(f"{where}: the key \"{key}\" is missing{hint}")
        accepted = fact["answer"] if isinstance(fact["answer"], list) else [fact["answer"]]
        if not isinstance(fact["prompt"], str) or not fact["prompt"].strip():
            raise ValueError(f"{where}: \"prompt\" must be a string that is not empty")
        if not accepted or not all(isinstance(a, str) and a.strip() for a in accepted):
            raise ValueError(
                f"{where}: \"answer\" must be a string, or a list of strings, none of them empty"
            )
        prompt, accepted = fact["prompt"].strip(), tuple(a.strip() for a in accepted)
        if any(0xD800 <= ord(character) < 0xE000 for text in (prompt, *accepted) for character in text):
            raise ValueError(f"{where}: half of a \\ud800 pair stands alone, which is no character")
        if prompt in answers:
            raise ValueError(
                f"{where}: the prompt {prompt[:60]!r} is there twice; list its answers in one line"
            )
        answers[prompt] = accepted
    if not answers:
        raise ValueError(f"{path}: no facts in it; expected one {{\"prompt\": ..., \"answer\": ...}} a line")
    # Each line is an entity of its own whose name is the prompt.
    return FactSet(
        list(answers),
        (Attribute("fact", ("{}",)),),
        [list(answers.values())],
        np.arange(len(answers))[:, None],
    )


def read_text(path):
    """A file's text, with the line ends it has. Raises ValueError naming the line that is not UTF-8."""
    content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)  # some editors begin files with it
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {number}: byte {column} is not UTF-8") from None


def lines_of(text):
    """A text's lines. \\n, \\r\\n and \\r end one; str.splitlines would also cut at \\u2028 and others."""
    return re.split(r"\r\n|\r|\n", text)


COMPRESSED = (".zst", ".bz2", ".xz", ".lz4", ".br", ".zip", ".7z", ".rar",
              ".tar", ".tgz", ".tar.gz", ".parquet.gz")


def refuse_compressed(path):
    """Raises ValueError for the name of an archive or of a compressed file, unless it is a .gz."""
    if str(path).lower().endswith(COMPRESSED):
        raise ValueError(f"{path}: nanomem reads no compressed files but .gz; unpack it first")


def refuse_json(path, text):
    """Raises ValueError, with the remedy, for JSON in a file that is not named .jsonl: a model should not
    learn its braces.

    text: the file's text, or its beginning.
    """
    first = json_beginning(text)
    if first is None:
        return
    keys = first if isinstance(first, dict) else ()
    # facts.jsonl for facts.json, facts.txt or facts.txt.gz
    name = shlex.quote(re.sub(r"(\.[^./\\]*)?(\.gz)?$", ".jsonl", str(path), count=1, flags=re.IGNORECASE))
    if "prompt" in keys and "answer" in keys:
        remedy = f"save it as {name}, one object a line, to teach these facts: python train.py --data={name}"
    elif "text" in keys:
        remedy = f"save it as {name}, one object a line, to train on these documents: {prepare_command(name)}"
    else:
        remedy = (f'expected text, or {name} with one object a line: '
                  '{"prompt": ..., "answer": ...} for train.py, {"text": ...} for data/prepare.py')
    raise ValueError(f"{path} looks like JSON; {remedy}")


def json_beginning(text):
    """The first object of JSON lines or of a JSON array; an array of anything else; None for other text."""
    begin = re.match(r"\ufeff?\s*", text).end()
    inside = re.compile(r"\[?\s*").match(text, begin).end()
    for start in (inside, begin):
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        following = r"\s*\Z" if isinstance(value, list) else r"[ \t\r]*(\n|,|\]|\Z)"
        if isinstance(value, (dict, list)) and re.compile(following).match(text, end):
            return value
    return None


def prepare_command(name):
    """The command for a file of documents, whose name is quoted for a shell."""
    return f"python data/prepare.py {name} --out=data/mine, then --data=mine"


def all_sentences(facts):
    """Every statement and question with its answer, as text: what a tokenizer is trained on."""
    for e, entity in enumerate(facts.entities):
        for a, attribute in enumerate(facts.attributes):
            for wording in attribute.statements + attribute.questions:
                yield f"{wording.replace('{}', entity)} {facts.answers(e, a)[0]}"


# ------------------------------------------------------------------------------------------------
# Sentences as tokens


class Sentences:
    """Turns facts into tokens. Words are encoded piece by piece once, so that a batch only has to join
    lists.
    """

    def __init__(self, facts, encoding):
        self.facts, self.encoding = facts, encoding
        self.end = encoding.eot_token

        def encode(
            texts,
        ):  # tiktoken's batches start threads each time, which takes longer than short texts do
            return [tokenizer.encode(encoding, text).tolist() for text in texts]
        # A name in mid-sentence is encoded with its space: " Lagos".
        self.names = {False: encode(facts.entities), True: encode([" " + name for name in facts.entities])}
        self.values = [
            [encode([" " + spelling for spelling in value]) for value in values] for values in facts.values
        ]
        self.codes = facts.codes.tolist()  # read one by one faster than an array's elements
        self.pieces = {wording: encode([wording.split("{}")[0].rstrip(" "), wording.split("{}")[1]])
                       for a in facts.attributes for wording in a.statements + a.questions}

    def prompt(self, entity, wording):
        """The tokens up to the answer."""
        before, after = self.pieces[wording]
        return before + self.names[bool(before)][entity] + after

    def answers(self, entity, attribute):
        """The tokens of each accepted answer."""
        return self.values[attribute][self.codes[entity][attribute]]

    def longest(self):
        """(tokens of the longest document, with its longest accepted answers and <|endoftext|>; the entity
        it is about)
        """
        names = {inside: np.array([len(name) for name in names]) for inside, names in self.names.items()}
        lengths, biography = [], names[False] + 1
        for a, attribute in enumerate(self.facts.attributes):
            answers = np.array([max(map(len, value)) for value in self.values[a]])[self.facts.codes[:, a]]
            for before, after in (
                self.pieces[wording] for wording in attribute.statements + attribute.questions
            ):
                lengths.append(len(before) + names[bool(before)] + len(after) + answers + 1)
            biography = biography + len(self.pieces[attribute.statements[0]][1]) + answers
        longest = np.max(lengths + [biography] * self.facts.biographies, axis=0)
        return int(longest.max()), int(longest.argmax())

    def document(self, entity, attribute, wording):
        """Prompt, taught answer and <|endoftext|>."""
        return self.prompt(entity, wording) + self.answers(entity, attribute)[0] + [self.end]

    def biography(self, entity, order):
        """The entity's name, and the statement and taught answer of each attribute in this order;
        <|endoftext|>.
        """
        tokens = list(self.names[False][entity])
        for a in order:
            tokens += self.pieces[self.facts.attributes[a].statements[0]][1]
            tokens += self.answers(entity, a)[0]
        return tokens + [self.end]


# ------------------------------------------------------------------------------------------------
# Recall


@torch.no_grad()
def recall(model, sentences, pairs, questions, batch_size=64):
    """Which facts the model recalls: the answer it decodes greedily, to its end, is an accepted one. (In a
    biography no end follows, but another statement: there what it decodes must begin with an accepted
    answer.)

    Args:
        model: a GPT.
        sentences: a Sentences.
        pairs: (n, 2) array of (entity, attribute).
        questions: ask with a question; otherwise with a statement, which was taught, up to its answer.
    Returns:
        (n,) bool array.
    """
    facts, device = sentences.facts, next(model.parameters()).device
    rows = []  # (pair, tokens, where the answer begins)
    for number, (e, a) in enumerate(pairs):
        attribute = facts.attributes[a]
        wordings = attribute.questions if questions else attribute.statements
        prompt = [sentences.end] + sentences.prompt(e, wordings[e % len(wordings)])
        end = [] if facts.biographies and not questions else [sentences.end]
        rows += [(number, prompt + answer + end, len(prompt)) for answer in sentences.answers(e, a)]
    rows.sort(key=lambda row: len(row[1]))  # so that a batch needs little padding
    known = np.zeros(len(pairs), dtype=bool)
    was_training = model.training
    model.eval()
    for i in range(0, len(rows), batch_size):
        batch = rows[i:i + batch_size]
        tokens = torch.full((len(batch), len(batch[-1][1])), sentences.end)
        for j, (_, row, _) in enumerate(batch):
            tokens[j, :len(row)] = torch.tensor(row)
        logits, _ = model(tokens[:, :-1].to(device))
        hits = (logits.argmax(-1).cpu() == tokens[:, 1:]).numpy()
        # Greedy decoding gives exactly this answer if every token of it is the likeliest after those before
        # it, so one forward pass over prompt and answer tells what decoding token by token would.
        for j, (number, row, start) in enumerate(batch):
            known[number] |= hits[j, start - 1:len(row) - 1].all()
    model.train(was_training)
    return known


def measure(model, sentences, most):
    """What a model recalls: {"select": scores, "report": scores, "taught": scores}, each from at most
    `most` pairs.

    select and report are by questions never asked of the pair, taught is by a statement and over all pairs;
    a kind without pairs is left out. Scores are those of `scores`. The pairs are the same at each call.
    """
    facts, measured = sentences.facts, {}
    for kind, role in (
        ("select", facts.role == SELECT),
        ("report", facts.role == REPORT),
        ("taught", facts.role >= 0),
    ):
        pairs = np.argwhere(role)
        if len(pairs) > most:
            pairs = pairs[np.random.default_rng(0).choice(len(pairs), most, replace=False)]
        if len(pairs):
            measured[kind] = scores(facts, pairs, recall(model, sentences, pairs, questions=kind != "taught"))
    return measured


def scores(facts, pairs, known):
    """The share of pairs known: under "all", "head", "torso", "tail" and each attribute's name. None
    without pairs.
    """
    groups = {"all": np.ones(len(pairs), dtype=bool)}
    groups |= {band: np.isin(pairs[:, 0], entities) for band, entities in facts.bands().items()}
    groups |= {a.name: pairs[:, 1] == i for i, a in enumerate(facts.attributes)}
    return {name: float(known[group].mean()) if group.any() else None for name, group in groups.items()}
