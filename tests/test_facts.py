import hashlib
import json

import numpy as np
import pytest

from nanomem import datasets, facts


@pytest.fixture(scope="module")
def world():
    return facts.world(300, zipf=0.6)


def test_the_world_is_the_real_one(world):
    def known(city):
        e = world.entities.index(city)
        return [world.answers(e, a)[0] for a in range(5)]

    assert known("Paris") == ["France", "Europe/Paris", "2.1 million", "49°N", "2°E"]
    assert known("Lagos") == ["Nigeria", "Africa/Lagos", "15 million", "6°N", "3°E"]
    assert known("Sydney")[3:] == ["34°S", "151°E"]
    assert len(set(facts.world(20_000).entities)) == 20_000


@pytest.mark.parametrize("n", [3, 10**6])
def test_a_number_of_cities_that_is_not_there(n):
    with pytest.raises(ValueError, match="from 4 to"):
        facts.world(n)


def test_half_of_the_pairs_are_asked_and_a_quarter_each_is_for_choosing_and_reported(world):
    for roles in world.role.T:
        assert np.bincount(roles).tolist() == [150, 75, 75]  # ASKED, SELECT, REPORT
    assert (facts.world(300).role == world.role).all()


def test_facts_without_questions_are_all_asked_and_change_no_other_attributes_split():
    asked, unasked = facts.Attribute("a", ("{} is",), ("What is {}?",)), facts.Attribute("b", ("{} has",))
    names, codes = list("abcdefgh"), np.zeros((8, 2), int)
    mixed = facts.FactSet(names, (unasked, asked), [[("x",)]] * 2, codes)
    both = facts.FactSet(names, (asked, asked), [[("x",)]] * 2, codes)
    assert (mixed.role[:, 0] == facts.ASKED).all() and (mixed.role[:, 1] == both.role[:, 1]).all()


def test_bands_hold_a_third_of_all_mentions_each(world):
    bands = world.bands()
    assert sum(map(len, bands.values())) == 300
    for entities in bands.values():
        assert world.frequency[entities].sum() == pytest.approx(1 / 3, abs=0.03)
    assert bands["head"].max() < bands["torso"].min() < bands["tail"].min()


def test_most_frequent_answer_baseline():
    values = [[("a",), ("b",)]]
    codes = np.array([[0], [1], [1], [1]])
    made = facts.FactSet(["w", "x", "y", "z"], (facts.Attribute("letter", ("{} is",)),), values, codes)
    assert made.most_frequent_scores().tolist() == [0.75]


def test_people_are_distinct_reproducible_and_of_known_bits():
    made, again, other = facts.people(500, seed=1), facts.people(500, seed=1), facts.people(500, seed=2)
    assert made.entities == again.entities and (made.codes == again.codes).all()
    assert made.entities != other.entities
    assert len(set(made.entities)) == 500
    choices = [12 * 28 * 200, 200, 300, 100, 256]
    assert made.bits_per_entity() == pytest.approx(sum(np.log2(choices)))
    assert all(column.max() < n for column, n in zip(made.codes.T, choices))
    assert len(facts.people(32_768).entities[0].split()) == 2
    assert len(facts.people(32_769).entities[0].split()) == 3  # more people than first names and surnames


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_jsonl_facts(tmp_path):
    made = facts.from_jsonl(write(tmp_path / "f.jsonl", '\ufeff{"prompt": "Sky?", "answer": " blue"}', "",
                                  '{"prompt": "Colour of grass?", "answer": ["green", "Green", "green "], '
                                  '"prompt_id": 7, "answers": 2}'))
    assert (
        made.entities == ["Sky?", "Colour of grass?"]
        and made.answers(0, 0) == ("blue",)
        and made.answers(1, 0) == ("green", "Green")
    )


@pytest.mark.parametrize("lines, message", [
    ([""], "no facts"),
    (['{"prompt": "a", "answer": "b"}', "{oops"], "line 2: not JSON"),
    (['{"prompt": "a"}'], 'line 1: the key "answer" is missing'),
    (['{"answer": "a"}'], '"prompt" is missing'),
    (['{"prompt": "a", "answers": ["b"]}'], r'line 1: unknown key "answers" \(did you mean "answer"\?\)'),
    (['{"Prompt": "a", "answer": "b"}'], r'"Prompt" \(did you mean "prompt"\?\)'),
    (['{"prompt": "a", "answer": "b", "alos": ["c"]}'], r'"alos" \(did you mean "also"\?\)'),
    (['["a", "b"]'], "line 1: expected an object"),
    (["[" * 100_000], "line 1: not JSON"),
    (['{"prompt": "a \\ud800", "answer": "b"}'], "line 1: half of a"),
    (['{"prompt": "a", "answer": "b"}'] * 2, "line 2: the prompt 'a' is there twice"),
    (['{"prompt": 3, "answer": "b"}'], '"prompt" must be a string'),
    (['{"prompt": "a", "answer": 3}'], '"answer" must be a string'),
    (['{"prompt": "a", "answer": []}'], '"answer" must be a string'),
    (['{"prompt": "a", "answer": "b"}', b'{"prompt": "\xff"}'], "line 2: byte 13 is not UTF-8"),
])
def test_jsonl_that_is_wrong_is_named_with_its_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message) as error:
        facts.from_jsonl(write(tmp_path / "f.jsonl", *lines))
    assert "f.jsonl" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("seed, n, expected", [
    (1337, 3000, "2a14b47d46142e14"), (0, 100, "5f117ab97c39ef70"), (5, 40_000, "d3cf416ecf94fadb")])
def test_a_seed_always_invents_the_same_people(seed, n, expected):
    """Saved models are asked about these people, so their random stream may never change."""
    people = facts.people(n, 0.6, seed)
    content = json.dumps(people.entities) + json.dumps(people.codes.tolist())
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == expected


def test_only_line_ends_end_a_fact(tmp_path):
    """A JSON string may contain U+2028 and the like unescaped."""
    prompts = [f"a{separator}b" for separator in "\x85\u2028\u2029"]
    lines = [json.dumps({"prompt": prompt, "answer": "c"}, ensure_ascii=False) for prompt in prompts]
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "f.jsonl").write_bytes(end.join(lines).encode())
        assert facts.from_jsonl(tmp_path / "f.jsonl").entities == prompts
    (tmp_path / "f.jsonl").write_bytes(f"{lines[0]}\r{{oops".encode())
    with pytest.raises(ValueError, match="line 2: not JSON"):
        facts.from_jsonl(tmp_path / "f.jsonl")


@pytest.mark.parametrize("name, teaches", [
    ("people", True), ("world", True), ("a/facts.jsonl", True), ("FACTS.JSONL", True),
    ("facts.json", False), ("book.txt", False), ("people.txt", False)])
def test_what_teaches_facts(name, teaches):
    assert datasets.teaches_facts(name) == teaches
