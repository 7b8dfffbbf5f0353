"""
Trains models with train.py, several at a time, and keeps their results.

Each finished run becomes a small JSON file in assets/runs. A later command uses it instead of training again,
on any machine, if what decides the result is the same: settings, data, torch's version and COMPUTATION. So a
table can grow over several sittings, and a change that computes the same numbers costs no run.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nanomem import checkpoint
from nanomem.checkpoint import read_json, write_text
from nanomem.cli import UserError
from nanomem.config import DESCRIBES_DATA, Config, machine
from nanomem.data import open_data
from nanomem.reproduce.sizing import flops
from nanomem.run import DIVERGED, read_metrics

COMPUTATION = 3  # raise it with any change to what a run computes; results from before no longer count
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(eq=False)  # so that runs can be keys of a dict
class Run:
    """One training of a model. Names are for people: equal settings are the same run under any name."""

    name: str
    config: Config

    @functools.cached_property
    def identity(self) -> dict:
        """What decides the result."""
        return {
            "settings": deciding(dataclasses.asdict(self.config)),
            "data": data_digest(self.config),
            "torch": torch_version(),
            "computation": COMPUTATION,
        }

    @functools.cached_property
    def file_name(self) -> str:
        """The name with a hash of the identity, to call files and folders by."""
        digest = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:8]
        return f"{re.sub(r'[^a-zA-Z0-9.=]', '-', self.name)}-{digest}"

    @functools.cached_property
    def work(self) -> float:
        """An estimate for the progress bar: FLOPs, plus a constant for a token's other costs."""
        return self.config.max_iters * self.config.batch_size * (flops(self.config) + 3e5)

    def is_result(self, saved: dict) -> bool:
        """Whether a saved result is of this run. Settings that it doesn't have must be at their defaults."""
        settings = deciding(dataclasses.asdict(Config())) | saved["settings"]
        return self.identity == {
            "settings": settings,
            "data": saved["data"],
            "torch": saved["torch"],
            "computation": saved["computation"],
        }


def deciding(settings: dict) -> dict:
    """The settings that decide a result: all but the folder and whether it was resumed."""
    return {name: value for name, value in settings.items() if name not in ("out_dir", "resume")}


def data_digest(config: Config) -> str:
    """A hash of the data that a config trains on."""
    names = *DESCRIBES_DATA, "tokenizer", "vocab_size", "block_size"
    return _data_digest(**{name: getattr(config, name) for name in names})


@functools.cache  # the runs of a table have the same few sets of data
def _data_digest(**settings):
    return open_data(Config(**settings)).digest()


