"""
A memory for a pretrained language model: new facts, and nothing else changed.

    python -m nanomem.retrofit --model=NAME_OR_FOLDER_OR_GGUF --data=facts.jsonl    teach it; out/facts-memory
    python -m nanomem.retrofit --model=NAME --memory=out/facts-memory               ask it

    from nanomem.retrofit import add_memory, load_memory, save_memory
    memory = add_memory(model, layers=[4, 8, 12])
    ...                                          # train with optim.build_optimizer(memory)
    save_memory(model, "out/facts")              # only what was added

A memory layer beside a feed-forward module adds what it reads to the module's output. Its values start at
zero, so at first nothing changes. Only values are trained: the model, the queries and the keys stay as they
are. pretrained.py has what surrounds it: facts, loss, the loop.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from nanomem.cli import UserError, check_limits, one_line_errors, parse, safe_streams, setting


@dataclass
class Settings:
    """The command line."""

    model: str = setting("", "name of a pretrained model, its folder, or a .gguf file",
                         section="What to teach, and what to ask")
    data: str = setting("", "facts to teach: a .jsonl file, as for train.py", path=True)
    memory: str = setting("", "folder of the memory; by default out/NAME-memory, NAME being that of the data",
                          path=True)
    start: str = setting("", "a prompt to answer; without it, each line of the input, or a dialogue")
    text: str = setting("", "a text to measure the loss on; by default a short built-in one",
                        path=True)
    max_new_tokens: int = setting(40, "tokens of an answer at most", least=1)

    layers: str = setting("4,8,12", "numbers of the layers to put a memory beside, from 0",
                          section="Memory, when it is made")
    n_keys: int = setting(256, "half keys; each layer's memory has n_keys ** 2 slots", least=1)
    heads: int = setting(4, "lookups per token", least=1)
    knn: int = setting(16, "slots read per lookup", least=1)
    k_dim: int = setting(256, "length of a query, an even number", least=2)
    target: str = setting("mlp", "name of the feed-forward module inside a layer")

    slots: str = setting(
        "shared", "shared: teach only slots that a fact's wordings have in common and few other facts read; "
        "all: every slot", choices=("shared", "all"), section="Teaching")
    mem_lr: float = setting(
        0.0, "learning rate of the values; 0: 0.2 for shared slots, 0.05 for all", least=0)
    batch_size: int = setting(8, "statements per update", least=1)
    max_iters: int = setting(3000, "updates at most", least=1)
    stop_at: float = setting(1.0, "share of the taught statements at whose recall teaching stops", least=0)
    seed: int = setting(1337, "random seed of keys, queries and the order of statements", least=0)
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the first available of cuda, mps, cpu")
    dtype: str = setting("float32", "of the model; the memory is always float32",
                         choices=("float32", "bfloat16", "float16"))

    def check(self):
        """Raises UserError or ValueError naming the first setting that is missing or invalid."""
        check_limits(self)
        if not self.model:
            raise UserError("expected --model=NAME, a folder or a .gguf file")
        if not self.data and not self.memory:
            raise UserError("expected --data=facts.jsonl to teach, or --memory=out/facts-memory to ask")
        if self.data and not Path(self.data).is_file():
            raise UserError(f"--data={self.data}: there is no such file; expected facts in a .jsonl file")
        if self.text and not Path(self.text).is_file():
            raise UserError(f"--text={self.text}: there is no such file")
        if self.stop_at > 1:
            raise UserError(f"--stop_at is a share of the statements, from 0 to 1; got {self.stop_at:g}")
        if not all(layer.strip().isdecimal() for layer in self.layers.split(",")):
            raise UserError(f"--layers must be numbers such as 4,8,12; got {self.layers!r}")


ONLY_TO_ASK = ("start", "max_new_tokens")
ONLY_TO_TEACH = ("text", "layers", "n_keys", "heads", "knn", "k_dim", "target", "slots", "mem_lr",
                 "batch_size", "max_iters", "stop_at", "seed")


def check_use(given: dict):
    """Raises UserError for a setting on the command line that would do nothing."""
    for name in given:
        if given.get("data") and name in ONLY_TO_ASK:
            raise UserError(f"--{name} does nothing while teaching; to ask, leave out --data")
        if not given.get("data") and name in ONLY_TO_TEACH:
            raise UserError(f"--{name} does nothing without facts to teach: add --data=facts.jsonl")


given = {}
if __name__ == "__main__":  # --help and mistakes are answered before the slow imports
    safe_streams()
    with one_line_errors():
        given = parse(Settings, sys.argv[1:])
        Settings(**given).check()
        check_use(given)

import hashlib
import json
import os
import shlex
import time

import torch
import torch.nn as nn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanomem import checkpoint, optim, pretrained
from nanomem.config import pick_device
from nanomem.facts import FactSet, from_jsonl, read_text
from nanomem.memory import MemoryTable, ProductKeyMemory
from nanomem.prose import SAMPLE, TEXT
from nanomem.run import Interrupt

FILE, ABOUT = "memory.safetensors", "memory.json"
FORMAT = 1

# ------------------------------------------------------------------------------------------------
# Adding


class Memory(nn.Module):
    """The memory layers that were added to a model: `places` are the names of the modules they are beside."""

    def __init__(self, places: list[str], layers: list[ProductKeyMemory]):
        super().__init__()
        self.places, self.layers = places, nn.ModuleList(layers)


def add_memory(model: nn.Module, layers: list[int | str], n_slots: int = 256**2, heads: int = 4,
               knn: int = 16, k_dim: int = 256, target: str = "mlp", seed: int = 0) -> Memory:
    """Puts a memory layer beside the feed-forward module of each of these layers, and freezes all but values.

    Raises ValueError for a place that isn't there, that has a memory, or that can't take one.

    Args:
        model: a causal language model of transformers, or any module.
        layers: numbers of its layers, from 0, or names of modules such as "blocks.3.ffn".
        n_slots, heads, knn, k_dim: the shape of each memory layer; n_slots is a square number.
        target: the name of the feed-forward module inside a layer.
        seed: of the random queries and keys.
    """
    places = [place_of(model, layer, target) for layer in layers]
    widths = [check_place(model, place) for place in places]
    if not places or len(set(places)) < len(places):
        raise ValueError(f"layers must be distinct and at least one, got {layers}")
    shape = dict(n_slots=n_slots, heads=heads, knn=knn, k_dim=k_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        added = [make_layer(width, shape) for width in widths]
    model.requires_grad_(False)
    for place, layer in zip(places, added):
        attach(model.get_submodule(place), layer)
    return Memory(places, added)


def make_layer(width: int, shape: dict) -> ProductKeyMemory:
    """A memory layer with random queries and keys, and values at zero, of which only these are trained."""
    table = MemoryTable(shape["n_slots"], width)
    layer = ProductKeyMemory(width, table, shape["heads"], shape["knn"], shape["k_dim"], gated=False)
    layer.requires_grad_(False)
    nn.init.zeros_(table.values)
    table.values.requires_grad_(True)
    return layer


def attach(module: nn.Module, layer: ProductKeyMemory):
    """Makes a module's output that of the module plus what the layer reads for the same input.

    The layer stays in float32, whatever the model's dtype: small steps would be lost in bfloat16.
    """
    module.memory = layer.to(next(module.parameters()).device)
    module.register_forward_hook(add_what_is_read, with_kwargs=True)


def add_what_is_read(module, args, kwargs, output):
    """The forward hook of a module with a memory."""
    if not isinstance(output, Tensor):
        raise ValueError(f"a memory can't be beside {type(module).__name__}: "
                         f"it returns a {type(output).__name__}, not a tensor")
    x = args[0] if args else next(iter(kwargs.values()))
    read = module.memory(x.to(module.memory.keys.dtype))
    return output + read.to(output.dtype)


def memory_of(model: nn.Module) -> Memory | None:
    """All memory layers that were added to a model; None if it has none."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module._modules.get("memory"), ProductKeyMemory):
            found[name] = module.memory
    return Memory(list(found), list(found.values())) if found else None


