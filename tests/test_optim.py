import copy

import pytest
import torch

from nanomem.memory import MemoryTable, ProductKeyMemory
from nanomem.optim import (
    RowAdam,
    build_optimizer,
    clip_gradients,
    coalesce_gradient_,
    schedule,
    stochastic_round,
)


def sparse(rows, grads, n_rows):
    """A sparse gradient of n_rows rows, of which these are grads (len(rows), columns). Rows may repeat."""
    indices = torch.tensor([list(rows)], device=grads.device)
    return torch.sparse_coo_tensor(indices, grads, (n_rows, grads.shape[1]), check_invariants=True)


def update(optimizers):
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_row_adam_equals_a_loop_over_rows():
    torch.manual_seed(0)
    values = torch.nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
    expected, moment, reads = values.detach().clone(), [0.0] * 6, [0] * 6
    optimizer = RowAdam([values], lr=0.1, beta2=0.9, eps=1e-8)
    for rows in ([0, 2, 2, 5], [2], [5, 0, 5, 5], [1, 2]):
        grads = torch.randn(len(rows), 3, dtype=torch.float64)
        values.grad = sparse(rows, grads, 6)
        optimizer.step()
        for r in set(rows):
            g = grads[torch.tensor(rows) == r].sum(0)
            moment[r] = 0.9 * moment[r] + 0.1 * g.square().mean().item()
            reads[r] += 1
            expected[r] -= 0.1 * g / ((moment[r] / (1 - 0.9 ** reads[r])) ** 0.5 + 1e-8)
        torch.testing.assert_close(values.detach(), expected, rtol=1e-6, atol=1e-6)


