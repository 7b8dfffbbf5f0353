"""The settings of the benchmark, and the shapes it measures."""

from dataclasses import dataclass

from nanomem.cli import UserError, setting

KINDS = ("nanomem", "pytorch", "compiled", "paper")


@dataclass(frozen=True)
class Shape:
    """The size of a layer and of its input."""

    tokens: int
    dim: int
    heads: int
    knn: int
    k_dim: int
    n_keys: int

    def __str__(self):
        return (f"{self.n_keys**2:,} slots: {self.tokens:,} tokens, d={self.dim}, {self.heads} heads, "
                f"k={self.knn}, k_dim {self.k_dim}")


CPU_SHAPES = [
    Shape(4096, 128, 4, 16, 128, 1024),
    Shape(4096, 128, 4, 16, 128, 4096),
]
GPU_SHAPES = [
    Shape(4096, 128, 4, 16, 128, 1024),
    Shape(16384, 512, 4, 32, 256, 512),
    Shape(32768, 1024, 4, 32, 512, 1024),
    Shape(32768, 1024, 4, 32, 512, 2048),
]


@dataclass
class BenchConfig:
    """The command line."""

    n_keys: str = setting(
        "auto", "keys per half, one number or several: n_keys**2 slots; auto: 1024,4096",
        section="Settings")
    tokens: int = setting(4096, "tokens per step")
    dim: int = setting(128, "width of input, output and values")
    heads: int = setting(4, "lookups per token")
    knn: int = setting(16, "slots read by each head")
    k_dim: int = setting(128, "length of a query and of a key")
    steps: int = setting(10, "steps to time in a process, after 3 that don't count")
    rounds: int = setting(3, "processes for each measurement, in turn")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the first available of cuda, mps, cpu")
    dtype: str = setting(
        "auto", "dtype of parameters and activations; auto: bfloat16 on cuda, otherwise float32",
        ("auto", "float32", "bfloat16"))
    paper: str = setting("", "a clone of facebookresearch/memory, to time the paper's layer too", path=True)
    generation: bool = setting(False, "time whole models that write 256 tokens, instead of layers")
    prepare: str = setting("", "time data/prepare.py on this text file, instead of layers", path=True)
    tokenizer: str = setting("bytes", "the tokenizer for --prepare", path=True)
    keep_freed: bool = setting(False, "internal: with --only, call keep_freed_memory first, as train.py does")
    only: str = setting(
        "", "internal: measure this in this process and print JSON",
        ("", *KINDS, "kernels"))

    def torch_dtype(self, device):
        """The torch dtype that --dtype means on a device."""
        import torch

        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return torch.bfloat16 if device.type == "cuda" else torch.float32


def shapes_of(config: BenchConfig, given: dict, is_cuda: bool) -> list[Shape]:
    """The shapes to measure. given: the settings on the command line. Raises UserError for invalid ones."""
    for name in ("tokens", "dim", "heads", "knn", "k_dim", "steps", "rounds"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be 1 or more, got {getattr(config, name)}")
    if not given.keys() & Shape.__annotations__.keys():
        return GPU_SHAPES if is_cuda else CPU_SHAPES
    sizes = "1024,4096" if config.n_keys == "auto" else config.n_keys
    if not all(n.strip().isdecimal() and int(n) >= config.knn for n in sizes.split(",")):
        raise UserError(
            f"n_keys must be numbers such as 1024,4096, none below knn = {config.knn}; got {sizes!r}")
    if config.k_dim % 2:
        raise UserError(f"k_dim must be even, to be split into two halves, got {config.k_dim}")
    return [Shape(config.tokens, config.dim, config.heads, config.knn, config.k_dim, int(n))
            for n in sizes.split(",")]
