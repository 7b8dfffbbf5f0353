"""
Checks docs/own-programs.md: whatever people do with a layer in their own programs either works or raises.
test_sharding.py checks the part about several processes.
"""

import copy
import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import runs
import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from nanomem.baselines import PEER, MixtureOfExperts, memory_dot
from nanomem.config import GPTConfig
from nanomem.memory import MemoryTable, ProductKeyMemory, memory_read, product_key_topk
from nanomem.model import GPT
from nanomem.optim import RowAdam, build_optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(sparse=True, kind=ProductKeyMemory):
    """A layer for batch(...), the same each time."""
    torch.manual_seed(0)
    tables = [MemoryTable(64, 8, sparse_grad=sparse) for _ in range(2 if kind is PEER else 1)]
    return kind(8, *tables, heads=2, knn=3, k_dim=8)


def batch(*shape):
    """Input of this shape, the same each time."""
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(1))


def gradients(layer, x=None):
    """Runs backward(). Returns name -> gradient, dense."""
    layer(batch(2, 5) if x is None else x).square().sum().backward()
    return {name: p.grad.to_dense() for name, p in layer.named_parameters()}


def check_gradients(layer, expected):
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad.to_dense(), expected[name])


def step(layer):
    for optimizer in build_optimizer(layer):
        optimizer.step()


def loss_of(layer):
    """The loss of `gradients` as a function of parameters and input."""
    return lambda parameters, x: functional_call(layer, parameters, (x,)).square().sum()


def values_of(layer):
    return {name: p.detach() for name, p in layer.named_parameters()}


# ------------------------------------------------------------------------------------------------
# What works


def test_the_block_of_the_page():
    page = (runs.ROOT / "docs" / "own-programs.md").read_text(encoding="utf-8")
    code, = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["blocks"](torch.zeros(2, 3, 512)).shape == (2, 3, 512)
    assert names["row_adam"].param_groups[0]["params"] == [names["table"].values]


