import dataclasses
import json
import sys

import pytest
import runs
import torch
from safetensors.torch import load_file

from nanomem import checkpoint
from nanomem.cli import UserError
from nanomem.config import Config, GPTConfig
from nanomem.model import GPT
from nanomem.optim import build_optimizer

CONFIG = GPTConfig(
    vocab_size=20,
    n_layer=2,
    n_embd=8,
    n_head=2,
    block_size=8,
    mem_layers="0,1",
    mem_n_keys=4,
    mem_knn=2,
    mem_heads=1,
)
HEADER = {"config": {}, "iteration": 3}


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
    checkpoint.save(tmp_path, model, optimizers, HEADER)
    torch.manual_seed(1)
    step(model, optimizers)

    torch.manual_seed(99)
    loaded = GPT(CONFIG)
    loaded_optimizers = build_optimizer(loaded)
    folder, header, refused = checkpoint.newest(tmp_path)
    assert header.items() > HEADER.items() and folder == tmp_path / "checkpoint-3" and not refused
    checkpoint.load(folder, loaded, loaded_optimizers)
    torch.manual_seed(1)
    step(loaded, loaded_optimizers)
    for a, b in zip(model.parameters(), loaded.parameters()):
        assert torch.equal(a, b)


def test_the_shared_table_and_tied_embedding_are_stored_once(tmp_path):
    model, optimizers = trained(0)
    checkpoint.save(tmp_path, model, optimizers, HEADER)
    names = load_file(tmp_path / "checkpoint-3" / "part-1-of-1.safetensors").keys()
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
    checkpoint.save(tmp_path, model, optimizers, HEADER)
    with pytest.raises(UserError, match="embedding.weight has shape"):
        checkpoint.load(tmp_path / "checkpoint-3", GPT(CONFIG.replace(vocab_size=30)))
    with pytest.raises(UserError, match="checkpoint-3 has no parameter blocks.*ffn.router.weight"):
        checkpoint.load(tmp_path / "checkpoint-3", GPT(CONFIG.replace(ffn="moe")))


def test_the_two_newest_are_kept_and_nothing_half_written(tmp_path):
    model, optimizers = trained(0)
    (tmp_path / "checkpoint-1.tmp").mkdir()  # of a process that was killed
    for iteration in (8, 9, 10, 11):
        checkpoint.save(tmp_path, model, optimizers, HEADER | {"iteration": iteration})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    assert checkpoint.newest(tmp_path)[1]["iteration"] == 11


@pytest.mark.parametrize("name", ["part-1-of-1.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("harm", ["missing", "cut", "overwritten"])
def test_the_one_before_is_used_where_a_file_is_missing_or_cut(name, harm, tmp_path):
    model, optimizers = trained(0)
    for iteration in (3, 4):
        checkpoint.save(tmp_path, model, optimizers, HEADER | {"iteration": iteration})
    path = tmp_path / "checkpoint-4" / name
    content = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes(content[:-10] if harm == "cut" else b"!" * 10 + content[10:])
    folder, header, refused = checkpoint.newest(tmp_path)
    assert folder == tmp_path / "checkpoint-3" and header["iteration"] == 3
    assert list(refused) == [tmp_path / "checkpoint-4"] and name in refused[tmp_path / "checkpoint-4"]
    checkpoint.save(tmp_path, model, optimizers, HEADER | {"iteration": 4})  # made anew
    assert (
        checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint-4" and (tmp_path / "checkpoint-3").exists()
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits to set")
def test_a_disk_that_takes_no_more_keeps_the_checkpoint_before(tmp_path):
    import resource
    model, optimizers = trained(0)
    checkpoint.save(tmp_path, model, optimizers, HEADER)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1000, hard)
    )  # as on a full disk, the kernel refuses what goes beyond it
    try:
        with pytest.raises(UserError, match=r"could not write .*checkpoint-4 .*checkpoint-3 is kept"):
            checkpoint.save(tmp_path, model, optimizers, HEADER | {"iteration": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    checkpoint.load(tmp_path / "checkpoint-3", model)


def test_settings_of_another_version_are_named():
    saved = dataclasses.asdict(Config())
    assert Config.from_saved(saved, "there") == Config()
    with pytest.raises(UserError, match="unknown.*colour"):
        Config.from_saved(saved | {"colour": 1}, "there")
    with pytest.raises(UserError, match="n_layer='two', expected int"):
        Config.from_saved(saved | {"n_layer": "two"}, "there")


def test_no_checkpoint_and_a_file_that_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) == (None, None, {})
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "checkpoint.json").write_text('["of something else"]')
    with pytest.raises(UserError, match="no checkpoint in .* is whole: .*checkpoint.json is not the header"):
        checkpoint.newest(tmp_path)


def test_a_checkpoint_of_a_newer_version_is_never_replaced(tmp_path):
    runs.train(tmp_path / "run", "--max_iters=10")
    header = tmp_path / "run" / "checkpoint-10" / checkpoint.HEADER
    header.write_text(json.dumps(json.loads(header.read_text()) | {"format": checkpoint.FORMAT + 1}))
    before = header.read_bytes()
    _, err = runs.train(tmp_path / "run", "--max_iters=10", "--resume", code=2)
    assert "of a newer nanomem" in err and err.count("\n") == 1 and header.read_bytes() == before


def test_a_missing_checkpoint_names_the_run_it_may_be_of(tmp_path):
    runs.train(tmp_path / "people-memory", "--max_iters=2")
    (tmp_path / "zq").mkdir()
    assert "did you mean" not in checkpoint.none_in(tmp_path / "zq")
    assert f"(did you mean {tmp_path / 'people-memory'}?)" in checkpoint.none_in(tmp_path / "people-memry")
    inside = tmp_path / "people-memory" / "checkpoint-2"
    assert f"(did you mean {tmp_path / 'people-memory'}?)" in checkpoint.none_in(inside)
