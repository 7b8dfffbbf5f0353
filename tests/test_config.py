import dataclasses
import json
import subprocess
import sys

import pytest
import runs

from nanomem.cli import UserError, parse, read_recipe, settings_of, shipped
from nanomem.config import Config

RECIPES = sorted(path.stem for path in shipped("configs").glob("*.toml"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_changes_something(name):
    given = read_recipe(Config, name)
    config = Config(**given)
    config.check()
    assert config != Config()


def test_the_command_line_takes_precedence_over_a_recipe_wherever_it_stands(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'n_layer = 5\nmem_layers = "1,3"\nlearning_rate = 1\nmem_gated = false  # an experiment\n'
    )
    expected = {"n_layer": 7, "mem_layers": "1,3", "learning_rate": 1.0, "mem_gated": False}
    assert (
        parse(Config, [str(recipe), "--n_layer=7"]) == parse(Config, ["--n_layer=7", str(recipe)]) == expected
    )
    assert type(parse(Config, [str(recipe)])["learning_rate"]) is float


def test_a_run_is_a_recipe_too(tmp_path):
    runs.train(tmp_path / "run", "--max_iters=2")
    settings = parse(Config, [str(tmp_path / "run" / "config.json"), "--seed=3"])
    assert settings["n_embd"] == 16 and settings["seed"] == 3
    assert "out_dir" not in settings and "resume" not in settings
    runs.run("train.py", tmp_path / "run" / "config.json", f"--out_dir={tmp_path / 'again'}")
    assert runs.metrics(tmp_path / "again") == runs.metrics(tmp_path / "run")


@pytest.mark.parametrize("content, message", [
    ("n_layers = 3", "unknown setting n_layers (did you mean n_layer?)"),
    ("n_layer = 'many'", "n_layer must be a whole number, such as 3; got 'many'"),
    ("n_layer = true", "n_layer must be a whole number"),
    ("n_layer 3", "is not a recipe"),
    ("[n_layer]\nx = 3", "n_layer must be a whole number"),
    (b"\xff", "is not a recipe"),
])
def test_a_wrong_recipe_is_named_with_what_is_wrong(content, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as raised:
        parse(Config, [str(path)])
    assert message in str(raised.value) and str(path) in str(raised.value)


def test_a_recipe_that_is_not_there_names_the_nearest_and_all():
    with pytest.raises(UserError, match=r"no file \(did you mean shakespeare\?\); recipes: .*world"):
        parse(Config, ["configs/shakespear.toml"])
    with pytest.raises(UserError, match="expected one recipe, got a second one: laptop"):
        parse(Config, ["world", "laptop"])
    assert parse(Config, ["configs/shakespeare.toml"]) == parse(Config, ["shakespeare"])


def test_a_text_in_place_of_a_recipe_gets_the_option_to_train_on_it(tmp_path):
    (tmp_path / "book.txt").write_text("Once upon a time")
    with pytest.raises(UserError, match=r"is not a recipe, .*; to train on it: --data=.*book.txt"):
        parse(Config, [str(tmp_path / "book.txt")])


def test_json_that_is_no_object_is_no_recipe(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="is not a recipe: expected"):
        parse(Config, [str(tmp_path / "config.json")])


@pytest.mark.parametrize(
    "name", [name for name, f in settings_of(Config).items() if f.metadata["least"] is not None]
)
def test_limits_are_checked_and_named(name):
    field = next(f for f in dataclasses.fields(Config) if f.name == name)
    for value in (field.metadata["least"] - 1, float("nan") if field.type is float else 2**70):
        with pytest.raises(ValueError, match=f"^{name} must be .*, got"):
            Config(**{name: value}).check()


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
@pytest.mark.parametrize("argument", ["--help", "--sead=1"])
def test_help_and_mistakes_are_answered_before_anything_slow_is_imported(program, argument):
    code = (
        f"import runpy, sys\nsys.argv = [{program!r}, {argument!r}]\n"
        f"try: runpy.run_path({str(runs.ROOT / program)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code or 0, {'torch', 'numpy', 'rich', 'tiktoken'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=runs.ROOT)
    assert done.stdout.splitlines()[-1] == f"{2 if argument != '--help' else 0} set()"
    assert ("--seed" in done.stdout) if argument == "--help" else ("did you mean seed?" in done.stderr)


def test_the_layer_is_imported_without_torch_dynamo():
    code = "import nanomem.memory, sys; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=runs.ROOT)
    assert done.stdout == "False\n", done.stderr
