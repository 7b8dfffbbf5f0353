"""
Trains a small language model with memory layers, and tells what it has learned.

    python train.py                          five facts each about 3,000 invented people, on a laptop
    python train.py --ffn=dense              the same without memory, at equal FLOPs
    python train.py --data=world             about the world's cities;  --data=facts.jsonl  your own;  --data=book.txt  your own text
    python train.py --help                   every setting
    torchrun --standalone --nproc_per_node=8 train.py          on eight GPUs, or in eight processes of a CPU

- one file, read from top to bottom: settings, data, model, optimizers, loop, report
- out_dir gets config.json, metrics.jsonl and a checkpoint; --resume goes on as if never stopped, bit for bit
- Ctrl-C saves before it stops
- equal settings give equal results, up to rounding, in any number of processes: they share out batches, and columns of memory tables
"""

import contextlib
import dataclasses
import functools
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

from nanomem import checkpoint, export, facts, optim, sharding, tokenizer
from nanomem.config import (Config, UserError, keep_freed_memory, machine_memory, one_line_errors, parse, pick_device,
                            safe_streams)
from nanomem.data import DROPOUT, ahead, open_data, random_stream
from nanomem.memory import MemoryTable
from nanomem.observe import SlotUsage, observe_lookups
from nanomem.ops import use_kernels
from nanomem.model import GPT

safe_streams()
keep_freed_memory()
sharding.start()
first = sharding.rank() == 0  # of several processes, the one that prints
console = Console(highlight=False, markup=False, emoji=False, quiet=not first)  # users' data is shown as it is


# ------------------------------------------------------------------------------------------------
# Settings


def folder_of(given):
    """The out_dir of a run with the settings given."""
    config = Config(**given)
    out_dir = Path(config.out_dir)
    if config.out_dir == "auto":
        out_dir = Path(f"out/{Path(config.data).stem}-{config.ffn}")
    if os.path.realpath(out_dir) == os.getcwd():
        raise UserError(f"out_dir must be a folder of its own, such as out/mine; got {out_dir}")
    try:
        str(out_dir).encode()
    except UnicodeEncodeError:
        raise UserError(f"out_dir={out_dir} has bytes that are not UTF-8, which safetensors can't open; name another "
                        "with --out_dir") from None
    return out_dir


def settings(given, out_dir):
    """The run's settings, and the folder and header of the checkpoint to go on from (None if there is none).

    With --resume the settings are those of the run in out_dir, changed by the command line's. When torchrun starts the processes
    again, since one has died, they go on from what they have saved.
    """
    config = Config(**given)
    folder, header, refused = None, None, {}
    if config.resume:
        folder, header, refused = checkpoint.newest(out_dir)
        if header is None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            raise UserError(f"--resume: {checkpoint.none_in(out_dir)}; without --resume a new run starts there")
        if header and header.get("format", 1) != checkpoint.FORMAT:
            raise UserError(f"--resume: the run in {out_dir} is from an earlier version of nanomem, which drew other "
                            "batches; sample.py can read it, but train.py can't continue it: start a new run")
    elif sharding.launch():
        with contextlib.suppress(UserError):
            found = checkpoint.newest(out_dir)
            if found[1] and found[1].get("launch") == sharding.launch():
                folder, header, refused = found
    for problem in refused.values():
        console.print(f"{problem}: using {folder}", soft_wrap=True)
    if config.resume:
        before = checkpoint.read_json(out_dir / "config.json") or (header and header["config"])
        # vocab_size is what the tokenizer has, perhaps less than was asked for
        for name in given.keys() & {f.name for f in config.groups("Model", "Memory", "Baselines", "Data")} - {"vocab_size", "moe_balance"}:
            if before and given[name] != before.get(name):
                raise UserError(f"--{name}={given[name]} can't change on --resume: the run in {out_dir} has {name}={before.get(name)}")
        config = Config.from_saved(before or {}, out_dir).replace(**given)
        if header and config.max_iters < header["iteration"]:
            raise UserError(f"--max_iters={config.max_iters}: the run in {out_dir} has done {header['iteration']} iterations already")
    config.out_dir = str(out_dir)
    config.check()
    return config, folder, header


