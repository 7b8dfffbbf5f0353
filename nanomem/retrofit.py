"""
A memory for a pretrained language model: new facts, and hardly anything else changed.

    python -m nanomem.retrofit --model=NAME_OR_FOLDER_OR_GGUF --data=facts.jsonl    teach it; out/facts-memory
    python -m nanomem.retrofit --model=NAME --memory=out/facts-memory               ask it

    from nanomem.retrofit import add_memory, load_memory, save_memory
    memory = add_memory(model, layers=[4, 6, 8, 10], lookup=3, all_slots=False)
    ...                                          # choose slots, then train: see docs/retrofit.md
    save_memory(model, "out/facts")              # what was added, nothing of the model

adapter.py has the memory itself and explains why it looks up in a low layer. Its values start at zero, so at
first nothing changes. Only values are trained. pretrained.py has what surrounds it: facts, loss, the loop.
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
    text: str = setting("", "ordinary text, whose loss should not change: it is measured on the first 16,384 "
                            "tokens, the next 128,000 show which slots to leave alone; by default a short "
                            "built-in text", path=True)
    max_new_tokens: int = setting(40, "longest answer, in tokens", least=1)

    lookup: str = setting("", "number of the layer that looks up the slots, from 0; by default a low one",
                          section="Shape of a new memory")
    layers: str = setting("", "numbers of the layers that add what is read, such as 4,6,8; by default every "
                              "second one, up to 60% of the depth")
    n_keys: int = setting(512, "half keys; there are n_keys ** 2 slots to choose from", least=1)
    heads: int = setting(4, "queries per token, each with keys of its own", least=1)
    knn: int = setting(6, "slots read per query", least=1)
    k_dim: int = setting(256, "length of a query, an even number", least=2)
    silence: float = setting(0.45, "a token reads nothing unless the slots of one set of facts have more "
                                   "than this share of its softmax weight", least=0)
    target: str = setting("mlp", "name of the feed-forward module inside a layer")

    mem_lr: float = setting(0.5, "learning rate of the values", least=0, section="Teaching")
    batch_size: int = setting(32, "statements per update", least=1)
    rounds: int = setting(40, "rounds at most; each reads every fact once", least=1)
    stop_at: float = setting(1.0, "teaching stops once this share of the taught statements is known", least=0)
    seed: int = setting(1337, "random seed of keys, queries and the order of statements", least=0)
    device: str = setting("auto", "cpu, cuda, cuda:1, mps (not tested); auto: cuda if there is one, else cpu")
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
        if self.layers and not all(layer.strip().isdecimal() for layer in self.layers.split(",")):
            raise UserError(f"--layers must be numbers such as 4,6,8; got {self.layers!r}")
        if self.lookup and not self.lookup.strip().isdecimal():
            raise UserError(f"--lookup must be a number such as 2; got {self.lookup!r}")
        if self.knn > self.n_keys:
            raise UserError(f"--knn={self.knn} is more than --n_keys={self.n_keys}; "
                            f"raise --n_keys to {self.knn} or lower --knn to {self.n_keys}")
        if self.k_dim % 2:
            raise UserError(f"--k_dim must be an even number, got {self.k_dim}")
        if self.silence >= 1:
            raise UserError(f"--silence is a share, from 0 to below 1; got {self.silence:g}")


ONLY_TO_ASK = ("start", "max_new_tokens")
SHAPE_OF_NEW = ("lookup", "layers", "n_keys", "heads", "knn", "k_dim", "silence", "target")
ONLY_TO_TEACH = ("text", *SHAPE_OF_NEW, "mem_lr", "batch_size", "rounds", "stop_at", "seed")


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

import contextlib
import hashlib
import json
import os
import random
import shlex
import time

import torch
import torch.nn as nn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanomem import adapter, checkpoint, pretrained
from nanomem.adapter import LayerMemory, Lookup, Memory, Values
from nanomem.config import pick_device
from nanomem.facts import FactSet, from_jsonl
from nanomem.pretrained import Statement
from nanomem.run import Interrupt

FILE, ABOUT = "memory.safetensors", "memory.json"
FORMAT = 3
TAUGHT = "known, taught wording"
ENOUGH_TEXT = 100_000  # tokens that show which slots ordinary text reads
MOST_EARLIER = 500  # of the statements taught before: how many are asked at most
LOOKUP_SHAPE = ("n_slots", "heads", "knn", "k_dim", "silence")

# ------------------------------------------------------------------------------------------------
# Adding


def add_memory(model: nn.Module, layers: list[int | str], lookup: int | str | None = None,
               n_slots: int = 256**2, heads: int = 4, knn: int = 6, k_dim: int = 256, silence: float = 0.45,
               target: str = "mlp", seed: int = 0, all_slots: bool = True) -> Memory:
    """Adds a memory to the outputs of these layers' feed-forward modules, and freezes all but its values.

    Raises ValueError for a place that isn't there, that has a memory, or that can't take one.

    Args:
        model: a causal language model of transformers, or any module.
        layers: numbers of its layers, from 0, or names of modules such as "blocks.3.ffn".
        lookup: the layer whose feed-forward input says which slots are read; None for the lowest of layers.
        n_slots, heads, knn, k_dim: the shape of the lookup; n_slots is a square number.
        silence: a token reads nothing unless the slots of one set have more than this share of its weight.
        target: the name of the feed-forward module inside a layer.
        seed: of the random queries and keys.
        all_slots: give all slots values, n_slots * width numbers in each layer. With False, no slot has any
            before memory.add_set() or adapter.choose_slots() is called.
    """
    places = [place_of(model, layer, target) for layer in layers]
    widths = [check_place(model, place) for place in places]
    if not places or len(set(places)) < len(places):
        raise ValueError(f"layers must be distinct and at least one, got {layers}")
    order = [name for name, _ in model.named_modules()]
    first = min(places, key=order.index)
    lookup_place = first if lookup is None else place_of(model, lookup, target)
    lookup_width = width_of(model, lookup_place)
    if order.index(lookup_place) > order.index(first):
        raise ValueError(f"the lookup at {lookup_place} comes after a layer that reads, {first}")
    shared = Lookup(lookup_place, lookup_width, n_slots, heads, knn, k_dim, silence, seed)
    memory = Memory(shared, places, [Values(1, width) for width in widths])
    if all_slots:
        memory.add_set(torch.arange(n_slots))
    attach(model, memory)
    return memory


def attach(model: nn.Module, memory: Memory):
    """Freezes a model and makes it read a memory.

    The memory stays in float32, whatever the model's dtype: small steps would be lost in bfloat16.
    """
    model.requires_grad_(False)
    lookup_module = model.get_submodule(memory.lookup.place)
    lookup_module.register_forward_pre_hook(memory.lookup.keep, with_kwargs=True)
    for place, table in zip(memory.places, memory.tables):
        module = model.get_submodule(place)
        module.memory = LayerMemory(memory.lookup, table).to(next(module.parameters()).device)
        module.register_forward_hook(module.memory.add, with_kwargs=True)


def memories_of(model: nn.Module) -> list[Memory]:
    """The memories that were added to a model."""
    parts = {}  # lookup -> [(place, table)]
    for name, module in model.named_modules():
        part = module._modules.get("memory")
        if isinstance(part, LayerMemory):
            parts.setdefault(part.lookup, []).append((name, part.table))
    memories = []
    for lookup, found in parts.items():
        places, tables = zip(*found)
        memories.append(Memory(lookup, list(places), list(tables)))
    return memories


def default_layers(n_layers: int) -> tuple[int, list[int]]:
    """(the layer that looks up, the layers that read) in a model of n_layers: 3 and 4, 6, ... 18 of 30."""
    lookup, last = n_layers // 10, round(0.6 * n_layers)
    return lookup, list(range(n_layers // 7, last + 1, 2))


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
                     'in Python, name modules instead: add_memory(model, layers=["blocks.3.ffn"])')


def check_place(model: nn.Module, place: str) -> int:
    """The width of a module that a memory can be added to. Raises ValueError if it can't."""
    width = width_of(model, place)
    if "memory" in model.get_submodule(place)._modules:
        raise ValueError(f"{place} already has a memory; two can't share a place")
    return width


