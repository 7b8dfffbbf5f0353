"""
The sentences of a set of facts, as tokens.

- `Sentences` has them as lists: to ask about one fact.
- `SentenceArrays` has the same as arrays: to put together a batch. The default run's takes 0.36 ms, against
  1.3 ms with lists, during which the thread that makes it holds Python's global lock.
"""

from collections.abc import Iterator

import numpy as np
import tiktoken

from nanomem import tokenizer
from nanomem.facts import FactSet


def all_sentences(facts: FactSet) -> Iterator[str]:
    """Every statement and question with its answer, as text to train a tokenizer on."""
    for e, entity in enumerate(facts.entities):
        for a, attribute in enumerate(facts.attributes):
            for wording in attribute.statements + attribute.questions:
                yield f"{wording.replace('{}', entity)} {facts.answers(e, a)[0]}"


class Sentences:
    """The sentences of a FactSet as lists of tokens. Names, answers and wordings are encoded once."""

    def __init__(self, facts: FactSet, encoding: tiktoken.Encoding):
        self.facts, self.encoding = facts, encoding
        self.held_out = Sentences(facts.held_out, encoding) if facts.held_out else None
        self.end = encoding.eot_token
        # In mid-sentence, a name or answer is encoded with the space before it: " Lagos".
        self.names = {False: self._encode(facts.entities), True: self._encode(facts.entities, before=" ")}
        self.values = []  # attribute, value, spelling -> tokens
        for values in facts.values:
            self.values.append([self._encode(spellings, before=" ") for spellings in values])
        self.codes = facts.codes.tolist()  # a list's elements are read faster one by one than an array's
        self.pieces = {}  # wording -> tokens before and after the name
        for attribute in facts.attributes:
            for wording in attribute.statements + attribute.questions:
                before, after = wording.split("{}")
                self.pieces[wording] = self._encode([before.rstrip(" "), after])

    def _encode(self, texts, before=""):
        """The tokens of each text: a list of lists."""
        # One by one: tiktoken's batches start threads each time, which takes longer for short texts.
        return [tokenizer.encode(self.encoding, before + text).tolist() for text in texts]

    def prompt(self, entity: int, wording: str) -> list[int]:
        """The tokens up to the answer."""
        before, after = self.pieces[wording]
        return before + self.names[bool(before)][entity] + after

    def answers(self, entity: int, attribute: int) -> list[list[int]]:
        """The tokens of each accepted answer, the taught one first."""
        return self.values[attribute][self.codes[entity][attribute]]

    def longest(self) -> tuple[int, str]:
        """The number of tokens in the longest document, with its longest accepted answer, and the name of the
        entity it is about.
        """
        names = {inside: np.array([len(name) for name in tokens]) for inside, tokens in self.names.items()}
        documents, biography = [], names[False] + 1                              # 1: <|endoftext|>
        for a, attribute in enumerate(self.facts.attributes):
            values = np.array([max(map(len, spellings)) for spellings in self.values[a]])
            answers = values[self.facts.codes[:, a]]                             # (entities,)
            for wording in attribute.statements + attribute.questions:
                before, after = self.pieces[wording]
                documents.append(len(before) + names[bool(before)] + len(after) + answers + 1)
            _, statement = self.pieces[attribute.statements[0]]
            biography = biography + len(statement) + answers
        if self.facts.biographies:
            documents.append(biography)
        lengths = np.max(documents, axis=0)                                      # (entities,)
        longest = int(lengths.max()), self.facts.entities[lengths.argmax()]
        return max(longest, self.held_out.longest()) if self.held_out else longest


