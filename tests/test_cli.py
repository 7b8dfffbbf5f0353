import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import runs

from nanomem.cli import SafeStream, UserError, expand, one_line_errors, parse, setting
from nanomem.config import Config

full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@full_disk
def test_a_full_stream_takes_every_write_and_keeps_its_error():
    with open("/dev/full", "w") as file:
        stream = SafeStream(file)
        for _ in range(3):
            stream.write("x" * 10_000)
            stream.flush()
        assert stream.error.strerror == "No space left on device"


def test_a_broken_pipe_takes_every_write_and_keeps_its_error():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        stream = SafeStream(file)
        stream.write("x")
        stream.flush()
        stream.write("y")
        stream.flush()
        assert isinstance(stream.error, BrokenPipeError)


def test_a_closed_stream_takes_every_write():
    file = io.StringIO()
    stream = SafeStream(file)
    file.close()
    assert stream.write("x") == 1 and stream.error


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_stream_of_another_encoding_writes_escapes(encoding):
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, encoding=encoding))
    stream.write("Löw 北京 \ud800")
    stream.flush()
    expected = r"L\xf6w \u5317\u4eac \ud800" if encoding == "ascii" else "Löw \\u5317\\u4eac \\ud800"
    assert raw.getvalue().decode(encoding) == expected and stream.error is None


def test_a_program_started_without_streams_gets_empty_ones_and_no_file_takes_their_numbers(tmp_path):
    program = (f"import sys; sys.path.insert(0, {str(runs.ROOT)!r})\n"
               "from nanomem.cli import safe_streams\n"
               "safe_streams()\n"
               "file = open('file', 'w'); file.write(f'{sys.stdin.read()!r} {file.fileno() > 2}')\n"
               "print('out'); print('err', file=sys.stderr)")
    code = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, program], cwd=tmp_path
    ).returncode
    assert code == 0 and (tmp_path / "file").read_text() == "'' True"


@pytest.mark.parametrize(
    "raised, code",
    [
        (UserError("no"), 2),
        (OSError("no"), 2),
        (SystemExit(0), 0),
        (SystemExit(), 0),
        (KeyboardInterrupt(), 130),
        (RuntimeError("can't allocate memory: 4 bytes\nat"), 2),
    ],
)
def test_every_way_out_goes_through_leave(raised, code, capsys):
    """Several processes can't leave by sys.exit."""
    left = []
    with one_line_errors(left.append):
        raise raised
    assert left == [code] and capsys.readouterr().err.count("\n") == (code == 2)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError


def test_a_message_with_line_ends_is_still_one_line(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError("there is no file a\nb")
    assert capsys.readouterr().err.endswith(": there is no file a b\n")


@dataclass
class Paths:
    folder: str = setting("auto", "a folder", section="Settings", path=True)
    text: str = setting("", "a text")


def test_a_tilde_is_the_home_folder_in_paths_and_itself_in_texts(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(Paths, ["--folder=~/my run", "--text=~/my run"]) == {
        "folder": f"{tmp_path}/my run",
        "text": "~/my run",
    }
    assert expand("a/~") == "a/~" and expand("~") == str(tmp_path) and expand("./~x") == "./~x"
    with pytest.raises(
        UserError, match="there is no user 'nobody-of-this-name'; a file of that name here is ./~nobody"
    ):
        parse(Paths, ["--folder=~nobody-of-this-name/x"])


def test_paths_of_train_py_are_paths():
    paths = {f for f in ("data", "out_dir", "tokenizer") if parse(Config, [f"--{f}=~"])[f] != "~"}
    assert paths == {"data", "out_dir", "tokenizer"}
