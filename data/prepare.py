"""
Turns text of any size into shards of tokens that train.py reads from disk.

    python data/prepare.py shakespeare                      a named set, downloaded: shakespeare, enwik8,
                                                            wikitext-103, fineweb-edu, tinystories
    python data/prepare.py book.txt notes/ --out=data/mine  your own .txt, .md, .jsonl with a "text" (or
                                                            .ndjson, .json), these as .gz, .parquet; folders
    python data/prepare.py enwik8 --from-file=enwik8.zip    a named set that you fetched by hand
    python train.py --data=mine

- Each piece of 32 MB (documents.py) becomes a shard. The shards are the same, bit for bit, for any number of
  workers. After a kill, finished pieces are not done again.
- A worker holds about one megabyte of text at a time, so memory stays small.
- Workers are threads: tiktoken encodes in Rust, without Python's lock.
- For validation, documents are chosen by a hash of their text. If there are only a few plain text files, each
  keeps its last tenth for it.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shlex
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))  # for documents.py and download.py, however this file was loaded

from download import NAMED, fetch

from nanomem.cli import UserError, expand, one_line_errors, parse, safe_streams, setting


@dataclass
class PrepareConfig:
    """The settings of prepare.py."""

    arguments = f"({' | '.join(NAMED)} | FILE or FOLDER ...) "
    out: str = setting(
        "auto", "folder for the shards; auto: data/NAME, where train.py --data=NAME finds them",
        section="Settings", path=True)
    tokenizer: str = setting(
        "auto", "bytes, bpe (trained on the text), a .tiktoken file, or one of tiktoken's such as gpt2; "
        "auto: gpt2 for wikitext-103, fineweb-edu and tinystories, otherwise bytes", path=True)
    vocab_size: int = setting(8192, "tokens to train a tokenizer=bpe with")
    workers: int = setting(0, "threads that encode; 0: one per core")
    val_share: float = setting(0.01, "share of the documents for validation")
    size: float = setting(1.0, "gigabytes of text to take from fineweb-edu")
    from_file: str = setting("", "a named set's file that you fetched by hand", path=True)
    keep_download: bool = setting(False, "keep what was downloaded")


def parse_command_line() -> tuple[PrepareConfig, list[str]]:
    """(the settings, the inputs). Raises UserError."""
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    inputs = [expand(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    return PrepareConfig(**parse(PrepareConfig, options)), inputs


if __name__ == "__main__":
    safe_streams()
    with one_line_errors():
        parse_command_line()  # answers --help and mistakes before torch is imported, which takes a second

import numpy as np
from documents import KINDS, Piece, find_files, pieces_of, split_of, texts_of
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nanomem import tokenizer
from nanomem.checkpoint import read_json, write_text
from nanomem.data import INDEX, SPLITS, token_dtype

console = Console(highlight=False, markup=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------------
# Shards


class Shard:
    """A file of tokens that is being written."""

    def __init__(self, path: Path, dtype):
        self.path, self.dtype, self.file = path, dtype, None
        self.tokens, self.bytes, self.ends, self.digest = 0, 0, [], hashlib.sha256()

    def add(self, tokens: np.ndarray, n_bytes: int, ends: bool = False):
        """Adds tokens of n_bytes of text. ends: whether a document ends with them."""
        if self.file is None:
            self.file = open(self.path, "wb")
        content = tokens.astype(self.dtype).tobytes()
        self.file.write(content)
        self.digest.update(content)
        self.tokens += len(tokens)
        self.bytes += n_bytes
        if ends:
            self.ends.append(self.tokens)

    def close(self) -> dict | None:
        """Returns the shard's entry in the index; None if it has no tokens."""
        if self.file is None:
            return None
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        np.save(self.path.with_suffix(".ends.npy"), np.array(self.ends, dtype=np.int64))
        return {
            "file": self.path.name,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": len(self.ends),
            "sha256": self.digest.hexdigest(),
        }


def write_shards(number, piece, folder, encoding, val_share, stopping, progress):
    """Writes a piece's train-NUMBER.bin and val-NUMBER.bin, then part-NUMBER.json with their entries in the
    index, which it returns. If that is there already, only reads it.
    """
    record = folder / f"part-{number:05}.json"
    entries = read_json(record)
    if entries is not None:
        progress(piece.weight)
        return entries
    end, dtype = np.array([encoding.eot_token]), token_dtype(encoding.n_vocab)
    shards = {split: Shard(folder / f"{split}-{number:05}.bin", dtype) for split in SPLITS}
    for text, ends, weight in texts_of(piece):
        if stopping.is_set():
            return None
        content = text.encode()
        split = piece.split or split_of(hashlib.sha256(content).hexdigest(), val_share)
        shards[split].add(tokenizer.encode(encoding, text), len(content))
        if ends:
            shards[split].add(end, 0, ends=True)
        progress(weight)
    entries = {}
    for split, shard in shards.items():
        entry = shard.close()
        if entry is not None:
            entries[split] = entry
    write_text(record, json.dumps(entries))
    return entries


