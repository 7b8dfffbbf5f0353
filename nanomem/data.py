"""
Batches of tokens: `open_data` returns FactData (sentences of facts) or TextData (a text file).

Batch number `step` of a split depends on nothing but the seed and that number, so a resumed run sees the same
stream with no state to save.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from nanomem import facts, tokenizer
from nanomem.config import nearest

SPLITS = ("train", "val")
IGNORE = -1  # target of a position that has none: no loss there


class FactData:
    """Blocks of sentences about entities, at most one about each in a block, so that no answer can be copied.

    split 'train' has statements of all pairs, or biographies, and questions of the ASKED ones, 'val' the questions of the SELECT
    ones, never asked (or, for facts without questions, the same as 'train').
    """

    question_share = 0.5  # of the sentences about an ASKED pair

    def __init__(self, fact_set, encoding, block_size, seed=0):
        self.facts, self.encoding, self.block_size, self.seed = fact_set, encoding, block_size, seed
        self.sentences = facts.Sentences(fact_set, encoding)
        length, entity = self.sentences.longest()
        if length > block_size:
            raise ValueError(f"a fact about {fact_set.entities[entity][:60]!r} takes {length} tokens, more than "
                             f"block_size={block_size}: raise block_size")
        self.cumulative = np.cumsum(fact_set.frequency)
        self.has_questions = bool((fact_set.role != facts.ASKED).any())

    def digest(self):
        """A hash of the facts and their tokens, for telling whether two processes have the same."""
        sentences = self.sentences
        return digest(repr((self.facts.entities, sentences.pieces, sentences.names, sentences.values)).encode(), self.facts.codes)

    def batch(self, split, step, batch_size):
        """inputs and targets, (batch_size, block_size) int64 each; a target of -1 has no loss."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), step])
        never_asked = split == "val" and self.has_questions
        blocks = torch.stack([self._block(rng, never_asked) for _ in range(batch_size)])
        inputs = blocks[:, :-1].clone()
        inputs[inputs == IGNORE] = self.sentences.end
        return inputs, blocks[:, 1:].contiguous()

    def _block(self, rng, never_asked):
        tokens, seen = [self.sentences.end], set()
        draws = 2 * self.block_size  # more than fit, though of questions never asked only every fourth draw counts
        entities = np.minimum(np.searchsorted(self.cumulative, rng.random(draws)), len(self.facts.entities) - 1)
        attributes = rng.integers(len(self.facts.attributes), size=draws)
        for e, a, asks, wording in zip(entities.tolist(), attributes.tolist(), rng.random(draws), rng.random(draws)):
            role = self.facts.role[e, a]
            if e in seen or (never_asked and role != facts.SELECT):
                continue
            seen.add(e)
            attribute = self.facts.attributes[a]
            question = never_asked or (role == facts.ASKED and attribute.questions and asks < self.question_share)
            if self.facts.biographies and not question:
                tokens += self.sentences.biography(e, rng.permutation(len(self.facts.attributes)))
            else:
                wordings = attribute.questions if question else attribute.statements
                tokens += self.sentences.document(e, a, wordings[int(wording * len(wordings))])
            if len(tokens) > self.block_size:
                break
        tokens = tokens[:self.block_size + 1]
        return torch.tensor(tokens + [IGNORE] * (self.block_size + 1 - len(tokens)))


class TextData:
    """Blocks from random places of a text; its last tenth is the val split."""

    facts = None

    def __init__(self, text, encoding, block_size, seed=0):
        self.encoding, self.block_size, self.seed = encoding, block_size, seed
        tokens = np.array(encoding.encode_ordinary(text), dtype=np.int64)
        cut = len(tokens) - len(tokens) // 10
        self.tokens = {"train": tokens[:cut], "val": tokens[cut:]}
        if len(tokens) - cut <= block_size:
            raise ValueError(f"the text has {len(tokens)} tokens, too few for block_size={block_size}: "
                             f"it needs {10 * (block_size + 1)}, or a smaller block_size")
        self.bytes_per_token = len(encoding.decode_bytes(tokens[cut:].tolist())) / len(tokens[cut:])  # of the val split

    def digest(self):
        """A hash of the text's tokens, for telling whether two processes have the same."""
        return digest(self.tokens["train"], self.tokens["val"])

    def batch(self, split, step, batch_size):
        """inputs and targets, (batch_size, block_size) int64 each."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), step])
        tokens = self.tokens[split]
        starts = rng.integers(len(tokens) - self.block_size, size=batch_size)
        blocks = torch.from_numpy(np.stack([tokens[i:i + self.block_size + 1] for i in starts]))
        return blocks[:, :-1].contiguous(), blocks[:, 1:].contiguous()


def digest(*contents):
    """The SHA-256 of bytes and contiguous arrays, its first 16 digits."""
    total = hashlib.sha256()
    for content in contents:
        total.update(content)
    return total.hexdigest()[:16]


def open_data(config, tokenizer_path=None):
    """The data that config.data names, with the tokenizer that config.tokenizer names.

    tokenizer_path: a tokenizer that an earlier run saved, to use in place of training one anew.
    Raises ValueError, FileNotFoundError or ModuleNotFoundError saying what is wrong with the name, the file or its line.
    """
    path = Path(config.data)
    if config.data == "world":
        fact_set, text = facts.world(config.n_entities, config.zipf), None
    elif config.data == "people":
        fact_set, text = facts.people(config.n_entities, config.zipf, config.seed), None
    elif not path.is_file():
        raise FileNotFoundError(f"data must be world, people, or the path of a .jsonl or text file; {config.data!r} is no file"
                                f"{nearest(config.data, ('world', 'people'))}")
    elif path.suffix == ".jsonl":
        fact_set, text = facts.from_jsonl(path), None
    else:
        fact_set, text = None, "\n".join(facts.read_lines(path))
        if not text.strip():
            raise ValueError(f"{path}: the file is empty")
    encoding = open_tokenizer(config, tokenizer_path, facts.all_sentences(fact_set) if fact_set else [text])
    if fact_set:
        return FactData(fact_set, encoding, config.block_size, config.seed)
    return TextData(text, encoding, config.block_size, config.seed)


def open_tokenizer(config, path, texts):
    """The tiktoken encoding that config.tokenizer names; `texts` is what a new BPE is trained on."""
    name = config.tokenizer
    if name not in ("auto", "bytes", "bpe") and not name.endswith(".tiktoken"):
        return tokenizer.named(name)  # its way of cutting words is not in a .tiktoken file
    if path is not None and path.exists():
        return tokenizer.load(path)
    if name == "auto":
        shipped = facts.DATA / config.data / "tokenizer.tiktoken"
        return tokenizer.load(shipped) if config.data in ("world", "people") else tokenizer.byte_encoding()
    if name == "bytes":
        return tokenizer.byte_encoding()
    if name == "bpe":
        return tokenizer.train_bpe(texts, config.vocab_size)
    return tokenizer.load(name)
