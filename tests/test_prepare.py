import functools
import gzip
import hashlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import runs

from nanomem import tokenizer
from nanomem.config import Config
from nanomem.data import file_digest, open_data

sys.path.insert(0, str(runs.ROOT / "data"))
import documents
import download
import prepare

# Without the time, which would give the same test different names in pytest's processes.
gz = functools.partial(gzip.compress, mtime=0)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, arguments)])
    prepare.main()


def words(n, seed=0):
    """A text of n lines."""
    rng = random.Random(seed)
    return "".join(
        " ".join(
            rng.choice(("grüße", "memory", "of", "the", "layer", "42")) for _ in range(rng.randrange(1, 12))
        )
        + "\n"
        for _ in range(n)
    )


def stored(folder, split):
    """All tokens of a split, in order, and where its documents end."""
    index = json.loads((folder / "index.json").read_text())
    tokens, ends = [np.zeros(0, int)], []
    for shard in index[split]:
        path = folder / shard["file"]
        ends += (np.load(path.with_suffix(".ends.npy")) + sum(map(len, tokens))).tolist()
        tokens.append(np.fromfile(path, index["dtype"]).astype(int))
        assert (
            len(tokens[-1]) == shard["tokens"]
            and hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        )
    return np.concatenate(tokens), ends


@pytest.fixture
def small(monkeypatch):
    """Pieces of 20 kB, read 3 kB at a time, so that small texts make several."""
    monkeypatch.setattr(documents, "PIECE", 20_000)
    monkeypatch.setattr(documents, "SEGMENT", 3000)


def test_a_text_comes_back_and_keeps_its_last_tenth(small, monkeypatch, tmp_path):
    text = words(6000)
    (tmp_path / "book.txt").write_text(text)
    run(monkeypatch, tmp_path / "book.txt", f"--out={tmp_path / 'out'}")
    (train, ends), (val, val_ends) = stored(tmp_path / "out", "train"), stored(tmp_path / "out", "val")
    assert bytes(train[:-1].tolist() + val[:-1].tolist()).decode() == text
    assert train[-1] == val[-1] == 256 and ends == [len(train)] and val_ends == [len(val)]
    assert len(val) == pytest.approx(0.1 * len(text.encode()), rel=0.01)
    assert len(json.loads((tmp_path / "out/index.json").read_text())["train"]) > 5
    data = open_data(Config(data=str(tmp_path / "out"), block_size=32))
    x, _ = data.batch("train", 3, 4)
    assert all(bytes(row.tolist()) in text.encode() for row in x)
    again = open_data(Config(data=str(tmp_path / "book.txt"), block_size=32))
    assert again.bytes_per_token == data.bytes_per_token * len(val) / (len(val) - 1)


def test_json_lines_gzip_and_parquet_hold_the_same_documents(small, monkeypatch, tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet
    documents = [words(4, seed) for seed in range(300)]
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gz(lines.encode()))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": documents}), tmp_path / "c.parquet", row_group_size=100
    )
    found = {}
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        run(monkeypatch, tmp_path / name, f"--out={tmp_path / name[0]}", "--val_share=0.2")
        found[name] = {split: stored(tmp_path / name[0], split)[0].tolist() for split in ("train", "val")}
    assert found["a.jsonl"] == found["b.jsonl.gz"] == found["c.parquet"]
    encoding = tokenizer.byte_encoding()
    split = {
        name: encoding.decode(tokens).split("<|endoftext|>")[:-1] for name, tokens in found["a.jsonl"].items()
    }
    assert sorted(split["train"] + split["val"]) == sorted(documents)
    assert 30 < len(split["val"]) < 90
    chosen = [
        text for text in documents if int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) < 0.2 * 16**13
    ]
    assert split["val"] == chosen


