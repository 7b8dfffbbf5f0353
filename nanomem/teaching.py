"""
Teaching a trained model something new without losing the old: train.py's --init_from.

- Only the values of memory tables are trained, unless --train says otherwise: the core computes what it did,
  and a token changes only the few slots that it reads.
- --mem_idf makes the steps of a slot smaller the more often earlier training read it. --mem_top_slots leaves
  out all but the slots with the highest TF-IDF, as in "Continual Learning via Sparse Memory Finetuning" (Lin
  et al. 2025, arXiv 2510.15103).
- What the model knew before is asked again after teaching, wherever the old data can be opened.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from nanomem import checkpoint, export, recall, sharding
from nanomem.cli import UserError, defaults_beside
from nanomem.config import DESCRIBES_DATA, Config
from nanomem.data import FactData, TextData, open_data
from nanomem.facts import REPORT, FactSet
from nanomem.ops import sparse_rows
from nanomem.optim import RowAdam, coalesce_gradient_, named_tables, process_group_of, tables_of

# ------------------------------------------------------------------------------------------------
# The trained model


@dataclass
class SavedModel:
    """A trained model on disk: that of a run's newest checkpoint, or an export."""

    folder: Path  # of the run or export
    files: Path  # the folder of its safetensors files,
    prefix: str  # in which the names of parameters begin with this
    config: Config
    iteration: int | None  # None for an export
    refused: dict  # newer checkpoints that are damaged: {folder: what is wrong with it}

    def tokenizer(self) -> Path:
        """The file of its tokenizer."""
        return self.folder / "tokenizer.tiktoken"

    def load(self, model: torch.nn.Module):
        """Fills a model of its shape. Raises UserError if a file is damaged."""
        checkpoint.load(self.files, model, prefix=self.prefix)

    def counts(self) -> dict[str, torch.Tensor] | None:
        """How many updates trained it, and how many read each slot: see `count`. None if it wasn't saved."""
        return checkpoint.read_counts(self.files) or None


def find(folder: str | Path, name: str) -> SavedModel:
    """The trained model in a folder. Raises UserError if there is none.

    name: what the message calls the folder's place on the command line, such as --init_from.
    """
    folder = Path(folder)
    if (folder / export.FILE).exists():
        return SavedModel(folder, folder, "", export.read_config(folder), None, {})
    files, header, refused = checkpoint.newest(folder)
    if header is None:
        if (folder / "memory.json").exists():
            raise UserError(f"{folder} is a memory for a pretrained model; "
                            f"python -m nanomem.retrofit --model=NAME --memory={folder} asks it")
        raise UserError(
            f"{checkpoint.none_in(folder)}; {name} must name the folder of a run or an export")
    config = Config.from_saved(header["config"], folder)
    return SavedModel(folder, files, "model.", config, header["iteration"], refused)


def settings(given: dict, trained: SavedModel) -> dict:
    """The settings of a run that teaches a trained model: those given, and those that the model brings along.

    Raises UserError for a setting that is given and differs from the model's.
    """
    run = trained.config
    model = {name: getattr(run, name) for name in Config.fixed_by_model()}
    for name in sorted(given.keys() & model.keys()):
        if given[name] == model[name]:
            continue
        has = "its own tokenizer" if name == "tokenizer" else f"{name}={model[name]}"
        raise UserError(f"--{name}={given[name]} can't be set with --init_from: the model in "
                        f"{trained.folder} has {has}")
    defaults = defaults_beside(Config, given) | {"block_size": run.block_size}
    if run.ffn != "memory" or given.get("train") == "core":
        defaults["mem_idf"] = 0.0  # there are no steps to multiply
    if given.get("train", "auto") == "auto":
        given = given | {"train": "values" if run.has_tables() else "all"}
    taught = {name: getattr(run, name) for name in DESCRIBES_DATA}
    return defaults | given | model | {"earlier": [*run.earlier, taught]}