def sample_passages(tokenizer) -> Tensor:
    """A short text in passages of 32 tokens, (n, 32) int64: for `centre_queries` and `restrict`."""
    return pretrained.windows(tokenizer, SAMPLE, 32)


@torch.no_grad()
def centre_queries(model: nn.Module, memory: Memory, tokens: Tensor):
    """Subtracts the mean hidden state over a text, tokens (n, time), before queries are computed. For new
    memories only.

    All hidden states have a large part in common. Without it, different tokens read different slots.
    """
    inputs, hooks = {}, []
    for place in memory.places:
        def keep(module, args, kwargs, output, place=place):
            x = args[0] if args else next(iter(kwargs.values()))
            inputs.setdefault(place, []).append(x.flatten(0, -2).mean(dim=0))

        hooks.append(model.get_submodule(place).register_forward_hook(keep, with_kwargs=True))
    try:
        model(tokens.to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    for place, layer in zip(memory.places, memory.layers):
        mean = torch.stack(inputs[place]).mean(dim=0).to(layer.query_proj.weight.dtype)     # (dim,)
        layer.query_proj.bias.copy_(-layer.query_proj.weight @ mean)


def restrict(optimizers: list, model: nn.Module, memory: Memory, statements: list, text: Tensor):
    """Makes RowAdam, the last of the optimizers, teach only the slots that a fact's wordings share.

    statements, text: as for pretrained.slots_to_teach. Raises UserError if there are none.
    """
    n_chosen = 0
    for table, chosen in pretrained.slots_to_teach(model, memory, statements, text).items():
        optimizers[-1].row_scale[table.values] = chosen.float().to(table.values.device)
        n_chosen += chosen.sum().item()
    if not n_chosen:
        raise UserError("the wordings share no slots that other facts and ordinary text don't read; "
                        "a larger --n_keys has more, and --slots=all teaches every slot")


# ------------------------------------------------------------------------------------------------
# Places


def place_of(model: nn.Module, layer: int | str, target: str = "mlp") -> str:
    """The name of the feed-forward module of a layer. Raises ValueError saying what there is instead."""
    if isinstance(layer, str):
        return layer
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} has an encoder and a decoder; expected a causal model")
    name, blocks = blocks_of(model)
    if not 0 <= layer < len(blocks):
        raise ValueError(f"there is no layer {layer}: the model has layers 0 to {len(blocks) - 1}")
    try:
        blocks[layer].get_submodule(target)
    except AttributeError:
        parts = ", ".join(part for part, _ in blocks[layer].named_children())
        raise ValueError(f"a layer of {type(model).__name__} has no module {target!r}; it has {parts}: "
                         "name its feed-forward module with target") from None
    return f"{name}.{layer}.{target}"


