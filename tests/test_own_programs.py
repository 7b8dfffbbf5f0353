"""What docs/own-programs.md lists: what people do with a layer in programs of their own either works or
raises.
"""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import runs
import torch
import torch.nn as nn
from test_sharding import torchrun
from torch.autograd import forward_ad
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from nanomem.baselines import PEER, MixtureOfExperts, memory_dot
from nanomem.config import GPTConfig
from nanomem.memory import MemoryTable, ProductKeyMemory, memory_read, product_key_topk
from nanomem.model import GPT
from nanomem.optim import RowAdam, build_optimizer


def make(sparse=True, kind=ProductKeyMemory):
    torch.manual_seed(0)
    tables = [MemoryTable(64, 8, sparse_grad=sparse) for _ in range(2 if kind is PEER else 1)]
    return kind(8, *tables, heads=2, knn=3, k_dim=8)


def batch(*shape, seed=1):
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(seed))


def gradients(layer, x=None):
    """The gradients of a loss of the layer's, after backward(), by name and dense."""
    layer(batch(2, 5) if x is None else x).square().sum().backward()
    return {name: p.grad.to_dense() for name, p in layer.named_parameters()}


def loss_of(layer):
    return lambda parameters, x: functional_call(layer, parameters, (x,)).square().sum()


def values_of(layer):
    return {name: p.detach() for name, p in layer.named_parameters()}


