"""
What a training step does on a GPU, found out without one: how often it waits for the GPU, and how many bytes
it has at most.

    TRITON_INTERPRET=1 python tests/gpu_step.py     bytes of a step at the paper's shape, by layers and passes
"""

import contextlib
import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nanomem import kernels, memory, ops, optim
from nanomem.memory import MemoryTable, ProductKeyMemory

aten = torch.ops.aten
# Their results, or the sizes of these, depend on numbers that are on the GPU.
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive,
    aten.unique_dim, aten.bincount, aten.equal, aten.is_nonzero, aten.repeat_interleave,
    aten.lift_fresh,  # torch.tensor(numbers), which copies them to the GPU
}


class SeesInside(TorchDispatchMode):
    """A mode that sees all operations, also those within nanomem's own, which torch would hide from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nanomem":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.see(func, args, out)
        return out


class Nothing(SeesInside):
    """Only looks inside. nanomem's operations have no other way to run on the device "meta"."""

    def see(self, func, args, out):
        pass


class Waits(SeesInside):
    """Notes each operation for which the program would have to wait for a GPU.

    device: what takes the place of the GPU, "cpu" or "meta".
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.found, self.is_paused = device, [], False

    def see(self, func, args, out):
        devices = {x.device.type for x in pytree.tree_leaves((args, out)) if isinstance(x, torch.Tensor)}
        if self.is_paused or self.device not in devices:
            return
        is_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        is_copy = func.overloadpacket in (aten._to_copy, aten.copy_) and len(devices) == 2
        if is_mask or is_copy or func.overloadpacket in WAITING:
            self.found.append(str(func))

    @contextlib.contextmanager
    def watch(self):
        """Watches operations and also methods that are none for torch."""
        with contextlib.ExitStack() as patches:
            for name in ("tolist", "cpu"):
                method = getattr(torch.Tensor, name)
                patches.enter_context(mock.patch.object(torch.Tensor, name, self.noting(name, method)))
            with self:
                yield self.found

    def noting(self, name, method):
        def call(*args, **options):
            if not self.is_paused:
                self.found.append(name)
            return method(*args, **options)
        return call

    @contextlib.contextmanager
    def paused(self):
        """A block in which nothing is noted."""
        self.is_paused = True
        yield
        self.is_paused = False


class PeakBytes(SeesInside):
    """Counts the bytes of all tensors that operations make, and the most there were at a time."""

    def __init__(self):
        super().__init__()
        self.bytes, self.now, self.peak = {}, 0, 0

    def see(self, func, args, out):
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        # Autograd adds up dense gradients in place, but with a mode it makes a new tensor for the sum.
        if func != aten.add.Tensor:
            self.peak = max(self.peak, self.now)

    def add(self, tensor):
        """Counts a tensor from now until its memory is freed."""
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        for part in parts:
            storage = part.untyped_storage()
            if id(storage) not in self.bytes:
                self.bytes[id(storage)] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, id(storage))

    def free(self, key):
        self.now -= self.bytes.pop(key)


@contextlib.contextmanager
def kernels_on_meta(launch):
    """On the device "meta", where tensors have shapes but no numbers, takes the way of the Triton kernels.
    launch(kernel, grid) comes in the place of kernel[grid].
    """
    with contextlib.ExitStack() as patches:
        for module in (memory, ops, optim):
            patches.enter_context(mock.patch.object(module, "use_kernels", lambda x: True))
        kernel = type(kernels._sddmm_kernel)
        patches.enter_context(mock.patch.object(kernel, "__getitem__", launch))
        patches.enter_context(mock.patch.object(ops, "bmm_float32", bmm_of_cuda))
        yield


def no_launch(kernel, grid):
    """In place of kernel[grid]: computes nothing."""
    return lambda *args, **options: None


def bmm_of_cuda(a, b):
    """The result of bmm_float32. On a GPU it makes nothing else."""
    return a.new_empty(len(a), a.shape[1], b.shape[2], dtype=torch.float32)


def layers_on_meta(layers: int, n_keys: int, dim: int, heads: int, knn: int, k_dim: int) -> torch.nn.Module:
    """Memory layers with one table, in bfloat16."""
    with torch.device("meta"):
        table = MemoryTable(n_keys**2, dim)
        model = torch.nn.ModuleList(ProductKeyMemory(dim, table, heads, knn, k_dim) for _ in range(layers))
    return model.bfloat16()


def step_on_meta(model: torch.nn.Module, passes: int, n: int):
    """A training step of layers_on_meta, with forward and backward passes of n tokens each."""
    optimizers = optim.build_optimizer(model)
    for _ in range(passes):
        x = torch.zeros(1, n, model[0].dim, dtype=torch.bfloat16, device="meta")
        for layer in model:
            x = x + layer(x)
        x.square().mean().backward()
        del x
    optim.clip_gradients(model, 1.0, optimizers)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def peak_of_step(layers: int, passes: int) -> int:
    """The most bytes that a step has in tensors at the paper's shape, parameters and optimizers' state
    included.
    """
    model = layers_on_meta(layers, n_keys=1024, dim=1024, heads=4, knn=32, k_dim=512)
    with kernels_on_meta(no_launch), PeakBytes() as counted:
        for p in model.parameters():
            counted.add(p)
        step_on_meta(model, passes, n=32768)
    return counted.peak


if __name__ == "__main__":
    for layers, passes in ((1, 1), (1, 8), (3, 1), (3, 8)):
        peak = peak_of_step(layers, passes)
        print(f"{layers} layers, {passes} passes: {peak / 1e9:.2f} GB")
