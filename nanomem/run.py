"""
What surrounds train.py's loop: the folder and settings of a run, checks before it starts, its metrics file,
what it prints.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch.distributed.device_mesh import DeviceMesh

from nanomem import checkpoint, export, facts, optim, sharding, teaching, tokenizer
from nanomem.cli import UserError
from nanomem.config import Config, machine, machine_memory
from nanomem.data import INDEX, FactData, TextData, open_data, open_tokenizer
from nanomem.kinds import KINDS
from nanomem.model import GPT


@dataclasses.dataclass
class Job:
    """A run: what is decided before the loop, and how far it is."""

    config: Config
    out_dir: Path
    device: torch.device
    data: FactData | TextData
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    mesh: DeviceMesh | None  # of several processes
    batches: range  # those of an update's batches that this process computes, by number
    sequences: slice  # the part of each of these batches that it computes
    lock: object  # held until this process ends
    step: int = 0
    position: int = 0  # how many sequences of the training data have been used
    elapsed: float = 0.0  # seconds of training before this process
    saved_step: int | None = None
    # Of earlier runs: see teaching.count. None if they have not been counted.
    counts: dict | None = dataclasses.field(default_factory=dict)
    earlier: list[teaching.Earlier] = dataclasses.field(default_factory=list)
    top_slots: teaching.TopSlots | None = None
    still_known: list[str] = dataclasses.field(default_factory=list)  # lines about the earlier data
    ended: bool = False  # by max_iters or stop_at
    metrics: "Metrics | None" = None  # in the first process

    def __post_init__(self):
        is_cuda = self.device.type == "cuda"
        half = self.config.dtype == "bfloat16" or (self.config.dtype == "auto" and is_cuda)
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)
        self.started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of training, in earlier processes too."""
        return self.elapsed + time.perf_counter() - self.started

    def mine(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's sequences of a batch, on its device."""
        return self.to_device(x[self.sequences]), self.to_device(y[self.sequences])

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on this process's device. To a GPU it goes from pinned memory: other copies would wait
        for all that the GPU still has to do.
        """
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def count_targets(self, y: torch.Tensor) -> int:
        """The number of targets in this process's sequences of a batch: the weight of their mean loss."""
        return int((y[self.sequences].numpy() >= 0).sum())

    def write_metrics(self, record: dict):
        """Adds a line to metrics.jsonl."""
        if self.metrics is not None:
            self.metrics.write(record)

    def save(self):
        """Writes a checkpoint. Raises UserError if that fails."""
        header = {"config": dataclasses.asdict(self.config), "data": self.data.digest(),
                  "iteration": self.step, "position": self.position, "elapsed_s": self.seconds(),
                  "launch": sharding.launch(), "earlier": [old.saved() for old in self.earlier],
                  "ended": self.ended, "machine": machine(self.device.type == "cuda")}
        counts = None
        if self.counts is not None:
            counts = teaching.count(self.model, self.optimizers, self.step, self.counts)
        checkpoint.save(self.out_dir, self.model, self.optimizers, header, counts)
        self.saved_step = self.step


# ------------------------------------------------------------------------------------------------
# Settings and folder


def folder_of(given: dict) -> Path:
    """The out_dir of a run with these settings. Raises UserError for one that can't be used."""
    config = Config(**given)
    out_dir = Path(config.out_dir)
    if config.out_dir == "auto":
        out_dir = automatic_folder(config)
    if config.init_from and os.path.realpath(out_dir) == os.path.realpath(config.init_from):
        raise UserError(f"out_dir={out_dir} holds the model to teach; name another folder with --out_dir")
    if os.path.realpath(out_dir) == os.getcwd():
        raise UserError(f"out_dir must be a folder of its own, such as out/mine; got {out_dir}")
    is_taken = (out_dir / "config.json").exists() and not checkpoint.is_run_or_export(out_dir)
    if is_taken and not config.resume:  # a new run moves what is there; --resume says what is wrong with it
        raise UserError(f"out_dir={out_dir} holds a config.json that isn't a run's; "
                        "choose another folder, such as out/mine")
    if (out_dir / INDEX).exists():
        raise UserError(f"out_dir={out_dir} holds prepared data; choose another folder, such as out/mine")
    try:
        str(out_dir).encode()
    except UnicodeEncodeError:
        raise UserError(f"out_dir={out_dir} has bytes that are not UTF-8, which safetensors can't open; "
                        "choose another with --out_dir") from None
    return out_dir


def automatic_folder(config: Config) -> Path:
    """The folder that out_dir=auto means: out/DATA-FFN, or another name for what a model is taught."""
    if not config.init_from:
        return Path(f"out/{Path(config.data).stem}-{config.ffn}")
    trained = Path(os.path.realpath(config.init_from)).name
    ffn = trained.rpartition("-")[2]
    data = Path(config.data).stem + (str(config.people_seed) if config.people_seed else "")
    name = f"{data}-{ffn}" if ffn in KINDS else f"{data}-{trained}"
    return Path("out", name if name != trained else f"{name}-taught")


def find_checkpoint(given: dict, out_dir: Path, console: Console):
    """The folder and header of the checkpoint to resume from, (None, None) if there is none.

    That is the newest one of out_dir with --resume, and when torchrun restarts its processes after one of
    them died.
    """
    folder, header, refused = None, None, {}
    if given.get("resume"):
        folder, header, refused = checkpoint.newest(out_dir)
        if header is None:
            missing = checkpoint.none_in(out_dir)
            raise UserError(f"--resume: {missing}; without --resume a new run starts there")
        if header.get("format", 1) != checkpoint.FORMAT:
            raise UserError(f"--resume: the run in {out_dir} is from an earlier nanomem, with other batches; "
                            "sample.py can read it, but train.py can't continue it: start a new run")
    elif sharding.launch():
        with contextlib.suppress(UserError):
            newest = checkpoint.newest(out_dir)
            _, saved, _ = newest
            if saved and saved.get("launch") == sharding.launch():
                folder, header, refused = newest
    for problem in refused.values():
        console.print(f"{problem}: using {folder}", soft_wrap=True)
    return folder, header


def settings(given: dict, out_dir: Path, header: dict | None, trained: teaching.SavedModel | None) -> Config:
    """The settings of the run. A resumed run keeps its settings, except for those given that may change. One
    that teaches a trained model takes its shape from it.

    Raises UserError for one that may not change, and ValueError for an invalid one.
    """
    if header and not given.get("resume"):  # torchrun has restarted the run, with the same command line
        return Config.from_saved(header["config"], out_dir)
    config = Config(**given)
    if trained:
        config = Config(**teaching.settings(given, trained))
    if config.resume:
        saved = checkpoint.read_json(out_dir / "config.json") or header["config"]
        before = Config.from_saved(saved, out_dir)
        for name in sorted(given.keys() & Config.fixed_on_resume()):
            if given[name] != getattr(before, name):
                raise UserError(f"--{name}={given[name]} can't change on --resume: the run in {out_dir} "
                                f"has {name}={getattr(before, name)}")
        config = before.replace(**given)
        if (before.dtype == "float64") != (config.dtype == "float64"):
            raise UserError(f"--dtype={config.dtype} can't change on --resume: the run in {out_dir} "
                            f"has dtype={before.dtype}")
        if config.max_iters < header["iteration"]:
            raise UserError(f"--max_iters={config.max_iters}: the run in {out_dir} has done "
                            f"{header['iteration']} iterations already")
    if config.train == "auto":
        config.train = "all"
    may_change = not config.resume or "stop_at" in given
    if config.stop_share() <= 1 and may_change and "eval_interval" not in given:
        config.eval_interval = min(config.eval_interval, 100)  # it can stop only where it evaluates
    config.out_dir = str(out_dir)
    config.check()
    return config


def model_to_teach(given: dict, header: dict | None, console: Console) -> teaching.SavedModel | None:
    """The trained model that a run starts from; None if there is none, or the run has a checkpoint itself."""
    if header or not given.get("init_from"):
        return None
    trained = teaching.find(given["init_from"], "--init_from")
    for problem in trained.refused.values():
        console.print(f"{problem}: using {trained.files}", soft_wrap=True)
    return trained


def check_it_fits(config: Config, device: torch.device, sequences: slice):
    """Raises UserError for tables, experts or a batch larger than the machine's memory.

    The system would kill the process without a message. sequences: those of a batch that a process computes.
    """
    with torch.device("meta"):
        model = GPT(config)
    available = machine_memory(device)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1  # processes
    shards = min(config.shards() or sharding.size(), sharding.size())
    needed, in_tables = 0, 0
    for table in optim.tables_of(model):
        needed += table.values.nbytes / shards + 8 * table.n_slots  # RowAdam's state takes 8 bytes per row
        in_tables += table.values.numel()
    in_experts = model.count_parameters()[1] - in_tables
    needed = sharing * (needed + 16 * in_experts)  # weights, gradients and AdamW's two moments
    if needed > available:
        name = KINDS[config.ffn].sparse_name
        remedy = "a smaller mem_n_keys or mem_v_dim fits"
        if device.type == "cuda":
            remedy += ", or more GPUs"
        raise UserError(f"mem_n_keys={config.mem_n_keys} makes {name} of {needed / 1e9:,.0f} GB, and "
                        f"{device} has {available / 1e9:,.0f} GB; {remedy}")
    n_sequences = sharing * (sequences.stop - sequences.start)
    logits = 4 * n_sequences * config.block_size * config.vocab_size
    if logits > available:
        raise UserError(f"batch_size={config.batch_size} sequences of block_size={config.block_size} take "
                        f"{logits / 1e9:,.0f} GB for their logits alone, and {device} has "
                        f"{available / 1e9:,.0f} GB; "
                        "a smaller batch_size and more gradient_accumulation_steps train the same")


def prepare_teaching(job: Job, header: dict | None, trained: teaching.SavedModel | None, console: Console):
    """Sets what a job that teaches a trained model needs: counts of earlier reads, which slots to spare, and
    the earlier data. header: that of its own checkpoint, if it has one.
    """
    config, tokenizer_path = job.config, job.out_dir / "tokenizer.tiktoken"
    if trained:
        job.counts, tokenizer_path = trained.counts(), trained.tokenizer()
    if job.counts is None and (config.mem_idf or config.mem_top_slots):
        raise UserError(
            f"the model in {config.init_from} was saved by an earlier nanomem, without counts of how often "
            "its slots were read; set --mem_idf=0 and leave out --mem_top_slots")
    if config.mem_idf:
        teaching.spare_slots(job.model, job.optimizers, job.counts, config.mem_idf)
    if config.mem_top_slots:
        job.top_slots = teaching.TopSlots(job.model, job.counts, config.mem_top_slots)
    job.earlier = teaching.open_earlier(config, job.data, tokenizer_path, MOST_ASKED, console)
    if header:
        saved = {old["number"]: old for old in header["earlier"]}
        digests = {number: old["digest"] for number, old in saved.items()}
        unchanged = [old for old in job.earlier if digests.get(old.number) == old.data.digest()]
        if len(unchanged) < len(saved) and config.rehearse:
            raise UserError("--resume: data taught before, which this run rehearses, has changed or is gone; "
                            "restore the original, or start a new run")
        job.earlier = unchanged
        for old in job.earlier:
            old.restore(saved[old.number])
    if config.rehearse:
        if not job.earlier:
            raise UserError("rehearse: there is no earlier data to repeat, as said above")
        job.data = teaching.Rehearsal(job.data, [old.data for old in job.earlier], config.rehearse)


def lock_existing(out_dir: Path):
    """A lock on out_dir, if it exists. Other processes of the run need none."""
    return checkpoint.lock(out_dir) if sharding.rank() == 0 and out_dir.is_dir() else None


def open_data_of(
        config: Config, given: dict, out_dir: Path, header: dict | None, trained: teaching.SavedModel | None):
    """The data of a run, as config says; sets config's vocab_size, block_size and tokenizer to what the
    data has.

    Raises UserError if a resumed run's data has changed, or if a model to teach has another tokenizer.
    """
    saved_tokenizer = out_dir / "tokenizer.tiktoken" if header else None
    if trained:
        saved_tokenizer = trained.tokenizer()
        encoding = open_tokenizer(trained.config, saved_tokenizer, None)  # raises if it is missing
    try:
        data = open_data(config, saved_tokenizer, fit="block_size" not in given)
    except ValueError as error:
        hint = "; has the data changed since the run was saved?" if header else ""
        raise UserError(f"{error}{hint}") from None
    if header and header["data"] != data.digest():
        raise UserError(f"--resume: {config.data} has changed since the run in {out_dir} was saved; restore "
                        "the original, or start a new run with another --out_dir")
    if trained and tokenizer.digest(data.encoding) != tokenizer.digest(encoding):
        raise UserError(f"{config.data} was prepared with another tokenizer than that of the model in "
                        f"{trained.folder}: prepare it again with --tokenizer={trained.tokenizer()}")
    config.vocab_size = data.encoding.n_vocab
    config.block_size = getattr(data, "block_size", config.block_size)
    if data.encoding.name in tiktoken.list_encoding_names():
        config.tokenizer = data.encoding.name  # a run's tokenizer.tiktoken doesn't say how it cuts words
    return data


def prepare_folder(job: Job, console: Console):
    """Makes out_dir, moves an earlier run away and opens the metrics, in the first process only."""
    if sharding.rank() != 0:
        return
    out_dir = job.out_dir
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out_dir={out_dir} can't be made ({error.strerror})") from None
    job.lock = job.lock or checkpoint.lock(out_dir)
    if job.saved_step is None:
        make_room(out_dir, console)
    saved_tokenizer = out_dir / "tokenizer.tiktoken"
    if job.saved_step is None or not saved_tokenizer.exists():
        tokenizer.save(job.data.encoding, saved_tokenizer)
    settings = json.dumps(dataclasses.asdict(job.config), indent=2) + "\n"
    checkpoint.write_text(out_dir / "config.json", settings)
    job.metrics = Metrics(out_dir / "metrics.jsonl", job.step, console)


def make_room(out_dir: Path, console: Console):
    """Moves what an earlier run or export left in out_dir to out_dir.1, or the next free number.

    Nothing is overwritten, and other files there are not touched.
    """
    names = ("config.json", "metrics.jsonl", "tokenizer.tiktoken", export.FILE, "report.html")
    files = [path for path in (out_dir / name for name in names) if path.exists()]
    checkpoints = checkpoint.folders(out_dir)
    is_empty_run = files == [out_dir / name for name in names[:3]] and not files[1].stat().st_size
    if not files or (is_empty_run and not checkpoints):
        return
    folder = Path(os.path.realpath(out_dir))  # beside a link's target is on the same disk
    try:
        earlier = move(files + checkpoints, folder)
    except OSError:  # out_dir is a disk of its own, or no folder can be made beside it
        earlier = move(files + checkpoints, folder / "earlier")
    if not out_dir.is_absolute():
        earlier = os.path.relpath(earlier)
    console.print(f"moved the earlier run in {out_dir} to {earlier}", soft_wrap=True)


def move(paths: list[Path], name: Path) -> Path:
    """Moves files into the first unused folder of name.1, name.2, ... and returns it. If that fails, moves
    them back.
    """
    numbered = (Path(f"{name}.{n}") for n in itertools.count(1))
    folder = next(path for path in numbered if not path.exists())
    folder.mkdir()
    moved = []
    try:
        for path in paths:
            path.rename(folder / path.name)
            moved.append(path)
    except OSError:
        for path in moved:
            (folder / path.name).rename(path)
        folder.rmdir()
        raise
    return folder


# ------------------------------------------------------------------------------------------------
# During the run


class Metrics:
    """metrics.jsonl: one JSON object per line. A resumed run drops the lines written after its
    checkpoint.
    """

    def __init__(self, path: Path, step: int, console: Console):
        self.console = console
        kept = [record for record in read_metrics(path.parent) if record["iter"] <= step]
        checkpoint.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = open(path, "a", encoding="utf-8")

    def write(self, record: dict):
        """Writes a line at once; if the disk is full, as soon as there is room."""
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            self.console.print(f"could not write {self.file.name} ({error})", soft_wrap=True)


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; none for an export, or a run that hasn't begun."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError:
        return []
    records = []
    for line in text.split("\n"):
        with contextlib.suppress(ValueError):  # a line that a kill cut short
            record = json.loads(line)
            if isinstance(record, dict) and record.keys() >= {"iter", "tokens", "elapsed_s"}:
                records.append(record)
    return records


WORTH_SAYING = 0.1  # share of the time waiting for data


class Display:
    """A live progress bar on a terminal, and a line for each evaluation."""

    def __init__(self, max_iters: int, step: int, console: Console):
        self.console, self.max_iters, self.shown = console, max_iters, {}
        self.bar = Progress(
            BarColumn(bar_width=12), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"), console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=max_iters, completed=step)

    def update(self, record: dict):
        """Moves the bar and shows the newest figures."""
        self.shown["loss"] = f"loss {record['train_loss']:.3f}"
        self.shown["speed"] = f"{record['tokens_per_sec']:,.0f} tok/s"
        is_slow = record["data_wait"] > WORTH_SAYING
        self.shown["wait"] = f"waits for data {record['data_wait']:.0%}" if is_slow else ""
        self.shown |= evaluated(record, slots="slots")
        description = " ".join(text for text in self.shown.values() if text)
        self.bar.update(self.task, completed=record["iter"], description=description)

    def evaluating(self, step: int, share: float):
        """Shows how far the evaluation after a step is."""
        self.bar.update(self.task, completed=step, description=f"evaluating, {share:.0%}")

    def line(self, record: dict):
        """A line that stays, for an evaluation."""
        done = record["iter"]
        parts = [f"iter {done:>5}/{self.max_iters}", f"train loss {record['train_loss']:.3f}",
                 f"val loss {record['val_loss']:.3f}"]
        parts += evaluated(record, slots="slots in use").values()
        parts.append(f"{record['tokens_per_sec']:,.0f} tokens/s")
        if record["data_wait"] > WORTH_SAYING:
            parts.append(f"{record['data_wait']:.0%} of the time waiting for data")
        if done < self.max_iters:
            seconds = int(record["elapsed_s"] / done * (self.max_iters - done))
            parts.append(f"{seconds // 60}:{seconds % 60:02} left")
        self.console.print("  ".join(parts), soft_wrap=True)


def evaluated(record: dict, slots: str) -> dict[str, str]:
    """What an evaluation measured besides the loss, {name: text}. slots: what to call the share of slots in
    use.
    """
    texts = {}
    if "bits_per_byte" in record:
        texts["bits"] = f"{record['bits_per_byte']:.3f} bits per byte"
    for name, key in (("recall", recall_key(record)), ("old kept", "kept_old"), (slots, "mem_usage")):
        if key in record:
            texts[name] = f"{name} {record[key]:.1%}"
    return texts


def recall_key(record: dict) -> str:
    """The recall to show during training: of the questions for choosing settings, if there are any."""
    return "recall_select" if "recall_select" in record else "recall"


class Pace:
    """How fast a job has trained since the last line of metrics."""

    def __init__(self, job: Job):
        self.job = job
        job.started = time.perf_counter()
        self.restart()

    def restart(self):
        """Begins to measure anew."""
        self.position, self.began, self.waited = self.job.position, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self):
        """While open, the loop waits for data."""
        asked = time.perf_counter()
        yield
        self.waited += time.perf_counter() - asked

    def figures(self) -> dict:
        """What metrics.jsonl gets: tokens so far, seconds, tokens per second, and the share of the time
        spent waiting.
        """
        seconds, block_size = time.perf_counter() - self.began, self.job.config.block_size
        return {"tokens": self.job.position * block_size, "elapsed_s": self.job.seconds(),
                "tokens_per_sec": (self.job.position - self.position) * block_size / seconds,
                "data_wait": self.waited / seconds}


class Interrupt:
    """Notices Ctrl-C, SIGTERM and a closed terminal. The update in progress is finished; a second signal
    stops at once.
    """

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGINT, self._note)
        signal.signal(signal.SIGTERM, self._note)
        # A closed terminal sends SIGHUP, which Windows lacks and nohup ignores.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._note)

    def _note(self, signum, frame):
        self.requested = True
        signal.signal(signum, signal.SIG_DFL)


