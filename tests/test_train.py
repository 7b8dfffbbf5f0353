import json
import shutil
import signal
import time

import pytest
import torch
import runs
from kill_and_resume import check, kill_and_resume


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(out_dir, output) of a run of 20 iterations."""
    out_dir = tmp_path_factory.mktemp("runs") / "whole"
    return out_dir, runs.train(out_dir, "--max_iters=20")[0]


def test_a_run_tells_what_it_does_and_what_it_knows(finished):
    out_dir, out = finished
    assert "parameters" in out and "FLOPs a token" in out and "100 facts" in out
    assert "never asked" in out and "taught wording" in out and "always the most frequent" in out and "truth" in out
    assert "\x1b" not in out  # not a terminal: plain lines


def test_metrics(finished):
    rows = runs.metrics(finished[0])
    assert [row["iter"] for row in rows] == [2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]
    last = rows[-1]
    assert last["tokens"] == 20 * 4 * 32
    for name in ("train_loss", "val_loss", "recall", "recall_head", "recall_torso", "recall_tail", "recall_select",
                 "recall_taught", "mem_usage", "mem_kl"):
        assert isinstance(last[name], float), name
    assert json.loads((finished[0] / "config.json").read_text())["n_embd"] == 16


def test_ctrl_c_saves_and_the_resumed_run_equals_an_uninterrupted_one(tmp_path):
    settings = ["--max_iters=120", "--dropout=0.1", "--gradient_accumulation_steps=2", "--eval_interval=20"]
    runs.train(tmp_path / "alone", *settings)
    process = runs.start("train.py", *runs.TINY, *settings, f"--out_dir={tmp_path / 'cut'}")
    while not (tmp_path / "cut" / "checkpoint-20").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"python train.py --resume --out_dir={tmp_path / 'cut'}" in out
    assert 20 <= runs.metrics(tmp_path / "cut")[-1]["iter"] < 120
    out, _ = runs.run("train.py", "--resume", f"--out_dir={tmp_path / 'cut'}")  # its settings come from the checkpoint
    assert "going on from iteration" in out
    check(tmp_path / "alone", tmp_path / "cut")


def test_killed_and_resumed(tmp_path):
    kill_and_resume(tmp_path, kills=2)


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
    assert f"{path} has 1,000 bytes" in out and "checkpoint-15" in out and "going on from iteration 15" in out
    check(finished[0], tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*/part-*"):
        path.unlink()
    for script in ("train.py", "sample.py"):
        _, err = runs.run(script, *["--resume"][:script == "train.py"], f"--out_dir={tmp_path / 'run'}", code=2)
        assert "no checkpoint in" in err and "part-1-of-1.safetensors is missing" in err and err.count("\n") == 1


def test_dense_and_memory_take_equal_flops(finished, tmp_path):
    out, _ = runs.train(tmp_path / "dense", "--max_iters=2", "--ffn=dense")
    flops = [float(text.split(" million FLOPs")[0].split()[-1]) for text in (out, finished[1])]
    assert flops[0] == pytest.approx(flops[1], rel=0.02)
    assert "mem_usage" not in runs.metrics(tmp_path / "dense")[-1]


@pytest.mark.parametrize("arguments, message", [
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
    (["--seed=99999999999999999999999"], "seed must be under"),
    (["--mem_n_keys=99999999999"], "mem_n_keys must be under 4,194,304"), (["--batch_size=100000000"], "GB for their logits alone"),
    (["--data=."], "must be prepared first: python data/prepare.py . --out=data/mine"),
    (["--data=nothing.parquet"], "must be prepared first"),
    (["--device=tpu"], "--device=tpu is not on this machine"),
    (["--n_entities=10000000"], "n_entities for data=people must be from 4 to"),
])
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
    _, err = runs.train(tmp_path / "run", "--resume", "--max_iters=50", "--learning_rate=1e30", "--grad_clip=0", "--eval_interval=1", code=1)
    assert "loss is nan at iteration" in err and "Traceback" not in err
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-5'}" in err
    assert (tmp_path / "run" / "checkpoint-5" / "part-1-of-1.safetensors").read_bytes() == good


def test_a_table_larger_than_the_machine_is_refused(tmp_path):
    _, err = runs.train(tmp_path / "run", "--mem_n_keys=3000000", code=2)
    assert "mem_n_keys=3000000 makes tables of" in err and err.count("\n") == 1


def test_accumulated_batches_train_like_one_large_batch(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("abcdefgh" * 100)
    for name, steps in (("one", 1), ("four", 4)):
        runs.train(tmp_path / name, f"--data={path}", "--max_iters=2", "--learning_rate=0", "--min_lr=0", "--mem_lr=0", "--log_interval=1",
                   f"--gradient_accumulation_steps={steps}")
    losses = [runs.metrics(tmp_path / name)[0]["train_loss"] for name in ("one", "four")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # a mean over the passes, not their sum


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
    path.write_text("other words in the file since, of the same length or so\n" * 100)
    runs.train(tmp_path / "run", *bpe, "--max_iters=10", "--resume")
    path.unlink()  # asking the model needs no data
    out, _ = runs.run("sample.py", f"--out_dir={tmp_path / 'run'}", "--start=the cat", "--max_new_tokens=3")
    assert "the cat" in out


def test_users_text_is_shown_as_it_is(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "Close [/b] :smile: tag?", "answer": "[red]caf\u00e9"}\n')
    out, _ = runs.train(tmp_path / "run", f"--data={path}", "--max_iters=5", "--block_size=64")
    assert "Close [/b] :smile: tag?" in out and "[red]café" in out
    out, _ = runs.run("sample.py", f"--out_dir={tmp_path / 'run'}", "--start=[/b] é \\", "--trace", "--max_new_tokens=2")
    assert "[/b] é \\" in out


def test_the_deterministic_flag_runs(tmp_path):
    runs.train(tmp_path / "run", "--max_iters=2", "--deterministic")
    torch.use_deterministic_algorithms(False)


def test_own_facts(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Who has locker {i}?", "answer": [name, name.lower()]}) + "\n"
                            for i, name in enumerate(("Ada", "Grace", "Alan"))))
    out, _ = runs.train(tmp_path / "run", f"--data={path}", "--max_iters=150", "--learning_rate=1e-2", "--mem_lr=3e-2")
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
