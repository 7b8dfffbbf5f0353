import pytest

from nanomem import facts, tokenizer

TEXT = "Zürich's 1234 cafés\n\n are  open: 🙂 <|endoftext|>"


@pytest.mark.parametrize("name, size", [("world", 2048), ("people", 1328)])
def test_the_shipped_tokenizers_read_any_text_back(name, size):
    encoding = tokenizer.load(facts.DATA / name / "tokenizer.tiktoken")
    assert encoding.n_vocab == size and encoding.eot_token == size - 1
    assert encoding.decode(encoding.encode_ordinary(TEXT)) == TEXT
    assert encoding.eot_token not in encoding.encode_ordinary(TEXT)


def test_bytes():
    encoding = tokenizer.byte_encoding()
    assert encoding.encode_ordinary("aé") == [97, 0xC3, 0xA9] and encoding.n_vocab == 257


def test_save_and_load(tmp_path):
    encoding = tokenizer.load(facts.DATA / "people" / "tokenizer.tiktoken")
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
