"""
Tokenizers. All are tiktoken encodings with a special token, <|endoftext|>, between documents.

    bytes                   one token per byte: works for any text
    bpe                     trained on your text (pip install -e '.[bpe]')
    a .tiktoken file        tiktoken's format: on each line a token's bytes in base64, and its rank
    gpt2, cl100k_base, ...  tiktoken's own encodings, downloaded at their first use
"""

import base64
import binascii
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiktoken

from nanomem import checkpoint

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text into words before it merges bytes, with numbers cut after three digits.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONGEST_WORD = 256  # characters of a word that the BPE trainer gets; its time grows with their square
LONGEST_BLANK = 100_000  # blanks in a row that tiktoken gets; its regular expression fails at a million


def from_ranks(ranks: dict[bytes, int], name: str = "nanomem") -> tiktoken.Encoding:
    """The tiktoken encoding with these tokens and ranks, and <|endoftext|> after the last rank."""
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def byte_encoding() -> tiktoken.Encoding:
    """One token per byte, and <|endoftext|>."""
    return from_ranks({bytes([b]): b for b in range(256)}, "bytes")


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """The tokens of any text: (n,) uint32. A special token's name in it is ordinary text. Thread-safe."""
    ranks = ranks_of_bytes(encoding)
    try:
        if ranks is not None:
            return ranks[np.frombuffer(text.encode(), np.uint8)]
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # half of a surrogate pair, from bytes on the command line that aren't UTF-8
        return encode(encoding, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except ValueError:  # tiktoken ran out of stack
        parts = cut_blanks(text)
        if len(parts) < 2:
            raise
    return np.concatenate([encoding.encode_to_numpy(part, disallowed_special=()) for part in parts])


@functools.lru_cache(maxsize=8)
def ranks_of_bytes(encoding):
    """The rank of each byte, (256,) uint32, if all tokens are single bytes; otherwise None."""
    ranks = encoding._mergeable_ranks
    if len(ranks) != 256:
        return None
    return np.array([ranks[bytes([b])] for b in range(256)], dtype=np.uint32)


def cut_blanks(text):
    """The text in parts, cut within each run of blanks longer than LONGEST_BLANK."""
    cuts = [0]
    for run in re.finditer(r"\s+", text):
        cuts += range(run.start() + LONGEST_BLANK, run.end(), LONGEST_BLANK)
    cuts.append(len(text))
    return [text[start:stop] for start, stop in itertools.pairwise(cuts)]


def unassigned(encoding: tiktoken.Encoding) -> list[int]:
    """The numbers below n_vocab without a token: cl100k_base and o200k_base have some."""
    assigned = {*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()}
    return [number for number in range(encoding.n_vocab) if number not in assigned]


def load(path: str | Path) -> tiktoken.Encoding:
    """Reads a .tiktoken file. Raises ValueError, naming the line, for any other file."""
    # tiktoken's own reader caches by path, so it would not see a retrained tokenizer.
    ranks = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            expected = "expected a token in base64 and its rank"
            raise ValueError(f"{path}, line {number}: {expected}, got {line[:40]!r}") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        expected = "expected ranks 0, 1, 2, ... with all 256 bytes among the tokens"
        raise ValueError(f"{path}: {expected}, got {len(ranks)} tokens")
    return from_ranks(ranks)


def save(encoding: tiktoken.Encoding, path: str | Path):
    """Writes an encoding's tokens to a .tiktoken file."""
    ranks = sorted((rank, token) for token, rank in encoding._mergeable_ranks.items())
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks]
    checkpoint.write_text(path, "".join(lines))


def digest(encoding: tiktoken.Encoding) -> str:
    """A hash of an encoding's tokens, their ranks, and how it cuts words: 16 hexadecimal digits."""
    total = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        total.update(rank.to_bytes(4, "little") + len(token).to_bytes(4, "little") + token)
    return total.hexdigest()[:16]


def train_bpe(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """A byte-pair encoding of at most vocab_size tokens, trained on texts.

    Raises ValueError for a vocab_size below 257, and ModuleNotFoundError, saying what to install, without the
    package tokenizers.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size must be 257 or more for a bpe, 256 bytes and <|endoftext|>, got {vocab_size}")
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ModuleNotFoundError:
        remedy = "pip install -e '.[bpe]'"
        raise ModuleNotFoundError(f"training a BPE needs the package tokenizers: {remedy}") from None
    bpe = Tokenizer(models.BPE())
    words = Regex(PATTERN.replace("+", f"{{1,{LONGEST_WORD}}}"))  # cuts long words
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False))  # - 1: <|endoftext|>
    # The library writes each byte as a printable character, in an order of its own; tiktoken needs bytes.
    byte_of = byte_of_printable()
    by_id = sorted((i, token) for token, i in bpe.get_vocab().items())
    merged = [bytes(byte_of[c] for c in token) for _, token in by_id if len(token) > 1]
    return from_ranks({token: i for i, token in enumerate([bytes([b]) for b in range(256)] + merged)})


def byte_of_printable():
    """GPT-2's table from character to byte: printable bytes are themselves, the others 256, 257, ..."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def by_name(name: str) -> tiktoken.Encoding:
    """The encoding "bytes", one in a .tiktoken file, or one of tiktoken's own.

    Raises ValueError for an unknown name, OSError for a file that can't be read or a download that fails.
    """
    if name == "bytes":
        return byte_encoding()
    if str(name).endswith(".tiktoken"):
        return load(name)
    names = tiktoken.list_encoding_names()
    if name not in names:
        choices = f"auto, bytes, bpe, a .tiktoken file, or one of {', '.join(names)}"
        raise ValueError(f"tokenizer must be {choices}; got {name!r}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the HTTP library raises
        raise OSError(f"the tokenizer {name} could not be downloaded ({type(error).__name__}); "
                      "tokenizer=bytes needs no network") from None
