import json
import shutil

import pytest
import runs
import torch
import torch.distributed as dist
from kill_and_resume import kill_ranks

from nanomem import sharding
from nanomem.cli import UserError
from nanomem.memory import MemoryTable

SMALL = [
    "--device=cpu",
    "--dtype=float64",
    "--n_layer=2",
    "--n_embd=24",
    "--n_head=2",
    "--block_size=32",
    "--batch_size=12",
    "--mem_layers=0,1",
    "--mem_n_keys=8",
    "--mem_knn=2",
    "--mem_heads=2",
    "--eval_iters=1",
    "--eval_interval=20",
    "--log_interval=1",
    "--warmup_iters=2",
    "--max_iters=20",
    "--grad_clip=0.2",
]
OPTIONS = {
    "shared table": [],
    "tables of their own": ["--mem_share_values=false", "--mem_gated=false", "--mem_qk_norm=false"],
    "2 passes": ["--gradient_accumulation_steps=2"],
    "3 passes": ["--gradient_accumulation_steps=3"],
    "no clipping": ["--grad_clip=0"],
    "dense": ["--ffn=dense"],
    "mixture of experts": ["--ffn=moe", "--moe_experts=12", "--moe_hidden=4", "--moe_k=1"],
    "PEER": ["--ffn=peer"],
    "PEER, 2 passes": ["--ffn=peer", "--gradient_accumulation_steps=2"],
    # Its balance loss is of the tokens that are computed at once, which depend on how passes are shared
    # out.
    "mixture of experts, 2 passes": [
        "--ffn=moe",
        "--moe_experts=12",
        "--moe_hidden=4",
        "--moe_balance=0",
        "--gradient_accumulation_steps=2",
    ],
    "float32": ["--dtype=float32"],
    "bfloat16 table": ["--dtype=float32", "--mem_dtype=bfloat16"],
}
# Relative; 1e-9 otherwise, and tensors too. Some of PEER's rows have gradients that are next to nothing, of
# which RowAdam makes steps as large as any other's, rounding included.
LOSSES_WITHIN = {"float32": 1e-3, "bfloat16 table": 2e-2, "PEER": 1e-9, "PEER, 2 passes": 1e-9}


def torchrun(processes, function, argument):
    """The result of a function of workers.py in so many processes."""
    process = runs.start("tests/workers.py", function, json.dumps(argument), processes=processes)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """A few facts of different lengths, so that sequences have different numbers of targets."""
    path = tmp_path_factory.mktemp("facts") / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{name}'s locker is", "answer": str(i**9)}) + "\n"
                            for i, name in enumerate(("Ada", "Grace", "Alan"))))
    return path


@pytest.fixture(scope="module")
def alone(facts, tmp_path_factory):
    """option -> out_dir of one process's run"""
    folder = tmp_path_factory.mktemp("alone")
    found = {}

    def out_dir(option):
        if option not in found:
            runs.run("train.py", *SMALL, f"--data={facts}", *OPTIONS[option], f"--out_dir={folder / option}")
            found[option] = folder / option
        return found[option]
    return out_dir


def compare(processes, options, facts, alone, folder, *arguments):
    """Runs with each of the options must have one process's losses, and end with its tensors."""
    torchrun(
        processes,
        "train",
        [
            [*SMALL, f"--data={facts}", *OPTIONS[option], *arguments, f"--out_dir={folder / option}"]
            for option in options
        ],
    )
    for option in options:
        losses = [
            [row["train_loss"] for row in runs.metrics(out_dir)]
            for out_dir in (alone(option), folder / option)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=LOSSES_WITHIN.get(option, 1e-9)), option
        if option not in LOSSES_WITHIN:
            same_tensors(alone(option), folder / option)


def same_tensors(expected, found):
    """The newest checkpoints of two runs have equal tensors, to 1e-9 of their norm."""
    expected, found = runs.checkpoint(expected), runs.checkpoint(found)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name].double() - tensor.double()).norm() <= 1e-9 * tensor.double().norm(), name


