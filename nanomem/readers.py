"""
What a memory slot is for: which tokens of the training data read it, what those have in common, and which
tokens its value makes likelier.

    sample = Sample.of_training(model, data)
    sample.contexts(layer=2, slot=39296)         [("Deborah Edford: Vadodara", 1.3), ...]
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from nanomem.model import GPT
from nanomem.observe import training_lookups

START = 10**9  # of the sample: far from the sequences that a model was trained on
BATCH_SIZE = 16
LONGEST_WORD = 60  # characters of a word to show
WINDOW = 6  # words before a token that may explain why it reads a slot
FARTHEST = 60  # tokens before it to show
ENOUGH_READERS = 8  # a clue about a slot with this many readers counts half


# ------------------------------------------------------------------------------------------------
# Text


def visible(text: str) -> str:
    """Text without blanks around it, its line ends and other control characters written out."""
    return written_out(text.strip(" "))


def written_out(text: str) -> str:
    """Text with its line ends and other control characters written out, as in a Python string."""
    return repr(text)[1:-1]


def is_of_bytes(encoding) -> bool:
    """Whether each token is a byte."""
    return encoding.n_vocab <= 257


def split_words(encoding, tokens: list[int], prompt_length: int | None) -> list[tuple[int, int]]:
    """(start, stop) of each token; if tokens are bytes, of each word. A word begins with a blank, or where
    the answer begins.
    """
    starts = []
    for place, token in enumerate(tokens):
        is_special = token == encoding.eot_token
        after_special = place > 0 and tokens[place - 1] == encoding.eot_token
        begins = is_special or after_special or encoding.decode_single_token_bytes(token)[:1].isspace()
        if place in (0, prompt_length) or begins or not is_of_bytes(encoding):
            starts.append(place)
    return list(zip(starts, starts[1:] + [len(tokens)]))


def number_words(encoding, tokens: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(the number of the word that each token is part of, the words).

    tokens: (sequences, time) -> numbers of the same shape. A word begins with a blank, at <|endoftext|>, and
    where letters or digits meet other characters.
    """
    bytes_of = functools.cache(encoding.decode_single_token_bytes)
    numbers, known = np.zeros(tokens.shape, dtype=np.int64), {}
    for row, sequence in zip(numbers, tokens.tolist()):
        start, word = 0, bytes_of(sequence[0])
        for place, (last, token) in enumerate(zip(sequence, sequence[1:]), 1):
            piece = bytes_of(token)
            if encoding.eot_token in (last, token) or begins_word(word, piece):
                row[start:place] = known.setdefault(word.strip(), len(known))
                start, word = place, b""
            word += piece
        row[start:] = known.setdefault(word.strip(), len(known))
    return numbers, [visible(word.decode(errors="replace")[:LONGEST_WORD]) for word in known]


def begins_word(word: bytes, piece: bytes) -> bool:
    """Whether the next piece of a text begins another word."""
    if word.isspace():  # the blank that a word begins with
        return False
    return piece[:1].isspace() or is_letter(word[-1]) != is_letter(piece[0])


def is_letter(byte: int) -> bool:
    """Whether a byte is a letter, a digit, or part of a character that is not ASCII."""
    return byte >= 128 or chr(byte).isalnum()


# ------------------------------------------------------------------------------------------------
# Readers


