"""
How many of the facts a model recalls.
"""

from collections.abc import Callable

import numpy as np
import torch

from nanomem.facts import REPORT, SELECT, FactSet
from nanomem.sentences import Sentences


@torch.no_grad()
def is_recalled(
        model: torch.nn.Module, sentences: Sentences, pairs: np.ndarray, questions: bool,
        batch_size: int = 64, progress: Callable[[float], None] = lambda share: None) -> np.ndarray:
    """Which facts the model recalls: (n,) bool. It recalls a fact if greedy decoding, up to <|endoftext|>,
    gives an accepted answer.

    In a biography another statement follows the answer, so there the decoded text only has to begin with an
    accepted answer.

    Args:
        model: a GPT.
        sentences: how to ask.
        pairs: (n, 2) array of (entity, attribute).
        questions: ask questions; otherwise give the model a taught statement up to its answer.
        progress: is called with the share of the work that is done.
    """
    candidates = answered_prompts(sentences, pairs, questions)
    candidates.sort(key=lambda candidate: len(candidate[1]))  # so that a batch needs little padding
    known = np.zeros(len(pairs), dtype=bool)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    for i in range(0, len(candidates), batch_size):
        batch = candidates[i:i + batch_size]
        _, longest, _ = batch[-1]
        tokens = torch.full((len(batch), len(longest)), sentences.end)           # (batch, time)
        for j, (_, sequence, _) in enumerate(batch):
            tokens[j, :len(sequence)] = torch.tensor(sequence)
        logits, _ = model(tokens[:, :-1].to(device))
        hits = (logits.argmax(-1).cpu() == tokens[:, 1:]).numpy()                # (batch, time - 1)
        # Greedy decoding gives exactly this answer if each of its tokens is the likeliest after those before
        # it. So one forward pass over prompt and answer replaces decoding token by token.
        for j, (number, sequence, start) in enumerate(batch):
            known[number] |= hits[j, start - 1:len(sequence) - 1].all()
        progress(min(1.0, (i + batch_size) / len(candidates)))
    model.train(was_training)
    return known


def answered_prompts(sentences, pairs, questions):
    """(number of the pair, tokens of prompt and answer, place where the answer begins) for each accepted
    answer of each pair.
    """
    facts, answered = sentences.facts, []
    end = [] if facts.biographies and not questions else [sentences.end]
    for number, (e, a) in enumerate(pairs):
        attribute = facts.attributes[a]
        wordings = attribute.questions if questions else attribute.statements
        prompt = [sentences.end] + sentences.prompt(e, wordings[e % len(wordings)])
        for answer in sentences.answers(e, a):
            answered.append((number, prompt + answer + end, len(prompt)))
    return answered


def measure(
        model: torch.nn.Module, sentences: Sentences, most: int,
        progress: Callable[[float], None] = lambda share: None) -> dict[str, dict]:
    """What a model recalls: {"select": scores, "report": scores, "taught": scores}, as `scores` returns
    them, each from at most `most` pairs.

    select and report use questions about pairs that training never asked about, or report uses the wordings
    of facts.held_out; taught uses statements, about all pairs. A kind without pairs is left out. Every call
    uses the same pairs. progress is called with the share of the work that is done.
    """
    facts, measured = sentences.facts, {}
    kinds = {"select": facts.role == SELECT, "report": facts.role == REPORT, "taught": facts.role >= 0}
    asked = {}  # kind -> (sentences, pairs, whether to ask questions)
    for kind, is_of_kind in kinds.items():
        if is_of_kind.any():
            asked[kind] = sentences, choose_pairs(is_of_kind, most), kind != "taught"
    if facts.held_out:  # its wordings are never taught, so they are asked as they are
        every = facts.held_out.role >= 0
        asked["report"] = sentences.held_out, choose_pairs(every, most), False
    total, done = sum(len(pairs) for _, pairs, _ in asked.values()), 0
    for kind, (wordings, pairs, questions) in asked.items():
        def report(share, before=done, pairs=pairs):
            progress((before + share * len(pairs)) / total)

        known = is_recalled(model, wordings, pairs, questions, progress=report)
        measured[kind] = scores(wordings.facts, pairs, known)
        done += len(pairs)
    return measured


def choose_pairs(is_of_kind: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the pairs that are of a kind, the same ones every time: (n, 2)."""
    pairs = np.argwhere(is_of_kind)
    if len(pairs) > most:
        chosen = np.random.default_rng(0).choice(len(pairs), most, replace=False)
        pairs = pairs[chosen]
    return pairs


def scores(facts: FactSet, pairs: np.ndarray, known: np.ndarray) -> dict[str, float | None]:
    """The share of pairs known: under "all", "head", "torso", "tail" and each attribute's name. None where
    there are no pairs.
    """
    subsets = {"all": np.ones(len(pairs), dtype=bool)}
    for band, entities in facts.bands().items():
        subsets[band] = np.isin(pairs[:, 0], entities)
    for a, attribute in enumerate(facts.attributes):
        subsets[attribute.name] = pairs[:, 1] == a
    return {name: float(known[subset].mean()) if subset.any() else None for name, subset in subsets.items()}
