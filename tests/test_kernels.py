"""The Triton kernels against float64: on the GPU where there is one, elsewhere under Triton's interpreter
(see conftest.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanomem import kernels, ops
from nanomem.memory import MemoryTable, ProductKeyMemory, key_gradient, memory_read, product_key_topk
from nanomem.optim import RowAdam, build_optimizer, clip_gradients

pytest.importorskip("triton", reason="Triton, which only Linux has")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("NANOMEM_KERNELS", "triton")
    torch.manual_seed(0)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def sparse(rows, grads, shape):
    return torch.sparse_coo_tensor(
        torch.tensor([list(rows)], device=DEVICE), grads, shape, check_invariants=True
    )


def relative_error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item() if exact.numel() else 0.0


# n_keys and knn: powers of two or not, groups of 1, 2, 4 and 8 keys, all keys chosen; no token, one, and
# several programs
SELECT_SHAPES = [(3, 2, 40, 4), (1, 1, 7, 7), (5, 1, 16, 3), (9, 2, 100, 1), (0, 2, 8, 2), (2, 1, 100, 8)]
SELECT_SHAPES += [(64, 4, 1024, 32), (500, 4, 300, 16)] if DEVICE == "cuda" else []


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n, heads, n_keys, knn", SELECT_SHAPES)
def test_topk_equals_brute_force(n, heads, n_keys, knn, ties):
    queries, keys = randn(n, heads, 2, 6), randn(heads, 2, n_keys, 6)
    if ties:
        queries, keys = queries.round(), keys.round()  # small whole numbers: exact arithmetic
    scores, indices = product_key_topk(queries, keys, knn)
    first, second = torch.einsum("nhcd,hckd->chnk", queries.double(), keys.double())
    every = (first[..., :, None] + second[..., None, :]).flatten(-2).transpose(0, 1)
    torch.testing.assert_close(scores.double(), every.topk(knn).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(every.gather(-1, indices), scores.double(), rtol=1e-5, atol=1e-5)
    assert indices.dtype == torch.int64 and (indices.sort().values.diff() > 0).all()  # distinct
    assert (scores.diff() <= 0).all()


def test_topk_of_nan_and_infinite_scores_stays_within_the_table():
    queries, keys = randn(4, 1, 2, 4), randn(1, 2, 33, 4)
    queries[0], queries[1], queries[2, 0, 0, 0] = float("nan"), float("-inf"), float("inf")
    _, indices = product_key_topk(queries, keys, 3)
    assert indices.min() >= 0 and indices.max() < 33**2


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_topk_gradients(dtype):
    queries, keys = (
        randn(19, 2, 2, 20, dtype=dtype).requires_grad_(),
        randn(2, 2, 40, 20, dtype=dtype).requires_grad_(),
    )
    grad = randn(19, 2, 3)
    scores, indices = product_key_topk(queries, keys, 3)
    scores.backward(grad)
    q, k = (t.detach().double().requires_grad_() for t in (queries, keys))
    first, second = torch.einsum("nhcd,hckd->chnk", q, k)
    every = (first[..., :, None] + second[..., None, :]).flatten(-2).transpose(0, 1)
    every.gather(-1, indices).backward(grad.double())
    assert relative_error(scores, every.gather(-1, indices)) < 1e-5  # also of bfloat16 operands
    assert (
        relative_error(queries.grad, q.grad) < TOLERANCE[dtype]
        and relative_error(keys.grad, k.grad) < TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "n, lookups, n_slots, v_dim",
    [
        (1, 1, 1, 1),
        (5, 7, 30, 13),
        (16, 8, 100, 64),
        (0, 4, 9, 8),
        (3, 20, 50, 300),
        (2, 3, 40, 2100),
        (12, 10, 1, 5),
    ],
)
def test_read_and_its_gradients_equal_float64(n, lookups, n_slots, v_dim, dtype):
    values, weights = (
        randn(n_slots, v_dim, dtype=dtype).requires_grad_(),
        randn(n, lookups, dtype=dtype).requires_grad_(),
    )
    indices, grad = torch.randint(n_slots, (n, lookups), device=DEVICE), randn(n, v_dim, dtype=dtype)
    v, w = (t.detach().double().requires_grad_() for t in (values, weights))
    exact = (v[indices] * w[..., None]).sum(1)
    exact.backward(grad.double())
    out = memory_read(values, indices, weights)
    out.backward(grad)
    assert out.dtype == values.grad.dtype == weights.grad.dtype == dtype
    for ours, theirs in ((out, exact), (values.grad, v.grad), (weights.grad, w.grad)):
        assert relative_error(ours, theirs) < TOLERANCE[dtype]
    for only, theirs in (
        (values, v.grad),
        (weights, w.grad),
    ):  # the gradient of one without the other takes another way
        assert (
            relative_error(torch.autograd.grad(memory_read(values, indices, weights), only, grad)[0], theirs)
            < TOLERANCE[dtype]
        )


def test_inputs_that_are_not_contiguous():
    values, indices, weights = (
        randn(13, 30).t(),
        torch.randint(30, (7, 5), device=DEVICE).t(),
        randn(7, 5).t(),
    )
    x = randn(13, 5).t()
    exact = (values[indices].double() * weights[..., None]).sum(1)
    assert relative_error(kernels.embedding_bag(values, indices, weights), exact) < 1e-5
    assert (
        relative_error(kernels.sddmm(values, indices, x), (values[indices].double() * x[:, None]).sum(-1))
        < 1e-5
    )
    _, sums, dots = kernels.segment_sum(indices, weights, x, 30, dot_with=values)
    assert relative_error(sums, summed_by_row(indices, weights, x, 30)) < 1e-5
    torch.testing.assert_close(dots, kernels.sddmm(values, indices, x))


def summed_by_row(indices, weights, x, n_rows):
    """What segment_sum should give, for every row, in float64."""
    every = torch.zeros(n_rows, x.shape[1], dtype=torch.float64, device=DEVICE)
    added = weights[..., None].double() * x[:, None].double()
    return every.index_add_(0, indices.flatten(), added.flatten(0, 1))


@pytest.mark.parametrize("n_rows", [8, 100, 300])
@pytest.mark.parametrize("share_of_one_row", [0.0, 0.7, 1.0])
def test_segment_sum_of_few_and_many_rows_is_exact_and_the_same_every_time(share_of_one_row, n_rows):
    n, lookups = 16, 8
    indices = torch.where(
        torch.rand(n, lookups) < share_of_one_row, n_rows // 3, torch.randint(n_rows, (n, lookups))
    ).to(DEVICE)
    weights, x, values = randn(n, lookups), randn(n, 16), randn(n_rows, 16)
    (rows, sums, dots), (_, again, _) = (
        kernels.segment_sum(indices, weights, x, n_rows, dot_with=values) for _ in range(2)
    )
    # Their number doesn't depend on the lookups: 128 of them are fewer than half of 300 rows.
    assert len(rows) == (128 if n_rows == 300 else n_rows)
    assert rows.min() >= 0 and rows.max() < n_rows and (rows.diff() > 0).all()
    assert torch.isin(indices, rows).all() and torch.equal(sums, again)
    exact = summed_by_row(indices, weights, x, n_rows)
    assert relative_error(sums, exact[rows]) < 1e-5 and (sums[(exact[rows] == 0).all(1)] == 0).all()
    torch.testing.assert_close(dots, (values[indices] * x[:, None]).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n, half, knn", [(110, 3, 2), (3, 300, 5), (0, 4, 1)])
def test_key_gradient_equals_one_hot_products(n, half, knn, dtype, monkeypatch):
    monkeypatch.setattr(ops, "tokens_at_once", lambda keys: 40)
    chosen, grad, queries = (
        torch.randint(9, (n, 2, 2, knn), device=DEVICE),
        randn(n, 2, knn),
        randn(n, 2, 2, half, dtype=dtype),
    )
    one_hot = torch.nn.functional.one_hot(chosen, 9).double() * grad.double()[:, :, None, :, None]
    exact = torch.einsum("nhcrk,nhcd->hckd", one_hot, queries.double())
    found = key_gradient(chosen, grad, queries, queries.new_empty(2, 2, 9, half))
    assert found.dtype == dtype and relative_error(found, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("layers, passes, n_slots", [(1, 1, 120), (3, 2, 120), (2, 3, 400), (1, 2, 30)])
def test_gradients_of_a_shared_table_add_up_and_have_at_most_the_tables_rows(
    layers, passes, n_slots, monkeypatch
):
    lookups = [[torch.randint(n_slots, (10, 5), device=DEVICE) for _ in range(layers)] for _ in range(passes)]
    weights, start, values = randn(10, 5), randn(n_slots, 4), {}
    for path in ("triton", "torch"):
        monkeypatch.setenv("NANOMEM_KERNELS", path)
        table = MemoryTable(n_slots, 4).to(DEVICE)
        table.values.data.copy_(start)
        optimizers = build_optimizer(table, mem_lr=0.1)
        for of_pass in lookups:
            sum(table(indices, weights).square().sum() for indices in of_pass).backward()
        if path == "triton":
            rows = len(table.values.grad) if not table.values.grad.is_sparse else table.values.grad._nnz()
            assert rows <= min(n_slots, layers * passes * 50)
        norm = clip_gradients(table, 0.5, optimizers)[1]
        optimizers[0].step()
        values[path] = norm, table.values.detach()
    for ours, plain in zip(values["triton"], values["torch"]):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_each_table_is_clipped_by_its_own_row_adam_and_only_in_the_next_step(monkeypatch):
    start, grads, values = [randn(8, 4), randn(8, 4)], [randn(2, 4), randn(3, 4)], {}
    for path in ("triton", "torch"):
        monkeypatch.setenv("NANOMEM_KERNELS", path)
        tables = torch.nn.ModuleList([MemoryTable(8, 4).to(DEVICE) for _ in range(2)])
        optimizers = [RowAdam([table.values], lr=0.1, eps=1.0) for table in tables]
        for table, first, grad, rows in zip(tables, start, grads, ([1, 5], [0, 2, 7])):
            table.values.data.copy_(first)
            table.values.grad = sparse(rows, grad.clone(), (8, 4))
        clip_gradients(tables, 0.1, optimizers)
        for optimizer in optimizers:
            optimizer.step()
        clip_gradients(tables, 0.01, optimizers)
        optimizers[1].zero_grad()  # a step left out
        tables[1].values.grad = sparse([0, 2, 7], grads[1].clone(), (8, 4))
        optimizers[1].step()
        values[path] = [table.values.detach() for table in tables]
    for ours, plain in zip(values["triton"], values["torch"]):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("v_dim, is_scaled", [(6, False), (6, True), (2100, True)])
def test_row_adam_equals_the_plain_one(v_dim, is_scaled, monkeypatch):
    start, scale = randn(9, v_dim), torch.rand(9)
    tables = {}
    for path in ("triton", "torch"):
        monkeypatch.setenv("NANOMEM_KERNELS", path)
        torch.manual_seed(1)
        values = torch.nn.Parameter(start.clone())
        optimizer = RowAdam([values], lr=0.1)
        if is_scaled:
            optimizer.row_scale[values] = scale.to(values.device)
        for rows in ([0, 2, 5], [2], [0, 5], [1, 2]):
            values.grad = sparse(rows, randn(len(rows), v_dim), values.shape)
            optimizer.step()
        tables[path] = [values.detach(), *optimizer.state[values].values()]
    for ours, plain in zip(tables["triton"], tables["torch"]):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_bfloat16_rows_are_rounded_with_the_same_noise_on_both_paths(monkeypatch):
    start = {}
    for path in ("triton", "torch"):
        monkeypatch.setenv("NANOMEM_KERNELS", path)
        torch.manual_seed(1)
        values = torch.nn.Parameter(randn(40, 24, dtype=torch.bfloat16))
        optimizer = RowAdam([values], lr=1e-3, seed=5)
        for _ in range(3):
            values.grad = sparse(range(40), randn(40, 24, dtype=torch.bfloat16), values.shape)
            optimizer.step()
        start[path] = values.detach()
    # The last bit of float32 arithmetic may differ, and once in 2**16 or so that tips a number over.
    assert (start["triton"] != start["torch"]).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_adam_of_a_part_of_the_columns_equals_that_of_all(dtype):
    values, grads, rows = (
        randn(9, 24, dtype=dtype),
        randn(3, 24, dtype=dtype),
        torch.tensor([0, 4, 8], device=DEVICE),
    )
    mean_square, halves, state = grads.float().square().mean(1), [], None
    for columns in (slice(0, 10), slice(10, 24), slice(0, 24)):
        part, state = (
            values[:, columns].clone(),
            (torch.zeros(9, device=DEVICE), torch.zeros(9, dtype=torch.int32, device=DEVICE)),
        )
        whole = columns == slice(0, 24)
        kernels.row_adam(
            part,
            rows,
            grads[:, columns],
            *state,
            0.1,
            0.99,
            1e-10,
            7,
            None if whole else mean_square,
            columns.start,
        )
        halves.append(part)
    assert (
        torch.cat(halves[:2], dim=1) == halves[2]
    ).float().mean() > 0.98  # the same but for the last bit of mean_square
    torch.testing.assert_close(torch.cat(halves[:2], dim=1), halves[2])


def test_layer_and_its_gradients_are_the_same_on_both_paths(monkeypatch):
    layer = ProductKeyMemory(12, MemoryTable(100, 20), heads=2, knn=3, k_dim=8).to(DEVICE)
    x = randn(1, 7, 12).requires_grad_()
    results = []
    for path in ("triton", "torch"):
        monkeypatch.setenv("NANOMEM_KERNELS", path)
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad] + [p.grad.to_dense() for p in layer.parameters()])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "target, shapes",
    [
        ("sm_90", ["paper", "odd"]),
        pytest.param("sm_80", [], marks=pytest.mark.slow),
        pytest.param("sm_90", [], marks=pytest.mark.slow),
        pytest.param("sm_100", [], marks=pytest.mark.slow),
        pytest.param("gfx942", [], marks=pytest.mark.slow),
    ],
)
def test_every_kernel_a_step_launches_compiles_with_16_byte_loads(target, shapes):
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), target, *shapes], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert kernels.merge_halves  # loads the module
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in compiled} == {name for name in vars(kernels) if name.endswith("_kernel")}
    assert all(
        row["shared"] <= 64 * 1024 for row in compiled
    )  # what every GPU of the last years has, AMD's too
    for row in compiled:
        assert row.get("spills", 0) == 0, row
        # Triton 3.9 gives merge_halves 79 registers, 3.8 gives it 142.
        assert target != "sm_90" or row["registers"] <= 144, row
        joined = row["kernel"] in ("_embedding_bag_kernel", "_sddmm_kernel") or target != "gfx942"
        is_search = row["kernel"] in ("_merge_halves_kernel", "_spread_weights_kernel")
        if joined and not is_search and row["row_length"] in (101, 128, 1024):
            assert row["wide_loads"] == (row["row_length"] % 16 == 0) or (
                target == "gfx942" and row["row_length"] == 101
            ), row


@(pytest.mark.slow if DEVICE == "cpu" else lambda test: test)  # the interpreter copies the 4 GB
def test_rows_past_two_to_the_31_numbers():
    values = torch.zeros(2**21 + 8, 1024, dtype=torch.bfloat16, device=DEVICE)
    rows = torch.tensor([3, 2**21 + 5], device=DEVICE)
    values[rows] = randn(2, 1024, dtype=torch.bfloat16)
    before, x = values[rows].double(), randn(1, 1024, dtype=torch.bfloat16)
    assert (
        relative_error(
            kernels.embedding_bag(values, rows[None], torch.ones(1, 2, device=DEVICE)), before.sum(0)[None]
        )
        < 1e-2
    )
    assert relative_error(kernels.sddmm(values, rows[None], x), (before @ x[0].double())[None]) < 1e-2
    kernels.row_adam(
        values,
        rows,
        x.expand(2, 1024),
        *(torch.zeros(len(values), dtype=t, device=DEVICE) for t in (torch.float32, torch.int32)),
        1.0,
        0.99,
        1e-10,
        0,
    )
    assert relative_error(values[rows], before - x.double() / x.double().square().mean().sqrt()) < 1e-2
