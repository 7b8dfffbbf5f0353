"""
Tokenizers, all of them tiktoken encodings with a special token, <|endoftext|>, that stands between documents.

    bytes                   256 tokens and <|endoftext|>: works for any text
    bpe                     trained on the text at hand (pip install -e '.[bpe]')
    a .tiktoken file        one token a line: its bytes in base64, then its rank, as tiktoken's own files
    gpt2, cl100k_base, ...  tiktoken's own encodings; the first use downloads them
"""

import base64
import binascii
import hashlib
from pathlib import Path

import tiktoken

from nanomem import checkpoint

END_OF_TEXT = "<|endoftext|>"
# GPT-2's way of cutting text into words before merging bytes, with numbers cut into at most three digits.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def from_ranks(ranks, name="nanomem"):
    """A tiktoken encoding from {token bytes: rank}, with <|endoftext|> after the last rank."""
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def byte_encoding():
    """One token a byte: 256 tokens and <|endoftext|>."""
    return from_ranks({bytes([b]): b for b in range(256)}, "bytes")


def load(path):
    """Reads a .tiktoken file. Raises ValueError, naming the line, for one that is not."""
    # tiktoken's own reader is no use here: it caches by path, and a retrained tokenizer would never be seen.
    ranks = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}, line {number}: expected a token in base64 and its rank, got {line[:40]!r}") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise ValueError(f"{path}: expected ranks 0, 1, 2, ... with all 256 bytes among the tokens, got {len(ranks)} tokens")
    return from_ranks(ranks)


def save(encoding, path):
    """Writes an encoding's tokens to a .tiktoken file."""
    ranks = sorted((rank, token) for token, rank in encoding._mergeable_ranks.items())
    checkpoint.write_text(path, "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks))


def digest(encoding):
    """A hash of an encoding's tokens, their ranks, and how it cuts words: 16 hexadecimal digits."""
    total = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        total.update(rank.to_bytes(4, "little") + len(token).to_bytes(4, "little") + token)
    return total.hexdigest()[:16]


def train_bpe(texts, vocab_size):
    """Byte-pair encoding trained on an iterable of strings, as a tiktoken encoding of at most vocab_size tokens, 257 or more.

    Raises ValueError for fewer, and ModuleNotFoundError, saying what to install, where the `tokenizers` package is missing.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be 257 or more for a bpe, 256 bytes and <|endoftext|>, got {vocab_size}")
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ModuleNotFoundError:
        raise ModuleNotFoundError("training a BPE needs the package tokenizers: pip install -e '.[bpe]'") from None
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
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
    """GPT-2's table from printable character to byte: printable bytes stand for themselves, the others for 256, 257, ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def by_name(name):
    """The encoding "bytes", that of a .tiktoken file, or one of tiktoken's own.

    Raises ValueError for an unknown name, and OSError for a file that can't be read or a download that fails.
    """
    if name == "bytes":
        return byte_encoding()
    if str(name).endswith(".tiktoken"):
        return load(name)
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(f"tokenizer must be auto, bytes, bpe, a .tiktoken file, or one of {', '.join(names)}; got {name!r}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the HTTP library raises
        raise OSError(f"the tokenizer {name} could not be downloaded ({type(error).__name__}); "
                      "tokenizer=bytes needs no network") from None
