import pytest
import torch

from nanomem import cpu


@pytest.mark.parametrize("n, k", [(1, 1), (5, 5), (50, 16), (64, 4), (300, 100), (1024, 16), (1032, 32)])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rows", [1, 50])
def test_topk_equals_torchs(n, k, ties, rows):
    torch.manual_seed(0)
    scores = torch.randn(3, rows, n).mul(3).round() if ties else torch.randn(3, rows, n)
    best, places = cpu.topk(scores, k)
    assert torch.equal(best, scores.topk(k).values)
    assert torch.equal(scores.gather(-1, places), best)
    assert (places.sort().values.diff() > 0).all()  # distinct


def many(row):
    """As many equal rows as are not left to torch.topk."""
    return torch.tensor(row).expand(cpu.FEW_ROWS, len(row))


def test_extreme_scores():
    scores = many([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, 1.0000001])
    best, places = cpu.topk(scores, 4)
    assert torch.equal(places, many([4, 7, 6, 2])) and torch.equal(best, scores[:, [4, 7, 6, 2]])


def test_an_empty_batch():
    best, chosen = cpu.topk(torch.empty(2, 0, 8), 3)
    assert best.shape == chosen.shape == (2, 0, 3)


def test_sddmm_equals_products_of_gathered_rows():
    torch.manual_seed(0)
    table, rows, x = torch.randn(9, 5), torch.randint(9, (7, 4)), torch.randn(7, 5)
    torch.testing.assert_close(cpu.sddmm(table, rows, x), (table[rows] * x[:, None]).sum(-1))
    few, rows = table[:3], rows % 3  # fewer rows than lookups, which torch's sampled product refuses
    torch.testing.assert_close(cpu.sddmm(few, rows, x), (few[rows] * x[:, None]).sum(-1))


@pytest.mark.parametrize(
    "scores",
    [[1.0, -float("inf"), 2.0], [1.0, 2.0, float("inf"), float("inf"), -float("inf")], [-float("inf")] * 4],
)
def test_infinite_scores(scores):
    scores = many(scores)
    best, places = cpu.topk(scores, 2)
    assert (
        torch.equal(best, scores.topk(2).values)
        and torch.equal(scores.gather(-1, places), best)
        and (places[:, 0] != places[:, 1]).all()
    )