def blocks_of(model):
    """(name, ModuleList) of a transformers model's layers. Raises ValueError for another module."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return name, module
    raise ValueError(f"{type(model).__name__} has no list of layers that is known here; "
                     'name modules instead, such as layers=["blocks.3.ffn"]')


def check_place(model: nn.Module, place: str) -> int:
    """The width of a module that a memory can be put beside. Raises ValueError if it can't."""
    try:
        module = model.get_submodule(place)
    except AttributeError:
        raise ValueError(f"the model has no module {place!r}") from None
    if "memory" in module._modules:
        raise ValueError(f"{place} already has a memory; two can't share a place")
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        raise ValueError(f"{place} is a {type(module).__name__}, which would run a memory as one more step; "
                         "a memory goes beside a module with a forward() of its own")
    if any(p.is_meta for p in module.parameters()):
        raise ValueError(f"{place} is not in memory (offloaded, or on the device meta)")
    sizes = linear_sizes(module)
    if not sizes:
        raise ValueError(f"{place} ({type(module).__name__}) has no linear layers to take its width from")
    taken, returned = sizes[0][0], sizes[-1][1]
    if taken != returned:
        raise ValueError(f"{place} takes {taken} numbers and returns {returned}; "
                         "a memory goes beside a module that takes and returns as many")
    return taken


def linear_sizes(module):
    """[(inputs, outputs)] of a module's linear layers, in order. GPT-2 calls its own Conv1D."""
    sizes = []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            sizes.append((part.in_features, part.out_features))
        elif type(part).__name__ == "Conv1D":
            sizes.append((part.nx, part.nf))
    return sizes


# ------------------------------------------------------------------------------------------------
# Saving and loading