def test_two_processes_train_as_one(facts, alone, tmp_path):
    compare(
        2,
        ["shared table", "2 passes", "float32", "bfloat16 table", "mixture of experts", "PEER"],
        facts,
        alone,
        tmp_path,
    )


def test_two_groups_of_two_train_as_one(facts, alone, tmp_path):
    compare(4, ["shared table", "tables of their own", "float32"], facts, alone, tmp_path, "--mem_parallel=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, mem_parallel", [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1), (4, 2)]
)
def test_any_number_of_processes_trains_as_one(processes, mem_parallel, facts, alone, tmp_path):
    compare(processes, OPTIONS, facts, alone, tmp_path, f"--mem_parallel={mem_parallel}")


def test_a_run_of_four_goes_on_in_two_and_in_one(facts, alone, tmp_path):
    out_dir = tmp_path / "run"
    torchrun(4, "train", [[*SMALL, f"--data={facts}", "--eval_interval=10", f"--out_dir={out_dir}"]])
    assert len(list((out_dir / "checkpoint-20").glob("part-*"))) == 4
    shutil.rmtree(out_dir / "checkpoint-20")  # as if it had been stopped at 10
    torchrun(2, "train", [["--resume", f"--out_dir={out_dir}"]])
    assert len(list((out_dir / "checkpoint-20").glob("part-*"))) == 2
    same_tensors(alone("shared table"), out_dir)
    shutil.rmtree(out_dir / "checkpoint-20")
    runs.run("train.py", "--resume", f"--out_dir={out_dir}")
    same_tensors(alone("shared table"), out_dir)
    out, _ = runs.run(
        "sample.py",
        f"--out_dir={out_dir}",
        "--device=cpu",
        "--start=Ada's locker is",
        "--max_new_tokens=3",
        "--trace",
    )
    assert "Ada's locker is" in out


def test_a_step_sends_what_the_formula_says_and_parts_of_tables_shrink():
    for G, result in zip((4, 2, 1), torchrun(4, "step_bytes", [4, 2, 1])):
        P, R, lookups, v_dim, b = 4, 4 // G, 2 * 3, 24, 4
        assert result["table"] == 12**2 * v_dim * b / G
        token = 2 * ((G - 1) * lookups * (4 + 2 * b) + (G - 1) / G * v_dim * 2 * b)  # two memory layers
        assert result["bytes per token"] == token
        rows = (G - 1) / G * 8 * result["rows"]
        if R > 1:
            rows += (R - 1) * 4 * result["rows of a group"] + (R - 1) / R * 2 * b * v_dim / G * result["rows"]
        assert result["sent"] == pytest.approx(
            result["tokens"] * token + P * rows + P * (P - 1) / P * 8 * result["core"]
        )


def test_a_replica_without_a_gradient_takes_part_with_an_empty_one():
    sparse, dense, none = torchrun(2, "replicas_without_a_gradient", {})
    assert sparse == [[0, 0], [3, 4], [0, 0], [0, 0], [6, 8], [0, 0]]
    assert dense == torch.eye(6)[:, 1:3].tolist()
    assert none == [[0, 0]] * 6


def test_a_dense_gradient_of_split_columns_moves_the_rows_that_any_process_has():
    moved = torch.tensor(torchrun(2, "dense_gradients_of_columns", {})).T
    expected = -0.1 * torch.tensor([[0.0, 0.0], [2**0.5, 0.0], [0.0, 2**0.5], [1.0, 1.0]])
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_processes_that_differ_are_told_so(tmp_path):
    told = torchrun(2, "disagree", str(tmp_path))
    expected = {
        "settings": "learning_rate is 0.1 in process 0 and 0.2 in process 1",
        "data": "data is",
        "file": "process 1: data must be",
        "share": "2 processes can't share batch_size=5",
        "columns": "values of 31 columns (mem_v_dim, or n_embd) can't be split over 2 processes; "
        "nearest: mem_v_dim=30 or 32",
        "group": "mem_parallel=5 must divide the number of processes, 2; nearest: 2 (0: all of them)",
    }
    for name, message in expected.items():
        assert message in told[name] and told[name].count("\n") == 1, told
    assert not list(tmp_path.glob("*/out"))


