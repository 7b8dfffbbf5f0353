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

SMALL = (
    "--device=cpu --dtype=float64 --n_layer=2 --n_embd=24 --n_head=2 --block_size=32 --batch_size=12 "
    "--mem_layers=0,1 --mem_n_keys=8 --mem_knn=2 --mem_heads=2 --eval_iters=1 --eval_interval=20 "
    "--log_interval=1 --warmup_iters=2 --max_iters=20 --grad_clip=0.2"
)
OPTIONS = {
    "shared table": "",
    "tables of their own": "--mem_share_values=false --mem_gated=false --mem_qk_norm=false",
    "2 passes": "--gradient_accumulation_steps=2 --mem_dropout=0.25",
    "3 passes": "--gradient_accumulation_steps=3",
    "no clipping": "--grad_clip=0",
    "dense": "--ffn=dense",
    "mixture of experts": "--ffn=moe --moe_experts=12 --moe_hidden=4 --moe_k=1",
    "PEER": "--ffn=peer",
    "PEER, 2 passes": "--ffn=peer --gradient_accumulation_steps=2",
    # Without balance loss, which sees the tokens of one process's pass: how passes are shared changes it.
    "mixture of experts, 2 passes":
        "--ffn=moe --moe_experts=12 --moe_hidden=4 --moe_balance=0 --gradient_accumulation_steps=2",
    "float32": "--dtype=float32",
    "bfloat16 table": "--dtype=float32 --mem_dtype=bfloat16",
}
TAUGHT = {
    "values": "--mem_top_slots=20",
    "values, 2 passes": "--gradient_accumulation_steps=2",
    "everything": "--train=all",
    "core": "--train=core",
}
# How far losses may be apart, relative; for all other options 1e-9, and then the tensors must agree too. In
# PEER some rows have gradients close to zero: RowAdam steps as far along their rounding errors as along any
# gradient. In float32 rounding decides which slots are chosen: losses differ as much as from float64's.
LOSSES_WITHIN = {"float32": 5e-3, "bfloat16 table": 2e-2, "PEER": 1e-9, "PEER, 2 passes": 1e-9}


def torchrun(*scenarios):
    """The results of scenarios (number of processes, function in workers.py, its arguments...) that one
    launch of torchrun runs one after the other. The number of processes may only fall.
    """
    process = runs.start("tests/workers.py", json.dumps(scenarios), processes=scenarios[0][0])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """A few facts of different lengths, so that sequences have different numbers of targets."""
    path = tmp_path_factory.mktemp("facts") / "mine.jsonl"
    path.write_text(
        '{"prompt": "Ada has", "answer": "0"}\n'
        '{"prompt": "Grace has", "answer": "1"}\n'
        '{"prompt": "Alan has", "answer": "512"}\n'
    )
    return path


def settings(option, facts, out_dir, *arguments):
    """train.py's arguments for a small run with one of the OPTIONS."""
    return [*SMALL.split(), f"--data={facts}", *OPTIONS[option].split(), *arguments, f"--out_dir={out_dir}"]


@pytest.fixture(scope="module")
def alone(facts, tmp_path_factory):
    """A function: option -> out_dir of its run in one process."""
    folder = tmp_path_factory.mktemp("alone")

    def out_dir_of(option):
        if not (folder / option).exists():
            runs.run("train.py", *settings(option, facts, folder / option))
        return folder / option
    return out_dir_of


def training(processes, options, facts, folder, *arguments):
    """A scenario: processes train with each of the options, into folder / option."""
    return processes, "train", *[settings(option, facts, folder / option, *arguments) for option in options]


def teaching(option, facts, base, out_dir):
    """train.py's arguments for teaching the model in base, with one of TAUGHT."""
    return [*SMALL.split(), f"--data={facts}", f"--init_from={base}", "--stop_at=0", *TAUGHT[option].split(),
            f"--out_dir={out_dir}"]


def losses(out_dir):
    return [record["train_loss"] for record in runs.metrics(out_dir) if "train_loss" in record]


def check_losses_and_tensors(options, alone, folder):
    """The runs in folder must have the losses of one process's runs, and end with its tensors."""
    for option in options:
        within = LOSSES_WITHIN.get(option, 1e-9)
        assert losses(folder / option) == pytest.approx(losses(alone(option)), rel=within), option
        if option not in LOSSES_WITHIN:
            check_tensors(alone(option), folder / option)


def check_tensors(expected, found):
    """The newest checkpoints of two runs must have equal tensors, to 1e-9 of their norm."""
    expected, found = runs.checkpoint(expected), runs.checkpoint(found)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name].double() - tensor.double()).norm() <= 1e-9 * tensor.double().norm(), name


