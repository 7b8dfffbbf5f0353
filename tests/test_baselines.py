import copy
import math

import pytest
import runs
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanomem import optim
from nanomem.baselines import PEER, MixtureOfExperts, memory_dot, moe_shape
from nanomem.config import GPTConfig
from nanomem.memory import MemoryTable
from nanomem.model import GPT, FeedForward, sized

SHAPE = dict(
    vocab_size=512, n_layer=3, n_head=2, n_embd=32, block_size=16, mem_layers="1,2", mem_n_keys=64, mem_knn=8
)


def mixture(experts=6, k=2, dim=16, hidden=12):
    torch.manual_seed(0)
    return MixtureOfExperts(dim, experts, hidden, k).double()


def expert(moe, e):
    """One of the experts as a feed-forward layer of its own."""
    layer = FeedForward(16, 12).double()
    layer.load_state_dict({name: weights[e] for name, weights in moe.experts.state_dict().items()})
    return layer


@pytest.mark.parametrize("k", [1, 2, 6])
def test_a_mixture_is_the_sum_of_its_chosen_experts(k):
    moe, x = mixture(k=k), torch.randn(3, 7, 16, dtype=torch.float64)
    found = moe(x)
    for token, out in zip(x.view(-1, 16), found.view(-1, 16)):
        p = (moe.router.weight @ token).softmax(0)
        best = sorted(range(6), key=lambda e: -p[e])[:k]
        torch.testing.assert_close(out, sum(p[e] * expert(moe, e)(token) for e in best))


@pytest.mark.parametrize("hidden", [12, 13])  # torch has no grouped product for a width of 13
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_mixture_and_its_gradients_equal_those_in_float64(hidden, dtype, tolerance):
    exact = mixture(experts=20, hidden=hidden, k=2)
    fast = copy.deepcopy(exact).to(dtype)
    fast.router, exact.router = (nn.Linear(16, 20, bias=False) for _ in range(2))
    results = []
    for moe in (exact, fast):
        moe.router.weight.data = torch.eye(20, 16)  # both choose the same experts, and some choose none
        moe.router.to(moe.experts.up_proj.weight.dtype)
        x = torch.linspace(-1, 1, 8 * 16).view(8, 16).sin().to(moe.router.weight.dtype).requires_grad_()
        out = moe(x)
        out.mul(out.detach().sign()).sum().backward()
        results.append([out, x.grad, *(p.grad for p in moe.experts.parameters())])
    for theirs, ours in zip(*results):
        assert (ours.double() - theirs).norm() < tolerance * theirs.norm()


def test_an_expert_without_tokens_gets_no_gradient():
    moe, x = mixture(experts=20, k=1), torch.randn(4, 16, dtype=torch.float64)
    moe(x).square().sum().backward()
    chosen = set(moe.routing[1].flatten().tolist())
    assert 0 < len(chosen) < 20
    for e, grad in enumerate(moe.experts.up_proj.weight.grad):
        assert grad.any() == (e in chosen)
    assert moe.router.weight.grad.abs().sum() > 0


def test_balance_is_1_when_even_and_the_number_of_experts_when_all_choose_one():
    moe = mixture(experts=4, k=1)
    everything = torch.ones(8, dtype=torch.bool)
    moe.routing = torch.full((8, 4), 0.25), torch.arange(8)[:, None] % 4
    assert moe.balance_loss(everything).item() == pytest.approx(1)
    moe.routing = torch.eye(4)[torch.zeros(8, dtype=torch.long)], torch.zeros(8, 1, dtype=torch.long)
    assert moe.balance_loss(everything).item() == pytest.approx(4)


def test_balance_counts_only_the_tokens_it_is_told_to():
    moe = mixture(experts=4, k=2)
    moe(torch.randn(10, 16, dtype=torch.float64))
    p, chosen = moe.routing
    some = torch.arange(10) < 6
    f = torch.zeros(4)
    for e in chosen[:6].flatten().tolist():
        f[e] += 1 / 12
    assert moe.balance_loss(some).item() == pytest.approx(4 * (f * p[:6].mean(0)).sum().item(), rel=1e-5)


def test_balance_loss_makes_use_more_even():
    def unevenness(balance):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SHAPE, ffn="moe", moe_experts=8, moe_hidden=8, moe_k=2, moe_balance=balance))
        optimizers = optim.build_optimizer(model, learning_rate=2e-2)
        torch.manual_seed(1)
        for _ in range(60):
            idx = torch.randint(40, (8, 16))
            model(idx, idx.roll(1))[1].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        chosen = torch.cat([block.ffn.routing[1].flatten() for block in model.blocks[1:]])
        return torch.bincount(chosen, minlength=8).float().std().item()
    assert unevenness(0.1) < 0.5 * unevenness(0.0)


def test_the_balance_loss_is_no_part_of_the_loss_in_evaluation():
    model = GPT(GPTConfig(**SHAPE, ffn="moe"))
    idx = torch.randint(512, (2, 16))
    trained = model(idx, idx)[1].item()
    logits, loss = model.eval()(idx, idx)
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), idx.flatten()).item(), rel=1e-6)
    assert trained > loss.item() + 0.01  # 0.01 a layer or more