def test_a_wrong_setting_of_three_processes_is_one_line_and_exit_code_2(tmp_path):
    process = runs.start("train.py", "--learning_rat=1", f"--out_dir={tmp_path / 'run'}", processes=3)
    _, err = process.communicate(timeout=120)
    assert err.count("did you mean learning_rate?") == 1 and "Signal" not in err
    assert err.count("(pid: ") - err.count("of binary") == err.count("exitcode  : 2 ")


def test_a_full_disk_of_one_process_keeps_the_checkpoint_before(tmp_path):
    told = torchrun(2, "full_disk", str(tmp_path))
    assert "process 1: " in told and "checkpoint-1 is kept" in told
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.slow
def test_killed_ranks(tmp_path):
    kill_ranks(tmp_path, kills=5, processes=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nccl_in_one_process_equals_the_gpu_alone_and_its_checkpoint_moves_to_the_cpu(facts, tmp_path):
    arguments = ["--device=cuda", "--dtype=float32", f"--data={facts}"]
    runs.run("train.py", *SMALL, *arguments, f"--out_dir={tmp_path / 'alone'}")
    torchrun(1, "train", [[*SMALL, *arguments, f"--out_dir={tmp_path / 'nccl'}"]])
    losses = [[row["train_loss"] for row in runs.metrics(tmp_path / name)] for name in ("alone", "nccl")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torchrun(2, "train", [["--resume", "--device=cpu", "--max_iters=24", f"--out_dir={tmp_path / 'nccl'}"]])
    runs.run("train.py", "--resume", "--device=cuda", "--max_iters=28", f"--out_dir={tmp_path / 'nccl'}")


def test_shares_cover_every_sequence_once(monkeypatch):
    for processes, batch_size, passes in ((1, 5, 3), (2, 4, 1), (3, 4, 3), (4, 6, 2), (6, 6, 4), (8, 2, 8)):
        monkeypatch.setattr(sharding, "size", lambda n=processes: n)
        seen = []
        for rank in range(processes):
            monkeypatch.setattr(sharding, "rank", lambda n=rank: n)
            batches, rows = sharding.share_of_batch(batch_size, passes)
            seen += [(i, row) for i in batches for row in range(batch_size)[rows]]
        assert sorted(seen) == [(i, row) for i in range(passes) for row in range(batch_size)]
    with pytest.raises(
        UserError,
        match="8 processes can't share batch_size=6 x gradient_accumulation_steps=2 .*batch_size=4 or 8",
    ):
        sharding.share_of_batch(6, 2)


@pytest.fixture
def mesh():
    """One process in a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield sharding.make_mesh(torch.device("cpu"), 0)
    dist.destroy_process_group()


def test_a_group_of_one_reads_as_a_table(mesh):
    tables = []
    for make in (sharding.ShardedTable, lambda *shape, mesh: MemoryTable(*shape)):
        torch.manual_seed(0)
        tables.append(make(100, 6, mesh=mesh))
    indices, weights = torch.randint(100, (5, 4)), torch.rand(5, 4, requires_grad=True)
    results = []
    for table in tables:
        out = table(indices, weights)
        out.sum().backward()  # an expanded gradient
        results.append((out, weights.grad, table.values.grad.to_dense()))
        weights.grad = None
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_processes_started_again_go_on_and_a_new_launch_does_not(tmp_path, monkeypatch):
    arguments = ["--max_iters=5", f"--out_dir={tmp_path / 'run'}"]
    for launch, expected in (
        ("one", None),
        ("one", "resuming from iteration 5"),
        ("two", "moved the earlier run"),
        ("", "moved the earlier run"),
    ):
        monkeypatch.setattr(sharding, "_launch", launch)
        out, _ = runs.run("train.py", *runs.TINY, *arguments)
        assert ("moved" in out or "resuming" in out) == bool(expected) and (expected or "") in out
