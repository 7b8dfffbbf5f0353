import collections

import numpy as np
import pytest
import torch

from nanomem import datasets, facts, tokenizer
from nanomem.cli import shipped
from nanomem.config import Config
from nanomem.data import DROPOUT, FactData, TextData, ahead, first_of_each, open_data, random_stream
from nanomem.datasets import DATASETS, DataSet, help_text

SHIPPED = shipped("world") / "tokenizer.tiktoken"


@pytest.fixture(scope="module")
def data():
    return FactData(facts.world(200, zipf=0.6), tokenizer.load(SHIPPED), 128, seed=3)


def documents(data, tokens):
    """The whole documents of a block, as text."""
    return data.encoding.decode(tokens.tolist()).split("<|endoftext|>")[1:-1]


def sentences_with(fact_set, kind):
    """{sentence with its answer: (entity, attribute)} for kind "statements" or "questions"."""
    found = {}
    for e, name in enumerate(fact_set.entities):
        for a, attribute in enumerate(fact_set.attributes):
            for wording in getattr(attribute, kind):
                found[f"{wording.replace('{}', name)} {fact_set.answers(e, a)[0]}"] = e, a
    return found


def test_targets_are_the_inputs_one_later(data):
    x, y = data.batch("train", 5, 4)
    assert x.shape == y.shape == (4, 128) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])


@pytest.mark.parametrize("kind", ["facts", "text"])
def test_the_stream_of_sequences_does_not_depend_on_how_it_is_cut_into_batches(kind, data):
    if kind == "text":
        tokens = np.arange(2000)
        splits = {"train": [tokens[:1800]], "val": [tokens[1800:]]}
        data = TextData(splits, 100, tokenizer.byte_encoding(), 20, seed=0)
    whole = data.batch("train", 5, 12)
    parts = [data.batch("train", 5 + start, 4) for start in (0, 4, 8)]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


def draws(generator):
    return tuple(generator.integers(2**32, size=4).tolist())


def test_no_two_streams_of_a_seed_are_the_same_and_none_is_that_of_the_people():
    for seed in (0, 1, 1337, 2**32 + 1, 2**63 - 1):
        streams = {draws(random_stream(seed, DROPOUT, 3, 1)), draws(np.random.default_rng(seed))}
        for purpose in range(3):
            streams |= {draws(random_stream(seed, purpose, number)) for number in (0, 1, 2, 2**32, 10**9)}
        assert len(streams) == 3 * 5 + 1 + 1
        assert draws(np.random.default_rng([seed, 0, 0])) in streams  # a list's trailing zeros don't count


def test_a_batch_depends_on_seed_split_and_place_alone(data):
    same = FactData(data.facts, data.encoding, 128, seed=3)
    other = FactData(data.facts, data.encoding, 128, seed=4)
    x = data.batch("train", 7, 4)[0]
    assert torch.equal(x, same.batch("train", 7, 4)[0])
    for different in (data.batch("train", 8, 4), data.batch("val", 7, 4), other.batch("train", 7, 4)):
        assert not torch.equal(x, different[0])


def test_no_block_names_an_entity_twice_and_no_question_is_asked_that_should_not_be(data):
    questions = sentences_with(data.facts, "questions")
    pairs = questions | sentences_with(data.facts, "statements")
    asked = 0
    for split in ("train", "val"):
        for step in range(20):
            for sequence in data.batch(split, step * 8, 8)[0]:
                found = documents(data, sequence)
                entities = [pairs[text][0] for text in found]
                assert len(entities) == len(set(entities))
                roles = [data.facts.role[questions[text]] for text in found if text in questions]
                asked += len(roles)
                assert all((role == facts.ASKED) == (split == "train") for role in roles)
                assert split == "train" or len(roles) == len(found)
    assert asked > 1000


def test_entities_are_mentioned_as_often_as_their_frequency_says(data):
    counts = collections.Counter()
    for step in range(150):
        for sequence in data.batch("train", step * 8, 8)[0]:
            counts.update(documents(data, sequence))
    total = sum(counts.values())
    top = data.facts.entities[:20]
    share = sum(n for text, n in counts.items() if any(f" {name}" in text for name in top)) / total
    assert share == pytest.approx(data.facts.frequency[:20].sum(), abs=0.05)


@pytest.mark.parametrize("name", DATASETS)
def test_a_registered_set_follows_n_entities_zipf_and_seed_and_is_in_the_help(name):
    config = Config(data=name, n_entities=9, zipf=0.5)
    made = DATASETS[name].make(config)
    assert len(made.entities) == 9 and made.frequency[3] == made.frequency[0] / 2
    assert made.entities == open_data(config).facts.entities == DATASETS[name].make(config).entities
    assert f"{name} ({DATASETS[name].help})" in help_text()


