import dataclasses
import functools
import json
from types import SimpleNamespace

import pytest
import runs
import torch
from rich.console import Console

from nanomem.cli import UserError
from nanomem.config import Config
from nanomem.reproduce import __main__ as program
from nanomem.reproduce import commands, figures, page, slots, sweeps
from nanomem.reproduce.presets import PRESETS, Preset
from nanomem.reproduce.runs import ROOT, Run, Trainer, data_digest, here
from nanomem.reproduce.sizing import flops

TINY = Config(
    data="world",
    n_entities=12,
    n_layer=3,
    n_embd=32,
    block_size=64,
    batch_size=4,
    mem_layers="0,1",
    mem_n_keys=32,
    mem_knn=4,
    mem_k_dim=32,
    max_iters=4,
    eval_interval=4,
    eval_iters=1,
    warmup_iters=1,
    device="cpu",
)
PRESET = Preset("laptop", "wikitext-2", workers=2, threads=1)


@pytest.fixture
def tiny(monkeypatch):
    """A preset whose models train in a moment, and in this process, which saves importing torch each time."""

    def start(trainer, run):
        trainer.out_dir.mkdir(parents=True, exist_ok=True)
        runs.run("train.py", *trainer.arguments(run))
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setitem(PRESETS, "laptop", PRESET)
    monkeypatch.setattr(program, "read_recipe", lambda *_: dataclasses.asdict(TINY))
    monkeypatch.setattr(Trainer, "start", start)


def reproduce(monkeypatch, folder, *arguments):
    """Runs a command in a folder of its own. Returns its arguments, to run it again."""
    folders = [f"--out_dir={folder / 'out'}", f"--runs={folder / 'runs'}", f"--assets={folder}"]
    monkeypatch.setattr("sys.argv", ["reproduce", *map(str, arguments), *folders])
    program.main()


def trainer_in(folder):
    """A Trainer that starts processes."""
    return Trainer(2, 1, folder / "runs", folder / "out", Console(quiet=True))


def test_table1_from_nothing_and_again(tiny, monkeypatch, tmp_path):
    reproduce(monkeypatch, tmp_path, "table1", "--data=world", "--seeds=2")
    results = json.loads((tmp_path / "table1-world-laptop.json").read_text())
    rows = results["rows"]
    assert results["command"] == "python -m nanomem.reproduce table1 --data=world --seeds=2"
    assert results["commit"] and "torch" in results["machine"] and results["seeds"] == [1337, 1338]
    assert [row["model"] for row in rows] == ["dense", "dense, 2x", "mixture of experts", "Memory+"]
    memory = rows[-1]
    for row, times in zip(rows, (1, 2, 1, 1)):
        assert row["flops_per_token"] == pytest.approx(times * memory["flops_per_token"], rel=0.02)
        for column in ("recall", "recall_taught", "loss", "answer_nll", "bits_known"):
            assert len(row[column]) == 2
        assert 0 <= row["recall"][0] <= 1 and row["loss"][0] > 1 and row["seconds"] > 0
        assert row["answer_nll"][0] > 1 and row["bits_known"][0] >= 0
    assert rows[2]["mem_params"] > 0
    assert all(row["behind_memory"]["n"] == 2 for row in rows[:-1])

    trained_runs = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")]
    assert len(trained_runs) == 4 * 4 + 4 * 2  # tries, and models on each seed
    assert {result["settings"]["seed"] for result in trained_runs} == {1336, 1337, 1338}
    for result in trained_runs:
        assert result["metrics"]["iter"] == result["settings"]["max_iters"]
        assert result["command"].startswith("python train.py --") and result["commit"] and result["machine"]
    assert (tmp_path / "table1-world-laptop.png").stat().st_size > 5000

    monkeypatch.setattr(Trainer, "start", lambda *_: pytest.fail("trained again"))
    reproduce(monkeypatch, tmp_path, "table1", "--data=world", "--seeds=2")
    assert json.loads((tmp_path / "table1-world-laptop.json").read_text()) == results


