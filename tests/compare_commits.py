"""
Trains two versions of nanomem with the same settings and compares all their metrics, to the last digit.

    python tests/compare_commits.py BEFORE [AFTER]     commits; without AFTER, the files as they are now

Run it after a change that should not change what is computed. It takes about three minutes on two cores.
The exit code is 1 if any run differs.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UPDATES = 200
TIMES = ("elapsed_s", "tokens_per_sec", "data_wait")
KINDS = {
    "memory": [],
    "dense": ["--ffn=dense"],
    "mixture of experts": ["--ffn=moe"],
    "PEER": ["--ffn=peer"],
    "cities": ["--data=world", "--n_entities=1000"],
    "text": ["--data=book.txt"],
}


def unpack(commit, folder):
    """Puts a commit's files into a folder."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def start(code, out_dir, settings, text):
    """train.py of the folder `code`, in a process of its own."""
    settings = [setting.replace("book.txt", str(text)) for setting in settings]
    settings += [f"--max_iters={UPDATES}", "--log_interval=1", "--eval_interval=100", f"--out_dir={out_dir}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)}
    command = [sys.executable, str(code / "train.py"), *settings]
    return subprocess.Popen(command, cwd=code, env=environment, stdout=subprocess.DEVNULL)


def metrics(out_dir):
    """What a run computed: metrics.jsonl without the times."""
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def first_difference(before, after):
    """The first number in which two runs differ, in words; None if they are equal."""
    for old, new in zip(before, after):
        for key in old.keys() | new.keys():
            if old.get(key) != new.get(key):
                return f"update {old['iter']}: {key} was {old.get(key)}, is {new.get(key)}"
    if len(before) != len(after):
        return f"{len(before)} lines of metrics before, {len(after)} after"
    return None


def main():
    """Compares the two versions named on the command line."""
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("expected one or two commits: python tests/compare_commits.py BEFORE [AFTER]")
    differs = False
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        before = unpack(sys.argv[1], folder / "before")
        after = unpack(sys.argv[2], folder / "after") if len(sys.argv) == 3 else ROOT
        text = before / "README.md"  # some text, the same for both
        for kind, settings in KINDS.items():
            out_dirs = [folder / f"{name} {kind}" for name in ("before", "after")]
            runs = [start(code, out_dir, settings, text) for code, out_dir in zip((before, after), out_dirs)]
            if any([run.wait() for run in runs]):
                sys.exit(f"{kind}: training failed")
            old, new = map(metrics, out_dirs)
            problem = first_difference(old, new)
            differs = differs or problem is not None
            print(f"{kind}: {problem or 'equal'} (train loss {new[-1]['train_loss']!r})", flush=True)
    sys.exit(int(differs))


if __name__ == "__main__":
    main()
