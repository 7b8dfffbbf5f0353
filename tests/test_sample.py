import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import runs
import tiktoken
import torch

from nanomem import tokenizer
from nanomem.config import GPTConfig
from nanomem.model import GPT


def load_sample():
    """sample.py as a module; it reads the command line when it is loaded."""
    spec = importlib.util.spec_from_file_location("sample", runs.ROOT / "sample.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sample"] = module  # dataclasses look it up
    with mock.patch.object(sys, "argv", ["sample.py"]):
        spec.loader.exec_module(module)
    return module


sample = load_sample()


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    runs.train(folder, "--max_iters=10", "--mem_layers=0,1")
    return folder


def test_it_goes_on_from_the_start_the_same_each_time(out_dir):
    first, again = (
        runs.run(
            "sample.py", f"--out_dir={out_dir}", "--start=In which country is Tokyo?", "--max_new_tokens=8"
        )[0]
        for _ in range(2)
    )
    assert "In which country is Tokyo?" in first and first == again


def test_samples_differ_and_the_seed_decides_them(out_dir):
    def said(seed):
        return runs.run(
            "sample.py",
            f"--out_dir={out_dir}",
            "--start=The city",
            "--temperature=2",
            "--num_samples=2",
            f"--seed={seed}",
        )[0]

    one = said(1)
    assert one == said(1) != said(2)
    two = [line for line in one.split("The city")[1:]]
    assert len(two) == 2 and two[0] != two[1]


def test_each_line_of_the_input_is_answered(out_dir):
    asked = "The city of Lagos is in\nIn which country is Tokyo?\n"
    said = runs.run("sample.py", f"--out_dir={out_dir}", "--max_new_tokens=4", input=asked)[0]
    assert [
        line[: len(prompt)] for line, prompt in zip(said.splitlines()[1:], asked.splitlines())
    ] == asked.splitlines()


def test_one_sample_is_streamed_as_it_would_be_beside_others(out_dir):
    arguments = [
        "sample.py",
        f"--out_dir={out_dir}",
        "--start=The city",
        "--temperature=0",
        "--max_new_tokens=9",
    ]
    one, three = runs.run(*arguments)[0], runs.run(*arguments, "--num_samples=3")[0]
    answer = one.splitlines()[-1]
    assert [line for line in three.splitlines()[1:] if line] == [answer] * 3
    note = runs.run(*arguments)[1]
    assert re.fullmatch(r"confidence \d+%\n|cut off after max_new_tokens=9\n", note)


def test_a_model_is_not_exported_into_its_run(out_dir):
    before = (out_dir / "config.json").read_bytes()
    assert (
        f"{out_dir} already has a config.json; name another folder"
        in runs.run("sample.py", f"--out_dir={out_dir}", f"--export={out_dir}", code=2)[1]
    )
    assert (out_dir / "config.json").read_bytes() == before


def test_an_exported_model_answers_alike(out_dir, tmp_path):
    runs.run("sample.py", f"--out_dir={out_dir}", f"--export={tmp_path / 'model'}")
    said = [
        runs.run("sample.py", f"--out_dir={folder}", "--start=The city", "--max_new_tokens=9")[
            0
        ].splitlines()[1:]
        for folder in (out_dir, tmp_path / "model")
    ]
    assert said[0] == said[1]


def test_confidence_is_the_probability_of_answer_and_end(out_dir):
    trained = sample.open_run(sample.SampleConfig(out_dir=str(out_dir)))
    tokens, end = torch.tensor([[256, 3, 5, 8, 2]]), 256
    found = sample.confidence(trained.model, tokens, 3, end)
    expected = 1.0
    for length, token in ((3, 8), (4, 2), (5, end)):
        logits, _ = trained.model(tokens[:, :length])
        expected *= logits[0, -1].softmax(-1)[token].item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_dialogue_shows_what_can_be_asked_and_ends_with_exit(out_dir):
    said = in_terminal("sample.py", f"--out_dir={out_dir}", "--max_new_tokens=3", typed=[
        "In which country is Tokyo:", "exit"])
    for question in ("In which country is", "What time zone is", "How many people live in",
                     "What is the latitude of", "What is the longitude of"):
        assert f"  {question} " in said
    assert "It also knows" in said and "10 more" in said
    assert "confidence" in said or "cut off after max_new_tokens=3" in said
    assert 'The questions it was taught end in "?": In which country is' in said
    assert said.count("In which country is Tokyo:") == 1  # typed, and not echoed before the answer


