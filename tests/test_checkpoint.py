import dataclasses
import json

import pytest
import torch

from nanomem import checkpoint
from nanomem.config import Config, GPTConfig, UserError
from nanomem.model import GPT
from nanomem.optim import build_optimizer

CONFIG = GPTConfig(vocab_size=20, n_layer=2, n_embd=8, n_head=2, block_size=8, mem_layers="0,1", mem_n_keys=4, mem_knn=2, mem_heads=1)


def step(model, optimizers):
    idx = torch.randint(20, (2, 8))
    model(idx, idx)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def trained(steps):
    torch.manual_seed(0)
    model = GPT(CONFIG)
    optimizers = build_optimizer(model)
    for _ in range(steps):
        step(model, optimizers)
    return model, optimizers


def test_a_loaded_run_goes_on_exactly_as_the_saved_one(tmp_path):
    model, optimizers = trained(3)
    checkpoint.save(tmp_path, model, optimizers, {"config": {}, "iteration": 3})
    step(model, optimizers)

    torch.manual_seed(99)
    loaded = GPT(CONFIG)
    loaded_optimizers = build_optimizer(loaded)
    checkpoint.load(tmp_path, loaded, loaded_optimizers)
    assert checkpoint.read_header(tmp_path) == {"config": {}, "iteration": 3}
    step(loaded, loaded_optimizers)  # the same batch too: the generator's state came along
    for a, b in zip(model.parameters(), loaded.parameters()):
        assert torch.equal(a, b)


def test_the_shared_table_and_tied_embedding_are_stored_once(tmp_path):
    model, optimizers = trained(0)
    checkpoint.save(tmp_path, model, optimizers, {})
    names = checkpoint.safe_open(tmp_path / checkpoint.FILE, framework="pt").keys()
    assert sum("values" in name for name in names) == 1 and "model.lm_head.weight" not in names


def test_a_write_that_fails_keeps_what_was_there(tmp_path):
    path = tmp_path / "file.json"
    checkpoint.write_text(path, "old")

    def full_disk(temporary):
        temporary.write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left.*is kept"):
        checkpoint.write_atomically(path, full_disk)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_shape_is_named(tmp_path):
    model, optimizers = trained(0)
    checkpoint.save(tmp_path, model, optimizers, {})
    with pytest.raises(UserError, match="embedding.weight has shape"):
        checkpoint.load(tmp_path, GPT(CONFIG.replace(vocab_size=30)))


def test_settings_of_another_version_are_named():
    saved = dataclasses.asdict(Config())
    assert Config.from_saved(saved, "there") == Config()
    with pytest.raises(UserError, match="unknown.*colour"):
        Config.from_saved(saved | {"colour": 1}, "there")
    with pytest.raises(UserError, match="n_layer='two', expected int"):
        Config.from_saved(saved | {"n_layer": "two"}, "there")


def test_no_checkpoint_and_a_file_that_is_none(tmp_path):
    assert checkpoint.read_header(tmp_path) is None
    (tmp_path / checkpoint.FILE).write_bytes(json.dumps({"pickle": "no"}).encode())
    with pytest.raises(UserError, match="not a whole"):
        checkpoint.read_header(tmp_path)
