"""
Every setting of train.py with its default.

    python train.py --key=value ...
    python train.py configs/world.toml --key=value ...
    python train.py --help
"""

import contextlib
import ctypes
import dataclasses
import functools
import math
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from nanomem import datasets, kinds
from nanomem.cli import UserError, check_limits, sections, setting


@dataclass
class ModelSettings:
    """The shape of the model and of its memory."""

    vocab_size: int = setting(
        2048, "tokens to train a tokenizer=bpe with; other tokenizers have their own number",
        section="Model", least=1)
    n_layer: int = setting(3, "layers", least=1)
    n_head: int = setting(2, "attention heads", least=1)
    n_embd: int = setting(32, "width of the model", least=1)
    block_size: int = setting(
        64, "tokens the model sees at once; by default more if one of your own facts is longer", least=1)
    dropout: float = setting(0.0, "share of activations dropped while training", least=0, below=1)
    ffn: str = setting(
        "memory", f"what to put in mem_layers: {kinds.help_text()}", choices=tuple(kinds.KINDS))
    ffn_hidden: int = setting(
        0, "width of the feed-forward layers; 0: 8/3 n_embd beside memory layers, "
        "otherwise what gives as many FLOPs as with memory", least=0)

    mem_layers: str = setting(
        "2", "layers, counted from 0, whose feed-forward layer is a memory layer", section="Memory")
    mem_n_keys: int = setting(512, "keys per half; the memory has mem_n_keys**2 slots", least=1, below=2**22)
    mem_heads: int = setting(1, "independent lookups per token in each memory layer", least=1)
    mem_knn: int = setting(32, "slots read by each head", least=1)
    mem_k_dim: int = setting(64, "length of a query and of a key, an even number; 0: n_embd", least=0)
    mem_v_dim: int = setting(0, "length of a value; 0: n_embd", least=0)
    mem_gated: bool = setting(True, "multiply what was read by silu(W_gate x)")
    mem_qk_norm: bool = setting(True, "normalise both halves of queries and keys")
    mem_dropout: float = setting(
        0.2, "share of a memory layer's lookups dropped while training", least=0, below=1)
    mem_share_values: bool = setting(True, "use one table of values for all memory layers")
    mem_dtype: str = setting(
        "float32", "dtype of the values; bfloat16 halves the memory, and updates are rounded stochastically",
        choices=("float32", "bfloat16"))


@dataclass
class GPTConfig(*reversed(kinds.SETTINGS), ModelSettings):
    """The shape of the model, with the settings of every kind of layer."""

    def replace(self, **changes):
        """A copy with other settings."""
        return dataclasses.replace(self, **changes)

    def memory_layer_numbers(self) -> list[int]:
        """The layers of mem_layers, as numbers."""
        try:
            return [int(part) for part in self.mem_layers.split(",") if part.strip()]
        except ValueError:
            given = repr(self.mem_layers)
            raise ValueError(f"mem_layers must be layer numbers such as 1,2, got {given}") from None

    def check(self):
        """Raises ValueError naming the first invalid setting."""
        check_limits(self)
        if self.n_embd % (2 * self.n_head):
            factor = 2 * self.n_head
            raise ValueError(f"n_embd must be a multiple of 2 * n_head = {factor}, got {self.n_embd}")
        if self.ffn == "dense" and self.ffn_hidden:
            return  # the memory's settings play no part
        numbers = self.memory_layer_numbers()
        if not numbers:
            raise ValueError("mem_layers must name at least one layer")
        if any(not 0 <= i < self.n_layer for i in numbers) or len(set(numbers)) < len(numbers):
            last, given = self.n_layer - 1, repr(self.mem_layers)
            raise ValueError(f"mem_layers must be different layers from 0 to {last}, got {given}")
        if self.mem_knn > self.mem_n_keys:
            raise ValueError(f"mem_knn must be at most mem_n_keys = {self.mem_n_keys}, got {self.mem_knn}")
        if (self.mem_k_dim or self.n_embd) % 2:
            raise ValueError(f"mem_k_dim must be even, got {self.mem_k_dim}")
        kinds.KINDS[self.ffn].check(self)


