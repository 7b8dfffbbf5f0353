import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanomem import export, tokenizer
from nanomem.cli import UserError
from nanomem.config import Config
from nanomem.model import GPT

SHAPE = dict(vocab_size=257, n_layer=3, n_head=2, n_embd=16, block_size=16, mem_n_keys=8, mem_knn=2)


@pytest.mark.parametrize("ffn", ["memory", "dense", "moe", "peer"])
def test_what_is_loaded_computes_what_was_saved(ffn, tmp_path):
    config = Config(ffn=ffn, n_entities=77, data="people", **SHAPE)
    model, idx = GPT(config).eval(), torch.randint(257, (2, 16))
    export.save(tmp_path / "model", model, tokenizer.byte_encoding(), config)
    loaded, loaded_config = export.load(tmp_path / "model")
    assert torch.equal(model(idx)[0], loaded.eval()(idx)[0])
    assert (loaded_config.n_entities, loaded_config.data, loaded_config.ffn) == (77, "people", ffn)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert sum(name.endswith("table.values") for name in tensors) == (
        ffn in ("memory", "peer")
    )  # a shared table once


def test_a_model_that_is_there_is_kept_and_a_damaged_one_is_named(tmp_path):
    config = Config(**SHAPE)
    export.save(tmp_path, GPT(config), tokenizer.byte_encoding(), config)
    with pytest.raises(UserError, match="already has a model.safetensors"):
        export.save(tmp_path, GPT(config), tokenizer.byte_encoding(), config)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"norm.weight has shape \(3,\), that of config.json's model is \(16,\)"
    ):
        export.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="model.safetensors can't be loaded"):
        export.load(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["mem_n_keys"] == 8 and saved["ffn_hidden"] > 0 and "out_dir" not in saved
    assert saved.keys() < {f.name for f in dataclasses.fields(Config)}
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json is missing"):
        export.load(tmp_path)


@pytest.mark.parametrize("name", [export.FILE, "config.json", "tokenizer.tiktoken"])
def test_an_export_overwrites_nothing(name, tmp_path):
    (tmp_path / name).write_text("mine")
    config = Config(n_embd=8, vocab_size=257, mem_n_keys=8, mem_knn=2)
    with pytest.raises(UserError, match=f"already has a {name}"):
        export.save(tmp_path, GPT(config), tokenizer.byte_encoding(), config)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"
