"""
Checkpoints: one safetensors file with the model, the optimizers' state, the random number generators and, as
JSON in its header, the settings and where the run stands.

- loaded as data, never as code: no pickle
- written under another name and moved into place, so that a kill at any moment leaves the old one or the new one
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanomem.config import UserError

FILE = "checkpoint.safetensors"


def write_atomically(path, write):
    """Calls write(temporary path), then moves the file to `path`, on disk before this returns."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):  # the new name, too, reaches the disk (not on Windows)
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        kept = "what was there before is kept" if path.exists() else "nothing was there before"
        raise UserError(f"could not write {path} ({error}); {kept}") from None


def write_text(path, text):
    """A text file, written atomically."""
    write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path):
    """A JSON file's content, None if there is no such file. Raises UserError for a file that is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None


def _optimizer_tensors(model, optimizers):
    """{name: tensor} of the optimizers' state; the name holds the parameter's."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return {f"optimizer.{name_of[id(p)]}.{key}": tensor
            for optimizer in optimizers for p, state in optimizer.state.items() for key, tensor in state.items()}


def save(out_dir, model, optimizers, header):
    """Writes out_dir/checkpoint.safetensors. header: a dict for JSON, `config` and `iteration` among it.

    Raises UserError, the checkpoint before kept, if it can't be written.
    """
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= _optimizer_tensors(model, optimizers)
    tensors["rng.cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    path = Path(out_dir) / FILE
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"nanomem": json.dumps(header)}))


def read_header(out_dir):
    """The header of out_dir's checkpoint, None if there is no checkpoint. Raises UserError for a file that is not one."""
    path = Path(out_dir) / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["nanomem"])
            header["config"], header["iteration"]  # a KeyError or TypeError for another kind of header
            return header
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a whole nanomem checkpoint ({error})") from None


def load(out_dir, model, optimizers=()):
    """Fills model, optimizers and random number generators from out_dir's checkpoint.

    Raises UserError if the file is damaged or is of a model of another shape.
    """
    path = Path(out_dir) / FILE
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name, p in model.named_parameters():
                saved = file.get_tensor(f"model.{name}")
                if saved.shape != p.shape:
                    raise UserError(f"{path}: {name} has shape {tuple(saved.shape)}, the model's is {tuple(p.shape)}")
                p.data.copy_(saved)
                for optimizer in optimizers:
                    if any(p is q for group in optimizer.param_groups for q in group["params"]):
                        prefix = f"optimizer.{name}."
                        optimizer.state[p] = {key.removeprefix(prefix): file.get_tensor(key).to(p.device)
                                              for key in file.keys() if key.startswith(prefix)}
            if optimizers:
                torch.set_rng_state(file.get_tensor("rng.cpu"))
                device = next(model.parameters()).device
                if device.type == "cuda" and "rng.cuda" in file.keys():
                    torch.cuda.set_rng_state(file.get_tensor("rng.cuda"), device)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} can't be loaded ({error})") from None
