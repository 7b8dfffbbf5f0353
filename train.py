"""
Trains a small language model with memory layers, and prints what it has learned.

    python train.py                        five facts each about 1,500 invented people, on a laptop
    python train.py --ffn=dense            the same without memory, at equal FLOPs
    python train.py --data=world           facts about cities; facts.jsonl: your own; book.txt: your text
    python train.py configs/world.toml     a recipe; --key=value after it changes a setting
    python train.py --init_from=out/people-memory --data=facts.jsonl      teach a trained model new facts
    python train.py --help                 every setting
    torchrun --standalone --nproc_per_node=8 train.py       on eight GPUs, or in eight processes on a CPU

From top to bottom: set-up, loop, report. What surrounds them is in nanomem/run.py.

- out_dir gets config.json, metrics.jsonl and checkpoints; --resume continues as if never stopped, bit for
  bit
- Ctrl-C saves before it stops
- several processes share the batches and the columns of memory tables; without --dropout, the results do
  not depend on how many there are, up to rounding
"""

import sys

from nanomem.cli import one_line_errors, parse, safe_streams
from nanomem.config import Config, keep_freed_memory, pick_device

safe_streams()
with one_line_errors():  # --help and mistakes are answered before the slow imports
    given = parse(Config, sys.argv[1:])

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import shlex
from collections.abc import Callable

import torch
from rich.console import Console

from nanomem import checkpoint, optim, recall, run, sharding, teaching
from nanomem.cli import UserError
from nanomem.data import DROPOUT, ahead, random_stream
from nanomem.memory import MemoryTable
from nanomem.model import GPT
from nanomem.observe import SlotUsage, observe_lookups
from nanomem.ops import use_kernels

# ------------------------------------------------------------------------------------------------
# Set-up


def set_up(given: dict, console: Console) -> run.Job:
    """Everything that is decided before the loop. A mistake in the settings or the data is raised here."""
    with sharding.together():
        out_dir = run.folder_of(given)
        lock = run.lock_existing(out_dir)
        folder, header = run.find_checkpoint(given, out_dir, console)
        trained = run.model_to_teach(given, header, console)
        config = run.settings(given, out_dir, header, trained)
        device = pick_device(config.device)
        with console.status("preparing the data"):
            data = run.open_data_of(config, given, out_dir, header, trained)
        batches, sequences = sharding.share_of_batch(config.batch_size, config.gradient_accumulation_steps)
        run.check_it_fits(config, device, sequences)
    same = {"device": device.type, "data": data.digest(), "the checkpoint": folder,
            "the model to teach": trained and trained.files}
    sharding.check_same(dataclasses.asdict(config) | same)

    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)
    with sharding.together():
        mesh = sharding.make_mesh(device, config.shards())
        make_table = functools.partial(sharding.ShardedTable, mesh=mesh) if mesh else MemoryTable
        with device:
            model = GPT(config, make_table)
        if config.dtype == "float64":
            model.double()
        use_kernels(model.embedding.weight)  # finds a wrong NANOMEM_KERNELS
        if trained:
            trained.load(model)
        teaching.freeze(model, config.train)
        optimizers = optim.build_optimizer(
            model, config.learning_rate, config.mem_lr, config.weight_decay, mem_beta2=config.mem_beta2)
        if header:
            checkpoint.load(folder, model, optimizers)
    job = run.Job(config, out_dir, device, data, model, optimizers, mesh, batches, sequences, lock)
    if header:
        job.step, job.position, job.elapsed = header["iteration"], header["position"], header["elapsed_s"]
        job.saved_step = job.step
        counts = checkpoint.read_counts(folder)
        if counts:  # a model that was saved without any is taught without
            job.counts = teaching.count_before(counts, model, optimizers, job.step)
        else:
            job.counts = None
        job.ended = header.get("ended", False) and not given.keys() & {"max_iters", "stop_at"}
    with sharding.together():
        if config.init_from:
            run.prepare_teaching(job, header, trained, console)
        run.prepare_folder(job, console)
    sharding.check_same({f"earlier data {old.number}": old.data.digest() for old in job.earlier})
    return job


