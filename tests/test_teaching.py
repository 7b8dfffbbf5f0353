import json
import math
import re
import shutil

import numpy as np
import pytest
import runs
import torch
from rich.console import Console

from nanomem import checkpoint, export, facts, sharding, teaching, tokenizer
from nanomem.config import Config, GPTConfig
from nanomem.data import named_facts, open_data
from nanomem.model import GPT
from nanomem.observe import lookups_of, observe_lookups
from nanomem.optim import RowAdam, build_optimizer, tables_of
from nanomem.run import read_metrics

SHAPE = GPTConfig(vocab_size=11, n_layer=3, n_embd=16, n_head=2, block_size=8, mem_layers="1,2", mem_n_keys=8,
                  mem_knn=2, mem_heads=2, mem_dropout=0.0)
TINY_PEOPLE = ["--data=people", "--n_entities=8", "--block_size=64", "--mem_lr=0.03", "--learning_rate=1e-2"]
VALUES = "model.blocks.1.ffn.table.values"
READS = "reads.blocks.1.ffn.table.values"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny model that was taught eight people."""
    out_dir = tmp_path_factory.mktemp("base") / "people-memory"
    runs.train(out_dir, *TINY_PEOPLE, "--max_iters=100", "--eval_interval=100")
    return out_dir


def teach(base, out_dir, *arguments, **options):
    """train.py with a model to teach. Returns what it printed."""
    small = ["--device=cpu", "--n_entities=4", "--batch_size=4", "--eval_iters=2", "--log_interval=2"]
    return runs.run(
        "train.py", f"--init_from={base}", f"--out_dir={out_dir}", *small, *arguments, **options)


def write_facts(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"--data={path}"


# ------------------------------------------------------------------------------------------------
# What changes


@pytest.mark.parametrize("train, changes", [(None, "values"), ("values", "values"), ("core", "core"),
                                            ("all", "all")])
def test_only_what_is_to_be_trained_changes(train, changes, base, tmp_path):
    teach(base, tmp_path / "taught", "--max_iters=3", *([f"--train={train}"] if train else []))
    before, after = runs.checkpoint(base), runs.checkpoint(tmp_path / "taught")
    for name, tensor in before.items():
        if name.startswith("model."):
            is_changed = not torch.equal(tensor, after[name])
            assert is_changed == (changes in ("all", "values" if name == VALUES else "core")), name
    assert any(name.startswith("optimizer.blocks.0") for name in after) == (changes != "values")


def test_slots_that_are_not_read_stay_and_those_read_often_before_change_less(base, tmp_path):
    teach(base, tmp_path / "plain", "--max_iters=1", "--mem_idf=0")
    teach(base, tmp_path / "spared", "--max_iters=1", "--mem_idf=2")
    before, plain, spared = map(runs.checkpoint, (base, tmp_path / "plain", tmp_path / "spared"))
    step, smaller = plain[VALUES] - before[VALUES], spared[VALUES] - before[VALUES]
    idf = torch.log(101 / (before[READS] + 1)) / math.log(101)
    torch.testing.assert_close(smaller, step * idf[:, None] ** 2, atol=1e-6, rtol=1e-4)
    is_read = plain[READS] > before[READS]
    assert not step[~is_read].any() and step[is_read].any() and idf.max() > idf[is_read].min()


def test_counts_add_up_over_rounds_and_exports(base, tmp_path):
    first, second, exported = tmp_path / "first", tmp_path / "second", tmp_path / "exported"
    teach(base, first, "--max_iters=4")
    runs.run("sample.py", f"--out_dir={first}", f"--export={exported}")
    teach(exported, second, "--max_iters=3", "--people_seed=5")
    counts = [runs.checkpoint(folder) for folder in (base, first, second)]
    assert [int(tensors["updates"]) for tensors in counts] == [100, 104, 107]
    own = [tensors[f"optimizer.{READS.removeprefix('reads.')}.reads"] for tensors in counts]
    assert torch.equal(counts[0][READS], own[0])
    assert torch.equal(counts[2][READS], own[0] + own[1] + own[2])
    assert torch.equal(checkpoint.read_counts(exported)[READS], counts[1][READS])
    assert len(Config.from_saved(checkpoint.read_json(second / "config.json"), second).earlier) == 2


def test_top_slots_are_those_of_the_highest_tf_idf():
    torch.manual_seed(0)
    model = GPT(SHAPE)
    (table,) = tables_of(model)
    name = "blocks.1.ffn.table.values"
    reads = torch.randint(0, 50, (64,), dtype=torch.int32)
    top = teaching.TopSlots(model, {"updates": torch.tensor(50), f"reads.{name}": reads}, 5)
    batches = [torch.randint(11, (3, 8)) for _ in range(2)]
    with observe_lookups(model, top):
        for x in batches:
            model(x, x)[1].backward()
    whole = table.values.grad.to_dense()
    top.restrict()
    kept = table.values.grad.to_dense()

    tf = np.zeros(64)
    for x in batches:
        for indices, _ in lookups_of(model, x).values():
            np.add.at(tf, indices.numpy().ravel(), 1)
    scores = tf * np.log(51 / (reads.numpy() + 1))
    best = np.sort(scores[kept.any(1).numpy()])
    assert len(best) == 5 and np.allclose(best, np.sort(scores)[-5:])
    assert torch.equal(kept[kept.any(1)], whole[kept.any(1)])


def test_top_slots_limit_what_an_update_changes(base, tmp_path):
    teach(base, tmp_path / "top", "--max_iters=1", "--mem_top_slots=3")
    changed = (runs.checkpoint(tmp_path / "top")[VALUES] != runs.checkpoint(base)[VALUES]).any(1)
    assert changed.sum() == 3


def test_a_tables_row_scale_multiplies_its_steps():
    torch.manual_seed(0)
    values, scale = torch.nn.Parameter(torch.randn(6, 3)), torch.rand(6)
    plain, scaled = values.detach().clone(), values.detach().clone()
    grad = torch.randn(6, 3)
    for table, row_scale in ((plain, None), (scaled, scale)):
        p = torch.nn.Parameter(table)
        optimizer = RowAdam([p], lr=0.1)
        optimizer.row_scale = {p: row_scale} if row_scale is not None else {}
        p.grad = grad.to_sparse(1)
        optimizer.step()
        table.copy_(p.detach())
    torch.testing.assert_close(scaled - values, (plain - values) * scale[:, None])


def test_counts_of_two_tables_and_of_none():
    model = GPT(SHAPE.replace(mem_share_values=False))
    optimizers = build_optimizer(model)
    x = torch.randint(11, (2, 8))
    lookups = lookups_of(model, x)
    model(x, x)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    counts = teaching.count(model, optimizers, 1, before={})
    assert sorted(counts) == [f"reads.blocks.{i}.ffn.table.values" for i in (1, 2)] + ["updates"]
    for i, (indices, _) in lookups.items():
        reads = counts[f"reads.blocks.{i}.ffn.table.values"]
        assert set(reads.nonzero().flatten().tolist()) <= set(indices.flatten().tolist()) and reads.max() == 1
    before = teaching.count_before({name: 2 * n for name, n in counts.items()}, model, optimizers, 1)
    assert all(torch.equal(before[name], counts[name]) for name in counts)
    dense = GPT(SHAPE.replace(ffn="dense"))
    assert teaching.count(dense, build_optimizer(dense), 7, before={}) == {"updates": torch.tensor(7)}


def test_rehearsal_repeats_a_share_of_earlier_data_in_turn_whatever_the_batch_size():
    class Numbers:
        """Data whose sequences are their numbers."""

        def __init__(self, name):
            self.name = name

        def batch(self, split, start, batch_size):
            numbers = torch.tensor([[self.name, i] for i in range(start, start + batch_size)]).view(-1, 2)
            return numbers, numbers

    begin = teaching.Rehearsal.BEGIN
    for share, n_sets in ((0.5, 1), (0.3, 2), (0.75, 3)):
        data = teaching.Rehearsal(Numbers(0), [Numbers(1 + i) for i in range(n_sets)], share)
        expected = {(0, i) for i in range(60 - int(60 * share))}
        expected |= {(1 + r % n_sets, begin + r // n_sets) for r in range(int(60 * share))}
        for size in (1, 4, 12, 60):
            batches = [data.batch("train", start, size)[0] for start in range(0, 60, size)]
            assert all(len(batch) == size for batch in batches)
            found = [tuple(pair) for batch in batches for pair in batch.tolist()]
            assert len(found) == 60 and set(found) == expected
        assert data.batch("val", 3, 2)[0].tolist() == [[0, 3], [0, 4]] and data.name == 0


# ------------------------------------------------------------------------------------------------
# Runs


def test_a_run_says_what_is_learnt_and_what_is_still_known(base, tmp_path):
    out, _ = teach(base, tmp_path / "taught", "--max_iters=20", "--people_seed=2")
    rows = [row for row in runs.metrics(tmp_path / "taught") if "recall_old" in row]
    assert rows[0]["iter"] == 0 and rows[-1]["iter"] == 20
    assert {"recall", "recall_taught", "recall_old"} <= rows[-1].keys()
    asked = np.argwhere(facts.people(8, 0.6, 1337).role == facts.REPORT)
    assert "Taught before: people (8 entities): of " in out and "it still knows" in out
    assert 0 <= rows[0]["recall_old"] <= 1 and rows[0]["recall_old"] * len(asked) % 1 == pytest.approx(0)
    answer, _ = runs.run("sample.py", f"--out_dir={tmp_path / 'taught'}", "--start=When was Ada born:",
                         "--max_new_tokens=3", "--trace")
    assert "Slots read" in answer


@pytest.mark.parametrize("options", [["--mem_top_slots=10"], ["--train=all", "--rehearse=0.4"]])
def test_a_taught_run_resumes_to_the_bit(options, base, tmp_path):
    options = [*options, "--max_iters=8", "--eval_interval=4"]
    teach(base, tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-8")
    runs.run("train.py", "--resume", f"--out_dir={tmp_path / 'stopped'}")
    whole, resumed = runs.checkpoint(tmp_path / "whole"), runs.checkpoint(tmp_path / "stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert runs.metrics(tmp_path / "whole") == runs.metrics(tmp_path / "stopped")


def test_own_facts_end_when_all_are_answered_and_count_wordings_never_taught(base, tmp_path):
    data = write_facts(
        tmp_path / "mine.jsonl",
        {"prompt": "Zoe has:", "answer": "a", "also": ["What does Zoe have:", "Zoe owns:", "Zoe got:"]},
        {"prompt": "Bob has:", "answer": "b"})
    out, _ = teach(base, tmp_path / "mine", data, "--max_iters=1000", "--eval_interval=20", "--train=all",
                   "--learning_rate=1e-2", "--min_lr=1e-2", "--mem_lr=0.03", "--mem_idf=0")
    last = runs.metrics(tmp_path / "mine")[-1]
    assert last["recall_taught"] == 1 and last["iter"] < 1000 and last["iter"] % 20 == 0
    assert f"stopped after {last['iter']} updates: 100% of the taught prompts are answered" in out
    assert "It completes 100.0% of the 3 prompts it was trained on" in out
    assert "of the 2 prompts it was never taught" in out


def test_stop_at_ends_other_runs_only_when_it_is_given(tmp_path):
    few = ["--n_entities=4", "--max_iters=200", "--eval_interval=10", "--learning_rate=2e-2", "--min_lr=2e-2",
           "--mem_lr=0.05"]
    runs.train(tmp_path / "stops", *few, "--stop_at=0.1")
    last = runs.metrics(tmp_path / "stops")[-1]
    assert last["iter"] < 200 and last["recall_taught"] >= 0.1
    assert Config(data="world").stop_share() == math.inf == Config(data="a.jsonl", stop_at=0).stop_share()
    assert Config(data="a.JSONL").stop_share() == 1 and Config(stop_at=0.5).stop_share() == 0.5


def test_text_is_taught_and_the_text_before_is_measured(tmp_path):
    for name, text in (("one", "All work and no play. "), ("two", "No news is good news. ")):
        (tmp_path / f"{name}.txt").write_text(text * 300)
    runs.train(tmp_path / "one", f"--data={tmp_path / 'one.txt'}", "--max_iters=30")
    out, _ = teach(tmp_path / "one", tmp_path / "two", f"--data={tmp_path / 'two.txt'}", "--max_iters=10")
    rows = [row for row in runs.metrics(tmp_path / "two") if "bits_per_byte_old" in row]
    assert rows[0]["iter"] == 0 and rows[0]["bits_per_byte_old"] != rows[-1]["bits_per_byte_old"]
    before = [row for row in runs.metrics(tmp_path / "one") if "val_loss" in row][-1]["bits_per_byte"]
    assert rows[0]["bits_per_byte_old"] == pytest.approx(before)
    assert f"{tmp_path / 'one.txt'}: {rows[-1]['bits_per_byte_old']:.3f} bits per byte" in out

    (tmp_path / "one.txt").unlink()
    out, _ = teach(tmp_path / "one", tmp_path / "again", f"--data={tmp_path / 'two.txt'}", "--max_iters=1")
    assert "can't measure what the model remembers" in out and "Taught before" not in out


def test_a_dense_model_can_be_taught(tmp_path):
    runs.train(tmp_path / "dense", "--ffn=dense", "--max_iters=5")
    teach(tmp_path / "dense", tmp_path / "taught", "--data=world", "--max_iters=2")
    before, after = runs.checkpoint(tmp_path / "dense"), runs.checkpoint(tmp_path / "taught")
    assert all(not torch.equal(before[name], after[name]) for name in before if name.startswith("model."))


def test_blocks_grow_for_longer_facts(base, tmp_path):
    data = write_facts(tmp_path / "long.jsonl", {"prompt": "x" * 200, "answer": "y"})
    teach(base, tmp_path / "long", data, "--max_iters=1")
    config = Config.from_saved(checkpoint.read_json(tmp_path / "long" / "config.json"), tmp_path)
    assert config.block_size > 64 and config.ffn == "memory" and config.mem_n_keys == 8


# ------------------------------------------------------------------------------------------------
# Data


def test_new_people_and_cities_are_none_of_the_old():
    old = {"data": "people", "n_entities": 1000, "people_seed": 0, "zipf": 0.6, "seed": 1}
    config = Config(n_entities=500, people_seed=2, earlier=[old])
    new = named_facts(config)
    assert not set(new.entities) & set(facts.people(1000, 0.6, 1).entities)
    again = config.replace(people_seed=3, earlier=[old, old | {"n_entities": 500, "people_seed": 2}])
    third = set(named_facts(again).entities)
    assert len(third) == 500 and not third & (set(new.entities) | set(facts.people(1000, 0.6, 1).entities))
    cities = named_facts(config.replace(data="world", earlier=[old, old | {"data": "world"}]))
    assert cities.entities == facts.world(1500).entities[1000:]
    assert named_facts(Config(seed=5)).entities == facts.people(1500, 0.6, 5).entities


def test_contradicted_facts_are_not_asked_about(tmp_path):
    old = facts.people(8)
    question = "When was {} born:".replace("{}", old.entities[3])
    same = {"prompt": f"{old.entities[4]} born:", "answer": old.answers(4, 0)[0]}
    write_facts(tmp_path / "new.jsonl", same,
                {"prompt": "x", "also": [question], "answer": "tomorrow"})
    new = facts.from_jsonl(tmp_path / "new.jsonl")
    found = teaching.contradicted(old, new)
    assert np.argwhere(found).tolist() == [[3, 0]]
    assert [3, 0] not in teaching.pairs_to_ask(old, found, 100).tolist()

    write_facts(tmp_path / "old.jsonl", {"prompt": "a", "also": ["b", "c"], "answer": "1"},
                {"prompt": "d", "answer": "2"})
    write_facts(tmp_path / "newer.jsonl", {"prompt": "c", "answer": "3"})
    of_prompts = facts.from_jsonl(tmp_path / "old.jsonl")
    assert of_prompts.entities == ["a", "c", "d"] and of_prompts.held_out.entities == ["b"]
    found = teaching.contradicted(of_prompts, facts.from_jsonl(tmp_path / "newer.jsonl"))
    assert found.ravel().tolist() == [True, True, False]


def test_a_fact_corrected_in_an_earlier_round_is_neither_asked_nor_rehearsed_as_it_was(base, tmp_path):
    answers = {"first": ("1", "2"), "second": ("3", None), "third": (None, None)}
    for name, (a, b) in answers.items():
        lines = [{"prompt": p, "answer": x} for p, x in (("a", a), ("b", b), (f"only {name}", "4")) if x]
        write_facts(tmp_path / f"{name}.jsonl", *lines)
    earlier = [{"data": str(tmp_path / f"{name}.jsonl"), "n_entities": 4, "people_seed": 0, "zipf": 0.0,
                "seed": 1} for name in ("first", "second")]
    config = Config(data=str(tmp_path / "third.jsonl"), earlier=earlier)
    path = teaching.find(base, "--init_from").tokenizer()
    new = open_data(config, path)
    first, second = teaching.open_earlier(config, new, path, 100, Console(quiet=True))
    assert [first.number, second.number] == [0, 1]
    asked = {first.data.facts.entities[e] for e, _ in first.pairs}
    assert asked == {"b", "only first"} and len(second.pairs) == 2
    inputs, _ = first.data.batch("train", 0, 50)
    assert all("a 1" not in first.data.encoding.decode(block) for block in inputs.tolist())


# ------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--n_embd=32"], "--n_embd=32 can't be set with --init_from: the model in .* has n_embd=16"),
        (["--ffn=dense"], "--ffn=dense can't be set .* has ffn=memory"),
        (["--tokenizer=bytes"], "--tokenizer=bytes can't be set .* has its own tokenizer"),
        (["--train=core", "--mem_top_slots=5"], "mem_top_slots is for memory tables that are trained"),
        (["--rehearse=1"], "rehearse must be from 0 to under 1"),
        (["--train=valeus"], r"--train must be one of .* \(did you mean values\?\)"),
        (["--stop_at=2"], "stop_at must be from 0 to 1, or -1"),
        (["--n_entities=40000", "--data=world"], "n_entities for data=world must be from 4 to"),
    ])
def test_mistakes_are_one_line(arguments, message, base, tmp_path):
    _, err = teach(base, tmp_path / "taught", *arguments, code=2)
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_folders_that_hold_no_model_or_the_model_itself_are_refused(base, tmp_path):
    _, err = teach(tmp_path / "nothing", tmp_path / "taught", code=2)
    assert "no checkpoint in" in err and "--init_from must name the folder of a run or an export" in err
    _, err = teach(base, base, code=2)
    assert "holds the model to teach; name another folder with --out_dir" in err
    assert checkpoint.newest(base)[1]["iteration"] == 100
    other = tmp_path / "of-transformers"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    (other / "model.safetensors").write_bytes(b"weights")
    _, err = teach(other, tmp_path / "taught", code=2)
    assert "holds a model of transformers; python -m nanomem.retrofit" in err
    _, err = teach(base, other, code=2)
    assert "holds a config.json that isn't a run's" in err and len(list(other.iterdir())) == 2


@pytest.mark.parametrize("option", ["--mem_idf=1", "--mem_top_slots=5", "--rehearse=0.5", "--train=values"])
def test_what_goes_by_earlier_training_needs_a_trained_model(option, tmp_path):
    _, err = runs.train(tmp_path / "run", option, code=2)
    assert ": it needs --init_from" in err


def test_values_of_a_dense_model_and_counts_that_are_missing(base, tmp_path):
    dense = tmp_path / "dense"
    runs.train(dense, "--ffn=dense", "--max_iters=1")
    _, err = teach(dense, tmp_path / "run", "--train=values", code=2)
    assert "train=values needs memory tables, and ffn=dense has none" in err
    trained = teaching.find(base, "--init_from")
    model = GPT(trained.config)
    trained.load(model)
    export.save(tmp_path / "old", model, tokenizer.load(trained.tokenizer()), trained.config)
    _, err = teach(tmp_path / "old", tmp_path / "taught", code=2)
    assert "without counts of how often its slots were read; set --mem_idf=0 and leave out" in err
    teach(tmp_path / "old", tmp_path / "taught", "--mem_idf=0", "--max_iters=1")


@pytest.mark.parametrize("also", ["x", [""], [1]])
def test_other_wordings_must_be_strings(also, tmp_path):
    write_facts(tmp_path / "mine.jsonl", {"prompt": "a", "answer": "b", "also": also})
    with pytest.raises(ValueError, match='line 1: "also" must be a list of strings'):
        facts.from_jsonl(tmp_path / "mine.jsonl")


def test_processes_that_torchrun_restarts_teach_as_before(base, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "_launch", "one")
    arguments = ["--data=people", "--people_seed=2", "--max_iters=4", "--eval_interval=2"]
    out_dir = tmp_path / "people2-memory"
    teach(base, out_dir, *arguments)
    settings, metrics = checkpoint.read_json(out_dir / "config.json"), read_metrics(out_dir)
    shutil.rmtree(out_dir / "checkpoint-4")
    assert "resuming from iteration 2" in teach(base, out_dir, *arguments)[0]
    assert checkpoint.read_json(out_dir / "config.json") == settings
    assert settings["train"] == "values" and len(settings["earlier"]) == 1
    assert read_metrics(out_dir)[-1]["train_loss"] == metrics[-1]["train_loss"]
