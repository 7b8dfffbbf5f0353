"""
What report.py shows of a run: its settings and curves, questions with the model's answers, the slots that
they read, and what the slots are for.

Everything is made of lists, dicts, numbers and strings, for JSON. Texts that repeat are numbers in a list of
texts. The amounts are limited, so that a page stays under 5 MB.
"""

import base64
import itertools
import json
import math
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanomem import checkpoint, recall, run, teaching, tokenizer
from nanomem.cli import UserError, defaults_beside, settings_of
from nanomem.config import Config
from nanomem.data import FactData, TextData, open_data
from nanomem.facts import REPORT, FactSet
from nanomem.kinds import KINDS
from nanomem.model import GPT
from nanomem.observe import run_observed, slot_shares
from nanomem.optim import named_tables
from nanomem.readers import BATCH_SIZE, Sample, favours, gates_of_readers, split_words, visible
from nanomem.sentences import Sentences

# Of a page, shared by its runs:
MOST_QUESTIONS = 300
MOST_CHARACTERS = 400_000  # of questions and answers
MOST_CHIPS = 6000  # tokens or words with their slots, counted once for each memory layer
MOST_SLOTS = 8500  # whose details are shown, counted once for each memory layer
MOST_CELLS = 1024**2  # of pictures of tables
# Of a run:
MOST_PASSAGES = 24  # of a text
MOST_ASKED, MOST_TAUGHT = 2000, 1000  # facts, to measure recall: of the kind that is shown, of the other
SLOTS_OF_CHIP = 10  # of a token in a memory layer
CHIPS_OF_QUESTION, LONGEST_CHIP = 80, 100  # LONGEST_CHIP: characters
ANSWER_TOKENS = 100  # that a model writes at most
READS, MOST_BATCHES = 650_000, 40  # of the sample of training data
CONTEXTS = 4  # of a slot, the heaviest
POINTS = 300  # of a curve

CURVES = {
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "recall": "recall, never asked",
    "recall_taught": "recall, taught wording",
    "mem_usage": "slots read during one evaluation",
    "bits_per_byte": "bits per byte",
    "kept_old": "old answers kept",
}
IN_PERCENT = ("recall", "recall_taught", "mem_usage", "kept_old")


@dataclass
class Trained:
    """A trained model and its data; None with a note if they can't be opened."""

    folder: Path
    saved: teaching.SavedModel
    model: GPT
    data: FactData | TextData | None
    notes: list[str]

    @property
    def encoding(self):
        """The tokenizer."""
        return self.data.encoding


def of_run(folder: Path, share: float, device: torch.device | str = "cpu") -> dict:
    """What the page shows of the run in a folder. share: of the page's limits that it may use."""
    trained = open_run(folder, device)
    found = {"name": str(folder), "settings": changed_settings(trained.saved.config),
             "about": about(trained), "curves": curves(folder), "notes": trained.notes}
    questions, looked_up = [], []
    if trained.data is not None and trained.data.facts:
        found["recall"], questions, looked_up = ask(trained, share)
    elif trained.data is not None:
        questions, looked_up = passages(trained, share)
    found["questions"] = questions
    if trained.model.memory_layers():
        add_chips(trained, questions, looked_up, share)
        found["memory"] = memory(trained, questions, share)
    return found


def open_run(folder, device) -> Trained:
    """The model and data of a run or an export. Raises UserError if there is no model."""
    saved = teaching.find(folder, "RUN")
    model = GPT(saved.config)
    saved.load(model)
    notes = [f"{problem}: this page shows {saved.files.name}" for problem in saved.refused.values()]
    data = None
    try:
        data = open_data(saved.config, saved.tokenizer())
    except (OSError, ValueError, ModuleNotFoundError, UserError) as error:
        notes.append(f"The data can't be opened, so there are no questions and no readers of slots: {error}")
    return Trained(folder, saved, model.to(device).eval(), data, notes)


# ------------------------------------------------------------------------------------------------
# The run


