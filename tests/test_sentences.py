import numpy as np
import pytest

from nanomem import facts, tokenizer
from nanomem.cli import shipped
from nanomem.sentences import SentenceArrays, Sentences


def sentences_of(fact_set, name):
    return Sentences(fact_set, tokenizer.load(shipped(name) / "tokenizer.tiktoken"))


def joined(arrays, documents):
    """The tokens of each document: a list of lists."""
    blocks = np.full((len(documents), 200), -1)
    arrays.join(documents, blocks, np.arange(len(documents)))
    return [[token for token in row[1:].tolist() if token != -1] for row in blocks]


def test_sentences_are_tokens_of_the_text():
    world = facts.world(300)
    sentences = sentences_of(world, "world")
    arrays, lengths = SentenceArrays(sentences), []
    entities = np.arange(300)
    for a, attribute in enumerate(world.attributes):
        for wordings in (attribute.statements, attribute.questions):
            for i, wording in enumerate(wordings):
                is_question = np.full(300, wordings is attribute.questions)
                draws = np.full(300, (i + 0.5) / len(wordings))
                documents = arrays.documents(entities, np.full(300, a), is_question, draws)
                for e, tokens in enumerate(joined(arrays, documents)):
                    prompt = wording.replace("{}", world.entities[e])
                    text = f"{prompt} {world.answers(e, a)[0]}"
                    # As a user's prompt will be encoded: in one piece
                    assert tokens == sentences.encoding.encode_ordinary(text) + [sentences.end]
                    assert sentences.prompt(e, wording) == sentences.encoding.encode_ordinary(prompt)
                    lengths.append(len(tokens))
    assert len(lengths) == 300 * (5 * 3 + 5 * 2)
    assert sentences.longest()[0] == max(lengths)
    assert 4 <= arrays.shortest() <= min(lengths)


def test_a_biography_states_every_fact_once():
    people = facts.people(50)
    sentences = sentences_of(people, "people")
    arrays = SentenceArrays(sentences)
    (tokens,) = joined(arrays, arrays.biographies(np.array([7]), np.array([[4, 0, 3, 1, 2]])))
    date, city, university, major, employer = (people.answers(7, a)[0] for a in range(5))
    first = f"{people.entities[7]} joined: {employer} born: {date} studied: {major}"
    text = f"{first} from: {city} attended: {university}<|endoftext|>"
    assert tokens == sentences.encoding.encode(text, allowed_special="all")
    assert len(sentences.names[False][7]) == 2  # a token for each part of a name
    everyone = joined(arrays, arrays.biographies(np.arange(50), np.tile(np.arange(5), (50, 1))))
    assert sentences.longest()[0] == max(map(len, everyone))


def test_documents_are_joined_block_by_block_and_cut_at_the_end():
    arrays = SentenceArrays(sentences_of(facts.world(4), "world"))
    entities, attributes = np.array([0, 1, 2, 3]), np.array([0, 1, 2, 3])
    documents = arrays.documents(entities, attributes, np.zeros(4, bool), np.zeros(4))
    alone = joined(arrays, documents)
    blocks = np.full((4, 12), -1)
    arrays.join(documents, blocks, np.array([0, 0, 2, 3]))
    expected = [alone[0] + alone[1], [], alone[2], alone[3]]
    for block, tokens in zip(blocks.tolist(), expected):
        padded = [-1] + tokens + [-1] * 12
        assert block == padded[:12]
    assert len(expected[0]) > 11 > len(expected[2])
    arrays.join(documents[:0], blocks, np.array([], dtype=int))  # a batch may have nothing to ask


@pytest.mark.parametrize("draw, expected", [(0.0, "alike x b"), (0.999, "x c b")])
def test_attributes_may_share_a_wording(draw, expected):
    attributes = (facts.Attribute("one", ("alike {}",)), facts.Attribute("two", ("alike {}", "{} c")))
    made = facts.FactSet(["x"], attributes, [[("a",)], [("b",)]], np.array([[0, 0]]))
    sentences = Sentences(made, tokenizer.byte_encoding())
    arrays = SentenceArrays(sentences)
    documents = arrays.documents(np.array([0]), np.array([1]), np.array([False]), np.array([draw]))
    assert sentences.encoding.decode(joined(arrays, documents)[0]) == f"{expected}<|endoftext|>"


def test_a_prompt_of_millions_of_newlines_is_encoded():
    prompt = "a" + "\n" * 2_500_000 + "b"
    made = facts.FactSet([prompt], (facts.Attribute("fact", ("{}",)),), [[("c",)]], np.array([[0]]))
    assert Sentences(made, tokenizer.byte_encoding()).longest()[0] == 2_500_005
