import os
import subprocess
import sys

import numpy as np
import pytest
import runs
import tiktoken

from nanomem import facts, sentences, tokenizer
from nanomem.cli import shipped

TEXT = "Zürich's 1234 cafés\n\n are  open: 🙂 <|endoftext|>"


@pytest.mark.parametrize("name, size", [("world", 2048), ("people", 1328)])
def test_the_shipped_tokenizers_read_any_text_back(name, size):
    encoding = tokenizer.load(shipped(name) / "tokenizer.tiktoken")
    assert encoding.n_vocab == size and encoding.eot_token == size - 1
    assert encoding.decode(encoding.encode_ordinary(TEXT)) == TEXT
    assert encoding.eot_token not in encoding.encode_ordinary(TEXT)


def test_bytes():
    encoding = tokenizer.byte_encoding()
    assert encoding.encode_ordinary("aé") == [97, 0xC3, 0xA9] and encoding.n_vocab == 257


def test_save_and_load(tmp_path):
    encoding = tokenizer.load(shipped("people") / "tokenizer.tiktoken")
    tokenizer.save(encoding, tmp_path / "t.tiktoken")
    assert tokenizer.load(tmp_path / "t.tiktoken").encode_ordinary(TEXT) == encoding.encode_ordinary(TEXT)


def test_training_merges_what_is_frequent_and_keeps_all_bytes():
    pytest.importorskip("tokenizers")
    encoding = tokenizer.train_bpe(["Lagos is a city, Lagos is large é"] * 20, 300)
    assert len(encoding.encode_ordinary(" Lagos")) == 1
    assert encoding.decode(encoding.encode_ordinary(TEXT)) == TEXT


@pytest.mark.parametrize("content, message", [
    ("YQ== 0\nnot base64!! 1\n", "line 2"), ("YQ==\n", "line 1"), ("YQ== 0\n", "all 256 bytes")])
def test_files_that_are_no_tokenizers(tmp_path, content, message):
    path = tmp_path / "t.tiktoken"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        tokenizer.load(path)


BLANKS = {"newlines": "\n" * 2_500_000 + "x", "mixed": "ab " + " \n\t" * 800_000 + "cd"}


@pytest.mark.parametrize("text", [TEXT, "", *BLANKS.values()], ids=["text", "empty", *BLANKS])
def test_bytes_encode_any_text_to_its_bytes(text):
    tokens = tokenizer.encode(tokenizer.byte_encoding(), text)
    assert tokens.dtype == np.uint32 and tokens.astype(np.uint8).tobytes() == text.encode()


def test_bytes_in_another_order_keep_their_ranks():
    encoding = tokenizer.from_ranks({bytes([255 - i]): i for i in range(256)})
    assert tokenizer.encode(encoding, TEXT).tolist() == encoding.encode_ordinary(TEXT)


def test_encoding_is_tiktokens_where_tiktoken_can():
    encoding = tokenizer.load(shipped("people") / "tokenizer.tiktoken")
    for text in (TEXT, "", " " * 300_000 + "x", "word " * 1000):
        tokens = tokenizer.encode(encoding, text)
        assert tokens.dtype == np.uint32 and tokens.tolist() == encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    "name", ["bytes", shipped("world") / "tokenizer.tiktoken"], ids=["bytes", "world"]
)
def test_a_byte_of_the_command_line_that_is_not_utf8_is_encoded_as_tiktoken_does(name):
    encoding = tokenizer.by_name(name)
    assert encoding.decode(tokenizer.encode(encoding, "caf\udce9 🙂").tolist()) == "caf\ufffd 🙂"


@pytest.mark.parametrize("text", BLANKS.values(), ids=BLANKS)
def test_millions_of_blanks_in_a_row_are_encoded(text):
    encoding = tokenizer.load(shipped("world") / "tokenizer.tiktoken")
    assert encoding.decode(tokenizer.encode(encoding, text).tolist()) == text


def test_a_text_without_a_space_trains_a_bpe_in_seconds():
    pytest.importorskip("tokenizers")
    code = """if True:
        import random
        from nanomem import tokenizer
        text = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=700_000))
        encoding = tokenizer.train_bpe([text], 4096)
        tokens = tokenizer.encode(encoding, text)
        assert encoding.decode(tokens.tolist()) == text and len(tokens) < 500_000"""
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, env=environment)


def test_no_token_of_a_bpe_is_longer_than_the_longest_word():
    pytest.importorskip("tokenizers")
    for character in "a-\n":
        encoding = tokenizer.train_bpe([character * 5000], 300)
        longest = max(map(len, encoding.token_byte_values()[:-1]))
        assert 100 < longest <= tokenizer.LONGEST_WORD


def test_training_on_the_world_gives_the_shipped_tokenizer_token_for_token():
    pytest.importorskip("tokenizers")
    trained = tokenizer.train_bpe(sentences.all_sentences(facts.world(4000)), 2048)
    known = tokenizer.load(shipped("world") / "tokenizer.tiktoken")
    assert tokenizer.digest(trained) == tokenizer.digest(known) == "acc71e80bf4310f9"


def test_numbers_without_a_token_are_known():
    ranks = {bytes([b]): b for b in range(256)}
    with_gaps = tiktoken.Encoding("gaps", pat_str=tokenizer.PATTERN, mergeable_ranks=ranks,
                                  special_tokens={"<|endoftext|>": 257, "<|endofprompt|>": 260})
    assert tokenizer.unassigned(with_gaps) == [256, 258, 259]
    assert tokenizer.unassigned(tokenizer.byte_encoding()) == []
