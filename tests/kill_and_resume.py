"""
Kills training with SIGKILL at random moments, KILLS times, and lets it end. Its weights and metrics must
equal, bit for bit, those of a run that was left alone.

    python tests/kill_and_resume.py [KILLS [PROCESSES]]

A single process is restarted with --resume. Of several, a random one is killed, and torchrun restarts all.
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

# A checkpoint every other iteration: many kills come while one is being written.
LONG = ["--max_iters=80", "--eval_interval=2"]


def kill_and_resume(folder, kills, seed=0):
    """Raises AssertionError if a killed run can't be resumed or doesn't end like the one left alone."""
    rng = random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    start = time.perf_counter()
    launch(alone).communicate()
    duration = time.perf_counter() - start
    for number in range(1, kills + 1):
        process = launch(killed, *resume(killed))
        time.sleep(rng.uniform(0.1, duration))
        process.kill()
        out, err = process.communicate()
        assert process.returncode in (-9, 0), f"kill {number}: exit code {process.returncode}\n{out}\n{err}"
        print(f"kill {number}: exit code {process.returncode}, {checkpoints(killed)}", flush=True)
        if process.returncode == 0:  # it ended before the kill: start over
            check(alone, killed)
            shutil.rmtree(killed)
    runs.train(killed, *LONG, *resume(killed))
    check(alone, killed)


def resume(out_dir):
    """--resume, once there is a checkpoint."""
    return ["--resume"] if checkpoint.folders(out_dir) else []


def kill_ranks(folder, kills, processes, seed=0):
    """The same for several processes: kills a random one of them again and again."""
    rng = random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    start = time.perf_counter()
    process = launch(alone, processes=processes)
    _, err = process.communicate()
    assert process.returncode == 0, err
    duration = time.perf_counter() - start
    number = 0
    while number < kills:
        shutil.rmtree(killed, ignore_errors=True)
        with open(folder / "log", "w") as log:
            torchrun = launch(killed, processes=processes, stdout=log, stderr=log)
            try:
                while number < kills and torchrun.poll() is None:
                    time.sleep(rng.uniform(0, duration))
                    if kill_one_of(torchrun, rng):
                        number += 1
                        print(f"kill {number}: {checkpoints(killed)}", flush=True)
                code = torchrun.wait(timeout=20 * duration)
            finally:
                torchrun.terminate()
        assert code == 0, (folder / "log").read_text()[-3000:]
        check(alone, killed)
        print(f"ended like the one left alone, loss {runs.metrics(killed)[-1]['val_loss']}", flush=True)


def kill_one_of(torchrun, rng):
    """Kills a random one of torchrun's processes. Returns whether there was one to kill."""
    children = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True)
    ranks = children.stdout.split()
    return bool(ranks) and subprocess.run(["kill", "-9", rng.choice(ranks)]).returncode == 0


def launch(out_dir, *arguments, **options):
    """A running train.py, or torchrun of it that restarts killed processes."""
    arguments = [*runs.TINY, *LONG, f"--out_dir={out_dir}", *arguments]
    return runs.start("train.py", *arguments, restarts=10**6, **options)


def checkpoints(out_dir):
    """The names of a run's checkpoints, finished or being written."""
    return " ".join(sorted(path.name for path in out_dir.glob("checkpoint-*"))) or "no checkpoint"


def check(alone, killed):
    """Both runs must have the same tensors, bit for bit, and the same metrics."""
    expected, found = runs.checkpoint(alone), runs.checkpoint(killed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name].equal(found[name]), name
    assert runs.metrics(alone) == runs.metrics(killed)


if __name__ == "__main__":
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    processes = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory() as folder:
        if processes == 1:
            kill_and_resume(Path(folder), kills)
        else:
            kill_ranks(Path(folder), kills, processes)
    print("every run ended like the one left alone")
