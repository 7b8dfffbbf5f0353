"""
Reads text, JSON lines and parquet files as documents, whatever their size. prepare.py tokenizes them.

    paths = find_files(["book.txt", "notes/"], named=[])
    for piece in pieces_of(paths, val_share=0.01):
        for text, ends, weight in texts_of(piece):
            ...

- Files are cut into pieces of about 32 MB, which can be read independently.
- A piece is read a megabyte at a time; only a document that must stay whole takes more memory.
- Each document goes to training or validation by a hash of its text. A plain text file is one document; if
  there are only a few, each keeps its last tenth for validation instead.
- A .gz gives the same documents as the unpacked file. It can only be read from its beginning, so it is not
  cut into pieces: JSON lines are one piece, plain text is one for each split.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nanomem import facts
from nanomem.cli import UserError, nearest

PIECE = 32 * 2**20  # bytes of plain text or JSON lines in a piece
SEGMENT = 2**20  # bytes of plain text read at a time
FEW = 20  # up to this many plain text files, each keeps its last tenth for validation
KINDS = {  # how a file is read, by its ending before a .gz
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Piece:
    """A part of a file, from byte start to byte stop; of a parquet file, row group number start.

    plan.json stores pieces: with another field, half-finished preparations would start over.
    """

    path: str
    start: int
    stop: int
    kind: str  # text, separated (many documents in one text), jsonl, gz (JSON lines in a .gz) or parquet
    split: str = ""  # train or val; empty: each document's hash decides
    ends: bool = True  # whether a document ends where the piece ends
    separator: str = ""  # between the documents of a separated text
    weight: int = 0  # its share of the progress bar: bytes of text, or of the file


# ------------------------------------------------------------------------------------------------
# Files


def find_files(inputs: list[str], named: Collection[str]) -> list[Path]:
    """The files that the inputs, files and folders, stand for; those of a folder are sorted.

    named: the other valid inputs, for messages. Raises UserError or ValueError for an input that does not
    exist or can't be read.
    """
    files = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files += readable_files(path)
        elif path.is_file():
            files.append(path)
        else:
            expected = f"one of {', '.join(named)}, a file or a folder"
            raise UserError(f"expected {expected}; got {name!r}{nearest(name, named)}")
    for path in files:
        check_file(path)
    return files


def readable_files(folder):
    """The files in a folder and its subfolders that hold documents, sorted. Raises UserError if there are
    none.
    """
    # A .json in a folder often describes the other files, so one with documents must be named itself.
    files = [path for path in files_below(folder) if kind_of(path) and path.suffix.lower() != ".json"]
    if not files:
        readable = ".txt, .md, .jsonl, .ndjson, a .gz of these or .parquet"
        raise UserError(f"{folder}: no {readable} in this folder")
    return sorted(files)


def files_below(folder):
    """All files in a folder and its subfolders. Links are followed, but no folder is visited twice.

    Raises UserError for a link that leads nowhere.
    """
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # by another link, or by one that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [Path(parent, name) for name in names]
    for path in found:
        if kind_of(path) and not path.exists():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist")
    return [path for path in found if path.is_file()]


def check_file(path):
    """Raises UserError or ValueError for a file that is empty, compressed otherwise than by gzip, or JSON
    under the name of a text.
    """
    facts.refuse_compressed(path)
    with opened(path) as file:
        beginning = file.read(SEGMENT)
    if not beginning:
        raise UserError(f"{path}: the file is empty")
    if kind_of(path) in ("text", ""):
        facts.refuse_json(path, beginning.decode(errors="ignore"))


def is_gzip(path: str | Path) -> bool:
    """Whether a file is read through gzip."""
    return str(path).lower().endswith(".gz")


def kind_of(path: Path) -> str:
    """A Piece's kind for a file, by its name; empty for an unknown ending."""
    name = path.name[:-len(".gz")] if is_gzip(path) else path.name
    kind = KINDS.get(Path(name).suffix.lower(), "")
    return "gz" if kind == "jsonl" and is_gzip(path) else kind


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """A file open for reading bytes, unpacked if it is a .gz; seeking back in a .gz reads it again.

    Raises UserError for a .gz that is cut short, damaged or not gzip.
    """
    try:
        with gzip.open(path) if is_gzip(path) else open(path, "rb") as file:
            yield file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a complete gzip file ({error})") from None


