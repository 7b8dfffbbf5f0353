"""The parts of the layer alone, on a GPU: how near each comes to the bandwidth of the card."""

import torch

from nanomem import optim
from nanomem.bench.layers import Clock
from nanomem.bench.settings import BenchConfig, Shape
from nanomem.config import machine_memory, pick_device
from nanomem.memory import MemoryTable, memory_read, merge_halves, product_key_topk


def measure_parts(config: BenchConfig, shape: Shape) -> dict[str, float]:
    """Milliseconds of each part, and as NAME_share the bytes it must move over its time, as a share of what a
    copy reaches.

    Reads and gradients are of slots drawn evenly; those called "scattered" are of 100,000 slots spread over
    ever larger tables. The backward pass's share counts each gradient that is gathered, so it can exceed 1 if
    the L2 cache holds them.
    """
    device = pick_device(config.device)
    dtype = config.torch_dtype(device)
    timer = Timer(device, config.steps)
    torch.manual_seed(0)
    copied = copy_speed(timer, device)
    result = {"copy_gb_s": copied / 1e6} | measure_topk(timer, shape, device, dtype)

    lookups = shape.heads * shape.knn
    read, backward, update, unique = read_and_update(timer, shape, device, dtype, shape.n_keys**2)
    row = dtype.itemsize * shape.dim  # bytes
    bytes_read = row * shape.tokens * (lookups + 1)
    result |= {
        "read": read,
        "read_share": bytes_read / read / copied,
        "backward": backward,
        "backward_share": (bytes_read + row * 2 * unique) / backward / copied,
        "update": update,
        "update_share": unique * (3 * row + 24) / update / copied,
    }
    for n_slots in (512**2, 1024**2, 2048**2, 4096**2):
        if n_slots * (2 * row + 8) < 0.8 * machine_memory(device):
            times = read_and_update(timer, shape, device, dtype, n_slots, n_read=10**5)[:3]
            result[f"scattered_{n_slots:,}"] = sum(times)
    return result


class Timer:
    """timer(function): the milliseconds it takes, the mean over some calls."""

    def __init__(self, device, calls):
        self.clock, self.calls = Clock(device), calls

    def __call__(self, function):
        for _ in range(3):
            function()
        self.clock.mark()
        for _ in range(self.calls):  # without waiting in between, so that the CPU can run ahead of the GPU
            function()
        self.clock.mark()
        return self.clock.read()[0] / self.calls


def copy_speed(timer, device):
    """Bytes per millisecond of a large copy: read and written."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source))


def measure_topk(timer, shape, device, dtype):
    """Milliseconds of choosing slots, of merging the halves alone, and of the gradients."""
    half_dim = shape.k_dim // 2
    queries = torch.randn(shape.tokens, shape.heads, 2, half_dim, device=device, dtype=dtype)
    keys = torch.randn(shape.heads, 2, shape.n_keys, half_dim, device=device, dtype=dtype)
    result = measure_merge(timer, queries, keys, shape.knn)
    result["topk"] = timer(lambda: product_key_topk(queries, keys, shape.knn))
    scores, _ = product_key_topk(queries.requires_grad_(), keys.requires_grad_(), shape.knn)
    grad = torch.randn_like(scores)
    result["topk_backward"] = timer(
        lambda: torch.autograd.grad(scores, (queries, keys), grad, retain_graph=True))
    return result


def measure_merge(timer, queries, keys, knn):
    """Milliseconds of merge_halves, and of the two torch.topk that it takes the place of."""
    n, heads = queries.shape[:2]
    half_scores = torch.einsum("nhcd,hckd->hcnk", queries.float(), keys.float()).contiguous()
    candidates = torch.randn(n, heads, knn**2, device=queries.device)
    return {
        "merge_halves": timer(lambda: merge_halves(half_scores, knn)),
        "two_torch_topk": timer(lambda: (half_scores.topk(knn), candidates.topk(knn))),
    }


def read_and_update(timer, shape, device, dtype, n_slots, n_read=None):
    """Milliseconds of a table's read, backward pass and update, and the number of distinct rows read.

    n_read: how many of the slots can be read, evenly spread over the table; all of them by default.
    """
    n_read = n_read or n_slots
    size = shape.tokens, shape.heads * shape.knn
    with device:
        table = MemoryTable(n_slots, shape.dim, dtype=dtype)
    optimizer = optim.RowAdam([table.values])
    weights = torch.rand(size, device=device, dtype=dtype)
    indices = torch.randint(n_read, size, device=device) * (n_slots // n_read)
    grad = torch.randn(shape.tokens, shape.dim, device=device, dtype=dtype)
    with torch.no_grad():
        read = timer(lambda: memory_read(table.values, indices, weights))
    weights.requires_grad_()
    y = table(indices, weights)
    backward = timer(lambda: torch.autograd.grad(y, (table.values, weights), grad, retain_graph=True))
    table.values.grad = torch.autograd.grad(y, table.values, grad)[0]
    return read, backward, timer(optimizer.step), len(indices.unique())