def freeze(model: torch.nn.Module, train: str):
    """Makes only these parameters trainable: "all", "values" of memory tables, or the "core", all others."""
    values = {id(table.values) for table in tables_of(model)}
    for p in model.parameters():
        part = "values" if id(p) in values else "core"
        p.requires_grad_(train in ("all", part))


# ------------------------------------------------------------------------------------------------
# Which slots to change


def count(model: torch.nn.Module, optimizers: list, updates: int, before: dict) -> dict[str, torch.Tensor]:
    """How many updates there were, and how many read each slot, in this run and before.

    {"updates": () int64, "reads.NAME": (n_slots,) int32 for each table, NAME being that of its values}
    before: the same, of earlier runs; {} for none.
    """
    counts = {"updates": torch.tensor(updates)}
    for name, table in named_tables(model):
        counts[f"reads.{name}"] = torch.zeros(table.n_slots, dtype=torch.int32)
        for optimizer in optimizers:
            state = optimizer.state.get(table.values, {})
            counts[f"reads.{name}"] += state["reads"].cpu() if "reads" in state else 0
    return {name: number + before.get(name, 0) for name, number in counts.items()}


def count_before(saved: dict, model: torch.nn.Module, optimizers: list, updates: int) -> dict:
    """The counts of earlier runs, of a run whose checkpoint has saved what `count` returned."""
    of_this_run = count(model, optimizers, updates, before={})
    return {name: number - of_this_run[name] for name, number in saved.items()}


def describe_changed_slots(counts: dict, before: dict) -> str:
    """How many slots a run has changed, and how many of those earlier runs had read. Takes the counts after
    and before.
    """
    changed = read_before = n_slots = 0
    for name in counts.keys() - {"updates"}:
        is_changed = counts[name] > before.get(name, 0)
        n_slots += len(is_changed)
        changed += is_changed.sum().item()
        if name in before:
            read_before += (is_changed & (before[name] > 0)).sum().item()
    share = ""
    if before and changed:
        share = f"; earlier training had read {read_before / changed:.0%} of those it changed"
    return f"It changed {changed:,} of {n_slots:,} slots{share}."