def test_paired_differences_against_a_t_test_by_hand():
    ours, theirs = ([{"bits_known": x} for x in bits] for bits in ([10, 12, 15], [7, 10, 11]))
    found = commands.paired(ours, theirs, "bits_known")
    # Differences 3, 2, 4: mean 3, standard deviation 1, so t = 3 / (1 / sqrt(3)); for two degrees of freedom
    # the two-sided p is 1 - t / sqrt(t ** 2 + 2).
    t = 3 * 3**0.5
    assert found == pytest.approx({"mean": 3, "t": t, "p": 1 - t / (t**2 + 2) ** 0.5, "n": 3})


def test_the_search_takes_the_cheapest_answers_on_a_seed_that_is_not_reported():
    tries = {"memory": sweeps.rated(TINY, [1e-3, 2e-3, 4e-3]), "dense": [TINY.replace(ffn="dense")]}

    def train(wanted, if_diverged):
        assert all(run.config.seed == TINY.seed - 1 and run.config.max_iters == 2 for run in wanted)
        assert if_diverged["answer_nll_select"] == float("inf")
        return {run.name: {"answer_nll_select": abs(run.config.learning_rate - 2e-3)} for run in wanted}

    best = sweeps.search(tries, SimpleNamespace(train=train), "answer_nll_select")
    assert best == {"memory": tries["memory"][1], "dense": tries["dense"][0]}
    assert best["memory"].mem_lr == pytest.approx(TINY.mem_lr * 2e-3 / TINY.learning_rate)


@pytest.mark.parametrize("preset", ["laptop", "night"])
def test_four_different_candidates_for_each_model_of_equal_flops(preset):
    base = recipe(preset)
    for name, configs in sweeps.candidates(base).items():
        assert len({str(config) for config in configs}) == 4
        for config in configs:
            config.check()
            times = 2 if name == "dense, 2x" else 1
            assert flops(config) == pytest.approx(times * flops(base), rel=0.02)