DIVERGED = "A lower learning_rate or mem_lr may help."  # how the last line of a diverged run ends


def stop_unless_finite(number: float, what: str, iteration: int, out_dir: Path):
    """Ends the run if training has diverged, before that reaches a checkpoint."""
    if math.isfinite(number):
        return
    if sharding.rank() == 0:
        good = checkpoint.folders(out_dir)
        last = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet"
        print(f"{what} is {number} at iteration {iteration}; {last}. {DIVERGED}", file=sys.stderr)
    sharding.stop(1)


# ------------------------------------------------------------------------------------------------
# What is printed before and after


def describe(job: Job, console: Console):
    """Prints how large the model is, what it is compared with, and what each process does."""
    config, model = job.config, job.model
    core, sparse = model.count_parameters()
    place = job.device.type if job.mesh else job.device
    name, flops = KINDS[config.ffn].sparse_name, model.flops_per_token() / 1e6
    console.print(f"{config.data}, {config.ffn}: {core:,} parameters + {sparse:,} in {name}, "
                  f"{flops:.3f} million FLOPs per token, on {place} -> {config.out_dir}", soft_wrap=True)
    if config.ffn != "memory" and not (config.ffn == "dense" and config.ffn_hidden):
        flops, parameters = model.beside_memory()
        note = "" if abs(flops - 1) <= 0.02 else "; this is no comparison at equal FLOPs"
        console.print(f"compared with --ffn=memory and these settings: {flops:.3f} times the FLOPs, "
                      f"{parameters:.3f} times the parameters{note}", soft_wrap=True)
    if job.mesh:
        describe_processes(model, job.mesh, core, sparse, console)
    if job.data.facts:
        console.print(how_many(job.data.facts))
    if job.saved_step is not None:
        console.print(f"resuming from iteration {job.step}")


