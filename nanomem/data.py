"""
Batches of tokens: `open_data` returns FactData (sentences of facts) or TextData (a text file, or shards
that data/prepare.py made).

- a split is an endless stream of sequences, each of which depends on nothing but the seed and its number: a
  resumed run, another batch size and any number of processes see the same stream, and a run's place in it
  is one number
- shards stay on disk, mapped into memory, and are checked before training: length, vocabulary, and content
  if they were touched
- `ahead` makes the next batch while one is in use
"""

import functools
import hashlib
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from nanomem import checkpoint, facts, tokenizer
from nanomem.cli import nearest

SPLITS = ("train", "val")
DROPOUT = len(SPLITS)  # what `random_stream` is for, beside the splits
IGNORE = -1  # target of a position that has none: no loss there


def random_stream(seed, purpose, *numbers):
    """A NumPy Generator for a purpose (a split's place in SPLITS, or DROPOUT) and numbers such as a step.

    The numbers are SeedSequence's spawn key. In a list after the seed, trailing zeros count for nothing:
    default_rng([seed, 0, 0]) is default_rng(seed), the stream that `facts.people` draws from.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *numbers)))


class FactData:
    """Blocks of sentences about entities, at most one about each in a block, so that no answer can be
    copied.

    split 'train' has statements of all pairs, or biographies, and questions of the ASKED ones, 'val' the
    questions of the SELECT ones, never asked (or, for facts without questions, the same as 'train').

    Raises ValueError for a fact longer than a block. With `fit`, blocks grow to hold the longest one, up to
    LONGEST_FIT tokens.
    """

    LONGEST_FIT = 1024  # a longer block takes a laptop's whole memory: the user's decision

    question_share = 0.5  # of the sentences about an ASKED pair

    def __init__(self, fact_set, encoding, block_size, seed=0, fit=False):
        self.facts, self.encoding, self.seed = fact_set, encoding, seed
        self.sentences = facts.Sentences(fact_set, encoding)
        length, entity = self.sentences.longest()
        if fit and length <= self.LONGEST_FIT:
            block_size = max(block_size, length)
        self.block_size = block_size
        if length > block_size:
            raise ValueError(
                f"a fact about {fact_set.entities[entity][:60]!r} takes {length} tokens, more than "
                f"block_size={block_size}: shorten it, or set --block_size={length}"
            )
        self.cumulative = np.cumsum(fact_set.frequency)
        self.roles = (
            fact_set.role.tolist()
        )  # a list's elements are read several times faster than an array's, one by one
        self.has_questions = bool((fact_set.role != facts.ASKED).any())

    def digest(self):
        """A hash of the facts and their tokens, for telling whether two processes have the same."""
        sentences = self.sentences
        return digest(
            repr((self.facts.entities, sentences.pieces, sentences.names, sentences.values)).encode(),
            self.facts.codes,
        )

    def batch(self, split, start, batch_size):
        """Sequences start, start + 1, ... of a split: inputs and targets, (batch_size, block_size) int64
        each; a target of -1 has no loss.
        """
        never_asked = split == "val" and self.has_questions
        tokens = []
        for number in range(start, start + batch_size):
            tokens += self._block(random_stream(self.seed, SPLITS.index(split), number), never_asked)
        blocks = torch.from_numpy(np.array(tokens)).view(
            batch_size, -1
        )  # several times faster than torch.tensor of lists
        inputs = blocks[:, :-1].clone()
        inputs[inputs == IGNORE] = self.sentences.end
        return inputs, blocks[:, 1:].contiguous()

    def _block(self, rng, never_asked):
        """A list of block_size + 1 tokens."""
        tokens, seen = [self.sentences.end], set()
        draws = (
            2 * self.block_size
        )  # more than fit, though of questions never asked only every fourth draw counts
        entities = np.minimum(self.cumulative.searchsorted(rng.random(draws)), len(self.facts.entities) - 1)
        attributes = rng.integers(len(self.facts.attributes), size=draws)
        for e, a, asks, wording in zip(
            entities.tolist(), attributes.tolist(), rng.random(draws), rng.random(draws)
        ):
            role = self.roles[e][a]
            if e in seen or (never_asked and role != facts.SELECT):
                continue
            seen.add(e)
            attribute = self.facts.attributes[a]
            question = never_asked or (
                role == facts.ASKED and attribute.questions and asks < self.question_share
            )
            if self.facts.biographies and not question:
                tokens += self.sentences.biography(e, rng.permutation(len(self.facts.attributes)).tolist())
            else:
                wordings = attribute.questions if question else attribute.statements
                tokens += self.sentences.document(e, a, wordings[int(wording * len(wordings))])
            if len(tokens) > self.block_size:
                break
        tokens = tokens[:self.block_size + 1]
        return tokens + [IGNORE] * (self.block_size + 1 - len(tokens))


class TextData:
    """Blocks of a text: each once an epoch, in an order that depends on nothing but seed and epoch.

    tokens: {"train": arrays, "val": arrays}, which may lie on disk; val_bytes: of the val split's text;
    name: a hash of all that. Raises ValueError for a split with too few tokens.
    """

    facts = None

    def __init__(self, tokens, val_bytes, encoding, block_size, seed=0, name=""):
        self.tokens, self.encoding, self.block_size, self.seed, self.name = (
            tokens,
            encoding,
            block_size,
            seed,
            name,
        )
        self.ends = {split: np.cumsum([len(array) for array in arrays]) for split, arrays in tokens.items()}
        self.blocks = {split: int(ends[-1] - block_size) // block_size for split, ends in self.ends.items()}
        for split, ends in self.ends.items():
            if self.blocks[split] < 1:
                raise ValueError(
                    f"the text's {split} split has {ends[-1]:,} tokens, too few for block_size={block_size}: "
                    f"it needs {2 * block_size}, or a smaller block_size"
                )
        self.bytes_per_token = val_bytes / int(self.ends["val"][-1])
        self.orders = {}  # split -> (epoch, its order)

    @classmethod
    def from_text(cls, text, encoding, block_size, seed=0):
        """Of a text in memory, whose last tenth is the val split."""
        tokens = tokenizer.encode(encoding, text)
        cut = len(tokens) - len(tokens) // 10
        val_bytes = len(encoding.decode_bytes(tokens[cut:].tolist()))
        return cls(
            {"train": [tokens[:cut]], "val": [tokens[cut:]]},
            val_bytes,
            encoding,
            block_size,
            seed,
            digest(tokens),
        )

    def digest(self):
        """A hash of the text's tokens, for telling whether two processes have the same."""
        return self.name

    def batch(self, split, start, batch_size):
        """Sequences start, start + 1, ... of a split: inputs and targets, (batch_size, block_size) int64
        each.
        """
        numbers = range(start, start + batch_size)
        blocks = torch.from_numpy(np.stack([self._block(split, number) for number in numbers]))
        return blocks[:, :-1].contiguous(), blocks[:, 1:].contiguous()

    def _block(self, split, number):
        """Block `number` of the stream of all epochs, and the token after it."""
        epoch, i = divmod(number, self.blocks[split])
        if self.orders.get(split, (None,))[0] != epoch:
            rng = random_stream(self.seed, SPLITS.index(split), epoch)
            shift = rng.integers(self.block_size)  # so that another epoch has other blocks
            self.orders[split] = epoch, shift, rng.permutation(self.blocks[split])
        _, shift, order = self.orders[split]
        return self._read(split, shift + order[i] * self.block_size, self.block_size + 1)

    def _read(self, split, start, count):
        """So many tokens from a place on, int64, out of one shard or several."""
        shard, parts = int(np.searchsorted(self.ends[split], start, side="right")), []
        while count:
            array = self.tokens[split][shard]
            first = start - (self.ends[split][shard] - len(array))
            parts.append(array[first:first + count])
            start, count, shard = start + len(parts[-1]), count - len(parts[-1]), shard + 1
        return np.concatenate(parts).astype(np.int64)