def test_curves_follow_each_run(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(program, "read_recipe", lambda *_: dataclasses.asdict(TINY.replace(eval_interval=2)))
    reproduce(monkeypatch, tmp_path, "curves", "--data=world", "--seeds=2")
    rows = json.loads((tmp_path / "curves-world-laptop.json").read_text())["rows"]
    assert [row["model"] for row in rows] == [
        "dense", "dense, 2x", "mixture of experts", "Memory+", "Memory+, three times as long",
        "dense, three times as long"]
    for row, updates in zip(rows, (4, 4, 4, 4, 12, 12)):
        assert row["tokens"] == [step * 4 * 64 for step in range(0, updates + 1, 2)]
        for key in ("recall", "recall_taught", "bits_known"):
            assert [len(curve) for curve in row[f"{key}_curve"]] == [len(row["tokens"])] * 2
            assert [curve[-1] for curve in row[f"{key}_curve"]] == row[key]
    assert rows[4]["flops_per_token"] == rows[3]["flops_per_token"]
    assert (tmp_path / "curves-world-laptop.png").stat().st_size > 5000


def test_the_pages_have_the_tables_of_the_results_in_assets():
    for name in page.PAGES:
        text = (ROOT / name).read_text()
        assert text == page.filled(text, ROOT / "assets"), (
            f"{name} is stale: run python -m nanomem.reproduce page")
        assert "<!-- table: " in text


def test_a_page_s_tables_are_written_anew(tmp_path):
    results = {"command": "python -m nanomem.reproduce scaling", "commit": "abcdef0", "machine": "2 cores",
               "seeds": [1, 2], "minutes": 3, "rows": [
                   {"model": "no memory", "params": 1000, "mem_params": 0, "flops_per_token": 2e6,
                    "recall": [0.123, 0.456], "recall_taught": [0.5, 0.25], "loss": [1.0, 2.0]}]}
    (tmp_path / "scaling.json").write_text(json.dumps(results))
    made = page.filled("a\n<!-- table: scaling -->\nold\n<!-- end -->\nb\n", tmp_path)
    assert "| no memory | 2.000 million | 1,000 | 0 | 12.3, 45.6 | 50.0, 25.0 | 1.500 |\n" in made
    assert ("(`python -m nanomem.reproduce scaling`; commit abcdef0; 2 cores; seeds 1, 2; "
            "3 minutes of training)\n") in made
    assert made.startswith("a\n<!-- table: scaling -->\n\n| model") and made.endswith("<!-- end -->\nb\n")
    assert "old" not in made and page.filled(made, tmp_path) == made
    with pytest.raises(UserError, match="there is no table scalin; known are .*scaling"):
        page.filled("<!-- table: scalin -->\n<!-- end -->", tmp_path)
    with pytest.raises(UserError, match="table1.json is missing; .*nanomem.reproduce table1 makes it"):
        page.filled("<!-- table: table1 -->\n<!-- end -->", tmp_path)


def test_text_has_bits_per_byte(tiny, monkeypatch, tmp_path):
    (tmp_path / "book.txt").write_text("All work and no play makes Jack a dull boy.\n" * 100)
    reproduce(monkeypatch, tmp_path, "text", "--seeds=2", f"--text={tmp_path / 'book.txt'}")
    rows = json.loads((tmp_path / "text-book.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["dense", "dense, 2x", "mixture of experts", "Memory+"]
    for row in rows:
        # A byte is a token here, so these are nats and bits of the same thing.
        assert row["bits_per_byte"] == pytest.approx([loss / 0.6931471805599453 for loss in row["loss"]])
        assert len(row["bits_per_byte"]) == 2
    dense, memory = rows[0], rows[-1]
    ahead = sum(dense["bits_per_byte"]) / 2 - sum(memory["bits_per_byte"]) / 2
    table = figures.markdown(rows)
    assert "bits per byte" in table and f"| {ahead:.3f} (t = " in table
    assert (tmp_path / "text-book.png").stat().st_size > 5000


def test_a_run_that_was_stopped_continues(tmp_path):
    trainer, run = trainer_in(tmp_path), Run("one", TINY.replace(max_iters=8))
    runs.run("train.py", *trainer.arguments(Run("half", TINY)), f"--out_dir={trainer.folder(run)}")
    metrics = trainer.train([run])
    assert metrics["one"]["iter"] == 8
    assert "resuming from iteration 4" in trainer.log_path(run).read_text()


def test_a_run_that_fails_is_named_with_its_last_line(tmp_path):
    run = Run("impossible, lr=0.001", TINY.replace(device="cuda:7"))
    with pytest.raises(UserError, match="impossible, lr=0.001 failed: .*--device=cuda:7 is not on"):
        trainer_in(tmp_path).train([run])
    assert not list((tmp_path / "runs").glob("*"))


def test_a_run_that_diverges_counts_as_the_worst_and_is_not_trained_again(tmp_path, monkeypatch):
    run = Run("wild", TINY.replace(learning_rate=1e30, grad_clip=0.0))
    worst = {"val_loss": 9e9}
    assert trainer_in(tmp_path).train([run], if_diverged=worst)["wild"] == worst
    monkeypatch.setattr(Trainer, "start", lambda *_: pytest.fail("trained again"))
    assert trainer_in(tmp_path).train([run], if_diverged=worst)["wild"] == worst
    with pytest.raises(UserError, match="wild failed: .*A lower learning_rate"):
        trainer_in(tmp_path).train([run])


def test_a_result_counts_for_equal_settings_data_torch_and_computation(monkeypatch):
    run = Run("a", TINY)
    saved = json.loads(json.dumps(run.identity))
    assert Run("another name", TINY.replace(out_dir="elsewhere")).is_result(saved)
    assert not Run("a", TINY.replace(mem_lr=0.5)).is_result(saved)
    assert not Run("a", TINY.replace(seed=2)).is_result(saved)
    for key in ("data", "torch", "computation"):
        assert not run.is_result(saved | {key: "other"})
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    assert not Run("a", TINY).is_result(saved)


def test_a_result_from_before_a_setting_existed_counts_at_its_default():
    saved = json.loads(json.dumps(Run("a", TINY).identity))
    del saved["settings"]["mem_beta2"]
    assert Run("a", TINY).is_result(saved)
    assert not Run("a", TINY.replace(mem_beta2=0.5)).is_result(saved)
    saved["settings"]["a_setting_that_is_gone"] = 1
    assert not Run("a", TINY).is_result(saved)


def test_a_text_that_changed_is_trained_on_again(tmp_path):
    book = tmp_path / "book.txt"
    config = Config(data=str(book))
    book.write_text("All work and no play makes Jack a dull boy.\n" * 100)
    before = data_digest(config)
    assert before == data_digest(config)
    book.write_text("All work and no play makes Jill a dull girl.\n" * 100)
    data_digest.__globals__["_data_digest"].cache_clear()  # as in another process
    assert data_digest(config) != before


@functools.cache
def recipe(name):
    path = program.cli.shipped("configs") / f"{name}.toml"
    return Config(**program.read_recipe(Config, path))


def without_training(trained):
    """A Trainer that notes the configs and trains nothing."""

    def train(wanted, if_diverged=None):
        trained.update({run.name: run.config for run in wanted if "try" not in run.name})
        metrics = dict(recall=0.5, recall_taught=0.5, recall_tail=0.5, val_loss=1.0, answer_nll_select=1.0)
        return {run.name: metrics for run in wanted}

    return SimpleNamespace(train=train)


@pytest.mark.parametrize("command, preset, seeds", [
    ("layers", "night", 3), ("ablations", "night", 3), ("ablations", "laptop", 1)])
def test_every_model_of_a_command_can_be_made(command, preset, seeds):
    trained, base = {}, recipe(preset)
    function = commands.COMMANDS[command]
    rows = function(base, range(seeds), without_training(trained))
    assert len(rows) * seeds == len(trained) and len(rows) >= 4
    for config in trained.values():
        config.check()
    # Each change changes something besides the width that makes up for its FLOPs.
    changed = [dataclasses.replace(config, ffn_hidden=0) for config in trained.values()]
    assert all(config not in changed[:i] for i, config in enumerate(changed))
    target = flops(base) if command == "ablations" else rows[-1]["flops_per_token"]
    ratios = {row["model"]: row["flops_per_token"] / target for row in rows}
    unequal = {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > 0.02}
    assert set(unequal) <= {"without gate"}  # which leaves out a projection
    assert all(0.97 < ratio < 1 for ratio in unequal.values()), unequal


@pytest.mark.parametrize("preset", ["laptop", "night", "gpu"])
def test_scaling_changes_only_the_number_of_keys(preset):
    trained, base = {}, recipe(preset)
    rows = commands.scaling(base, [1, 2], without_training(trained))
    three = commands.three_of_six(base)
    n_slots = [0] + [4**n for n in range(5, 11)]
    assert [row["slots"] for row in rows] == n_slots[:len(rows)] and len(rows) >= 6
    assert len(trained) == 2 * len(rows)
    for config in trained.values():
        config.check()
        if config.ffn == "memory":
            changes = dict(mem_n_keys=config.mem_n_keys, seed=config.seed)
            assert config == sweeps.at_rate(three, base.learning_rate / 2).replace(**changes)
    assert rows[0]["flops_per_token"] == pytest.approx(rows[-1]["flops_per_token"], rel=0.02)


def test_the_figure_of_scaling_shows_means_seeds_and_the_dense_model():
    seeds = [[0.2, 0.4], [0.3, 0.5], [0.1, 0.9]]  # of no memory, 1,024 and 4,096 slots
    rows = [dict(slots=slots, recall=recall, bits_known=[1e4 * x for x in recall], flops_per_token=flops)
            for slots, recall, flops in zip((0, 1024, 4096), seeds, (3e6, 1e6, 2e6))]
    recall, bits, cost = figures.draw_scaling(rows).axes
    for axis, times in (recall, 1), (bits, 1e4):
        means, *dots, dense = axis.lines
        assert list(means.get_xdata()) == [1024, 4096]
        assert means.get_ydata() == pytest.approx([0.4 * times, 0.5 * times])
        assert [list(dot.get_xdata()) for dot in dots] == [[1024, 1024], [4096, 4096]]
        assert dots[1].get_ydata() == pytest.approx([0.1 * times, 0.9 * times])
        assert dense.get_ydata() == pytest.approx([0.3 * times] * 2)
    assert cost.lines[0].get_ydata() == pytest.approx([1, 2])
    assert cost.lines[1].get_ydata() == pytest.approx([3, 3])


@pytest.mark.parametrize("arguments, message", [
    ([], "one of curves, table1, .*, forgetting, retrofit, shapes, slots, page; got nothing"),
    (["tables"], r"got tables \(did you mean table1\?\)"),
    (["table1", "--preset=phone"], "--preset must be one of night, laptop, gpu; got 'phone'"),
    (["table1", "--seeds=0"], "--seeds must be 1 or more"),
    (["shapes"], "shapes needs --model: the name of a pretrained model, a folder or a .gguf file"),
    (["forgetting", "--preset=night"], "--preset does nothing for forgetting, which takes --seeds"),
])
def test_wrong_command_lines(arguments, message, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=message):
        reproduce(monkeypatch, tmp_path, *arguments)


def test_a_table_of_a_pretrained_model_grows(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    point = {"readings": 40, "seconds": 9.0, "taught": 0.95, "held_out": 0.5, "loss": 0.01, "kept": 50}

    def compare(teacher, seeds):
        curves = []
        for seed in seeds:
            assert bool(curves) == (tmp_path / "shapes.json").exists()
            curves.append([point])
            teacher.used.append({"seed": seed, "seconds": 90, **here()})
            yield [{"memory": "default", "trained": [1e6] * len(curves), "curves": curves}]

    monkeypatch.setattr("nanomem.reproduce.shapes.compare", compare)
    reproduce(monkeypatch, tmp_path, "shapes", "--model=some/model", "--seeds=2")
    results = json.loads((tmp_path / "shapes.json").read_text())
    assert results["command"] == "python -m nanomem.reproduce shapes --model=some/model --seeds=2"
    assert results["seeds"] == [1337, 1338] and results["minutes"] == 3
    row = "| default | 1.0, 1.0 | 95.0, 95.0 | 50.0, 50.0 | +0.010, +0.010 |\n"
    assert row in capsys.readouterr().out
    shown = page.place_text("shapes", tmp_path)
    assert row in shown and "seeds 1337, 1338; 3 minutes in all)" in shown
    assert not (tmp_path / "shapes.png").exists()
    with pytest.raises(UserError, match="shapes.json is missing; python -m nanomem.reproduce shapes --model"):
        page.place_text("shapes", tmp_path / "elsewhere")


def test_slots_of_a_trained_model(monkeypatch, tmp_path):
    runs.train(tmp_path / "run", "--data=people", "--block_size=64", "--mem_layers=0,1", "--max_iters=3")
    reproduce(monkeypatch, tmp_path, "slots", f"--run={tmp_path / 'run'}")
    rows = json.loads((tmp_path / "slots-run.json").read_text())["rows"]
    assert [row["layer"] for row in rows] == [0, 1]
    for row in rows:
        assert 0 < row["share used"] <= 1 and row["kl"] > 0
        ranks, shares = zip(*row["weights"])
        assert ranks[0] == 1 and 30 < len(ranks) <= 200 and sorted(ranks) == list(ranks)
        assert sorted(shares, reverse=True) == list(shares) and 0 < sum(shares) < 1.001
        for overlaps in row["overlaps"].values():
            assert set(overlaps) == {"a question", "another attribute", "another entity"}
            assert all(0 <= x <= 1 + 1e-5 for x in overlaps.values())
    assert (tmp_path / "slots-run.png").stat().st_size > 5000


def test_overlap_of_lookups():
    a = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    b = torch.tensor([[2, 9], [4, 3]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    assert slots.overlap(a, a) == pytest.approx(1)
    assert slots.overlap(a, b) == pytest.approx((0.25 + 0.5 + 0.1) / 2)
    both_heads_alike = torch.tensor([[1, 2], [1, 2]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    assert slots.overlap(both_heads_alike, both_heads_alike) == pytest.approx(1)
    assert slots.overlap(a, both_heads_alike) == pytest.approx((0.75 + 0.25) / 2)


def test_slots_needs_facts_and_memory(monkeypatch, tmp_path):
    runs.train(tmp_path / "run", "--ffn=dense", "--max_iters=1")
    with pytest.raises(UserError, match="facts and with memory layers, got data=world and ffn=dense"):
        reproduce(monkeypatch, tmp_path, "slots", f"--run={tmp_path / 'run'}")
