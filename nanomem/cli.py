"""
What every command line of nanomem shares: settings in dataclasses, --help, one-line errors, and output that
can't crash.

Importing this takes a few milliseconds, so that --help and mistakes are answered at once.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import sys
import time
import tomllib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake the user can correct: shown as one line, without a traceback."""


# ------------------------------------------------------------------------------------------------
# Settings


def setting(default, help, choices=None, section=None, path=False, least=None, below=None, alone=None,
            instead=None):
    """A dataclass field with a line of help.

    choices: the values allowed. least, below: the limits of a number, for check_limits. section: begins a
    section of --help. path: a ~ means the home folder. alone: what --name means without a value. instead:
    {setting: the default when that setting is given}.
    """
    about = dict(help=help, choices=choices, section=section, path=path, least=least, below=below,
                 alone=alone, instead=instead or {})
    return dataclasses.field(default=default, metadata=about)


def settings_of(cls) -> dict:
    """{name: field} of a dataclass's settings. Fields without help are saved with them but can't be given."""
    return {f.name: f for f in dataclasses.fields(cls) if "help" in f.metadata}


def defaults_beside(cls, given: dict) -> dict:
    """{name: default} of the settings whose default is another one beside those that are given."""
    defaults = {}
    for name, f in settings_of(cls).items():
        for other, default in f.metadata["instead"].items():
            if given.get(other):
                defaults[name] = default
    return defaults


def check_limits(config):
    """Raises ValueError naming the first setting of a dataclass that is outside its limits."""
    for f in settings_of(config).values():
        value, least, below = getattr(config, f.name), f.metadata["least"], f.metadata["below"]
        if least is None:
            continue
        limit = below or (2**31 if f.type is int else math.inf)  # larger sizes overflow torch's arithmetic
        if least <= value < limit:
            continue
        if below or (f.type is int and value >= limit):
            expected = f"from {least} to under {limit:,}"
        else:
            expected = f"{least} or more" if f.type is int else f"{least} or more and finite"
        raise ValueError(f"{f.name} must be {expected}, got {value}")


def parse(cls, argv: list[str]) -> dict:
    """The settings that a command line gives, as {name: value}. cls is a dataclass made of `setting`s.

    An argument without -- names a recipe, a file of settings; options take precedence over it. Raises
    UserError for an unknown name or an invalid value; prints help and exits for --help.
    """
    settings = settings_of(cls)
    recipe, given = {}, {}
    for argument in argv:
        if argument in ("-h", "--help"):
            if os.environ.get("RANK", "0") == "0":  # only one of torchrun's processes
                print_help(cls)
            sys.exit(0)
        is_option = argument.startswith("-")
        if not is_option and getattr(cls, "takes_recipe", False) and "=" not in argument:
            if recipe:
                raise UserError(f"expected one recipe, got a second one: {argument}")
            recipe = read_recipe(cls, argument)
            continue
        name, value = parse_argument(settings, argument)
        given[name] = value
    return recipe | given


def parse_argument(settings, argument):
    """(name, value) of one --name=value. Raises UserError saying what is wrong with it."""
    name, equals, text = argument.removeprefix("--").partition("=")
    name = name.replace("-", "_")
    if not argument.startswith("--"):
        likely = argument.lstrip("-")
        hint = f" (did you mean --{likely}?)" if likely.partition("=")[0] in settings else ""
        raise UserError(f"expected --key=value, got {argument!r}{hint}")
    if name not in settings:
        raise UserError(f"unknown setting --{name}{nearest_setting(name, settings)}; --help lists them all")
    if not equals:
        text = "true" if settings[name].type is bool else settings[name].metadata["alone"]
    if text is None:
        example = default_text(settings[name]) or "..."
        raise UserError(f"--{name} needs a value after an equals sign: --{name}={example}")
    return name, convert(settings[name], text)


