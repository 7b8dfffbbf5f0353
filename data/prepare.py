"""
Turns text into shards of tokens that train.py reads from disk, whatever their size.

    python data/prepare.py shakespeare                      a named set, downloaded: shakespeare, enwik8,
                                                            wikitext-103, fineweb-edu, tinystories
    python data/prepare.py book.txt notes/ --out=data/mine  your own .txt, .md, .jsonl with a "text" (or
                                                            .ndjson, .json), these as .gz, .parquet; folders
    python data/prepare.py enwik8 --from-file=enwik8.zip    a named set fetched by hand
    python train.py --data=mine

- the input is cut into pieces of 32 MB, and each becomes a shard of its own: the shards are the same bit
  for bit whatever the number of workers, and after a kill the pieces that are done are not done again
- memory stays small whatever the input's size: a worker holds one megabyte of text at a time
- workers are threads: tiktoken encodes without Python's lock, in a Rust of its own
- validation: documents are chosen by a hash of their text; a few plain files, one document each, keep their
  last tenth for it
- a .gz gives the same training and validation text as the file unpacked. It can only be read from its
  beginning, so it is not cut into pieces: JSON lines become one shard, plain text one for each split
"""

import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import shlex
import shutil
import sys
import threading
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nanomem import facts, tokenizer
from nanomem.checkpoint import read_json, write_text
from nanomem.cli import UserError, expand, nearest, one_line_errors, parse, safe_streams, setting
from nanomem.data import INDEX, SPLITS, file_digest, token_dtype

FOLDER = Path(__file__).resolve().parent
PIECE = 32 * 2**20  # bytes of plain text or of JSON lines in a shard
SEGMENT = 2**20  # bytes that are encoded at a time
# A file's ending, before a .gz, and how it is read
ENDINGS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
FEW = 20  # plain files that each keep their last tenth for validation

