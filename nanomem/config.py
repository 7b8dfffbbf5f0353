"""
Every setting of train.py with its default, and the command line that changes it.

    python train.py --key=value ...      python train.py --help
"""

import contextlib
import ctypes
import dataclasses
import difflib
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError


def setting(default, help, choices=None, group=None, path=False):
    """A dataclass field with a line of help. `group` begins a group of --help; in a `path` a ~ is the home folder."""
    return field(default=default, metadata={"help": help, "choices": choices, "group": group, "path": path})


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback."""


MISTAKES = (UserError, ValueError, OSError, ModuleNotFoundError, SafetensorError)  # what bad settings, data or disks raise


@dataclass
class GPTConfig:
    """The model's shape."""

    vocab_size: int = setting(2048, "tokens to train a tokenizer=bpe with; otherwise the tokenizer decides", group="Model")
    n_layer: int = setting(3, "layers")
    n_head: int = setting(2, "attention heads")
    n_embd: int = setting(32, "width of the model")
    block_size: int = setting(64, "tokens the model sees at once; by default more if one of your own facts is longer")
    dropout: float = setting(0.0, "share of activations dropped while training")
    ffn: str = setting("memory", "what stands in mem_layers: memory layers, ordinary (dense) feed-forward layers as everywhere else, "
                                 "mixtures of experts (moe) or PEER layers", ("memory", "dense", "moe", "peer"))
    ffn_hidden: int = setting(0, "width of a feed-forward layer; 0: 8/3 n_embd, and for ffn=dense, moe and peer as many FLOPs as with memory")

    mem_layers: str = setting("2", "layers, counted from 0, whose feed-forward is a memory layer", group="Memory")
    mem_n_keys: int = setting(512, "keys a half; the memory has mem_n_keys**2 slots")
    mem_heads: int = setting(1, "independent searches a token in each memory layer")
    mem_knn: int = setting(32, "slots read by each head")
    mem_k_dim: int = setting(64, "length of a query and of a key, even; 0: n_embd")
    mem_v_dim: int = setting(0, "length of a value; 0: n_embd")
    mem_gated: bool = setting(True, "multiply what was read by silu(W_gate x)")
    mem_qk_norm: bool = setting(True, "normalise both halves of queries and keys")
    mem_share_values: bool = setting(True, "one table of values for all memory layers")
    mem_dtype: str = setting("float32", "of the values; bfloat16 takes half the memory and is rounded stochastically", ("float32", "bfloat16"))

    moe_experts: int = setting(0, "experts in each layer of ffn=moe; 0: as many parameters as with memory", group="Baselines")
    moe_hidden: int = setting(0, "width of an expert; 0: as many FLOPs as with memory")
    moe_k: int = setting(1, "experts a token")
    moe_balance: float = setting(0.01, "weight of the loss that has experts used evenly")
    peer_n_keys: int = setting(0, "keys a half of ffn=peer, for peer_n_keys**2 experts of one neuron; 0: as many parameters as with memory")

    def replace(self, **changes):
        """A copy with other settings."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def groups(cls, *titles):
        """The fields in the groups of these titles, as --help shows them."""
        chosen, title = [], None
        for f in dataclasses.fields(cls):
            title = f.metadata["group"] or title
            chosen += [f] if title in titles else []
        return chosen

    def memory_layer_numbers(self):
        """The layers of mem_layers, as numbers."""
        try:
            return [int(part) for part in self.mem_layers.split(",") if part.strip()]
        except ValueError:
            raise ValueError(f"mem_layers must be layer numbers such as 1,2, got {self.mem_layers!r}") from None

    def check(self):
        """Raises ValueError naming the first setting that can't be."""
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size", "mem_n_keys", "mem_heads", "mem_knn", "moe_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("ffn_hidden", "mem_k_dim", "mem_v_dim", "moe_experts", "moe_hidden", "moe_balance", "peer_n_keys"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for f in dataclasses.fields(self):  # sizes past these overflow torch's own arithmetic
            most = 2**22 if f.name in ("mem_n_keys", "peer_n_keys") else 2**31
            if f.type is int and f.name != "seed" and getattr(self, f.name) >= most:
                raise ValueError(f"{f.name} must be under {most:,}, got {getattr(self, f.name)}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd must be a multiple of 2 * n_head = {2 * self.n_head}, got {self.n_embd}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to under 1, got {self.dropout}")
        if self.ffn == "dense" and self.ffn_hidden:
            return  # the memory's settings play no part
        numbers = self.memory_layer_numbers()
        if not numbers:
            raise ValueError("mem_layers must name at least one layer")
        if any(not 0 <= i < self.n_layer for i in numbers) or len(set(numbers)) < len(numbers):
            raise ValueError(f"mem_layers must be different layers from 0 to {self.n_layer - 1}, got {self.mem_layers!r}")
        if self.mem_knn > self.mem_n_keys:
            raise ValueError(f"mem_knn must be at most mem_n_keys = {self.mem_n_keys}, got {self.mem_knn}")
        if self.ffn == "moe" and 0 < self.moe_experts < self.moe_k:
            raise ValueError(f"moe_k must be at most moe_experts = {self.moe_experts}, got {self.moe_k}")
        if self.ffn == "peer" and 0 < self.peer_n_keys < self.mem_knn:
            raise ValueError(f"mem_knn must be at most peer_n_keys = {self.peer_n_keys}, got {self.mem_knn}")
        if (self.mem_k_dim or self.n_embd) % 2:
            raise ValueError(f"mem_k_dim must be even, got {self.mem_k_dim}")


@dataclass
class Config(GPTConfig):
    """All settings of train.py."""

    @classmethod
    def from_saved(cls, saved, where):
        """The Config of a run's saved {name: value}. Raises UserError naming settings that this version doesn't have."""
        unknown = saved.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise UserError(f"the run in {where} has settings unknown to this version of nanomem: {', '.join(sorted(unknown))}")
        for f in dataclasses.fields(cls):
            if f.name in saved and type(saved[f.name]) not in ((int, float) if f.type is float else (f.type,)):
                raise UserError(f"the run in {where} has {f.name}={saved[f.name]!r}, expected {f.type.__name__}")
        return cls(**saved)

    data: str = setting("people", "people (invented), world (cities), the path of a .jsonl file of facts or of a text file, or what "
                                  "data/prepare.py made", group="Data", path=True)
    n_entities: int = setting(3000, "people or cities to learn about")
    zipf: float = setting(0.6, "the entity of rank r is mentioned in proportion to r ** -zipf")
    tokenizer: str = setting("auto", "bytes, bpe (trained on the data), a .tiktoken file, or an encoding of tiktoken such as gpt2; "
                                     "auto: the one beside world and people, bytes for your own files", path=True)

    seed: int = setting(1337, "of the weights, the batches and data=people")

    batch_size: int = setting(32, "sequences a forward and backward pass", group="Training")
    gradient_accumulation_steps: int = setting(1, "passes an update")
    max_iters: int = setting(2560, "updates")
    learning_rate: float = setting(8e-3, "peak learning rate of all but the tables")
    mem_lr: float = setting(3e-2, "peak learning rate of the tables' values")
    mem_beta2: float = setting(0.99, "of the values' second moment, one number a slot; 0: each step is scaled by its own gradient")
    min_lr: float = setting(8e-4, "learning rate at the end; the values' falls in the same proportion")
    warmup_iters: int = setting(100, "updates over which the learning rates rise from 0")
    weight_decay: float = setting(0.1, "AdamW's weight decay, for matrices")
    mem_parallel: int = setting(0, "processes that a table's columns are split over, under torchrun; 0: all of them (those of ffn=peer aren't)")
    grad_clip: float = setting(1.0, "largest norm of the gradient, of tables and others apart; 0: no limit")

    out_dir: str = setting("auto", "folder for checkpoint, config and metrics; auto: out/DATA-FFN", group="Run", path=True)
    resume: bool = setting(False, "go on from the checkpoint in out_dir, with its settings")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the first of cuda, mps and cpu that is there")
    dtype: str = setting("auto", "of the matrix products; auto: bfloat16 on cuda, else float32; float64: everything, for checking",
                         ("auto", "float32", "bfloat16", "float64"))
    compile: bool = setting(False, "torch.compile the model")
    deterministic: bool = setting(False, "on cuda too, the same run bit for bit from the same seed")
    eval_interval: int = setting(320, "updates between evaluations, each followed by a checkpoint")
    eval_iters: int = setting(10, "batches an evaluation")
    log_interval: int = setting(10, "updates between lines of metrics")

    def shards(self):
        """Processes that a table's columns are split over, 0 for all: PEER's tables are whole in each."""
        return 1 if self.ffn == "peer" else self.mem_parallel

    def check(self):
        """Raises ValueError naming the first setting that can't be."""
        super().check()
        for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("max_iters", "warmup_iters", "learning_rate", "mem_lr", "min_lr", "weight_decay", "grad_clip", "zipf", "seed",
                     "mem_parallel"):
            if not 0 <= getattr(self, name) < float("inf"):
                finite = " and finite" if isinstance(getattr(self, name), float) else ""
                raise ValueError(f"{name} must be 0 or more{finite}, got {getattr(self, name)}")
        if not 0 <= self.mem_beta2 < 1:
            raise ValueError(f"mem_beta2 must be from 0 to under 1, got {self.mem_beta2}")
        if self.dtype == "float64" and self.mem_dtype != "float32":
            raise ValueError(f"dtype=float64 is for everything, the tables too; it can't go with mem_dtype={self.mem_dtype}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be under 2**63, got {self.seed}")


# ------------------------------------------------------------------------------------------------
# The command line


def convert(setting, text):
    """The value of a setting from the command line's text. Raises UserError naming the setting and what it takes."""
    choices = setting.metadata["choices"]
    if setting.metadata["path"]:
        return expand(text)
    if setting.type is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if choices and text not in choices:
        raise UserError(f"--{setting.name} must be one of {', '.join(choices)}; got {text!r}{nearest(text, choices)}")
    try:
        if setting.type is not bool:
            return setting.type(text)
    except ValueError:
        pass
    kind = {int: "a whole number", float: "a number", bool: "true or false"}[setting.type]
    raise UserError(f"--{setting.name} must be {kind}, such as {default_text(setting)}; got {text!r}")


def expand(path):
    """A path with ~ or ~user replaced by that home folder. Raises UserError where there is no such user."""
    expanded = os.path.expanduser(path)
    if expanded == path and path.startswith("~"):
        raise UserError(f"{path}: there is no user {path.partition('/')[0][1:]!r}; a file of that name here is ./{path}")
    return expanded


def default_text(setting):
    """How a setting's default looks on the command line."""
    return str(setting.default).lower() if setting.type is bool else str(setting.default)


def nearest(name, names):
    """' (did you mean X?)' for the most similar name, or nothing."""
    close = difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def parse(cls, argv):
    """The settings given on a command line, as {name: value}. cls is a dataclass made of `setting`s.

    Raises UserError for an unknown name or a value that can't be; prints help and exits for --help.
    """
    settings = {f.name: f for f in dataclasses.fields(cls)}
    given = {}
    for argument in argv:
        name, equals, text = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if argument in ("-h", "--help"):
            if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, the first
                print_help(cls)
            sys.exit(0)
        if not argument.startswith("--"):
            hint = f" (did you mean --{argument.lstrip('-')}?)" if argument.lstrip("-").partition("=")[0] in settings else ""
            raise UserError(f"expected --key=value, got {argument!r}{hint}")
        if name not in settings:
            raise UserError(f"unknown setting --{name}{nearest(name, settings)}; --help lists them all")
        if not equals and settings[name].type is not bool:
            raise UserError(f"--{name} needs a value after an equals sign: --{name}={default_text(settings[name]) or '...'}")
        given[name] = convert(settings[name], text if equals else "true")
    return given


def print_help(cls):
    """How the program is called, and every setting with its default and meaning, in groups."""
    program = sys.modules["__main__"]
    called = f"-m {program.__spec__.name}" if program.__spec__ else sys.argv[0]
    print(f"usage: python {called} {getattr(cls, 'arguments', '')}[--key=value ...]")
    for f in dataclasses.fields(cls):
        if f.metadata["group"]:
            print(f"\n{f.metadata['group']}")
        choices = f" ({'|'.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        print(f"  --{f.name + '=' + default_text(f):<34} {f.metadata['help']}{choices}")


def pick_device(name):
    """The torch device of --device; where torchrun started several processes on a machine, each has a GPU of its own.

    Raises UserError for one that this machine, or this process, doesn't have.
    """
    local_rank = os.environ.get("LOCAL_RANK")  # torchrun's
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = ["cuda"] * (gpus > 0) + ["mps"] * (torch.backends.mps.is_available() and local_rank is None) + ["cpu"]  # gloo doesn't take mps
    name = found[0] if name == "auto" else name
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None and device.type == "cuda" and local_rank is not None:
        if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            raise UserError(f"--device={name} would give all processes the same GPU; --device=cuda gives each its own")
        name = f"cuda:{local_rank if device.index is None else device.index}"
        device = torch.device(name)
    if device is None or device.type not in found or (device.type == "cuda" and (device.index or 0) >= gpus):
        raise UserError(f"--device={name} is not on this machine, which has {', '.join(found)}{f' ({gpus} GPUs)' if gpus else ''}")
    if device.type == "cuda" and device.index:
        torch.cuda.set_device(device)
    return device


def machine_memory(device):
    """Bytes of memory of the device; infinity where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return math.inf


def keep_freed_memory():
    """Makes glibc keep large blocks that are freed, where it would give them back to the kernel and get them anew, a page
    fault for each 4 kB: a sixth of a training step on a CPU. And asks for pages of 2 MB, where Linux has them to give: the
    processor remembers where a few thousand pages are, and rows of a large table are all over it. Call it before the first
    tensor is made. Does nothing on other systems.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks when it first allocates
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(-2, 64 * 2**20)  # M_TOP_PAD: grow it by 64 MB at a time


class SafeStream:
    """A text stream whose writes never fail: once the disk is full or the reader has left, they go nowhere.

    `error` is the first error, None before. Characters that the stream's encoding lacks become \\u escapes.
    """

    def __init__(self, stream):
        self.stream, self.error = stream, None
        with contextlib.suppress(AttributeError):  # a StringIO takes every character
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        """Writes text, if that is still possible."""
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        """Hands what is buffered to the system, if that is still possible."""
        self._attempt(self.stream.flush)

    def _attempt(self, call, *arguments):
        try:
            call(*arguments)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.error = self.error or error
            # What is still buffered must go somewhere: the interpreter flushes it at its end.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def safe_streams():
    """Makes stdout and stderr SafeStreams, and replaces a stream that was closed at the start by an empty one.

    Call it before any file is opened: a file would take a closed stream's number, and get what libraries print there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), SafeStream):
            setattr(sys, name, SafeStream(getattr(sys, name)))


def mistake(error):
    """The line that tells a user what to mend; None for an error that is not the user's."""
    first_line = str(error).split("\n")[0]
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in first_line  # torch has no class for it
    if on_cpu or isinstance(error, torch.OutOfMemoryError):
        return f"there is not enough memory for these settings ({first_line})"
    if isinstance(error, MISTAKES):
        return " ".join(str(error).split("\n")) or repr(error)
    return None


@contextlib.contextmanager
def one_line_errors(leave=sys.exit):
    """A user's mistake ends the program with one line on stderr and exit code 2, without a traceback; Ctrl-C with none, and 130.

    leave(code) ends it. Of the processes that torchrun started on a machine, the first one prints the line.
    """
    try:
        yield
    except SystemExit as end:
        leave(end.code or 0)
    except KeyboardInterrupt:
        leave(130)
    except Exception as error:
        line = mistake(error)
        if line is None:
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        leave(2)
