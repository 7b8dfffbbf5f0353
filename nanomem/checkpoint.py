"""
Checkpoints: a folder with the model and the optimizers' state in safetensors files, one from each process
of the first group that shares the tables, and a JSON file with the settings, how far the run is, and the
files' sizes.

    out/people-memory/checkpoint-2560/checkpoint.json
    out/people-memory/checkpoint-2560/part-1-of-1.safetensors

- loaded as data, never as code: no pickle
- loaded into any number of processes, whatever number wrote it: the files are laid out as
  torch.distributed.checkpoint's HuggingFaceStorageReader reads them, which cuts columns anew
- written under another name and moved into place, so that a kill at any moment leaves a whole one; the one
  before is kept too, and used where a file of the newest is missing or cut
"""

import contextlib
import difflib
import json
import os
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanomem import sharding
from nanomem.cli import UserError
from nanomem.optim import named_tables

try:
    import fcntl
except ModuleNotFoundError:  # Windows: two runs in one folder don't notice each other
    fcntl = None

HEADER = "checkpoint.json"
FORMAT = 3  # raised when a run saved before can't be continued exactly; without one the format is 1
KEPT = 2


# ------------------------------------------------------------------------------------------------
# Files


def write_atomically(path, write):
    """Calls write(temporary path), then moves the file to `path`, on disk before this returns."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        kept = "what was there before is kept" if path.exists() else "nothing was there before"
        raise UserError(f"could not write {path} ({error}); {kept}") from None


def sync(path):
    """Returns when a file's content is on disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path):
    """Returns when the names in a folder are on disk (not on Windows, which can't)."""
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def write_text(path, text):
    """A text file, written atomically."""
    write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path):
    """A JSON file's content, None if there is no such file. Raises UserError for a file that is not
    JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None


def is_run_or_export(folder: Path) -> bool:
    """Whether a folder's config.json is that of a run or an export of nanomem, and not of another program."""
    try:
        return "mem_n_keys" in (read_json(folder / "config.json") or {})
    except (UserError, NotADirectoryError):
        return False


def lock(out_dir):
    """Locks a folder for this process until it ends, however it ends. Returns an open file, to be kept.

    Raises UserError naming the process that has the lock.
    """
    try:
        file = open(Path(out_dir) / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"out_dir={out_dir} can't be written to ({error.strerror})") from None
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another process"
        raise UserError(
            f"{holder} is training in {out_dir}; wait until it ends, or name another folder with --out_dir"
        ) from None
    except OSError:
        pass  # some network file systems have no locks
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file


# ------------------------------------------------------------------------------------------------
# Which checkpoint


def folders(out_dir: str | Path) -> list[Path]:
    """The folders of out_dir's checkpoints, the newest first."""
    by_iteration = {}
    for path in Path(out_dir).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal():  # not one that is still being written
            by_iteration[int(number)] = path
    return [by_iteration[iteration] for iteration in sorted(by_iteration, reverse=True)]


def none_in(out_dir: str | Path) -> str:
    """The message for a folder without checkpoints, with the most similar folder beside it that has some."""
    out_dir = Path(out_dir)
    siblings = {path.parent.name for path in out_dir.parent.glob("*/checkpoint-*") if folders(path.parent)}
    close = difflib.get_close_matches(out_dir.name, siblings - {out_dir.name}, n=1)
    likely = out_dir.with_name(close[0]) if close else None
    if folders(out_dir.parent):  # it names a checkpoint, not its run
        likely = out_dir.parent
    return f"there is no checkpoint in {out_dir}" + (f" (did you mean {likely}?)" if likely else "")


class NewerFormat(UserError):
    """A checkpoint that only a newer version of nanomem can read."""


def read_header(folder: Path) -> dict:
    """The header of a checkpoint. Raises UserError naming the file that is missing, cut short or damaged."""
    header = read_json(folder / HEADER)
    if header is None:
        raise UserError(f"{folder / HEADER} is missing")
    try:
        sizes = header["files"].items()
        header["config"], header["iteration"]
        is_newer = header.get("format", 1) > FORMAT
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / HEADER} is not the header of a nanomem checkpoint") from None
    if is_newer:
        newer = f"has format {header['format']}, of a newer nanomem"
        raise NewerFormat(f"{folder} {newer}; this one reads up to {FORMAT}")
    for name, size in sizes:
        path = folder / name
        if not path.exists():
            raise UserError(f"{path} is missing")
        found = path.stat().st_size
        if found != size:
            raise UserError(f"{path} has {found:,} bytes, and was written with {size:,}")
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error})") from None
    return header


def newest(out_dir: str | Path) -> tuple[Path | None, dict | None, dict[Path, str]]:
    """out_dir's newest whole checkpoint: (folder, header, {folder of a newer one: what is wrong with it}).

    (None, None, {}) if there are no checkpoints. Raises UserError if none is whole, and if the newest is of
    a newer version of nanomem: continuing from an older one would replace it.
    """
    refused = {}
    for folder in folders(out_dir):
        try:
            return folder, read_header(folder), refused
        except NewerFormat:
            raise
        except UserError as error:
            refused[folder] = str(error)
    if refused:
        raise UserError(f"no checkpoint in {out_dir} is whole: {'; '.join(refused.values())}")
    return None, None, {}


# ------------------------------------------------------------------------------------------------
# Saving and loading