def wrap(job: run.Job):
    """(the model to call in the loop: data parallel and compiled if asked for; its DistributedDataParallel,
    None in one process or if only tables are trained)
    """
    parallel = sharding.data_parallel(job.model) if job.mesh else None
    forward = parallel or job.model
    forward = torch.compile(forward) if job.config.compile else forward
    if parallel:
        # After its first backward pass DDP arranges its buckets anew, and with them the order in which
        # gradients are added. With one pass ahead of all steps, a resumed run adds in the same order as one
        # never stopped.
        x, y = job.data.batch("train", 0, job.config.batch_size)
        with job.autocast:
            loss = forward(*job.mine(x, y))[1]
        loss.backward()
        job.model.zero_grad()
    return forward, parallel


# ------------------------------------------------------------------------------------------------
# Loop


def train(job: run.Job, console: Console) -> tuple[dict, bool]:
    """Trains until max_iters, stop_at or an interrupt. Returns what the last evaluation recalled, and whether
    it was interrupted.
    """
    config, per_update = job.config, job.config.batch_size * job.config.gradient_accumulation_steps
    forward, parallel = wrap(job)
    interrupt, interrupted, recalled = run.Interrupt(), False, {}
    display, pace = run.Display(config.max_iters, job.step, console), run.Pace(job)
    updates = ahead(functools.partial(batches_at, job), itertools.count(job.position, per_update))
    with display.bar:
        while job.step < config.max_iters and not (job.ended or interrupted):
            set_learning_rates(job)
            with pace.waiting():
                passes = next(updates)
            losses = backward(job, forward, parallel, passes)
            norms = clip(job)
            train_loss, interrupted = check(job, losses, norms, interrupt)
            update(job)
            job.step += 1
            job.position += per_update

            job.ended = job.step == config.max_iters
            evaluates = job.ended or job.step % config.eval_interval == 0
            if evaluates or job.step % config.log_interval == 0:
                record = {"iter": job.step, "train_loss": train_loss} | pace.figures()
                if evaluates:
                    progress = functools.partial(display.evaluating, job.step)
                    result, recalled = evaluate_or_end(job, progress)
                    run.stop_unless_finite(result["val_loss"], "the validation loss", job.step, job.out_dir)
                    record |= result
                    display.line(record)
                display.update(record)
                job.write_metrics(record)
                pace.restart()
            if evaluates and not job.ended:
                try:
                    job.save()
                except UserError as error:  # a full disk: there may be room the next time
                    console.print(f"{error}; training continues", soft_wrap=True)
    return recalled, interrupted and not job.ended


def backward(job, forward, parallel, passes):
    """Adds up the gradients of an update's passes, each weighted by its share of the targets. Returns the
    passes' parts of the loss, () each, still on the device.
    """
    if job.config.dropout:  # seeded by the step alone, so that a resumed run draws the same masks
        stream = random_stream(job.config.seed, DROPOUT, job.step, sharding.rank())
        torch.manual_seed(int(stream.integers(2**63)))
    counts = [job.count_targets(y) for _, y in passes]
    (all_targets,) = sharding.total(sum(counts))  # of all passes, in all processes
    losses = []
    with observe_lookups(job.model, job.top_slots):
        for number, (x, y), count in zip(job.batches, passes, counts):
            number_tokens(job, number)
            # Gradients are added up over the processes after the last pass.
            waits = parallel and number != job.batches[-1]
            with parallel.no_sync() if waits else contextlib.nullcontext():
                with job.autocast:
                    loss = forward(*job.mine(x, y))[1] * (count / max(1, all_targets))
                loss.backward()
            losses.append(loss.detach())
    return losses