OTHER_NAMES = {
    "learning_rate": "lr max_lr",
    "mem_lr": "value_lr values_lr mem_learning_rate",
    "weight_decay": "wd decay",
    "warmup_iters": "warmup warmup_steps",
    "max_iters": "iters n_iters num_iters steps max_steps num_steps train_steps lr_decay_iters updates",
    "batch_size": "bs batch",
    "gradient_accumulation_steps": "accum grad_accum grad_accum_steps accumulation_steps",
    "block_size": "context ctx context_length context_size seq_len max_seq_len sequence_length",
    "n_embd": "d_model dim hidden_size n_embed width model_dim",
    "n_layer": "layers n_layers num_layers depth",
    "n_head": "n_heads num_heads attention_heads",
    "mem_n_keys": "n_keys num_keys slots n_slots mem_slots mem_size",
    "mem_knn": "knn k topk mem_k mem_topk",
    "mem_layers": "mem_layer memory_layers",
    "n_entities": "entities people n_people cities n_cities",
    "data": "dataset data_dir",
    "out_dir": "out output output_dir dir",
    "init_from": "init init_model pretrained finetune teach load",
    "train": "trainable train_only finetune_only",
    "mem_top_slots": "top_slots top_t",
    "stop_at": "early_stopping target_recall",
    "rounds": "epochs n_epochs num_epochs",
    "start": "prompt question",
    "num_samples": "samples n_samples",
    "max_new_tokens": "tokens max_tokens n_tokens",
    "temperature": "temp",
}  # setting -> what nanoGPT and others call it


def nearest_setting(name: str, settings) -> str:
    """' (did you mean X?)' for a setting of another name, or with a similar one; or nothing."""
    name = name.replace("-", "_")
    for ours, others in OTHER_NAMES.items():
        if ours in settings and name in others.split():
            return f" (did you mean {ours}?)"
    return nearest(name, settings)


def convert(setting, text):
    """The value of a setting from the command line's text. Raises UserError naming the setting and what it
    takes.
    """
    choices = setting.metadata["choices"]
    if setting.metadata["path"]:
        return expand(text)
    if setting.type is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if choices and text not in choices:
        hint = nearest(text, choices)
        named = ", ".join(choice for choice in choices if choice)
        raise UserError(f"--{setting.name} must be one of {named}; got {text!r}{hint}")
    try:
        if setting.type is not bool:
            return setting.type(text)
    except ValueError:
        pass
    expected = {int: "a whole number", float: "a number", bool: "true or false"}[setting.type]
    raise UserError(f"--{setting.name} must be {expected}, such as {default_text(setting)}; got {text!r}")


def expand(path: str) -> str:
    """A path with ~ or ~user replaced by that home folder. Raises UserError if there is no such user."""
    expanded = os.path.expanduser(path)
    if expanded == path and path.startswith("~"):
        user = path.partition("/")[0][1:]
        raise UserError(f"{path}: there is no user {user!r}; a file of that name here is ./{path}")
    return expanded


def default_text(setting) -> str:
    """A setting's default as it looks on the command line."""
    return str(setting.default).lower() if setting.type is bool else str(setting.default)


def nearest(name: str, names) -> str:
    """' (did you mean X?)', X being the closest name, or nothing."""
    close = closest(name, names)
    return f" (did you mean {close}?)" if close else ""


def closest(name: str, names) -> str | None:
    """The name that begins so, or else the most similar one; None if there is none."""
    longer = [candidate for candidate in names if len(name) > 1 and candidate.startswith(name)]
    close = longer or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return close[0] if close else None


def print_help(cls):
    """How to call the program, and every setting with its default and meaning, by section."""
    program = sys.modules["__main__"]
    module = program.__spec__.name.removesuffix(".__main__") if program.__spec__ else None
    called = f"-m {module}" if module else sys.argv[0]
    print(f"usage: python {called} {getattr(cls, 'arguments', '')}[--key=value ...]")
    for title, fields in sections(cls).items():
        print(f"\n{title}")
        for f in fields:
            named = [choice for choice in f.metadata["choices"] or () if choice]
            choices = f" ({'|'.join(named)})" if named else ""
            others = [f"; {value} with --{name}" for name, value in f.metadata["instead"].items()]
            about = f.metadata["help"] + "".join(others) + choices
            print(f"  --{f.name + '=' + default_text(f):<34} {about}")


def sections(cls) -> dict:
    """{title: its fields}, in the order of --help."""
    found, title = {}, None
    for f in settings_of(cls).values():
        title = f.metadata["section"] or title
        found.setdefault(title, []).append(f)
    return found


# ------------------------------------------------------------------------------------------------
# Recipes