def test_a_new_set_takes_one_entry(monkeypatch):
    attribute, codes = facts.Attribute("next", ("{} then",)), np.zeros((2, 1), int)
    made = facts.FactSet(["a", "b"], (attribute,), [[("c",)]], codes)
    monkeypatch.setitem(DATASETS, "letters", DataSet("letters", lambda config: made))
    data = open_data(Config(data="letters"))
    assert data.facts is made and data.encoding.n_vocab == 257  # one token per byte: it ships no tokenizer
    assert datasets.teaches_facts("letters")
    with pytest.raises(FileNotFoundError, match="letters, .*did you mean letters"):
        open_data(Config(data="leters"))


def test_people_are_told_in_biographies_and_asked_about():
    data = open_data(Config(data="people", n_entities=60, block_size=64))
    questions = sentences_with(data.facts, "questions")
    biographies, asked, orders = 0, 0, set()
    for step in range(20):
        for sequence in data.batch("train", step * 8, 8)[0]:
            for text in documents(data, sequence):
                if text in questions:
                    asked += 1
                    assert data.facts.role[questions[text]] == facts.ASKED
                    continue
                biographies += 1
                e = next(e for e, name in enumerate(data.facts.entities) if text.startswith(name + " "))
                places = []
                for a, attribute in enumerate(data.facts.attributes):
                    statement = attribute.statements[0].replace("{}", "")
                    places.append(text.index(f"{statement} {data.facts.answers(e, a)[0]}"))
                orders.add(tuple(sorted(range(5), key=lambda a: places[a])))
    assert 0.2 < asked / (asked + biographies) < 0.4 and len(orders) > 60


def test_the_first_allowed_one_of_equal_numbers_is_found():
    rng = np.random.default_rng(0)
    numbers, allowed = rng.integers(6, size=(200, 12)), rng.random((200, 12)) < 0.7
    expected = np.zeros_like(allowed)
    for row in range(200):
        seen = set()
        for column in range(12):
            if allowed[row, column] and numbers[row, column] not in seen:
                seen.add(numbers[row, column])
                expected[row, column] = True
    assert (first_of_each(numbers, allowed) == expected).all() and 200 < expected.sum() < allowed.sum()


def test_biographies_may_have_one_attribute():
    attribute = facts.Attribute("home", ("{} lives in:",), ("Home of {}:",))
    made = facts.FactSet(["Ann", "Bob", "Cat", "Dan"], (attribute,), [[("Rome",), ("Oslo",)]],
                         np.array([[0], [1], [1], [0]]), biographies=True)
    data = FactData(made, tokenizer.byte_encoding(), 64)
    told = set()
    for sequence in data.batch("train", 0, 60)[0]:
        told.update(documents(data, sequence))
    told.discard("")  # between the ends that fill up a block
    homes = ("Rome", "Oslo", "Oslo", "Rome")
    allowed = {f"{name} lives in: {home}" for name, home in zip(made.entities, homes)}
    asked = {text for text in told if text.startswith("Home of ")}
    assert told - asked == allowed and len(asked) == 2 and all(": " in text for text in asked)


def test_few_facts_are_padded_and_not_repeated(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n')
    data = open_data(Config(data=str(path), block_size=32))
    x, y = data.batch("train", 0, 3)
    for inputs, targets in zip(x, y):
        assert sorted(documents(data, inputs[:9])) == ["a b", "c d"]
        assert (targets[8:] == -1).all() and (targets[:8] >= 0).all()


def test_an_epoch_of_text_reads_each_block_once():
    tokens = np.arange(1000)
    splits = {"train": [tokens[:7], tokens[7:640], tokens[640:900]], "val": [tokens[900:]]}
    data = TextData(splits, 100, tokenizer.byte_encoding(), 20, seed=0)
    assert data.blocks == {"train": 44, "val": 4} and data.bytes_per_token == 1
    starts = {}
    for epoch in range(2):
        sequences = data.batch("train", epoch * 44, 44)[0]
        for sequence in sequences:
            assert torch.equal(sequence, torch.arange(sequence[0], sequence[0] + 20))  # across shards too
        starts[epoch] = sequences[:, 0].tolist()
        shift = min(starts[epoch])
        assert sorted(starts[epoch]) == list(range(shift, shift + 44 * 20, 20)) and shift < 20
    assert starts[0] != starts[1] and starts[0] != sorted(starts[0])
    x, y = data.batch("val", 0, 4)
    assert torch.equal(x[:, 1:], y[:, :-1]) and x.min() >= 900


def test_a_text_keeps_its_last_tenth():
    text = "".join(chr(97 + i % 26) for i in range(990)) + "é" * 5
    data = TextData.from_text(text, tokenizer.byte_encoding(), 20)
    assert [len(data.tokens[split][0]) for split in ("train", "val")] == [900, 100]
    assert data.bytes_per_token == 1
    assert bytes(data.batch("val", 0, 1)[0][0].tolist()) in text.encode()[900:]


def test_ahead_gives_the_same_batches(data):
    def make(number):
        return data.batch("train", number, 2)

    for number, (x, y) in zip((3, 9, 4), ahead(make, (3, 9, 4))):
        assert torch.equal(x, make(number)[0]) and torch.equal(y, make(number)[1])


def config_for(path, **changes):
    return Config(data=str(path), **changes)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"short", "train split has 5 tokens, too few for block_size=64"),
        (b"a\nb\xff\n", "line 2: byte 2 is not UTF-8"),
    ],
)
def test_text_that_will_not_do_is_named(tmp_path, content, message):
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_data(config_for(path))


