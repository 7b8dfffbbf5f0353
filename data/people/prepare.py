"""
Rebuilds the tokenizer of the invented people from data/people/lists.json; the people themselves are made
from the seed whenever a run begins (nanomem.facts.people).

    python data/people/prepare.py
"""

from collections import Counter
from pathlib import Path

import regex  # tiktoken's own

from nanomem import facts, sentences, tokenizer

FOLDER = Path(__file__).resolve().parent


def main():
    """Writes a tokenizer of the 256 bytes and of every word in the sentences about people, the most
    frequent first: so each part of a name is one token, as is nearly every answer, and a model has no
    spelling to learn.
    """
    words = Counter()
    for sentence in sentences.all_sentences(facts.people(n_entities=20_000)):
        words.update(regex.findall(tokenizer.PATTERN, sentence))
    tokens = [bytes([b]) for b in range(256)] + [
        word.encode() for word, _ in words.most_common() if len(word) > 1
    ]
    encoding = tokenizer.from_ranks({token: rank for rank, token in enumerate(tokens)})
    tokenizer.save(encoding, FOLDER / "tokenizer.tiktoken")
    print(f"{encoding.n_vocab:,} tokens in {FOLDER / 'tokenizer.tiktoken'}")


if __name__ == "__main__":
    main()