def width_of(model: nn.Module, place: str) -> int:
    """How many numbers a feed-forward module takes and returns. Raises ValueError if it is none."""
    try:
        module = model.get_submodule(place)
    except AttributeError:
        raise ValueError(f"the model has no module {place!r}") from None
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
                         "a memory goes beside a module that returns as many as it takes")
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
    """Writes what was added to a model, with the statements that it was taught, and nothing of the model
    itself: memory.safetensors, memory.json.

    Raises UserError if the model has no memory or the folder can't be written.

    Args:
        memory: the one to save; None for the only one that the model has.
        taught: more to note in the JSON.
    """
    folder = Path(folder)
    if memory is None:
        memory = only_memory_of(model)
    lookup = memory.lookup
    tensors = {f"lookup.{name}": tensor.cpu() for name, tensor in lookup.state_dict().items()}
    if lookup.statements:
        tensors["statements"] = packed(lookup.statements)
    places = {}
    for place, table in zip(memory.places, memory.tables):
        tensors[f"{place}.values"] = table.values.detach().cpu()
        places[place] = {"width": table.v_dim, "weights": sample(model, place)}
    shape = {name: getattr(lookup, name) for name in ("place", "width", *LOOKUP_SHAPE)}
    about = {"format": FORMAT, "model": describe(model), "lookup": shape, "places": places,
             "taught": taught or {}}
    make_folder(folder)
    checkpoint.write_atomically(folder / FILE, lambda path: save_file(tensors, path))
    checkpoint.write_text(folder / ABOUT, json.dumps(about, indent=2) + "\n")
    os.chmod(folder / FILE, os.stat(folder / ABOUT).st_mode)  # safetensors makes files for their owner alone