@dataclass
class Reads:
    """What one memory layer read for a sample of tokens, sorted by slot: three arrays of the same length."""

    slots: np.ndarray
    weights: np.ndarray
    positions: np.ndarray  # of the tokens, in all of the sample

    def of(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """The weights with which a slot was read, and the positions of its readers."""
        begin, end = np.searchsorted(self.slots, (slot, slot + 1))
        return self.weights[begin:end], self.positions[begin:end]

    def only(self, slots: np.ndarray) -> "Reads":
        """The reads of these slots."""
        is_one = np.isin(self.slots, slots)
        return Reads(self.slots[is_one], self.weights[is_one], self.positions[is_one])


@dataclass
class Clue:
    """Something that a slot's readers have in common."""

    relation: str  # the readers are "at" a word, right "before" it, or soon "after" it
    word: int  # its number
    share: float  # of the slot's weight that such readers have
    usual: float  # the share of all tokens that are such readers
    score: float  # how telling it is


@dataclass
class Sample:
    """Tokens of the training data, and what a model's memory layers read for them."""

    encoding: object
    tokens: np.ndarray  # (sequences, time)
    reads: dict[int, Reads]  # of each layer
    # What multiplies a slot's value on its way to the logits, of each layer, if asked for: (tokens, v_dim)
    gates: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of_training(
            cls, model: GPT, data, n_batches: int = 20, batch_size: int = BATCH_SIZE,
            wanted: dict[int, Iterable[int]] | None = None, gates: bool = False,
            track: Callable[[Iterable], Iterable] = iter) -> "Sample":
        """What the model reads in n_batches batches of the training data.

        wanted: keep the reads of these slots of each layer only. gates: observe them too. track: gets the
        batches and yields them, to show how far it is.
        """
        parts, all_tokens, seen, start = {}, [], {}, 0
        watching = watch_gates(model, seen) if gates else contextlib.nullcontext()
        with watching:
            for tokens, looked_up in track(training_lookups(model, data, n_batches, batch_size, START)):
                for layer, (indices, weights) in looked_up.items():
                    hits = torch.ones_like(indices, dtype=torch.bool)            # (n, heads, knn)
                    if wanted is not None:
                        hits = torch.isin(indices, torch.tensor(list(wanted.get(layer, ()))))
                    hits &= weights > 0  # a softmax can round a weight to 0
                    positions = hits.nonzero()[:, 0] + start
                    parts.setdefault(layer, []).append((indices[hits], weights[hits], positions))
                all_tokens.append(tokens.numpy())
                start += tokens.numel()
        reads = {}
        for layer, found in parts.items():
            slots, weights, positions = [torch.cat(part).numpy() for part in zip(*found)]
            order = slots.argsort(kind="stable")
            reads[layer] = Reads(slots[order], weights[order], positions[order])
        gates = {layer: torch.cat(found) for layer, found in seen.items()}
        return cls(data.encoding, np.concatenate(all_tokens), reads, gates)

    def contexts(self, layer: int, slot: int, most: int = 5) -> list[tuple[str, float]]:
        """The texts whose last tokens read a slot most, with the weight of each."""
        found = self.heaviest(layer, np.array([slot]), most)[slot]
        return [(self.context(position), weight) for position, weight in found]

    def heaviest(self, layer: int, wanted: np.ndarray, most: int) -> dict[int, list[tuple[int, float]]]:
        """For each wanted slot [(position, weight)] of the contexts that read it most: the position of the
        heaviest reader, and the weight of all readers with its context.
        """
        reads = self.reads[layer].only(wanted)
        positions, place = np.unique(reads.positions, return_inverse=True)
        number_of = {}
        numbers = [number_of.setdefault(self.context(p), len(number_of)) for p in positions.tolist()]
        pairs = reads.slots * len(number_of) + np.array(numbers, dtype=np.int64)[place]
        order = np.lexsort((-reads.weights, pairs))
        first = np.unique(pairs[order], return_index=True)[1]  # the heaviest of each slot and context
        weights, first = np.add.reduceat(reads.weights[order], first), order[first]
        by_weight = np.lexsort((-weights, reads.slots[first]))
        slots = reads.slots[first][by_weight]
        rank = np.arange(len(slots)) - np.searchsorted(slots, slots)
        found = {slot: [] for slot in wanted.tolist()}
        for i in by_weight[rank < most].tolist():
            found[int(reads.slots[first[i]])].append((int(reads.positions[first[i]]), float(weights[i])))
        return found

    def context(self, position: int) -> str:
        """A token after the few before it, as text."""
        if position not in self._contexts:
            sequence, column = divmod(position, self.tokens.shape[1])
            tokens = self.tokens[sequence, max(0, column - self.n_before):column + 1].tolist()
            self._contexts[position] = self.encoding.decode(tokens).split("<|endoftext|>")[-1]
        return self._contexts[position]

    @functools.cached_property
    def _contexts(self):
        return {}

    def around(self, position: int, word: int | None = None) -> tuple[str, str, str]:
        """(the text before a token, the token, the word after it), of the token's document. The text reaches
        back to where a word (its number) was last, if that is not too far.
        """
        sequence, column = divmod(position, self.tokens.shape[1])
        tokens, words, starts = [rows[sequence] for rows in self._lists]
        first = max(starts[column], column - FARTHEST)  # of what may be shown
        begin, stop = max(first, column - self.n_before), column + 1
        if word is not None and word not in words[begin:column]:
            begin = next((i for i in range(begin, first - 1, -1) if words[i] == word), begin)
        while begin > first and words[begin - 1] == words[begin]:
            begin -= 1
        is_end = tokens[column] == self.encoding.eot_token
        while not is_end and stop < len(words) and words[stop] == words[column + 1]:
            stop += 1
        parts = tokens[begin:column], tokens[column:column + 1], tokens[column + 1:stop]
        return tuple(written_out(self.encoding.decode(part)) for part in parts)

    @functools.cached_property
    def _lists(self) -> tuple[list[list[int]], ...]:
        """The tokens, their words, and the column where the document of each begins."""
        is_end = self.tokens == self.encoding.eot_token
        after_end = np.where(is_end, np.arange(self.tokens.shape[1]) + 1, 0)
        starts = np.maximum.accumulate(after_end, axis=1) - is_end
        return self.tokens.tolist(), self.words[0].tolist(), starts.tolist()

    @functools.cached_property
    def n_before(self) -> int:
        """How many tokens before a reader its context has."""
        return 14 if is_of_bytes(self.encoding) else 3

    @functools.cached_property
    def words(self) -> tuple[np.ndarray, list[str]]:
        """What number_words returns for the tokens."""
        return number_words(self.encoding, self.tokens)

    def related_words(self) -> dict[str, np.ndarray]:
        """The words that may explain why a token reads a slot, by their relation to it: (tokens, candidates)
        numbers of words, -1 for none.
        """
        numbers, words = self.words
        is_end = self.tokens == self.encoding.eot_token
        following = np.full_like(numbers, -1)
        following[:, :-1] = numbers[:, 1:]
        following[is_end] = -1  # what follows is another document
        has_letters = [any(map(str.isalnum, word)) for word in words]
        earlier = np.full((*numbers.shape, WINDOW), -1)
        for i, sequence in enumerate(numbers.tolist()):
            passed, last = [], None  # words of the document with letters, the newest last
            for j, word in enumerate(sequence):
                if word != last and last is not None and has_letters[last]:
                    passed = [other for other in passed if other != last][1 - WINDOW:] + [last]
                if is_end[i, j]:
                    passed, last = [], None
                else:
                    last = word
                earlier[i, j, :len(passed)] = passed
        return {"at": numbers.reshape(-1, 1), "before": following.reshape(-1, 1),
                "after": earlier.reshape(-1, WINDOW)}

    def clues(self, layer: int, wanted: np.ndarray) -> dict[int, list[Clue]]:
        """What the readers of each wanted slot have in common, the most telling first: at most one clue of
        each relation.

        A clue's score is its part of the KL divergence of the slot's readers from all tokens,
        share * log(share / usual), less for a slot with few readers.
        """
        reads, n_words = self.reads[layer].only(wanted), len(self.words[1])
        slots, group = np.unique(reads.slots, return_inverse=True)
        total, n_readers = np.bincount(group, reads.weights), np.bincount(group)
        sure = n_readers / (n_readers + ENOUGH_READERS)                          # (slots,)
        found = {int(slot): [] for slot in wanted}
        for relation, words in self.related_words().items():
            usual = np.bincount(words[words >= 0], minlength=n_words) / len(words)
            candidates = words[reads.positions]                                  # (reads, candidates)
            is_word = candidates >= 0
            pairs = (group[:, None] * n_words + candidates)[is_word]
            weights = np.broadcast_to(reads.weights[:, None], candidates.shape)[is_word]
            pairs, inverse = np.unique(pairs, return_inverse=True)
            of, word = np.divmod(pairs, n_words)
            share = np.bincount(inverse, weights) / total[of]
            score = share * np.log(share / usual[word]) * sure[of]
            best = np.lexsort((-score, of))
            best = best[np.unique(of[best], return_index=True)[1]]  # the first of each slot
            for i in best.tolist():
                clue = Clue(relation, int(word[i]), float(share[i]), float(usual[word[i]]), float(score[i]))
                found[int(slots[of[i]])].append(clue)
        for clues in found.values():
            clues.sort(key=lambda clue: -clue.score)
        return found


# ------------------------------------------------------------------------------------------------
# What a value does


@contextlib.contextmanager
def watch_gates(model: GPT, seen: dict[int, list[torch.Tensor]]):
    """While open, each forward pass adds to seen[layer] what multiplies each number of the values that a
    token reads, on their way to the logits: the gate, over the root mean square that the last norm divides
    by. (n, v_dim) of the n tokens.
    """
    layers, gates, hooks = model.memory_layers(), {}, []

    def keep_gate(number, _, inputs, output):
        gates[number] = F.silu(output.detach()).float()

    def divide(_, inputs):
        x = inputs[0].detach().float().flatten(0, -2)                            # (n, n_embd)
        scale = x.square().mean(dim=-1, keepdim=True).rsqrt()                    # (n, 1)
        for number, layer in layers.items():
            gate = gates.get(number, torch.ones(1, layer.table.v_dim, device=x.device))
            seen.setdefault(number, []).append((gate * scale).cpu())

    for number, layer in layers.items():
        if layer.gate_proj is not None:
            hooks.append(layer.gate_proj.register_forward_hook(functools.partial(keep_gate, number)))
    hooks.append(model.norm.register_forward_pre_hook(divide))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def favours(model: GPT, layer: int, slots: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """How much reading each slot with a weight of 1 adds to the logit of each token: (slots, vocab_size).

    It counts the direct way, past the layers above: output projection, last norm and unembedding. gates
    (slots, v_dim) are what multiplies the values: see watch_gates.
    """
    memory = model.memory_layers()[layer]
    slots = slots.to(memory.table.values.device)
    y = memory.table.values[slots].float() * gates.to(slots.device)              # (slots, v_dim)
    if memory.out_proj is not None:
        y = y @ memory.out_proj.weight.float().T                                 # (slots, n_embd)
    return ((y * model.norm.weight.float()) @ model.lm_head.weight.float().T).cpu()


def gates_of_readers(sample: Sample, layer: int, slots: np.ndarray) -> torch.Tensor:
    """The mean of the gates of each slot's readers, by their weights: (slots, v_dim). That of all tokens for
    a slot that none of them read. slots: distinct, from low to high.
    """
    gates, reads = sample.gates[layer], sample.reads[layer].only(slots)
    starts = torch.from_numpy(np.searchsorted(reads.slots, slots))
    weights = torch.from_numpy(reads.weights)
    positions = torch.from_numpy(reads.positions)
    sums = F.embedding_bag(positions, gates, starts, per_sample_weights=weights, mode="sum")
    total = torch.from_numpy(np.bincount(np.searchsorted(slots, reads.slots), reads.weights, len(slots)))
    total = total.float()[:, None]                                               # (slots, 1)
    return torch.where(total > 0, sums / total, gates.mean(dim=0))
