"""Downloads the data sets that data/prepare.py knows by name."""

import os
import shutil
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nanomem.cli import UserError


@dataclass(frozen=True)
class Named:
    """A data set on the web.

    Args:
        url: its file. Of a set of many files, {number:03} stands for the file's number.
        size: the file's bytes; 0: not checked.
        sha256: the file's hash, in hexadecimal; empty: not checked.
        member: the file to take out of a .zip.
        tokenizer: what tokenizer=auto means for it.
        separator: what separates the documents in the file; empty: it is one document.
    """

    url: str
    size: int = 0
    sha256: str = ""
    member: str = ""
    tokenizer: str = "bytes"
    separator: str = ""

    def is_numbered(self) -> bool:
        """Whether the set has many files."""
        return "{number" in self.url

    def file_name(self, number: int = 0) -> str:
        """The name of a file of the set."""
        return Path(self.url.format(number=number)).name


HUGGING_FACE = "https://huggingface.co/datasets"
NAMED = {
    "shakespeare": Named(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        size=1115394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "enwik8": Named("https://mattmahoney.net/dc/enwik8.zip", size=36445475, member="enwik8"),
    "wikitext-103": Named(
        "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
        member="wikitext-103-raw/wiki.train.raw",
        tokenizer="gpt2",
    ),
    "fineweb-edu": Named(
        HUGGING_FACE + "/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/{number:03}_00000.parquet",
        tokenizer="gpt2",
    ),
    "tinystories": Named(
        f"{HUGGING_FACE}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
        tokenizer="gpt2",
        separator="<|endoftext|>",
    ),
}


def fetch(name: str, number: int, folder: Path, from_file: str, console: Console) -> Path:
    """The path of a named set's file: from_file, or what is downloaded into the folder.

    Raises UserError saying which file to fetch by hand.
    """
    from nanomem.data import file_digest  # imports torch, which takes a second

    named = NAMED[name]
    url = named.url.format(number=number)
    path = Path(from_file) if from_file else folder / named.file_name(number)
    command = f"python data/prepare.py {name} --from-file={named.file_name(number)}"
    by_hand = f"fetch {url} by hand and pass it: {command}"
    if from_file and not path.is_file():
        raise UserError(f"--from-file={from_file} is not a file; {by_hand}")
    if not path.exists():
        try:
            download(url, path, console)
        except (OSError, ValueError) as error:  # urllib's errors are OSErrors
            raise UserError(f"{name} could not be downloaded ({error}); {by_hand}") from None
    remedy = by_hand if from_file else f"delete it, or {by_hand}"
    size = path.stat().st_size
    if named.size and size != named.size:
        raise UserError(f"{path} is not {name}: it has {size:,} bytes, {name} has {named.size:,}; {remedy}")
    if named.sha256 and file_digest(path) != named.sha256:
        raise UserError(f"{path} is not {name}: its SHA-256 is not {named.sha256[:12]}...; {remedy}")
    return unzip(path, named.member, folder) if path.suffix == ".zip" else path


def download(url: str, path: Path, console: Console):
    """Downloads url to path, with progress. Continues what an earlier try left behind. Raises OSError."""
    part = path.with_name(path.name + ".part")
    done = 0
    if part.exists():
        # Asks for the last byte again: a server answers a request for what follows the end with an error.
        done = max(0, part.stat().st_size - 1)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    bar = Progress(
        TextColumn(path.name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console)
    with urllib.request.urlopen(request, timeout=60) as response, bar:
        if response.status != 206:  # the server sends the whole file
            done = 0
        length = response.headers["Content-Length"]
        total = done + int(length) if length else None
        task = bar.add_task("", total=total, completed=done)
        with open(part, "r+b" if done else "wb") as file:
            file.truncate(done)
            file.seek(done)
            while block := response.read(2**18):
                file.write(block)
                bar.advance(task, len(block))
    size = part.stat().st_size
    if total is not None and size != total:
        raise OSError(
            f"the connection ended after {size:,} of {total:,} bytes; a second try continues from there")
    os.replace(part, path)


def unzip(path: Path, member: str, folder: Path) -> Path:
    """Extracts a member of a .zip into the folder, if it isn't there yet. Raises UserError if it can't."""
    target = folder / Path(member).name
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(member).file_size
            if not target.exists() or target.stat().st_size != size:
                with archive.open(member) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path} is not the .zip expected, with {member} in it ({error})") from None
    return target