def _optimizer_tensors(model, optimizers):
    """{name: tensor} of the optimizers' state; the name holds the parameter's."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return {
        f"optimizer.{name_of[id(p)]}.{key}": tensor
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, tensor in state.items()
    }


def _tables(model):
    """{name of its values: ShardedTable}"""
    return {name: table for name, table in named_tables(model) if isinstance(table, sharding.ShardedTable)}


def _part(model, optimizers, counts):
    """What this process writes: (its number, of how many, {name: tensor}, {name: its first row and column}).

    The processes of the first group write their columns of the tables. The first of them also writes
    everything else, which is the same in all processes.
    """
    tables = {f"model.{name}": table for name, table in _tables(model).items()}
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= _optimizer_tensors(model, optimizers) | counts
    mesh = next((table.mesh for table in tables.values()), None)
    group, number = mesh.get_coordinate() if mesh else (sharding.rank(), 0)
    if number:
        tensors = {name: tensors[name] for name in tables}
    begins = {name: [0] * tensor.dim() for name, tensor in tensors.items()}
    begins |= {name: [0, table.columns.start] for name, table in tables.items()}
    count = mesh["shard"].size() if mesh else 1
    return number, count, tensors if group == 0 else {}, begins


def save(out_dir: str | Path, model: torch.nn.Module, optimizers: list, header: dict,
         counts: dict | None = None):
    """Writes out_dir/checkpoint-ITERATION, then deletes all but the newest two. All processes call it.

    header: for JSON, with `config` and `iteration`. counts: further tensors by name, for `read_counts`.
    Raises UserError in all processes if the checkpoint can't be written; those before it are kept.
    """
    folder = Path(out_dir) / f"checkpoint-{header['iteration']}"
    temporary = folder.with_name(folder.name + ".tmp")
    number, count, tensors, begins = _part(model, optimizers, counts or {})
    files = [temporary / f"part-{i + 1}-of-{count}.safetensors" for i in range(count)]
    is_main = sharding.rank() == 0
    try:
        with sharding.together():
            if is_main:
                for stale in Path(out_dir).glob("checkpoint-*.tmp"):
                    shutil.rmtree(stale)
                temporary.mkdir()
        with sharding.together():
            if tensors:  # torch.distributed.checkpoint's own writer would make two copies of them
                info = {name: {"saved_offsets": begin} for name, begin in begins.items()}  # for its reader
                save_file(tensors, files[number], metadata={"DCP_SHARDING_INFO": json.dumps(info)})
                sync(files[number])
        with sharding.together():
            if is_main:
                about = {"format": FORMAT, "files": {path.name: path.stat().st_size for path in files}}
                write_text(temporary / HEADER, json.dumps(header | about, indent=2) + "\n")
                _move_into_place(temporary, folder)
    except UserError as error:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        before = folders(out_dir)
        kept = f"{before[0].name} is kept" if before else "there is none before it"
        raise UserError(f"could not write {folder} ({error}); {kept}") from None


def _move_into_place(temporary, folder):
    """Gives a checkpoint its name, and deletes the oldest ones."""
    shutil.rmtree(folder, ignore_errors=True)  # only one that `newest` refused can have this name
    os.replace(temporary, folder)
    sync_folder(folder.parent)
    newest_first = folders(folder.parent)
    oldest = newest_first.index(folder) + KEPT  # those refused are newer, and stay
    for old in newest_first[oldest:]:
        shutil.rmtree(old, ignore_errors=True)


COUNTS = ("reads.", "updates")  # how the names of counts begin; see teaching.py


def read_counts(folder: Path) -> dict[str, torch.Tensor]:
    """The counts in a checkpoint or an export; {} if it has none. Raises UserError for a damaged file."""
    return read_tensors(folder, lambda name: name.startswith(COUNTS))


def read_tensors(folder: Path, is_wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint or an export whose names are wanted, of those that are in one piece.

    Raises UserError for a damaged file.
    """
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys() if is_wanted(name)}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} can't be loaded ({error})") from None
    return found


def load(folder: Path, model: torch.nn.Module, optimizers: list = (), prefix: str = "model."):
    """Fills model and optimizers from a checkpoint, each process with the columns it holds.

    prefix: what names of parameters begin with; "" in an export. Raises UserError if a file is damaged, or of
    a model of another shape.
    """
    import torch.distributed.checkpoint as dcp  # takes a second: only when it is needed
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    # What damaged files raise
    damage = (SafetensorError, OSError, KeyError, ValueError, RuntimeError, dcp.CheckpointException)
    try:
        reader = HuggingFaceStorageReader(str(folder))
        saved = reader.read_metadata().state_dict_metadata
        target = _target(folder, saved, model, optimizers, prefix)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "torch.distributed is disabled"
            )  # each process reads for itself
            dcp.load(target, storage_reader=reader, no_dist=True)
    except damage as error:
        raise UserError(f"{folder} can't be loaded ({error})") from None


def _target(folder, saved, model, optimizers, prefix):
    """{name: the tensor to fill} for what a checkpoint has saved. Makes the optimizers' state."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    target, tables = {}, _tables(model)
    for name, p in model.named_parameters():
        whole = p.detach()
        if name in tables:
            whole = DTensor.from_local(whole, tables[name].mesh, [Replicate(), Shard(1)], run_check=False)
        if prefix + name not in saved:
            raise UserError(f"{folder} has no parameter {name}: another version of nanomem, "
                            "or another kind of model, saved it")
        shape = tuple(saved[prefix + name].size)
        if shape != tuple(whole.shape):
            raise UserError(f"{folder}: {name} has shape {shape}, the model's is {tuple(whole.shape)}")
        target[prefix + name] = whole
        begin = f"optimizer.{name}."
        for optimizer in optimizers:
            if not any(p is q for param_group in optimizer.param_groups for q in param_group["params"]):
                continue
            optimizer.state[p] = {}
            for key, about in saved.items():
                if key.startswith(begin):
                    tensor = torch.empty(about.size, dtype=about.properties.dtype, device=p.device)
                    optimizer.state[p][key.removeprefix(begin)] = tensor
                    target[key] = tensor
    return target
