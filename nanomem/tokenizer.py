"""
Tokenizers, all of them tiktoken encodings with a special token, <|endoftext|>, that stands between
documents.

    bytes                   256 tokens and <|endoftext|>: works for any text
    bpe                     trained on the text at hand (pip install -e '.[bpe]')
    a .tiktoken file        one token a line: its bytes in base64, then its rank, as tiktoken's own files
    gpt2, cl100k_base, ...  tiktoken's own encodings; the first use downloads them
"""

import base64
import binascii
import functools
import hashlib
import itertools
import re
from pathlib import Path

import numpy as np
import tiktoken

from nanomem import checkpoint

END_OF_TEXT = "<|endoftext|>"
# GPT-2's way of cutting text into words before merging bytes, with numbers cut into at most three digits.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONGEST_WORD = 256  # characters in a word for the BPE trainer, whose time grows with their square
LONGEST_BLANK = 100_000  # blanks in a row for tiktoken, whose regular expression can't take a million


def from_ranks(ranks, name="nanomem"):
    """A tiktoken encoding from {token bytes: rank}, with <|endoftext|> after the last rank."""
    return tiktoken.Encoding(
        name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )


def byte_encoding():
    """One token a byte: 256 tokens and <|endoftext|>."""
    return from_ranks({bytes([b]): b for b in range(256)}, "bytes")


def encode(encoding, text):
    """The tokens of any text, (n,) uint32. The name of a special token in it is text like any other.

    Threads may call it at the same time.
    """
    ranks = ranks_of_bytes(encoding)
    try:
        if ranks is not None:
            return ranks[np.frombuffer(text.encode(), np.uint8)]
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # half of a surrogate pair: a byte of the command line that is not UTF-8
        return encode(encoding, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except ValueError:  # tiktoken ran out of stack
        parts = cut_blanks(text)
        if len(parts) < 2:
            raise
    return np.concatenate([encoding.encode_to_numpy(part, disallowed_special=()) for part in parts])


@functools.lru_cache(maxsize=8)
def ranks_of_bytes(encoding):
    """The rank of each byte, (256,) uint32, for an encoding of single bytes; None for others."""
    ranks = encoding._mergeable_ranks
    if len(ranks) != 256:
        return None
    return np.array([ranks[bytes([b])] for b in range(256)], dtype=np.uint32)


def cut_blanks(text):
    """The text in parts, cut in the middle of each run of blanks that is longer than LONGEST_BLANK."""
    cuts = [0]
    for run in re.finditer(r"\s+", text):
        cuts += range(run.start() + LONGEST_BLANK, run.end(), LONGEST_BLANK)
    cuts.append(len(text))
    return [text[start:stop] for start, stop in itertools.pairwise(cuts)]


def unassigned(encoding):
    """The numbers below n_vocab that stand for no token: cl100k_base and o200k_base have some."""
    taken = {*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()}
    return [number for number in range(encoding.n_vocab) if number not in taken]


def load(path):
    """Reads a .tiktoken file. Raises ValueError, naming the line, for one that is not."""
    # tiktoken's own reader is no use here: it caches by path, and a retrained tokenizer would never be
    # seen.
    ranks = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}, line {number}: expected a token in base64 and its rank, got {line[:40]!r}"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise ValueError(
            f"{path}: expected ranks 0, 1, 2, ... with all 256 bytes among the tokens, "
            f"got {len(ranks)} tokens"
        )
    return from_ranks(ranks)


def save(encoding, path):
    """Writes an encoding's tokens to a .tiktoken file."""
    ranks = sorted((rank, token) for token, rank in encoding._mergeable_ranks.items())
    checkpoint.write_text(
        path, "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks)
    )


def digest(encoding):
    """A hash of an encoding's tokens, their ranks, and how it cuts words: 16 hexadecimal digits."""
    total = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        total.update(rank.to_bytes(4, "little") + len(token).to_bytes(4, "little") + token)
    return total.hexdigest()[:16]


def train_bpe(texts, vocab_size):
    """Byte-pair encoding trained on an iterable of strings, as a tiktoken encoding of at most vocab_size
    tokens, 257 or more.

    Raises ValueError for fewer, and ModuleNotFoundError, saying what to install, where the `tokenizers`
    package is missing.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size must be 257 or more for a bpe, 256 bytes and <|endoftext|>, got {vocab_size}"
        )
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "training a BPE needs the package tokenizers: pip install -e '.[bpe]'"
        ) from None
    bpe = Tokenizer(models.BPE())
    words = Regex(PATTERN.replace("+", f"{{1,{LONGEST_WORD}}}"))  # a long word is several
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False))  # - 1: <|endoftext|>
    # The library writes each byte as a printable character, in its own order; tiktoken wants the bytes.
    byte_of = byte_of_printable()
    by_id = sorted((i, token) for token, i in bpe.get_vocab().items())
    merged = [bytes(byte_of[c] for c in token) for _, token in by_id if len(token) > 1]
    return from_ranks({token: i for i, token in enumerate([bytes([b]) for b in range(256)] + merged)})


def byte_of_printable():
    """GPT-2's table from printable character to byte: printable bytes stand for themselves, the others for
    256, 257, ...
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def by_name(name):
    """The encoding "bytes", that of a .tiktoken file, or one of tiktoken's own.

    Raises ValueError for an unknown name, and OSError for a file that can't be read or a download that
    fails.
    """
    if name == "bytes":
        return byte_encoding()
    if str(name).endswith(".tiktoken"):
        return load(name)
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(
            f"tokenizer must be auto, bytes, bpe, a .tiktoken file, or one of {', '.join(names)}; "
            f"got {name!r}"
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the HTTP library raises
        raise OSError(f"the tokenizer {name} could not be downloaded ({type(error).__name__}); "
                      "tokenizer=bytes needs no network") from None