def save_memory(model: nn.Module, folder: str | Path, memory: Memory | None = None,
                taught: dict | None = None):
    """Writes what was added to a model, and nothing of the model itself: memory.safetensors, memory.json.

    Of the values it writes the rows that are not zero. Raises UserError if the model has no memory or the
    folder can't be written.

    Args:
        memory: the layers to save; None for all that the model has.
        taught: more to note in the JSON.
    """
    folder, memory = Path(folder), memory or memory_of(model)
    if memory is None:
        raise UserError("there is nothing to save: the model has no memory")
    tensors, places = {}, {}
    for place, layer in zip(memory.places, memory.layers):
        values = layer.table.values.detach()
        rows = values.any(dim=1).nonzero().squeeze(1)                       # (u,)
        tensors[f"{place}.rows"], tensors[f"{place}.values"] = rows.cpu(), values[rows].cpu()
        tensors |= {f"{place}.{name}": tensor.cpu() for name, tensor in frozen_tensors(layer).items()}
        places[place] = {"width": layer.dim, "n_slots": layer.table.n_slots, "heads": layer.heads,
                         "knn": layer.knn, "k_dim": layer.k_dim, "weights": sample(model, place)}
    about = {"format": FORMAT, "model": describe(model), "places": places, "taught": taught or {}}
    make_folder(folder)
    checkpoint.write_atomically(folder / FILE, lambda path: save_file(tensors, path))
    checkpoint.write_text(folder / ABOUT, json.dumps(about, indent=2) + "\n")
    os.chmod(folder / FILE, os.stat(folder / ABOUT).st_mode)  # safetensors makes files for their owner alone


def make_folder(folder: Path):
    """Makes a folder unless it is there. Raises UserError if it holds a model or can't be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"could not make the folder {folder} ({error.strerror})") from None
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds a model; name another folder for the memory with --memory")
    if not os.access(folder, os.W_OK):
        raise UserError(f"the folder {folder} can't be written to")


def load_memory(model: nn.Module, folder: str | Path) -> Memory:
    """Adds a saved memory to the model it was taught with, ready to be asked or taught more.

    Only its values can be trained then, not those of a memory that the model had before. Raises UserError,
    and changes nothing, if the folder has no whole memory or that of another model, or if one of its places
    is taken.
    """
    folder = Path(folder)
    about = read_about(folder)
    check_model(model, about, folder)
    try:
        tensors = load_file(folder / FILE)
        added = [filled_layer(tensors, place, shape) for place, shape in about["places"].items()]
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{folder / FILE} can't be loaded ({error})") from None
    model.requires_grad_(False)
    for place, layer in zip(about["places"], added):
        attach(model.get_submodule(place), layer)
    return Memory(list(about["places"]), added)


def filled_layer(tensors, place, shape):
    """The memory layer of a place, from the tensors of a file."""
    layer = make_layer(shape["width"], shape)
    for name, tensor in frozen_tensors(layer).items():
        saved = tensors[f"{place}.{name}"]
        if saved.shape != tensor.shape:
            raise ValueError(f"{place}.{name} has shape {tuple(saved.shape)}, expected {tuple(tensor.shape)}")
    dtype = tensors[f"{place}.values"].dtype  # as it was when it was saved
    layer.to(dtype)
    for name, tensor in frozen_tensors(layer).items():
        tensor.copy_(tensors[f"{place}.{name}"])
    with torch.no_grad():
        layer.table.values[tensors[f"{place}.rows"]] = tensors[f"{place}.values"]
    return layer


def frozen_tensors(layer: ProductKeyMemory) -> dict[str, Tensor]:
    """{name: tensor} of a memory layer's queries and keys: all but its values."""
    return {name: p.detach() for name, p in layer.named_parameters() if p is not layer.table.values}


def read_about(folder: Path) -> dict:
    """The JSON of a saved memory. Raises UserError if there is none, or it is damaged."""
    about = checkpoint.read_json(folder / ABOUT)
    if about is None:
        raise UserError(f"there is no memory in {folder}: {folder / ABOUT} is missing")
    try:
        about["model"]["hash"], about["places"].items()
        is_newer = about["format"] > FORMAT
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / ABOUT} does not describe a memory") from None
    if is_newer:
        raise UserError(f"{folder} has format {about['format']}, of a newer nanomem; this one reads {FORMAT}")
    return about


