"""
Rebuilds the tokenizer of the invented people from data/people/lists.json; the people themselves are made from
the seed whenever a run begins (nanomem.facts.people).

    pip install -e '.[bpe]' && python data/people/prepare.py
"""

from pathlib import Path

from nanomem import facts, tokenizer

FOLDER = Path(__file__).resolve().parent
VOCAB_SIZE = 2048


def main():
    """Trains and writes the tokenizer."""
    encoding = tokenizer.train_bpe(facts.all_sentences(facts.people(n_entities=20_000)), VOCAB_SIZE)
    tokenizer.save(encoding, FOLDER / "tokenizer.tiktoken")
    print(f"{encoding.n_vocab:,} tokens in {FOLDER / 'tokenizer.tiktoken'}")


if __name__ == "__main__":
    main()
