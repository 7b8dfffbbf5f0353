import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanomem import memory as memory_module
from nanomem.config import GPTConfig
from nanomem.memory import MemoryTable
from nanomem.model import GPT, choose

SMALL = dict(
    vocab_size=50,
    n_layer=3,
    n_head=2,
    n_embd=16,
    block_size=12,
    mem_layers="0,2",
    mem_n_keys=8,
    mem_heads=2,
    mem_knn=3,
)


def small(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **changes}))


def batch(n=2, time=12):
    return torch.randint(50, (n, time)), torch.randint(50, (n, time))


def test_gradients_equal_those_with_a_dense_table_gradient():
    sparse_model, dense_model = [small(mem_dropout=0.0).double() for _ in range(2)]
    for m in dense_model.modules():
        if isinstance(m, MemoryTable):
            m.sparse_grad = False
    idx, targets = batch()
    for model in (sparse_model, dense_model):
        model(idx, targets)[1].backward()
    for (name, a), (_, b) in zip(sparse_model.named_parameters(), dense_model.named_parameters()):
        assert b.grad.abs().sum() > 0, name
        torch.testing.assert_close(
            a.grad.to_dense() if a.grad.is_sparse else a.grad, b.grad, rtol=1e-9, atol=1e-12
        )


def test_a_token_does_not_see_the_ones_after_it():
    model = small().eval()
    idx, _ = batch(1)
    changed = idx.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 50
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_loss_is_the_mean_over_positions_with_a_target():
    model = small()
    idx, targets = batch()
    targets[0, :5] = -1
    logits, loss = model(idx, targets)
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(loss, -chosen[targets >= 0].mean())


@pytest.mark.parametrize("time", [3, 11])
def test_generation_with_the_cache_equals_generation_without(time):
    model = small().eval()
    idx = batch(2, time)[0]
    cached = torch.cat([idx, *model.generate(idx, 12 - time, temperature=0)], dim=1)
    for _ in range(12 - time):
        idx = torch.cat([idx, model(idx)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, idx)


def test_generation_goes_on_past_the_block_and_ends_at_stop():
    model = small()
    assert len(list(model.generate(batch(1)[0], 30, temperature=1.0, top_k=5))) == 30
    prompt = batch(1)[0][:, :3]
    likeliest = next(model.generate(prompt, 1, temperature=0)).item()
    assert len(list(model.generate(prompt, 30, temperature=0, stop=likeliest))) == 1


def test_tokens_are_drawn_from_the_likeliest_as_often_as_their_probability_says():
    p = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2]])
    generator = torch.Generator().manual_seed(0)
    for top_k, top_p, kept in (
        (None, 1.0, [0, 1, 2, 3, 4]),
        (3, 1.0, [1, 3, 4]),
        (None, 0.66, [1, 3, 4]),
        (None, 0.6, [1, 3]),
        (4, 0.01, [1]),
    ):
        drawn = choose(p.log().expand(20_000, -1) * 2, 2.0, top_k, top_p, generator).flatten()
        shares = torch.bincount(drawn, minlength=5) / len(drawn)
        expected = torch.zeros(5)
        expected[kept] = p[0, kept] / p[0, kept].sum()
        torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)
    assert choose(p.log(), 0).item() == 1


def test_too_many_tokens_and_several_after_a_cached_prompt_are_refused():
    model = small()
    with pytest.raises(ValueError, match="block_size=12"):
        model(batch(1, 13)[0])
    cache = model.new_cache()
    model(batch(1, 4)[0], cache=cache)
    with pytest.raises(ValueError, match="one at a time"):
        model(batch(1, 2)[0], cache=cache)


def test_sampling_keeps_to_the_top_k():
    model = small().eval()
    prompt = batch(1)[0]
    allowed = set(model(prompt)[0][0, -1].topk(3).indices.tolist())
    drawn = {next(model.generate(prompt, 1, temperature=5.0, top_k=3)).item() for _ in range(60)}
    assert drawn == allowed


@pytest.mark.parametrize("ffn", ["dense", "memory"])
def test_flops_equal_torchs_count_of_the_products(ffn, monkeypatch):
    # The counter can't look into a custom operation, so it gets the function itself.
    monkeypatch.setattr(memory_module, "product_key_topk", memory_module.product_key_topk.__wrapped__)
    model = small(ffn=ffn)
    idx = batch(4)[0]
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # attention as products it can count
        model(idx)
    # torch counts matrix products; the read of heads * knn rows in each memory layer is a gather to it.
    reads = len(model.memory_layers()) * 2 * (2 * 3 * 16)
    assert model.flops_per_token() * idx.numel() == counter.get_total_flops() + reads * idx.numel()


@pytest.mark.parametrize(
    "changes", [{}, dict(n_embd=64, n_head=4, mem_n_keys=32), dict(mem_v_dim=8, mem_gated=False)]
)
def test_dense_takes_as_many_flops_as_memory_by_default(changes):
    memory, dense = small(**changes), small(ffn="dense", **changes)
    assert dense.flops_per_token() == pytest.approx(memory.flops_per_token(), rel=0.02)


def test_parameters_are_counted_once_and_the_table_apart():
    shared, apart = small(), small(mem_share_values=False)
    assert shared.count_parameters()[1] == 8**2 * 16 and apart.count_parameters()[1] == 2 * 8**2 * 16
    assert sum(shared.count_parameters()) == sum(p.numel() for p in shared.parameters())


def test_plain_memory_has_neither_gate_nor_qk_norm():
    layer = small(mem_gated=False, mem_qk_norm=False).memory_layers()[2]
    assert layer.gate_proj is None and layer.out_proj is None and layer.qk_scale is None


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(mem_layers="3"), "from 0 to 2"),
        (dict(mem_layers="1,1"), "different"),
        (dict(mem_layers="x"), "mem_layers"),
        (dict(mem_layers=""), "at least one"),
        (dict(mem_knn=9), "mem_n_keys = 8"),
        (dict(n_embd=18), "multiple"),
        (dict(n_layer=0), "n_layer"),
        (dict(mem_k_dim=5), "even"),
        (dict(dropout=1.0), "dropout"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_loss_and_gradients():
    model = small()
    idx, targets = batch()
    model(idx, targets)[1].backward()
    expected = {
        name: p.grad.to_dense().clone() if p.grad.is_sparse else p.grad.clone()
        for name, p in model.named_parameters()
    }
    loss = model(idx, targets)[1].item()
    model.zero_grad()
    compiled = torch.compile(model)(idx, targets)[1]
    compiled.backward()
    assert compiled.item() == pytest.approx(loss, rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad.to_dense() if p.grad.is_sparse else p.grad, expected[name], rtol=1e-3, atol=1e-5
        )


def test_no_target_is_no_loss_and_no_gradient():
    model = GPT(
        GPTConfig(vocab_size=20, n_layer=1, n_embd=8, n_head=2, block_size=8, ffn="dense", mem_layers="0")
    )
    loss = model(torch.zeros(2, 8, dtype=torch.int64), torch.full((2, 8), -1))[1]
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())