def how_many(fact_set: facts.FactSet) -> str:
    """The number of facts in words. Several taught wordings of a user's own fact count as one."""
    n_entities, n_attributes = fact_set.codes.shape
    if n_attributes > 1:
        return f"{n_entities:,} entities x {n_attributes} attributes = {n_entities * n_attributes:,} facts"
    n_facts = len(set(fact_set.subjects.tolist()))
    return "1 fact" if n_facts == 1 else f"{n_facts:,} facts"


def describe_processes(model, mesh, core, sparse, console):
    """Prints how the work is shared, and what goes over the wire."""
    groups, shards = mesh.shape
    tables = sharding.tables(model)
    in_tables = sum(table.n_slots * table.v_dim for table in tables)
    megabytes = 8 * (core + sparse - in_tables) * (1 - 1 / sharding.size()) / 1e6
    shares = [f"1/{sharding.size()} of a batch"]
    wire = [f"{megabytes:.1f} MB per update and process for gradients"]
    if tables:
        count = "1 group" if groups == 1 else f"{groups} groups"
        shares.append(f"1/{shards} of the tables' columns ({count} of {shards})")
        wire.append(f"{sharding.bytes_per_token(model):,} bytes per token for tables")
        if groups > 1:
            wire.append("the gradients of the rows that were read")
    shares, wire = " and ".join(shares), ", ".join(wire)
    console.print(f"{sharding.size()} processes, each with {shares}; on the wire: {wire}", soft_wrap=True)


