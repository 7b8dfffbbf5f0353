"""
How much a model knows of a set of facts: which it recalls, and in bits.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from nanomem.facts import REPORT, SELECT, FactSet
from nanomem.sentences import Sentences


@torch.no_grad()
def ask(
        model: torch.nn.Module, sentences: Sentences, pairs: np.ndarray, questions: bool,
        batch_size: int = 64, progress: Callable[[float], None] = lambda share: None
) -> tuple[np.ndarray, np.ndarray]:
    """(which facts the model recalls, (n,) bool; how surprised it is by their answers, (n,) float64 in nats).

    It recalls a fact if greedy decoding, up to <|endoftext|>, gives an accepted answer. Its surprise is -log
    of the probability that it gives to all accepted answers together. In a biography another statement
    follows the answer, so there the decoded text only has to begin with an accepted answer.

    Args:
        model: a GPT.
        sentences: how to ask.
        pairs: (n, 2) array of (entity, attribute).
        questions: ask questions; otherwise give the model a taught statement up to its answer.
        progress: is called with the share of the work that is done.
    """
    candidates = answered_prompts(sentences, pairs, questions)
    candidates.sort(key=lambda candidate: len(candidate[1]))  # so that a batch needs little padding
    known, log_likelihood = np.zeros(len(pairs), dtype=bool), np.full(len(pairs), -np.inf)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    for i in range(0, len(candidates), batch_size):
        batch = candidates[i:i + batch_size]
        _, longest, _ = batch[-1]
        tokens = torch.full((len(batch), len(longest)), sentences.end)           # (batch, time)
        in_answer = torch.zeros(len(batch), len(longest) - 1, dtype=torch.bool)  # (batch, time - 1)
        for j, (_, sequence, start) in enumerate(batch):
            tokens[j, :len(sequence)] = torch.tensor(sequence)
            in_answer[j, start - 1:len(sequence) - 1] = True
        logits, _ = model(tokens[:, :-1].to(device))
        logits = logits[in_answer.to(device)].float()                            # (answers' tokens, vocab)
        targets = tokens[:, 1:][in_answer]                                       # (answers' tokens,)
        # Greedy decoding gives exactly this answer if each of its tokens is the likeliest after those before
        # it. So one forward pass over prompt and answer replaces decoding token by token.
        hits = torch.ones(in_answer.shape, dtype=torch.bool)
        hits[in_answer] = logits.argmax(-1).cpu() == targets
        surprise = torch.zeros(in_answer.shape, dtype=torch.float64)
        surprise[in_answer] = F.cross_entropy(logits, targets.to(device), reduction="none").cpu().double()
        for (number, _, _), hit, nats in zip(batch, hits.all(dim=1), surprise.sum(dim=1)):
            known[number] |= hit.item()
            log_likelihood[number] = np.logaddexp(log_likelihood[number], -nats.item())
        progress(min(1.0, (i + batch_size) / len(candidates)))
    model.train(was_training)
    return known, -log_likelihood


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
    them, each from at most `most` pairs. They also have:

        "answer_nll": the mean surprise of an answer, in nats
        "bits_known": see `bits_known`
        "bits": the maximum

    select and report use questions about pairs that training never asked about, or report uses the wordings
    of facts.held_out; taught uses statements, about all pairs. A kind without pairs is left out. Every call
    uses the same pairs. progress is called with the share of the work that is done.
    """
    facts, measured = sentences.facts, {}
    kinds = {"select": facts.role == SELECT, "report": facts.role == REPORT, "taught": facts.role >= 0}
    asked = {}  # kind -> (sentences, pairs, whether to ask questions)
    for kind, is_of_kind in kinds.items():
        if is_of_kind.any():
            asked[kind] = sentences, is_of_kind, choose_pairs(is_of_kind, most), kind != "taught"
    if facts.held_out:  # its wordings are never taught, so they are asked as they are
        every = facts.held_out.role >= 0
        asked["report"] = sentences.held_out, every, choose_pairs(every, most), False
    total, done = sum(len(pairs) for _, _, pairs, _ in asked.values()), 0
    for kind, (wordings, is_of_kind, pairs, questions) in asked.items():
        def report(share, before=done, pairs=pairs):
            progress((before + share * len(pairs)) / total)

        known, surprise = ask(model, wordings, pairs, questions, progress=report)
        measured[kind] = scores(wordings.facts, pairs, known) | {
            "answer_nll": float(surprise.mean()),
            "bits_known": bits_known(wordings.facts, pairs, surprise, is_of_kind),
            "bits": bits_known(wordings.facts, pairs, 0 * surprise, is_of_kind)}
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


def bits_known(facts: FactSet, pairs: np.ndarray, surprise: np.ndarray, is_of_kind: np.ndarray) -> float:
    """How many bits a model knows of the facts of a kind: what their answers cost under the frequencies of an
    attribute's values, minus what they cost under the model, added up over facts and floored at 0 for each
    attribute.

    Args:
        pairs: (n, 2), the (entity, attribute) that were asked, a sample of their kind.
        surprise: (n,), what `ask` returned for them, in nats.
        is_of_kind: (entities, attributes) bool, the facts of the kind.
    """
    total = 0.0
    for a, codes in enumerate(facts.codes.T):
        asked = pairs[:, 1] == a
        if not asked.any():
            continue
        frequency = np.bincount(codes) / len(codes)                              # (values,)
        without_model = -np.log2(frequency[codes[pairs[asked, 0]]])              # (facts asked,) bits
        gain = (without_model - surprise[asked] / np.log(2)).mean()
        total += max(0.0, float(gain)) * int(is_of_kind[:, a].sum())
    return total