def number_tokens(job, batch_number):
    """Gives memory layers the number of the next pass's first token, which decides what mem_dropout drops."""
    config = job.config
    if not config.mem_dropout:
        return
    sequence = job.position + batch_number * config.batch_size + job.sequences.start
    for i, layer in job.model.memory_layers().items():
        if layer.first_token is None:
            layer.first_token = torch.zeros((), dtype=torch.int64, device=job.device)
        layer.first_token.fill_(numbers_from(config.seed, i) + sequence * config.block_size)


@functools.cache
def numbers_from(seed, layer_number):
    """The number of a layer's first token: different for each layer and seed, so that their masks differ."""
    return int(random_stream(seed, DROPOUT, layer_number).integers(2**32))


def clip(job):
    """Adds up the tables' gradients over the processes, and clips. Returns the norms, () each, still on the
    device.
    """
    sharding.add_replicas(job.model)
    if job.top_slots:
        job.top_slots.restrict()
    return optim.clip_gradients(job.model, job.config.grad_clip or math.inf, job.optimizers)


def check(job, losses, norms, interrupt):
    """Stops the run if an update's loss or a gradient's norm isn't finite. Returns the loss, and whether an
    interrupt was requested.
    """
    numbers = torch.stack([*losses, *norms]).tolist()  # the only wait for the GPU in an update
    train_loss, interrupted = sharding.total(sum(numbers[:-2]), interrupt.requested)
    run.stop_unless_finite(train_loss, "the loss", job.step + 1, job.out_dir)
    for norm in numbers[-2:]:
        run.stop_unless_finite(norm, "the gradient's norm", job.step + 1, job.out_dir)
    return train_loss, interrupted


def update(job):
    """Steps the optimizers."""
    for optimizer in job.optimizers:
        optimizer.step()
        optimizer.zero_grad()


def set_learning_rates(job):
    """Sets the optimizers' learning rates for the next update."""
    config = job.config
    floor = min(1.0, config.min_lr / config.learning_rate) if config.learning_rate else 0.0
    ratio = optim.schedule(job.step, config.warmup_iters, config.max_iters, floor)
    for optimizer in job.optimizers:
        for param_group in optimizer.param_groups:
            param_group["lr"] = param_group["peak_lr"] * ratio


def batches_at(job, position):
    """This process's batches of the update whose sequences begin at this position of the training data."""
    size = job.config.batch_size
    return [job.data.batch("train", position + i * size, size) for i in job.batches]


# ------------------------------------------------------------------------------------------------
# Evaluation and report


@torch.no_grad()
def evaluate(job: run.Job, most: int, progress: Callable[[float], None]) -> tuple[dict, dict]:
    """Validation loss, recall and slot usage for metrics.jsonl; and the recall of each kind of question, in
    detail.

    most: how many facts of a kind to ask about. progress: is called with the share that is done. Several
    processes share the batches of the loss. Each of them computes all of the recall, which is quick, since
    they read their tables together.
    """
    data = job.data
    job.model.eval()
    usage, recalled = SlotUsage(), {}
    with job.autocast:
        with observe_lookups(job.model, usage):
            # The recall of facts takes nearly all of the time.
            result = {"val_loss": loss_on(job, data, progress=None if data.facts else progress)}
        if data.facts:
            recalled = recall.measure(job.model, data.sentences, most, progress)
        old = ask_earlier(job, most)
    result |= teaching.figures(job.earlier, old)
    job.still_known = [earlier.describe(now) for earlier, now in zip(job.earlier, old)]
    job.model.train()
    if data.facts:
        main = recalled.get("report", recalled["taught"])  # facts without questions have only taught prompts
        result["recall"] = main["all"]
        result |= {name: main[name] for name in ("answer_nll", "bits_known")}
        for band in ("head", "torso", "tail"):
            result[f"recall_{band}"] = main[band]
        for kind in ("select", "taught"):
            if kind in recalled:
                result[f"recall_{kind}"] = recalled[kind]["all"]
        if "select" in recalled:
            result["answer_nll_select"] = recalled["select"]["answer_nll"]
    else:
        result["bits_per_byte"] = result["val_loss"] / math.log(2) / data.bytes_per_token
    for weight in usage.weight.values():
        sharding.add(weight)
    if usage.weight:
        result |= {"mem_usage": usage.usage(), "mem_kl": usage.kl()}
    return result, recalled