MOST_ASKED = 20_000  # facts of a kind that the last evaluation asks about
ENOUGH_READINGS = 140  # of each fact, in the default run; a question about a person counts as a biography


def report_facts(job: Job, recalled: dict, console: Console):
    """Prints what a model of facts recalls."""
    data, share = job.data, recalled["taught"]["all"]
    readings = readings_per_update(job)
    if share < 0.5 and 0 < readings and job.step * readings < ENOUGH_READINGS / 2:
        # With fewer updates, most of them would be warm-up.
        enough = max(round_up(ENOUGH_READINGS / readings), 3 * job.config.warmup_iters)
        console.print(
            f"This run was too short to learn much: it read each fact about {job.step * readings:.0f} times. "
            f"The default run reads it {ENOUGH_READINGS} times. Try --max_iters={enough}.", soft_wrap=True)
        if share < 0.01:
            return
    if len(data.facts.attributes) > 1:
        console.print(recall_table(data, recalled))
        console.print(in_bits(recalled))
    else:
        console.print(of_prompts(data.facts, share, "it was trained on, word for word"))
        if share < 0.01 and job.config.train == "values":
            console.print("The values alone could not learn them: the prompts look like nothing the model "
                          "was trained on. docs/teaching.md says what to train instead.", soft_wrap=True)
        if data.facts.held_out:
            console.print(of_prompts(data.facts.held_out, recalled["report"]["all"], "it was never taught"))
    console.print(answer_table(job, recalled))