def changed_settings(config: Config) -> list[list[str]]:
    """[name, value, default] of the settings that differ from the defaults."""
    defaults = Config(**defaults_beside(Config, {"init_from": config.init_from}))
    # Not settings of the run itself, or made from other settings
    left_out = {"vocab_size", "out_dir", "resume", "device"}
    changed = []
    for name in settings_of(Config).keys() - left_out:
        value, default = getattr(config, name), getattr(defaults, name)
        is_chosen = name == "train" and value == ("values" if config.init_from else "all")
        if value != default and not is_chosen:
            changed.append([name, str(value), str(default)])
    return sorted(changed)


def about(trained: Trained) -> list[list[str]]:
    """[title, text] of the data, the model and its training."""
    saved, model = trained.saved, trained.model
    config, records = saved.config, run.read_metrics(trained.folder)
    data = config.data
    if trained.data is not None and trained.data.facts:
        data += f": {run.how_many(trained.data.facts)}"
    core, sparse = model.count_parameters()
    parameters = f"{core:,}"
    if sparse:
        parameters += f" + {sparse:,} in {KINDS[config.ffn].sparse_name}"
    rows = [["data", data], ["layers", f"{config.n_layer} of width {config.n_embd}, ffn={config.ffn}"],
            ["parameters", parameters],
            ["work", f"{model.flops_per_token() / 1e6:.3f} million FLOPs per token"]]
    if config.init_from:
        rows.append(["taught from", config.init_from])
    if saved.iteration is not None:
        rows.append(["updates", f"{saved.iteration:,}"])
    if records:
        seconds = round(records[-1]["elapsed_s"])
        speeds = [record["tokens_per_sec"] for record in records if "tokens_per_sec" in record]
        rows.append(["time", f"{seconds // 60} min {seconds % 60:02} s"])
        rows.append(["tokens", f"{records[-1]['tokens']:,}"])
        if speeds:
            rows.append(["speed", f"{statistics.median(speeds):,.0f} tokens/s (median)"])
    header = checkpoint.read_json(saved.files / checkpoint.HEADER) or {}
    rows.append(["machine", str(header.get("machine", "not recorded"))])
    return rows


def curves(folder: Path) -> list[dict]:
    """A curve for each figure of CURVES that a run has measured: its points [updates, value]."""
    records, found = run.read_metrics(folder), []
    # Of facts without questions or other wordings, "recall" is that of the taught prompts.
    has_questions = any("recall_select" in r or r.get("recall") != r.get("recall_taught") for r in records)
    for key, title in CURVES.items():
        points = [[record["iter"], record[key]] for record in records if is_finite(record.get(key))]
        if key == "recall" and not has_questions:
            continue
        every = math.ceil(len(points) / POINTS)
        if points:
            thinned = points[:-1:every] + points[-1:]
            found.append({"title": title, "percent": key in IN_PERCENT, "points": thinned})
    return found


def is_finite(value) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------
# Questions


@dataclass
class Asked:
    """What a model knows of one kind of prompts."""

    title: str
    sentences: Sentences
    questions: bool  # whether the prompts are questions
    pairs: np.ndarray  # (n, 2), of entity and attribute
    known: np.ndarray  # (n,) bool


def measure(trained: Trained) -> list[Asked]:
    """What the model recalls: of questions or wordings that training never had, if there are any, and of
    taught ones.
    """
    facts, sentences = trained.data.facts, trained.data.sentences
    kinds = [("taught wording", sentences, False, facts.role >= 0)]
    if sentences.held_out:
        every = facts.held_out.role >= 0
        kinds.insert(0, ("wording never taught", sentences.held_out, False, every))
    elif (facts.role == REPORT).any():
        kinds.insert(0, ("never asked", sentences, True, facts.role == REPORT))
    asked = []
    for title, wordings, questions, is_of_kind in kinds:
        pairs = recall.choose_pairs(is_of_kind, MOST_TAUGHT if asked else MOST_ASKED)
        known, _ = recall.ask(trained.model, wordings, pairs, questions)
        asked.append(Asked(title, wordings, questions, pairs, known))
    return asked