BY_TWO = ["shared table", "2 passes", "float32", "bfloat16 table", "mixture of experts", "PEER"]
BY_TWO_GROUPS = ["shared table", "tables of their own", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes of `results` write."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def results(facts, folder, alone):
    """name -> result of every scenario of four or two processes. They share a launch, which saves starting
    processes and importing torch again and again.
    """
    full = folder / "full"
    full.mkdir()
    scenarios = {
        "two groups of two": training(4, BY_TWO_GROUPS, facts, folder / "groups", "--mem_parallel=2"),
        "run of four": training(4, ["shared table"], facts, folder / "four", "--eval_interval=10"),
        "bytes, 4 to a table": (4, "step_bytes", 4),
        "bytes, 2 to a table": (4, "step_bytes", 2),
        "bytes, 1 to a table": (4, "step_bytes", 1),
        "resumed": (2, "resume_at_10", str(folder / "four" / "shared table")),
        "two": training(2, BY_TWO, facts, folder / "two"),
        "taught": (2, "train", *[
            teaching(option, facts, alone("shared table"), folder / "taught" / option) for option in TAUGHT]),
        "replicas without a gradient": (2, "replicas_without_a_gradient"),
        "dense gradients of columns": (2, "dense_gradients_of_columns"),
        "disagree": (2, "disagree", str(folder / "disagree")),
        "full disk": (2, "full_disk", str(full)),
        "wrapped": (2, "wrapped"),
    }
    return dict(zip(scenarios, torchrun(*scenarios.values())))


def test_two_processes_train_as_one(results, alone, folder):
    check_losses_and_tensors(BY_TWO, alone, folder / "two")


@pytest.mark.parametrize("option", TAUGHT)
def test_two_processes_teach_as_one(option, results, facts, alone, folder, tmp_path):
    runs.run("train.py", *teaching(option, facts, alone("shared table"), tmp_path / "taught"))
    assert losses(folder / "taught" / option) == pytest.approx(losses(tmp_path / "taught"), rel=1e-9)
    check_tensors(tmp_path / "taught", folder / "taught" / option)


def test_two_groups_of_two_train_as_one(results, alone, folder):
    check_losses_and_tensors(BY_TWO_GROUPS, alone, folder / "groups")


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, mem_parallel", [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1), (4, 2)]
)
def test_any_number_of_processes_trains_as_one(processes, mem_parallel, facts, alone, tmp_path):
    torchrun(training(processes, OPTIONS, facts, tmp_path, f"--mem_parallel={mem_parallel}"))
    check_losses_and_tensors(OPTIONS, alone, tmp_path)


def test_a_run_of_four_processes_resumes_in_two_and_in_one(results, alone, folder):
    out_dir = folder / "four" / "shared table"
    assert results["resumed"] == [4, 2]  # parts of the checkpoint: a process writes its columns
    check_tensors(alone("shared table"), out_dir)
    shutil.rmtree(out_dir / "checkpoint-20")  # as if it had been stopped at 10
    runs.run("train.py", "--resume", f"--out_dir={out_dir}")
    check_tensors(alone("shared table"), out_dir)
    question = ["--start=Ada has", "--max_new_tokens=3", "--trace"]
    out, _ = runs.run("sample.py", f"--out_dir={out_dir}", "--device=cpu", *question)
    assert "Ada has" in out


def test_a_step_sends_what_the_formula_says_and_parts_of_tables_shrink(results):
    for G in (4, 2, 1):
        P, R, lookups, v_dim, b = 4, 4 // G, 2 * 3, 24, 4
        result = results[f"bytes, {G} to a table"]
        assert result["table"] == 12**2 * v_dim * b / G
        per_token = 2 * ((G - 1) * lookups * (4 + 2 * b) + (G - 1) / G * v_dim * 2 * b)  # two memory layers
        assert result["bytes per token"] == per_token
        per_process = (G - 1) / G * 8 * result["rows"] + (P - 1) / P * 8 * result["core"]
        if R > 1:
            per_process += (R - 1) * 4 * result["rows of a group"]
            per_process += (R - 1) / R * 2 * b * v_dim / G * result["rows"]
        assert result["sent"] == pytest.approx(result["tokens"] * per_token + P * per_process)


def test_a_replica_without_a_gradient_takes_part_with_an_empty_one(results):
    sparse, dense, none = results["replicas without a gradient"]
    assert sparse == [[0, 0], [3, 4], [0, 0], [0, 0], [6, 8], [0, 0]]
    assert dense == torch.eye(6)[:, 1:3].tolist()
    assert none == [[0, 0]] * 6


def test_a_dense_gradient_of_split_columns_moves_the_rows_that_any_process_has(results):
    moved = torch.tensor(results["dense gradients of columns"]).T
    expected = -0.1 * torch.tensor([[0.0, 0.0], [2**0.5, 0.0], [0.0, 2**0.5], [1.0, 1.0]])
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_processes_that_differ_all_say_how(results, folder):
    expected = {
        "settings": "learning_rate is 0.1 in process 0 and 0.2 in process 1",
        "data": "data is",
        "file": "process 1: data must be",
        "share": "2 processes can't share batch_size=5",
        "columns": "values of 31 columns (mem_v_dim, or n_embd) can't be split over 2 processes; "
        "nearest: mem_v_dim=30 or 32",
        "group": "mem_parallel=5 must divide the number of processes, 2; nearest: 2 (0: all of them)",
    }
    messages = results["disagree"]
    for name, message in expected.items():
        assert message in messages[name] and messages[name].count("\n") == 1, messages
    assert not list((folder / "disagree").glob("*/out"))