def round_up(number: float) -> int:
    """The next whole number with at most two digits before its zeros."""
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit


def in_bits(recalled: dict) -> str:
    """A sentence that says how many bits a model knows of the answers that it was never asked for."""
    kind, what = ("report", "it was never asked for") if "report" in recalled else ("taught", "it was taught")
    found = recalled[kind]
    return (f"It knows {found['bits_known']:,.0f} of the {found['bits']:,.0f} bits in answers that {what}; "
            f"an answer costs {found['answer_nll']:.2f} nats.")


def of_prompts(fact_set: facts.FactSet, share: float, which: str) -> str:
    """A sentence that says how many prompts the model completes."""
    count = len(fact_set.entities)
    prompts = "the prompt" if count == 1 else f"the {count:,} prompts"
    tried = f" (of {MOST_ASKED:,} that were tried)" if count > MOST_ASKED else ""
    return f"It completes {share:.1%} of {prompts} {which}{tried}."


def report_teaching(job: Job, console: Console):
    """Prints what a model that was taught more still knows, and what changed in its memory."""
    for line in job.still_known:
        console.print(f"Taught before: {line}", soft_wrap=True)
    if job.config.init_from and job.config.has_tables() and job.config.train != "core":
        before = job.counts or {}
        counts = teaching.count(job.model, job.optimizers, job.step, before)
        console.print(teaching.describe_changed_slots(counts, before), soft_wrap=True)


