import numpy as np
import pytest
import torch

from nanomem import facts, recall, tokenizer
from nanomem.cli import shipped
from nanomem.config import GPTConfig
from nanomem.data import FactData
from nanomem.model import GPT
from nanomem.optim import build_optimizer
from nanomem.sentences import Sentences


@pytest.fixture(scope="module")
def world():
    return facts.world(300, zipf=0.6)


def test_what_is_recalled_in_a_biography_needs_no_end():
    """A model that follows the answer with another statement recalls the fact in a biography, but not when
    asked.
    """
    people = facts.people(8)
    sentences = Sentences(people, tokenizer.load(shipped("people") / "tokenizer.tiktoken"))
    joined, after = sentences.encoding.encode_ordinary(" joined"), {}
    for e in range(8):
        for a, attribute in enumerate(people.attributes):
            for wording in attribute.statements + attribute.questions:
                told = [sentences.end] + sentences.prompt(e, wording) + sentences.answers(e, a)[0] + joined
                after |= {tuple(told[:i]): told[i] for i in range(1, len(told))}

    class Tells(torch.nn.Linear):
        """Knows each fact, and follows it with another statement."""

        def forward(self, tokens):
            logits = torch.zeros(*tokens.shape, sentences.encoding.n_vocab)
            for j, sequence in enumerate(tokens.tolist()):
                for i in range(len(sequence)):
                    logits[j, i, after.get(tuple(sequence[:i + 1]), 0)] = 1
            return logits, None

    pairs = np.argwhere(people.role >= 0)
    assert recall.ask(Tells(1, 1), sentences, pairs, questions=False)[0].all()
    assert not recall.ask(Tells(1, 1), sentences, pairs, questions=True)[0].any()


def test_recall_is_what_greedy_decoding_says():
    torch.manual_seed(0)
    world = facts.world(20)
    data = FactData(world, tokenizer.load(shipped("world") / "tokenizer.tiktoken"), 48)
    model = GPT(
        GPTConfig(n_layer=2, n_embd=32, n_head=2, block_size=48, mem_layers="1", mem_n_keys=16, mem_knn=4)
    )
    optimizers = build_optimizer(model, learning_rate=1e-2)
    for step in range(120):  # enough to know some and not all
        model(*data.batch("train", step, 8))[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pairs = np.argwhere(world.role >= 0)
    known, surprise = recall.ask(model, data.sentences, pairs, questions=False)
    model.eval()
    for (e, a), right, nats in zip(pairs, known, surprise):
        wordings = world.attributes[a].statements
        prompt = torch.tensor([[data.sentences.end] + data.sentences.prompt(e, wordings[e % 3])])
        tokens = [t.item() for t in model.generate(prompt, 40, temperature=0, stop=data.sentences.end)]
        assert right == (data.encoding.decode(tokens) == f" {world.answers(e, a)[0]}<|endoftext|>")
        answer = [*data.sentences.answers(e, a)[0], data.sentences.end]
        logits, _ = model(torch.cat([prompt, torch.tensor([answer])], dim=1))
        chosen = logits[0, prompt.shape[1] - 1:-1].log_softmax(-1)[range(len(answer)), answer]
        assert nats == pytest.approx(-chosen.sum().item(), rel=1e-4, abs=1e-4)
    assert 5 < known.sum() < len(pairs) - 5


def test_measure_asks_each_kind_of_pair_its_own_kind_of_sentence(world, monkeypatch):
    asked = []

    def ask(model, sentences, pairs, questions, progress):
        asked.append((pairs, questions))
        progress(0.5)
        progress(1.0)
        return np.ones(len(pairs), bool), np.full(len(pairs), 1.5)

    monkeypatch.setattr(recall, "ask", ask)
    shares = []
    sentences = Sentences(world, tokenizer.byte_encoding())
    measured = recall.measure(None, sentences, most=10_000, progress=shares.append)
    assert shares == pytest.approx([x / 2250 for x in (187.5, 375, 562.5, 750, 1500, 2250)])
    assert list(measured) == ["select", "report", "taught"]
    assert [questions for _, questions in asked] == [True, True, False]
    roles = [set(world.role[tuple(pairs.T)]) for pairs, _ in asked]
    assert roles == [{facts.SELECT}, {facts.REPORT}, {facts.ASKED, facts.SELECT, facts.REPORT}]
    assert [len(pairs) for pairs, _ in asked] == [375, 375, 1500]
    assert [scores["answer_nll"] for scores in measured.values()] == [1.5] * 3
    assert all(0 < scores["bits_known"] < scores["bits"] for scores in measured.values())


def test_scores_are_means_over_subsets(world):
    pairs = np.array([[0, 0], [0, 1], [299, 0], [299, 1]])
    scores = recall.scores(world, pairs, np.array([True, True, True, False]))
    assert scores["all"] == 0.75 and scores["head"] == 1 and scores["tail"] == 0.5 and scores["torso"] is None
    assert scores["country"] == 1 and scores["time zone"] == 0.5


def test_the_surprise_of_several_accepted_answers_is_that_of_either(tmp_path):
    """Against a model whose probabilities don't depend on the context."""
    lines = ['{"prompt": "a", "answer": ["x", "yz"]}', '{"prompt": "b", "answer": "x"}']
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    sentences = Sentences(facts.from_jsonl(tmp_path / "mine.jsonl"), tokenizer.byte_encoding())
    torch.manual_seed(0)
    log_p = torch.randn(sentences.encoding.n_vocab).log_softmax(-1)

    class Constant(torch.nn.Linear):
        def forward(self, tokens):
            return log_p.expand(*tokens.shape, -1), None

    def p(text):
        return log_p[[*text.encode(), sentences.end]].sum().exp().item()

    _, surprise = recall.ask(Constant(1, 1), sentences, np.array([[0, 0], [1, 0]]), questions=False)
    assert surprise == pytest.approx([-np.log(p(" x") + p(" yz")), -np.log(p(" x"))], rel=1e-5)


def test_bits_known_are_what_the_model_saves_beside_frequencies():
    values = [[("a",), ("b",)], [("c",), ("d",), ("e",), ("f",)]]
    codes = np.array([[0, 0], [0, 1], [0, 2], [1, 3]])
    attributes = (facts.Attribute("one", ("{} is",)), facts.Attribute("two", ("{} has",)))
    made = facts.FactSet(list("wxyz"), attributes, values, codes)
    every = np.ones((4, 2), dtype=bool)
    pairs = np.argwhere(every)
    perfect = recall.bits_known(made, pairs, np.zeros(8), every)
    assert perfect == pytest.approx(4 * 2 + 3 * np.log2(4 / 3) + 2)
    # One bit lost on each fact of the first attribute is more than it holds; it counts as nothing.
    surprise = np.where(pairs[:, 1] == 0, np.log(2), np.log(2) / 2)
    assert recall.bits_known(made, pairs, surprise, every) == pytest.approx(4 * 1.5)
    # Those asked stand for all: two facts of the second attribute that cost 1 and 3 bits.
    some = np.array([[0, 1], [3, 1]])
    assert recall.bits_known(made, some, np.log(2) * np.array([1.0, 3.0]), every) == 0
    assert recall.bits_known(made, some[:1], np.array([np.log(2)]), every) == pytest.approx(4 * 1)