def recall_table(facts: FactSet, asked: list[Asked]) -> dict:
    """Recall by attribute and frequency: {"kinds": titles, "asked": how many prompts, "rows": [name, share
    for each kind], "bands": how many of the rows are of a frequency}.
    """
    names = [attribute.name for attribute in facts.attributes] if len(facts.attributes) > 1 else []
    bands = ["head", "torso", "tail"] if facts.frequency[0] > facts.frequency[-1] else []
    scores = [recall.scores(kind.sentences.facts, kind.pairs, kind.known) for kind in asked]
    rows = [[name, *(of_kind.get(name) for of_kind in scores)] for name in [*names, *bands, "all"]]
    counts = [len(kind.pairs) for kind in asked]
    return {"kinds": [kind.title for kind in asked], "asked": counts, "rows": rows,
            "bands": len(bands)}


def ask(trained: Trained, share: float) -> tuple[dict, list[dict], list[dict]]:
    """(recall by attribute and frequency, questions, what each question's tokens read)."""
    asked = measure(trained)
    table, kind = recall_table(trained.data.facts, asked), asked[0]
    chosen = choose(kind.known, round(MOST_QUESTIONS * share))
    shown, sequences = answered(trained, kind, chosen, share)
    looked_up = look(trained.model, sequences)
    for question, found in zip(shown, looked_up):
        question["confidence"] = round(found["probability"], 4)
    n_right, n_known = sum(question["right"] for question in shown), kind.known.sum()
    table["shown"] = (
        f"{len(shown):,} of {len(kind.known):,} questions ({kind.title}): {len(shown) - n_right:,} of the "
        f"{len(kind.known) - n_known:,} wrong ones, {n_right:,} of the {n_known:,} right ones")
    return table, shown, looked_up