def peer(n_slots=49, dim=16):
    torch.manual_seed(0)
    return PEER(dim, MemoryTable(n_slots, dim), MemoryTable(n_slots, dim), heads=2, knn=3, k_dim=8).double()


def test_peer_is_a_sum_of_single_neurons_and_so_are_its_gradients():
    layer = peer()
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    found = layer(x)
    queries = (x @ layer.query_proj.weight.T + layer.query_proj.bias).view(5, 2, 2, 4)
    queries, keys = (
        F.normalize(queries, dim=-1) * layer.qk_scale.view(1, 2, 1, 1),
        F.normalize(layer.keys, dim=-1),
    )
    out = []
    for t in range(5):
        y = 0
        for h in range(2):
            half = [keys[h, i] @ queries[t, h, i] for i in (0, 1)]
            scores, slots = (half[0][:, None] + half[1][None, :]).flatten().topk(3)
            for s, i in zip(scores.softmax(0), slots):
                z = layer.down.values[i] @ x[t]
                y = y + s * (z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))) * layer.table.values[i]
        out.append(y)
    expected = torch.stack(out)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    parameters = [x, *layer.parameters()]
    target = torch.randn(5, 16, dtype=torch.float64)
    ours = torch.autograd.grad((found * target).sum(), parameters)
    theirs = torch.autograd.grad((expected * target).sum(), parameters)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.to_dense() if a.is_sparse else a, b, rtol=1e-8, atol=1e-11)
    assert sum(a.is_sparse for a in ours) == 2


def test_memory_dot_gradients():
    values, x = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 3))
    indices = torch.randint(7, (3, 5))
    assert torch.autograd.gradcheck(lambda v, x: memory_dot(v, indices, x), (values, x))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(mem_layers="1"),
        dict(mem_share_values=False),
        dict(n_embd=64, mem_n_keys=128),
        dict(mem_v_dim=64),
        dict(n_layer=2, mem_layers="0", mem_n_keys=100),
        dict(moe_k=1, mem_n_keys=160),
        dict(moe_k=1, mem_n_keys=512, mem_heads=1, mem_layers="2"),
    ],
)
@pytest.mark.parametrize("ffn", ["dense", "moe", "peer"])
def test_sized_to_the_memory_models_flops_and_parameters(ffn, changes):
    config = GPTConfig(**(SHAPE | changes))
    memory, other = GPT(config), GPT(config.replace(ffn=ffn))
    assert other.flops_per_token() == pytest.approx(memory.flops_per_token(), rel=0.02)
    flops, params = other.beside_memory()
    assert flops == other.flops_per_token() / memory.flops_per_token()
    counts = [sum(p.numel() for p in model.parameters()) for model in (other, memory)]
    assert sum(other.count_parameters()) == counts[0]
    assert params == counts[0] / counts[1]
    assert ffn == "dense" or 0.98 < params < 1.02


def test_sizes_that_are_given_are_kept():
    moe = sized(GPTConfig(**SHAPE, ffn="moe", moe_experts=5, moe_hidden=9, ffn_hidden=40))
    assert (moe.moe_experts, moe.moe_hidden, moe.ffn_hidden) == (5, 9, 40)
    layer = GPT(moe).blocks[1].ffn
    assert layer.experts.up_proj.weight.shape == (5, 9, 32)
    peer = sized(GPTConfig(**SHAPE, ffn="peer", peer_n_keys=20, ffn_hidden=24))
    assert (peer.peer_n_keys, peer.ffn_hidden) == (20, 24)


def test_a_mixture_prefers_few_wide_experts():
    experts, hidden = moe_shape(dim=64, k=2, flops=130_000, params=1_000_000)
    assert experts < 100 and hidden > 50


@pytest.mark.parametrize("ffn", ["moe", "peer"])
def test_a_token_does_not_see_the_ones_after_it(ffn):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, ffn=ffn)).eval()
    idx = torch.randint(512, (2, 16))
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 512
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("ffn", ["moe", "peer"])
def test_training_resumes_to_the_bit(ffn, tmp_path):
    runs.train(tmp_path / "whole", f"--ffn={ffn}", "--max_iters=10")
    runs.train(tmp_path / "halves", f"--ffn={ffn}", "--max_iters=10", "--eval_interval=5")
    (tmp_path / "halves" / "checkpoint-10" / "checkpoint.json").unlink()
    runs.train(tmp_path / "halves", "--resume")
    whole, halves = runs.checkpoint(tmp_path / "whole"), runs.checkpoint(tmp_path / "halves")
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


@pytest.mark.parametrize("wrong, message", [
    (dict(ffn="moe", moe_k=0), "moe_k must be 1 or more"),
    (dict(ffn="moe", moe_k=3, moe_experts=2), "moe_k must be at most moe_experts = 2"),
    (dict(ffn="moe", moe_balance=-1.0), "moe_balance must be 0 or more"),
    (dict(ffn="peer", peer_n_keys=4), "mem_knn must be at most peer_n_keys = 4"),
])
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**SHAPE, **wrong))


def test_modules_that_cannot_be():
    with pytest.raises(ValueError, match="moe_k must be from 1 to the number of experts, 2"):
        MixtureOfExperts(8, 2, 8, 3)
    with pytest.raises(ValueError, match="as wide as the model, 8, got 8 and 4"):
        PEER(8, MemoryTable(16, 8), MemoryTable(16, 4), knn=2)