def check_it_fits(config, device):
    """Raises UserError for tables, experts or a batch larger than the machine's memory, which would kill the process without a word."""
    with torch.device("meta"):
        model = GPT(config)
    tables = [m for m in model.modules() if isinstance(m, MemoryTable)]
    shards = min(config.shards() or sharding.size(), sharding.size())
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1  # processes that share the memory
    needed = here * sum(table.values.nbytes / shards + 8 * table.n_slots for table in tables)  # values, and RowAdam's 8 bytes a row
    if config.ffn == "moe":
        needed += here * 16 * model.count_parameters()[1]  # weights, gradients and AdamW's two moments
    if needed > machine_memory(device):
        raise UserError(f"mem_n_keys={config.mem_n_keys} makes {'experts' if config.ffn == 'moe' else 'tables'} of {needed / 1e9:,.0f} GB, and {device} has "
                        f"{machine_memory(device) / 1e9:,.0f} GB; a smaller mem_n_keys or mem_v_dim fits"
                        + (", or more GPUs" if device.type == "cuda" else ""))
    logits = 4 * config.batch_size / sharding.size() * config.block_size * config.vocab_size
    if logits > machine_memory(device):
        raise UserError(f"batch_size={config.batch_size} sequences of block_size={config.block_size} take {logits / 1e9:,.0f} GB for their logits alone, and "
                        f"{device} has {machine_memory(device) / 1e9:,.0f} GB; with gradient_accumulation_steps a smaller batch_size trains alike")


def make_room(out_dir):
    """Moves what an earlier run or export left in out_dir to out_dir.1, or the next free number: nothing is
    overwritten, and no other file there is touched.
    """
    names = ("config.json", "metrics.jsonl", "tokenizer.tiktoken", export.FILE)
    files = [path for path in (out_dir / name for name in names) if path.exists()]
    checkpoints = checkpoint.folders(out_dir)
    saved_nothing = not checkpoints and files == [out_dir / name for name in names[:3]]
    if not files or saved_nothing:
        return
    folder = Path(os.path.realpath(out_dir))  # a link's target: beside that is the same disk
    try:
        earlier = move(files + checkpoints, folder)
    except OSError:  # out_dir is a disk of its own, or its parent takes no folder
        earlier = move(files + checkpoints, folder / "earlier")
    console.print(f"moved the earlier run in {out_dir} to {earlier}", soft_wrap=True)


def move(paths, name):
    """Moves files to the first of name.1, name.2, ... that is free, and returns it. Raises OSError before anything moves."""
    numbered = (Path(f"{name}.{n}") for n in itertools.count(1))
    folder = next(path for path in numbered if not path.exists())
    folder.mkdir()
    try:
        for path in paths:
            path.rename(folder / path.name)
    except OSError:
        folder.rmdir()
        raise
    return folder


# ------------------------------------------------------------------------------------------------
# Watching


class Metrics:
    """metrics.jsonl: one JSON object a line. A resumed run drops the lines written after its checkpoint."""

    def __init__(self, path, step):
        kept = []
        for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut short
                kept += [line + "\n"] if json.loads(line)["iter"] <= step else []
        checkpoint.write_text(path, "".join(kept))
        self.file = open(path, "a", encoding="utf-8")

    def write(self, row):
        """Adds a line, at once; where the disk is full, when there is room."""
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            console.print(f"could not write {self.file.name} ({error})", soft_wrap=True)


class Display:
    """A live progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, config, step):
        self.max_iters, self.shown = config.max_iters, {}
        self.bar = Progress(
            BarColumn(bar_width=12), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
            console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=config.max_iters, completed=step)

    def update(self, row):
        """Moves the bar and shows the newest figures of metrics.jsonl."""
        self.shown |= {
            "loss": f"loss {row['train_loss']:.3f}", "speed": f"{row['tokens_per_sec']:,.0f} tok/s",
            "wait": f"waits for data {row['data_wait']:.0%}" if row["data_wait"] > 0.02 else "",
            **{name: f"{name} {row[key]:.1%}" for name, key in (("recall", recall_key(row)), ("slots", "mem_usage")) if key in row}}
        self.bar.update(self.task, completed=row["iter"], description=" ".join(filter(None, self.shown.values())))

    def line(self, row):
        """A line that stays, for an evaluation."""
        parts = [f"iter {row['iter']:>5}/{self.max_iters}", f"train loss {row['train_loss']:.3f}", f"val loss {row['val_loss']:.3f}"]
        parts += [f"{name} {row[key]:.1%}" for name, key in (("recall", recall_key(row)), ("slots in use", "mem_usage")) if key in row]
        left = row["elapsed_s"] / row["iter"] * (self.max_iters - row["iter"])
        parts += [f"{row['tokens_per_sec']:,.0f} tokens/s"] + [f"of the time {row['data_wait']:.0%} waiting for data"] * (row["data_wait"] > 0.02)
        console.print("  ".join([*parts, f"{minutes(left)} left"]), soft_wrap=True)


def recall_key(row):
    """The recall to show on the way: that of the questions kept for choosing settings, where there are any."""
    return "recall_select" if "recall_select" in row else "recall"


def minutes(seconds):
    """125 -> '2:05'"""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def stop_unless_finite(number, what, iteration):
    """Ends the run where training has come apart, before that reaches the checkpoint."""
    if not math.isfinite(number):
        good = checkpoint.folders(out_dir)
        message = (f"{what} is {number} at iteration {iteration}; " + (f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet")
                   + ". A lower learning_rate or mem_lr may help.")
        if first:
            print(message, file=sys.stderr)
        sharding.stop(1)


def count_targets(y):
    """The number of targets in this process's rows of y (batch_size, block_size): the weight of their mean loss."""
    return (y[rows] >= 0).sum().item()


