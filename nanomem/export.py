"""
A trained model alone, for others to load: a folder with

    model.safetensors       every parameter once, under the names of GPT.named_parameters(), and how many
                            updates have read each memory slot
    config.json             the settings of its shape, and what it learned
    tokenizer.tiktoken      one token a line: its bytes in base64, and its number

    from nanomem import export; model, config = export.load("shared/model")
"""

import dataclasses
import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanomem import checkpoint, tokenizer
from nanomem.cli import UserError
from nanomem.config import DESCRIBES_DATA, Config, GPTConfig
from nanomem.model import GPT, sized

FILE = "model.safetensors"


def save(folder, model, encoding, config, counts=None):
    """Writes a model to a folder, with the counts of its checkpoint (checkpoint.read_counts).

    Raises UserError if it can't be written, or would overwrite something.
    """
    folder = Path(folder)
    for name in (FILE, "config.json", "tokenizer.tiktoken"):
        if (folder / name).exists():
            raise UserError(f"{folder} already has a {name}; name another folder")
    kept = {f.name for f in dataclasses.fields(GPTConfig)} | {*DESCRIBES_DATA, "tokenizer", "earlier"}
    settings = {key: value for key, value in dataclasses.asdict(sized(config)).items() if key in kept}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"could not make the folder {folder} ({error.strerror})") from None
    checkpoint.write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    tokenizer.save(encoding, folder / "tokenizer.tiktoken")
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    tensors |= counts or {}
    checkpoint.write_atomically(
        folder / FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    # safetensors makes files for their owner alone.
    os.chmod(folder / FILE, os.stat(folder / "config.json").st_mode)


def read_config(folder: Path) -> Config:
    """The settings of an export. Raises UserError if they are missing or damaged."""
    settings = checkpoint.read_json(folder / "config.json")
    if settings is None:
        raise UserError(f"{folder / 'config.json'} is missing")
    return Config.from_saved(settings, folder)


def load(folder):
    """(the GPT, its Config) that `save` wrote. Raises UserError naming what is missing, damaged or of
    another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    model = GPT(config)
    try:
        tensors = load_file(folder / FILE)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / FILE} can't be loaded ({error})") from None
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(checkpoint.COUNTS)}
    parameters = dict(model.named_parameters())
    for name in parameters.keys() | tensors.keys():
        shapes = [tuple(group[name].shape) if name in group else None for group in (tensors, parameters)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{folder / FILE}: {name} has shape {shapes[0]}, that of config.json's model is {shapes[1]}"
            )
        parameters[name].data = tensors[name]
    return model, config