# ------------------------------------------------------------------------------------------------
# What works


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
        for optimizer in build_optimizer(each):
            optimizer.step()
    x = batch(5, 2).transpose(0, 1)
    torch.testing.assert_close(other(x), layer(x.contiguous()))
    torch.testing.assert_close(layer(batch(1, 5).expand(4, 5, 8)), layer(batch(1, 5).repeat(4, 1, 1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_layer_of_another_dtype_trains(dtype):
    layer = make().to(dtype)
    y = layer(batch(2, 5).to(dtype))
    torch.testing.assert_close(y.float(), make()(batch(2, 5)), rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    for optimizer in build_optimizer(layer):
        optimizer.step()
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    layer, x = make(), batch(2, 5).requires_grad_()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    expected = batch(2, 5).requires_grad_()
    found = gradients(make(), expected)
    torch.testing.assert_close(x.grad, expected.grad)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad.to_dense(), found[name])


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
    frozen, a, b = make().requires_grad_(False), batch(2, 5).requires_grad_(), batch(2, 5).requires_grad_()
    frozen(a).sum().backward()
    layer(b).sum().backward()
    assert torch.equal(a.grad, b.grad)


def test_gradients_of_two_passes_and_of_a_kept_graph_add_up():
    layer, twice, x = make(), make(), batch(2, 5)
    loss = layer(x).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for _ in range(2):
        twice(x).sum().backward()
    for a, b in zip(layer.parameters(), twice.parameters()):
        torch.testing.assert_close(a.grad.to_dense(), b.grad.to_dense())


@pytest.mark.parametrize(
    "optimizer, sparse", [(torch.optim.SparseAdam, True), (torch.optim.SGD, True), (torch.optim.AdamW, False)]
)
def test_torchs_optimizers_move_the_rows_that_were_read(optimizer, sparse):
    layer = make(sparse)
    before, read = layer.table.values.detach().clone(), gradients(layer)["table.values"].any(1)
    optimizer(
        [layer.table.values], lr=0.1, **({"weight_decay": 0.0} if optimizer is torch.optim.AdamW else {})
    ).step()
    assert torch.equal((layer.table.values != before).any(1), read)


def test_a_grad_scaler_scales_sparse_gradients_back():
    layer = make()
    optimizers, scaler = build_optimizer(layer), torch.amp.GradScaler("cpu")
    scaler.scale(layer(batch(2, 5)).square().sum()).backward()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    expected = gradients(make())
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad.to_dense(), expected[name])
    for optimizer in optimizers:
        scaler.step(optimizer)


def test_row_adam_takes_a_closure_as_torchs_optimizers_do():
    layer = make()
    optimizer, before = RowAdam([layer.table.values]), layer.table.values.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = layer(batch(2, 5)).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert torch.equal(optimizer.step(closure), make()(batch(2, 5)).sum())
    assert not torch.equal(layer.table.values, before) and optimizer.step() is None


def test_gradcheck():
    assert torch.autograd.gradcheck(make(sparse=False).double(), (batch(2, 3).double().requires_grad_(),))


def test_layers_of_nothing_give_nothing():
    experts = [nn.Linear(8, 8) for _ in range(3)]
    for layer in (make(), make(kind=PEER), MixtureOfExperts(8, experts, 1)):
        x = batch(0, 5).requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == (0, 5, 8)


@pytest.mark.parametrize("order", [list, lambda modules: list(modules)[::-1]])
@pytest.mark.parametrize("ffn", ["memory", "dense", "moe", "peer"])
def test_a_model_built_on_the_device_meta_begins_as_any_other(ffn, order):
    config = GPTConfig(
        vocab_size=300, n_embd=64, mem_n_keys=32, mem_knn=4, ffn=ffn, moe_experts=4, moe_hidden=64
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    for module in order(model.modules()):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    expected = GPT(config)
    assert torch.equal(model.cos, expected.cos) and torch.equal(model.sin, expected.sin)
    assert model.lm_head.weight is model.embedding.weight
    for (name, p), q in zip(model.named_parameters(), expected.parameters()):
        if p.numel() > 500:
            assert p.std().item() == pytest.approx(q.std().item(), rel=0.1), name
        else:
            assert p.isfinite().all(), name
            assert q.unique().numel() > 1 or torch.equal(p, q), name  # a scale, or RMSNorm's ones


# ------------------------------------------------------------------------------------------------
# What raises


def penalty(kernels, monkeypatch, read):
    monkeypatch.setenv("NANOMEM_KERNELS", kernels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table, x = (
        torch.randn(64, 6, device=device, requires_grad=True),
        torch.rand(5, 6, device=device, requires_grad=True),
    )
    y = read(table, torch.randint(64, (5, 6), device=device), x)
    (slope,) = torch.autograd.grad(
        y.sum(), x, create_graph=True
    )  # its own gradient, ones, has none: nothing warns
    (y.sum() + slope.square().sum()).backward()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("read", [memory_read, memory_dot])
def test_a_second_derivative_of_a_read_raises_on_every_path(kernels, read, monkeypatch):
    with pytest.raises(NotImplementedError, match="no second derivative"):
        penalty(kernels, monkeypatch, read)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("wanted", ["queries", "keys"])
def test_a_second_derivative_of_the_search_raises_on_every_path(kernels, wanted, monkeypatch):
    monkeypatch.setenv("NANOMEM_KERNELS", kernels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = {
        "queries": torch.randn(5, 2, 2, 4, device=device),
        "keys": torch.randn(2, 2, 8, 4, device=device),
    }
    for tensor in inputs.values():
        tensor.requires_grad_()
    scores, _ = product_key_topk(*inputs.values(), 3)
    slope, = torch.autograd.grad(scores.sum(), inputs[wanted], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        slope.square().sum().backward()


def forward_mode(layer):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(batch(2, 5), batch(2, 5)))).tangent


@pytest.mark.parametrize("use", [
    lambda layer: torch.func.jvp(layer, (batch(2, 5),), (batch(2, 5),)),
    lambda layer: torch.func.jacfwd(layer)(batch(2, 5)),
    lambda layer: torch.func.hessian(lambda x: layer(x).sum())(batch(2, 5)),
    lambda layer: torch.autograd.functional.hessian(lambda x: layer(x).sum(), batch(2, 5)),
    forward_mode])
def test_forward_mode_and_hessians_raise(use):
    with pytest.raises(NotImplementedError):
        use(make())


def changed_before_backward(layer):
    loss = layer(batch(2, 5)).sum()
    with torch.no_grad():
        layer.table.values.add_(1)
    loss.backward()


@pytest.mark.parametrize(
    "use, error",
    [
        (torch.jit.script, "memory_read"),
        (
            lambda layer: (gradients(layer), torch.optim.AdamW(layer.parameters()).step()),
            "does not support sparse gradients",
        ),
        (lambda layer: (gradients(layer), nn.utils.clip_grad_norm_(layer.parameters(), 1.0)), "Sparse"),
        (changed_before_backward, "modified by an inplace operation"),
        (lambda layer: layer(batch(2, 5).long()), "dtype"),
        (lambda layer: memory_read(layer.table.values, torch.tensor([[64]]), torch.ones(1, 1)), "64"),
        (lambda layer: memory_read(layer.table.values, torch.tensor([[-1]]), torch.ones(1, 1)), "-1"),
    ],
)
def test_what_is_not_supported_raises(use, error):
    with pytest.raises((RuntimeError, NotImplementedError), match=error):
        use(make())


@pytest.mark.parametrize("shape", [(), (3,), (3, 2, 2), (0, 4)])
def test_row_adam_refuses_what_is_no_table(shape):
    with pytest.raises(ValueError, match="RowAdam expects tables"):
        RowAdam([nn.Parameter(torch.zeros(shape))])


def test_generate_wants_a_token_to_go_on_from():
    model = GPT(GPTConfig(vocab_size=20, mem_n_keys=8, mem_knn=2))
    for shape in ((1, 0), (0,)):
        with pytest.raises(ValueError, match="one token or more"):
            next(model.generate(torch.zeros(shape, dtype=torch.int64), 5))


# ------------------------------------------------------------------------------------------------
# Processes, and installations


def test_ddp_and_fsdp_of_a_dense_table_give_one_processs_gradients_and_refuse_a_sparse_one():
    told = torchrun(2, "wrapped", {})
    assert (
        told["ddp dense"] < 1e-6
        and told["fsdp dense"] < 1e-6
        and told["fsdp adamw"] < 1e-5
        and told["fsdp clip"] < 1e-6
    )
    assert (
        "Sparse" in told["ddp sparse"]
        and "Sparse" in told["fsdp sparse"]
        and "DTensor" in told["fsdp RowAdam"]
    )
    assert told["fsdp meta"] == pytest.approx([1.0, 1.0, 1.0], rel=0.2)  # of 512 numbers


def test_nanomem_needs_no_triton(tmp_path):
    program = ("import sys; sys.modules['triton'] = None\n"
               "import torch, nanomem.model, nanomem.optim, nanomem.sharding\n"
               "from nanomem.memory import MemoryTable, ProductKeyMemory\n"
               "layer = ProductKeyMemory(8, MemoryTable(64, 8), knn=3)\n"
               "layer(torch.randn(2, 8)).sum().backward()\n"
               "[optimizer.step() for optimizer in nanomem.optim.build_optimizer(layer)]")
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_an_installed_nanomem_has_its_kernels_and_facts(tmp_path):
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=runs.ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((runs.ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "wheel", source],
        check=True,
    )
    wheel, = (tmp_path / "wheel").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import json, nanomem; from nanomem import facts, tokenizer\n"
        "from nanomem.config import Config; from nanomem.data import open_data\n"
        "sets = [open_data(Config(data=data, n_entities=50)).facts.entities[0]\n"
        "        for data in ('people', 'world')]\n"
        "print(json.dumps([nanomem.__file__, nanomem.kernels.__file__, *sets]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 0, done.stderr[-2000:]
    package, kernels, person, city = json.loads(done.stdout)
    assert (
        package.startswith(str(tmp_path))
        and kernels.startswith(str(tmp_path))
        and person
        and city == "Shanghai"
    )


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
