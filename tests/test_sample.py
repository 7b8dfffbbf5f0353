import pytest

import runs


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    runs.train(folder, "--max_iters=10", "--mem_layers=0,1")
    return folder


def test_it_goes_on_from_the_start_the_same_each_time(out_dir):
    first, again = (runs.run("sample.py", f"--out_dir={out_dir}", "--start=In which country is Tokyo?", "--max_new_tokens=8")[0] for _ in range(2))
    assert "In which country is Tokyo?" in first and first == again


def test_samples_differ_and_the_seed_decides_them(out_dir):
    def sample(seed):
        return runs.run("sample.py", f"--out_dir={out_dir}", "--start=The city", "--temperature=2", "--num_samples=2", f"--seed={seed}")[0]

    one = sample(1)
    assert one == sample(1) != sample(2)
    two = [line for line in one.split("The city")[1:]]
    assert len(two) == 2 and two[0] != two[1]


def test_each_line_of_the_input_is_answered(out_dir):
    asked = "The city of Lagos is in\nIn which country is Tokyo?\n"
    said = runs.run("sample.py", f"--out_dir={out_dir}", "--max_new_tokens=4", input=asked)[0]
    assert [line[:len(prompt)] for line, prompt in zip(said.splitlines()[1:], asked.splitlines())] == asked.splitlines()


def test_one_sample_is_streamed_as_it_would_be_beside_others(out_dir):
    arguments = ["sample.py", f"--out_dir={out_dir}", "--start=The city", "--temperature=0", "--max_new_tokens=9"]
    one, three = runs.run(*arguments)[0], runs.run(*arguments, "--num_samples=3")[0]
    answer = one.splitlines()[-1]
    assert [line for line in three.splitlines()[1:] if line] == [answer] * 3
    assert "tokens/s" in runs.run(*arguments)[1]


def test_a_model_is_not_exported_into_its_run(out_dir):
    before = (out_dir / "config.json").read_bytes()
    assert f"{out_dir} has a run already; name another folder" in runs.run("sample.py", f"--out_dir={out_dir}", f"--export={out_dir}", code=2)[1]
    assert (out_dir / "config.json").read_bytes() == before


def test_an_exported_model_answers_alike(out_dir, tmp_path):
    runs.run("sample.py", f"--out_dir={out_dir}", f"--export={tmp_path / 'model'}")
    said = [runs.run("sample.py", f"--out_dir={folder}", "--start=The city", "--max_new_tokens=9")[0].splitlines()[1:]
            for folder in (out_dir, tmp_path / "model")]
    assert said[0] == said[1]


def test_trace_shows_each_token_and_layer_and_what_else_reads_its_slots(out_dir):
    out, _ = runs.run("sample.py", f"--out_dir={out_dir}", "--start=The country of Tokyo is", "--trace", "--max_new_tokens=2")
    assert "layer 0" in out and "layer 1" in out and "read by" in out
    for token in ("The", "·country", "·of", "·is"):
        assert f"│ {token} " in out


@pytest.mark.parametrize("arguments, message", [
    (["--out_dir=nowhere"], "no checkpoint in nowhere"),
    (["--strt=x"], "did you mean start?"),
    (["--num_samples=0"], "num_samples"),
    (["--top_p=0"], "top_p must be above 0 and at most 1"),
])
def test_mistakes_get_one_line(arguments, message):
    _, err = runs.run("sample.py", *arguments, code=2)
    assert err.startswith("sample.py: ") and message in err and err.count("\n") == 1


def test_the_latest_run_is_the_default_and_none_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, err = runs.run("sample.py", code=2)
    assert "no run in out/" in err
    runs.run("train.py", *runs.TINY, "--max_iters=2", "--ffn=dense")
    out, _ = runs.run("sample.py", "--start=The", "--max_new_tokens=3")
    assert "out/world-dense" in out
    _, err = runs.run("sample.py", "--start=The", "--trace", code=2)
    assert "no memory layers" in err
