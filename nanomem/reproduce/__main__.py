"""
The paper's claims, small: trains the models of a table or figure with train.py, and writes it.

    python -m nanomem.reproduce table1       dense, dense of twice the FLOPs, mixture of experts and Memory+
    python -m nanomem.reproduce curves       the same while training, and for three times as long
    python -m nanomem.reproduce scaling      from 1k to 1M slots
    python -m nanomem.reproduce layers       one and three memory layers in a deeper model, at equal FLOPs
    python -m nanomem.reproduce ablations    Memory+ with one thing changed at a time
    python -m nanomem.reproduce text         the four models of table1 on text (--text=data/wikitext-103)
    python -m nanomem.reproduce forgetting   what is forgotten while a model is taught new facts, by method
    python -m nanomem.reproduce retrofit     facts taught to a pretrained model (--model=NAME), by method
    python -m nanomem.reproduce shapes       which layers, slots and k suit a memory for a pretrained model
    python -m nanomem.reproduce slots        which slots facts use in a model (--run=out/people-memory)
    python -m nanomem.reproduce page         writes the tables of README and docs from assets/*.json

- equal terms: the same facts, tokens, batches and tokenizer; each model has the best of a few tries:
  the one whose answers cost least on questions that are never reported, on text the one of lowest loss, and
  when facts are taught the one that loses least of what the model knew (shapes tries one rate only)
- a finished run is a JSON file in a folder of assets and is not trained again; one that was stopped continues
- writes assets/NAME.json and, except for shapes, NAME.png (pip install -e '.[plot]'); `page` draws all
  figures anew
"""

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from nanomem import cli
from nanomem.cli import UserError, nearest, one_line_errors, parse, read_recipe, safe_streams, setting
from nanomem.config import Config, keep_freed_memory
from nanomem.datasets import DATASETS
from nanomem.reproduce.presets import PRESETS

ON_FACTS = ("preset", "data", "seeds")
USES = {
    "curves": ON_FACTS,
    "table1": ON_FACTS,
    "scaling": ON_FACTS,
    "layers": ON_FACTS,
    "ablations": ON_FACTS,
    "text": ("preset", "text", "seeds"),
    "forgetting": ("seeds",),
    "retrofit": ("model", "other_text", "seeds"),
    "shapes": ("model", "other_text", "seeds"),
    "slots": ("run",),
    "page": (),
}  # command -> the settings that it uses, besides the folders
FOLDERS = ("out_dir", "runs", "assets")
# Presets and data whose results get a name without the preset: those that pages show
SHOWN = (("laptop", "people"), ("night", "world"))
NAMES = tuple(USES)


@dataclass
class Settings:
    """The command line."""

    arguments = f"({' | '.join(NAMES)}) "
    preset: str = setting(
        "laptop", "laptop: 1,500 people, 2 cores, an hour or two a command; night: 10,500 cities, 2 cores, a "
        "night or two; gpu: one H100", tuple(PRESETS),
        section="Reproduction")
    data: str = setting("", "what the facts are about; by default what the preset is about", ("", *DATASETS))
    text: str = setting(
        "data/wikitext-2", "text to train on: shards that data/prepare.py made, or a text file", path=True)
    seeds: int = setting(3, "runs of each model")
    model: str = setting("", "the pretrained model of retrofit and shapes: a name, a folder or a .gguf file")
    other_text: str = setting(
        "", "ordinary text for retrofit and shapes: the loss is measured on its first 16,384 tokens, the "
        "memory avoids the slots that the next 128,000 read; by default a short built-in one", path=True)
    run: str = setting("out/people-memory", "folder of the trained model that slots looks into", path=True)
    out_dir: str = setting("out/reproduce", "folder for checkpoints and logs of the runs", path=True)
    runs: str = setting(
        "assets/runs", "folder for the results of finished runs; those of forgetting, retrofit and shapes go "
        "into folders beside it", path=True)
    assets: str = setting("assets", "folder for tables and figures", path=True)