def test_a_row_first_read_late_moves_by_lr_like_any_other():
    values = torch.nn.Parameter(torch.zeros(2, 4))
    optimizer = RowAdam([values], lr=0.01)
    for _ in range(500):
        values.grad = sparse([0], torch.randn(1, 4), 2)
        optimizer.step()
    values.grad = sparse([1], torch.randn(1, 4), 2)
    optimizer.step()
    torch.testing.assert_close(values[1].square().mean().sqrt().item(), 0.01, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_row_with_a_zero_gradient_is_left_alone_and_sparse_equals_dense(kernels, monkeypatch):
    monkeypatch.setenv("NANOMEM_KERNELS", kernels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    before = torch.randn(3, 4, device=device)
    tables = {name: torch.nn.Parameter(before.clone()) for name in ("sparse", "dense", "once")}
    optimizers = {name: RowAdam([values], lr=0.01) for name, values in tables.items()}
    last = torch.tensor([[0.5, -1.0, 2.0, 0.1]], device=device)
    for step in range(100):
        grad = last if step == 99 else torch.zeros(1, 4, device=device)
        tables["sparse"].grad = sparse([1], grad, 3)
        tables["dense"].grad = tables["sparse"].grad.to_dense()
        optimizers["sparse"].step()
        optimizers["dense"].step()
    tables["once"].grad = tables["dense"].grad
    optimizers["once"].step()
    for name in ("sparse", "dense"):
        assert torch.equal(tables[name], tables["once"]), name
        for key, state in optimizers[name].state[tables[name]].items():
            assert torch.equal(state, optimizers["once"].state[tables["once"]][key]), (name, key)
    moved = (tables["sparse"] - before).square().mean(1).sqrt()
    torch.testing.assert_close(moved.tolist(), [0.0, 0.01, 0.0], rtol=1e-4, atol=0)


def test_a_nan_in_a_gradient_reaches_the_table():
    values = torch.nn.Parameter(torch.zeros(2, 2))
    values.grad = sparse([1], torch.tensor([[float("nan"), 1.0]]), 2)
    RowAdam([values]).step()
    assert values[1].isnan().any() and not values[0].isnan().any()


@pytest.mark.parametrize("steps, bound", [(4, 2.0), (2000, 10.0)])
def test_a_later_step_is_at_most_lr_times_the_root_of_n_or_of_1_over_1_minus_beta2(steps, bound):
    values = torch.nn.Parameter(torch.zeros(1, 4))
    optimizer = RowAdam([values], lr=0.01, beta2=0.99)
    for _ in range(steps - 1):
        values.grad = sparse([0], torch.full((1, 4), 1e-8), 1)
        optimizer.step()
    before = values.detach().clone()
    values.grad = sparse([0], torch.ones(1, 4), 1)  # far larger than all before: the longest possible step
    optimizer.step()
    assert (values - before).abs().max().item() == pytest.approx(bound * 0.01, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tiny_gradients_move_a_table_of_any_dtype_by_lr(dtype):
    values = torch.nn.Parameter(torch.zeros(2, 4, dtype=dtype))
    values.grad = torch.full((2, 4), 1e-7, dtype=dtype)
    RowAdam([values], lr=0.01).step()
    expected = torch.full((2, 4), -0.01, dtype=torch.float64)
    torch.testing.assert_close(values.double(), expected, rtol=2e-2, atol=0)


def test_mem_beta2_is_the_second_moments():
    table = MemoryTable(4, 2)
    before = table.values.detach().clone()
    (optimizer,) = build_optimizer(table, mem_lr=0.01, mem_beta2=0.0)
    for size in (1.0, 100.0, 0.01):  # with no memory of earlier gradients, all steps are equally long
        table.values.grad = sparse([2], torch.full((1, 2), size), 4)
        optimizer.step()
    torch.testing.assert_close(table.values[2].detach(), before[2] - 0.03)


def test_state_takes_8_bytes_a_slot():
    values = torch.nn.Parameter(torch.zeros(100, 4))
    optimizer = RowAdam([values])
    values.grad = sparse([7], torch.randn(1, 4), 100)
    optimizer.step()
    assert sum(t.numel() * t.element_size() for t in optimizer.state[values].values()) == 800


def test_state_dict_keeps_dtypes():
    values = torch.nn.Parameter(torch.zeros(10, 4, dtype=torch.bfloat16))
    optimizer, loaded = RowAdam([values]), RowAdam([values])
    values.grad = sparse([7], torch.randn(1, 4).bfloat16(), 10)
    optimizer.step()
    loaded.load_state_dict(optimizer.state_dict())
    for key, tensor in optimizer.state[values].items():
        found = loaded.state[values][key]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), key


class TwoLayers(torch.nn.Module):
    def __init__(self, sparse_grad):
        super().__init__()
        table = MemoryTable(64, 6, sparse_grad=sparse_grad)
        self.first = ProductKeyMemory(6, table, heads=2, knn=3, k_dim=4)
        self.second = ProductKeyMemory(6, table, heads=2, knn=3, k_dim=4)

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_shared_table_accumulation_and_clipping_equal_the_dense_gradients(accumulation):
    torch.manual_seed(0)
    sparse_model = TwoLayers(sparse_grad=True).double()
    dense_model = copy.deepcopy(sparse_model)
    dense_model.first.table.sparse_grad = False
    models = [(m, build_optimizer(m, learning_rate=1e-2)) for m in (sparse_model, dense_model)]
    for _ in range(5):
        batches = [torch.randn(2, 7, 6, dtype=torch.float64) for _ in range(accumulation)]
        norms = []
        for model, optimizers in models:
            for x in batches:
                model(x).square().mean().backward()
            norms.append(clip_gradients(model, 0.01))
            update(optimizers)
        torch.testing.assert_close(norms[0], norms[1])
        for a, b in zip(sparse_model.parameters(), dense_model.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_clipping_sums_repeated_slots_first_and_treats_tables_and_the_rest_separately():
    model = TwoLayers(sparse_grad=True)
    values = model.first.table.values
    grads = torch.zeros(3, 6)
    grads[:, :2] = torch.tensor([[3.0, 0], [1, 0], [0, 3]])
    values.grad = sparse([3, 3, 1], grads, 64)
    model.first.out_proj.weight.grad = torch.full((6, 6), 0.5)
    core, table = clip_gradients(model, 1.0)
    assert core.item() == pytest.approx(3.0) and table.item() == pytest.approx(5.0)
    rows, grads = coalesce_gradient_(values)
    assert rows.tolist() == [1, 3]
    torch.testing.assert_close(grads[:, :2], torch.tensor([[0, 0.6], [0.8, 0]]), rtol=1e-4, atol=1e-5)
    assert model.first.out_proj.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_build_optimizer_covers_each_parameter_once_and_trains_an_ordinary_model():
    torch.manual_seed(0)
    table = MemoryTable(16**2, 8)
    memory = ProductKeyMemory(8, table, heads=2, knn=4)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), memory, torch.nn.Linear(8, 1))
    optimizers = build_optimizer(model, learning_rate=1e-2)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    covered = [id(p) for group in groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters())
    x = torch.randn(1, 64, 8)
    y = x.square().sum(-1, keepdim=True)
    losses = []
    for _ in range(100):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        loss.backward()
        update(optimizers)
    assert losses[-1] < 0.2 * losses[0]


def test_weight_decay_is_for_matrices_alone():
    model = TwoLayers(sparse_grad=True)
    adamw, _ = build_optimizer(model, weight_decay=0.3)
    decay_of = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if "values" not in name:
            assert decay_of[id(p)] == (0.3 if name.endswith("proj.weight") else 0.0), name


def test_a_model_without_memory_gets_one_optimizer():
    assert len(build_optimizer(torch.nn.Linear(3, 3))) == 1


def test_schedule_rises_linearly_and_falls_to_its_floor():
    assert schedule(0, 10, 100, 0.1) == pytest.approx(1 / 11)
    assert schedule(10, 10, 100, 0.1) == 1
    assert schedule(55, 10, 100, 0.1) == pytest.approx(0.55)
    assert schedule(100, 10, 100, 0.1) == schedule(500, 10, 100, 0.1) == pytest.approx(0.1)


def test_bfloat16_is_rounded_so_that_small_steps_add_up():
    torch.manual_seed(0)
    values = torch.nn.Parameter(torch.ones(50, 200, dtype=torch.bfloat16))
    optimizer = RowAdam([values], lr=2**-12)  # a sixteenth of the way to the next bfloat16, 1 - 2**-8
    for _ in range(32):
        values.grad = sparse(range(50), torch.ones(50, 200).bfloat16(), 50)
        optimizer.step()
    assert values.double().mean().item() == pytest.approx(1 - 32 * 2**-12, abs=2e-4)
    assert len(values.unique()) > 3  # rounded independently of each other


def test_rounding_noise_differs_between_rows_columns_and_reads_and_is_the_same_each_time():
    new = torch.full((3, 1000), 1 + 2**-9)
    rounded = stochastic_round(new, 0, torch.tensor([4, 5, 4]), torch.tensor([1, 1, 2], dtype=torch.int32))
    again = stochastic_round(new[:1], 0, torch.tensor([4]), torch.tensor([1], dtype=torch.int32))
    assert torch.equal(rounded[:1], again)
    up = (rounded > 1).float()
    torch.testing.assert_close(up.mean(1), torch.full((3,), 0.25), atol=0.06, rtol=0)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(torch.corrcoef(up[[a, b]])[0, 1]) < 0.12


def test_columns_are_rounded_as_in_the_whole_table():
    new, rows, reads = torch.rand(3, 20), torch.tensor([1, 5, 6]), torch.ones(3, dtype=torch.int32)
    whole, part = stochastic_round(new, 3, rows, reads), new[:, 12:]
    assert torch.equal(whole[:, 12:], stochastic_round(part, 3, rows, reads, first_column=12))