def test_a_wrong_setting_of_three_processes_is_one_line_and_exit_code_2(tmp_path):
    process = runs.start("train.py", "--learning_rat=1", f"--out_dir={tmp_path / 'run'}", processes=3)
    _, err = process.communicate(timeout=120)
    assert err.count("did you mean learning_rate?") == 1 and "Signal 6" not in err
    root_cause = err.partition("Root Cause")[2]
    assert "exitcode  : 2 " in root_cause and "rank      : 0 " in root_cause


def test_a_full_disk_of_one_process_keeps_the_checkpoint_before(results, folder):
    assert "process 1: " in results["full disk"] and "checkpoint-1 is kept" in results["full disk"]
    assert [path.name for path in (folder / "full").iterdir()] == ["checkpoint-1"]


def test_ddp_and_fsdp_of_a_dense_table_give_one_processs_gradients_and_refuse_a_sparse_one(results):
    found = results["wrapped"]
    for name in ("ddp dense", "fsdp dense", "fsdp clip"):
        assert found[name] < 1e-6, name
    assert found["fsdp adamw"] < 1e-5
    for name, error in {"ddp sparse": "Sparse", "fsdp sparse": "Sparse", "fsdp RowAdam": "DTensor"}.items():
        assert error in found[name], name
    assert found["fsdp meta"] == pytest.approx([1.0, 1.0, 1.0], rel=0.2)  # of 512 numbers


@pytest.mark.slow
def test_killed_ranks(tmp_path):
    kill_ranks(tmp_path, kills=5, processes=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nccl_in_one_process_equals_the_gpu_alone_and_its_checkpoint_moves_to_the_cpu(facts, tmp_path):
    alone, nccl = tmp_path / "alone", tmp_path / "nccl"
    runs.run("train.py", *settings("float32", facts, alone, "--device=cuda"))
    torchrun((1, "train", settings("float32", facts, nccl, "--device=cuda")))
    assert losses(nccl) == pytest.approx(losses(alone), rel=1e-5)
    torchrun((2, "train", ["--resume", "--device=cpu", "--max_iters=24", f"--out_dir={nccl}"]))
    runs.run("train.py", "--resume", "--device=cuda", "--max_iters=28", f"--out_dir={nccl}")


def test_shares_cover_every_sequence_once(monkeypatch):
    for processes, batch_size, passes in ((1, 5, 3), (2, 4, 1), (3, 4, 3), (4, 6, 2), (6, 6, 4), (8, 2, 8)):
        monkeypatch.setattr(sharding, "size", lambda n=processes: n)
        computed = []
        for rank in range(processes):
            monkeypatch.setattr(sharding, "rank", lambda n=rank: n)
            batches, sequences = sharding.share_of_batch(batch_size, passes)
            for i in batches:
                computed += [(i, sequence) for sequence in range(batch_size)[sequences]]
        assert sorted(computed) == [(i, sequence) for i in range(passes) for sequence in range(batch_size)]
    message = "8 processes can't share batch_size=6 x gradient_accumulation_steps=2 .*batch_size=4 or 8"
    with pytest.raises(UserError, match=message):
        sharding.share_of_batch(6, 2)


@pytest.fixture
def mesh():
    """A mesh of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield sharding.make_mesh(torch.device("cpu"), 0)
    dist.destroy_process_group()


def test_a_table_of_one_process_reads_as_one_that_is_not_split(mesh):
    torch.manual_seed(0)
    split = sharding.ShardedTable(100, 6, mesh)
    torch.manual_seed(0)
    whole = MemoryTable(100, 6)
    indices, weights = torch.randint(100, (5, 4)), torch.rand(5, 4, requires_grad=True)
    results = []
    for table in (split, whole):
        out = table(indices, weights)
        out.sum().backward()  # an expanded gradient
        results.append((out, weights.grad, table.values.grad.to_dense()))
        weights.grad = None
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


def test_restarted_processes_resume_and_a_new_launch_starts_over(tmp_path, monkeypatch):
    for launch, message in (
        ("one", None),
        ("one", "resuming from iteration 5"),
        ("two", "moved the earlier run"),
        ("", "moved the earlier run"),
    ):
        monkeypatch.setattr(sharding, "_launch", launch)
        out, _ = runs.run("train.py", *runs.TINY, "--max_iters=5", f"--out_dir={tmp_path / 'run'}")
        if message:
            assert message in out
        else:
            assert "moved" not in out and "resuming" not in out