@torch.no_grad()
def evaluate(most):
    """val loss, recall (over at most `most` facts of a kind) and slot usage, for metrics.jsonl. Of several processes each takes
    its share of a batch; recall, which is quick, all compute alike, since they read their tables together.
    """
    model.eval()
    usage, losses, targets = SlotUsage(), 0.0, 0
    with autocast:
        with observe_lookups(model, usage):
            for i in range(config.eval_iters):
                x, y = data.batch("val", i * config.batch_size, config.batch_size)
                losses += model(x[rows].to(device), y[rows].to(device))[1].item() * count_targets(y)
                targets += count_targets(y)
        recalled = facts.measure(model, data.sentences, most) if data.facts else {}
    model.train()
    losses, targets = sharding.total(losses, targets)
    row = {"val_loss": losses / max(1, targets)}
    if not data.facts:
        row["bits_per_byte"] = row["val_loss"] / math.log(2) / data.bytes_per_token
    else:
        main = recalled.get("report", recalled["taught"])  # facts with no questions: recall of the taught prompts
        row |= {"recall": main["all"]} | {f"recall_{band}": main[band] for band in ("head", "torso", "tail")}
        row |= {f"recall_{kind}": recalled[kind]["all"] for kind in ("select", "taught") if kind in recalled}
    for weight in usage.weight.values():
        sharding.add(weight)
    if usage.weight:
        row |= {"mem_usage": usage.usage(), "mem_kl": usage.kl()}
    return row, recalled