def packed(statements: list[Statement]) -> Tensor:
    """Statements as (n, 2 + longest) int32: each one's fact, start and tokens, padded with -1."""
    rows = [torch.tensor([one.fact, one.start, *one.tokens], dtype=torch.int32) for one in statements]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def unpacked(rows: Tensor) -> list[Statement]:
    """The inverse of packed(). Raises ValueError for what packed() did not make."""
    found = [Statement(fact, [token for token in tokens if token >= 0], start)
             for fact, start, *tokens in rows.tolist()]
    if rows.dtype != torch.int32 or not all(0 < one.start < len(one.tokens) for one in found):
        raise ValueError("its statements are damaged")
    return found


def only_memory_of(model: nn.Module) -> Memory:
    """The memory of a model. Raises UserError unless there is exactly one."""
    memories = memories_of(model)
    if not memories:
        raise UserError("there is nothing to save: the model has no memory")
    if len(memories) > 1:
        raise UserError(f"the model has {len(memories)} memories; say which to save")
    return memories[0]


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

    Freezes all but its values, also an earlier memory's. Raises UserError, and changes nothing, if the folder
    has no whole memory or that of another model, or if one of its places is taken.
    """
    folder = Path(folder)
    about = read_about(folder)
    check_model(model, about, folder)
    try:
        memory = filled_memory(load_file(folder / FILE), about)
    except (SafetensorError, OSError, LookupError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder / FILE} can't be loaded ({error})") from None
    attach(model, memory)
    return memory


def filled_memory(tensors: dict[str, Tensor], about: dict) -> Memory:
    """The memory that the tensors of a file and its JSON describe."""
    lookup = Lookup(**about["lookup"])
    lookup.row_of, lookup.first_row = tensors["lookup.row_of"], tensors["lookup.first_row"]  # as many as sets
    lookup.load_state_dict({name: tensors[f"lookup.{name}"] for name in lookup.state_dict()})
    if "statements" in tensors:
        lookup.statements = unpacked(tensors["statements"])
    tables = []
    for place, shape in about["places"].items():
        values = tensors[f"{place}.values"]
        table = Values(len(values), shape["width"]).to(values.dtype)
        table.load_state_dict({"values": values})
        tables.append(table)
    return Memory(lookup.to(tables[0].values.dtype), list(about["places"]), tables)


def read_about(folder: Path) -> dict:
    """The JSON of a saved memory. Raises UserError if there is none, or it is damaged."""
    about = checkpoint.read_json(folder / ABOUT)
    if about is None:
        if checkpoint.is_run_or_export(folder):
            raise UserError(f"{folder} is a model of train.py's, not a memory; "
                            f"python sample.py --out_dir={folder} asks it")
        raise UserError(f"there is no memory in {folder}: {folder / ABOUT} is missing")
    try:
        is_newer, is_older = about["format"] > FORMAT, about["format"] < FORMAT
    except (KeyError, TypeError):
        raise UserError(f"{folder / ABOUT} does not describe a memory") from None
    if is_newer:
        raise UserError(f"{folder} has format {about['format']}, of a newer nanomem; this one reads {FORMAT}")
    if is_older:
        raise UserError(f"{folder} has format {about['format']}, of an older nanomem; teach the facts again")
    try:  # all that is read from it later
        about["model"]["hash"], about["model"]["config"].items(), about["lookup"]["place"]
        for shape in about["places"].values():
            shape["width"], torch.tensor(shape["weights"], dtype=torch.float32)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{folder / ABOUT} does not describe a memory") from None
    if not about["places"]:
        raise UserError(f"{folder / ABOUT} names no place that reads the memory")
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
    try:
        width_of(model, about["lookup"]["place"])
        widths = [check_place(model, place) for place in about["places"]]
    except ValueError as error:
        raise UserError(f"{folder} can't be loaded: {error}") from None
    for (place, shape), width in zip(about["places"].items(), widths):
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
            return [float(f"{number:.3g}") for number in chosen.cpu().double().tolist()]
    return []


# ------------------------------------------------------------------------------------------------
# The command line


class Display:
    """How far teaching is: a bar with the time left on a terminal, elsewhere a line for each tenth."""

    def __init__(self, console: Console):
        self.console, self.begun, self.tenths = console, time.perf_counter(), 0
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn(),
                            console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("teaching", total=1.0)

    def __call__(self, done: float, known: float):
        """Shows an update: the shares of all rounds done and of statements known."""
        self.bar.update(self.task, completed=done, description=f"{known:.0%} known")
        if not self.console.is_terminal and int(10 * done) > self.tenths:
            self.tenths = int(10 * done)
            seconds = int((time.perf_counter() - self.begun) * (1 - done) / done)
            left = f"at most {seconds // 60}:{seconds % 60:02} left"
            self.console.print(f"{done:4.0%} of the rounds  {known:.0%} known  {left}")


def measure(model, asked: dict, text: Tensor) -> dict:
    """{what: share of the questions that the model answers}, and its loss on a text."""
    found = {what: float(pretrained.ask(model, questions).mean()) for what, questions in asked.items()}
    return found | {"loss on other text": pretrained.text_loss(model, text)}


@contextlib.contextmanager
def folder_for_memory(folder: Path):
    """Makes a folder, now and not after minutes of teaching. Removes it if nothing was saved there."""
    make_folder(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it isn't empty
            folder.rmdir()


def teach_file(settings: Settings, given: dict, folder: Path, console: Console):
    """Teaches a model the facts of a file, says what it learnt and what changed, and saves the memory.

    given: the settings that the command line gives.
    """
    facts = from_jsonl(settings.data)
    model, tokenizer = open_model(settings)
    measured, other = pretrained.split_text(tokenizer, settings.text)
    if settings.text and other.numel() < ENOUGH_TEXT:
        console.print(f"--text={settings.text} is short: its first 16,384 tokens measure the loss; "
                      f"{ENOUGH_TEXT:,} more or so should show which slots to leave alone")
    memory = open_memory(model, settings, given, folder, other, console)
    statements = pretrained.taught_statements(tokenizer, facts)
    asked = questions_of(tokenizer, facts)
    earlier = adapter.earlier_statements(memory.lookup, statements)
    if earlier:
        some = random.Random(0).sample(earlier, min(MOST_EARLIER, len(earlier)))
        asked["known, taught before"] = [[statement] for statement in some]
    with console.status("asking what it knows already"):
        before = measure(model, asked, measured)
    if before[TAUGHT] >= settings.stop_at:
        console.print(f"{before[TAUGHT]:.1%} of {settings.data} is known already; there is nothing to teach")
        return
    to_teach = what_to_teach(model, tokenizer, memory, statements, other, console)
    optimizers = [adapter.build_adam(memory, settings.mem_lr)]
    display, interrupt = Display(console), Interrupt()

    def after_update(done, known):
        display(done, known)
        return interrupt.requested

    begun = time.perf_counter()
    with display.bar:
        updates = pretrained.teach(model, optimizers, to_teach, settings.rounds, settings.batch_size,
                                   settings.seed, settings.stop_at, after_update)
    seconds = time.perf_counter() - begun
    taught = {"data": settings.data, "facts": len(set(facts.subjects.tolist())), "updates": updates}
    save_memory(model, folder, memory, taught)
    with console.status("asking it again"):
        after = measure(model, asked, measured)
    stopped = "interrupted after " if interrupt.requested else ""
    console.print(f"{stopped}{updates} updates in {seconds:.0f} s; the memory is in {folder}")
    show(before, after, console)
    quoted = f"--model={shlex.quote(settings.model)} --memory={shlex.quote(str(folder))}"
    console.print(f"Ask it: python -m nanomem.retrofit {quoted}")


def what_to_teach(model: nn.Module, tokenizer, memory: Memory, statements: list[Statement], text: Tensor,
                  console: Console) -> list[Statement]:
    """Chooses slots for statements. Returns those that can be taught, and earlier ones to teach again."""
    with console.status("choosing slots"):
        teachable, again = adapter.choose_slots(model, memory, statements, text)
    taught = {tuple(one.prompt) for one in teachable}
    missing = [tokenizer.decode(one.prompt) for one in statements if tuple(one.prompt) not in taught]
    if missing:
        reason = (f"{len(missing)} of {len(statements)} wordings can't be taught, such as {missing[0]!r}: "
                  "they share too few slots with the fact's other wordings that no other fact or ordinary "
                  "text reads, or don't read the rows of a fact that was taught before")
        if not teachable:
            raise UserError(f"{reason}; a new memory with a smaller --silence or a larger --n_keys may help")
        console.print(reason)
    if again:
        console.print(f"{len(again)} earlier wordings are taught again: the new facts change what they read")
    return teachable + again


def open_model(settings):
    """(model, tokenizer) of the settings."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return pretrained.open_model(settings.model, pick_device(device), getattr(torch, settings.dtype))


