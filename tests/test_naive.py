import pytest
import torch
import torch.nn.functional as F

from nanomem.memory import MemoryTable, ProductKeyMemory
from nanomem.naive import naive_memory, product_keys


@pytest.mark.parametrize(
    "heads, knn, n_keys, k_dim, v_dim", [(1, 1, 1, 2, 1), (3, 4, 6, 8, 5), (2, 9, 9, 4, 7)]
)
def test_the_layer_reads_what_the_naive_one_does(heads, knn, n_keys, k_dim, v_dim):
    torch.manual_seed(0)
    table = MemoryTable(n_keys**2, v_dim, sparse_grad=False)
    layer = ProductKeyMemory(6, table, heads, knn, k_dim).double()
    x = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)

    indices, weights = layer.lookup(x)
    ours = table(indices.flatten(1), weights.flatten(1))
    queries = F.normalize(layer.query_proj(x).view(11, heads, 2, -1), dim=-1) * layer.qk_scale.view(
        1, -1, 1, 1
    )
    keys = product_keys(F.normalize(layer.keys, dim=-1))
    naive = naive_memory(queries.flatten(2), keys, table.values, knn)
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=1e-12)

    parameters = [x, layer.keys, layer.query_proj.weight, layer.qk_scale, table.values]
    gradients = [torch.autograd.grad(y.sin().sum(), parameters) for y in (ours, naive)]
    for ours_gradient, naive_gradient in zip(*gradients):
        torch.testing.assert_close(ours_gradient, naive_gradient, rtol=1e-10, atol=1e-10)


def test_the_keys_of_all_slots():
    keys = torch.arange(8.0).view(
        1, 2, 2, 2
    )  # first halves [0, 1] and [2, 3], second halves [4, 5] and [6, 7]
    expected = [[0, 1, 4, 5], [0, 1, 6, 7], [2, 3, 4, 5], [2, 3, 6, 7]]
    assert product_keys(keys)[0].tolist() == expected
