import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import runs
import torch
from rich.console import Console

from nanomem import checkpoint, facts, run, tokenizer
from nanomem.cli import shipped
from nanomem.config import Config
from nanomem.data import FactData, TextData, open_data
from nanomem.facts import from_jsonl
from nanomem.model import GPT


def job_of(data, step):
    config = Config(vocab_size=data.encoding.n_vocab, n_layer=1, n_embd=16, n_head=2, ffn="dense",
                    ffn_hidden=16, block_size=64)
    torch.manual_seed(0)
    run_config = config.replace(batch_size=32, gradient_accumulation_steps=1)
    return SimpleNamespace(config=run_config, data=data, model=GPT(config), device=torch.device("cpu"),
                           mesh=None, step=step)


def reported(job, recalled):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    run.report_facts(job, recalled, console)
    return console.export_text()


def scores(facts_set, share):
    names = [attribute.name for attribute in facts_set.attributes]
    in_bits = {"bits_known": 1234.5, "bits": 5678.0, "answer_nll": 1.25}
    return dict.fromkeys([*names, "head", "torso", "tail", "all"], share) | in_bits


@pytest.fixture(scope="module")
def world():
    return FactData(facts.world(20), tokenizer.load(shipped("world") / "tokenizer.tiktoken"), 64)


def test_recall_is_shown_by_attribute_and_by_frequency_if_that_differs(world):
    recalled = {kind: scores(world.facts, 0.75) for kind in ("select", "report", "taught")}
    said = reported(job_of(world, 10**5), recalled)
    assert "never asked" in said and "taught wording" in said and "always the most frequent" in said
    assert "time zone" in said and "75.0%" in said and "truth" in said and "too short" not in said
    assert "It knows 1,234 of the 5,678 bits" in said and "costs 1.25 nats" in said
    assert "head" not in said  # all cities are mentioned equally often
    uneven = FactData(facts.world(20, zipf=1.0), world.encoding, 64)
    assert "│ head " in reported(job_of(uneven, 10**5), recalled)


def test_a_run_that_was_too_short_says_how_long_it_takes(world):
    job = job_of(world, 2)
    recalled = {kind: scores(world.facts, 0.0) for kind in ("select", "report", "taught")}
    said = reported(job, recalled)
    documents = 0
    for update in range(2):
        x, y = world.batch("train", update * 32, 32)
        documents += (y == world.sentences.end).sum().item()
    assert run.readings_per_update(job) == pytest.approx(documents / 2 / 100, rel=0.1)
    assert f"it read each fact about {documents / 100:.0f} times" in said and "┃" not in said
    expected = max(run.ENOUGH_READINGS / (documents / 2 / 100), 3 * job.config.warmup_iters)
    given = int(said.partition("--max_iters=")[2].split(".")[0])
    assert 0.9 * expected <= given < 1.1 * expected + 100
    assert "about 0 times" in reported(job_of(world, 0), recalled)
    half = {kind: scores(world.facts, 0.3) for kind in ("select", "report", "taught")}
    assert "too short" in reported(job, half) and "30.0%" in reported(job, half)


def test_the_default_run_reads_enough():
    config = Config()
    job = SimpleNamespace(config=config, data=open_data(config))
    assert config.max_iters * run.readings_per_update(job) == pytest.approx(run.ENOUGH_READINGS, rel=0.05)


def test_recall_of_own_facts_is_a_line(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "a?", "answer": "b"}\n{"prompt": "c?", "answer": "d"}\n')
    data = FactData(from_jsonl(path), tokenizer.byte_encoding(), 64)
    said = reported(job_of(data, 10**4), {"taught": scores(data.facts, 0.5)})
    assert "It completes 50.0% of the 2 prompts it was trained on, word for word." in said
    assert "always the most frequent" not in said and "a?" in said


def test_a_model_of_text_shows_its_writing():
    data = TextData.from_text("all work and no play " * 100, tokenizer.byte_encoding(), 64)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    run.report_text(job_of(data, 0), console)
    said = console.export_text()
    x, _ = data.batch("val", 0, 1)
    assert data.encoding.decode(x[0, :32].tolist()) in said and len(said) > 150


def test_the_last_line_of_a_run_has_no_time_left_and_text_has_bits_per_byte():
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    display = run.Display(20, 0, console)
    record = {"iter": 10, "train_loss": 1.0, "val_loss": 1.0, "bits_per_byte": 1.25, "tokens_per_sec": 5.0,
              "data_wait": 0.0, "elapsed_s": 7.0}
    display.line(record)
    display.line(record | {"iter": 20})
    first, last = console.export_text().splitlines()
    assert "1.250 bits per byte" in first and "0:07 left" in first and "left" not in last


def test_other_wordings_of_a_fact_are_no_facts_of_their_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "answer": "b", "also": ["never taught", "taught"]}\n')
    assert run.how_many(facts.from_jsonl(path)) == "1 fact"
    assert run.how_many(facts.people(4)) == "4 entities x 5 attributes = 20 facts"


@pytest.mark.parametrize("number, rounded", [(7.2, 8), (12, 12), (101, 110), (2511, 2600), (99_001, 100_000)])
def test_suggested_numbers_of_updates_are_round_but_not_too_few(number, rounded):
    assert run.round_up(number) == rounded


def test_a_resumed_run_evaluates_as_often_as_before_unless_it_is_to_stop_early(tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "The capital of Atlantis is", "answer": "Poseidonis"}\n')
    given = {"data": str(mine), "eval_interval": 500}
    before = run.settings(given, tmp_path, None, None)
    header = {"config": dataclasses.asdict(before), "iteration": 1}
    assert run.settings({"resume": True}, tmp_path, header, None).eval_interval == 500
    assert run.settings({"resume": True, "stop_at": 0.5}, tmp_path, header, None).eval_interval == 100
    assert run.settings({"data": str(mine)}, tmp_path, None, None).eval_interval == 100


def test_a_run_that_ended_before_its_first_line_leaves_no_tokenizer_to_the_next(tmp_path):
    arguments = ["--n_entities=10", "--max_iters=1", "--log_interval=1"]
    runs.train(tmp_path, *arguments)
    expected = (tmp_path / "tokenizer.tiktoken").read_bytes()
    for folder in checkpoint.folders(tmp_path):
        shutil.rmtree(folder)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "tokenizer.tiktoken").write_bytes(b"QQ== 0\n")
    assert "moved" not in runs.train(tmp_path, *arguments)[0]
    assert (tmp_path / "tokenizer.tiktoken").read_bytes() == expected