class SentenceArrays:
    """The sentences of a FactSet as arrays of pieces.

    A piece is a name, an answer, or what a wording has before or after the name. All pieces lie end to end in
    one array of tokens, and a piece's number says which it is. A document is a row of numbers. Rows are
    equally long: those of shorter documents are filled up with a piece without tokens.
    """

    def __init__(self, sentences: Sentences):
        facts, pieces = sentences.facts, []

        def add(more):
            """The numbers that these pieces get."""
            pieces.extend(more)
            return np.arange(len(pieces) - len(more), len(pieces))

        self.nothing, self.end = add([[], [sentences.end]])
        at_start, inside = sentences.names[False], sentences.names[True]
        self.names = np.stack([add(at_start), add(inside)])                      # (2, entities)
        answers = []
        for values, codes in zip(sentences.values, facts.codes.T):
            taught = add([spellings[0] for spellings in values])
            answers.append(taught[codes])
        self.answers = np.stack(answers, axis=1)                                 # (entities, attributes)

        wordings, counts = [], []
        for attribute in facts.attributes:
            wordings += attribute.statements + attribute.questions
            counts.append((len(attribute.statements), len(attribute.questions)))
        before, after = zip(*[sentences.pieces[wording] for wording in wordings])
        self.before, self.after = add(before), add(after)                        # (wordings,)
        self.row_of_names = np.array([1 if piece else 0 for piece in before])    # (wordings,)
        self.counts = np.array(counts)                        # (attributes, 2): of statements, of questions
        self.first = (self.counts.cumsum() - self.counts.ravel()).reshape(-1, 2)  # the first wording of each

        self.lengths = np.array([len(piece) for piece in pieces])
        self.starts = self.lengths.cumsum() - self.lengths
        self.tokens = np.array([token for piece in pieces for token in piece])

    def shortest(self) -> int:
        """A number of tokens that every document has at least."""
        wordings = self.lengths[self.before] + self.lengths[self.after]
        pieces = wordings, self.lengths[self.names], self.lengths[self.answers], self.lengths[[self.end]]
        return sum(int(lengths.min()) for lengths in pieces)

    def documents(
            self, entities: np.ndarray, attributes: np.ndarray, is_question: np.ndarray,
            draws: np.ndarray) -> np.ndarray:
        """Statements and questions with their taught answers, and <|endoftext|>: (n, 5).

        All arguments are (n,); draws in [0, 1) choose among an attribute's wordings.
        """
        kind = is_question.astype(int)
        wording = self.first[attributes, kind] + (draws * self.counts[attributes, kind]).astype(int)
        names = self.names[self.row_of_names[wording], entities]
        answers = self.answers[entities, attributes]
        ends = np.full_like(answers, self.end)
        return np.stack((self.before[wording], names, self.after[wording], answers, ends), axis=1)

    def biographies(self, entities: np.ndarray, orders: np.ndarray) -> np.ndarray:
        """Each entity's name (n,), then statement and taught answer of each attribute in its order
        (n, attributes), and <|endoftext|>: (n, 2 attributes + 2).
        """
        n, n_attributes = orders.shape
        rows = np.full((n, 2 * n_attributes + 2), self.end)
        rows[:, 0] = self.names[0, entities]
        rows[:, 1:-1:2] = self.after[self.first[orders, 0]]
        rows[:, 2:-1:2] = self.answers[entities[:, None], orders]
        return rows

    def join(self, documents: np.ndarray, blocks: np.ndarray, block_of: np.ndarray):
        """Writes documents into blocks, each after those before it, from place 1 on. What doesn't fit is left
        out.

        Args:
            documents: (n, pieces).
            blocks: (blocks, length).
            block_of: (n,) the block of each document, from low to high.
        """
        lengths = self.lengths[documents]                                        # (n, pieces)
        ends = lengths.cumsum()
        token_numbers = np.arange(ends[-1] if len(ends) else 0)
        # Of all tokens, a piece has numbers ends - length and on; they lie in self.tokens from its start on.
        shift = self.starts[documents].ravel() - (ends - lengths.ravel())
        tokens = self.tokens[token_numbers + np.repeat(shift, lengths.ravel())]

        in_block = np.bincount(block_of, lengths.sum(axis=1), len(blocks)).astype(int)
        row = np.repeat(np.arange(len(blocks)), in_block)
        column = 1 + token_numbers - np.repeat(in_block.cumsum() - in_block, in_block)
        fits = column < blocks.shape[1]
        blocks[row[fits], column[fits]] = tokens[fits]