@pytest.mark.parametrize("kind", [ProductKeyMemory, PEER])
@pytest.mark.parametrize("sparse", [True, False])
def test_func_grad_is_the_gradient(kind, sparse):
    layer = make(sparse, kind)
    found = grad(loss_of(layer))(values_of(layer), batch(2, 5))
    for name, expected in gradients(layer).items():
        torch.testing.assert_close(found[name].to_dense(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", [ProductKeyMemory, PEER])
def test_vmap_over_inputs_gradients_and_models(kind):
    layer, x = make(sparse=False, kind=kind), batch(4, 5)
    torch.testing.assert_close(vmap(layer)(x), layer(x))
    each = vmap(grad(loss_of(layer)), in_dims=(None, 0))(values_of(layer), x)
    for name, expected in gradients(layer, x).items():
        torch.testing.assert_close(each[name].sum(0), expected, rtol=1e-4, atol=1e-4)
    layers = [layer, copy.deepcopy(layer)]
    with torch.no_grad():
        layers[1].keys.neg_()
    parameters, _ = stack_module_state(layers)
    both = vmap(lambda parameters: functional_call(layer, parameters, (x,)))(parameters)
    torch.testing.assert_close(both, torch.stack([each(x) for each in layers]))


def test_export_takes_any_batch_and_survives_a_file():
    layer, dynamic = make().eval(), {0: torch.export.Dim("batch", min=2, max=100)}
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (batch(3, 5),), dynamic_shapes=(dynamic,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(batch(7, 5)), layer(batch(7, 5)))


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated
def test_a_trace_is_right_for_other_batches():
    layer = make().eval()
    torch.testing.assert_close(torch.jit.trace(layer, (batch(2, 5),))(batch(3, 4)), layer(batch(3, 4)))


def test_parameters_and_inputs_of_other_strides_train_alike():
    layer, other = make(), make()
    other.table.values = nn.Parameter(other.table.values.detach().t().contiguous().t())
    other.keys = nn.Parameter(other.keys.detach().transpose(1, 2).contiguous().transpose(1, 2))
    for each in (layer, other):
        gradients(each)
        step(each)
    x = batch(5, 2).transpose(0, 1)
    torch.testing.assert_close(other(x), layer(x.contiguous()))
    torch.testing.assert_close(layer(batch(1, 5).expand(4, 5, 8)), layer(batch(1, 5).repeat(4, 1, 1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_layer_of_another_dtype_trains(dtype):
    layer = make().to(dtype)
    y = layer(batch(2, 5).to(dtype))
    torch.testing.assert_close(y.float(), make()(batch(2, 5)), rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    step(layer)
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    layer, x = make(), batch(2, 5).requires_grad_()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    expected = batch(2, 5).requires_grad_()
    check_gradients(layer, gradients(make(), expected))
    torch.testing.assert_close(x.grad, expected.grad)


def test_copies_pickles_and_assigned_states_give_the_same():
    layer, x = make(), batch(2, 5)
    assigned = make()
    with torch.no_grad():
        assigned.keys.zero_()
    assigned.load_state_dict(layer.state_dict(), assign=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), assigned):
        assert torch.equal(other(x), layer(x))


def test_inference_mode_threads_and_frozen_layers_give_the_same():
    layer, x = make(), batch(2, 5)
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(lambda _: layer(x), range(20)))
    x_frozen, x = batch(2, 5).requires_grad_(), batch(2, 5).requires_grad_()
    make().requires_grad_(False)(x_frozen).sum().backward()
    layer(x).sum().backward()
    assert torch.equal(x_frozen.grad, x.grad)


def test_gradients_of_two_passes_and_of_a_kept_graph_add_up():
    layer, twice, x = make(), make(), batch(2, 5)
    loss = layer(x).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for _ in range(2):
        twice(x).sum().backward()
    check_gradients(layer, {name: p.grad.to_dense() for name, p in twice.named_parameters()})


@pytest.mark.parametrize(
    "sparse, optimizer, options",
    [
        (True, torch.optim.SparseAdam, {}),
        (True, torch.optim.SGD, {}),
        (False, torch.optim.AdamW, {"weight_decay": 0.0}),
    ],
)
def test_torchs_optimizers_move_the_rows_that_were_read(sparse, optimizer, options):
    layer = make(sparse)
    before, read = layer.table.values.detach().clone(), gradients(layer)["table.values"].any(1)
    optimizer([layer.table.values], lr=0.1, **options).step()
    assert torch.equal((layer.table.values != before).any(1), read)


def test_a_grad_scaler_scales_sparse_gradients_back():
    layer = make()
    optimizers, scaler = build_optimizer(layer), torch.amp.GradScaler("cpu")
    scaler.scale(layer(batch(2, 5)).square().sum()).backward()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    check_gradients(layer, gradients(make()))
    for optimizer in optimizers:
        scaler.step(optimizer)


def test_row_adam_takes_a_closure_as_torchs_optimizers_do():
    layer = make()
    values = layer.table.values
    optimizer, before = RowAdam([values]), values.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = layer(batch(2, 5)).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert torch.equal(optimizer.step(closure), make()(batch(2, 5)).sum())
    assert not torch.equal(values, before) and optimizer.step() is None


def test_gradcheck():
    assert torch.autograd.gradcheck(make(sparse=False).double(), (batch(2, 3).double().requires_grad_(),))


def test_an_empty_batch_gives_an_empty_result():
    for layer in (make(), make(kind=PEER), MixtureOfExperts(8, 3, 8, 1)):
        x = batch(0, 5).requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == (0, 5, 8)


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "in reverse"])
@pytest.mark.parametrize("ffn", ["memory", "dense", "moe", "peer"])
def test_a_model_built_on_the_device_meta_starts_like_any_other(ffn, order):
    config = GPTConfig(
        vocab_size=300, n_embd=64, mem_n_keys=32, mem_knn=4, ffn=ffn, moe_experts=4, moe_hidden=64
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    for module in list(model.modules())[::order]:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    expected = GPT(config)
    for name, buffer in expected.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    assert model.lm_head.weight is model.embedding.weight
    for (name, p), q in zip(model.named_parameters(), expected.parameters()):
        if p.numel() > 500:
            assert p.std().item() == pytest.approx(q.std().item(), rel=0.1), name
        else:
            assert p.isfinite().all(), name
            assert q.unique().numel() > 1 or torch.equal(p, q), name  # a scale, or RMSNorm's ones


# ------------------------------------------------------------------------------------------------
# What raises


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("read", [memory_read, memory_dot])
def test_a_second_derivative_of_a_read_raises_on_every_path(kernels, read, monkeypatch):
    monkeypatch.setenv("NANOMEM_KERNELS", kernels)
    table = torch.randn(64, 6, device=DEVICE, requires_grad=True)
    x = torch.rand(5, 6, device=DEVICE, requires_grad=True)
    y = read(table, torch.randint(64, (5, 6), device=DEVICE), x)
    # The gradient that this starts from, ones, has no graph, so nothing could warn here.
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        (y.sum() + slope.square().sum()).backward()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("wanted", ["queries", "keys"])
def test_a_second_derivative_of_the_search_raises_on_every_path(kernels, wanted, monkeypatch):
    monkeypatch.setenv("NANOMEM_KERNELS", kernels)
    inputs = {
        "queries": torch.randn(5, 2, 2, 4, device=DEVICE, requires_grad=True),
        "keys": torch.randn(2, 2, 8, 4, device=DEVICE, requires_grad=True),
    }
    scores, _ = product_key_topk(*inputs.values(), 3)
    (slope,) = torch.autograd.grad(scores.sum(), inputs[wanted], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        slope.square().sum().backward()


def dual_numbers(layer):
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(batch(2, 5), batch(2, 5)))


@pytest.mark.parametrize(
    "use",
    [
        lambda layer: torch.func.jvp(layer, (batch(2, 5),), (batch(2, 5),)),
        lambda layer: torch.func.jacfwd(layer)(batch(2, 5)),
        lambda layer: torch.func.hessian(lambda x: layer(x).sum())(batch(2, 5)),
        lambda layer: torch.autograd.functional.hessian(lambda x: layer(x).sum(), batch(2, 5)),
        dual_numbers,
    ],
    ids=["jvp", "jacfwd", "hessian", "functional.hessian", "dual numbers"],
)
def test_forward_mode_and_hessians_raise(use):
    with pytest.raises(NotImplementedError):
        use(make())


def test_torchs_clip_grad_norm_is_right_or_raises():
    sparse, dense = make(sparse=True), make(sparse=False)
    for layer in (sparse, dense):
        gradients(layer)
    expected = nn.utils.clip_grad_norm_(dense.parameters(), 0.1)
    try:
        norm = nn.utils.clip_grad_norm_(sparse.parameters(), 0.1)
    except NotImplementedError:  # torch before 2.14
        return
    torch.testing.assert_close(norm, expected)
    check_gradients(sparse, {name: p.grad for name, p in dense.named_parameters()})


def adamw(layer):
    gradients(layer)
    torch.optim.AdamW(layer.parameters()).step()


def clip_grad_value(layer):
    gradients(layer)
    nn.utils.clip_grad_value_(layer.parameters(), 1.0)


def change_before_backward(layer):
    loss = layer(batch(2, 5)).sum()
    with torch.no_grad():
        layer.table.values.add_(1)
    loss.backward()


def read_slot(slot):
    return lambda layer: memory_read(layer.table.values, torch.tensor([[slot]]), torch.ones(1, 1))


@pytest.mark.parametrize(
    "use, error",
    [
        (torch.jit.script, "memory_read"),
        (adamw, "does not support sparse gradients"),
        (clip_grad_value, "Sparse"),
        (change_before_backward, "modified by an inplace operation"),
        (lambda layer: layer(batch(2, 5).long()), "dtype"),
        (read_slot(64), "64"),
        (read_slot(-1), "-1"),
    ],
)
def test_what_is_not_supported_raises(use, error):
    with pytest.raises((RuntimeError, NotImplementedError), match=error):
        use(make())


@pytest.mark.parametrize("shape", [(), (3,), (3, 2, 2), (0, 4)])
def test_row_adam_refuses_a_parameter_that_is_not_a_table(shape):
    with pytest.raises(ValueError, match="RowAdam expects tables"):
        RowAdam([nn.Parameter(torch.zeros(shape))])


def test_generate_needs_a_prompt_of_one_token_or_more():
    model = GPT(GPTConfig(vocab_size=20, mem_n_keys=8, mem_knn=2))
    for shape in ((1, 0), (0,)):
        with pytest.raises(ValueError, match="one token or more"):
            next(model.generate(torch.zeros(shape, dtype=torch.int64), 5))


def test_a_second_derivative_raises_in_a_compiled_layer_that_is_not_compiled_ahead_of_time():
    layer = ProductKeyMemory(8, MemoryTable(64, 8), heads=2, knn=3)
    x = torch.randn(2, 5, 8, requires_grad=True)
    compiled = torch.compile(layer, backend="eager")
    (grad,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.square().sum().backward()


def test_forward_mode_raises_in_a_compiled_search():
    keys, tangent = torch.randn(2, 2, 8, 4), torch.randn(3, 2, 2, 4)

    @torch.compile(backend="eager")
    def derivative(queries):
        return torch.func.jvp(lambda q: product_key_topk(q, keys, 2)[0], (queries,), (tangent,))[1]

    with pytest.raises(NotImplementedError, match="forward"):
        derivative(torch.randn(3, 2, 2, 4))


# ------------------------------------------------------------------------------------------------
# Installations


def run_program(program, path, folder):
    """What a Python program prints that finds nanomem in path and runs in folder."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_nanomem_needs_no_triton(tmp_path):
    program = """
import sys
sys.modules["triton"] = None
import torch, nanomem.model, nanomem.optim, nanomem.sharding
from nanomem.memory import MemoryTable, ProductKeyMemory
layer = ProductKeyMemory(8, MemoryTable(64, 8), knn=3)
layer(torch.randn(2, 8)).sum().backward()
for optimizer in nanomem.optim.build_optimizer(layer):
    optimizer.step()
"""
    run_program(program, runs.ROOT, tmp_path)


@pytest.mark.slow
def test_an_installed_nanomem_has_its_kernels_facts_and_page(tmp_path):
    listing = ["git", "ls-files", "-z"]
    names = subprocess.run(listing, cwd=runs.ROOT, capture_output=True, text=True, check=True).stdout
    source = tmp_path / "source"
    for name in filter(None, names.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((runs.ROOT / name).read_bytes())
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "wheel", source]
    subprocess.run(pip_wheel, check=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = """
import json, nanomem
from nanomem.config import Config
from nanomem.data import open_data
names = [open_data(Config(data=data, n_entities=50)).facts.entities[0] for data in ("people", "world")]
print(json.dumps([nanomem.__file__, nanomem.kernels.__file__, *names]))
"""
    package, kernels, person, city = json.loads(run_program(program, tmp_path / "site", tmp_path))
    assert package.startswith(str(tmp_path)) and kernels.startswith(str(tmp_path))
    assert person and city == "Shanghai"
    assert (tmp_path / "site" / "nanomem" / "report.html").exists()