def in_terminal(script, *arguments, typed, columns=80):
    """What a program prints on a terminal on which these lines are typed."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(runs.ROOT / script), *arguments], stdin=slave, stdout=slave, stderr=slave,
        env=environment)
    os.close(slave)
    os.write(master, "".join(line + "\n" for line in typed).encode())
    said = b""
    alarm = threading.Timer(60, process.kill)
    alarm.start()
    with contextlib.suppress(OSError):  # how Linux says that the other side has ended
        while chunk := os.read(master, 4096):
            said += chunk
    assert process.wait() == 0
    alarm.cancel()
    os.close(master)
    return said.decode()


@pytest.mark.parametrize("arguments, message", [
    (["--out_dir=nowhere"], "no checkpoint in nowhere"),
    (["--strt=x"], "did you mean start?"),
    (["--num_samples=0"], "num_samples"),
    (["--top_p=0"], "top_p must be above 0 and at most 1"),
])
def test_mistakes_get_one_line(arguments, message):
    _, err = runs.run("sample.py", *arguments, code=2)
    assert err.startswith("sample.py: ") and message in err and err.count("\n") == 1


def test_a_memory_for_a_pretrained_model_is_named_as_such(tmp_path):
    (tmp_path / "memory.json").write_text("{}")
    _, err = runs.run("sample.py", f"--out_dir={tmp_path}", code=2)
    assert f"python -m nanomem.retrofit --model=NAME --memory={tmp_path} asks it" in err


def test_the_latest_run_is_the_default_and_none_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, err = runs.run("sample.py", code=2)
    assert "no run in out/" in err
    runs.run("train.py", *runs.TINY, "--max_iters=2", "--ffn=dense")
    out, _ = runs.run("sample.py", "--start=The", "--max_new_tokens=3")
    assert "out/world-dense" in out
    _, err = runs.run("sample.py", "--start=The", "--trace", code=2)
    assert "this model has none (ffn=dense)" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_answer_that_is_lost_is_a_mistake_and_a_reader_that_leaves_is_none(out_dir):
    arguments = [f"--out_dir={out_dir}", "--max_new_tokens=3"]
    with open("/dev/full", "w") as full:
        lost = runs.start("sample.py", *arguments, "--start=a", stdout=full)
    endless = runs.start("sample.py", *arguments, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with pytest.raises(BrokenPipeError):  # answers come line by line, and end with their reader
        for number in range(10**6):
            endless.stdin.write("a\n")
            endless.stdin.flush()
            if number == 0:
                assert endless.stdout.readline()
                endless.stdout.close()
    assert endless.wait(timeout=60) == 0
    err = lost.communicate(timeout=60)[1]
    assert (
        lost.returncode == 2 and "sample.py: the output could not be written (No space left on device)" in err
    )


def test_only_line_ends_end_a_line_of_the_input(out_dir):
    asked = ["The city\u2028of Lagos", "a\x0bb\x0cc\x1cd\x85e", "", "The city"]
    said = runs.run(
        "sample.py", f"--out_dir={out_dir}", "--max_new_tokens=1", input="\r\n".join(asked) + "\n"
    )
    assert len(said[1].splitlines()) == 4 and asked[0] in said[0]


def test_a_number_without_a_token_is_never_drawn(tmp_path, monkeypatch):
    """As in cl100k_base, whose download the tests do without."""
    ranks = {bytes([b]): b for b in range(256)}
    gaps = tiktoken.Encoding("cl100k_base", pat_str=tokenizer.PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 700})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: gaps)
    (tmp_path / "book.txt").write_text("some words " * 300)
    runs.train(
        tmp_path / "run", f"--data={tmp_path / 'book.txt'}", "--tokenizer=cl100k_base", "--max_iters=1"
    )
    for arguments in (
        ["--temperature=5", "--top_k=0"],
        ["--temperature=5", "--num_samples=3"],
        ["--temperature=0"],
    ):
        arguments += [f"--out_dir={tmp_path / 'run'}", "--start=some", "--max_new_tokens=60"]
        assert " tokens, " in runs.run("sample.py", *arguments)[1]


@pytest.mark.parametrize("temperature", [0, 1])
def test_generate_takes_none_of_the_tokens_it_must_never_choose(temperature):
    model = GPT(
        GPTConfig(vocab_size=8, n_layer=1, n_embd=8, n_head=2, ffn="dense", mem_layers="0", block_size=16)
    )
    start = torch.zeros(4, 1, dtype=torch.int64)
    tokens = torch.cat(list(model.generate(start, 40, temperature, never=[0, 1, 2, 3, 4, 7])), dim=1)
    assert set(tokens.flatten().tolist()) <= {5, 6}
