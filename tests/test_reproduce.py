import dataclasses
import json

import pytest
import runs
import torch

from nanomem import reproduce
from nanomem.cli import UserError
from nanomem.config import Config
from nanomem.model import GPT

TINY = dict(
    n_entities=40,
    n_layer=3,
    n_embd=32,
    n_head=2,
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


@pytest.fixture
def tiny(monkeypatch):
    """A preset whose runs take a moment."""
    monkeypatch.setitem(
        reproduce.PRESETS,
        "laptop",
        reproduce.Preset(TINY, workers=2, threads=1, rates=(8e-3,), text=dict(mem_layers="1"), balances=()),
    )


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["reproduce", *map(str, arguments)])
    reproduce.main()


def test_table1_from_nothing_and_again(tiny, monkeypatch, tmp_path):
    arguments = ["table1", "--seeds=1", f"--out_dir={tmp_path / 'runs'}", f"--assets={tmp_path}"]
    run(monkeypatch, *arguments)
    rows = json.loads((tmp_path / "table1.json").read_text())
    assert [row["model"] for row in rows] == [
        "dense",
        "dense, 2x",
        "dense, 4x",
        "mixture of experts",
        "PEER",
        "plain memory",
        "Memory+",
    ]
    memory = rows[-1]
    for row, times in zip(rows, (1, 2, 4, 1, 1, 1, 1)):
        assert row["flops_per_token"] == pytest.approx(times * memory["flops_per_token"], rel=0.02)
        assert len(row["recall"]) == len(row["recall_taught"]) == len(row["loss"]) == 1 and row["seconds"] > 0
        assert 0 <= row["recall"][0] <= 1 and row["loss"][0] > 1
    for row in rows[3:]:
        assert row["params"] == pytest.approx(memory["params"], rel=0.05) and row["mem_params"] > 0
    for folder in (tmp_path / "runs" / "laptop").glob(
        "*/config.json"
    ):  # each trained model takes the FLOPs its row says
        config = json.loads(folder.read_text())
        assert GPT(Config(**config)).flops_per_token() in [row["flops_per_token"] for row in rows], folder
    text = (tmp_path / "table1.md").read_text()
    assert text.count("\n| ") == 9 and "Memory+" in text and (tmp_path / "table1.png").stat().st_size > 5000

    monkeypatch.setattr(reproduce, "start", lambda *_: pytest.fail("trained again"))
    run(monkeypatch, *arguments)
    assert json.loads((tmp_path / "table1.json").read_text()) == rows