@dataclass
class Config(GPTConfig):
    """All settings of train.py."""

    takes_recipe = True
    arguments = "[RECIPE] "

    data: str = setting(
        "people", f"{datasets.help_text()}, a .jsonl file of facts, a text file, or what data/prepare.py "
        "made", section="Data", path=True)
    n_entities: int = setting(
        1500, "how many entities, such as people or cities, to learn about", instead={"init_from": 200})
    people_seed: int = setting(
        0, "random seed of data=people, different people for each; 0: the same as --seed", least=0,
        below=2**63)
    zipf: float = setting(
        0.6, "the entity of rank r is mentioned in proportion to r ** -zipf", least=0,
        instead={"init_from": 0.0})
    tokenizer: str = setting(
        "auto", "bytes, bpe (trained on the data), a .tiktoken file, or one of tiktoken's such as gpt2; "
        "auto: that of the set of facts, bytes for your own files", path=True)
    seed: int = setting(1337, "random seed for weights, batches and invented people", least=0, below=2**63)
    earlier: list = dataclasses.field(default_factory=list)  # taught before, by runs that init_from names:
    # for each run a dict of its settings in DESCRIBES_DATA

    batch_size: int = setting(32, "sequences per forward and backward pass", section="Training", least=1)
    gradient_accumulation_steps: int = setting(1, "passes per update", least=1)
    max_iters: int = setting(2560, "updates", least=0, instead={"init_from": 150})
    learning_rate: float = setting(
        8e-3, "peak learning rate of everything but the tables", least=0, instead={"init_from": 1e-3})
    mem_lr: float = setting(
        3e-2, "peak learning rate of the tables' values", least=0, instead={"init_from": 0.12})
    mem_beta2: float = setting(
        0.99, "decay of the values' second moment, one number per slot; "
        "0: scale each step by its own gradient", least=0, below=1)
    min_lr: float = setting(
        8e-4, "learning rate at the end; that of the values falls in proportion", least=0,
        instead={"init_from": 1e-4})
    warmup_iters: int = setting(
        100, "updates over which the learning rates rise from 0", least=0, instead={"init_from": 0})
    weight_decay: float = setting(0.1, "AdamW's weight decay of matrices", least=0)
    mem_parallel: int = setting(
        0, "processes to split the tables' columns over, under torchrun; "
        "0: all of them (PEER's tables are never split)", least=0)
    grad_clip: float = setting(
        1.0, "largest norm of the gradient, for the tables and for the rest separately; 0: no limit", least=0)

    init_from: str = setting(
        "", "teach the model in this folder, of a run or an export; its shape and tokenizer stay",
        section="Teaching", path=True)
    train: str = setting(
        "auto", "what to train: values (the memory tables) or core (everything else); auto: values when "
        "teaching a model that has tables, otherwise all", choices=("auto", "all", "values", "core"))
    mem_idf: float = setting(
        0.0, "multiply each slot's steps by idf ** mem_idf; idf is 1 for a slot that earlier training never "
        "read, and falls to 0 for one that every update read", least=0, instead={"init_from": 1.0})
    mem_top_slots: int = setting(
        0, "change only this many slots per update: those that its batch reads most and earlier training "
        "read least; 0: all that are read", least=0)
    rehearse: float = setting(
        0.0, "share of the sequences that come from data taught before, where it can still be opened",
        least=0, below=1)
    stop_at: float = setting(
        -1.0, "stop when this share of the taught prompts is answered; 0: never; "
        "-1: 1 for your own facts, otherwise never")

    out_dir: str = setting(
        "auto", "folder for checkpoints, settings and metrics; auto: out/DATA-FFN, "
        "with a number for people_seed, or -taught if that is the model to teach", section="Run", path=True)
    resume: bool = setting(False, "continue from the checkpoint in out_dir, with its settings")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the first available of cuda, mps, cpu")
    dtype: str = setting(
        "auto", "dtype of matrix products; auto: bfloat16 on cuda, otherwise float32; "
        "float64: everything, for checking", choices=("auto", "float32", "bfloat16", "float64"))
    compile: bool = setting(False, "torch.compile the model")
    deterministic: bool = setting(False, "on cuda too, make the same seed give the same run bit for bit")
    eval_interval: int = setting(
        320, "updates between evaluations, each followed by a checkpoint; at most 100 where stop_at applies",
        least=1, instead={"init_from": 50})
    eval_iters: int = setting(10, "batches per evaluation", least=1)
    log_interval: int = setting(10, "updates between lines of metrics", least=1)

    @classmethod
    def from_saved(cls, saved: dict, where) -> "Config":
        """The Config of a run's saved {name: value}. Raises UserError naming settings this version doesn't
        have.
        """
        if not isinstance(saved, dict):
            raise UserError(f"the run in {where}: expected settings by name, got {type(saved).__name__}")
        if "model_type" in saved:
            raise UserError(f"{where} holds a model of transformers; "
                            f"python -m nanomem.retrofit --model={where} --data=facts.jsonl teaches it")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        saved = {"mem_dropout": 0.0} | saved  # runs from before this setting existed dropped nothing
        unknown = ", ".join(sorted(saved.keys() - fields.keys()))
        if unknown:
            raise UserError(f"the run in {where} has settings unknown to this version of nanomem: {unknown}")
        for name, value in saved.items():
            expected = fields[name].type
            if type(value) is not expected and not (expected is float and type(value) is int):
                raise UserError(f"the run in {where} has {name}={value!r}, expected {expected.__name__}")
        return cls(**saved)

    @classmethod
    def fixed_on_resume(cls) -> set[str]:
        """The settings that decide what a run computes, which can't change when it is resumed."""
        fixed = {f.name for f in dataclasses.fields(GPTConfig) + tuple(sections(cls)["Data"])}
        fixed |= {"init_from", "train", "mem_idf", "mem_top_slots", "rehearse"}
        # The tokenizer may have fewer tokens than vocab_size asked for.
        return fixed - {"vocab_size", "moe_balance"}

    @classmethod
    def fixed_by_model(cls) -> set[str]:
        """The settings that a model brings along when it is taught more (init_from)."""
        shape = {f.name for f in dataclasses.fields(GPTConfig)}
        # Positions are rotary, so blocks may be longer than those the model has seen.
        return (shape | {"tokenizer"}) - {"block_size", "dropout", "mem_dropout", "moe_balance"}

    def has_tables(self) -> bool:
        """Whether the model has memory tables."""
        return kinds.KINDS[self.ffn].has_tables

    def stop_share(self) -> float:
        """The share of the taught prompts at which training stops; infinity: it doesn't."""
        if self.stop_at == -1:
            return 1.0 if datasets.is_own_facts(self.data) else math.inf
        return self.stop_at or math.inf

    def teaches_facts(self) -> bool:
        """Whether the data is facts rather than text."""
        return datasets.teaches_facts(self.data)

    def shards(self) -> int:
        """How many processes split a table's columns; 0 for all of them."""
        return self.mem_parallel if kinds.KINDS[self.ffn].splits_tables else 1

    def check(self):
        """Raises ValueError naming the first invalid setting."""
        super().check()
        if not (0 <= self.stop_at <= 1 or self.stop_at == -1):
            raise ValueError(f"stop_at must be from 0 to 1, or -1 for the default; got {self.stop_at}")
        if self.stop_at > 0 and not self.teaches_facts():
            raise ValueError(f"stop_at is for facts, and data={self.data} is text")
        if self.train == "values" and not self.has_tables():
            raise ValueError(f"train=values needs memory tables, and ffn={self.ffn} has none")
        if self.rehearse and not self.init_from:
            raise ValueError("rehearse repeats what a model was taught before: it needs --init_from")
        if self.train == "values" and not self.init_from:
            raise ValueError("train=values teaches a model that is already trained: it needs --init_from")
        for name in ("mem_idf", "mem_top_slots"):
            if getattr(self, name):
                self.check_uses_counts(name)
        if self.dtype == "float64" and self.mem_dtype != "float32":
            raise ValueError(f"dtype=float64 includes the tables; leave out mem_dtype={self.mem_dtype}")

    def check_uses_counts(self, name: str):
        """Raises ValueError where a setting that goes by earlier reads of slots would do nothing."""
        if not self.init_from:
            raise ValueError(f"{name} goes by what earlier training has read: it needs --init_from")
        if self.ffn != "memory" or self.train == "core":
            trained = f"ffn={self.ffn}" if self.ffn != "memory" else "train=core"
            raise ValueError(f"{name} is for memory tables that are trained, and this run has {trained}")