# ------------------------------------------------------------------------------------------------
# The whole set


def prepare(pieces: list[Piece], folder: Path, encoding, name: str, config: PrepareConfig) -> dict:
    """Writes the shards of all pieces into a folder, and then its index, which it returns.

    name: what the index calls the tokenizer. Raises UserError if the folder has shards of something else, or
    a piece can't be read.
    """
    files = {piece.path: os.stat(piece.path) for piece in pieces}
    plan = {
        "pieces": [dataclasses.asdict(piece) for piece in pieces],
        "files": {path: [about.st_size, about.st_mtime_ns] for path, about in files.items()},
        "vocabulary": tokenizer.digest(encoding),
        "val_share": config.val_share,
    }
    folder.mkdir(parents=True, exist_ok=True)
    earlier_plan = read_json(folder / "plan.json")
    if (folder / INDEX).exists():
        if earlier_plan != plan:
            raise UserError(f"{folder} has shards of other text, or made with other settings; delete it, "
                            "or name another folder with --out")
        return read_json(folder / INDEX)
    if earlier_plan != plan:
        clear(folder)
        write_text(folder / "plan.json", json.dumps(plan))
    records = write_all(pieces, folder, encoding, config)
    index = {split: [record[split] for record in records if split in record] for split in SPLITS}
    check_both_splits(index, pieces, folder, config.val_share)
    if name.endswith(".tiktoken"):
        tokenizer.save(encoding, folder / name)
    about = {
        "tokenizer": name,
        "vocabulary": tokenizer.digest(encoding),
        "vocab_size": encoding.n_vocab,
        "dtype": np.dtype(token_dtype(encoding.n_vocab)).name,
    }
    write_text(folder / INDEX, json.dumps(about | index, indent=1) + "\n")
    for part in folder.glob("part-*.json"):
        part.unlink()
    return about | index


def write_all(pieces, folder, encoding, config):
    """Writes the shards of all pieces with several workers. Returns their entries in the index, in order."""
    bar = Progress(
        BarColumn(), TextColumn("{task.percentage:>3.0f}%"), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(), console=console)
    stopping, workers = threading.Event(), config.workers or os.cpu_count()
    with bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("", total=sum(piece.weight for piece in pieces))
        shared = folder, encoding, config.val_share, stopping, lambda weight: bar.advance(task, weight)
        futures = [pool.submit(write_shards, number, piece, *shared) for number, piece in enumerate(pieces)]
        try:
            return [future.result() for future in futures]
        except BaseException as error:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, UserError):
                clear(folder)
            if isinstance(error, KeyboardInterrupt):
                console.print("stopped; what is done is kept, and the same command continues from there")
            raise


def check_both_splits(index, pieces, folder, val_share):
    """Raises UserError, and deletes the shards, if a split has none."""
    if index["val"] and index["train"]:
        return
    clear(folder)
    if all(piece.split for piece in pieces):
        raise UserError("the text is too short to keep a tenth of it for validation")
    documents = sum(shard["documents"] for shards in index.values() for shard in shards)
    empty = "training" if index["val"] else "validation"
    better = min(0.5, 5 / max(documents, 10))
    raise UserError(f"of {documents} documents none is for {empty}; choose another --val_share than "
                    f"{val_share:g}, such as {better:.2g}")


def clear(folder):
    """Deletes the shards and the plan from a folder that check_folder has found to be ours."""
    for pattern in ("part-*.json", "*.bin", "*.ends.npy", "plan.json"):
        for path in folder.glob(pattern):
            path.unlink()


def choose_tokenizer(config, default, pieces):
    """(the tiktoken encoding that --tokenizer names, its name in the index)"""
    name = default if config.tokenizer == "auto" else config.tokenizer
    if name == "bpe":
        console.print("training a BPE on the first 32 MB at most")
        return tokenizer.train_bpe(first_texts(pieces), config.vocab_size), "tokenizer.tiktoken"
    is_own = name == "bytes" or name.endswith(".tiktoken")
    return tokenizer.by_name(name), "tokenizer.tiktoken" if is_own else name