def open_memory(model, settings, given, folder, text, console) -> Memory:
    """The memory in a folder, to be taught more, or a new one."""
    if (folder / ABOUT).exists():
        for name in SHAPE_OF_NEW:
            if name in given:
                raise UserError(f"{folder} has a memory already, whose shape is set; leave out --{name}, or "
                                "name another folder with --memory")
        memory = load_memory(model, folder)
        console.print(f"continuing with the memory in {folder}, beside {', '.join(memory.places)}")
        return memory
    try:
        lookup, layers = layers_of(settings, model)
        memory = add_memory(model, layers, lookup, settings.n_keys**2, settings.heads, settings.knn,
                            settings.k_dim, settings.silence, settings.target, settings.seed, all_slots=False)
    except ValueError as error:
        named = [f"--{name}={given[name]}" for name in ("lookup", "layers", "target") if name in given]
        named = named or [f"--target={settings.target}"]
        raise UserError(f"{' '.join(named)}: {error}") from None
    adapter.centre_queries(model, memory, text)
    console.print(f"a new memory: the lookup at {memory.lookup.place}, values at {', '.join(memory.places)}")
    return memory


def layers_of(settings: Settings, model: nn.Module) -> tuple[int, list[int]]:
    """(the layer that looks up, the layers that read): those of the settings, or the default ones."""
    lookup, layers = default_layers(len(blocks_of(model)[1]))
    if settings.layers:
        layers = [int(layer) for layer in settings.layers.split(",")]
        lookup = min(lookup, *layers)
    if settings.lookup:
        lookup = int(settings.lookup)
    return lookup, layers


def questions_of(tokenizer, facts: FactSet) -> dict:
    """{kind of wording: what to ask}, as pretrained.ask takes it."""
    asked = {TAUGHT: pretrained.questions(tokenizer, facts)}
    if facts.held_out:
        asked["known, wording never taught"] = pretrained.questions(tokenizer, facts.held_out)
    return asked


def show(before: dict, after: dict, console: Console):
    """What was known and what the loss was, before and after."""
    console.print(f"{'':<28} {'before':>8} {'after':>8}")
    for what, number in before.items():
        form = ".3f" if what.startswith("loss") else ".1%"
        console.print(f"{what:<28} {number:>8{form}} {after[what]:>8{form}}")


def answer_prompts(settings: Settings, console: Console):
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
            folder = Path(settings.memory or f"out/{Path(settings.data).stem}-memory")
            with folder_for_memory(folder):
                teach_file(settings, given, folder, console)
        else:
            answer_prompts(settings, console)
