import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import runs
import torch
from rich.console import Console

from nanomem.cli import UserError
from nanomem.config import GPTConfig
from nanomem.model import GPT
from nanomem.reproduce import figures, forgetting
from nanomem.reproduce.forgetting import METHODS, kept_at, lesson, new_people, rounds, share_lost
from nanomem.reproduce.lessons import best_try
from nanomem.reproduce.lora import LoRALinear, add_lora


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny model of eight people."""
    out_dir = tmp_path_factory.mktemp("base") / "people-memory"
    runs.train(out_dir, "--data=people", "--n_entities=8", "--block_size=64", "--max_iters=3")
    return str(out_dir)


@pytest.fixture
def short(monkeypatch):
    """Lessons of three updates about four people, and two rounds."""
    for name, value in dict(EVALUATED_AT=(1, 3), N_PEOPLE=4, BATCH_SIZE=4, ROUNDS=2, ROUND_UPDATES=2).items():
        monkeypatch.setattr(forgetting, name, value)


def curve(*points):
    return [{"updates": i, "new": new, "kept": kept} for i, (new, kept) in enumerate(points)]


def test_kept_is_read_off_where_enough_is_first_known():
    assert kept_at(curve((0.4, 1.0), (0.8, 0.9), (1.0, 0.7), (0.95, 0.2))) == pytest.approx(0.8)
    assert kept_at(curve((0.9, 0.5))) == 0.5 and kept_at(curve((0.5, 1.0), (0.89, 0.9))) is None


def test_the_best_try_keeps_most_where_it_reaches_enough_or_else_learns_most():
    reaching = {1: curve((0.95, 0.5)), 2: curve((0.5, 1.0), (0.9, 0.8)), 3: curve((0.8, 1.0))}
    assert best_try(reaching, "new", share_lost) == 2
    short = {1: curve((0.5, 0.1)), 2: curve((0.3, 0.9), (0.4, 0.8))}
    assert best_try(short, "new", share_lost) == 1


def test_lora_starts_unchanged_and_changes_only_its_matrices():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, n_layer=2, n_embd=16, n_head=2, block_size=8, mem_layers="1",
                          mem_n_keys=8, mem_knn=2))
    x = torch.randint(11, (2, 8))
    before = model.eval()(x)[0]
    add_lora(model, rank=2)
    assert torch.equal(model(x)[0], before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith((".A", ".B")) for name in trained)
    linear = model.blocks[0].attention.qkv_proj
    assert isinstance(linear, LoRALinear) and linear.A.shape == (2, 16) and linear.B.shape == (48, 2)
    assert isinstance(model.blocks[1].ffn.query_proj, LoRALinear)
    torch.nn.init.normal_(linear.B)
    x = torch.randn(3, 16)
    merged = linear.linear.weight + 2 * linear.B @ linear.A
    torch.testing.assert_close(linear(x), x @ merged.T)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.model == "memory"])
def test_a_lesson_changes_what_its_method_trains(name, base, short, monkeypatch):
    method = dataclasses.replace(METHODS[name], top_slots=min(3, METHODS[name].top_slots))
    students = []
    init = forgetting.Student.__init__

    def remember(self, *arguments):
        init(self, *arguments)
        students.append((self, {n: p.detach().clone() for n, p in self.model.named_parameters()}))

    monkeypatch.setattr(forgetting.Student, "__init__", remember)
    found = lesson(base, method, 1e-2, people_seed=1)
    assert [point["updates"] for point in found["curve"]] == [1, 3]
    (student, before), = students
    changed = {n for n, p in student.model.named_parameters() if not torch.equal(p, before[n])}
    in_table = {n for n in before if n.endswith("table.values")}
    assert (changed >= in_table) == (method.train in ("all", "values"))
    assert (changed <= in_table) == (method.train == "values")
    if method.train == "lora":
        assert changed and all(n.endswith((".A", ".B")) for n in changed)


def test_rounds_teach_other_people_each_time(base, short):
    found = rounds(base, METHODS["values"], 1e-2, people_seed=1)
    assert len(found["first"]) == len(found["at_end"]) == 2 and len(found["old"]) == 3
    student = forgetting.Student(base, METHODS["values"], 1e-2)
    encoding = student.data.encoding
    sets = [new_people(student.config, encoding, seed, tuple(range(1, seed))) for seed in (1, 2, 3)]
    names = [set(data.facts.entities) for data in [student.data, *sets]]
    assert sum(map(len, names)) == len(set().union(*names)) == 20


def test_finished_lessons_are_not_taught_again(base, short, tmp_path, monkeypatch):
    task = {"kind": "lesson", "name": "values", "rate": 1e-2, "seed": 1, "folder": base, "model": "x"}
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    first = forgetting.run_saved(task, tmp_path)
    monkeypatch.setattr(forgetting, "lesson", None)
    assert str(forgetting.run_saved(task, tmp_path)) == str(first)  # nan: too few people to ask about
    other = dict(task, rate=2e-2)
    assert forgetting.task_path(other, tmp_path) != forgetting.task_path(task, tmp_path)


def test_rows_become_a_table_and_a_figure(tmp_path, monkeypatch):
    def run_all(tasks, results, workers, console):
        found = []
        for task in tasks:
            points = curve((0.5, 1.0), (1.0, 0.5 + task["rate"] / 10))
            result = dict(task, commit="abc", known_before=0.9, curve=points)
            if task["kind"] == "rounds":
                result |= {"first": [0.9, 0.8], "old": [0.9, 0.8, 0.7], "at_end": [0.8, 0.9]}
            found.append(result)
        return found

    monkeypatch.setattr(forgetting, "run_all", run_all)
    models = {"memory": [("a", "1"), ("b", "2")], "dense": [("c", "3"), ("d", "4")]}
    rows, results = forgetting.forgetting(models, [1, 2], tmp_path, 1, Console(quiet=True))
    tries = sum(len(method.rates) for method in METHODS.values())
    assert len(results) == tries + 2 * len(METHODS) + 2 * len(forgetting.IN_ROUNDS)
    assert [row["model"] for row in rows] == list(METHODS)
    assert [row["rate"] for row in rows] == [max(method.rates) for method in METHODS.values()]
    assert np.allclose(rows[1]["kept"], 1 - 0.8 * (0.5 - rows[1]["rate"] / 10))
    assert "| everything |" in figures.forgetting_table(rows)
    figures.draw("forgetting", rows, tmp_path / "forgetting.png")
    assert (tmp_path / "forgetting.png").stat().st_size > 10_000


def test_a_task_that_fails_stops_the_rest(tmp_path, monkeypatch):
    begun = []

    def run_saved(task, results):
        begun.append(task)
        time.sleep(0.02)
        if task == 0:
            raise UserError("no such model")

    monkeypatch.setattr(forgetting, "run_saved", run_saved)
    monkeypatch.setattr(forgetting, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n))
    with pytest.raises(UserError, match="no such model"):
        forgetting.run_all(range(100), tmp_path, 1, Console(quiet=True))
    assert len(begun) < 50