def main():
    """One command."""
    arguments = sys.argv[1:]
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    given = parse(Settings, arguments)
    settings = Settings(**given)
    if command not in NAMES:
        got = f"{command}{nearest(command, NAMES)}" if command else "nothing"
        raise UserError(f"expected what to reproduce, one of {', '.join(NAMES)}; got {got}")
    for name in given:
        takes = USES[command] + FOLDERS
        if name not in takes:
            raise UserError(f"--{name} does nothing for {command}, which takes --{', --'.join(takes)}")
    for name in FOLDERS:
        path = getattr(settings, name)
        if Path(path).is_file():
            raise UserError(f"--{name}={path} is a file; expected a folder")
    if settings.other_text and not Path(settings.other_text).is_file():
        raise UserError(f"--other_text={settings.other_text}: there is no such file")
    if settings.seeds < 1:
        raise UserError(f"--seeds must be 1 or more, got {settings.seeds}")
    from nanomem.reproduce import figures, runs

    if command in figures.DRAWN or command == "page":
        figures.pyplot()  # if a package is missing, say so now and not after hours of training
    if command in ("table1", "text") and importlib.util.find_spec("scipy") is None:
        raise UserError("t-tests need scipy: pip install -e '.[plot]'")
    runs.commit()  # is remembered: results get this commit, not one made while they are measured
    keep_freed_memory()
    Path(settings.assets).mkdir(parents=True, exist_ok=True)
    if command == "slots":
        look_into_slots(settings)
    elif command == "forgetting":
        measure_forgetting(settings)
    elif command in ("retrofit", "shapes"):
        teach_pretrained(command, settings)
    elif command == "page":
        write_pages(Path(settings.assets))
    else:
        reproduce(command, settings)


def reproduce(command, settings):
    """Trains a command's models and writes its table and figure."""
    from rich.console import Console

    from nanomem.data import open_data
    from nanomem.reproduce import commands

    preset = PRESETS[settings.preset]
    recipe, data = preset.recipe, settings.data
    if command == "text":
        recipe, data = preset.text_recipe, settings.text
    base = Config(**read_recipe(Config, cli.shipped("configs") / f"{recipe}.toml"))
    base.data = data or base.data
    base.vocab_size = open_data(base).encoding.n_vocab  # it counts in FLOPs
    console = Console(highlight=False, soft_wrap=True)
    trainer = make_trainer(settings, console)
    seeds = list(range(base.seed, base.seed + settings.seeds))
    rows = commands.COMMANDS[command](base, seeds, trainer)

    name = command
    if base.data in DATASETS and base.data != Config.data:
        name += f"-{base.data}"
    is_shown = (settings.preset, base.data) in SHOWN
    if command == "text":
        is_shown = settings.preset != "gpu"
        if settings.text != Settings.text:
            name += f"-{Path(settings.text).stem}"
    if not is_shown:
        name += f"-{settings.preset}"
    about = {"command": command_line(command, settings)} | trainer.provenance()
    write(name, about | {"seeds": seeds, "rows": rows}, settings)


def measure_forgetting(settings):
    """Trains the models to teach, teaches them by each method, and writes a table and a figure."""
    from rich.console import Console

    from nanomem.reproduce import forgetting, runs
    from nanomem.reproduce.commands import runs_of
    from nanomem.reproduce.sizing import dense_of

    base = Config(**read_recipe(Config, cli.shipped("configs") / "laptop.toml"))
    wider = dense_of(base, 4).replace(learning_rate=4e-3, min_lr=4e-4)  # the best of five for 1,500 people
    console = Console(highlight=False, soft_wrap=True)
    trainer = make_trainer(settings, console)
    seeds = list(range(base.seed, base.seed + settings.seeds))
    memory, dense = runs_of({"Memory+": base, "dense, 4x": wider}, seeds).values()
    trainer.train([*memory, *dense], with_checkpoints=True)
    trained = {"memory": [(run.name, trainer.folder(run)) for run in memory],
               "dense": [(run.name, trainer.folder(run)) for run in dense]}
    taught = Path(settings.runs).resolve().with_name("teaching")
    rows, lessons = forgetting.forgetting(trained, seeds, taught, trainer.workers, console)
    results = {"command": command_line("forgetting", settings)} | trainer.provenance()
    results |= runs.origin([*trainer.used.values(), *lessons]) | {"seeds": seeds, "rows": rows}
    write("forgetting", results, settings)


