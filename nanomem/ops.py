"""
The plumbing under memory.py: which device computes what, and how its functions become operations for
autograd, torch.compile, torch.export and torch.func. Nothing here is needed to understand a memory layer.
"""

import contextlib
import functools
import importlib.util
import math
import os

import torch
import torch.nn as nn
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

# Keeps a function out of torch.compile's graphs. This is torch.compiler.disable, except that it imports
# torch._dynamo (0.8 s) at the function's first call and not here.
not_compiled = _disable_dynamo

# ------------------------------------------------------------------------------------------------
# Devices and dtypes


def use_kernels(x: torch.Tensor) -> bool:
    """Whether the Triton kernels (kernels.py) compute with x; otherwise plain PyTorch does.

    They do for 16- and 32-bit floats on a CUDA or ROCm GPU where Triton is installed. The environment
    variable NANOMEM_KERNELS forces either: "triton" (on a CPU this needs Triton's interpreter,
    TRITON_INTERPRET=1) or "torch". Raises ValueError for another value of it.
    """
    choice = os.environ.get("NANOMEM_KERNELS", "auto")
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"NANOMEM_KERNELS must be auto, triton or torch, got {choice!r}")
    if choice == "auto":
        choice = "triton" if x.is_cuda and _has_triton() else "torch"
    can_run = _has_triton() and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    if choice == "triton" and not can_run:
        raise ValueError(
            "NANOMEM_KERNELS=triton needs Triton and a GPU, or Triton's interpreter (TRITON_INTERPRET=1); "
            f"the tensor is on {x.device}"
        )
    return choice == "triton" and x.dtype != torch.float64


@functools.cache
def _has_triton():
    return importlib.util.find_spec("triton") is not None


def bmm_float32(a, b):
    """torch.bmm(a, b) in float32 at least: the products of 16-bit numbers are exact in it."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype in (torch.float32, torch.float64):
            return torch.bmm(a, b)
        if a.is_cuda and torch.version.hip is None:
            return torch.bmm(a, b, out_dtype=torch.float32)
        return torch.bmm(a.float(), b.float())


def tokens_at_once(keys):
    """How many tokens to score at a time, for keys (heads, 2, n_keys, k_dim / 2).

    Caps the buffer of half scores at 8 MB on a CPU, where it stays in cache: a quarter faster than all
    tokens at once. On a GPU, which needs more work at a time, at 128 MB.
    """
    numbers = 2**21 if keys.device.type == "cpu" else 2**25
    heads, halves, n_keys, _ = keys.shape
    return max(1, numbers // (heads * halves * n_keys))


def narrowest_integer(n):
    """The smallest integer dtype that holds every number below n. A CPU's radix sort takes one pass per
    byte.
    """
    if n <= 2**15:
        return torch.int16
    return torch.int32 if n <= 2**31 else torch.int64


class Linear(nn.Linear):
    """nn.Linear with an initialisation of its own, which reset_parameters repeats (torch's device "meta"
    needs that).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init=None):
        self.init = init  # nn.Linear's __init__ calls reset_parameters
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self):
        super().reset_parameters()
        if self.init is not None:
            self.init(self.weight)