def test_a_fact_longer_than_a_block_is_named(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt": "%s", "answer": "b"}\n' % ("x" * 40))
    with pytest.raises(ValueError, match="block_size"):
        open_data(config_for(path, block_size=32))


def test_data_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="wrold"):
        open_data(Config(data="wrold"))


def test_an_unknown_tokenizer_is_named(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("words " * 1000)
    with pytest.raises(ValueError, match="tokenizer must be"):
        open_data(config_for(path, tokenizer="gtp2"))


def test_a_bpe_trained_on_the_data(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on the mat, the dog sat on the log\n" * 200)
    data = open_data(config_for(path, tokenizer="bpe", vocab_size=270, block_size=16))
    assert data.encoding.n_vocab == 270 and data.bytes_per_token > 1.5


FACT, DOCUMENT = '{"prompt": "a", "answer": "b"}', '{"text": "some words"}'


@pytest.mark.parametrize(
    "name, content, remedy",
    [
        (
            "facts.json",
            f"{FACT}\n" * 100,
            "facts.json looks like JSON; save it as {}/facts.jsonl, one object a line, to teach",
        ),
        ("facts.ndjson", f"\ufeff\n{FACT}\n" * 100, "save it as {}/facts.jsonl"),
        ("facts.v2.txt", f"\r\n {FACT}\r\n" * 100, "save it as {}/facts.v2.jsonl"),
        ("facts", f"{FACT}\n" * 100, "save it as {}/facts.jsonl"),
        ("array.json", f"[\n  {FACT},\n  {FACT}\n]\n", "save it as {}/array.jsonl"),
        ("pretty.json", FACT.replace(" ", "\n  "), "save it as {}/pretty.jsonl"),
        ("text.json", f"{DOCUMENT}\n" * 100, "python data/prepare.py {}/text.jsonl --out=data/mine"),
        (
            "strings.json",
            '["a b", "c d"]\n',
            "looks like JSON; expected text, or {}/strings.jsonl with one object a line",
        ),
        (
            "other.txt",
            '{"question": "a"}\n' * 100,
            'one object a line: {{"prompt": ..., "answer": ...}} for train.py',
        ),
        (
            "text.jsonl",
            f"{DOCUMENT}\n",
            '"prompt" is missing; for documents: python data/prepare.py {}/text.jsonl',
        ),
    ],
)
def test_json_by_another_name_is_not_trained_on_as_text(tmp_path, name, content, remedy):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    with pytest.raises(ValueError) as error:
        open_data(config_for(tmp_path / name))
    assert remedy.format(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "{ int a; }\n",
        "[1] a note\n",
        '{"a": 1} is JSON\n',
        "[" * 2000,
        '"quoted"\n',
        "[1]\n[2]\n",
        "{{ jinja }}\n",
    ],
)
def test_text_that_only_begins_like_json_is_text(tmp_path, text):
    (tmp_path / "book.txt").write_text(text * 400)
    assert open_data(config_for(tmp_path / "book.txt")).facts is None


def test_jsonl_is_facts_in_any_letter_case(tmp_path):
    (tmp_path / "F.JSONL").write_text(FACT)
    assert open_data(config_for(tmp_path / "F.JSONL")).facts.entities == ["a"]


@pytest.mark.parametrize("name", ["book.txt.zst", "book.BZ2", "notes.zip", "notes.tar.gz"])
def test_other_compression_than_gzip_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")
    message = f"{name}: nanomem reads no compressed files but .gz; unpack it first"
    with pytest.raises(ValueError, match=message):
        open_data(config_for(tmp_path / name))


def test_a_gzip_of_any_kind_is_sent_to_prepare(tmp_path):
    for name in ("a.txt.gz", "b.JSONL.GZ", "c.PARQUET"):
        with pytest.raises(ValueError, match=f"must be prepared first: python data/prepare.py .*{name}"):
            open_data(config_for(tmp_path / name))


def test_a_text_keeps_its_line_ends_and_separators(tmp_path):
    text = "a\r\nb\rc\x0bd\x1ce\x85f\u2028g\n" * 100
    (tmp_path / "book.txt").write_bytes(text.encode())
    data = open_data(config_for(tmp_path / "book.txt"))
    assert bytes(np.concatenate([data.tokens["train"][0], data.tokens["val"][0]]).tolist()).decode() == text


def test_a_text_of_millions_of_newlines_is_read(tmp_path):
    (tmp_path / "lines.txt").write_text("\n" * 2_500_000 + "x")
    assert open_data(config_for(tmp_path / "lines.txt")).ends["val"][-1] == 250_000
