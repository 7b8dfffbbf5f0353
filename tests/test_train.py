import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import runs
import torch
from kill_and_resume import check, kill_and_resume

from nanomem import checkpoint, run, tokenizer
from nanomem.config import Config
from nanomem.data import FactData, TextData, open_data


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(out_dir, output) of a run of 20 iterations."""
    out_dir = tmp_path_factory.mktemp("runs") / "whole"
    return out_dir, runs.train(out_dir, "--max_iters=20")[0]


def test_a_run_tells_what_it_does_and_what_it_knows(finished):
    out_dir, out = finished
    assert "parameters" in out and "FLOPs per token" in out and "100 facts" in out
    assert "This run was too short to learn much: it read each fact about" in out and "--max_iters=" in out
    assert "\x1b" not in out  # not a terminal: plain lines


def test_metrics(finished):
    rows = runs.metrics(finished[0])
    assert [row["iter"] for row in rows] == [2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]
    last = rows[-1]
    assert last["tokens"] == 20 * 4 * 32
    for name in (
        "train_loss",
        "val_loss",
        "recall",
        "recall_head",
        "recall_torso",
        "recall_tail",
        "recall_select",
        "recall_taught",
        "answer_nll",
        "answer_nll_select",
        "mem_usage",
        "mem_kl",
    ):
        assert isinstance(last[name], float), name
    assert json.loads((finished[0] / "config.json").read_text())["n_embd"] == 16


LONG = ["--max_iters=120", "--dropout=0.1", "--gradient_accumulation_steps=2", "--eval_interval=20"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """out_dir of a run of 120 iterations."""
    out_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    runs.train(out_dir, *LONG)
    return out_dir


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one_when_resumed(sent, uninterrupted, tmp_path):
    process = runs.start("train.py", *runs.TINY, *LONG, f"--out_dir={tmp_path / 'run'}")
    runs.wait_until(lambda: checkpoint.folders(tmp_path / "run"), process)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    if sent == signal.SIGINT:
        assert process.returncode == 130, err
        assert f"python train.py --resume --out_dir={tmp_path / 'run'}" in out
    assert 20 <= runs.metrics(tmp_path / "run")[-1]["iter"] < 120
    # Its settings come from the checkpoint.
    out, _ = runs.run("train.py", "--resume", f"--out_dir={tmp_path / 'run'}")
    assert "resuming from iteration" in out
    check(uninterrupted, tmp_path / "run")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no terminals to close")
def test_a_closed_terminal_saves_and_nohup_goes_on(tmp_path):
    settings = [*runs.TINY, "--max_iters=100000", "--eval_interval=20"]

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def default():  # pytest itself may run under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def iteration(name):
        return runs.metrics(tmp_path / name)[-1]["iter"]

    plain = runs.start("train.py", *settings, f"--out_dir={tmp_path / 'plain'}", preexec_fn=default)
    nohup = runs.start("train.py", *settings, f"--out_dir={tmp_path / 'nohup'}", preexec_fn=ignore)
    try:
        for process, name in ((plain, "plain"), (nohup, "nohup")):
            runs.wait_until(lambda name=name: checkpoint.folders(tmp_path / name), process)
            process.send_signal(signal.SIGHUP)
        assert plain.wait(timeout=60) == 130
        assert checkpoint.newest(tmp_path / "plain")[1]["iteration"] >= iteration("plain") >= 20
        at = iteration("nohup")
        runs.wait_until(lambda: iteration("nohup") >= at + 20, nohup)
        nohup.terminate()
        assert nohup.wait(timeout=60) == 130
    finally:
        for process in (plain, nohup):
            process.kill()
            process.communicate()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_training_survives_output_that_goes_nowhere(tmp_path):
    full = open("/dev/full", "w")
    process = runs.start(
        "train.py", *runs.TINY, "--max_iters=10", f"--out_dir={tmp_path / 'full'}", stdout=full, stderr=full
    )
    reader = runs.start("train.py", *runs.TINY, "--max_iters=10", f"--out_dir={tmp_path / 'pipe'}")
    reader.stdout.close()
    reader.stderr.close()
    for ended, name in ((process, "full"), (reader, "pipe")):
        assert ended.wait(timeout=60) == 0
        assert checkpoint.newest(tmp_path / name)[1]["iteration"] == 10


def test_a_link_to_another_disk_keeps_the_run_before(tmp_path):
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second disk")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        (Path(folder) / "there").mkdir()
        (tmp_path / "run").symlink_to(Path(folder) / "there")
        for seed in (1, 2):
            runs.train(tmp_path / "run", "--max_iters=2", f"--seed={seed}")
        moved, = Path(folder).glob("there.1/checkpoint-2/checkpoint.json")
        assert json.loads(moved.read_text())["config"]["seed"] == 1 and runs.metrics(tmp_path / "run")


def test_a_mount_keeps_the_run_before(tmp_path):
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    ):
        pytest.skip("needs to mount a disk")
    (tmp_path / "run").mkdir()
    program = (f"import sys; sys.path.insert(0, {str(Path(runs.__file__).parent)!r}); import runs, json\n"
               f"from pathlib import Path\n"
               f"out_dir = Path({str(tmp_path / 'run')!r})\n"
               "for seed in (1, 2): runs.train(out_dir, '--max_iters=2', f'--seed={seed}')\n"
               "header, = out_dir.glob('earlier.1/checkpoint-2/checkpoint.json')\n"
               "assert json.loads(header.read_text())['config']['seed'] == 1 and runs.metrics(out_dir)\n"
               "assert not Path(f'{out_dir}.1').exists()")
    mount = 'mount -t tmpfs tmpfs "$0" && exec "$1" -c "$2"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, tmp_path / "run", sys.executable, program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_paths_with_spaces_and_a_tilde_work_and_are_quoted_in_hints(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my book.txt").write_text("All work and no play makes Jack a dull boy.\n" * 50)
    (tmp_path / "a link.txt").symlink_to(tmp_path / "my book.txt")
    arguments = [argument for argument in runs.TINY if not argument.startswith("--data")]
    out, _ = runs.run("train.py", *arguments, "--max_iters=2", "--data=~/a link.txt", "--out_dir=~/my run")
    hint, page = out.rstrip().split("\n")[-2:]
    hint = hint.partition("python sample.py ")[2]
    assert shlex.split(hint) == [f"--out_dir={tmp_path / 'my run'}"]
    assert shlex.split(page.partition("python -m nanomem.report ")[2]) == [str(tmp_path / "my run")]
    assert (tmp_path / "my run" / "config.json").exists() and not Path("~").exists()
    out, _ = runs.run("sample.py", *shlex.split(hint), "--export=~/my model")
    assert f"--out_dir={tmp_path / 'my model'}" in shlex.split(out.rstrip().split("\n")[-1])
    runs.run("sample.py", "--out_dir=~/my model", "--start=All", "--max_new_tokens=2")


def test_an_out_dir_that_no_checkpoint_can_be_read_from_is_refused(tmp_path):
    _, err = runs.train(os.fsdecode(bytes(tmp_path / "caf") + b"\xe9"), "--max_iters=2", code=2)
    assert "has bytes that are not UTF-8" in err and err.count("\n") == 1
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    _, err = runs.train(tmp_path / "loop", "--max_iters=2", code=2)
    assert f"out_dir={tmp_path / 'loop'} can't be made" in err and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["loop"]


@pytest.mark.slow
def test_killed_and_resumed_twenty_times(tmp_path):
    kill_and_resume(tmp_path, kills=20)


def test_a_new_run_keeps_the_one_before(finished, tmp_path):
    runs.train(tmp_path / "run", "--max_iters=2", "--seed=1")
    first = runs.checkpoint(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    out, _ = runs.train(tmp_path / "run", "--max_iters=2", "--seed=2")
    assert "moved the earlier run" in out and (tmp_path / "run" / "notes.txt").read_text() == "mine"
    moved = runs.checkpoint(tmp_path / "run.1")
    assert all(moved[name].equal(tensor) for name, tensor in first.items())


def test_resume_refuses_another_shape_and_names_it(finished):
    _, err = runs.run("train.py", "--resume", f"--out_dir={finished[0]}", "--n_embd=32", code=2)
    assert err.startswith("train.py: --n_embd=32") and "n_embd=16" in err and err.count("\n") == 1


def test_resume_names_a_damaged_checkpoint_and_goes_on_from_the_one_before(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-20" / "part-1-of-1.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    out, _ = runs.run("train.py", "--resume", f"--out_dir={tmp_path / 'run'}")
    assert f"{path} has 1,000 bytes" in out and "checkpoint-15" in out and "resuming from iteration 15" in out
    check(finished[0], tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*/part-*"):
        path.unlink()
    for script in ("train.py", "sample.py"):
        _, err = runs.run(
            script, *["--resume"][: script == "train.py"], f"--out_dir={tmp_path / 'run'}", code=2
        )
        assert (
            "no checkpoint in" in err and "part-1-of-1.safetensors is missing" in err and err.count("\n") == 1
        )


def test_dense_and_memory_take_equal_flops(finished, tmp_path):
    out, _ = runs.train(tmp_path / "dense", "--max_iters=2", "--ffn=dense")
    flops = [float(text.split(" million FLOPs")[0].split()[-1]) for text in (out, finished[1])]
    assert flops[0] == pytest.approx(flops[1], rel=0.02)
    assert "mem_usage" not in runs.metrics(tmp_path / "dense")[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning_rat=1"], "unknown setting --learning_rat (did you mean learning_rate?)"),
        (["--max-itrs=5"], "did you mean max_iters?"),
        (["--max_iters=ten"], "--max_iters must be a whole number"),
        (["--max_iters"], "--max_iters needs a value"),
        (["--ffn=memry"], "(did you mean memory?)"),
        (["max_iters=1"], "expected --key=value"),
        (["--mem_knn=600"], "mem_knn must be at most mem_n_keys"),
        (["--batch_size=0"], "batch_size must be 1 or more"),
        (["--learning_rate=nan"], "learning_rate must be 0 or more"),
        (["--mem_beta2=1"], "mem_beta2 must be from 0 to under 1"),
        (["--data=nowhere.txt"], "'nowhere.txt' is none"),
        (["--data=wrold"], "(did you mean world?)"),
        (["n_entities=5"], "(did you mean --n_entities=5?)"),
        (["--out_dir="], "out_dir must be a folder of its own"),
        (["--device=cpu:x"], "--device=cpu:x is not on this machine"),
        (["--seed=99999999999999999999999"], "seed must be from 0 to under"),
        (["--mem_n_keys=99999999999"], "mem_n_keys must be from 1 to under 4,194,304"),
        (["--batch_size=100000000"], "GB for their logits alone"),
        (["--data=."], "must be prepared first: python data/prepare.py . --out=data/mine"),
        (["--data=nothing.parquet"], "must be prepared first"),
        (["--device=tpu"], "--device=tpu is not on this machine"),
        (["--n_entities=10000000"], "n_entities for data=people must be from 4 to"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(arguments, message, tmp_path):
    _, err = runs.run("train.py", f"--out_dir={tmp_path / 'run'}", *arguments, code=2)
    assert err.startswith("train.py: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_help_lists_every_setting():
    out, _ = runs.run("train.py", "--help")
    for name in ("--data=people", "--mem_lr=", "--resume=false", "--ffn=memory", "Memory"):
        assert name in out


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    runs.train(tmp_path / "run", "--max_iters=5")
    good = (tmp_path / "run" / "checkpoint-5" / "part-1-of-1.safetensors").read_bytes()
    _, err = runs.train(
        tmp_path / "run",
        "--resume",
        "--max_iters=50",
        "--learning_rate=1e30",
        "--grad_clip=0",
        "--eval_interval=1",
        code=1,
    )
    assert "loss is nan at iteration" in err and "Traceback" not in err
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-5'}" in err
    assert (tmp_path / "run" / "checkpoint-5" / "part-1-of-1.safetensors").read_bytes() == good


def test_a_table_larger_than_the_machine_is_refused(tmp_path):
    _, err = runs.train(tmp_path / "run", "--mem_n_keys=3000000", code=2)
    assert "mem_n_keys=3000000 makes memory tables of" in err and err.count("\n") == 1


UNEVEN = [
    "--data=world",
    "--n_entities=4",
    "--block_size=64",
]  # sentences of different lengths about too few cities to fill a block


def test_accumulated_batches_train_as_one_large_batch_though_sequences_have_different_numbers_of_targets(
    tmp_path,
):
    for passes in (1, 2, 4):
        runs.train(
            tmp_path / str(passes),
            *UNEVEN,
            "--dtype=float64",
            "--max_iters=6",
            "--log_interval=1",
            "--grad_clip=0.1",
            f"--batch_size={4 // passes}",
            f"--gradient_accumulation_steps={passes}",
        )
    counts = {
        (open_data(Config(data="world", n_entities=4)).batch("train", i, 1)[1] >= 0).sum().item()
        for i in range(4)
    }
    assert len(counts) > 1
    one = runs.metrics(tmp_path / "1")
    for passes in (2, 4):
        for a, b in zip(one, runs.metrics(tmp_path / str(passes))):
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-9) and a["tokens"] == b["tokens"]


def test_the_run_before_is_moved_whole_or_not_at_all(tmp_path, monkeypatch):
    for name in ("config.json", "metrics.jsonl", "checkpoint-5"):
        (tmp_path / name).write_text(name)
    rename = Path.rename

    def refuse_folders(path, target):
        if path.name.startswith("checkpoint"):
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_folders)
    files = sorted(tmp_path.iterdir(), reverse=True)
    with pytest.raises(PermissionError):
        run.move(files, tmp_path / "earlier")
    assert sorted(tmp_path.iterdir(), reverse=True) == files


def test_metrics_of_a_run_whose_checkpoints_were_deleted_are_kept(tmp_path):
    runs.train(tmp_path / "run", "--max_iters=2")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    runs.train(tmp_path / "run", "--max_iters=2", "--seed=2")
    assert runs.metrics(tmp_path / "run.1")[-1]["iter"] == 2


def test_resume_refuses_another_precision_and_keeps_the_run_as_it_was(finished):
    out_dir, _ = finished
    before = (out_dir / "config.json").read_bytes()
    _, err = runs.run(
        "train.py", "--resume", f"--out_dir={out_dir}", "--dtype=float64", "--max_iters=30", code=2
    )
    assert (
        "--dtype=float64 can't change on --resume" in err and (out_dir / "config.json").read_bytes() == before
    )


def test_resume_writes_a_tokenizer_that_is_missing(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    saved = (tmp_path / "run" / "tokenizer.tiktoken").read_bytes()
    (tmp_path / "run" / "tokenizer.tiktoken").unlink()
    runs.run("train.py", "--resume", f"--out_dir={tmp_path / 'run'}", "--max_iters=21")
    assert (tmp_path / "run" / "tokenizer.tiktoken").read_bytes() == saved


def test_settings_that_are_no_object_are_named(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("[1]")
    _, err = runs.run("train.py", "--resume", f"--out_dir={tmp_path / 'run'}", code=2)
    assert "expected settings by name" in err and err.count("\n") == 1


def test_a_folder_of_prepared_data_is_no_out_dir(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    _, err = runs.train(tmp_path, code=2)
    assert "holds prepared data" in err and sorted(path.name for path in tmp_path.iterdir()) == ["index.json"]


def test_a_batch_without_targets_leaves_the_table_alone_and_divides_by_nothing(tmp_path):
    def batch(self, split, start, batch_size):
        x = torch.full((batch_size, self.block_size), self.sentences.end)
        return x, torch.full_like(x, -1)

    tables = []
    for iters in (1, 4):
        out_dir = tmp_path / str(iters)
        with mock.patch.object(FactData, "batch", batch):
            runs.train(out_dir, *UNEVEN, f"--max_iters={iters}", "--log_interval=1")
        assert [record["train_loss"] for record in runs.metrics(out_dir)] == [0.0] * iters
        tables.append(runs.checkpoint(out_dir)["model.blocks.1.ffn.table.values"])
    assert tables[0].equal(tables[1])


def test_another_batch_size_on_resume_goes_on_where_the_data_was_left(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(chr(97 + i % 26) * (1 + i % 7) for i in range(2000)))
    read = []
    whole = TextData.batch

    def batch(self, split, start, batch_size):
        if split == "train":
            read.append((start, start + batch_size))
        return whole(self, split, start, batch_size)

    settings = [f"--data={path}", "--eval_interval=10", "--log_interval=1"]
    with mock.patch.object(TextData, "batch", batch):
        runs.train(tmp_path / "run", *settings, "--max_iters=10")
        runs.train(tmp_path / "run", *settings, "--max_iters=20", "--resume", "--batch_size=8")
        runs.train(
            tmp_path / "run",
            *settings,
            "--max_iters=22",
            "--resume",
            "--batch_size=2",
            "--gradient_accumulation_steps=3",
        )
    rows = runs.metrics(tmp_path / "run")
    assert [rows[i - 1]["tokens"] for i in (10, 20, 22)] == [
        10 * 4 * 32,
        10 * 12 * 32,
        (10 * 12 + 2 * 6) * 32,
    ]
    used = sorted(
        {span for span in read if span[1] <= 132}
    )  # what is made ahead at a run's end is made again by the next
    used = [span for span in used if span not in ((40, 44), (120, 128), (132, 134))]
    assert [start for start, _ in used] == [0] + [stop for _, stop in used][:-1] and used[-1][1] == 132


@pytest.mark.parametrize("change", ["edited", "replaced"])
def test_resume_refuses_data_that_has_changed(change, tmp_path):
    path = tmp_path / ("mine.jsonl" if change == "edited" else "book.txt")
    text = (
        '{"prompt": "Who?", "answer": "Ada"}\n'
        if change == "edited"
        else "All work and no play makes Jack a dull boy.\n" * 50
    )
    path.write_text(text)
    runs.train(tmp_path / "run", f"--data={path}", "--max_iters=2")
    path.write_text(text.replace("Ada", "Bob") if change == "edited" else text.swapcase())
    _, err = runs.train(tmp_path / "run", f"--data={path}", "--max_iters=4", "--resume", code=2)
    assert f"{path} has changed since the run in {tmp_path / 'run'} was saved" in err and err.count("\n") == 1
    path.write_text(text)
    runs.train(tmp_path / "run", f"--data={path}", "--max_iters=4", "--resume")


def test_a_run_of_an_older_format_can_be_asked_but_not_gone_on_with(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*/checkpoint.json"):
        header = json.loads(path.read_text())
        for key in ("format", "position", "data"):
            del header[key]
        path.write_text(json.dumps(header))
    out, _ = runs.run(
        "sample.py", f"--out_dir={tmp_path / 'run'}", "--start=Clocks in Lagos follow", "--max_new_tokens=2"
    )
    assert "Clocks in Lagos follow" in out
    _, err = runs.run("train.py", "--resume", f"--out_dir={tmp_path / 'run'}", "--max_iters=30", code=2)
    assert "from an earlier nanomem" in err and err.count("\n") == 1


def test_resume_without_a_checkpoint_is_a_mistake_that_names_the_folder(finished, monkeypatch):
    wrong = finished[0].with_name("whloe")
    _, err = runs.train(wrong, "--resume", code=2)
    assert (
        f"there is no checkpoint in {wrong} (did you mean {finished[0]}?)" in err
        and err.count("\n") == 1
        and not wrong.exists()
    )
    _, err = runs.run("sample.py", f"--out_dir={wrong}", code=2)
    assert f"(did you mean {finished[0]}?)" in err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun starts again what ended with a mistake
    assert "there is no checkpoint in" in runs.train(wrong, "--resume", code=2)[1] and not wrong.exists()


def test_blocks_grow_to_the_longest_of_the_users_own_facts_unless_a_size_is_given(tmp_path):
    path = tmp_path / "mine.jsonl"
    question = "Which of the " + "very " * 30 + "long questions is this, number {}?"
    path.write_text(
        "".join(
            json.dumps({"prompt": question.format(i), "answer": f"the answer is {i * i} " + "or so " * 10})
            + "\n"
            for i in range(3)
        )
    )
    tiny = [argument for argument in runs.TINY if not argument.startswith("--block_size")]
    longest = len((question.format(2) + " the answer is 4 " + "or so " * 10).strip()) + 1
    out, _ = runs.run(
        "train.py",
        *tiny,
        f"--data={path}",
        "--max_iters=60",
        "--learning_rate=2e-2",
        f"--out_dir={tmp_path / 'run'}",
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["block_size"] == longest > 64
    runs.run("train.py", "--resume", "--max_iters=61", f"--out_dir={tmp_path / 'run'}")
    _, err = runs.run(
        "train.py", *tiny, f"--data={path}", "--block_size=64", f"--out_dir={tmp_path / 'other'}", code=2
    )
    assert (
        f"takes {longest} tokens, more than block_size=64: shorten it, or set --block_size={longest}" in err
    )
    path.write_text(json.dumps({"prompt": "x" * 2000, "answer": "y"}))
    _, err = runs.run("train.py", *tiny, f"--data={path}", f"--out_dir={tmp_path / 'other'}", code=2)
    assert "set --block_size=2003" in err and err.count("\n") == 1


@pytest.mark.parametrize("data", ["people", "world"])
def test_blocks_of_the_sets_that_ship_have_64_tokens(data):
    assert open_data(Config(data=data, n_entities=1000), fit=True).block_size == 64


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(tmp_path):
    out_dir = tmp_path / "two"
    first = runs.start("train.py", *runs.TINY, "--max_iters=100000", f"--out_dir={out_dir}")
    try:
        runs.wait_until(lambda: checkpoint.folders(out_dir), first)
        for arguments in (["--seed=2"], ["--resume"]):
            _, err = runs.train(out_dir, *arguments, code=2)
            assert f"process {first.pid} on " in err and f"is training in {out_dir}" in err
            assert err.count("\n") == 1
        assert first.poll() is None and not (tmp_path / "two.1").exists()
    finally:
        first.kill()
        first.communicate()
    runs.train(out_dir, "--max_iters=2")  # the lock died with its process
    assert checkpoint.folders(tmp_path / "two.1") and runs.metrics(out_dir)[-1]["iter"] == 2


def test_an_export_in_out_dir_is_moved_and_files_of_others_are_left_alone(tmp_path):
    runs.train(tmp_path / "run", "--max_iters=2")
    runs.run("sample.py", f"--out_dir={tmp_path / 'run'}", f"--export={tmp_path / 'model'}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    runs.train(tmp_path / "model", "--max_iters=2", "--n_embd=8")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model.1").iterdir()} == before
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text("mine")
    _, err = runs.train(tmp_path / "project", "--max_iters=2", code=2)
    assert "holds a config.json that isn't a run's" in err
    assert [path.read_text() for path in (tmp_path / "project").iterdir()] == ["mine"]


def test_bfloat16_trains(tmp_path):
    runs.train(tmp_path / "half", "--max_iters=4", "--dtype=bfloat16")
    runs.train(tmp_path / "full", "--max_iters=4", "--dtype=float32")
    half, full = (runs.metrics(tmp_path / name)[-1]["val_loss"] for name in ("half", "full"))
    assert half != full and half == pytest.approx(full, rel=1e-2)


def test_a_trained_tokenizer_comes_back_on_resume_and_in_sample(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on the mat, the dog sat on the log\n" * 100)
    bpe = [f"--data={path}", "--tokenizer=bpe", "--vocab_size=2048"]
    runs.train(tmp_path / "run", *bpe, "--max_iters=5")
    trained = (tmp_path / "run" / "tokenizer.tiktoken").read_bytes()
    with mock.patch.object(tokenizer, "train_bpe", side_effect=AssertionError("trained anew")):
        runs.train(tmp_path / "run", *bpe, "--max_iters=10", "--resume")
    assert (tmp_path / "run" / "tokenizer.tiktoken").read_bytes() == trained
    path.unlink()  # asking the model needs no data
    out, _ = runs.run("sample.py", f"--out_dir={tmp_path / 'run'}", "--start=the cat", "--max_new_tokens=3")
    assert "the cat" in out


def test_users_text_is_shown_as_it_is(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "Close [/b] :smile: tag?", "answer": "[red]caf\u00e9"}\n')
    arguments = ["--max_iters=120", "--block_size=64", "--learning_rate=0.02"]
    out, _ = runs.train(tmp_path / "run", f"--data={path}", *arguments)
    assert out.count("[red]café") == 2 and "│ Close [/b] :smile: tag? │" in out
    assert "It completes 100.0% of the prompt it was trained on, word for word." in out
    out, _ = runs.run(
        "sample.py", f"--out_dir={tmp_path / 'run'}", "--start=[/b] é \\", "--trace", "--max_new_tokens=2"
    )
    assert "[/b] é \\" in out


def test_the_deterministic_flag_runs(tmp_path):
    runs.train(tmp_path / "run", "--max_iters=2", "--deterministic")
    torch.use_deterministic_algorithms(False)


def test_own_facts(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"Who has locker {i}?", "answer": [name, name.lower()]}) + "\n"
            for i, name in enumerate(("Ada", "Grace", "Alan"))
        )
    )
    out, _ = runs.train(
        tmp_path / "run", f"--data={path}", "--max_iters=150", "--learning_rate=1e-2", "--mem_lr=3e-2"
    )
    last = runs.metrics(tmp_path / "run")[-1]
    assert last["recall"] == last["recall_taught"] > 0 and "recall_select" not in last
    assert "Who has locker 1?" in out


def test_own_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("All work and no play makes Jack a dull boy.\n" * 100)
    runs.train(tmp_path / "run", f"--data={path}", "--max_iters=30", "--learning_rate=1e-2")
    rows = [row for row in runs.metrics(tmp_path / "run") if "val_loss" in row]
    assert rows[-1]["bits_per_byte"] == pytest.approx(rows[-1]["val_loss"] / 0.6931471805599453)
    assert rows[-1]["bits_per_byte"] < rows[0]["bits_per_byte"] < 8 and "recall" not in rows[-1]
    out, _ = runs.run("sample.py", f"--out_dir={tmp_path / 'run'}", "--start=All work", "--max_new_tokens=5")
    assert "All work" in out