def mix(x: torch.Tensor) -> torch.Tensor:
    """A hash of 32-bit integers (in int64): every output bit depends on every input bit."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def drop_lookups(weights: torch.Tensor, share: float, first: torch.Tensor | None) -> torch.Tensor:
    """Dropout of weights (n, heads, knn): sets a share of them to 0 and divides the rest by 1 - share.

    first: the first token's number in training, () int64. A hash of a token's number decides which of its
    lookups are dropped: the same ones in a resumed run and in any number of processes. None: torch's own
    dropout.
    """
    if first is None:
        return torch.nn.functional.dropout(weights, share)
    n, lookups = len(weights), weights.shape[1] * weights.shape[2]
    token = mix((first + torch.arange(n, device=weights.device)) & 0xFFFFFFFF)           # (n,)
    lookup = torch.arange(lookups, device=weights.device) * 0x9E3779B9
    is_kept = mix((token[:, None] + lookup) & 0xFFFFFFFF) >= share * 2**32               # (n, lookups)
    return weights * is_kept.view(weights.shape) / (1 - share)


@torch.no_grad()
def draw_rows(values, v_dim, columns):
    """Fills a table with normal(v_dim ** -0.5) numbers: values (n_slots, len(columns)), some columns of
    v_dim.

    Whole rows are drawn, 2**16 at a time, so that a table has the same values however it is split over
    processes.
    """
    std = v_dim**-0.5
    if values.is_meta or type(values.data) is not torch.Tensor:  # nothing to draw, or FSDP's DTensor
        values.normal_(std=std)
        return
    for rows in values.split(2**16):
        if len(columns) == v_dim:
            rows.normal_(std=std)
        else:
            whole = rows.new_empty(len(rows), v_dim).normal_(std=std)
            rows.copy_(whole[:, columns.start : columns.stop])


# ------------------------------------------------------------------------------------------------
# Gradients


class _FirstDerivative(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(operation, *inputs):
        return operation(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "a memory layer has no second derivative: expected a loss without gradient "
            "penalties, Hessian products or other gradients of gradients through it"
        )


def first_derivative(operation, *inputs):
    """operation(*inputs) in a backward pass; differentiating it again raises NotImplementedError.

    torch's once_differentiable would treat the saved tensors as constants and return a wrong second
    derivative.
    """
    if torch.compiler.is_compiling():  # ahead-of-time compilation itself refuses second derivatives
        return operation(*inputs)
    return _FirstDerivative.apply(operation, *inputs)


def _register(function, name, fake=None):
    """Registers the operation nanomem::name. fake(*inputs) gives the shapes and dtypes of its outputs."""
    operation = torch.library.custom_op(f"nanomem::{name}", function, mutates_args=())
    if fake is not None:
        operation.register_fake(fake)
    return operation


def _function(forward, setup_context, backward):
    """A torch.autograd.Function of these three, which torch.func can transform."""
    methods = {"forward": forward, "setup_context": setup_context, "backward": backward}
    members = {name: staticmethod(method) for name, method in methods.items()} | {"generate_vmap_rule": True}
    return type("Function", (torch.autograd.Function,), members)


def search(forward):
    """A decorator: makes forward(queries, keys, knn) -> (scores, slots) an operation with a gradient.

    The result checks its inputs. `result.register_gradient` decorates the gradient,
    backward(grad_scores, queries, keys, slots) -> (grad_queries, grad_keys).
    """

    def fake(queries, keys, knn):
        n, heads = queries.shape[:2]
        scores = queries.new_empty(n, heads, knn, dtype=torch.promote_types(queries.dtype, torch.float32))
        return scores, scores.new_empty(n, heads, knn, dtype=torch.int64)

    def fake_gradient(grad_scores, queries, keys, slots):
        return queries.new_empty(queries.shape), keys.new_empty(keys.shape)

    def setup_context(ctx, inputs, output):
        queries, keys, _ = inputs
        _, slots = output
        ctx.save_for_backward(queries, keys, slots)
        ctx.mark_non_differentiable(slots)

    def gradient(ctx, grad_scores, _):
        return *first_derivative(run_backward, grad_scores, *ctx.saved_tensors), None

    name = forward.__name__
    run = _register(forward, name, fake)
    run.register_autograd(gradient, setup_context=setup_context)  # for torch.compile
    function = _function(lambda *inputs: run(*inputs), setup_context, gradient)  # for torch.func
    run_backward = None

    @functools.wraps(forward)
    def checked(queries, keys, knn):
        check_search(queries, keys, knn)
        if queries.is_cuda and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")  # for the tensor cores; scores are float32 all the same
            queries, keys = queries.to(dtype), keys.to(dtype)
        if not torch.compiler.is_compiling():
            return function.apply(queries, keys, knn)
        if forward_ad._current_level >= 0:  # torch.compile would drop the tangents silently
            raise NotImplementedError(f"{name} has no forward-mode derivative: use backward() or jacrev")
        return run(queries, keys, knn)

    def register_gradient(backward):
        nonlocal run_backward
        run_backward = _register(backward, f"{name}_backward", fake_gradient)
        return backward

    checked.register_gradient = register_gradient
    return checked


def reads_table(shape_of):
    """Makes a decorator that makes forward(values, indices, x, sparse_grad) an operation with gradients.

    shape_of(values, indices, x) checks the inputs and returns the output's shape.
    `result.register_gradient` decorates backward(grad, values, indices, x, values_need_it, x_needs_it) ->
    (rows, sums, grad_x), each None if not needed: `sums` (u, dim) is the gradient of the rows (u,) of
    values, and all others have none. With sparse_grad the gradient of values is a sparse tensor of these
    rows, otherwise a dense one.
    """

    def decorate(forward):
        def fake(values, indices, x, sparse_grad):
            return x.new_empty(shape_of(values, indices, x))

        def setup_context(ctx, inputs, output):
            *tensors, ctx.sparse_grad = inputs
            ctx.save_for_backward(*tensors)

        def gradient(ctx, grad):
            values, indices, x = ctx.saved_tensors
            values_need_it, _, x_needs_it, _ = ctx.needs_input_grad
            options = ctx.sparse_grad, values_need_it, x_needs_it
            rows, grad_values, grad_x = first_derivative(run_backward, grad, values, indices, x, *options)
            if ctx.sparse_grad and values_need_it:
                grad_values = table_gradient(rows, grad_values, values)
            return grad_values if values_need_it else None, None, grad_x if x_needs_it else None, None

        name = forward.__name__
        run = _register(forward, name, fake)
        function = _function(lambda *inputs: run(*inputs), setup_context, gradient)
        run_backward = None

        # torch.compile takes neither a sparse gradient nor one with as many rows as were read.
        @not_compiled
        @functools.wraps(forward)
        def checked(values, indices, x, sparse_grad=False):
            shape_of(values, indices, x)
            return function.apply(values, indices, x, sparse_grad)

        def register_gradient(backward):
            nonlocal run_backward
            run_backward = _register(_only_tensors(backward), f"{name}_backward")
            return backward

        checked.register_gradient = register_gradient
        return checked

    return decorate


def _only_tensors(backward):
    """The gradient of `reads_table` as a custom operation, which can't return None: empty tensors take its
    place. Without sparse_grad, the gradient of values is dense, and the rows are empty.
    """

    def padded(
        grad: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        x: torch.Tensor,
        sparse_grad: bool,
        values_need_it: bool,
        x_needs_it: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, sums, grad_x = backward(grad.contiguous(), values, indices, x, values_need_it, x_needs_it)
        grad_x = x.new_empty(0) if grad_x is None else grad_x
        if rows is None:
            return indices.new_empty(0), values.new_empty(0), grad_x
        if not sparse_grad:
            return rows[:0], dense_rows(rows, sums, values), grad_x
        return rows, sums, grad_x

    return padded


def table_gradient(rows, grad, values):
    """The gradient of values whose rows (u,), ascending and distinct, are grad (u, columns): a sparse tensor.

    With the kernels it is a dense one if it would have, together with values.grad, as many rows as values.
    On a GPU, adding sparse gradients only puts one after the other, so without that they would grow with
    every layer and pass.
    """
    if use_kernels(values) and len(rows) + rows_of_gradient(values) >= len(values):
        sum_repeated_rows_(values)
        return dense_rows(rows, grad, values)
    return sparse_rows(rows, grad, values.shape)


def rows_of_gradient(values):
    """The number of rows in values.grad, those that occur twice counted twice."""
    if not values.is_leaf or values.grad is None:
        return 0
    return values.grad._nnz() if values.grad.is_sparse else len(values.grad)


def sum_repeated_rows_(values):
    """Makes each row of a sparse values.grad occur once. Added to a dense gradient, rows that repeat would be
    added up in any order.
    """
    from nanomem import kernels

    grad = values.grad if values.is_leaf else None
    if grad is not None and grad.is_sparse and not is_distinct(grad):
        rows, rows_grad = grad._indices()[0], grad._values()
        ones = rows_grad.new_ones(len(rows), 1)
        rows, sums, _ = kernels.segment_sum(rows[:, None], ones, rows_grad, len(values))
        values.grad = sparse_rows(rows, sums, values.shape)


def dense_rows(rows, grad, values):
    """A tensor like values, 0 but for the rows (u,), ascending and distinct, which are grad (u, columns)."""
    if len(rows) == len(values):
        return grad
    return torch.zeros_like(values).index_copy_(0, rows, grad)


def sparse_rows(rows, grad, shape):
    """A sparse tensor of this shape whose rows (u,), ascending and distinct, are grad (u, columns)."""
    rows = rows[None]
    # Autograd drops the flag is_coalesced, but keeps the memory. `is_distinct` looks for this mark.
    with contextlib.suppress(NotImplementedError):  # torch.func's tensors have no memory
        rows.untyped_storage().has_distinct_rows = True
    return torch.sparse_coo_tensor(rows, grad, shape, is_coalesced=True, check_invariants=False)


def is_distinct(grad):
    """Whether a sparse gradient is known to have each row once, in ascending order. Doesn't look at the rows:
    a GPU would have to be waited for.
    """
    return grad.is_coalesced() or hasattr(grad._indices().untyped_storage(), "has_distinct_rows")


def check_layer(layer):
    """Raises ValueError for the first setting of a ProductKeyMemory that is invalid."""
    check_lookup(layer.table.n_slots, layer.heads, layer.knn, layer.k_dim)


def check_lookup(n_slots, heads, knn, k_dim):
    """Raises ValueError for the first setting of a product-key lookup that is invalid."""
    n_keys = math.isqrt(n_slots)
    if n_keys**2 != n_slots:
        square = f"{n_keys}**2 = {n_keys**2}"
        raise ValueError(f"the table must have a square number of slots, such as {square}, got {n_slots}")
    if not 1 <= knn <= n_keys:
        raise ValueError(f"knn must be from 1 to n_keys = {n_keys}, got {knn}")
    if k_dim < 2 or k_dim % 2:
        raise ValueError(f"k_dim must be even, to be split into two halves, got {k_dim}")
    if heads < 1:
        raise ValueError(f"heads must be 1 or more, got {heads}")


def check_table(n_slots, v_dim):
    """Raises ValueError for a size of a MemoryTable that is below 1."""
    if n_slots < 1 or v_dim < 1:
        raise ValueError(f"n_slots and v_dim must be 1 or more, got {n_slots} and {v_dim}")


def check_search(queries, keys, knn):
    """Raises ValueError for arguments of product_key_topk that don't fit each other."""
    fits = (
        queries.dim() == keys.dim() == 4
        and queries.shape[1:3] == keys.shape[:2]
        and queries.shape[3] == keys.shape[3]
        and queries.shape[2] == 2
        and 0 not in keys.shape
    )
    if not fits:
        raise ValueError(
            "expected queries (n, heads, 2, k_dim/2) and keys (heads, 2, n_keys, k_dim/2), "
            f"got {tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    if queries.dtype != keys.dtype:
        raise ValueError(f"expected queries and keys of one dtype, got {queries.dtype} and {keys.dtype}")
    if not 1 <= knn <= keys.shape[2]:
        raise ValueError(f"knn must be from 1 to n_keys = {keys.shape[2]}, got {knn}")


def read_shape(values, indices, weights):
    """The shape of memory_read's result, (n, v_dim). Raises ValueError for arguments that don't fit each
    other.
    """
    check_lookups(values, indices)
    if weights.shape != indices.shape or weights.dtype != values.dtype:
        raise ValueError(
            f"expected weights (n, lookups) of the indices' shape {tuple(indices.shape)} and the values' "
            f"dtype {values.dtype}, got {tuple(weights.shape)} and {weights.dtype}"
        )
    return indices.shape[0], values.shape[1]


def dot_shape(values, indices, x):
    """The shape of memory_dot's result, (n, lookups). Raises ValueError for arguments that don't fit each
    other.
    """
    check_lookups(values, indices)
    if x.shape != (indices.shape[0], values.shape[1]) or x.dtype != values.dtype:
        shape = (indices.shape[0], values.shape[1])
        raise ValueError(
            f"expected x of shape {shape} and dtype {values.dtype}, got {tuple(x.shape)} and {x.dtype}"
        )
    return indices.shape


def check_lookups(values, indices):
    """Raises ValueError unless values are (n_slots, v_dim) and indices (n, lookups) integers, lookups 1 or
    more.
    """
    if values.dim() != 2 or indices.dim() != 2 or 0 in (*values.shape, indices.shape[1]):
        raise ValueError(
            "expected values (n_slots, v_dim) and indices (n, lookups) with one lookup or more, "
            f"got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expected indices of dtype int64 or int32, got {indices.dtype}")