def test_long_lines(small, monkeypatch, tmp_path):
    (tmp_path / "long.jsonl").write_text(
        "".join(json.dumps({"text": f"{i}" + "long line " * 700}) + "\n" for i in range(40))
    )
    run(monkeypatch, tmp_path / "long.jsonl", f"--out={tmp_path / 'json'}", "--val_share=0.2")
    assert sum(len(stored(tmp_path / "json", split)[1]) for split in ("train", "val")) == 40
    text = "one line alone, of many grüße " * 3000
    for name, end in (("open", ""), ("closed", "\n")):
        (tmp_path / f"{name}.txt").write_text(text + end)
        run(monkeypatch, tmp_path / f"{name}.txt", f"--out={tmp_path / name}")
        train, val = (stored(tmp_path / name, split)[0][:-1].tolist() for split in ("train", "val"))
        assert bytes(train + val).decode() == text + end and len(val) == pytest.approx(
            0.1 * len(text.encode()), rel=0.01
        )
        bytes(train).decode()  # no character is cut


def test_more_shards_than_a_process_may_open(monkeypatch, tmp_path):
    (tmp_path / "notes").mkdir()
    for i in range(150):
        (tmp_path / "notes" / f"{i}.txt").write_text(words(20, seed=i))
    run(monkeypatch, tmp_path / "notes", f"--out={tmp_path / 'out'}", "--val_share=0.1")
    code = f"""if True:
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        from nanomem.config import Config
        from nanomem.data import file_digest, open_data
        data = open_data(Config(data={str(tmp_path / "out")!r}))
        print(sum(len(data.batch("train", i, 8)[0]) for i in range(100)))"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
    )
    assert ended.stdout == "800\n", ended.stderr


def test_files_of_others_are_kept(monkeypatch, tmp_path):
    (tmp_path / "book.txt").write_text(words(3000))
    (tmp_path / "train.bin").write_bytes(b"weeks of work")
    with pytest.raises(
        prepare.UserError, match="has train.bin, which prepare.py did not write; name another folder"
    ):
        run(monkeypatch, tmp_path / "book.txt", f"--out={tmp_path}")
    assert (tmp_path / "train.bin").read_bytes() == b"weeks of work"
    (tmp_path / "people.txt").write_text(words(3000))
    with pytest.raises(
        prepare.UserError, match="people has tokenizer.tiktoken, which prepare.py did not write"
    ):
        run(monkeypatch, tmp_path / "people.txt")


def test_a_parquet_column_of_numbers_is_refused(monkeypatch, tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(prepare.UserError, match=r'expected a column "text" of strings, got text \(int64\)'):
        run(monkeypatch, tmp_path / "n.parquet", f"--out={tmp_path / 'out'}")


def test_a_folder_of_many_files_and_any_number_of_workers(small, monkeypatch, tmp_path):
    for i in range(40):
        (tmp_path / "notes" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "notes" / str(i % 3) / f"{i}.md").write_text(words(100 + 40 * i, seed=i))
    (tmp_path / "notes" / "picture.png").write_bytes(b"no text")
    for workers in (1, 5):
        run(
            monkeypatch,
            tmp_path / "notes",
            f"--out={tmp_path / str(workers)}",
            "--val_share=0.2",
            f"--workers={workers}",
        )
    one, five = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("1", "5"))
    assert one == five and len(one) > 60
    documents = [stored(tmp_path / "1", split)[1] for split in ("train", "val")]
    assert sum(map(len, documents)) == 40 and 2 <= len(documents[1]) <= 16


def test_killed_and_resumed_gives_the_same_shards(tmp_path):
    (tmp_path / "book.txt").write_text(words(1_000_000))
    program = f"import sys; sys.path.insert(0, {str(runs.ROOT / 'data')!r}); import documents, prepare; "
    program += "documents.PIECE = 2**20; prepare.main()"

    def start(out):
        return subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "book.txt"), f"--out={out}", "--workers=2"],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
        )
    assert start(tmp_path / "whole").wait() == 0
    process = start(tmp_path / "killed")
    while len(list((tmp_path / "killed").glob("part-*.json"))) < 4:
        time.sleep(0.002)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("train-0000[012].bin")}
    assert not (tmp_path / "killed" / "index.json").exists()
    assert start(tmp_path / "killed").wait() == 0
    whole, killed = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "killed")
    )
    assert whole == killed and len(whole) > 40
    assert any(path.stat().st_mtime_ns == when for path, when in done.items())  # not made again


@pytest.fixture
def shards(monkeypatch, tmp_path):
    (tmp_path / "book.txt").write_text(words(3000))
    run(monkeypatch, tmp_path / "book.txt", f"--out={tmp_path / 'out'}")
    return tmp_path / "out"


def test_damaged_shards_are_refused(shards):
    config, path = Config(data=str(shards), block_size=32), shards / "train-00000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(
        ValueError, match=f"train-00000.bin has {len(whole) - 2:,} bytes, and index.json says {len(whole):,}"
    ):
        open_data(config)
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(ValueError, match="train-00000.bin was changed after it was written"):
        open_data(config)
    path.write_bytes(whole)  # touched, and what it was
    open_data(config)
    index = (shards / "index.json").read_text()
    for edited in ("{}", index.replace(f'"tokens": {len(whole) // 2}', '"tokens": null')):
        (shards / "index.json").write_text(edited)
        with pytest.raises(ValueError, match="index.json was changed after it was written"):
            open_data(config)
    (shards / "index.json").write_text(index)
    tokenizer.save(
        tokenizer.from_ranks({bytes([255 - i]): i for i in range(256)}), shards / "tokenizer.tiktoken"
    )
    with pytest.raises(ValueError, match="made with another tokenizer than .*tokenizer.tiktoken"):
        open_data(config)
    path.unlink()
    tokenizer.save(tokenizer.byte_encoding(), shards / "tokenizer.tiktoken")
    with pytest.raises(ValueError, match="train-00000.bin is missing"):
        open_data(config)


def test_shards_of_other_text_are_kept(shards, monkeypatch, tmp_path):
    before = (shards / "index.json").read_bytes()
    run(monkeypatch, tmp_path / "book.txt", f"--out={shards}")  # the same again: nothing to do
    (tmp_path / "other.txt").write_text(words(500, seed=1))
    with pytest.raises(prepare.UserError, match="has shards of other text"):
        run(monkeypatch, tmp_path / "other.txt", f"--out={shards}")
    assert (shards / "index.json").read_bytes() == before


def test_a_folder_and_its_shards_of_the_same_name(small, monkeypatch, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "book.txt").write_text(words(3000))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanomem.data.shipped", lambda name: tmp_path / "data" / name)
    run(monkeypatch, "notes", "--out=data/notes")
    assert open_data(Config(data="notes")).encoding.n_vocab == 257


def test_train_and_sample_from_shards(shards, tmp_path):
    out, _ = runs.train(tmp_path / "run", f"--data={shards}", "--max_iters=3", "--log_interval=1")
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < row["bits_per_byte"] < 12 and 0 <= row["data_wait"] < 1
    assert runs.run(
        "sample.py", f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--start=memory", "--max_new_tokens=4"
    )


def test_a_bpe_of_more_than_16_bits_would_take_32(shards):
    from nanomem.data import token_dtype
    assert [np.dtype(token_dtype(n)).itemsize for n in (257, 2**16, 2**16 + 1)] == [2, 2, 4]


class Handler(http.server.SimpleHTTPRequestHandler):
    cut = 0

    def log_message(self, *_):
        pass

    def copyfile(self, source, outputfile):
        if Handler.cut:
            outputfile.write(source.read(Handler.cut))  # the connection ends early
        else:
            super().copyfile(source, outputfile)


@pytest.fixture
def server(tmp_path):
    """A folder that is on the web."""
    (tmp_path / "web").mkdir()
    handler = lambda *args: Handler(*args, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield tmp_path / "web", f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.parametrize("left", [0, 1, 700, 1000])
def test_a_download_goes_on_where_it_ended(left, tmp_path):
    content, asked = random.Random(0).randbytes(1000), []

    class Ranges(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            asked.append(self.headers["Range"])
            start = int((asked[-1] or "bytes=0-")[len("bytes="):-1])
            self.send_response(416 if start >= len(content) else 206 if asked[-1] else 200)
            self.send_header("Content-Length", len(content[start:]))
            self.end_headers()
            self.wfile.write(content[start:])

    (tmp_path / "set.part").write_bytes(content[:left])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        download.download(f"http://127.0.0.1:{httpd.server_port}/set", tmp_path / "set", prepare.console)
        httpd.shutdown()
    assert (tmp_path / "set").read_bytes() == content and asked == [
        f"bytes={left - 1}-" if left > 1 else None
    ]


def test_a_named_set_is_downloaded_checked_and_prepared(server, monkeypatch, tmp_path):
    web, url = server
    text = "".join(f"{words(3, seed)}<|endoftext|>\n" for seed in range(400))
    with zipfile.ZipFile(web / "set.zip", "w") as archive:
        archive.writestr("inside/stories.txt", text)
    size = (web / "set.zip").stat().st_size
    named = download.Named(
        f"{url}/set.zip",
        size,
        file_digest(web / "set.zip"),
        member="inside/stories.txt",
        separator="<|endoftext|>",
    )
    monkeypatch.setitem(prepare.NAMED, "tinystories", named)
    monkeypatch.setattr(Handler, "cut", 1000)
    with pytest.raises(
        prepare.UserError, match=f"the connection ended after 1,000 of {size:,} bytes.*--from-file=set.zip"
    ):
        run(monkeypatch, "tinystories", f"--out={tmp_path / 'out'}")
    monkeypatch.setattr(Handler, "cut", 0)
    run(monkeypatch, "tinystories", f"--out={tmp_path / 'out'}", "--val_share=0.1")
    (train, ends), (_, val_ends) = stored(tmp_path / "out", "train"), stored(tmp_path / "out", "val")
    assert len(ends) + len(val_ends) == 400 and len(val_ends) > 10 and (train == 256).sum() == len(ends)
    assert not list((tmp_path / "out").glob("*.zip")) and not list((tmp_path / "out").glob("*.txt"))

    (tmp_path / "fetched.zip").write_bytes((web / "set.zip").read_bytes()[:-1])
    with pytest.raises(
        prepare.UserError,
        match=f"fetched.zip is not tinystories: it has {size - 1:,} bytes, tinystories has {size:,}; fetch",
    ):
        run(
            monkeypatch, "tinystories", f"--out={tmp_path / 'two'}", f"--from-file={tmp_path / 'fetched.zip'}"
        )
    (tmp_path / "fetched.zip").write_bytes((web / "set.zip").read_bytes())
    run(
        monkeypatch,
        "tinystories",
        f"--out={tmp_path / 'two'}",
        f"--from-file={tmp_path / 'fetched.zip'}",
        "--val_share=0.1",
    )
    assert (
        stored(tmp_path / "two", "train")[0].tolist() == train.tolist()
        and (tmp_path / "fetched.zip").exists()
    )


@pytest.mark.parametrize("arguments, message", [
    ([], "expected what to prepare: one of shakespeare"),
    (["shakespare"], "did you mean shakespeare"),
    (["shakespeare", "x.txt"], "shakespeare can't be combined with other inputs"),
    (["empty.txt"], "empty.txt: the file is empty"),
    (["bad.txt"], "bad.txt: byte 3 is not UTF-8"),
    (["bad.jsonl"], 'bad.jsonl, line 2: expected {"text": "..."}'),
    (["short.txt"], "the text is too short to keep a tenth"),
    (["bad.txt", "empty.txt"], "empty.txt: the file is empty"),
    (["short.jsonl"], "of 2 documents none is for validation; choose another --val_share than 0.01"),
    (["cut.jsonl.gz"], "cut.jsonl.gz is not a complete gzip file"),
    (["bad.txt", "--val_share=2"], "--val_share must be above 0 and below 1, got 2"),
    (["bad.txt", "--tokeniser=bpe"], "did you mean tokenizer"),
    (["bad.txt", "--from-file=x"], "--from-file is for a named set"),
])
def test_wrong_input_is_named(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff" * 100)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gz(b'{"text": "a"}\n' * 1000)[:40])
    with pytest.raises((prepare.UserError, ValueError), match=message):
        run(monkeypatch, *arguments, f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_where_it_goes(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "FOLDER", tmp_path / "data")
    (tmp_path / "My notes v1.2.jsonl.gz").write_bytes(
        gz("".join(json.dumps({"text": words(3, i)}) + "\n" for i in range(99)).encode())
    )
    run(monkeypatch, tmp_path / "My notes v1.2.jsonl.gz", "--val_share=0.2")
    assert (tmp_path / "data" / "My notes v1.2" / "index.json").exists()
    (tmp_path / "book.txt").write_text(words(300))
    with pytest.raises(prepare.UserError, match="2 inputs go into one set, which --out must name"):
        run(monkeypatch, tmp_path / "book.txt", tmp_path / "book.txt")
    with pytest.raises(prepare.UserError, match="book.txt is a file; it must name a folder"):
        run(monkeypatch, tmp_path / "book.txt", f"--out={tmp_path / 'book.txt'}")


def lines_of(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize("name", ["a.json", "a.ndjson", "a.JSON.gz", "a.JSONL.GZ", "a.ndjson.gz"])
def test_json_lines_of_any_name_are_documents(name, monkeypatch, tmp_path):
    content = lines_of(*(words(3, seed) for seed in range(60))).encode()
    (tmp_path / name).write_bytes(gz(content) if name.lower().endswith("gz") else content)
    (tmp_path / "b.jsonl").write_bytes(content)
    for source in (name, "b.jsonl"):
        run(monkeypatch, tmp_path / source, f"--out={tmp_path / source}-out", "--val_share=0.2")
    for split in ("train", "val"):
        one, other = (stored(tmp_path / f"{source}-out", split) for source in (name, "b.jsonl"))
        assert one[0].tolist() == other[0].tolist() and one[1] == other[1]


def test_a_json_that_describes_a_folder_is_left_alone(monkeypatch, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_info.json").write_text('{"description": "words"}')
    documents = lines_of(*(words(3, seed) for seed in range(60)))
    (tmp_path / "set" / "train.json.gz").write_bytes(gz(documents.encode()))
    run(monkeypatch, tmp_path / "set", f"--out={tmp_path / 'out'}", "--val_share=0.2")
    assert sum(len(stored(tmp_path / "out", split)[1]) for split in ("train", "val")) == 60


def test_a_text_as_gzip_is_split_like_the_text(small, monkeypatch, tmp_path):
    text = words(6000).encode()
    (tmp_path / "book.txt").write_bytes(text)
    two_members = gz(text[:100_000]) + gz(text[100_000:])
    (tmp_path / "book.md.gz").write_bytes(two_members)
    for name in ("book.txt", "book.md.gz"):
        run(monkeypatch, tmp_path / name, f"--out={tmp_path / name}-out")
    for split in ("train", "val"):
        plain, packed = (stored(tmp_path / f"{name}-out", split) for name in ("book.txt", "book.md.gz"))
        assert plain[0].tolist() == packed[0].tolist() and plain[1] == packed[1]


def test_many_texts_as_gzip_are_split_like_the_texts(small, monkeypatch, tmp_path):
    for folder in ("plain", "packed"):
        (tmp_path / folder).mkdir()
    for i in range(30):
        text = words(40, seed=i).encode()
        (tmp_path / "plain" / f"{i}.txt").write_bytes(text)
        (tmp_path / "packed" / f"{i}.txt.gz").write_bytes(gz(text))
    for folder in ("plain", "packed"):
        run(monkeypatch, tmp_path / folder, f"--out={tmp_path / folder}-out", "--val_share=0.2")
    for split in ("train", "val"):
        plain, packed = (stored(tmp_path / f"{folder}-out", split) for folder in ("plain", "packed"))
        assert plain[0].tolist() == packed[0].tolist()


def test_a_segment_at_a_time_of_a_gzip_is_in_memory(monkeypatch, tmp_path):
    """120 MB of text in a file of a few hundred kB."""
    line = b"of the memory layer\n"
    with gzip.open(tmp_path / "book.txt.gz", "wb", 6) as file:
        for _ in range(120):
            file.write(line * 50_000)
    piece, _ = prepare.pieces_of([tmp_path / "book.txt.gz"], 0.01)  # train and val
    tracemalloc.start()
    total = sum(len(text) for text, _, _ in prepare.texts_of(piece))
    assert total == 108_000_020 and tracemalloc.get_traced_memory()[1] < 12 * 2**20
    tracemalloc.stop()


FACT = '{"prompt": "a", "answer": "b"}\n'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("cut.txt.gz", gz(words(999).encode())[:-20], "cut.txt.gz is not a complete gzip file"),
        ("plain.txt.gz", b"plain", "plain.txt.gz is not a complete gzip file"),
        (
            "damaged.md.gz",
            gz(bytes(9999))[:12] + b"xxxx",
            "damaged.md.gz is not a complete gzip file",
        ),
        ("empty.txt.gz", gz(b""), "empty.txt.gz: the file is empty"),
        ("bad.txt.gz", gz(b"ab\xff" * 100), "bad.txt.gz: byte 3 is not UTF-8"),
        ("book.txt.zst", b"(\xb5/\xfd", "book.txt.zst: nanomem reads no compressed files but .gz"),
        ("notes.ZIP", b"PK", "notes.ZIP: nanomem reads no compressed files but .gz"),
        (
            "facts.jsonl",
            FACT.encode(),
            "line 1: expected .* teach facts with python train.py --data=FILE.jsonl",
        ),
        (
            "facts.json.gz",
            gz(FACT.encode()),
            "facts.json.gz, line 1: expected .* teach facts with",
        ),
        (
            "facts.txt",
            FACT.encode() * 99,
            "facts.txt looks like JSON; save it as .*facts.jsonl, one object a line",
        ),
        (
            "facts.txt.gz",
            gz(FACT.encode() * 99),
            "looks like JSON; save it as .*facts.jsonl, one object a line",
        ),
        (
            "text.txt",
            lines_of(*"abc").encode(),
            "save it as .*text.jsonl, one object a line, to train on these documents",
        ),
        ("array.json", b'[{"text": "a"}]', 'array.json, line 1: expected {"text": "..."} on each line'),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(name, content, message, monkeypatch, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((prepare.UserError, ValueError), match=message) as error:
        run(monkeypatch, tmp_path / name, f"--out={tmp_path / 'out'}")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_code_that_begins_with_a_brace_is_text(monkeypatch, tmp_path):
    (tmp_path / "code.txt").write_text("{ int a; }\n" * 300)
    run(monkeypatch, tmp_path / "code.txt", f"--out={tmp_path / 'out'}")
    assert len(stored(tmp_path / "out", "val")[0]) == 320


@pytest.mark.parametrize("name", ["bytes", "world"])
def test_millions_of_newlines_are_prepared(name, monkeypatch, tmp_path):
    named = name if name == "bytes" else runs.ROOT / "data" / name / "tokenizer.tiktoken"
    documents = ["\n" * 2_500_000 + "x", *(words(1, seed) for seed in range(40))]
    (tmp_path / "lines.jsonl").write_text(lines_of(*documents))
    out = f"--out={tmp_path / 'out'}"
    run(monkeypatch, tmp_path / "lines.jsonl", out, "--val_share=0.2", f"--tokenizer={named}")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert sum(shard["bytes"] for split in ("train", "val") for shard in index[split]) > 2_500_000


def test_links_in_a_folder_are_followed_once_and_one_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "there").mkdir()
    for number, place in enumerate(("there", ".")):
        (tmp_path / place / f"book{number}.txt").write_text(f"words {number} " * 200)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "folder").symlink_to(tmp_path / "there")
    (tmp_path / "mine" / "same").symlink_to(tmp_path / "there")
    (tmp_path / "mine" / "up").symlink_to(tmp_path / "mine")
    (tmp_path / "mine" / "book.txt").symlink_to(tmp_path / "book1.txt")
    out, _ = runs.run("data/prepare.py", tmp_path / "mine", f"--out={tmp_path / 'out'}")
    assert "2 documents" in out.replace("\n", " ")
    (tmp_path / "mine" / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    _, err = runs.run("data/prepare.py", tmp_path / "mine", f"--out={tmp_path / 'other'}", code=2)
    assert (
        f"gone.txt is a link to {tmp_path / 'nowhere.txt'}, which does not exist" in err
        and err.count("\n") == 1
    )


def test_a_text_that_ends_in_a_long_character_is_cut_between_characters(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("北京是中国", encoding="utf-8")
    (tmp_path / "b.txt").write_text(words(500))
    run(monkeypatch, tmp_path / "a.txt", tmp_path / "b.txt", f"--out={tmp_path / 'out'}")
    data = open_data(Config(data=str(tmp_path / "out"), block_size=8))
    text = data.encoding.decode(
        [t for shards in data.tokens.values() for shard in shards for t in shard[:].tolist()]
    )
    assert "北京是中国" in text.replace("<|endoftext|>", "")