def test_text_has_bits_per_byte_and_the_best_of_the_rates(tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(
        reproduce.PRESETS,
        "laptop",
        dataclasses.replace(reproduce.PRESETS["laptop"], rates=(1e-9, 8e-3, 10.0)),
    )
    (tmp_path / "book.txt").write_text("All work and no play makes Jack a dull boy.\n" * 100)
    run(
        monkeypatch,
        "text",
        "--seeds=2",
        f"--text={tmp_path / 'book.txt'}",
        f"--out_dir={tmp_path / 'runs'}",
        f"--assets={tmp_path}",
    )
    rows = json.loads((tmp_path / "text.json").read_text())
    assert [row["model"] for row in rows] == ["dense", "mixture of experts", "Memory+"]
    for row in rows:
        assert row["learning_rate"] == 8e-3 and row["flops_per_token"] == pytest.approx(
            rows[-1]["flops_per_token"], rel=0.02
        )
        assert row["bits_per_byte"] == pytest.approx([loss / 0.6931471805599453 for loss in row["loss"]])
    assert (
        "bits per byte" in (tmp_path / "text.md").read_text()
        and (tmp_path / "text.png").stat().st_size > 5000
    )


def test_a_run_that_was_stopped_goes_on(tiny, tmp_path):
    config = Config(data="people", **TINY)
    run = reproduce.Run("one", config.replace(max_iters=8, eval_interval=4))
    halfway = reproduce.start(
        reproduce.Run("one", config.replace(max_iters=4)), run.folder(tmp_path), reproduce.PRESETS["laptop"]
    )
    assert halfway.wait() == 0
    results = reproduce.train([run], reproduce.PRESETS["laptop"], tmp_path, reproduce.Console(quiet=True))
    assert results["one"]["iter"] == 8
    assert (
        "resuming from iteration 4"
        in run.folder(tmp_path).with_name(run.folder(tmp_path).name + ".log").read_text()
    )


def test_a_run_that_fails_is_named_with_its_last_line(tiny, tmp_path):
    run = reproduce.Run("impossible, lr=0.001", Config(data="people", **TINY).replace(n_entities=3))
    with pytest.raises(
        UserError, match="impossible, lr=0.001 failed: .*n_entities for data=people must be from 4"
    ):
        reproduce.train([run], reproduce.PRESETS["laptop"], tmp_path, reproduce.Console(quiet=True))


def test_a_folder_belongs_to_settings(tmp_path):
    config = Config(data="people", **TINY)
    folder = reproduce.Run("a", config).folder(tmp_path)
    assert folder == reproduce.Run("a", config.replace(out_dir="elsewhere")).folder(tmp_path)
    assert folder != reproduce.Run("a", config.replace(mem_lr=0.5)).folder(tmp_path)


def test_the_program_is_what_computes_not_comments(monkeypatch, tmp_path):
    before = reproduce.program.__wrapped__()
    for name in ("train.py", "kernels.py", "nanomem", "data"):
        (tmp_path / name).symlink_to(reproduce.ROOT / name)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    assert reproduce.program.__wrapped__() == before
    text = (tmp_path / "train.py").read_text()
    (tmp_path / "train.py").unlink()
    (tmp_path / "train.py").write_text("# a remark\n" + text.replace('"""', '"""Other words. ', 1))
    assert reproduce.program.__wrapped__() == before
    (tmp_path / "train.py").write_text(text + "\nprint(1)\n")
    assert reproduce.program.__wrapped__() != before


@pytest.mark.parametrize(
    "command, preset", [("scaling", "laptop"), ("scaling", "gpu"), ("ablations", "laptop")]
)
def test_every_model_of_a_command_can_be_made(command, preset, monkeypatch, tmp_path):
    made = {}

    def train(runs, *_):
        made.update({run.name: run.config for run in runs})
        return {run.name: dict(recall=0.5, recall_taught=0.5, recall_tail=0.5, val_loss=1.0) for run in runs}
    monkeypatch.setattr(reproduce, "train", train)
    base = Config(data="people", **reproduce.PRESETS[preset].base)
    rows = reproduce.COMMANDS[command](base, reproduce.PRESETS[preset], reproduce.Settings(), tmp_path, None)
    assert len(rows) * (3 if command == "scaling" else 1) == len(made) and len(rows) >= 6
    for config in made.values():
        config.check()
    settings = [dataclasses.replace(config, ffn_hidden=0) for config in made.values()]
    assert all(
        config not in settings[:i] for i, config in enumerate(settings)
    )  # what is changed does change something
    if command == "scaling":
        assert [row["slots"] for row in rows] == [0, *(4**n for n in range(5, 11))][:len(rows)]
    off = {row["model"]: row["flops_per_token"] / reproduce.flops(base) for row in rows}
    off = {name: ratio for name, ratio in off.items() if abs(ratio - 1) > 0.02}
    assert set(off) <= {"1,048,576 slots", "layers 1,2", "layers 0,1,2", "keys of 128"} and all(
        1 < ratio < 1.5 for ratio in off.values()
    ), off


def test_a_sweep_goes_on_until_the_best_is_inside(monkeypatch):
    tried = []

    def train(runs, *_, diverged=None):
        tried.extend(run.config for run in runs)
        return {
            run.name: diverged
            if run.config.learning_rate > 0.02
            else {
                "val_loss": abs(run.config.learning_rate - best[run.name.split(",")[0]])
                + 1e-6 * run.config.moe_balance
            }
            for run in runs
        }

    monkeypatch.setattr(reproduce, "train", train)
    best = {"low": 1e-3, "high": 0.017, "middle": 8e-3, "mixture": 1e-3}
    base = Config(data="people", **TINY)
    models = {name: base.replace(ffn="moe" if name == "mixture" else "memory") for name in best}
    chosen = reproduce.choose_rates(models, (base.seed, 7), reproduce.PRESETS["laptop"], None, None)
    assert {name: config.learning_rate for name, config in chosen.items()} == {
        "low": 1e-3,
        "high": 0.016,
        "middle": 8e-3,
        "mixture": 1e-3,
    }
    assert {config.learning_rate for config in tried if config.seed == 7} == {
        1e-3,
        8e-3,
        0.016,
    }  # begun with the last tries of others
    assert not any(config.seed == 7 and config.ffn == "moe" for config in tried)  # settled by the last
    rates = {config.learning_rate for config in tried}
    assert {min(rates), max(rates)} == {5e-4, 0.032} and chosen["low"].mem_lr == pytest.approx(
        base.mem_lr / 8
    )
    balances = sorted(
        {config.moe_balance for config in tried if config.ffn == "moe" and config.learning_rate == 1e-3}
    )
    assert (
        balances == pytest.approx([base.moe_balance * factor for factor in (0.1, 1, 10)])
        and chosen["mixture"].moe_balance == balances[0]
    )


def test_a_run_that_comes_apart_counts_as_the_worst(tiny, tmp_path):
    console, preset = reproduce.Console(quiet=True), reproduce.PRESETS["laptop"]
    run = reproduce.Run("wild", Config(data="people", **TINY).replace(learning_rate=1e30, grad_clip=0.0))
    assert reproduce.train([run], preset, tmp_path, console, diverged={"val_loss": 9e9})["wild"] == {
        "val_loss": 9e9
    }
    with pytest.raises(UserError, match="wild failed: .*A lower learning_rate"):
        reproduce.train([run], preset, tmp_path, console)


def test_a_text_that_changed_is_trained_on_anew(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("All work and no play makes Jack a dull boy.\n" * 100)
    folder = reproduce.Run("a", Config(data=str(book))).folder(tmp_path)
    assert folder == reproduce.Run("a", Config(data=str(book))).folder(tmp_path)
    book.write_text("All work and no play makes Jill a dull girl.\n" * 100)
    reproduce.contents.cache_clear()  # as in another process
    assert folder != reproduce.Run("a", Config(data=str(book))).folder(tmp_path)


@pytest.mark.parametrize("arguments, message", [
    ([], "expected what to reproduce, one of table1, scaling, ablations, text, slots; got nothing"),
    (["tables"], "got tables"),
    (["table1", "--preset=phone"], "--preset must be one of laptop, gpu; got 'phone'"),
    (["table1", "--seeds=0"], "seeds must be 1 or more"),
])
def test_wrong_command_lines(arguments, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *arguments)


def test_slots_of_a_trained_model(monkeypatch, tmp_path):
    runs.train(tmp_path / "run", "--data=people", "--block_size=64", "--mem_layers=0,1", "--max_iters=3")
    run(monkeypatch, "slots", f"--run={tmp_path / 'run'}", f"--assets={tmp_path}")
    rows = json.loads((tmp_path / "slots.json").read_text())
    assert [row["layer"] for row in rows] == [0, 1]
    for row in rows:
        assert 0 < row["share used"] <= 1 and row["kl"] > 0
        for overlaps in row["overlaps"].values():
            assert set(overlaps) == {"a question", "another attribute", "another entity"}
            assert all(0 <= x <= 1 + 1e-5 for x in overlaps.values())
    assert (tmp_path / "slots.png").stat().st_size > 5000


def test_overlap_of_lookups():
    a = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    b = torch.tensor([[2, 9], [4, 3]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    assert reproduce.overlap(a, a) == pytest.approx(1)
    assert reproduce.overlap(a, b) == pytest.approx((0.25 + 0.5 + 0.1) / 2)
    alike = (
        torch.tensor([[1, 2], [1, 2]]),
        torch.tensor([[0.5, 0.5], [0.9, 0.1]]),
    )  # both heads read the same slots
    assert reproduce.overlap(alike, alike) == pytest.approx(1)
    assert reproduce.overlap(a, alike) == pytest.approx((0.75 + 0.25) / 2)


def test_slots_wants_facts_and_memory(monkeypatch, tmp_path):
    runs.train(tmp_path / "run", "--ffn=dense", "--max_iters=1")
    with pytest.raises(
        UserError, match="must be a run with facts and with memory layers, got data=world and ffn=dense"
    ):
        run(monkeypatch, "slots", f"--run={tmp_path / 'run'}", f"--assets={tmp_path}")
