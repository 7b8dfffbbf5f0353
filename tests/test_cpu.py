import pytest
import torch

from nanomem import cpu


@pytest.mark.parametrize("n, k", [(1, 1), (5, 5), (50, 16), (64, 4), (1024, 16), (1032, 32)])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rows", [1, 50])
def test_topk_equals_torchs(n, k, labelled, ties, rows):
    torch.manual_seed(0)
    scores = torch.randn(3, rows, n).mul(3).round() if ties else torch.randn(3, rows, n)
    labels = (torch.randperm(n) * 500_000).expand(3, rows, n) if labelled else None
    best, chosen = cpu.topk(scores, k, labels)
    assert torch.equal(best, scores.topk(k).values)
    places = chosen if labels is None else labels[0, 0].argsort()[chosen // 500_000]
    assert torch.equal(scores.gather(-1, places), best)
    assert (places.sort().values.diff() > 0).all()  # distinct


def many(row):
    """As many equal rows as are not left to torch.topk."""
    return torch.tensor(row).expand(cpu.FEW_ROWS, len(row))


def test_extreme_scores_and_labels():
    scores = many([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, 1.0000001])
    best, chosen = cpu.topk(scores, 4, many([2**29 - 1, 0, 5, 7, 1, 2**28, 3, 4]))
    assert torch.equal(best, scores[:, [4, 7, 6, 2]]) and torch.equal(chosen, many([1, 4, 3, 5]))


def test_labels_that_do_not_fit_are_kept_all_the_same():
    best, chosen = cpu.topk(many([1.0, 3.0, 2.0]), 2, many([2**40, 2**41, 2**42]))
    assert torch.equal(best, many([3.0, 2.0])) and torch.equal(chosen, many([2**41, 2**42]))


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