class Trainer:
    """Trains runs that have no result yet.

    Args:
        workers: runs at a time.
        threads: CPU threads of each; 0: as many as torch takes.
        results: folder of the finished runs' JSON files.
        out_dir: folder of checkpoints and logs. A run that was stopped continues from there.
    """

    def __init__(self, workers: int, threads: int, results: Path, out_dir: Path, console: Console):
        self.workers, self.threads = workers, threads
        self.results, self.out_dir, self.console = Path(results), Path(out_dir), console
        self.used = {}  # file name -> result, of all runs that were asked for

    def train(
            self, runs: list[Run], if_diverged: dict | None = None,
            with_checkpoints: bool = False) -> dict[str, dict]:
        """Trains what has no result yet. Returns {run's name: the last line of its metrics}.

        if_diverged: metrics to use for a run that diverged. with_checkpoints: also trains what
        has a result but no checkpoint in `folder`. Raises UserError with the last line of a run that failed,
        or, without if_diverged, that diverged.
        """
        found, waiting = {}, []
        saved = self.saved_results()
        for run in runs:
            matches = [result for result in saved if run.is_result(result)]
            if matches and (self.is_trained(run) or not with_checkpoints):
                found[run] = matches[0]
            else:
                waiting.append(run)
        found |= self.train_all(waiting, len(found))
        metrics = {}
        for run in runs:
            self.used[run.file_name] = found[run]
            metrics[run.name] = found[run]["metrics"] or if_diverged
            if metrics[run.name] is None:
                raise UserError(f"{run.name} failed: {found[run]['error']}")
        return metrics

    def is_trained(self, run: Run) -> bool:
        """Whether the folder of a run has its last checkpoint."""
        return (self.folder(run) / f"checkpoint-{run.config.max_iters}").exists()

    def evaluations(self, run: Run) -> list[dict]:
        """The metrics of each evaluation of a run that `train` has trained."""
        return self.used[run.file_name]["evaluations"]

    def saved_results(self) -> list[dict]:
        """The results of all finished runs."""
        return [read_json(path) for path in sorted(self.results.glob("*.json"))]

    def train_all(self, runs: list[Run], n_done: int) -> dict[Run, dict]:
        """Trains runs and saves their results: {run: result}."""
        waiting = sorted(runs, key=lambda run: run.work)  # the longest is started first
        running, found = {}, {}
        with self.progress_bar() as bar:
            task = bar.add_task("", total=sum(run.work for run in runs))
            try:
                while waiting or running:
                    while waiting and len(running) < self.workers:
                        run = waiting.pop()
                        running[run] = self.start(run)
                    ended = [run for run, process in running.items() if process.poll() is not None]
                    for run in ended:
                        found[run] = self.finish(run, running.pop(run).returncode)
                    if not ended:
                        time.sleep(1)  # more often, it would slow what it measures
                    names = ", ".join(run.name for run in running)
                    bar.update(
                        task,
                        completed=sum(run.work for run in found) + sum(map(self.work_done, running)),
                        description=f"{n_done + len(found)}/{n_done + len(runs)} runs; now {names}")
            finally:
                for process in running.values():  # after Ctrl-C, which they got too: they save and end
                    process.terminate()
                for process in running.values():
                    process.wait()
        return found

    def progress_bar(self) -> Progress:
        """A bar with the time left; nothing if the output is not a terminal."""
        return Progress(
            BarColumn(bar_width=20), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(),
            TextColumn("{task.description}"), console=self.console, disable=not self.console.is_terminal,
            speed_estimate_period=600)

    def start(self, run: Run) -> subprocess.Popen:
        """Starts train.py for a run, or continues one that was stopped."""
        self.out_dir.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        with open(self.log_path(run), "a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *self.arguments(run)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def arguments(self, run: Run) -> list[str]:
        """train.py's arguments for a run."""
        folder = self.folder(run)
        resume = ["--resume"] if checkpoint.folders(folder) else []
        return [*settings_as_arguments(run.config), f"--out_dir={folder}", *resume]

    def finish(self, run: Run, returncode: int) -> dict:
        """Saves the result of a run that has ended. Raises UserError if it failed."""
        metrics, error, evaluations = None, None, []
        if returncode == 0:
            lines = read_metrics(self.folder(run))
            metrics = lines[-1]
            evaluations = [line for line in lines if "val_loss" in line]
        else:
            said = self.log_path(run).read_text(encoding="utf-8", errors="replace").strip()
            error = said.splitlines()[-1] if said else f"exit code {returncode}"
            if not error.endswith(DIVERGED):
                raise UserError(f"{run.name} failed: {error} (see {self.log_path(run)})")
        result = run.identity | {
            "name": run.name,
            "metrics": metrics,
            "evaluations": evaluations,
            "error": error,
            "command": " ".join(["python train.py", *settings_as_arguments(run.config)]),
            "commit": commit(),
            "machine": machine(),
            "threads": self.threads or torch.get_num_threads(),
            "date": datetime.date.today().isoformat(),
        }
        self.results.mkdir(parents=True, exist_ok=True)
        write_text(self.results / f"{run.file_name}.json", json.dumps(result, indent=1) + "\n")
        return result

    def work_done(self, run: Run) -> float:
        """The part of a running run's work that is done."""
        metrics = read_metrics(self.folder(run))
        return run.work * metrics[-1]["iter"] / run.config.max_iters if metrics else 0.0

    def folder(self, run: Run) -> Path:
        """Where a run trains."""
        return self.out_dir / run.file_name

    def log_path(self, run: Run) -> Path:
        """What a run printed."""
        return self.out_dir / f"{run.file_name}.log"

    def provenance(self) -> dict:
        """At which commits, where and how long the runs that were used trained."""
        results = list(self.used.values())
        seconds = sum(result["metrics"]["elapsed_s"] for result in results if result["metrics"])
        return origin(results) | {"minutes": round(seconds / 60)}


def here() -> dict:
    """{"commit", "machine", "torch"} of what runs now."""
    return {"commit": commit(), "machine": machine(), "torch": torch_version()}


def origin(results: list[dict]) -> dict:
    """{"commit", "machine"} of results, as a table shows them."""
    machines, versions = all_of(results, "machine"), all_of(results, "torch")
    return {"commit": all_of(results, "commit"), "machine": f"{machines}; torch {versions}"}


def all_of(results: list[dict], key: str) -> str:
    """The different values of a key, joined by commas."""
    return ", ".join(sorted({result[key] for result in results}))


def settings_as_arguments(config: Config) -> list[str]:
    """The settings that are not at their defaults, as train.py's arguments."""
    defaults = dataclasses.asdict(Config())
    settings = dataclasses.asdict(config).items()
    return [f"--{name}={value}" for name, value in settings if value != defaults[name]]


@functools.cache
def commit() -> str:
    """The clone's commit, with a + if files besides results and pages differ; "unknown" outside a clone."""
    try:
        name = git("rev-parse", "--short", "HEAD")
        not_results = ("--", ":!assets", ":!docs", ":!README.md")
        is_changed = git("status", "--porcelain", "--untracked-files=no", *not_results) != ""
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}+" if is_changed else name


def git(*arguments):
    """What a git command prints about this clone."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def torch_version() -> str:
    """torch's version, without what it was built for."""
    return torch.__version__.partition("+")[0]