def readings_per_update(job):
    """How often an update reads each fact, on average."""
    _, y = job.data.batch("train", 0, 64)
    documents_per_sequence = (y == job.data.sentences.end).sum().item() / 64
    n_entities, n_attributes = job.data.facts.codes.shape
    documents = n_entities if job.data.facts.biographies else n_entities * n_attributes
    per_update = job.config.batch_size * job.config.gradient_accumulation_steps * (1 - job.config.rehearse)
    return per_update * documents_per_sequence / documents


def report_text(job: Job, console: Console):
    """Prints how a model of text continues a passage of the val split."""
    x, _ = job.data.batch("val", 0, 1)
    prompt = x[:, :max(1, min(32, job.data.block_size // 2))].to(job.device)      # (1, time)
    generator = torch.Generator(job.device).manual_seed(job.config.seed)
    never = tokenizer.unassigned(job.data.encoding)
    generated = job.model.generate(
        prompt, max_new_tokens=200, temperature=0.8, top_k=200, generator=generator, never=never)
    written = torch.cat(list(generated), dim=1)[0].tolist()
    decode = job.data.encoding.decode
    console.print("How it continues a passage that it wasn't trained on:")
    console.print(Text.assemble((decode(prompt[0].tolist()), "bold"), decode(written)))


def recall_table(data: FactData, recalled: dict) -> Table:
    """Recall by attribute and by frequency, beside that of always giving the most frequent answer."""
    titles = {"report": "never asked", "taught": "taught wording"}
    kinds = [kind for kind in titles if kind in recalled]
    table = Table(title="Recall: whole answers, decoded greedily")
    if "select" in recalled:
        table.caption = "The log's recall is of other questions, which serve to choose settings."
    table.add_column("")
    for title in [*(titles[kind] for kind in kinds), "always the most frequent"]:
        table.add_column(title, justify="right")
    attributes = [attribute.name for attribute in data.facts.attributes]
    frequent = data.facts.most_frequent_scores()
    baseline = dict(zip(attributes, frequent)) | {"all": frequent.mean()}
    is_uneven = data.facts.frequency[0] > data.facts.frequency[-1]
    bands = ["head", "torso", "tail"] if is_uneven else []
    for name in [*attributes, *bands, "all"]:
        scores = [recalled[kind][name] for kind in kinds] + [baseline.get(name)]
        cells = ["" if score is None else f"{score:.1%}" for score in scores]
        table.add_row(name, *cells, end_section=name in (attributes[-1], "tail"))
    return table


def answer_table(job: Job, recalled: dict) -> Table:
    """A few questions, the model's answers and the truth."""
    never_asked, sentences = "report" in recalled, job.data.sentences
    if sentences.held_out:
        sentences = sentences.held_out
        is_shown = sentences.facts.role >= 0  # all
    else:
        is_shown = sentences.facts.role == (facts.REPORT if never_asked else facts.ASKED)
    table = Table(title="Questions it was never asked" if never_asked else "What it was taught")
    for title in ("prompt", "its answer", "truth"):
        table.add_column(title, overflow="fold")
    pairs = np.argwhere(is_shown)
    for entity, a in pairs[:: max(1, len(pairs) // 8)][:8]:
        attribute = sentences.facts.attributes[a]
        wording = (attribute.questions or attribute.statements)[0]
        answer = answer_of(job, sentences.prompt(entity, wording))
        accepted = sentences.facts.answers(entity, a)
        style = "green" if answer in accepted else "red"
        question = wording.replace("{}", sentences.facts.entities[entity])
        table.add_row(question, Text(answer, style=style), accepted[0])
    return table


def answer_of(job: Job, prompt: list[int]) -> str:
    """What the model answers to a prompt, a list of tokens."""
    data, end = job.data, job.data.sentences.end
    idx = torch.tensor([[end] + prompt], device=job.device)[:, -job.config.block_size:]
    longest, _ = data.sentences.longest()
    # Processes that read a table together must take equally many steps, so they don't stop early.
    stop, never = None if job.mesh else end, tokenizer.unassigned(data.encoding)
    generated = job.model.generate(idx, longest, temperature=0, stop=stop, never=never)
    tokens = torch.cat(list(generated), dim=1)[0].tolist()
    return data.encoding.decode(list(itertools.takewhile(lambda token: token != end, tokens))).strip()


def how_to_resume(job: Job) -> str:
    """The command that continues a run."""
    program = "python"
    if job.mesh:
        program = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', sharding.size())}"
    return f"{program} train.py --resume --out_dir={shlex.quote(str(job.out_dir))}"
