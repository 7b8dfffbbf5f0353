"""
Kills training with SIGKILL at random moments and resumes it, again and again, until the run has been killed KILLS times
and has ended; then compares its weights, to the bit, with those of a run left alone.

    python tests/kill_and_resume.py [KILLS]
"""

import random
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
import runs

FILE = "checkpoint.safetensors"
LONG = ["--max_iters=80", "--eval_interval=2"]  # a checkpoint every other iteration: many kills fall into writing one


def kill_and_resume(folder, kills, seed=0):
    """Raises AssertionError if a killed run can't be resumed or doesn't end as the one left alone."""
    rng = random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    begin = time.perf_counter()
    runs.start("train.py", *runs.TINY, *LONG, f"--out_dir={alone}").communicate()
    whole = time.perf_counter() - begin
    for number in range(kills):
        process = runs.start("train.py", *runs.TINY, *LONG, f"--out_dir={killed}", "--resume")
        time.sleep(rng.uniform(0.1, whole))
        process.kill()
        out, err = process.communicate()
        assert process.returncode in (-9, 0), f"kill {number}: exit code {process.returncode}\n{out}\n{err}"
        rows = runs.metrics(killed) if (killed / "metrics.jsonl").exists() and process.returncode == 0 else []
        print(f"kill {number + 1}: {'it had ended' if process.returncode == 0 else 'killed'}, checkpoint: {(killed / FILE).exists()}", flush=True)
        if rows:  # it came to its end before the kill: begin anew
            check(alone, killed)
            for file in killed.iterdir():
                file.unlink()
    runs.train(killed, *LONG, "--resume")
    check(alone, killed)


def check(alone, killed):
    """Both runs have the same tensors, bit for bit, and the same metrics."""
    expected, found = load_file(alone / FILE), load_file(killed / FILE)
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name].equal(found[name]), name
    assert runs.metrics(alone) == runs.metrics(killed)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kill_and_resume(Path(folder), int(sys.argv[1]) if len(sys.argv) > 1 else 20)
    print("every run could be resumed, and ended as the one left alone")