def loss_on(job: run.Job, data, progress: Callable[[float], None] | None = None) -> float:
    """The mean loss of eval_iters batches of the val split, which the processes share."""
    losses, targets, size = 0.0, 0, job.config.batch_size
    for i in range(job.config.eval_iters):
        x, y = data.batch("val", i * size, size)
        count = job.count_targets(y)
        losses += job.model(*job.mine(x, y))[1].item() * count
        targets += count
        if progress:
            progress((i + 1) / job.config.eval_iters)
    losses, targets = sharding.total(losses, targets)
    return losses / max(1, targets)


def evaluate_or_end(job: run.Job, progress: Callable[[float], None]) -> tuple[dict, dict]:
    """What `evaluate` returns. Ends the run if stop_at is reached.

    Before the end, it asks about 400 facts of each kind: a second instead of ten.
    """
    result, recalled = evaluate(job, run.MOST_ASKED if job.ended else 400, progress)
    if not job.ended and is_enough(job, recalled):
        result, recalled = evaluate(job, run.MOST_ASKED, progress)
        job.ended = is_enough(job, recalled)
    return result, recalled


def is_enough(job: run.Job, recalled: dict) -> bool:
    """Whether all processes find that the model recalls as much as stop_at asks for."""
    reached = bool(recalled) and recalled["taught"]["all"] >= job.config.stop_share()
    return sharding.total(reached)[0] == sharding.size()


@torch.no_grad()
def measure_before(job: run.Job, console: Console):
    """Measures what a model that is taught knows of earlier data."""
    if not job.earlier or job.saved_step is not None:
        return
    job.model.eval()
    with console.status("testing what it already knows"), job.autocast:
        known = ask_earlier(job, run.MOST_ASKED)
    for earlier, before in zip(job.earlier, known):
        earlier.before = before
    job.model.train()
    job.write_metrics({"iter": 0, "tokens": 0, "elapsed_s": 0.0} | teaching.figures(job.earlier, known))


def ask_earlier(job: run.Job, most: int) -> list:
    """What the model knows of each set of earlier data: see teaching.Earlier.measure."""
    return [old.measure(job.model, most, functools.partial(loss_on, job)) for old in job.earlier]


def main(given: dict):
    """One run."""
    keep_freed_memory()
    sharding.start()
    # Only the first process prints. Users' data is shown as it is.
    console = Console(highlight=False, markup=False, emoji=False, quiet=sharding.rank() != 0)
    with one_line_errors(sharding.stop):
        job = set_up(given, console)
    run.describe(job, console)
    with one_line_errors(sharding.stop):
        measure_before(job, console)
    recalled, interrupted = train(job, console)
    if job.saved_step != job.step:
        with one_line_errors(sharding.stop):
            job.save()
    if interrupted:
        console.print(f"stopped at iteration {job.step}, all saved. To continue: {run.how_to_resume(job)}",
                      soft_wrap=True)
        sharding.stop(130)
    if job.step < job.config.max_iters:
        console.print(f"stopped after {job.step} updates: {job.config.stop_share():.0%} of the taught "
                      "prompts are answered (--stop_at)")
    if not recalled and (job.data.facts or (job.earlier and not job.still_known)):  # resumed at its end
        recalled = evaluate(job, run.MOST_ASKED, progress=lambda share: None)[1]
    if job.data.facts:
        run.report_facts(job, recalled, console)
    else:
        run.report_text(job, console)
    run.report_teaching(job, console)
    folder = shlex.quote(str(job.out_dir))
    console.print(f"Talk to it: python sample.py --out_dir={folder}", soft_wrap=True)
    console.print(f"See what it learnt, as a page: python -m nanomem.report {folder}", soft_wrap=True)
    sharding.stop()


if __name__ == "__main__":
    main(given)