# What says which data a run has.
DESCRIBES_DATA = ("data", "n_entities", "people_seed", "zipf", "seed")


# ------------------------------------------------------------------------------------------------
# The machine. torch is imported inside functions, so that --help is answered at once.


def pick_device(name: str):
    """The torch device of --device; of several processes that torchrun started, each gets a GPU of its own.

    Raises UserError for a device that this machine, or this process, doesn't have.
    """
    import torch

    local_rank = os.environ.get("LOCAL_RANK")  # set by torchrun
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = ["cpu"]
    if torch.backends.mps.is_available() and local_rank is None:  # gloo doesn't support mps
        found.insert(0, "mps")
    if gpus:
        found.insert(0, "cuda")
    name = found[0] if name == "auto" else name
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None and device.type == "cuda" and local_rank is not None:
        if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            raise UserError(f"--device={name} would give all processes the same GPU; "
                            "--device=cuda gives each its own")
        name = f"cuda:{local_rank if device.index is None else device.index}"
        device = torch.device(name)
    if device is None or device.type not in found or (device.type == "cuda" and (device.index or 0) >= gpus):
        unit = "GPU" if gpus == 1 else "GPUs"
        count = f" ({gpus} {unit})" if gpus else ""
        raise UserError(f"--device={name} is not on this machine, which has {', '.join(found)}{count}")
    if device.type == "cuda" and device.index:
        torch.cuda.set_device(device)
    return device


@functools.cache
def machine(use_gpu: bool = True) -> str:
    """A few words about this machine: its GPU if it has one that is used, otherwise its CPU."""
    import torch

    if use_gpu and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = model.group(1).strip() if model else name
    return f"{os.cpu_count()} cores, {name}"


def machine_memory(device) -> float:
    """Bytes of memory of the device; infinity where the system doesn't say."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return math.inf


def keep_freed_memory():
    """Makes glibc keep large freed blocks instead of returning them to the kernel. Call it before the first
    tensor is made.

    Getting them back costs a page fault per 4 kB: a sixth of a training step on a CPU. Where Linux has
    pages of 2 MB, asks for those, too: the rows of a large table lie on more small pages than the processor
    keeps track of. Does nothing on other systems.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks at its first allocation
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(-2, 64 * 2**20)  # M_TOP_PAD: grow it by 64 MB at a time
