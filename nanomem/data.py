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
from nanomem.sentences import SentenceArrays, Sentences, all_sentences

SPLITS = ("train", "val")
DROPOUT = len(SPLITS)  # what `random_stream` can be for, besides the splits
IGNORE = -1  # a target without loss


def stream_seed(seed: int, purpose: int, *numbers: int) -> np.random.SeedSequence:
    """The seed of a random stream for one purpose (a split's place in SPLITS, or DROPOUT) and numbers such as
    a step.

    Purpose and numbers are a spawn key, which keeps all streams apart. A list would not, because NumPy
    ignores trailing zeros: default_rng([seed, 0, 0]) is default_rng(seed), the stream of `facts.people`.
    """
    return np.random.SeedSequence(seed, spawn_key=(purpose, *numbers))


def random_stream(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """The random generator of a `stream_seed`."""
    return np.random.default_rng(stream_seed(seed, purpose, *numbers))


class FactData:
    """Blocks of sentences, with at most one sentence or biography about each subject, so that no answer can
    be copied from earlier in the block.

    The split "train" has statements or biographies about all pairs, and questions about the ASKED ones. "val"
    has questions about the SELECT ones, which training never asks; if the facts have no questions, it is
    like "train".

    Raises ValueError for a fact longer than a block. With `fit`, blocks grow to hold the longest fact, up to
    LONGEST_FIT tokens.
    """

    LONGEST_FIT = 1024  # longer blocks could exhaust a laptop's memory, so users must set them themselves
    QUESTION_SHARE = 0.5  # of the sentences about an ASKED pair

    def __init__(
            self, fact_set: facts.FactSet, encoding: tiktoken.Encoding, block_size: int, seed: int = 0,
            fit: bool = False):
        self.facts, self.encoding, self.seed = fact_set, encoding, seed
        self.sentences = Sentences(fact_set, encoding)
        length, name = self.sentences.longest()
        if fit and length <= self.LONGEST_FIT:
            block_size = max(block_size, length)
        self.block_size = block_size
        if length > block_size:
            raise ValueError(
                f"a fact about {name[:60]!r} takes {length} tokens, more than "
                f"block_size={block_size}: shorten it, or set --block_size={length}")
        self.arrays = SentenceArrays(self.sentences)
        self.most = block_size // self.arrays.shortest() + 1  # documents that begin in a block
        self.cumulative = np.cumsum(fact_set.frequency)
        self.has_questions = bool((fact_set.role != facts.ASKED).any())

    def leave_out(self, entities: np.ndarray):
        """Makes no more documents about these entities, given by number; some must be left."""
        frequency = self.facts.frequency.copy()
        frequency[entities] = 0
        self.cumulative = np.cumsum(frequency / frequency.sum())

    def digest(self) -> str:
        """A hash of the facts and their tokens, to tell whether two processes have the same."""
        sentences = self.sentences
        tokens = repr((self.facts.entities, sentences.pieces, sentences.names, sentences.values))
        held_out = self.facts.held_out.entities if self.facts.held_out else []
        return digest(tokens.encode(), self.facts.codes, *[prompt.encode() for prompt in held_out])

    def batch(self, split: str, start: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences start, start + 1, ... of a split: inputs and targets, (batch_size, block_size) int64
        each. A target of -1 has no loss.
        """
        never_asked = split == "val" and self.has_questions
        # Some entities are drawn twice, and in "val" only a quarter of all pairs has a question to ask.
        draws = self.most * (16 if never_asked else 4)
        n_entities, n_attributes = self.facts.codes.shape
        uniform = self._uniform(split, start, batch_size, draws)      # (batch_size, draws, numbers per draw)
        entities = np.minimum(self.cumulative.searchsorted(uniform[..., 0]), n_entities - 1)
        attributes = (uniform[..., 1] * n_attributes).astype(int)
        role = self.facts.role[entities, attributes]                  # (batch_size, draws)
        if never_asked:
            is_allowed = is_question = role == facts.SELECT
        else:
            is_allowed = np.ones_like(role, dtype=bool)
            can_ask = self.arrays.counts[attributes, 1] > 0
            is_question = can_ask & (role == facts.ASKED) & (uniform[..., 2] < self.QUESTION_SHARE)

        chosen = first_of_each(self.facts.subjects[entities], is_allowed)
        chosen &= chosen.cumsum(axis=1) <= self.most
        documents = self._documents(
            entities[chosen], attributes[chosen], is_question[chosen], uniform[chosen])
        blocks = np.full((batch_size, self.block_size + 1), IGNORE)
        blocks[:, 0] = self.sentences.end
        self.arrays.join(documents, blocks, chosen.nonzero()[0])
        blocks = torch.from_numpy(blocks)
        inputs = blocks[:, :-1].clone()
        inputs[inputs == IGNORE] = self.sentences.end
        return inputs, blocks[:, 1:].contiguous()

    def _uniform(self, split, start, batch_size, draws):
        """Numbers in [0, 1), (batch_size, draws, numbers per draw): for entity, attribute, whether to ask,
        wording, and the order of a biography.
        """
        each = 4
        if self.facts.biographies:
            each += self.facts.codes.shape[1]
        steps = -(-draws * each // 4)  # Philox makes four numbers a step, and can jump to any step
        philox = np.random.Philox(stream_seed(self.seed, SPLITS.index(split)))
        philox.advance(start * steps)
        numbers = np.random.Generator(philox).random((batch_size, 4 * steps))
        return numbers[:, :draws * each].reshape(batch_size, draws, each)

    def _documents(self, entities, attributes, is_question, uniform):
        """(n, pieces), as `SentenceArrays.join` takes them."""
        documents = self.arrays.documents(entities, attributes, is_question, uniform[:, 3])
        if not self.facts.biographies:
            return documents
        biographies = self.arrays.biographies(entities, uniform[:, 4:].argsort(axis=1))
        width = max(documents.shape[1], biographies.shape[1])
        rows = np.full((len(documents), width), self.arrays.nothing)
        rows[is_question, :documents.shape[1]] = documents[is_question]
        rows[~is_question, :biographies.shape[1]] = biographies[~is_question]
        return rows


def first_of_each(numbers: np.ndarray, is_allowed: np.ndarray) -> np.ndarray:
    """Where each row has the first allowed one of equal numbers: (rows, columns) bool, as the arguments."""
    # Those not allowed get numbers of their own.
    others = numbers.max() + 1 + np.arange(numbers.shape[1])
    numbers = np.where(is_allowed, numbers, others)
    order = numbers.argsort(axis=1, kind="stable")
    in_order = np.take_along_axis(numbers, order, axis=1)
    is_new = np.ones_like(is_allowed)
    is_new[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
    is_first = np.empty_like(is_new)
    np.put_along_axis(is_first, order, is_new, axis=1)
    return is_first & is_allowed


class TextData:
    """Blocks of a text, each once per epoch, in an order that depends only on seed and epoch.

    Args:
        tokens: {"train": arrays, "val": arrays}, in memory or on disk.
        val_bytes: length of the val split's text.
        name: a hash of the tokens.
    Raises ValueError for a split with too few tokens.
    """

    facts = None

    def __init__(
            self, tokens: dict, val_bytes: int, encoding: tiktoken.Encoding, block_size: int, seed: int = 0,
            name: str = ""):
        self.tokens, self.encoding, self.block_size = tokens, encoding, block_size
        self.seed, self.name = seed, name
        self.ends = {split: np.cumsum([len(array) for array in arrays]) for split, arrays in tokens.items()}
        self.blocks = {split: int(ends[-1] - block_size) // block_size for split, ends in self.ends.items()}
        for split, ends in self.ends.items():
            if self.blocks[split] < 1:
                raise ValueError(
                    f"the text's {split} split has {ends[-1]:,} tokens, too few for block_size={block_size}: "
                    f"it needs {2 * block_size}, or a smaller block_size")
        self.bytes_per_token = val_bytes / int(self.ends["val"][-1])
        self.orders = {}  # split -> (epoch, shift, order of its blocks)

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
        if split not in self.orders or self.orders[split][0] != epoch:
            rng = random_stream(self.seed, SPLITS.index(split), epoch)
            shift = rng.integers(self.block_size)  # so that blocks begin at other tokens in another epoch
            self.orders[split] = epoch, shift, rng.permutation(self.blocks[split])
        _, shift, order = self.orders[split]
        return self._read(split, shift + order[i] * self.block_size, self.block_size + 1)

    def _read(self, split, start, count):
        """`count` tokens of a split from position `start` on, int64, from one shard or several."""
        shard, parts = int(np.searchsorted(self.ends[split], start, side="right")), []
        while count:
            array = self.tokens[split][shard]
            offset = start - (self.ends[split][shard] - len(array))  # of `start` in this shard
            part = array[offset:offset + count]
            parts.append(part)
            start += len(part)
            count -= len(part)
            shard += 1
        return np.concatenate(parts).astype(np.int64)


# ------------------------------------------------------------------------------------------------
# Shards on disk, made by data/prepare.py: files of tokens, and an index

INDEX = "index.json"
REMEDY = "delete the folder and prepare it again"


def token_dtype(vocab_size: int) -> type:
    """The integer type that tokens are stored as."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def file_digest(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=64)  # each keeps a file open, and a process may open only a few hundred
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


def open_shards(folder: Path, config: Config, tokenizer_path: Path | None = None) -> TextData:
    """The TextData of a folder of shards.

    Raises ValueError naming the file that is missing, cut short, edited or of another vocabulary.
    """
    index = checkpoint.read_json(folder / INDEX)
    if not is_index(index):
        raise ValueError(f"{folder / INDEX} was changed after it was written; {REMEDY}")
    encoding = shards_tokenizer(folder, index, config, tokenizer_path)
    written, dtype = (folder / INDEX).stat().st_mtime_ns, np.dtype(index["dtype"])
    tokens, digests = {split: [] for split in SPLITS}, []
    for split in SPLITS:
        for shard in index[split]:
            path = folder / shard["file"]
            check_shard(path, shard, dtype, written)
            tokens[split].append(ShardTokens(path, dtype, shard["tokens"]))
            digests.append(shard["sha256"])
    val_bytes = sum(shard["bytes"] for shard in index["val"])
    name = digest(repr(digests).encode())
    return TextData(tokens, val_bytes, encoding, config.block_size, config.seed, name)


def is_index(index):
    """Whether a JSON value is an index as data/prepare.py writes it, with shards of both splits."""
    if not has_types(index, tokenizer=str, vocabulary=str, dtype=str, train=list, val=list):
        return False
    if index["dtype"] not in ("uint16", "uint32") or not index["train"] or not index["val"]:
        return False
    shards = index["train"] + index["val"]
    return all(has_types(shard, file=str, tokens=int, bytes=int, sha256=str) for shard in shards)


def has_types(value, **types):
    """Whether a JSON value is an object with these keys and types of values."""
    return isinstance(value, dict) and all(type(value.get(key)) is types[key] for key in types)


def shards_tokenizer(folder, index, config, tokenizer_path):
    """The encoding that the shards were made with. Raises ValueError for another one."""
    name = index["tokenizer"]
    if config.tokenizer not in ("auto", name) and not config.init_from:
        raise ValueError(
            f"{folder} already holds tokens, of the tokenizer {name}; "
            f"leave out --tokenizer={config.tokenizer}")
    if name.endswith(".tiktoken"):
        is_saved = tokenizer_path is not None and tokenizer_path.exists()
        name = tokenizer_path if is_saved else folder / name
    encoding = tokenizer.by_name(name)
    if tokenizer.digest(encoding) != index["vocabulary"]:
        raise ValueError(f"the shards in {folder} were made with another tokenizer than {name}")
    return encoding


def check_shard(path, shard, dtype, written):
    """Raises ValueError if a shard is missing, cut short, or was changed since its index was written."""
    if not path.exists():
        raise ValueError(f"{path} is missing; {REMEDY}")
    size, expected = path.stat().st_size, shard["tokens"] * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, and {INDEX} says {expected:,}; {REMEDY}")
    # Only files newer than the index are read: reading them all would take long.
    if path.stat().st_mtime_ns > written and file_digest(path) != shard["sha256"]:
        raise ValueError(f"{path} was changed after it was written; {REMEDY}")


def ahead(make: Callable, numbers: Iterable) -> Iterator:
    """Yields make(number) for each of numbers. A thread makes the next one while one is in use."""
    # No `with`: it would wait for the thread when the garbage collector closes an abandoned generator, which
    # can happen anywhere in the program, and waiting there can lock up.
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

    Args:
        config: its data, tokenizer, block_size and seed are used, and what DATASETS and a new BPE need.
        tokenizer_path: a tokenizer saved by an earlier run, used instead of training another.
        fit: blocks may be longer than config.block_size, to hold the longest fact; see the data's block_size.
    Raises ValueError, FileNotFoundError or ModuleNotFoundError saying what is wrong with the name, the file
    or its line.
    """
    if config.data in DATASETS:
        return open_facts(config, tokenizer_path, fit)
    path = Path(config.data)
    for folder in (path, shipped(config.data)):  # the second: data/prepare.py's own names
        if (folder / INDEX).is_file():
            return open_shards(folder, config, tokenizer_path)
    check_readable(path, config.data)
    if config.teaches_facts():
        return open_facts(config, tokenizer_path, fit)
    text = facts.read_text(path)
    facts.refuse_json(path, text)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    encoding = open_tokenizer(config, tokenizer_path, [text])
    return TextData.from_text(text, encoding, config.block_size, config.seed)


def named_facts(config: Config) -> facts.FactSet:
    """The set of facts that config.data names: one of DATASETS, or a .jsonl file. Raises OSError or
    ValueError for a file that can't be read.
    """
    if config.data in DATASETS:
        return DATASETS[config.data].make(config)
    return facts.from_jsonl(Path(config.data))


def open_facts(config, tokenizer_path, fit):
    """The FactData of the facts that config.data names."""
    fact_set = named_facts(config)
    encoding = open_tokenizer(config, tokenizer_path, all_sentences(fact_set))
    return FactData(fact_set, encoding, config.block_size, config.seed, fit)


def check_readable(path, name):
    """Raises ValueError or FileNotFoundError unless --data=NAME is a file that train.py can read."""
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
            f"{name!r} is none of these{nearest(name, known)}. "
            "python data/prepare.py NAME makes others, such as shakespeare")


def open_tokenizer(config: Config, path: Path | None, texts: Iterable[str] | None) -> tiktoken.Encoding:
    """The encoding that config.tokenizer names.

    path: where a run has saved it, if it has. texts: what to train a BPE on; None: it must have been saved.
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
        if config.data in DATASETS and own.exists():
            return tokenizer.load(own)
        name = "bytes"
    if name == "bpe":
        return tokenizer.train_bpe(texts, config.vocab_size)
    return tokenizer.by_name(name)
