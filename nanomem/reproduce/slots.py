"""
Looks into a trained memory: which slots are read, and how much the lookups of a fact have in common with
those of its question, of other facts and of other entities.
"""

from collections import Counter

import numpy as np
import torch

from nanomem import teaching
from nanomem.cli import UserError
from nanomem.data import open_data
from nanomem.model import GPT
from nanomem.observe import SlotUsage, lookups_of, slot_shares, training_lookups


def slots(run: str, n_facts: int = 100, n_batches: int = 20) -> tuple[list[dict], int]:
    """(a row for each memory layer of a trained model, the number of updates it was trained for).

    A row has:
        "layer": its number
        "share used" and "kl": of the slots, over n_batches training batches (Lample et al. 2019, section 4.4)
        "weights": [rank, share of all weight] of slots, from the most read one on, evenly on a log scale
        "overlaps": {"name" or "answer": {what it is compared with: overlap}}, the mean over n_facts

    The overlaps compare the lookups of a fact, in a taught wording, with those in another taught wording, in
    a question, for another attribute of the entity, and for another entity. "name" is the last token of the
    entity's name, where a memory can know the entity; "answer" is the last token before the answer, where
    it can know the fact. Raises UserError for a run without facts or without memory.
    """
    model, data, config, iteration = load(run)
    rows = measure_usage(model, data, config.batch_size, n_batches)
    overlaps = measure_overlaps(model, data, n_facts)
    for row in rows:
        row["overlaps"] = overlaps[row["layer"]]
    return rows, iteration


def load(run):
    """(model, data, config, iteration) of a trained run's newest checkpoint."""
    trained = teaching.find(run, "--run")
    config = trained.config
    data, model = open_data(config, trained.tokenizer()), GPT(config).eval()
    trained.load(model)
    if not data.facts or not model.memory_layers():
        raise UserError(f"--run={run} must be a run with facts and with memory layers, "
                        f"got data={config.data} and ffn={config.ffn}")
    return model, data, config, trained.iteration


def measure_usage(model, data, batch_size, n_batches):
    """A row for each memory layer, with how evenly it reads its slots."""
    layers = model.memory_layers()
    usage = {number: SlotUsage() for number in layers}
    for _, looked_up in training_lookups(model, data, n_batches, batch_size):
        for number, lookups in looked_up.items():
            usage[number](layers[number], *lookups)
    rows = []
    for number in layers:
        (weight,) = usage[number].weight.values()
        rows.append({
            "layer": number,
            "share used": usage[number].usage(),
            "kl": usage[number].kl(),
            "weights": weights_by_rank(weight),
        })
    return rows


def weights_by_rank(weight: torch.Tensor, n_points: int = 200) -> list[list[float]]:
    """[rank, share of all weight] of some hundred slots, from the most read one on, evenly on a log scale.

    weight: (n_slots,), how much each slot was read.
    """
    shares = weight[weight > 0].sort(descending=True).values / weight.sum()
    ranks = np.unique(np.geomspace(1, len(shares), n_points).round().astype(int))
    return [[int(rank), float(shares[rank - 1])] for rank in ranks]


def measure_overlaps(model, data, n_facts):
    """The mean overlaps of facts' lookups: {layer: {position: {what it is compared with: overlap}}}."""
    rng = np.random.default_rng(0)
    sums = {layer: {"name": Counter(), "answer": Counter()} for layer in model.memory_layers()}
    for _ in range(n_facts):
        fact, compared = draw_prompts(data.facts, rng)
        expected = prompt_lookups(model, data.sentences, *fact)
        for name, prompt in compared.items():
            found = prompt_lookups(model, data.sentences, *prompt)
            for layer, position in found:
                sums[layer][position][name] += overlap(expected[layer, position], found[layer, position])
    for positions in sums.values():
        for counter in positions.values():
            for name in counter:
                counter[name] /= n_facts
    return sums


def draw_prompts(facts, rng):
    """A random fact as (entity, wording), and what to compare it with: {name: (entity, wording)}."""
    n_entities, n_attributes = len(facts.entities), len(facts.attributes)
    entity, a = int(rng.integers(n_entities)), int(rng.integers(n_attributes))
    attribute, another = facts.attributes[a], facts.attributes[a - 1]
    compared = {}
    if n_entities > 1:
        other = (entity + int(rng.integers(1, n_entities))) % n_entities
        compared["another entity"] = (other, attribute.statements[0])
    if len(attribute.statements) > 1:
        compared["another taught wording"] = (entity, attribute.statements[1])
    if attribute.questions:
        compared["a question"] = (entity, attribute.questions[0])
    if n_attributes > 1:
        compared["another attribute"] = (entity, another.statements[0])
    return (entity, attribute.statements[0]), compared


def prompt_lookups(model, sentences, entity, wording):
    """What a prompt reads: {(layer, "name" or "answer"): (indices (heads, knn), weights (heads, knn))}."""
    before, _ = sentences.pieces[wording]
    name = sentences.names[bool(before)][entity]
    tokens = [sentences.end] + sentences.prompt(entity, wording)
    places = {"name": len(before) + len(name), "answer": len(tokens) - 1}
    found = {}
    for layer, (indices, weights) in lookups_of(model, torch.tensor([tokens])).items():
        for position, place in places.items():
            found[layer, position] = indices[place], weights[place]
    return found


def overlap(one: tuple, other: tuple) -> float:
    """The share of two tokens' lookups that is in common: the smaller weight of each slot, summed over slots.

    one, other: (indices (heads, knn), weights (heads, knn)). From 0 to 1 per head; the mean over heads.
    """
    return (slot_shares(*one) & slot_shares(*other)).total()