console = Console(highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Named:
    """A data set on the web."""

    url: str
    size: int = 0  # bytes, 0 where the server's word is taken
    sha256: str = ""
    member: str = ""  # of a zip file
    tokenizer: str = "bytes"
    separator: str = ""  # between the documents of a file


HUGGING_FACE = "https://huggingface.co/datasets"
NAMED = {
    "shakespeare": Named(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        1115394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "enwik8": Named("https://mattmahoney.net/dc/enwik8.zip", 36445475, member="enwik8"),
    "wikitext-103": Named(
        "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
        member="wikitext-103-raw/wiki.train.raw",
        tokenizer="gpt2",
    ),
    "fineweb-edu": Named(
        f"{HUGGING_FACE}/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/000_00000.parquet",
        tokenizer="gpt2",
    ),
    "tinystories": Named(
        f"{HUGGING_FACE}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
        tokenizer="gpt2",
        separator="<|endoftext|>",
    ),
}


@dataclass
class PrepareConfig:
    """The settings of prepare.py."""

    arguments = f"({' | '.join(NAMED)} | FILE or FOLDER ...) "
    out: str = setting(
        "auto",
        "folder for the shards; auto: data/NAME, where train.py --data=NAME finds them",
        section="Settings",
        path=True,
    )
    tokenizer: str = setting(
        "auto",
        "bytes, bpe (trained on the text), a .tiktoken file, or an encoding of tiktoken such as gpt2; "
        "auto: gpt2 for wikitext-103, fineweb-edu and tinystories, bytes otherwise",
        path=True,
    )
    vocab_size: int = setting(8192, "tokens of a bpe")
    workers: int = setting(0, "threads that encode; 0: one a core")
    val_share: float = setting(0.01, "share of the documents that are for validation")
    size: float = setting(1.0, "gigabytes of text to take of fineweb-edu")
    from_file: str = setting("", "a named set's file that was fetched by hand", path=True)
    keep_download: bool = setting(False, "keep what was downloaded")


# ------------------------------------------------------------------------------------------------
# Getting named sets


def fetch(name, set_, folder, from_file):
    """The path of a named set's file: from_file, or downloaded into folder. Raises UserError saying which
    file to fetch by hand.
    """
    path = Path(from_file) if from_file else folder / Path(set_.url).name
    command = f"python data/prepare.py {name} --from-file={Path(set_.url).name}"
    by_hand = f"fetch {set_.url} by hand and pass it: {command}"
    if from_file and not path.is_file():
        raise UserError(f"--from-file={from_file} is no file; {by_hand}")
    if not path.exists():
        try:
            download(set_.url, path)
        except (OSError, ValueError) as error:  # urllib's errors are OSErrors
            raise UserError(f"{name} could not be downloaded ({error}); {by_hand}") from None
    mend = by_hand if from_file else f"delete it, or {by_hand}"
    if set_.size and path.stat().st_size != set_.size:
        raise UserError(
            f"{path} is not {name}: it has {path.stat().st_size:,} bytes, {name} has {set_.size:,}; {mend}"
        )
    if set_.sha256 and file_digest(path) != set_.sha256:
        raise UserError(f"{path} is not {name}: its SHA-256 is not {set_.sha256[:12]}...; {mend}")
    return unzip(path, set_.member, folder) if path.suffix == ".zip" else path


def download(url, path):
    """Downloads url to path, with progress; a part that an earlier try left is gone on with. Raises
    OSError.
    """
    part = path.with_name(path.name + ".part")
    have = (
        max(0, part.stat().st_size - 1) if part.exists() else 0
    )  # its last byte again: past the end of a whole file a server answers with an error
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    bar = Progress(
        TextColumn(path.name),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with urllib.request.urlopen(request, timeout=60) as response, bar:
        have = have if response.status == 206 else 0
        total = (
            have + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        )
        task = bar.add_task("", total=total, completed=have)
        with open(part, "r+b" if have else "wb") as file:
            file.truncate(have)
            file.seek(have)
            while block := response.read(2**18):
                file.write(block)
                bar.advance(task, len(block))
    if total is not None and part.stat().st_size != total:
        raise OSError(
            f"the connection ended after {part.stat().st_size:,} of {total:,} bytes; "
            "a second try continues from there"
        )
    os.replace(part, path)


def unzip(path, member, folder):
    """The member of a zip file, as a file in folder."""
    target = folder / Path(member).name
    try:
        with zipfile.ZipFile(path) as archive:
            if not (target.exists() and target.stat().st_size == archive.getinfo(member).file_size):
                with archive.open(member) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path} is not the zip file expected, with {member} in it ({error})") from None
    return target


# ------------------------------------------------------------------------------------------------
# Pieces of the input


@dataclass(frozen=True)
class Piece:
    """What becomes one shard: bytes start to stop of a file; of a parquet file row group number start."""

    path: str
    start: int
    stop: int
    kind: str  # text, separated (many documents), jsonl, gz or parquet
    split: str = ""  # train or val where that is settled; otherwise by each document's hash
    ends: bool = True  # a document ends with it
    separator: str = ""  # between documents
    weight: int = 0  # bytes of text or of the file, for progress


def files_below(folder):
    """All files in a folder and those in it, links followed, each folder once. Raises UserError for a link
    that leads nowhere.
    """
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:  # a second link to a folder, or one back up
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders.sort()
        found += [Path(parent, name) for name in names]
    for path in found:
        if kind_of(path) and not path.exists():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there")
    return [path for path in found if path.is_file()]


def find_files(inputs):
    """The files that names of files and folders stand for, folders in order. Raises UserError for what
    there is no reader for.
    """
    files = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            # A .json in a folder often describes the other files: one with documents must be named itself.
            readable = [p for p in files_below(path) if kind_of(p)]
            inside = sorted(p for p in readable if p.suffix.lower() != ".json")
            if not inside:
                raise UserError(
                    f"{name}: no .txt, .md, .jsonl, .ndjson, a .gz of these or .parquet in this folder"
                )
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(
                f"expected one of {', '.join(NAMED)}, a file or a folder; got {name!r}{nearest(name, NAMED)}"
            )
    for path in files:
        check_file(path)
    return files


def check_file(path):
    """Raises UserError or ValueError for a file that is empty, of an unknown compression, or JSON named as
    text.
    """
    facts.refuse_compressed(path)
    with opened(path) as file:
        beginning = file.read(SEGMENT)
    if not beginning:
        raise UserError(f"{path}: the file is empty")
    if kind_of(path) in ("text", ""):
        facts.refuse_json(path, beginning.decode(errors="ignore"))


def is_gzip(path):
    """Whether a file is read through gzip."""
    return str(path).lower().endswith(".gz")


def kind_of(path):
    """How a file is read; '' for one that a folder may have besides."""
    unpacked = Path(path.name[:-len(".gz")] if is_gzip(path) else path.name)
    kind = ENDINGS.get(unpacked.suffix.lower(), "")
    return "gz" if kind == "jsonl" and is_gzip(path) else kind


@contextlib.contextmanager
def opened(path):
    """A file's bytes, unpacked if it is a .gz, where going back in it means reading it anew.

    Raises UserError for a .gz that is cut, damaged or something else.
    """
    try:
        with gzip.open(path) if is_gzip(path) else open(path, "rb") as file:
            yield file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a complete gzip file ({error})") from None


def unpacked_size(path):
    """A file's bytes, of a .gz those it unpacks to, which takes reading it."""
    with opened(path) as file:
        return file.seek(0, os.SEEK_END)


def unpacked_digest(path):
    """The SHA-256 of a file's bytes, of a .gz those it unpacks to, in hexadecimal."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pieces_of(files, val_share, separator=""):
    """All pieces, in order. Few plain files keep their last tenth for validation; of many, whole files go
    there, chosen by hash.
    """
    kinds = {path: "separated" if separator else kind_of(path) or "text" for path in files}
    few = sum(kind == "text" for kind in kinds.values()) <= FEW
    found = []
    for path, kind in kinds.items():
        size = path.stat().st_size if kind == "gz" else unpacked_size(path)
        if kind == "parquet":
            groups = open_parquet(path).metadata
            sizes = [groups.row_group(i).total_byte_size for i in range(groups.num_row_groups)]
            found += [Piece(str(path), i, i + 1, kind, weight=size) for i, size in enumerate(sizes)]
        elif kind == "gz":
            found.append(Piece(str(path), 0, size, kind, weight=size))
        elif kind == "text":
            tenth = find_cut(path, size - size // 10, size, inside=True)
            halves = [(0, tenth, "train"), (tenth, size, "val")]
            if not few:
                halves = [(0, size, SPLITS[in_val(unpacked_digest(path), val_share)])]
            found += [
                piece
                for start, stop, split in halves
                for piece in cut_up(path, start, stop, kind, split=split)
            ]
        else:
            found += cut_up(path, 0, size, kind, end=separator or "\n", separator=separator)
    return found


def cut_up(path, start, stop, kind, end="\n", **about):
    """Pieces of some PIECE bytes, each up to an `end`; one piece of a .gz."""
    while start < stop:
        one = is_gzip(path) or stop - start <= 1.5 * PIECE
        after = stop if one else find_cut(path, start + PIECE, stop, end, inside=kind == "text")
        yield Piece(str(path), start, after, kind, ends=after == stop, weight=after - start, **about)
        start = after


def find_cut(path, at, stop, end="\n", inside=False):
    """The first place in a file from `at` on that follows an `end`, as read_to_cut finds it."""
    with opened(path) as file:
        file.seek(at)
        return at + read_to_cut(file, bytearray(), 0, stop - at, end.encode(), inside)


def read_to_cut(file, held, least, left, end, inside):
    """How many bytes to take next. `left` are to come, of which `held` has the first; reads more of them
    into it.

    The cut follows the first `end` at `least` or later, however far that is. With `inside`, where none
    follows within a SEGMENT, it is at the first character that begins at `least` or later.
    """
    searched, last = least, min(left - 1, least + SEGMENT) if inside else left - 1
    while True:
        found = held.find(end, searched, last)
        if found >= 0:
            return found + len(end)
        if len(held) >= last:
            break
        block = file.read(min(2**16, left - len(held)))
        if not block:
            break
        searched = max(least, len(held) - len(end) + 1)
        held += block
    if not inside:
        return left
    beginnings = (i for i, byte in enumerate(held[least:least + 4]) if byte & 0xC0 != 0x80)
    begin = next(beginnings, None)
    return left if begin is None else least + begin  # the text may end within this character


# ------------------------------------------------------------------------------------------------
# Documents


def texts_of(piece):
    """Yields (text, whether a document ends with it, bytes of the input read for it) of a piece.

    Raises UserError naming file and place for what can't be read.
    """
    if piece.kind == "parquet":
        for batch in open_parquet(piece.path).iter_batches(64, row_groups=[piece.start], columns=["text"]):
            yield from (
                (text, True, len(text)) for text in batch.column("text").to_pylist() if text and text.strip()
            )
    elif piece.kind in ("jsonl", "gz"):
        yield from json_texts(piece)
    else:
        yield from plain_texts(piece)


def plain_texts(piece):
    """Of text, a segment at a time; separated documents whole."""
    end, at, held = (piece.separator or "\n").encode(), piece.start, bytearray()
    with opened(piece.path) as file:
        file.seek(at)
        while at < piece.stop:
            size = piece.stop - at
            if size > 1.5 * SEGMENT:
                size = read_to_cut(file, held, SEGMENT, size, end, piece.kind == "text")
            held += file.read(max(0, size - len(held)))
            try:
                # Some editors begin a file with a mark.
                text = held[:size].decode("utf-8-sig" if at == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{piece.path}: byte {at + error.start + 1} is not UTF-8") from None
            if piece.kind == "separated":
                documents = [document.strip() for document in text.split(piece.separator) if document.strip()]
                yield from ((document, True, size // len(documents)) for document in documents)
            else:
                yield text, piece.ends and at + size == piece.stop, size
            del held[:size]
            at += size


def json_texts(piece):
    """The "text" of each line of a JSON lines file."""
    with opened(piece.path) as lines:
        lines.seek(piece.start)
        done = 0
        for number in itertools.count(1):
            line = lines.readline()
            if not line or piece.start + done >= piece.stop and piece.kind == "jsonl":
                break
            before, done = done, lines.fileobj.tell() if piece.kind == "gz" else done + len(line)
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                text.encode()  # a half of a surrogate pair is no text
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                where = f"line {number}" + (f" after byte {piece.start}" if piece.start else "")
                hint = "; teach facts with python train.py --data=FILE.jsonl" if b'"prompt"' in line else ""
                wrong = f'expected {{"text": "..."}} on each line, got {line[:60]!r}{hint}'
                raise UserError(f"{piece.path}, {where}: {wrong}") from None
            if text.strip():
                yield text, True, done - before


def open_parquet(path):
    """A parquet file with a text column. Raises UserError saying what is wrong."""
    try:
        import pyarrow.parquet
        from pyarrow.lib import ArrowException
    except ModuleNotFoundError:
        raise UserError("parquet files need pyarrow: pip install -e '.[parquet]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except ArrowException as error:
        raise UserError(f"{path} is no parquet file ({error})") from None
    columns = {column.name: str(column.type) for column in file.schema_arrow}
    if columns.get("text") not in ("string", "large_string"):
        raise UserError(
            f'{path}: expected a column "text" of strings, got '
            + ", ".join(f"{name} ({kind})" for name, kind in columns.items())
        )
    return file


def in_val(digest, share):
    """Whether a document with this hash, in hexadecimal, is for validation."""
    return int(digest[:13], 16) < share * 16**13


# ------------------------------------------------------------------------------------------------
# Shards


def write_shards(number, piece, folder, encoding, val_share, stopping, progress):
    """Writes train-NUMBER.bin and val-NUMBER.bin, and part-NUMBER.json with what is in them, which it
    returns. One that is there already is not made again.
    """
    record = folder / f"part-{number:05}.json"
    if (done := read_json(record)) is not None:
        progress(piece.weight)
        return done
    end, dtype = np.array([encoding.eot_token]), token_dtype(encoding.n_vocab)
    shards = {split: Shard(folder / f"{split}-{number:05}.bin", dtype) for split in SPLITS}
    for text, ends, weight in texts_of(piece):
        if stopping.is_set():
            return None
        split = piece.split or SPLITS[in_val(hashlib.sha256(text.encode()).hexdigest(), val_share)]
        shards[split].add(tokenizer.encode(encoding, text), len(text.encode()))
        if ends:
            shards[split].add(end, 0, ends=True)
        progress(weight)
    done = {split: about for split, shard in shards.items() if (about := shard.close())}
    write_text(record, json.dumps(done))
    return done


class Shard:
    """A file of tokens that is being written."""

    def __init__(self, path, dtype):
        self.path, self.dtype, self.file = path, dtype, None
        self.tokens, self.bytes, self.ends, self.digest = 0, 0, [], hashlib.sha256()

    def add(self, tokens, n_bytes, ends=False):
        """Tokens of n_bytes of text, which may end a document."""
        self.file = self.file or open(self.path, "wb")
        written = tokens.astype(self.dtype).tobytes()
        self.file.write(written)
        self.digest.update(written)
        self.tokens += len(tokens)
        self.bytes += n_bytes
        if ends:
            self.ends.append(self.tokens)

    def close(self):
        """What the index says of it: None for a shard without tokens."""
        if self.file is None:
            return None
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        np.save(
            self.path.with_suffix(".ends.npy"), np.array(self.ends, dtype=np.int64)
        )  # where documents end
        return {
            "file": self.path.name,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": len(self.ends),
            "sha256": self.digest.hexdigest(),
        }


def prepare(pieces, folder, encoding, name, config):
    """Makes the shards of all pieces in a folder, and then its index.

    Raises UserError if the folder has shards of something else, or a piece can't be read.
    """
    files = {piece.path: os.stat(piece.path) for piece in pieces}
    plan = {
        "pieces": [dataclasses.asdict(piece) for piece in pieces],
        "files": {path: [s.st_size, s.st_mtime_ns] for path, s in files.items()},
        "vocabulary": tokenizer.digest(encoding),
        "val_share": config.val_share,
    }
    folder.mkdir(parents=True, exist_ok=True)
    begun = read_json(folder / "plan.json")
    if (folder / INDEX).exists():
        if begun != plan:
            raise UserError(
                f"{folder} has shards of other text, or made with other settings; delete it, "
                "or name another folder with --out"
            )
        return read_json(folder / INDEX)
    if begun != plan:
        clear(folder)
        write_text(folder / "plan.json", json.dumps(plan))
    bar = Progress(
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    stopping, workers = threading.Event(), config.workers or os.cpu_count()
    with bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("", total=sum(piece.weight for piece in pieces))
        futures = [
            pool.submit(
                write_shards,
                number,
                piece,
                folder,
                encoding,
                config.val_share,
                stopping,
                lambda n: bar.advance(task, n),
            )
            for number, piece in enumerate(pieces)
        ]
        try:
            records = [future.result() for future in futures]
        except BaseException as error:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, UserError):
                clear(folder)
            if isinstance(error, KeyboardInterrupt):
                console.print("stopped; what is done is kept, and the same command goes on from there")
            raise
    index = {split: [record[split] for record in records if split in record] for split in SPLITS}
    if not index["val"] or not index["train"]:
        clear(folder)
        if all(piece.split for piece in pieces):
            raise UserError("the text is too short to keep a tenth of it for validation")
        documents = sum(shard["documents"] for shards in index.values() for shard in shards)
        raise UserError(
            f"of {documents} documents none is for {'training' if index['val'] else 'validation'}; "
            f"choose another --val_share than {config.val_share:g}, such as "
            f"{min(0.5, 5 / max(documents, 10)):.2g}"
        )
    if name.endswith(".tiktoken"):
        tokenizer.save(encoding, folder / name)
    about = {"tokenizer": name, "vocabulary": tokenizer.digest(encoding), "vocab_size": encoding.n_vocab,
             "dtype": np.dtype(token_dtype(encoding.n_vocab)).name}
    write_text(folder / INDEX, json.dumps(about | index, indent=1) + "\n")
    for part in folder.glob("part-*.json"):
        part.unlink()
    return about | index


def clear(folder):
    """Deletes what was begun in a folder, of which check_folder saw that it is ours."""
    for pattern in ("part-*.json", "*.bin", "*.ends.npy", "plan.json"):
        for path in folder.glob(pattern):
            path.unlink()


def choose_tokenizer(config, default, pieces):
    """(the tiktoken encoding that --tokenizer names, the name that the index will give it)"""
    name = default if config.tokenizer == "auto" else config.tokenizer
    if name == "bpe":
        console.print("training a BPE, on the first 32 MB at most")
        return tokenizer.train_bpe(beginning(pieces), config.vocab_size), "tokenizer.tiktoken"
    encoding = tokenizer.by_name(name)
    return encoding, "tokenizer.tiktoken" if name == "bytes" or name.endswith(".tiktoken") else name


def beginning(pieces, n_bytes=2**25):
    """The first texts for training, about so many bytes of them."""
    for text, _, _ in itertools.chain.from_iterable(
        texts_of(piece) for piece in pieces if piece.split != "val"
    ):
        yield text
        n_bytes -= len(text)
        if n_bytes < 0:
            return


# ------------------------------------------------------------------------------------------------


def named_pieces(name, folder, config):
    """(pieces of a named set, the files that were downloaded for it)"""
    set_, files, pieces = NAMED[name], [], []
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        part = dataclasses.replace(set_, url=set_.url.replace("000_00000", f"{number:03}_00000"))
        files.append(fetch(name, part, folder, config.from_file))
        pieces += pieces_of(files[-1:], config.val_share, set_.separator)
        sizes = list(itertools.accumulate(piece.weight for piece in pieces))
        if name != "fineweb-edu" or config.from_file or sizes[-1] >= config.size * 1e9:
            break
    if name == "fineweb-edu":
        pieces = pieces[:1 + sum(size < config.size * 1e9 for size in sizes)]
    return pieces, [] if config.from_file else files


def check_folder(folder):
    """Raises UserError for a folder with tokens of somebody else, or the facts that come with nanomem, or a
    file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={folder} is a file; it must name a folder, such as --out=data/mine")
    others = [path.name for pattern in ("*.bin", "*.tiktoken") for path in folder.glob(pattern)]
    if others and not (folder / "plan.json").exists():
        raise UserError(
            f"{folder} has {others[0]}, which prepare.py did not write; name another folder with "
            "--out, such as --out=data/mine"
        )


def main():
    """One command."""
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    inputs = [expand(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    config = PrepareConfig(**parse(PrepareConfig, options))
    if not inputs:
        raise UserError(f"expected what to prepare: one of {', '.join(NAMED)}, or files and folders")
    if not 0 < config.val_share < 1 or config.workers < 0 or config.size <= 0:
        raise UserError("val_share must be between 0 and 1, workers 0 or more and size above 0")
    named = inputs[0] if inputs[0] in NAMED else None
    if named and len(inputs) > 1:
        raise UserError(f"{named} goes alone; got {' '.join(inputs[1:])} beside it")
    if config.from_file and not named:
        raise UserError(f"--from-file is for a named set: {', '.join(NAMED)}")
    if config.out == "auto" and len(inputs) > 1:
        raise UserError(
            f"{len(inputs)} inputs go into one set, which --out must name, such as --out=data/mine"
        )
    stem = Path(inputs[0]).resolve().name
    for ending in (".gz", *ENDINGS):
        stem = stem[:-len(ending)] if stem.lower().endswith(ending) else stem
    folder = Path(config.out) if config.out != "auto" else FOLDER / (named or stem)
    check_folder(folder)
    if named and (folder / INDEX).exists():
        raise UserError(
            f"{named} is in {folder} already; delete that folder to prepare it again, "
            "or name another with --out"
        )
    try:
        pieces, downloaded = (
            named_pieces(named, folder, config)
            if named
            else (pieces_of(find_files(inputs), config.val_share), [])
        )
        encoding, name = choose_tokenizer(config, NAMED[named].tokenizer if named else "bytes", pieces)
        index = prepare(pieces, folder, encoding, name, config)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it is empty, which it is after what can't be had or read
    for split in SPLITS:
        tokens, size, documents = (
            sum(shard[key] for shard in index[split]) for key in ("tokens", "bytes", "documents")
        )
        console.print(
            f"{split}: {tokens:,} tokens of {size:,} bytes, {documents:,} documents, "
            f"in {len(index[split])} shards"
        )
    for path in downloaded if not config.keep_download else ():
        path.unlink(missing_ok=True)
        (folder / Path(NAMED[named].url).name).unlink(missing_ok=True)
    where = folder.name if folder.parent == FOLDER else folder
    console.print(
        f"{index['vocab_size']:,} tokens in the vocabulary; in {folder}; "
        f"now: python train.py --data={shlex.quote(str(where))}"
    )


if __name__ == "__main__":
    safe_streams()
    with one_line_errors():
        main()
