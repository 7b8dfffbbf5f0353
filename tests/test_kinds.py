import pytest
import torch

from nanomem.config import GPTConfig
from nanomem.kinds import KINDS
from nanomem.model import GPT, feed_forwards, sized

SMALL = dict(
    vocab_size=50, n_layer=4, n_embd=32, n_head=2, block_size=16, mem_layers="1,3", mem_n_keys=64, mem_knn=4
)


@pytest.mark.parametrize("ffn", KINDS)
def test_a_kind_takes_the_flops_of_memory_and_no_size_stays_0(ffn):
    config = GPTConfig(ffn=ffn, **SMALL)
    flops, _ = GPT(config).beside_memory()
    assert flops == pytest.approx(1, rel=0.02)
    assert sized(sized(config)) == sized(config) and sized(config).ffn_hidden > 0


@pytest.mark.parametrize("ffn", ["moe", "peer"])
def test_a_kind_takes_the_parameters_of_memory(ffn):
    _, parameters = GPT(GPTConfig(ffn=ffn, **SMALL)).beside_memory()
    assert parameters == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("ffn", KINDS)
def test_sparse_parameters_are_those_that_a_single_token_leaves_without_gradient(ffn):
    torch.manual_seed(0)
    model = GPT(GPTConfig(ffn=ffn, **SMALL))
    core, sparse = model.count_parameters()
    assert core + sparse == sum(p.numel() for p in model.parameters())
    model(torch.tensor([[1]]), torch.tensor([[2]]))[1].backward()
    untouched = 0
    for p in model.parameters():
        gradient = p.grad.to_dense() if p.grad is not None else torch.zeros_like(p)
        untouched += 0 if gradient.any(dim=-1).all() else p.numel()
    assert untouched >= sparse * 0.9 if ffn != "dense" else sparse == 0


@pytest.mark.parametrize(
    "ffn, shared", [("memory", True), ("memory", False), ("peer", True), ("peer", False)]
)
def test_tables_are_shared_when_asked_to_be(ffn, shared):
    layers = feed_forwards(sized(GPTConfig(ffn=ffn, mem_share_values=shared, **SMALL)))
    assert (layers[1].table is layers[3].table) == shared