def inverse_document_frequency(counts: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """idf(i) = log((U + 1) / (r(i) + 1)) / log(U + 1), where r(i) of U earlier updates read slot i of the
    table whose values have this name: (n_slots,) float32.

    1 for a slot that none of them read, 0 for one that all of them read.
    """
    updates = counts["updates"] + 1.0
    if updates == 1:
        return torch.ones(len(counts[f"reads.{name}"]))
    return torch.log(updates / (counts[f"reads.{name}"] + 1)) / torch.log(updates)


def spare_slots(model: torch.nn.Module, optimizers: list, counts: dict[str, torch.Tensor], power: float):
    """Makes RowAdam multiply each slot's learning rate by idf ** power."""
    row_adam = next((optimizer for optimizer in optimizers if isinstance(optimizer, RowAdam)), None)
    if row_adam is None:
        raise UserError("--mem_idf needs RowAdam for the tables; use --mem_idf=0")
    for name, table in named_tables(model):
        scale = inverse_document_frequency(counts, name) ** power
        row_adam.row_scale[table.values] = scale.to(table.values.device)


class TopSlots:
    """Restricts an update to the slots that its batch reads most and earlier training read least.

    They are ranked by TF-IDF, c(i) idf(i), as in Lin et al. 2025: c(i) is how often the batch reads slot i.
    For the document frequency, the paper counts reads in batches of old data. Here RowAdam has counted them
    during training, so no old data is needed.

    Args:
        model: whose lookups it observes, with observe_lookups(model, top_slots).
        counts: of earlier training, from `count`.
        n_slots: how many slots of each table to keep.
    """

    def __init__(self, model: torch.nn.Module, counts: dict[str, torch.Tensor], n_slots: int):
        self.n_slots, self.idf, self.lookups = n_slots, {}, {}
        for name, table in named_tables(model):
            self.idf[table] = inverse_document_frequency(counts, name).to(table.values.device)
            self.lookups[table] = []

    def __call__(self, layer, indices, weights):
        self.lookups[layer.table].append(indices.flatten())

    @torch.no_grad()
    def restrict(self):
        """Drops the gradients of all other slots. To be called after the backward passes of an update."""
        for table, lookups in self.lookups.items():
            rows, grads = coalesce_gradient_(table.values, process_group_of(table))   # (u,), (u, columns)
            reads = torch.zeros(len(rows), device=rows.device)
            for slots in lookups:
                reads += torch.bincount(torch.searchsorted(rows, slots), minlength=len(rows))
            lookups.clear()
            scores = sharding.add(reads) * self.idf[table][rows]
            # Stable, so that of equal scores the first rows are kept, on every device.
            top = scores.argsort(descending=True, stable=True)[:self.n_slots].sort().values
            table.values.grad = sparse_rows(rows[top], grads[top], table.values.shape)


class Rehearsal:
    """New data, some of whose training sequences are replaced by sequences of earlier data, in turn.

    How many a batch gets depends only on the numbers of its sequences, so a resumed run sees the same.
    """

    BEGIN = 10**8  # far from the sequences that the model was trained on

    def __init__(self, data: FactData | TextData, earlier: list[FactData | TextData], share: float):
        self.data, self.earlier, self.share = data, earlier, share

    def __getattr__(self, name):
        return getattr(self.data, name)

    def batch(self, split: str, start: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, (batch_size, block_size) each: sequences of the new data, then earlier ones."""
        if split != "train":
            return self.data.batch(split, start, batch_size)
        first, last = math.floor(start * self.share), math.floor((start + batch_size) * self.share)
        parts, n_sets, n_new = [], len(self.earlier), batch_size - (last - first)
        if n_new:
            parts.append(self.data.batch("train", start - first, n_new))
        for i, old in enumerate(self.earlier):
            turns = [n for n in range(first, last) if n % n_sets == i]
            if turns:
                parts.append(old.batch("train", self.BEGIN + turns[0] // n_sets, len(turns)))
        inputs, targets = zip(*parts)
        return torch.cat(inputs), torch.cat(targets)


# ------------------------------------------------------------------------------------------------
# What is still known


@dataclass
class Earlier:
    """Data that a model was taught before, and what it knew of it when this run began."""

    number: int  # its place in config.earlier
    name: str
    data: FactData | TextData
    pairs: np.ndarray | None  # (n, 2) the facts to ask about, in random order; None for text
    before: np.ndarray | float | None = None  # what `measure` returned when the run began

    def measure(self, model: torch.nn.Module, most: int, loss_on: Callable) -> np.ndarray | float:
        """Which of at most `most` facts the model knows, (n,) bool; or the bits per byte of text.

        loss_on: (data) -> the model's loss on its val split.
        """
        if self.pairs is None:
            return loss_on(self.data) / math.log(2) / self.data.bytes_per_token
        questions = bool((self.data.facts.role == REPORT).any())
        known, _ = recall.ask(model, self.data.sentences, self.pairs[:most], questions)
        return known

    def saved(self) -> dict:
        """Its number, a digest of its data, and `before`, for JSON."""
        is_text = self.pairs is None
        before = self.before if is_text else np.packbits(self.before).tobytes().hex()
        return {"number": self.number, "digest": self.data.digest(), "before": before}

    def restore(self, saved: dict):
        """Sets `before` to what was saved."""
        if self.pairs is None:
            self.before = saved["before"]
            return
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(saved["before"]), np.uint8))
        self.before = bits[:len(self.pairs)].astype(bool)

    def describe(self, now: np.ndarray | float) -> str:
        """What `measure` returned, beside before."""
        if self.pairs is None:
            return f"{self.name}: {now:.3f} bits per byte; before, {self.before:.3f}"
        before = self.before[:len(now)]
        known, kept = before.sum(), (now & before).sum()
        share = f" ({kept / known:.1%})" if known else ""
        return (f"{self.name}: of {known:,} answers that it knew, it still knows {kept:,}{share}; "
                f"recall {now.mean():.1%}, before {before.mean():.1%}")


def open_earlier(config: Config, data, tokenizer: Path, most: int, console: Console) -> list[Earlier]:
    """The data of config.earlier, as far as it can be opened; prints which can't.

    data: the new data. Facts that it or a later set contradicts are not asked about, nor their entities
    rehearsed. most: how many facts of each set to ask about at most.
    """
    found = []
    later = [data.facts] if data.facts else []  # what was taught after a set
    for number, taught in reversed(list(enumerate(config.earlier))):
        before = config.replace(**taught, earlier=config.earlier[:number])
        try:
            old = open_data(before, tokenizer)
        except (OSError, ValueError, ModuleNotFoundError, UserError) as error:
            console.print(
                f"can't measure what the model remembers of {taught['data']}: {error}", soft_wrap=True)
            continue
        pairs = None
        if old.facts:
            is_new = np.zeros(old.facts.codes.shape, dtype=bool)
            for facts in later:
                is_new |= contradicted(old.facts, facts)
            later.append(old.facts)
            pairs = pairs_to_ask(old.facts, is_new, most)
            changed = is_new.any(axis=1)
            if not len(pairs) or changed.all():
                console.print(f"later data has other answers to all of {taught['data']}", soft_wrap=True)
                continue
            old.leave_out(np.flatnonzero(changed))  # for rehearsal
        name = taught["data"]
        if old.facts and len(old.facts.attributes) > 1:
            name += f" ({len(old.facts.entities):,} entities)"
        found.append(Earlier(number, name, old, pairs))
    return found[::-1]


def pairs_to_ask(old: FactSet, left_out: np.ndarray, most: int) -> np.ndarray:
    """At most `most` pairs of entity and attribute, (n, 2): of the reported questions if there are any, and
    without those left out, (entities, attributes) bool.
    """
    is_asked = old.role == REPORT
    if not is_asked.any():
        is_asked[:] = True
    is_asked &= ~left_out
    pairs = np.argwhere(is_asked)
    return pairs[np.random.default_rng(0).permutation(len(pairs))[:most]]


def contradicted(old: FactSet, new: FactSet) -> np.ndarray:
    """Which old facts have a new answer: (entities, attributes) bool."""
    answers = {}  # prompt -> its new answers
    for fact_set in (new, new.held_out):
        for e, entity in enumerate(fact_set.entities if fact_set else []):
            for a, attribute in enumerate(fact_set.attributes):
                for wording in attribute.statements + attribute.questions:
                    answers[wording.replace("{}", entity)] = set(fact_set.answers(e, a))
    found = np.zeros(old.codes.shape, dtype=bool)
    for a, attribute in enumerate(old.attributes):
        for e, entity in enumerate(old.entities):
            wordings = attribute.statements + attribute.questions
            prompts = [wording.replace("{}", entity) for wording in wordings]
            given = [answers[prompt] for prompt in prompts if prompt in answers]
            found[e, a] = any(accepted.isdisjoint(old.answers(e, a)) for accepted in given)
        subjects = old.subjects[found[:, a]]
        found[:, a] |= np.isin(old.subjects, subjects)  # its other wordings, too
    return found


def figures(earlier: list[Earlier], measured: list) -> dict:
    """What each of earlier's `measure` returned, for metrics.jsonl.

    recall_old: the share of old facts that the model recalls. kept_old: of those that it knew before this
    run, the share that it still knows. bits_per_byte_old: of old text, the mean over texts.
    """
    found, facts, texts = {}, [], []
    for old, now in zip(earlier, measured):
        if old.pairs is None:
            texts.append(now)
        else:
            facts.append((now, old.before[:len(now)]))
    if facts:
        now, before = map(np.concatenate, zip(*facts))
        found["recall_old"] = float(now.mean())
        if before.any():
            found["kept_old"] = float(now[before].mean())
    if texts:
        found["bits_per_byte_old"] = sum(texts) / len(texts)
    return found