def shown(name: str) -> str:
    """A name, or that of a file or folder here without the folders above it."""
    return Path(name).name if Path(name).exists() else name


def make_trainer(settings, console):
    """What trains the runs of a preset."""
    from nanomem.reproduce.runs import Trainer

    preset, out_dir = PRESETS[settings.preset], Path(settings.out_dir) / settings.preset
    return Trainer(preset.workers, preset.threads, settings.runs, out_dir, console)


def teach_pretrained(command, settings):
    """Teaches a pretrained model facts, by each method or with memories of several shapes. Writes the table
    (and for the methods a figure) as it grows.
    """
    from rich.console import Console

    from nanomem import pretrained
    from nanomem.reproduce import retrofit, runs, shapes

    if not settings.model:
        raise UserError(f"{command} needs --model: the name of a pretrained model, a folder or a .gguf file")
    pretrained.need("peft" if command == "retrofit" else "transformers")
    console = Console(highlight=False, soft_wrap=True)
    finished = Path(settings.runs).resolve().with_name("retrofit")
    teacher = retrofit.Teacher(settings.model, settings.other_text, finished, console)
    seeds = list(range(Config.seed, Config.seed + settings.seeds))
    measure = {"retrofit": retrofit.retrofit, "shapes": shapes.compare}[command]
    for rows in measure(teacher, seeds):  # a table that grows, since all tasks take many hours
        results = {
            "command": command_line(command, settings),
            **runs.origin(teacher.used),
            "seeds": sorted({result["seed"] for result in teacher.used} - {retrofit.SWEEP_SEED}),
            "minutes": round(sum(result["seconds"] for result in teacher.used) / 60),
            "rows": rows,
        }
        write(command, results, settings)


def write(name, results, settings):
    """Saves results, draws their figure and prints their table."""
    from nanomem.reproduce import figures, page

    command, assets = name.partition("-")[0], Path(settings.assets)
    save(results, assets / f"{name}.json")
    if command in figures.DRAWN:
        figures.draw(command, results["rows"], assets / f"{name}.png")
    print(page.TABLES[command](results["rows"]))
    if assets == Path(Settings.assets):
        print("python -m nanomem.reproduce page puts it into the pages that show it")


def save(results, path):
    """Writes results as JSON, one line per row."""
    from nanomem.checkpoint import write_text

    about = json.dumps({name: value for name, value in results.items() if name != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    write_text(path, f'{about[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')


def look_into_slots(settings):
    """Measures what a trained model's memory reads, and writes a figure."""
    from nanomem.reproduce import runs
    from nanomem.reproduce.slots import slots

    rows, iteration = slots(settings.run)
    results = {
        "command": f"python -m nanomem.reproduce slots --run={settings.run}",
        **runs.origin([runs.here()]),
        "seeds": [],
        "minutes": 0,
        "updates": iteration,
        "rows": rows,
    }
    of_another = "" if settings.run == Settings.run else f"-{Path(settings.run).name}"
    write(f"slots{of_another}", results, settings)


def write_pages(assets):
    """Writes the pages' tables, and draws the figures, from the results in `assets`."""
    from nanomem.checkpoint import read_json
    from nanomem.reproduce import figures, page, runs

    for path in page.write_pages(runs.ROOT, assets):
        print(path.relative_to(runs.ROOT))
    for path in sorted(assets.glob("*.json")):
        command = path.stem.partition("-")[0]  # of curves-world: curves
        if command in figures.DRAWN:
            figures.draw(command, read_json(path)["rows"], path.with_suffix(".png"))
            print(path.with_suffix(".png"))


def command_line(command, settings):
    """The command that gives the same table, without folders and defaults."""
    changed = []
    for name in ("preset", "data", "text", "model", "other_text", "seeds"):
        value = getattr(settings, name)
        if value != getattr(Settings, name):
            is_file = name in ("model", "other_text")
            changed.append(f"--{name}={shown(value) if is_file else value}")
    return " ".join(["python -m nanomem.reproduce", command, *changed])


if __name__ == "__main__":
    safe_streams()
    with one_line_errors():
        main()