def shipped(name: str) -> Path:
    """A folder that comes with nanomem, such as configs: in the installed package, or at the top of a
    clone.
    """
    installed = PACKAGE / "shipped" / name
    if installed.exists():
        return installed
    return PACKAGE.parent / ("configs" if name == "configs" else f"data/{name}")


def read_recipe(cls, name: str) -> dict:
    """The settings in a recipe: a .toml file, one of configs/ by its name alone, or the config.json of a
    run.

    Raises UserError naming the file and what is wrong with it.
    """
    path = Path(expand(name))
    if not path.exists():
        path = shipped("configs") / f"{path.stem}.toml"
    if not path.is_file():
        recipes = [recipe.stem for recipe in sorted(shipped("configs").glob("*.toml"))]
        hint = f"{nearest(Path(name).stem, recipes)}; recipes: {', '.join(recipes)}"
        raise UserError(f"expected --key=value or a recipe, got {name!r}, which is no file{hint}")
    if path.suffix not in (".toml", ".json"):
        raise UserError(f"{path} is not a recipe, which ends in .toml; to train on it: --data={path}")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:  # of json, tomllib and bytes that are not UTF-8
        raise UserError(f"{path} is not a recipe: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a recipe: expected settings by name, got {type(found).__name__}")
    if path.suffix == ".json":  # that of a run: its folder and what its model knew are not part of a recipe
        found = {key: value for key, value in found.items() if key not in ("out_dir", "resume", "earlier")}
    settings = settings_of(cls)
    values = {}
    for key, value in found.items():
        if key not in settings:
            hint = nearest_setting(key, settings)
            raise UserError(f"{path}: unknown setting {key}{hint}; --help lists them all")
        text = str(value).lower() if isinstance(value, bool) else str(value)
        try:
            values[key] = convert(settings[key], text)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return values


# ------------------------------------------------------------------------------------------------
# Output and errors


class SafeStream:
    """A text stream whose writes never fail: once the disk is full or the reader has left, they go nowhere.

    `error` is the first error, None before. Characters that the stream's encoding lacks become \\u escapes.
    """

    def __init__(self, stream):
        self.stream, self.error = stream, None
        with contextlib.suppress(AttributeError):  # a StringIO takes every character
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        """Writes text, if that is still possible."""
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        """Hands what is buffered to the system, if that is still possible."""
        self._attempt(self.stream.flush)

    def _attempt(self, call, *arguments):
        try:
            call(*arguments)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.error = self.error or error
            # What is still buffered must go somewhere: the interpreter flushes it at its end.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def safe_streams():
    """Makes stdout and stderr SafeStreams, and replaces a stream that was closed at the start by an empty
    one.

    Call it before any file is opened: a file would take a closed stream's number, and get what libraries
    print there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), SafeStream):
            setattr(sys, name, SafeStream(getattr(sys, name)))


def mistake(error: BaseException) -> str | None:
    """The line that tells a user what to correct; None for an error that is not the user's."""
    first_line = str(error).split("\n")[0]
    # torch and safetensors are looked up by name: whoever raised their errors has imported them.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    # torch has no class for an allocation that fails on a CPU.
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in first_line
    if on_cpu or "OutOfMemoryError" in kinds:
        return f"there is not enough memory for these settings ({first_line})"
    if isinstance(error, (UserError, ValueError, OSError, ModuleNotFoundError)) or "SafetensorError" in kinds:
        return " ".join(str(error).split("\n")) or repr(error)
    return None


@contextlib.contextmanager
def one_line_errors(leave=sys.exit):
    """A user's mistake ends the program with one line on stderr and exit code 2, without a traceback;
    Ctrl-C with none, and 130.

    leave(code) ends it. Of the processes that torchrun started on a machine, the first one prints the line.
    """
    try:
        yield
    except SystemExit as end:
        leave(end.code or 0)
    except KeyboardInterrupt:
        leave(130)
    except Exception as error:
        line = mistake(error)
        if line is None:
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            program = Path(sys.argv[0])
            name = program.parent.name if program.name == "__main__.py" else program.name
            print(f"{name}: {line}", file=sys.stderr)
        elif leave is sys.exit:
            time.sleep(10)  # torchrun ends all processes when one of them ends, so the first must do so first
        leave(2)