# ------------------------------------------------------------------------------------------------
# Shards on disk, which data/prepare.py makes: files of tokens, and an index

INDEX = "index.json"


def token_dtype(vocab_size):
    """The integers that tokens are stored as."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def file_digest(path):
    """A file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=64)  # each keeps a file open, of which a process may have a few hundred
def mapped(path, dtype):
    """A file's numbers, mapped into memory."""
    return np.memmap(path, dtype, "r")


class ShardTokens:
    """The tokens of a shard, read where they are asked for: tokens[start:stop]."""

    def __init__(self, path, dtype, length):
        self.path, self.dtype, self.length = path, dtype, length

    def __len__(self):
        return self.length

    def __getitem__(self, where):
        return mapped(self.path, self.dtype)[where]


def open_shards(folder, config, tokenizer_path=None):
    """The TextData of a folder of shards. Raises ValueError naming the file that is missing, cut, edited or
    of another vocabulary.
    """
    index, when = checkpoint.read_json(folder / INDEX), (folder / INDEX).stat().st_mtime_ns
    if not isinstance(index, dict) or not all(
        {"file", "tokens", "bytes", "sha256"} <= shard.keys() and isinstance(shard["tokens"], int)
        for split in SPLITS
        for shard in index.get(split, [{}])
    ):
        raise ValueError(
            f"{folder / INDEX} was changed after it was written; delete the folder and prepare it anew"
        )
    if config.tokenizer not in ("auto", index["tokenizer"]):
        raise ValueError(
            f"{folder} holds tokens already, of the tokenizer {index['tokenizer']}; leave out --tokenizer={config.tokenizer}"
        )
    name = index["tokenizer"]
    if name.endswith(".tiktoken"):
        name = tokenizer_path if tokenizer_path is not None and tokenizer_path.exists() else folder / name
    encoding = tokenizer.by_name(name)
    if tokenizer.digest(encoding) != index["vocabulary"]:
        raise ValueError(f"the shards in {folder} were made with another tokenizer than {name}")
    tokens, dtype = {}, np.dtype(index["dtype"])
    for split in SPLITS:
        for shard in index[split]:
            path = folder / shard["file"]
            size, expected = path.stat().st_size if path.exists() else None, shard["tokens"] * dtype.itemsize
            if size != expected:
                raise ValueError(
                    f"{path} {'is missing' if size is None else f'has {size:,} bytes, and {INDEX} says {expected:,}'}; "
                    "delete the folder and prepare it anew"
                )
            if (
                path.stat().st_mtime_ns > when and file_digest(path) != shard["sha256"]
            ):  # reading them all would take long
                raise ValueError(
                    f"{path} was changed after it was written; delete the folder and prepare it anew"
                )
            tokens.setdefault(split, []).append(ShardTokens(path, dtype, shard["tokens"]))
    val_bytes = sum(shard["bytes"] for shard in index["val"])
    name = digest(repr([shard["sha256"] for split in SPLITS for shard in index[split]]).encode())
    return TextData(tokens, val_bytes, encoding, config.block_size, config.seed, name)


