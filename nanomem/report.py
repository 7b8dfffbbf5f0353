"""
One page that shows what runs have learnt and what lies in their memory.

    python -m nanomem.report out/people-memory                      writes out/people-memory/report.html
    python -m nanomem.report out/people-memory out/people-dense     several runs, curves on top of each other
    python -m nanomem.report out/people-memory --out=people.html    another name

    nanomem.report.write(["out/people-memory"], "people.html")      the same from Python

The page is one file, without network: open it in a browser. report.html has its code, findings.py what it
shows.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nanomem.cli import UserError, closest, expand, one_line_errors, parse, safe_streams, setting

TEMPLATE = Path(__file__).with_name("report.html")
DATA = "/* data */"  # what the template has where the data belongs


@dataclass
class Settings:
    """The command line."""

    arguments = "RUN [RUN ...] "
    out: str = setting(
        "auto", "file to write; auto: report.html in the first run's folder", section="Page", path=True)
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the first available of cuda, mps, cpu")


def write(runs: str | Path | Iterable[str | Path], path: str | Path, device: str = "cpu") -> Path:
    """Writes a page about a run, or several, of train.py or exports, given by folder; returns its path.

    Raises UserError for a folder without a trained model, and if the file can't be written.
    """
    from nanomem import findings
    from nanomem.checkpoint import write_text

    if isinstance(runs, (str, Path)):
        runs = [runs]
    runs, path = [Path(run) for run in runs], Path(path)
    check_writable(path)
    page = {"written": time.strftime("%Y-%m-%d %H:%M"),
            "runs": [findings.of_run(run, 1 / len(runs), device) for run in runs]}
    template = TEMPLATE.read_text(encoding="utf-8")
    write_text(path, template.replace(DATA, as_json(page)))
    return path


def check_writable(path: Path):
    """Raises UserError if there can't be a file of this name."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path} must be a file in a folder that exists")


def as_json(value) -> str:
    """A value as JSON that is safe inside <script>: ASCII, without "<". Raises ValueError for infinities."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def known_runs() -> list[str]:
    """The folders of runs in out/."""
    return sorted({str(path.parent) for path in Path("out").glob("*/checkpoint-*")})


def folders_of(arguments: list[str]) -> list[Path]:
    """The folders that a command line names. Raises UserError, with the nearest choice, for one that is not
    there.
    """
    if not arguments:
        examples = known_runs()[:3] or ["out/people-memory"]
        raise UserError(f"expected folders of runs, such as {' or '.join(examples)}; got none")
    folders = []
    for argument in arguments:
        folder = Path(expand(argument))
        if not has_model(folder):
            problem = "has no trained model" if folder.is_dir() else "is no folder"
            beside = folder.parent if has_model(folder.parent) else close_to(folder)
            hint = f" (did you mean {beside}?)" if beside else ""
            raise UserError(f"{argument} {problem}{hint}; expected the folder of a run or an export")
        if folder in folders:
            raise UserError(f"{argument} is there twice")
        folders.append(folder)
    return folders


def has_model(folder: Path) -> bool:
    """Whether a folder looks like that of a run or an export, for an answer before the slow imports."""
    return (folder / "model.safetensors").exists() or any(folder.glob("checkpoint-*"))


def close_to(folder: Path) -> Path | None:
    """The run with the name most similar to a folder's, beside it or in out/."""
    beside = {path.parent.name: path.parent for path in folder.parent.glob("*/checkpoint-*")}
    runs = beside or {Path(run).name: Path(run) for run in known_runs()}
    return runs.get(closest(folder.name, runs))


def main():
    """The command line: writes a page and says where it is."""
    arguments = sys.argv[1:]
    settings = Settings(**parse(Settings, [text for text in arguments if text.startswith("-")]))
    folders = folders_of([text for text in arguments if not text.startswith("-")])
    path = folders[0] / "report.html" if settings.out == "auto" else Path(settings.out)
    check_writable(path)

    from rich.console import Console

    from nanomem.config import keep_freed_memory, pick_device

    keep_freed_memory()
    console = Console(highlight=False, markup=False, emoji=False)
    started = time.perf_counter()
    with console.status("looking into the runs"):
        write(folders, path, pick_device(settings.device))
    seconds, megabytes = time.perf_counter() - started, os.path.getsize(path) / 1e6
    console.print(f"wrote {path} ({megabytes:.1f} MB, in {seconds:.0f} s): open it in a browser",
                  soft_wrap=True)


if __name__ == "__main__":
    gc.disable()  # nearly all that is made stays until the end: looking for garbage is waste
    safe_streams()
    with one_line_errors():
        main()