def first_texts(pieces, length=2**25):
    """Yields texts for training until they have this length in total."""
    for piece in pieces:
        if piece.split == "val":
            continue
        for text, _, _ in texts_of(piece):
            yield text
            length -= len(text)
            if length < 0:
                return


# ------------------------------------------------------------------------------------------------
# The command


def named_pieces(name, folder, config):
    """(the pieces of a named set, what was downloaded for it)"""
    named, pieces, downloads = NAMED[name], [], []
    folder.mkdir(parents=True, exist_ok=True)
    wanted = config.size * 1e9  # bytes of text to take from a set of many files
    for number in itertools.count():
        path = fetch(name, number, folder, config.from_file, console)
        if not config.from_file:
            downloads += [path, folder / named.file_name(number)]  # the second one may be a .zip
        pieces += pieces_of([path], config.val_share, named.separator)
        if not named.is_numbered():
            return pieces, downloads
        if config.from_file or sum(piece.weight for piece in pieces) >= wanted:
            break
    sizes = itertools.accumulate(piece.weight for piece in pieces)
    n_pieces = 1 + len([size for size in sizes if size < wanted])
    return pieces[:n_pieces], downloads


def check_folder(folder):
    """Raises UserError for a file, and for a folder with tokens that prepare.py didn't write."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={folder} is a file; it must name a folder, such as --out=data/mine")
    others = [*folder.glob("*.bin"), *folder.glob("*.tiktoken")]
    if others and not (folder / "plan.json").exists():
        raise UserError(f"{folder} has {others[0].name}, which prepare.py did not write; name another folder "
                        "with --out, such as --out=data/mine")


def what_to_do():
    """(settings, inputs, name of the set if it is a named one, folder for the shards). Raises UserError."""
    config, inputs = parse_command_line()
    if not inputs:
        raise UserError(f"expected what to prepare: one of {', '.join(NAMED)}, or files and folders")
    if not 0 < config.val_share < 1:
        raise UserError(f"--val_share must be above 0 and below 1, got {config.val_share:g}")
    if config.workers < 0:
        raise UserError(f"--workers must be 0 or more, got {config.workers}")
    if not config.size > 0:
        raise UserError(f"--size must be above 0, got {config.size:g}")
    name = inputs[0] if inputs[0] in NAMED else None
    if name and len(inputs) > 1:
        raise UserError(f"{name} can't be combined with other inputs; got {' '.join(inputs[1:])} too")
    if config.from_file and not name:
        raise UserError(f"--from-file is for a named set: {', '.join(NAMED)}")
    if config.out == "auto" and len(inputs) > 1:
        raise UserError(
            f"{len(inputs)} inputs go into one set, which --out must name, such as --out=data/mine")
    folder = Path(config.out) if config.out != "auto" else FOLDER / (name or stem_of(inputs[0]))
    check_folder(folder)
    if name and (folder / INDEX).exists():
        raise UserError(f"{name} is in {folder} already; delete that folder to prepare it again, "
                        "or name another with --out")
    return config, inputs, name, folder


def stem_of(path):
    """A file's name without its ending, or a folder's name."""
    stem = Path(path).resolve().name
    for ending in (".gz", *KINDS):
        if stem.lower().endswith(ending):
            stem = stem[:-len(ending)]
    return stem


def main():
    """One command."""
    config, inputs, name, folder = what_to_do()
    downloads = []
    try:
        if name:
            pieces, downloads = named_pieces(name, folder, config)
        else:
            pieces = pieces_of(find_files(inputs, NAMED), config.val_share)
        default = NAMED[name].tokenizer if name else "bytes"
        encoding, tokenizer_name = choose_tokenizer(config, default, pieces)
        index = prepare(pieces, folder, encoding, tokenizer_name, config)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it is empty, as it is after an error
    for split in SPLITS:
        totals = {key: sum(shard[key] for shard in index[split]) for key in ("tokens", "bytes", "documents")}
        shards = "1 shard" if len(index[split]) == 1 else f"{len(index[split])} shards"
        documents = "1 document" if totals["documents"] == 1 else f"{totals['documents']:,} documents"
        console.print(f"{split}: {totals['tokens']:,} tokens of {totals['bytes']:,} bytes, "
                      f"{documents}, in {shards}")
    if not config.keep_download:
        for path in downloads:
            path.unlink(missing_ok=True)
    where = folder.name if folder.parent == FOLDER else folder
    console.print(f"{index['vocab_size']:,} tokens in the vocabulary; in {folder}; "
                  f"now: python train.py --data={shlex.quote(str(where))}")


if __name__ == "__main__":
    with one_line_errors():
        main()
