"""
Batches of tokens. `open_data` returns FactData, sentences of facts, or TextData, a text file or shards of
data/prepare.py.

- A split is an endless stream of sequences. Each depends only on the seed and its number, so a resumed run,
  another batch size and any number of processes see the same stream, and the position of a run is one
  number.
- Shards stay on disk, mapped into memory. Before training they are checked: length, vocabulary, and content
  if a file is newer than its index.
- `ahead` makes the next batch while one is in use.
"""

import functools
import hashlib
import shlex
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
import torch

from nanomem import checkpoint, facts, tokenizer
from nanomem.cli import nearest, shipped
from nanomem.config import Config
from nanomem.datasets import DATASETS

SPLITS = ("train", "val")
DROPOUT = len(SPLITS)  # what `random_stream` can be for, besides the splits
IGNORE = -1  # a target without loss


def random_stream(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """Random numbers for one purpose (a split's place in SPLITS, or DROPOUT) and numbers such as a step.

    The numbers are SeedSequence's spawn key, because it ignores trailing zeros in a list: default_rng([seed,
    0, 0]) is default_rng(seed), the stream that `facts.people` draws from.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *numbers)))


class FactData:
    """Blocks of sentences, with at most one sentence or biography about each entity, so that no answer can
    be copied.

    The split "train" has statements or biographies of all pairs, and questions about the ASKED ones. "val"
    has questions about the SELECT ones, which are never asked in training (the same as "train" if facts have
    no questions).

    Raises ValueError for a fact longer than a block. With `fit`, blocks grow to hold the longest fact, up to
    LONGEST_FIT tokens.
    """

    LONGEST_FIT = 1024  # longer blocks could exhaust a laptop's memory, so users must set them themselves
    QUESTION_SHARE = 0.5  # of the sentences about an ASKED pair

    def __init__(self, fact_set: facts.FactSet, encoding: tiktoken.Encoding, block_size: int, seed: int = 0,
                 fit: bool = False):
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
        )  # reading single elements is faster from a list than from an array
        self.has_questions = bool((fact_set.role != facts.ASKED).any())

    def digest(self) -> str:
        """A hash of the facts and their tokens, to tell whether two processes have the same."""
        sentences = self.sentences
        tokens = repr((self.facts.entities, sentences.pieces, sentences.names, sentences.values))
        return digest(tokens.encode(), self.facts.codes)

    def batch(self, split: str, start: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences start, start + 1, ... of a split: inputs and targets, (batch_size, block_size) int64
        each.

        A target of -1 has no loss.
        """
        never_asked = split == "val" and self.has_questions
        tokens = []
        for number in range(start, start + batch_size):
            tokens += self._block(random_stream(self.seed, SPLITS.index(split), number), never_asked)
        blocks = torch.from_numpy(np.array(tokens)).view(batch_size, -1)  # faster than torch.tensor of a list
        inputs = blocks[:, :-1].clone()
        inputs[inputs == IGNORE] = self.sentences.end
        return inputs, blocks[:, 1:].contiguous()

    def _block(self, rng, never_asked):
        """A list of block_size + 1 tokens."""
        tokens, seen = [self.sentences.end], set()
        draws = (
            2 * self.block_size
        )  # more than fit; but of questions never asked only every fourth draw counts
        n_entities, n_attributes = self.facts.codes.shape
        entities = np.minimum(self.cumulative.searchsorted(rng.random(draws)), n_entities - 1)
        attributes = rng.integers(n_attributes, size=draws)
        drawn = zip(entities.tolist(), attributes.tolist(), rng.random(draws), rng.random(draws))
        for e, a, question_draw, wording_draw in drawn:
            role = self.roles[e][a]
            if e in seen or (never_asked and role != facts.SELECT):
                continue
            seen.add(e)
            attribute = self.facts.attributes[a]
            can_ask = role == facts.ASKED and attribute.questions
            is_question = never_asked or (can_ask and question_draw < self.QUESTION_SHARE)
            if self.facts.biographies and not is_question:
                tokens += self.sentences.biography(e, rng.permutation(n_attributes).tolist())
            else:
                wordings = attribute.questions if is_question else attribute.statements
                wording = wordings[int(wording_draw * len(wordings))]
                tokens += self.sentences.document(e, a, wording)
            if len(tokens) > self.block_size:
                break
        tokens = tokens[:self.block_size + 1]
        return tokens + [IGNORE] * (self.block_size + 1 - len(tokens))


class TextData:
    """Blocks of a text, each once per epoch, in an order that depends only on seed and epoch.

    tokens: {"train": arrays, "val": arrays}, which may lie on disk. val_bytes: the length of the val split's
    text. name: a hash of all that. Raises ValueError for a split with too few tokens.
    """

    facts = None

    def __init__(
        self,
        tokens: dict,
        val_bytes: int,
        encoding: tiktoken.Encoding,
        block_size: int,
        seed: int = 0,
        name: str = "",
    ):
        self.tokens, self.encoding, self.block_size = tokens, encoding, block_size
        self.seed, self.name = seed, name
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
    def from_text(cls, text: str, encoding: tiktoken.Encoding, block_size: int, seed: int = 0) -> "TextData":
        """A text in memory; its last tenth is the val split."""
        tokens = tokenizer.encode(encoding, text)
        cut = len(tokens) - len(tokens) // 10
        splits = {"train": [tokens[:cut]], "val": [tokens[cut:]]}
        val_bytes = len(encoding.decode_bytes(tokens[cut:].tolist()))
        return cls(splits, val_bytes, encoding, block_size, seed, digest(tokens))

    def digest(self) -> str:
        """A hash of the text's tokens, to tell whether two processes have the same."""
        return self.name

    def batch(self, split: str, start: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
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
        """`count` tokens from a position on, int64, out of one shard or several."""
        shard, parts = int(np.searchsorted(self.ends[split], start, side="right")), []
        while count:
            array = self.tokens[split][shard]
            begin = start - (self.ends[split][shard] - len(array))  # in this shard
            part = array[begin:begin + count]
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return np.concatenate(parts).astype(np.int64)


# ------------------------------------------------------------------------------------------------
# Shards on disk, made by data/prepare.py: files of tokens, and an index

INDEX = "index.json"


def token_dtype(vocab_size: int) -> type:
    """The integer type that tokens are stored as."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def file_digest(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=64)  # each keeps a file open, and a process may open only a few hundred
def mapped(path: Path, dtype: np.dtype) -> np.memmap:
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


def open_shards(folder: Path, config: Config, tokenizer_path: Path | None = None) -> TextData:
    """The TextData of a folder of shards.

    Raises ValueError naming the file that is missing, cut short, edited or of another vocabulary.
    """
    index, when = checkpoint.read_json(folder / INDEX), (folder / INDEX).stat().st_mtime_ns
    if not is_index(index):
        raise ValueError(
            f"{folder / INDEX} was changed after it was written; delete the folder and prepare it again"
        )
    name = index["tokenizer"]
    if config.tokenizer not in ("auto", name):
        raise ValueError(f"{folder} already holds tokens, of the tokenizer {name}; leave out "
                         f"--tokenizer={config.tokenizer}")
    if name.endswith(".tiktoken"):
        has_saved = tokenizer_path is not None and tokenizer_path.exists()
        name = tokenizer_path if has_saved else folder / name
    encoding = tokenizer.by_name(name)
    if tokenizer.digest(encoding) != index["vocabulary"]:
        raise ValueError(f"the shards in {folder} were made with another tokenizer than {name}")
    tokens, digests, dtype = {split: [] for split in SPLITS}, [], np.dtype(index["dtype"])
    for split in SPLITS:
        for shard in index[split]:
            check_shard(folder / shard["file"], shard, dtype.itemsize, when)
            tokens[split].append(ShardTokens(folder / shard["file"], dtype, shard["tokens"]))
            digests.append(shard["sha256"])
    val_bytes = sum(shard["bytes"] for shard in index["val"])
    name = digest(repr(digests).encode())
    return TextData(tokens, val_bytes, encoding, config.block_size, config.seed, name)


def is_index(index) -> bool:
    """Whether this is the content of an index as data/prepare.py writes it."""
    types = {"file": str, "tokens": int, "bytes": int, "sha256": str}
    if not isinstance(index, dict) or index.get("dtype") not in ("uint16", "uint32"):
        return False
    if not isinstance(index.get("tokenizer"), str) or not isinstance(index.get("vocabulary"), str):
        return False
    shards = [shard for split in SPLITS for shard in index.get(split) or [None]]  # both splits have some
    return all(
        isinstance(shard, dict) and {key: type(shard.get(key)) for key in types} == types for shard in shards
    )


def check_shard(path: Path, shard: dict, itemsize: int, when: int):
    """Raises ValueError if a shard is missing, cut short, or was edited after `when`, in ns."""
    again = "delete the folder and prepare it again"
    if not path.exists():
        raise ValueError(f"{path} is missing; {again}")
    size, expected = path.stat().st_size, shard["tokens"] * itemsize
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, and {INDEX} says {expected:,}; {again}")
    # Only a shard newer than the index is read: reading all of them would take long.
    if path.stat().st_mtime_ns > when and file_digest(path) != shard["sha256"]:
        raise ValueError(f"{path} was changed after it was written; {again}")


def ahead(make: Callable, numbers: Iterable) -> Iterator:
    """Yields make(number) for each of numbers; a thread makes each one while the one before is in use."""
    # Not in a `with`: the garbage collector closes an abandoned generator at any place, and waiting for a
    # thread there can lock up.
    pool, made = ThreadPoolExecutor(1), None
    for number in numbers:
        following = pool.submit(make, number)
        if made:
            yield made.result()
        made = following
    if made:
        yield made.result()


def digest(*contents) -> str:
    """The SHA-256 of bytes and contiguous arrays, its first 16 hexadecimal digits."""
    total = hashlib.sha256()
    for content in contents:
        total.update(content)
    return total.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# What --data names


def open_data(config: Config, tokenizer_path: Path | None = None, fit: bool = False) -> FactData | TextData:
    """The data that config.data names, with the tokenizer that config.tokenizer names.

    tokenizer_path: a tokenizer saved by an earlier run, used instead of training another. fit: blocks may
    become longer than config.block_size, to hold the longest fact; the data's block_size says how long.
    Raises ValueError, FileNotFoundError or ModuleNotFoundError saying what is wrong with the name, the file
    or its line.
    """
    if config.data in DATASETS:
        return open_facts(DATASETS[config.data].make(config), config, tokenizer_path, fit)
    path = Path(config.data)
    for folder in (path, shipped(config.data)):
        if (folder / INDEX).is_file():
            return open_shards(folder, config, tokenizer_path)
    check_readable(path, config.data)
    if facts.teaches_facts(config.data):
        return open_facts(facts.from_jsonl(path), config, tokenizer_path, fit)
    text = facts.read_text(path)
    facts.refuse_json(path, text)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return TextData.from_text(
        text, open_tokenizer(config, tokenizer_path, [text]), config.block_size, config.seed
    )


def open_facts(fact_set, config, tokenizer_path, fit):
    """The FactData of a set of facts."""
    encoding = open_tokenizer(config, tokenizer_path, facts.all_sentences(fact_set))
    return FactData(fact_set, encoding, config.block_size, config.seed, fit)


def check_readable(path, name):
    """Raises ValueError or FileNotFoundError unless --data=NAME is a file that can be read as it is."""
    if not name:
        raise ValueError(f"data is empty; expected {', '.join(DATASETS)}, or a file such as --data=book.txt")
    if path.is_file():
        facts.refuse_compressed(path)
    if path.suffix.lower() in (".parquet", ".gz") or path.is_dir():
        remedy = facts.prepare_command(shlex.quote(name))
        if name.lower().endswith(".jsonl.gz"):
            remedy += f"; if it holds facts, unpack it instead: gunzip {shlex.quote(name)}"
        raise ValueError(f"data={name} must be prepared first: {remedy}")
    if not path.is_file():
        prepared = sorted(index.parent.name for index in shipped("people").parent.glob(f"*/{INDEX}"))
        known = [*DATASETS, *prepared]
        raise FileNotFoundError(
            f"data must be {', '.join(known)}, a folder of shards, or the path of a .jsonl or text file; "
            f"got {name!r}{nearest(name, known)}. Others are made by python data/prepare.py NAME, such as "
            "shakespeare"
        )


def open_tokenizer(config: Config, path: Path | None, texts: Iterable[str] | None) -> tiktoken.Encoding:
    """The encoding that config.tokenizer names: the one saved at path, if there is one. texts: what to train
    a BPE on.
    """
    name = config.tokenizer
    if name not in ("auto", "bytes", "bpe") and not name.endswith(".tiktoken"):
        return tokenizer.by_name(name)  # a .tiktoken file doesn't say how it cuts words
    if path is not None and path.exists():
        return tokenizer.load(path)
    if texts is None:
        raise FileNotFoundError(f"{path} is missing: the run's tokenizer")
    if name == "auto":
        own = shipped(config.data) / "tokenizer.tiktoken"
        is_shipped = config.data in DATASETS and own.exists()
        return tokenizer.load(own) if is_shipped else tokenizer.byte_encoding()
    if name == "bpe":
        return tokenizer.train_bpe(texts, config.vocab_size)
    return tokenizer.by_name(name)
