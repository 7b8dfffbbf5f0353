"""
Kills training with SIGKILL at random moments until it has been killed KILLS times and has ended, then
compares weights, to the bit, and metrics with those of a run left alone. One process is started again with
--resume; of several, which torchrun starts again by itself, a random one is killed.

    python tests/kill_and_resume.py [KILLS [PROCESSES]]
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import runs

from nanomem import checkpoint

LONG = [
    "--max_iters=80",
    "--eval_interval=2",
]  # a checkpoint every other iteration: many kills fall into writing one


def kill_and_resume(folder, kills, seed=0):
    """Raises AssertionError if a killed run can't be resumed or doesn't end as the one left alone."""
    rng = random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    begin = time.perf_counter()
    runs.start("train.py", *runs.TINY, *LONG, f"--out_dir={alone}").communicate()
    whole = time.perf_counter() - begin
    for number in range(kills):
        process = runs.start("train.py", *runs.TINY, *LONG, f"--out_dir={killed}", *resume(killed))
        time.sleep(rng.uniform(0.1, whole))
        process.kill()
        out, err = process.communicate()
        assert process.returncode in (-9, 0), f"kill {number}: exit code {process.returncode}\n{out}\n{err}"
        print(
            f"kill {number + 1}: {'it had ended' if process.returncode == 0 else 'killed'}, "
            f"{checkpoints(killed)}",
            flush=True,
        )
        if process.returncode == 0:  # it came to its end before the kill: begin anew
            check(alone, killed)
            shutil.rmtree(killed)
    runs.train(killed, *LONG, *resume(killed))
    check(alone, killed)


def resume(out_dir):
    """--resume, once there is a checkpoint."""
    return ["--resume"] if checkpoint.folders(out_dir) else []


def kill_ranks(folder, kills, processes, seed=0):
    """Raises AssertionError if a run of several processes, a random one of which is killed again and again,
    doesn't end, or not as the one left alone.
    """
    rng = random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    begin = time.perf_counter()
    assert launch(alone, processes, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait() == 0
    whole = time.perf_counter() - begin
    number = 0
    while number < kills:
        shutil.rmtree(killed, ignore_errors=True)
        with open(folder / "log", "w") as log:
            torchrun = launch(killed, processes, stdout=log, stderr=log)
            try:
                while number < kills and torchrun.poll() is None:
                    time.sleep(rng.uniform(0, whole))
                    ranks = subprocess.run(
                        ["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True
                    ).stdout.split()
                    if ranks:
                        number += subprocess.run(["kill", "-9", rng.choice(ranks)]).returncode == 0
                        print(f"kill {number}: {checkpoints(killed)}", flush=True)
                code = torchrun.wait(timeout=20 * whole)
            finally:
                torchrun.terminate()
        assert code == 0, (folder / "log").read_text()[-3000:]
        check(alone, killed)
        print(f"ended as the one left alone, loss {runs.metrics(killed)[-1]['val_loss']}", flush=True)


def launch(out_dir, processes, **options):
    """A running torchrun of train.py."""
    return runs.start(
        "train.py", *runs.TINY, *LONG, f"--out_dir={out_dir}", processes=processes, restarts=10**6, **options
    )


def checkpoints(out_dir):
    """The names of a run's checkpoints, whole or being written."""
    return " ".join(sorted(path.name for path in out_dir.glob("checkpoint-*"))) or "no checkpoint"


def check(alone, killed):
    """Both runs have the same tensors, bit for bit, and the same metrics."""
    expected, found = runs.checkpoint(alone), runs.checkpoint(killed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name].equal(found[name]), name
    assert runs.metrics(alone) == runs.metrics(killed)


if __name__ == "__main__":
    kills, processes = map(int, (sys.argv[1:] + ["20", "1"][len(sys.argv) - 1:])[:2])
    with tempfile.TemporaryDirectory() as folder:
        if processes == 1:
            kill_and_resume(Path(folder), kills)
        else:
            kill_ranks(Path(folder), kills, processes)
    print("every run ended as the one left alone")