def check_model(model: nn.Module, about: dict, folder: Path):
    """Raises UserError unless a saved memory belongs to this model and its places are free."""
    there, here = about["model"], describe(model)
    if there["hash"] != here["hash"]:
        different = []
        for name in here["config"] | there["config"]:
            saved, value = there["config"].get(name), here["config"].get(name)
            if saved != value:
                different.append(f"{name} {saved} instead of {value}")
        raise UserError(f"{folder} has the memory of another model ({', '.join(different)})")
    for place, shape in about["places"].items():
        try:
            width = check_place(model, place)
        except ValueError as error:
            raise UserError(f"{folder} can't be loaded: {error}") from None
        if width != shape["width"]:
            raise UserError(f"{folder} has the memory of another model: {place} has width {shape['width']} "
                            f"there and {width} here")
        theirs, ours = torch.tensor(shape["weights"]), torch.tensor(sample(model, place))
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=0.02, atol=1e-4):
            raise UserError(f"{folder} has the memory of another model: one of the same shape, but with "
                            f"other weights in {place}")


SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act",
         "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")


def describe(model: nn.Module) -> dict:
    """What tells a model from those of another shape: its class, the config's main entries, their hash."""
    config = getattr(model, "config", None)
    entries = {"class": type(model).__name__}
    for name in SHAPE:
        value = getattr(config, name, None)
        if value is not None:
            entries[name] = value if isinstance(value, (int, float, str)) else str(value)
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]
    return {"name": str(getattr(config, "name_or_path", "")), "config": entries, "hash": digest}