def tell_what_it_knows(recalled):
    """A table of recall, and a few questions with the model's answers."""
    columns = [(kind, title) for kind, title in (("report", "never asked"), ("taught", "taught wording")) if kind in recalled]
    table = Table(title="Recall: whole answers, decoded greedily")
    for title in ["", *(title for _, title in columns), "always the most frequent"]:
        table.add_column(title, justify="right" if title else "left")
    frequent = data.facts.most_frequent_scores()
    last_attribute = data.facts.attributes[-1].name
    baseline = {a.name: score for a, score in zip(data.facts.attributes, frequent)} | {"all": frequent.mean()}
    names = [a.name for a in data.facts.attributes] + ["head", "torso", "tail", "all"]
    for name in names:
        numbers = [recalled[kind][name] for kind, _ in columns] + [baseline.get(name)]
        table.add_row(name, *("" if x is None else f"{x:.1%}" for x in numbers), end_section=name in (last_attribute, "tail"))
    console.print(table)

    answers = Table(title="Questions it was never asked" if "report" in recalled else "What it was taught")
    for title in ("prompt", "its answer", "truth"):
        answers.add_column(title, overflow="fold")
    longest, _ = data.sentences.longest()  # no answer takes more
    never = tokenizer.unassigned(data.encoding)
    pairs = np.argwhere(data.facts.role == (facts.REPORT if "report" in recalled else facts.ASKED))
    for e, a in pairs[:: max(1, len(pairs) // 8)][:8]:
        attribute = data.facts.attributes[a]
        wording = (attribute.questions or attribute.statements)[0]
        prompt = torch.tensor([[data.sentences.end] + data.sentences.prompt(e, wording)], device=device)[:, -config.block_size:]
        stop = None if mesh else data.sentences.end  # processes that read a table together take as many steps each
        generated = list(model.generate(prompt, longest, temperature=0, stop=stop, never=never))
        tokens = torch.cat(generated, dim=1)[0].tolist()
        answer = data.encoding.decode(list(itertools.takewhile(lambda t: t != data.sentences.end, tokens))).strip()
        right = answer in data.facts.answers(e, a)
        answers.add_row(wording.replace("{}", data.facts.entities[e]), Text(answer, style="green" if right else "red"),
                        data.facts.answers(e, a)[0])
    console.print(answers)


# ------------------------------------------------------------------------------------------------
# Setting up: whatever is wrong with the settings or the data ends here, with one line

with one_line_errors(sharding.stop):
    with sharding.together():
        given = parse(Config, sys.argv[1:])
        out_dir = folder_of(given)
        lock = checkpoint.lock(out_dir) if first and out_dir.is_dir() else None  # held until this process ends
        config, folder, header = settings(given, out_dir)
        device = pick_device(config.device)
        data = open_data(config, out_dir / "tokenizer.tiktoken" if header else None, fit="block_size" not in given)
        data_digest = data.digest()
        if header and header["data"] != data_digest:
            raise UserError(f"--resume: {config.data} has changed since the run in {out_dir} was saved; put it back as it "
                            "was, or start a new run with another --out_dir")
        config.vocab_size = data.encoding.n_vocab
        config.block_size = getattr(data, "block_size", config.block_size)
        if data.encoding.name in tiktoken.list_encoding_names():
            config.tokenizer = data.encoding.name  # that of shards: how it cuts words is not in the tokenizer.tiktoken of a run
        batches, rows = sharding.share_of_batch(config.batch_size, config.gradient_accumulation_steps)
        check_it_fits(config, device)
    sharding.check_same(dataclasses.asdict(config) | {
        "device": device.type, "data": data_digest, "the checkpoint": folder})

    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)
    with sharding.together():
        mesh = sharding.make_mesh(device, config.shards())
        with device:
            model = GPT(config, functools.partial(sharding.ShardedTable, mesh=mesh) if mesh else MemoryTable)
        if config.dtype == "float64":
            model.double()
        use_kernels(model.embedding.weight)  # a wrong NANOMEM_KERNELS is found here
        optimizers = optim.build_optimizer(model, config.learning_rate, config.mem_lr, config.weight_decay, mem_beta2=config.mem_beta2)
        if header:
            checkpoint.load(folder, model, optimizers)
    step, position, elapsed = 0, 0, 0.0  # position: how many sequences of the training data have been used
    if header:
        step, position, elapsed = header["iteration"], header["position"], header["elapsed_s"]
    with sharding.together():
        if first:
            try:
                out_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"out_dir={out_dir} can't be made ({error.strerror})") from None
            lock = lock or checkpoint.lock(out_dir)
            if not header:
                make_room(out_dir)
                tokenizer.save(data.encoding, out_dir / "tokenizer.tiktoken")
            checkpoint.write_text(out_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
            metrics = Metrics(out_dir / "metrics.jsonl", step)

parallel = sharding.data_parallel(model) if mesh else None
forward = parallel or model
forward = torch.compile(forward) if config.compile else forward
if parallel:
    # DDP lays out its buffers anew after its first backward pass, and where a gradient lies decides in which order the processes'
    # parts of it are added. With a pass ahead of all steps, a resumed run adds in the same order as one that was never stopped.
    x, y = data.batch("train", 0, config.batch_size)
    with autocast:
        loss = forward(x[rows].to(device), y[rows].to(device))[1]
    loss.backward()
    model.zero_grad()

core, sparse = model.count_parameters()
console.print(f"{config.data}, {config.ffn}: {core:,} parameters + {sparse:,} in {'experts' if config.ffn == 'moe' else 'memory tables'}, "
              f"{model.flops_per_token() / 1e6:.3f} million FLOPs a token, on {device.type if mesh else device} -> {out_dir}", soft_wrap=True)
if config.ffn != "memory" and not (config.ffn == "dense" and config.ffn_hidden):
    flops, parameters = model.beside_memory()
    console.print(f"beside --ffn=memory with these settings: {flops:.3f} times the FLOPs, {parameters:.3f} times the parameters", soft_wrap=True)
if mesh:
    groups, shards = mesh.shape
    shares, wire = f"1/{sharding.size()} of a batch", f"{8 * (core + (sparse if config.ffn == 'moe' else 0)) * (1 - 1 / sharding.size()) / 1e6:.1f} MB an update and process for gradients"
    if model.memory_layers():
        shares += f" and 1/{shards} of the tables' columns ({groups} group{'s' * (groups > 1)} of {shards})"
        wire += f", {sharding.bytes_per_token(model):,} bytes a token for tables{', and the gradients of rows touched' * (groups > 1)}"
    console.print(f"{sharding.size()} processes, each with {shares}; on the wire: {wire}", soft_wrap=True)
if data.facts:
    console.print(f"{len(data.facts.entities):,} entities x {len(data.facts.attributes)} attributes = {data.facts.codes.size:,} facts")
if header or config.resume:
    console.print(f"going on from iteration {step}" if header else f"no checkpoint in {out_dir} yet: starting from the beginning")

# ------------------------------------------------------------------------------------------------
# Training

interrupted = False


def interrupt(signum, frame):
    """The first Ctrl-C lets the step in progress finish; a second one stops at once."""
    global interrupted
    interrupted = True
    signal.signal(signum, signal.SIG_DFL)


signal.signal(signal.SIGINT, interrupt)
signal.signal(signal.SIGTERM, interrupt)
# A closed terminal sends SIGHUP, which Windows lacks and nohup has ignored.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    signal.signal(signal.SIGHUP, interrupt)

sequences_an_update = config.batch_size * config.gradient_accumulation_steps
floor = min(1.0, config.min_lr / config.learning_rate) if config.learning_rate else 0.0
started, window, recalled = time.perf_counter() - elapsed, (position, time.perf_counter()), {}
saved_step, stopping = step if header else None, False


def save():
    """A checkpoint of this moment."""
    global saved_step
    header = {"config": dataclasses.asdict(config), "iteration": step, "position": position, "data": data_digest,
              "elapsed_s": time.perf_counter() - started, "launch": sharding.launch()}
    checkpoint.save(out_dir, model, optimizers, header)
    saved_step = step


def batches_at(position):
    """This process's batches of the update whose sequences begin at this position of the training data."""
    return [data.batch("train", position + i * config.batch_size, config.batch_size) for i in batches]


display, waited = Display(config, step), 0.0
updates = ahead(batches_at, itertools.count(position, sequences_an_update))
with display.bar:
    while step < config.max_iters and not stopping:
        ratio = optim.schedule(step, config.warmup_iters, config.max_iters, floor)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * ratio
        if config.dropout:  # masks that depend on nothing but these numbers, so that a resumed run draws the same
            torch.manual_seed(int(random_stream(config.seed, DROPOUT, step, sharding.rank()).integers(2**63)))

        asked = time.perf_counter()
        passes = next(updates)
        waited += time.perf_counter() - asked
        counts = [count_targets(y) for _, y in passes]
        all_targets, = sharding.total(sum(counts))  # of all passes, in all processes
        train_loss = 0.0
        for i, (x, y) in enumerate(passes):
            with parallel.no_sync() if parallel and i + 1 < len(passes) else contextlib.nullcontext():
                with autocast:
                    _, loss = forward(x[rows].to(device), y[rows].to(device))
                    loss = loss * (counts[i] / max(1, all_targets))
                loss.backward()
            train_loss += loss.item()
        train_loss, stopping = sharding.total(train_loss, interrupted)
        stop_unless_finite(train_loss, "the loss", step + 1)
        sharding.add_replicas(model)
        for norm in optim.clip_gradients(model, config.grad_clip or math.inf):
            stop_unless_finite(norm.item(), "the gradient's norm", step + 1)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        position += sequences_an_update

        evaluates = step % config.eval_interval == 0 or step == config.max_iters
        if step % config.log_interval == 0 or evaluates:
            now = time.perf_counter()
            row = {"iter": step, "tokens": position * config.block_size, "elapsed_s": now - started,
                   "tokens_per_sec": (position - window[0]) * config.block_size / (now - window[1]), "train_loss": train_loss,
                   "data_wait": waited / (now - window[1])}
            if evaluates:
                # All facts at the end, 400 of each kind on the way: a second instead of ten.
                result, recalled = evaluate(most=20_000 if step == config.max_iters else 400)
                stop_unless_finite(result["val_loss"], "the validation loss", step)
                row |= result
                display.line(row)
            display.update(row)
            if first:
                metrics.write(row)
            window, waited = (position, time.perf_counter()), 0.0
        if evaluates and step < config.max_iters:
            try:
                save()
            except UserError as error:  # a full disk: there may be room the next time
                console.print(f"{error}; training goes on", soft_wrap=True)
if saved_step != step:
    with one_line_errors(sharding.stop):
        save()

# ------------------------------------------------------------------------------------------------
# What came of it

if stopping and step < config.max_iters:
    command = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', sharding.size())}" if mesh else "python"
    console.print(f"stopped at iteration {step}, all saved. To go on: {command} train.py --resume "
                  f"--out_dir={shlex.quote(str(out_dir))}", soft_wrap=True)
    sharding.stop(130)
if data.facts:
    tell_what_it_knows(recalled or evaluate(most=20_000)[1])
console.print(f"Talk to it: python sample.py --out_dir={shlex.quote(str(out_dir))}", soft_wrap=True)
sharding.stop()
