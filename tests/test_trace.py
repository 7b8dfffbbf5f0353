import re
from collections import Counter

import numpy as np
import pytest
import runs
import torch
from rich.console import Console

from nanomem import facts, readers, tokenizer, trace
from nanomem.cli import shipped
from nanomem.config import GPTConfig
from nanomem.data import FactData
from nanomem.model import GPT
from nanomem.observe import lookups_of


@pytest.fixture(scope="module")
def data():
    return FactData(facts.people(40), tokenizer.load(shipped("people") / "tokenizer.tiktoken"), 64)


@pytest.fixture(scope="module")
def model(data):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=data.encoding.n_vocab, n_layer=2, n_embd=16, n_head=2, block_size=64,
                         mem_layers="0,1", mem_n_keys=8, mem_heads=2, mem_knn=2))


def shown(model, data, text, prompt_length, width=80):
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))
    trace.show(model, data, torch.tensor([data.encoding.encode_ordinary(text)]), console, prompt_length)
    return console.export_text()


def test_each_word_has_the_slots_that_the_layers_read(model, data):
    said = shown(model, data, "When was Anna Oakworth born: 6 August", None)
    first_table = said.partition("What else reads")[0]
    tokens = torch.tensor([data.encoding.encode_ordinary("When was Anna Oakworth born: 6 August")])
    slots, weights = [found.flatten(1) for found in lookups_of(model, tokens)[1]]
    for place, word in enumerate(("When", "was", "Anna")):
        heaviest = weights[place].argmax()
        (row,) = [line for line in first_table.splitlines() if line.startswith(f"│ {word} ")]
        assert f"{slots[place, heaviest]}:" in row.split("│")[3]
    shares = [float(cell) for cell in re.findall(r":(\d+)%", first_table)]
    assert len(shares) >= 8 * 2 and all(0 < share <= 100 for share in shares)


def test_by_default_the_end_of_the_question_and_the_answer_are_shown(model, data):
    prompt_length = len(data.encoding.encode_ordinary("When was Anna Oakworth born:"))
    said = shown(model, data, "When was Anna Oakworth born: 6 August", prompt_length)
    rows = [line for line in said.partition("What else")[0].splitlines() if "│ " in line]
    words = [row.split("│")[1].strip() for row in rows]
    assert words == [":", "6", "August"]


def test_readers_are_the_tokens_with_most_weight(model, data):
    total = Counter()  # (slot, text) -> weight
    for i in range(trace.N_BATCHES):
        x, _ = data.batch("train", 10**9 + i * readers.BATCH_SIZE, readers.BATCH_SIZE)
        slots, weights = [found.flatten(1) for found in lookups_of(model, x)[0]]
        for position in range(x.numel()):
            sequence, column = divmod(position, 64)
            text = data.encoding.decode(x[sequence, max(0, column - 3):column + 1].tolist())
            text = text.split("<|endoftext|>")[-1]
            for slot, weight in zip(slots[position].tolist(), weights[position].tolist()):
                total[slot, text] += weight
    reads = Counter()
    for slot, _ in total:
        reads[slot] += 1
    rare = min(reads, key=reads.get)
    found = trace.readers(model, data, {(0, rare), (1, 0)}, Console(quiet=True))[0, rare]
    expected = [text for (slot, text), _ in total.most_common() if slot == rare]
    assert found == expected[:trace.N_READERS] and found


@pytest.mark.parametrize("width", [80, 120])
def test_no_entry_is_split_over_two_lines(model, data, width):
    said = shown(model, data, "When was Anna Oakworth born: 6 August 2030", None, width)
    assert max(map(len, said.splitlines())) <= width
    first_table = said.partition("What else")[0]
    for line in first_table.splitlines():
        assert line.count(":") - line.count("│ : ") >= line.count("%")


def test_a_word_longer_than_a_block_is_shown(model):
    made = facts.FactSet(["?"], (facts.Attribute("fact", ("{}",)),), [[("x" * 60,)]], np.array([[0]]))
    data = FactData(made, tokenizer.byte_encoding(), 64)
    for prompt_length in (2, None):
        said = shown(model, data, "??" + "x" * 100, prompt_length)
        assert "xxxxxxxx" in said and "slot:weight" in said


def test_bytes_are_shown_as_words():
    encoding = tokenizer.byte_encoding()
    text = "What is it? the answer"
    tokens = [encoding.eot_token] + encoding.encode_ordinary(text)
    words = trace.split_words(encoding, tokens, prompt_length=12)
    assert [encoding.decode(tokens[a:b]) for a, b in words] == [
        "<|endoftext|>", "What", " is", " it?", " the", " answer"]


def test_a_trace_of_a_run(tmp_path):
    runs.train(tmp_path / "run", "--max_iters=5", "--mem_layers=0,1")
    arguments = ["sample.py", f"--out_dir={tmp_path / 'run'}", "--start=The country of Tokyo is",
                 "--max_new_tokens=2"]
    for flag, words in (("--trace", ["is"]), ("--trace=all", ["The", "country", "of", "is"])):
        out, _ = runs.run(*arguments, flag)
        assert "layer 0, slot:weight" in out and "layer 1, slot:weight" in out and "What else reads" in out
        for word in words:
            assert f"│ {word} " in out
        assert ("│ country " in out) == (flag == "--trace=all")
