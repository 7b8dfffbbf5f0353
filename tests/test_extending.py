"""Adds the examples of docs/extending.md to a copy of the repository, and runs them there."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import runs


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the repository with every example in the file that its first line names."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("nanomem", "data/people", "data/world", "configs"):
        shutil.copytree(runs.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "kernels.py"):
        shutil.copy(runs.ROOT / name, root / name)
    page = (runs.ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"```python\n# (\S+)\n(.*?)```", page, re.DOTALL):
        with open(root / name, "a", encoding="utf-8") as file:
            file.write("\n\n" + code)
    return root


def python(root, *arguments):
    """The output of Python in the copy."""
    environment = os.environ | {"PYTHONPATH": str(root), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_layer_kind_and_a_data_set(extended):
    help_text = python(extended, "train.py", "--help")
    assert "flat" in help_text and "planets" in help_text
    tiny = [f for f in runs.TINY if not f.startswith(("--data", "--n_entities"))]
    extension = ["--ffn=flat", "--data=planets", "--max_iters=4", "--out_dir=run"]
    out = python(extended, "train.py", *tiny, *extension)
    assert "\n4 facts\n" in out and "1.00" in out.split("compared with")[1]
    assert '"mem_usage"' not in (extended / "run" / "metrics.jsonl").read_text()
    (extended / "more.jsonl").write_text('{"prompt": "The moon of Pluto is", "answer": "Charon"}\n')
    taught = ["--init_from=run", "--data=more.jsonl", "--max_iters=2", "--out_dir=taught", "--device=cpu"]
    python(extended, "train.py", *taught)
    assert '"train": "values"' in (extended / "taught" / "config.json").read_text()


def test_an_optimizer_and_a_kernel(extended):
    code = """
import torch
from nanomem.memory import MemoryTable
from nanomem.optim import RowSGD
table = MemoryTable(9, 4)
before = table.values.detach().clone()
table(torch.tensor([[1, 1, 3]]), torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
RowSGD([table.values], lr=0.1).step()
change = (table.values.detach() - before)[:, 0]
torch.testing.assert_close(change, torch.tensor([0, -0.3, 0, -0.3, 0, 0, 0, 0, 0]))
try:
    import triton
except ModuleNotFoundError:
    raise SystemExit
from nanomem import kernels
rows = torch.tensor([2, 0])
torch.testing.assert_close(kernels.row_norms(before, rows), before[rows].norm(dim=1))
"""
    python(extended, "-c", code)