def choose(known: np.ndarray, most: int) -> np.ndarray:
    """Which questions to show, in order: at most `most`, up to half of them wrong."""
    order = np.random.default_rng(0).permutation(len(known))
    wrong, right = order[~known[order]], order[known[order]]
    n_wrong = min(len(wrong), max(most // 2, most - len(right)))
    return np.sort(np.concatenate([wrong[:n_wrong], right[:most - n_wrong]]))


def answered(
        trained: Trained, kind: Asked, chosen: np.ndarray, share: float) -> tuple[list[dict], list[dict]]:
    """(the chosen questions with the model's answer and the truth, their tokens), as far as the texts fit the
    page.
    """
    sentences, facts, shown, sequences = kind.sentences, kind.sentences.facts, [], []
    for (e, a), is_right in zip(kind.pairs[chosen].tolist(), kind.known[chosen].tolist()):
        attribute, accepted = facts.attributes[a], sentences.answers(e, a)
        wordings = attribute.questions if kind.questions else attribute.statements
        wording = wordings[e % len(wordings)]
        shown.append({"prompt": wording.replace("{}", facts.entities[e]), "about": attribute.name,
                      "truth": list(facts.answers(e, a)), "right": is_right})
        # The answer to a fact that the model recalls is known, if only one is accepted.
        answer = accepted[0] + [sentences.end] if is_right and len(accepted) == 1 else None
        sequences.append({"prompt": [sentences.end] + sentences.prompt(e, wording), "answer": answer})
    for unanswered in same_length(sequences):
        generate(trained, unanswered)
    left = MOST_CHARACTERS * share
    for i, (question, sequence) in enumerate(zip(shown, sequences)):
        question["answer"] = text_of(trained.encoding, sequence["answer"])
        left -= len(json.dumps(question))
        if left < 0 and i:
            return shown[:i], sequences[:i]
    return shown, sequences


def same_length(sequences: list[dict]) -> list[list[dict]]:
    """The sequences without an answer, in groups with prompts of one length."""
    unanswered = [sequence for sequence in sequences if sequence["answer"] is None]
    length = lambda sequence: len(sequence["prompt"])
    return [list(group) for _, group in itertools.groupby(sorted(unanswered, key=length), length)]


def generate(trained: Trained, sequences: list[dict]):
    """Answers prompts of one length: adds the tokens of the likeliest answers, up to <|endoftext|>."""
    end = trained.encoding.eot_token
    longest, _ = trained.data.sentences.longest()
    device = next(trained.model.parameters()).device
    idx = torch.tensor([sequence["prompt"] for sequence in sequences], device=device)
    stream = trained.model.generate(
        idx[:, -trained.model.config.block_size:], min(longest, ANSWER_TOKENS), temperature=0, stop=end,
        never=tokenizer.unassigned(trained.encoding))
    for sequence, answer in zip(sequences, torch.cat(list(stream), dim=1).tolist()):
        sequence["answer"] = answer[:answer.index(end) + 1] if end in answer else answer


def text_of(encoding, answer: list[int]) -> str:
    """The text of an answer; one that was cut off ends in an ellipsis."""
    if answer[-1:] == [encoding.eot_token]:
        return encoding.decode(answer[:-1]).strip()
    return encoding.decode(answer).strip() + " …"


def passages(trained: Trained, share: float) -> tuple[list[dict], list[dict]]:
    """(passages of the val split of a text, what each of their tokens reads)."""
    tokens, _ = trained.data.batch("val", 0, max(1, round(MOST_PASSAGES * share)))
    sequences = [{"prompt": row[:CHIPS_OF_QUESTION * 4].tolist(), "answer": []} for row in tokens]
    shown = [{"prompt": trained.encoding.decode(sequence["prompt"])} for sequence in sequences]
    return shown, look(trained.model, sequences)


@torch.no_grad()
def look(model: GPT, sequences: list[dict], tokens_at_once: int = 2048) -> list[dict]:
    """For each prompt with its answer: {"tokens": what the model sees of them, "start": where the answer
    begins, "probability": that it gives to the answer, "lookups": {layer: (indices, weights)}}.
    """
    device, found = next(model.parameters()).device, [None] * len(sequences)
    lengths = [len(sequence["prompt"] + sequence["answer"]) for sequence in sequences]
    by_length = sorted(range(len(sequences)), key=lengths.__getitem__)  # so that a batch needs little padding
    while by_length:
        length = min(lengths[by_length[-1]], model.config.block_size)
        count = max(1, tokens_at_once // length)
        batch, by_length = by_length[-count:], by_length[:-count]
        padded = torch.zeros(len(batch), length, dtype=torch.int64)              # (batch, time)
        for row, i in zip(padded, batch):
            tokens = (sequences[i]["prompt"] + sequences[i]["answer"])[-length:]
            row[:len(tokens)] = torch.tensor(tokens)
            start = len(tokens) - min(len(sequences[i]["answer"]), len(tokens) - 1)
            found[i] = {"tokens": tokens, "start": start}
        logits, lookups = run_observed(model, padded.to(device))
        log_p = logits.float().log_softmax(-1)                                   # (batch, time, vocab_size)
        for row, i in enumerate(batch):
            tokens, start = found[i]["tokens"], found[i]["start"]
            places = range(start - 1, len(tokens) - 1)
            found[i]["probability"] = log_p[row, places, tokens[start:]].sum().exp().item()
            found[i]["lookups"] = {
                layer: [part.unflatten(0, padded.shape)[row] for part in parts]
                for layer, parts in lookups.items()}
    return found


def add_chips(trained: Trained, questions: list[dict], looked_up: list[dict], share: float):
    """Adds to each question its "chips", as many as the page may have: [text, whether it is of the answer,
    for each memory layer [slot, thousandths of the weight, slot, ...]].
    """
    left = MOST_CHIPS * share / len(trained.model.memory_layers())
    for question, found in zip(questions, looked_up):
        chips = []
        words = split_words(trained.encoding, found["tokens"], found["start"])
        for begin, stop in words:
            if found["tokens"][begin] == trained.encoding.eot_token:
                continue
            if len(chips) == CHIPS_OF_QUESTION or left < 1:
                break
            slots = []
            for indices, weights in found["lookups"].values():
                top = slot_shares(indices[begin:stop], weights[begin:stop]).most_common(SLOTS_OF_CHIP)
                slots.append([number for slot, weight in top for number in (slot, round(1000 * weight))])
            text = token_text(trained.encoding, found["tokens"][begin:stop])
            if len(text) > LONGEST_CHIP:
                text = text[:LONGEST_CHIP] + "…"
            chips.append([text, int(begin >= found["start"]), slots])
            left -= 1
        question["chips"] = chips


def token_text(encoding, tokens: list[int]) -> str:
    """Tokens as visible text; bytes that are no whole character as \\x escapes."""
    shown = visible(encoding.decode_bytes(tokens).decode(errors="surrogateescape"))
    return re.sub(r"\\udc([0-9a-f]{2})", r"\\x\1", shown) or "␣"


# ------------------------------------------------------------------------------------------------
# The memory


class Texts:
    """A list of texts, each of them once."""

    def __init__(self):
        self.number_of = {}

    def number(self, text: str) -> int:
        """The place of a text in the list."""
        return self.number_of.setdefault(text, len(self.number_of))


def memory(trained: Trained, questions: list[dict], share: float) -> dict:
    """The tables as pictures, and the slots of each memory layer that are read most."""
    layers, texts, counts = trained.model.memory_layers(), Texts(), trained.saved.counts()
    sample = sample_training(trained)
    most = round(MOST_SLOTS * share / len(layers))
    used = {number: layer.table for number, layer in layers.items()}
    tables, table_of = [], {}
    named = [(name, table) for name, table in named_tables(trained.model) if table in used.values()]
    for name, table in named:
        of_table = [number for number, other in used.items() if other is table]
        table_of |= {number: len(tables) for number in of_table}
        cells = MOST_CELLS * share / len(named)
        tables.append(picture(trained, name, table, of_table, counts, sample, cells))
    details = []
    for place, number in enumerate(layers):
        reads = counts and counts.get(f"reads.{named[table_of[number]][0]}")
        details.append(slot_details(trained, sample, questions, place, number, most, reads, texts))
    return {"layers": list(layers), "table_of": [table_of[number] for number in layers], "tables": tables,
            "slots": details, "texts": list(texts.number_of), "sampled": sample.tokens.size if sample else 0,
            "updates": int(counts["updates"]) if counts else None}


def sample_training(trained: Trained) -> Sample | None:
    """About READS reads of the training data; None if that can't be opened."""
    if trained.data is None:
        return None
    per_token = sum(layer.heads * layer.knn for layer in trained.model.memory_layers().values())
    sequences = max(1, READS // (per_token * trained.data.block_size))
    batch_size = min(BATCH_SIZE, sequences)
    n_batches = min(MOST_BATCHES, sequences // batch_size)
    return Sample.of_training(trained.model, trained.data, n_batches, batch_size, gates=True)


def picture(trained, name, table, layers, counts, sample, most_cells) -> dict:
    """A table's use, as bytes in base64: for each cell of a square how often its slots were read, from 0 to
    255 on a log scale; and one bit for each, whether teaching changed a slot of it.
    """
    n_keys = math.isqrt(table.n_slots)
    pooled = max(1, math.ceil(n_keys / math.sqrt(most_cells)))  # slots on a side of a cell
    reads = counts[f"reads.{name}"].numpy() if counts else np.zeros(table.n_slots, dtype=np.int32)
    if not counts and sample is not None:
        for layer in layers:
            reads = reads + np.bincount(sample.reads[layer].slots, minlength=table.n_slots)
    cells = pool(reads, n_keys, pooled)                                          # (side, side)
    most = max(1, int(cells.max()))
    levels = np.ceil(255 * np.log1p(cells) / np.log1p(most)).astype(np.uint8)
    found = {"n_keys": n_keys, "pooled": pooled, "side": len(cells), "layers": layers, "most": most,
             "counted": bool(counts), "used": int((reads > 0).sum()), "levels": in_base64(levels)}
    changed = changed_slots(trained, name)
    if changed is not None:
        found["n_changed"] = int(changed.sum())
        found["changed"] = in_base64(np.packbits(pool(changed, n_keys, pooled).astype(bool)))
    return found


def pool(of_slots: np.ndarray, n_keys: int, pooled: int) -> np.ndarray:
    """The largest number in each square of pooled x pooled slots: (n_keys**2,) -> (side, side)."""
    side = math.ceil(n_keys / pooled)
    missing = side * pooled - n_keys
    padded = np.pad(of_slots.reshape(n_keys, n_keys), ((0, missing), (0, missing)))
    return padded.reshape(side, pooled, side, pooled).max(axis=(1, 3))


def changed_slots(trained: Trained, name: str) -> np.ndarray | None:
    """Which slots a run that taught a trained model has changed, (n_slots,) bool; None for any other."""
    if not trained.saved.config.init_from or trained.saved.iteration is None:
        return None
    state = f"optimizer.{name}.reads"
    found = checkpoint.read_tensors(trained.saved.files, lambda key: key == state)
    return found[state].numpy() > 0 if found else None


def in_base64(array: np.ndarray) -> str:
    """The bytes of an array as text."""
    return base64.b64encode(array.tobytes()).decode()


def slot_details(trained, sample, questions, place, number, most, reads, texts) -> list[dict]:
    """What is known of at most `most` slots of a memory layer, three quarters of them read by questions.

    place: the layer's place in chips. reads: how many updates read each slot of its table, if that is known.
    """
    in_questions, in_sample = Counter(), Counter()
    for question in questions:
        for _, _, slots in question["chips"]:
            for slot, weight in zip(slots[place][::2], slots[place][1::2]):
                in_questions[slot] += weight
    if sample is not None:
        slots, group = np.unique(sample.reads[number].slots, return_inverse=True)
        weights = np.bincount(group, sample.reads[number].weights)
        in_sample = Counter(dict(zip(slots.tolist(), weights.tolist())))
    chosen = [slot for slot, _ in in_questions.most_common(most * 3 // 4)]
    others = [slot for slot, _ in in_sample.most_common(2 * most) if slot not in in_questions]
    chosen = sorted(chosen + others[:most - len(chosen)])
    found = [{"slot": slot} for slot in chosen]
    if reads is not None:
        for detail in found:
            detail["updates"] = int(reads[detail["slot"]])
    if sample is not None and chosen:
        add_readers(sample, number, found, texts)
        add_favours(trained, sample, number, found, texts)
    return found


def add_readers(sample: Sample, layer: int, details: list[dict], texts: Texts):
    """Adds who reads slots in the sample: "readers", their number; "weight", the mean; "clues", [relation,
    word, share, usual share, score]; "contexts", [text before a reader, the reader, the word after it,
    share].
    """
    words, slots = sample.words[1], np.array([detail["slot"] for detail in details])
    clues, heaviest = sample.clues(layer, slots), sample.heaviest(layer, slots, CONTEXTS)
    for detail in details:
        weights, _ = sample.reads[layer].of(detail["slot"])
        total = float(weights.sum())
        detail["readers"] = len(weights)
        detail["weight"] = round(total / max(1, len(weights)), 4)
        detail["clues"] = [[clue.relation, texts.number(words[clue.word]), round(clue.share, 3),
                            float(f"{clue.usual:.2g}"), round(clue.score, 2)]
                           for clue in clues[detail["slot"]]]
        earlier = next((clue.word for clue in clues[detail["slot"]] if clue.relation == "after"), None)
        detail["contexts"] = [
            [*map(texts.number, sample.around(position, earlier)), round(weight / total, 3)]
            for position, weight in heaviest[detail["slot"]]]


def add_favours(trained, sample, layer, details, texts, at_once: int = 256):
    """Adds "favours": [token, what the slot adds to its logit] of the tokens it makes likelier than others,
    at the mean weight of its readers.
    """
    slots = np.array([detail["slot"] for detail in details])
    gates = gates_of_readers(sample, layer, slots)
    for begin in range(0, len(details), at_once):
        part = slice(begin, begin + at_once)
        added = favours(trained.model, layer, torch.from_numpy(slots[part]), gates[part])
        added -= added.mean(dim=1, keepdim=True)                                 # (slots, vocab_size)
        top = added.topk(min(5, added.shape[1]))
        for detail, scores, tokens in zip(details[part], top.values.tolist(), top.indices.tolist()):
            scores = [round(score * (detail["weight"] or 1), 2) for score in scores]
            names = [texts.number(token_text(trained.encoding, [token])) for token in tokens]
            detail["favours"] = [list(pair) for pair in zip(names, scores)]