def open_parquet(path):
    """A parquet file with a text column. Raises UserError saying what is wrong with it."""
    try:
        import pyarrow.parquet
        from pyarrow.lib import ArrowException
    except ModuleNotFoundError:
        raise UserError("parquet files need pyarrow: pip install -e '.[parquet]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except ArrowException as error:
        raise UserError(f"{path} is not a parquet file ({error})") from None
    types = {column.name: str(column.type) for column in file.schema_arrow}
    if types.get("text") not in ("string", "large_string"):
        columns = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise UserError(f'{path}: expected a column "text" of strings, got {columns}')
    return file


# ------------------------------------------------------------------------------------------------
# Cutting files into pieces


def pieces_of(files: list[Path], val_share: float, separator: str = "") -> list[Piece]:
    """The pieces of all files, in order; a file listed twice counts once.

    separator: what separates the documents of a text file; empty: each file is one document.
    """
    kinds = {path: "separated" if separator else kind_of(path) or "text" for path in files}
    few = list(kinds.values()).count("text") <= FEW
    pieces = []
    for path, kind in kinds.items():
        if kind == "parquet":
            pieces += parquet_pieces(path)
        elif kind == "gz":
            size = path.stat().st_size
            pieces.append(Piece(str(path), 0, size, kind, weight=size))
        elif kind == "text":
            pieces += text_pieces(path, val_share, few)
        else:
            pieces += cut_up(path, 0, size_of(path), kind, separator or "\n", separator=separator)
    return pieces


def parquet_pieces(path):
    """A piece for each row group of a parquet file."""
    metadata = open_parquet(path).metadata
    for number in range(metadata.num_row_groups):
        weight = metadata.row_group(number).total_byte_size
        yield Piece(str(path), number, number + 1, "parquet", weight=weight)


def text_pieces(path, val_share, few):
    """The pieces of a plain text file. few: whether its last tenth is for validation."""
    size = size_of(path)
    if few:
        cut = find_cut(path, size - size // 10, size, inside=True)
        parts = [(0, cut, "train"), (cut, size, "val")]
    else:
        with opened(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        parts = [(0, size, split_of(digest, val_share))]
    for start, stop, split in parts:
        yield from cut_up(path, start, stop, "text", split=split)


def size_of(path):
    """A file's bytes, unpacked, which for a .gz takes reading it."""
    with opened(path) as file:
        return file.seek(0, os.SEEK_END)


def split_of(digest: str, val_share: float) -> str:
    """train or val, for a document whose text has this hash, in hexadecimal."""
    is_val = int(digest[:13], 16) < val_share * 16**13
    return "val" if is_val else "train"


def cut_up(path, start, stop, kind, end="\n", **fields):
    """Pieces of about PIECE bytes, each up to an `end`; a single one of a .gz."""
    while start < stop:
        is_last = is_gzip(path) or stop - start <= 1.5 * PIECE
        cut = stop if is_last else find_cut(path, start + PIECE, stop, end, inside=kind == "text")
        yield Piece(str(path), start, cut, kind, ends=cut == stop, weight=cut - start, **fields)
        start = cut


def find_cut(path, start, stop, end="\n", inside=False):
    """The byte of a file at which to cut it, from start on; see read_to_cut."""
    with opened(path) as file:
        file.seek(start)
        return start + read_to_cut(file, bytearray(), 0, stop - start, end.encode(), inside)


def read_to_cut(file, held, least, left, end, inside):
    """How many bytes to take next: up to and including the first `end` that begins at byte `least` or later.

    Args:
        held: the bytes read so far; more are appended as needed.
        left: the number of bytes to the stop, with those held. Without an `end`, all of them are taken.
        inside: if no `end` follows within a SEGMENT, cut before the next character instead.
    """
    limit = left - 1
    if inside:
        limit = min(limit, least + SEGMENT)
    searched = least
    while True:
        found = held.find(end, searched, limit)
        if found >= 0:
            return found + len(end)
        if len(held) >= limit:
            break
        block = file.read(min(2**16, left - len(held)))
        if not block:
            break
        searched = max(least, len(held) - len(end) + 1)  # an `end` may begin in one block and end in the next
        held += block
    if inside:
        for at, byte in enumerate(held[least:least + 4], least):
            if byte & 0xC0 != 0x80:  # a character begins here
                return at
    return left  # the last character may begin before `least`


# ------------------------------------------------------------------------------------------------
# Reading a piece's documents


def texts_of(piece: Piece) -> Iterator[tuple[str, bool, int]]:
    """Yields (text, whether a document ends with it, its share of the piece's weight).

    Raises UserError naming the file and the place that can't be read.
    """
    if piece.kind == "parquet":
        yield from parquet_texts(piece)
    elif piece.kind in ("jsonl", "gz"):
        yield from json_texts(piece)
    else:
        yield from plain_texts(piece)


def parquet_texts(piece):
    """The texts of a row group."""
    for batch in open_parquet(piece.path).iter_batches(64, row_groups=[piece.start], columns=["text"]):
        for text in batch.column("text").to_pylist():
            if text and text.strip():
                yield text, True, len(text)


def plain_texts(piece):
    """A text, one segment at a time; separated documents are whole."""
    is_text = piece.kind == "text"
    end = (piece.separator or "\n").encode()
    at, held = piece.start, bytearray()
    with opened(piece.path) as file:
        file.seek(at)
        while at < piece.stop:
            size = piece.stop - at
            if size > 1.5 * SEGMENT:
                size = read_to_cut(file, held, SEGMENT, size, end, inside=is_text)
            held += file.read(max(0, size - len(held)))
            text = decoded(held[:size], piece.path, at)
            del held[:size]
            at += size
            if is_text:
                yield text, piece.ends and at == piece.stop, size
                continue
            documents = [document.strip() for document in text.split(piece.separator) if document.strip()]
            for document in documents:
                yield document, True, size // len(documents)


def decoded(content, path, start):
    """The text of some of a file's bytes, from byte start on. Raises UserError if they are not UTF-8."""
    try:
        # Some editors begin a file with a byte order mark.
        return content.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {start + error.start + 1} is not UTF-8") from None


def json_texts(piece):
    """The texts of JSON lines."""
    is_gz = piece.kind == "gz"
    done = 0  # bytes read, of a .gz before unpacking
    with opened(piece.path) as lines:
        lines.seek(piece.start)
        for number in itertools.count(1):
            line = lines.readline()
            if not line or (not is_gz and piece.start + done >= piece.stop):
                break
            before, done = done, lines.fileobj.tell() if is_gz else done + len(line)
            if not line.strip():
                continue
            text = text_of(line)
            if text is None:
                raise UserError(f"{piece.path}, {place_of(number, piece)}: {what_is_wrong(line)}")
            if text.strip():
                yield text, True, done - before


def text_of(line):
    """The "text" of a JSON line; None if it has no text."""
    try:
        text = json.loads(line)["text"]
        text.encode()  # fails for half of a surrogate pair
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return text


def place_of(number, piece):
    """Where line `number` of a piece is, in words."""
    return f"line {number} after byte {piece.start}" if piece.start else f"line {number}"


def what_is_wrong(line):
    """What is expected instead of a JSON line without a text."""
    hint = "; teach facts with python train.py --data=FILE.jsonl" if b'"prompt"' in line else ""
    return f'expected {{"text": "..."}} on each line, got {line[:60]!r}{hint}'