def ahead(make, numbers):
    """Yields make(number) for each of numbers, made by a thread while the one before is in use."""
    # Not in a `with`: an abandoned generator is closed by the garbage collector, anywhere, and waiting for
    # a thread there can lock up.
    pool, made = ThreadPoolExecutor(1), None
    for number in numbers:
        following = pool.submit(make, number)
        if made:
            yield made.result()
        made = following
    if made:
        yield made.result()


def digest(*contents):
    """The SHA-256 of bytes and contiguous arrays, its first 16 digits."""
    total = hashlib.sha256()
    for content in contents:
        total.update(content)
    return total.hexdigest()[:16]


def open_data(config, tokenizer_path=None, fit=False):
    """The data that config.data names, with the tokenizer that config.tokenizer names.

    tokenizer_path: a tokenizer that an earlier run saved, to use in place of training one anew. fit: blocks
    may be longer than config.block_size, to hold the longest fact; see the data's block_size. Raises
    ValueError, FileNotFoundError or ModuleNotFoundError saying what is wrong with the name, the file or its
    line.
    """
    path, generated = Path(config.data), config.data in ("world", "people")
    for folder in (path, facts.DATA / config.data):
        if (folder / INDEX).is_file() and not generated:
            return open_shards(folder, config, tokenizer_path)
    if path.is_file():
        facts.refuse_compressed(path)
    if path.suffix.lower() in (".parquet", ".gz") or path.is_dir() and not generated:
        command = facts.prepare_command(shlex.quote(config.data))
        raise ValueError(f"data={config.data} must be prepared first: {command}")
    if config.data == "world":
        fact_set, text = facts.world(config.n_entities, config.zipf), None
    elif config.data == "people":
        fact_set, text = facts.people(config.n_entities, config.zipf, config.seed), None
    elif not path.is_file():
        prepared = sorted(index.parent.name for index in facts.DATA.glob(f"*/{INDEX}"))
        raise FileNotFoundError(
            f"data must be {', '.join(['world', 'people', *prepared])}, a folder of shards, or the path of a .jsonl or text file; "
            f"{config.data!r} is none{nearest(config.data, ('world', 'people', *prepared))}. Others are made by "
            "python data/prepare.py NAME, such as shakespeare"
        )
    elif facts.teaches_facts(config.data):
        fact_set, text = facts.from_jsonl(path), None
    else:
        fact_set, text = None, facts.read_text(path)
        facts.refuse_json(path, text)
        if not text.strip():
            raise ValueError(f"{path}: the file is empty")
    encoding = open_tokenizer(config, tokenizer_path, facts.all_sentences(fact_set) if fact_set else [text])
    if fact_set:
        return FactData(fact_set, encoding, config.block_size, config.seed, fit)
    return TextData.from_text(text, encoding, config.block_size, config.seed)


def open_tokenizer(config, path, texts):
    """The tiktoken encoding that config.tokenizer names; `texts` is what a new BPE is trained on."""
    name = config.tokenizer
    if name not in ("auto", "bytes", "bpe") and not name.endswith(".tiktoken"):
        return tokenizer.by_name(name)  # its way of cutting words is not in a .tiktoken file
    if path is not None and path.exists():
        return tokenizer.load(path)
    if texts is None:
        raise FileNotFoundError(f"{path} is missing: the run's tokenizer")
    if name == "auto":
        shipped = facts.DATA / config.data / "tokenizer.tiktoken"
        return tokenizer.load(shipped) if config.data in ("world", "people") else tokenizer.byte_encoding()
    if name == "bpe":
        return tokenizer.train_bpe(texts, config.vocab_size)
    return tokenizer.by_name(name)
