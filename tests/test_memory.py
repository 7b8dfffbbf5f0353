import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanomem import ops
from nanomem.memory import MemoryTable, ProductKeyMemory, memory_read, product_key_topk
from nanomem.observe import SlotUsage, observe_lookups
from nanomem.optim import build_optimizer, clip_gradients


def all_scores(queries, keys):
    """The score of every slot, written out: (n, heads, n_keys**2)."""
    first = torch.einsum("nhd,hkd->nhk", queries[:, :, 0], keys[:, 0])
    second = torch.einsum("nhd,hkd->nhk", queries[:, :, 1], keys[:, 1])
    return (first[..., :, None] + second[..., None, :]).flatten(-2)


def random_shape(rng):
    n, heads, half, n_keys = rng(0, 12), rng(1, 5), rng(1, 9), rng(1, 24)
    return n, heads, half, n_keys, rng(1, n_keys + 1)


def test_topk_equals_brute_force_on_a_thousand_shapes():
    torch.manual_seed(0)
    rng = lambda low, high: int(torch.randint(low, high, ()))
    for trial in range(1000):
        n, heads, half, n_keys, knn = random_shape(rng)
        dtype, tolerance = ((torch.float64, 1e-12), (torch.float32, 1e-5))[trial % 2]
        queries, keys = (
            torch.randn(n, heads, 2, half, dtype=dtype),
            torch.randn(heads, 2, n_keys, half, dtype=dtype),
        )
        if trial % 3 == 0:  # small whole numbers: many ties, and exact arithmetic
            queries, keys = queries.round(), keys.round()
        scores, indices = product_key_topk(queries, keys, knn)
        every = all_scores(queries, keys)
        assert scores.shape == indices.shape == (n, heads, knn) and indices.dtype == torch.int64
        torch.testing.assert_close(scores, every.topk(knn).values, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(every.gather(-1, indices), scores, rtol=tolerance, atol=tolerance)
        assert (indices.sort().values.diff() > 0).all()  # distinct
        assert (scores.diff() <= 0).all()


def test_topk_gradients():
    torch.manual_seed(0)
    queries = torch.randn(7, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: product_key_topk(q, k, 5)[0], (queries, keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_keys", [8, 36, 64])
@pytest.mark.parametrize("ties", [False, True])
def test_topk_of_many_tokens_and_keys(
    n_keys, ties, dtype, monkeypatch
):  # for several chunks, and for groups of keys
    monkeypatch.setattr(ops, "tokens_at_once", lambda keys: 250)
    torch.manual_seed(0)
    queries, keys = torch.randn(600, 2, 2, 4, dtype=dtype), torch.randn(2, 2, n_keys, 4, dtype=dtype)
    if ties:
        queries, keys = queries.round(), keys.round()
    scores, indices = product_key_topk(queries, keys, 3)
    every = all_scores(queries, keys)
    torch.testing.assert_close(scores, every.topk(3).values)
    torch.testing.assert_close(every.gather(-1, indices), scores)
    assert (indices.sort().values.diff() > 0).all()


@pytest.mark.parametrize("knn", [0, 9])
def test_topk_refuses_a_knn_that_cannot_be(knn):
    with pytest.raises(ValueError, match="n_keys = 8"):
        product_key_topk(torch.randn(3, 2, 2, 4), torch.randn(2, 2, 8, 4), knn)


def test_topk_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="k_dim/2"):
        product_key_topk(torch.randn(3, 2, 2, 4), torch.randn(2, 2, 8, 5), 1)


def read_reference(values, indices, weights):
    return (values[indices] * weights[..., None]).sum(1)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize(
    "n, lookups, n_slots, v_dim", [(1, 1, 1, 1), (5, 7, 3, 13), (33, 8, 1000, 64), (0, 4, 9, 8)]
)
def test_read_and_its_gradients_equal_float64(n, lookups, n_slots, v_dim, dtype, tolerance):
    torch.manual_seed(0)
    values = torch.randn(n_slots, v_dim).to(dtype).requires_grad_()
    weights = torch.rand(n, lookups).to(dtype).requires_grad_()
    indices = torch.randint(n_slots, (n, lookups))
    grad = torch.randn(n, v_dim).to(dtype)
    exact_values, exact_weights = (t.detach().double().requires_grad_() for t in (values, weights))
    read_reference(exact_values, indices, exact_weights).backward(grad.double())
    out = memory_read(values, indices, weights)
    out.backward(grad)

    def relative_error(ours, exact):
        return (
            ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item() if exact.numel() else 0.0
        )

    assert relative_error(out, read_reference(exact_values, indices, exact_weights)) < tolerance
    assert relative_error(values.grad, exact_values.grad) < tolerance
    assert relative_error(weights.grad, exact_weights.grad) < tolerance


def test_read_passes_gradcheck():
    torch.manual_seed(0)
    values = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(memory_read, (values, torch.randint(11, (6, 8)), weights))


def test_sparse_gradient_has_each_row_read_once():
    values = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    indices, weights = torch.randint(20, (9, 6)), torch.rand(9, 6, dtype=torch.float64)
    memory_read(values, indices, weights, sparse_grad=True).square().sum().backward()
    sparse, values.grad = values.grad, None
    memory_read(values, indices, weights, sparse_grad=False).square().sum().backward()
    assert sparse.is_sparse and sparse._indices()[0].tolist() == indices.unique().tolist()
    torch.testing.assert_close(sparse.to_dense(), values.grad)


def test_read_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="lookups"):
        memory_read(torch.randn(5, 3), torch.zeros(2, 3, dtype=torch.int64), torch.rand(2, 4))


def paper_layer(layer, x):
    """The layer as the paper and its released code describe it, token by token and head by head, over all
    slots.
    """
    out = []
    for token in x.reshape(-1, layer.dim):
        y = torch.zeros(layer.table.v_dim, dtype=x.dtype)
        queries = F.linear(token, layer.query_proj.weight, layer.query_proj.bias).view(layer.heads, 2, -1)
        for query, keys in zip(queries, layer.keys):
            scores = torch.stack([query[0] @ keys[0, i] + query[1] @ keys[1, j]
                                  for i in range(layer.n_keys) for j in range(layer.n_keys)])
            best, slots = scores.topk(layer.knn)
            y = y + F.softmax(best, dim=0) @ layer.table.values[slots]
        if layer.gate_proj is not None:
            y = y * F.silu(F.linear(token, layer.gate_proj.weight, layer.gate_proj.bias))
        if layer.out_proj is not None:
            y = F.linear(y, layer.out_proj.weight, layer.out_proj.bias)
        out.append(y)
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("v_dim", [6, 10])
@pytest.mark.parametrize("knn", [1, 4])
def test_layer_equals_the_papers(gated, v_dim, knn):
    torch.manual_seed(0)
    layer = ProductKeyMemory(
        6, MemoryTable(25, v_dim, sparse_grad=False), heads=3, knn=knn, k_dim=8, qk_norm=False, gated=gated
    ).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    ours, papers = layer(x), paper_layer(layer, x)
    torch.testing.assert_close(ours, papers, rtol=1e-12, atol=1e-12)
    parameters = list(layer.parameters())
    for a, b in zip(
        torch.autograd.grad(ours.sin().sum(), parameters), torch.autograd.grad(papers.sin().sum(), parameters)
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_qk_norm_looks_up_by_direction():
    torch.manual_seed(0)
    layer = ProductKeyMemory(8, MemoryTable(49, 8), heads=2, knn=3, k_dim=8)
    torch.nn.init.zeros_(layer.query_proj.bias)
    x = torch.randn(10, 8)
    indices, weights = layer.lookup(x)
    longer_indices, longer_weights = layer.lookup(5 * x)
    assert torch.equal(indices, longer_indices)
    torch.testing.assert_close(weights, longer_weights)
    torch.testing.assert_close(weights.sum(-1), torch.ones(10, 2))


@pytest.mark.parametrize("options, message", [
    (dict(knn=6), "n_keys = 5"), (dict(knn=0), "knn"), (dict(k_dim=7), "even"), (dict(heads=0), "heads")])
def test_layer_refuses_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        ProductKeyMemory(8, MemoryTable(25, 8), **{"knn": 2, **options})


def test_layer_refuses_another_width():
    layer = ProductKeyMemory(8, MemoryTable(25, 8), heads=1, knn=2)
    with pytest.raises(ValueError, match="dim = 8"):
        layer(torch.randn(2, 3, 16))


def test_layer_refuses_a_table_that_is_no_square():
    with pytest.raises(ValueError, match="5\\*\\*2 = 25"):
        ProductKeyMemory(8, MemoryTable(30, 8), knn=2)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest dense tensor that any operation makes; views and in-
    place don't count.
    """

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storages(values):
            tensors = [t for t in values if isinstance(t, torch.Tensor) and t.layout == torch.strided]
            return {t.untyped_storage().data_ptr(): t.numel() for t in tensors}

        out = func(*args, **(kwargs or {}))
        made = storages(out if isinstance(out, (tuple, list)) else [out])
        self.largest = max(
            [self.largest] + [made[pointer] for pointer in made.keys() - storages(args).keys()]
        )
        return out


def test_a_step_builds_nothing_of_the_tables_size_nor_of_tokens_times_lookups_times_v_dim():
    n, dim, heads, knn, n_keys = 256, 16, 2, 4, 128
    layer = ProductKeyMemory(dim, MemoryTable(n_keys**2, dim), heads=heads, knn=knn, k_dim=8)
    optimizers = build_optimizer(layer)
    x = torch.randn(1, n, dim)
    loss = layer(x).square().sum()
    for optimizer in optimizers:  # its state, 8 bytes a slot, is made at the first step
        optimizer.step()
    backward, update = LargestTensor(), LargestTensor()
    with backward:
        loss.backward()
    with update:
        clip_gradients(layer, 1.0)
        for optimizer in optimizers:
            optimizer.step()
    # The gradients of the rows read, fewer than lookups, are the largest tensor. These would be larger:
    # (tokens, heads, 2, n_keys) scores, (tokens, lookups, v_dim) rows, the table.
    lookups = n * heads * knn
    assert (
        max(backward.largest, update.largest)
        < 0.95 * lookups * dim
        < min(n * heads * 2 * n_keys, n_keys**2 * dim)
    )


def test_a_compiled_layer_is_two_graphs_and_one_break():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = ProductKeyMemory(8, MemoryTable(64, 8), heads=2, knn=3)
    x = torch.randn(2, 5, 8)
    y = torch.compile(layer, backend=backend)(x)
    y.sum().backward()
    torch.testing.assert_close(y, layer(x))
    assert len(graphs) == 2 and layer.table.values.grad.is_sparse


def test_usage_of_even_and_of_single_slots():
    layer = ProductKeyMemory(4, MemoryTable(16, 4), heads=1, knn=1, k_dim=4)
    even, single = SlotUsage(), SlotUsage()
    even(layer, torch.arange(16).view(16, 1, 1), torch.ones(16, 1, 1))
    single(layer, torch.full((8, 1, 1), 3), torch.ones(8, 1, 1))
    assert even.usage() == 1 and abs(even.kl()) < 1e-12
    assert single.usage() == 1 / 16 and math.isclose(single.kl(), math.log(16))


def test_observer_sees_what_the_layer_reads():
    torch.manual_seed(0)
    layer = ProductKeyMemory(4, MemoryTable(16, 4), heads=2, knn=3, k_dim=4, gated=False)
    seen = []
    x = torch.randn(1, 5, 4)
    with observe_lookups(layer, lambda layer, indices, weights: seen.append((indices, weights))):
        y = layer(x)
    layer(x)
    (indices, weights), = seen
    torch.testing.assert_close(
        read_reference(layer.table.values, indices.flatten(1), weights.flatten(1))[None], y
    )


def test_dropout_drops_lookups_in_training_only_by_the_number_of_the_token():
    torch.manual_seed(0)
    table = MemoryTable(1024, 8)
    layer, plain = [ProductKeyMemory(8, table, heads=2, knn=4, dropout=p) for p in (0.25, 0.0)]
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(500, 8)
    layer.eval()
    assert torch.equal(layer(x), plain(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))  # torch's random numbers
    layer.first_token = torch.tensor(0)
    first = layer(x)
    assert torch.equal(layer(x), first)
    beginning = layer(x[:100])
    layer.first_token.fill_(100)
    torch.testing.assert_close(torch.cat([beginning, layer(x[100:])]), first)

    kept = ops.drop_lookups(torch.ones(500, 2, 4), 0.25, torch.tensor(0))
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert (kept == 0).float().mean((0)).sub(0.25).abs().max() < 0.06  # of each lookup
    seen = []
    with observe_lookups(plain, lambda layer, indices, weights: seen.append((indices, weights))):
        plain(x)
    (indices, weights), = seen
    y = torch.einsum("nhk,nhkv->nv", weights * kept, table.values[indices])
    torch.testing.assert_close(first, layer.out_proj(y * F.silu(layer.gate_proj(x))))


def test_columns_begin_as_in_the_whole_table():
    torch.manual_seed(0)
    whole, after = MemoryTable(257**2, 6).values, torch.rand(1)
    torch.manual_seed(0)
    values = torch.empty(257**2, 6).normal_(std=6**-0.5)
    assert torch.equal(whole, values)
    torch.manual_seed(0)
    columns = torch.empty(257**2, 2)
    ops.draw_rows(columns, 6, range(2, 4))
    assert torch.equal(columns, values[:, 2:4])
    assert torch.equal(torch.rand(1), after)  # what is drawn next is the same too