def sample(model: nn.Module, place: str) -> list[float]:
    """Some of a module's own weights, rounded to three digits: they tell models of the same shape apart, in
    whatever dtype they are.
    """
    module = model.get_submodule(place)
    for name, p in module.named_parameters():
        if p.dim() == 2 and p.is_floating_point() and not name.startswith("memory."):
            flat = p.detach().flatten()
            chosen = flat[:: max(1, len(flat) // 16)][:16]
            return [float(f"{number:.3g}") for number in chosen.double().tolist()]
    return []


# ------------------------------------------------------------------------------------------------
# The command line


class Display:
    """How far teaching is: a bar with the time left on a terminal, elsewhere ten lines."""

    def __init__(self, max_iters: int, console: Console):
        self.max_iters, self.console, self.begun = max_iters, console, time.perf_counter()
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn(),
                            console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("teaching", total=max_iters)
        self.interrupt = Interrupt()

    def __call__(self, update: int, known: float) -> bool:
        """Shows an update. Returns whether the user wants to stop."""
        self.bar.update(self.task, completed=update, description=f"{known:.0%} known")
        if not self.console.is_terminal and update % max(1, self.max_iters // 10) == 0:
            seconds = (time.perf_counter() - self.begun) / update * (self.max_iters - update)
            left = f"at most {int(seconds) // 60}:{int(seconds) % 60:02} left"
            self.console.print(f"update {update:>4}/{self.max_iters}  {known:.0%} known  {left}")
        return self.interrupt.requested


def measure(model, asked: dict, text: Tensor) -> dict:
    """{what: share of the questions that the model answers}, and its loss on a text."""
    found = {what: float(pretrained.ask(model, questions).mean()) for what, questions in asked.items()}
    return found | {"loss on other text": pretrained.text_loss(model, text)}


def teach(settings: Settings, given: dict, console: Console):
    """Teaches a model the facts of a file, says what it learnt and what changed, and saves the memory.

    given: the settings that the command line gives.
    """
    facts = from_jsonl(settings.data)
    text = read_text(settings.text) if settings.text else TEXT
    folder = Path(settings.memory or f"out/{Path(settings.data).stem}-memory")
    make_folder(folder)  # now, not after minutes of teaching
    model, tokenizer = open_model(settings)
    sample_text = sample_passages(tokenizer)
    memory = open_memory(model, settings, given, folder, sample_text, console)
    asked = questions_of(tokenizer, facts)
    windows = pretrained.windows(tokenizer, text)
    with console.status("asking what it knows already"):
        before = measure(model, asked, windows)
    statements = pretrained.taught_statements(tokenizer, facts)
    mem_lr = settings.mem_lr or {"shared": 0.2, "all": 0.05}[settings.slots]
    optimizers = optim.build_optimizer(memory, mem_lr=mem_lr)
    if settings.slots == "shared":
        with console.status("looking which slots wordings share"):
            restrict(optimizers, model, memory, statements, sample_text)
    display = Display(settings.max_iters, console)
    begun = time.perf_counter()
    with display.bar:
        updates = pretrained.teach(model, optimizers, statements, settings.max_iters, settings.batch_size,
                                   settings.seed, settings.stop_at, after_update=display)
    seconds = time.perf_counter() - begun
    taught = {"data": settings.data, "facts": len(set(facts.subjects.tolist())), "updates": updates}
    save_memory(model, folder, memory, taught)
    with console.status("asking it again"):
        after = measure(model, asked, windows)
    console.print(f"{updates} updates in {seconds:.0f} s")
    show(before, after, console)
    quoted = f"--model={shlex.quote(settings.model)} --memory={shlex.quote(str(folder))}"
    console.print(f"Ask it: python -m nanomem.retrofit {quoted}")


def open_model(settings):
    """(model, tokenizer) of the settings."""
    dtype = getattr(torch, settings.dtype)
    return pretrained.open_model(settings.model, pick_device(settings.device), dtype)


def open_memory(model, settings, given, folder, sample_text, console) -> Memory:
    """The memory in a folder, to be taught more, or a new one."""
    if (folder / ABOUT).exists():
        shape = ("layers", "n_keys", "heads", "knn", "k_dim", "target")
        for name in shape:
            if name in given:
                raise UserError(f"{folder} has a memory already, whose shape is set; leave out --{name}, or "
                                "name another folder with --memory")
        memory = load_memory(model, folder)
        console.print(f"continuing with the memory in {folder}, beside {', '.join(memory.places)}")
        return memory
    layers = [int(layer) for layer in settings.layers.split(",")]
    try:
        memory = add_memory(model, layers, settings.n_keys**2, settings.heads, settings.knn, settings.k_dim,
                            settings.target, settings.seed)
    except ValueError as error:
        raise UserError(f"--layers={settings.layers} --target={settings.target}: {error}") from None
    centre_queries(model, memory, sample_text)
    console.print(f"a memory of {settings.n_keys**2:,} slots beside each of {', '.join(memory.places)}")
    return memory


def questions_of(tokenizer, facts: FactSet) -> dict:
    """{kind of wording: what to ask}, as pretrained.ask takes it."""
    asked = {"known, taught wording": pretrained.questions(tokenizer, facts)}
    if facts.held_out:
        asked["known, wording never taught"] = pretrained.questions(tokenizer, facts.held_out)
    return asked


def show(before: dict, after: dict, console: Console):
    """What was known and what the loss was, before and after."""
    console.print(f"{'':<28} {'before':>8} {'after':>8}")
    for what, number in before.items():
        form = ".3f" if what.startswith("loss") else ".1%"
        console.print(f"{what:<28} {number:>8{form}} {after[what]:>8{form}}")


def ask(settings: Settings, console: Console):
    """Answers a prompt, the lines of the input, or what is typed."""
    read_about(Path(settings.memory))  # before the model, which takes longer
    model, tokenizer = open_model(settings)
    load_memory(model, settings.memory)
    if settings.start:
        console.out(answer(model, tokenizer, settings.start, settings.max_new_tokens), highlight=False)
        return
    is_dialogue = sys.stdin.isatty()
    while True:
        try:
            prompt = console.input("> ") if is_dialogue else next(sys.stdin).rstrip("\r\n")
        except (EOFError, KeyboardInterrupt, StopIteration):
            return
        if is_dialogue and prompt.strip() in ("exit", "quit"):
            return
        if prompt.strip():
            console.out(answer(model, tokenizer, prompt, settings.max_new_tokens), highlight=False)


@torch.no_grad()
def answer(model: nn.Module, tokenizer, prompt: str, most: int) -> str:
    """The likeliest continuation of a prompt, up to the end or `most` tokens. Raises UserError for an empty
    prompt.
    """
    end = tokenizer.eos_token_id
    tokens = pretrained.drop_end(tokenizer(prompt.strip()).input_ids, end)
    if not tokens:
        raise UserError("the prompt is empty")
    tokens = torch.tensor([tokens], device=next(model.parameters()).device)     # (1, time)
    written = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens),
                             max_new_tokens=most, do_sample=False, eos_token_id=end, pad_token_id=end)
    return tokenizer.decode(written[0, tokens.shape[1]:], skip_special_tokens=True).strip()


if __name__ == "__main__":
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    with one_line_errors():
        settings = Settings(**given)
        if settings.data:
            teach(settings, given, console)
        else:
            ask(settings, console)
