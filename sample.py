"""
Talk to a model that train.py made.

    python sample.py                                        a prompt: ask, and it answers
    python sample.py --start="Who employs Eva Brookbury:"
    python sample.py --start="Who employs Eva Brookbury:" --trace      and which memory slots it read
    python sample.py --start="ROMEO:" --num_samples=4 --temperature=0.9 --top_p=0.95
    python sample.py --export=shared/model                  writes the model alone to a folder
"""

import sys
from dataclasses import dataclass

from nanomem.cli import UserError, check_limits, one_line_errors, parse, safe_streams, setting
from nanomem.config import Config, machine_memory, pick_device


@dataclass
class SampleConfig:
    """The settings of sample.py."""

    out_dir: str = setting(
        "auto", "folder of the run; auto: the latest in out/", section="Settings", path=True)
    start: str = setting(
        "", "text to continue; without it, each line of the input, or a prompt on a terminal")
    max_new_tokens: int = setting(100, "tokens to write at most", least=1)
    temperature: float = setting(
        -1.0, "0 takes the likeliest token, higher is bolder; -1: 0 for facts, 0.8 for text")
    top_k: int = setting(200, "choose among the top_k likeliest tokens; 0: among all", least=0)
    top_p: float = setting(1.0, "and among the fewest likeliest whose probabilities add up to top_p")
    num_samples: int = setting(
        1, "how many continuations, written at the same time; a single one appears as it is written", least=1)
    seed: int = setting(1337, "random seed for choosing tokens", least=0, below=2**63)
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the first available of cuda, mps, cpu")
    trace: str = setting(
        "", "show the memory slots that were read, and what else reads them: where the question ends and in "
        "the answer, or for all tokens", choices=("", "answer", "all"), alone="answer")
    export: str = setting(
        "", "write the model to this folder, without the optimizers' state", path=True)

    def check(self):
        """Raises UserError or ValueError naming the first invalid setting."""
        check_limits(self)
        if not (0 <= self.temperature < float("inf") or self.temperature == -1):
            expected = "0 or more and finite, or -1 for the default"
            raise UserError(f"temperature must be {expected}; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")


safe_streams()
with one_line_errors():  # --help and mistakes are answered before the slow imports
    config = SampleConfig(**parse(SampleConfig, sys.argv[1:]))
    config.check()

import codecs
import contextlib
import functools
import itertools
import shlex
import time
from pathlib import Path

import torch
from rich.console import Console

from nanomem import checkpoint, export, teaching, tokenizer, trace
from nanomem.data import named_facts, open_data, open_tokenizer
from nanomem.datasets import DATASETS
from nanomem.model import GPT

console = Console(highlight=False, markup=False, emoji=False)  # users' data is shown as it is

# ------------------------------------------------------------------------------------------------
# The model


def latest_run() -> Path:
    """The folder in out/ with the newest checkpoint."""
    headers = list(Path("out").glob(f"*/checkpoint-*/{checkpoint.HEADER}"))
    if not headers:
        raise UserError("no run in out/: train one with python train.py, or name its folder with --out_dir")
    return max(headers, key=lambda path: path.stat().st_mtime).parent.parent


@dataclass
class Trained:
    """A trained model, how it reads text, and the settings of its run."""

    model: GPT
    encoding: object
    run: Config
    saved: teaching.SavedModel

    def __post_init__(self):
        self.device = next(self.model.parameters()).device
        self.knows_facts = self.run.teaches_facts()  # otherwise it has learned from text

    def open_data(self):
        """The data it was trained on. Raises OSError or ValueError if its file is gone or can't be read."""
        return open_data(self.run, Path(self.run.out_dir) / "tokenizer.tiktoken")

    @functools.cached_property
    def facts(self):
        """The facts it was taught; None for a model of text, or if their file is gone or can't be read."""
        with contextlib.suppress(OSError, ValueError):
            return named_facts(self.run) if self.knows_facts else None


def open_run(config: SampleConfig) -> Trained:
    """The model of the run or export in config.out_dir. Raises UserError if there is none."""
    out_dir = latest_run() if config.out_dir == "auto" else Path(config.out_dir)
    device = pick_device(config.device)
    found = teaching.find(out_dir, "--out_dir")
    for problem in found.refused.values():
        console.print(f"{problem}: using {found.files}", soft_wrap=True)
    run = found.config
    model = GPT(run)
    found.load(model)
    encoding = open_tokenizer(run, found.tokenizer(), None)
    iterations = "" if found.iteration is None else f", {found.iteration} iterations"
    console.print(f"{out_dir}: {run.data}, {run.ffn}{iterations}", style="dim", soft_wrap=True)
    return Trained(model.to(device).eval(), encoding, run.replace(out_dir=str(out_dir)), found)


# ------------------------------------------------------------------------------------------------
# Writing


def check_output():
    """Ends the program once the reader closes the pipe. Raises UserError if output is lost, to a full disk
    for example.
    """
    error = sys.stdout.error
    if isinstance(error, BrokenPipeError):
        sys.exit()
    if error:
        raise UserError(f"the output could not be written ({error.strerror or error})")


def write(
        trained: Trained, text: str, config: SampleConfig, generator: torch.Generator,
        echo: bool) -> tuple[torch.Tensor, int]:
    """Prints num_samples continuations of text, a single one as it is written; with echo, after the text.

    Returns the prompt and the last continuation, (1, time) int64, and the length of the prompt.
    """
    end = trained.encoding.eot_token
    prompt = tokenizer.encode(trained.encoding, text).tolist()
    if trained.knows_facts or not prompt:
        prompt = [end] + prompt  # facts come after <|endoftext|>, and end with it
    stream = continuations_of(trained, prompt, config, generator)
    started = time.perf_counter()
    if config.num_samples == 1:
        written = [print_as_written(trained, text, stream, echo)]
    else:
        written = print_together(trained, text, stream, echo)
    seconds = time.perf_counter() - started
    whole = torch.tensor([prompt + without_end(trained, written[-1])], device=trained.device)
    note = ""
    if not trained.knows_facts:
        count = sum(len(tokens) for tokens in written)
        note = f"{count:,} tokens, {count / seconds:,.0f} per second"
    elif config.num_samples == 1 and end in written[0]:
        note = f"confidence {confidence(trained.model, whole, len(prompt), end):.0%}"
    elif config.num_samples == 1:
        note = f"cut off after max_new_tokens={config.max_new_tokens}"
    if note:
        Console(stderr=True, highlight=False).print(note, style="dim")
    return whole, len(prompt)


def continuations_of(trained: Trained, prompt: list[int], config: SampleConfig, generator: torch.Generator):
    """Yields the next token of each continuation, a list of num_samples."""
    temperature = config.temperature
    if temperature < 0:
        temperature = 0.0 if trained.knows_facts else 0.8
    stops_at = trained.encoding.eot_token if trained.knows_facts else None
    idx = torch.tensor([prompt] * config.num_samples, device=trained.device)
    columns = trained.model.generate(
        idx, config.max_new_tokens, temperature, config.top_k or None, stops_at, generator, config.top_p,
        tokenizer.unassigned(trained.encoding))
    for column in columns:  # (num_samples, 1)
        check_output()
        yield column.flatten().tolist()


def without_end(trained: Trained, tokens: list[int]) -> list[int]:
    """The tokens of an answer, up to the end; those of text as they are."""
    end = trained.encoding.eot_token
    return tokens[:tokens.index(end)] if trained.knows_facts and end in tokens else tokens


def print_as_written(trained: Trained, text: str, stream, echo: bool) -> list[int]:
    """Prints the only continuation of a stream token by token. Returns its tokens."""
    characters = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens
    tokens = []
    if echo:
        console.out(text, style="bold", end="", highlight=False)
    for (token,) in stream:
        tokens.append(token)
        if trained.knows_facts and token == trained.encoding.eot_token:
            continue
        written = characters.decode(trained.encoding.decode_single_token_bytes(token))
        if not echo and len(tokens) == 1:
            written = written.lstrip(" ")
        console.out(written, end="", highlight=False)
    console.print()
    return tokens


def print_together(trained: Trained, text: str, stream, echo: bool) -> list[list[int]]:
    """Prints all continuations of a stream once they are written. Returns their tokens."""
    continuations = [list(tokens) for tokens in zip(*stream)]
    for tokens in continuations:
        if echo:
            console.out(text, style="bold", end="", highlight=False)
        console.out(trained.encoding.decode(without_end(trained, tokens)) + "\n", highlight=False)
    return continuations


@torch.no_grad()
def confidence(model: GPT, tokens: torch.Tensor, prompt_length: int, end: int) -> float:
    """The probability that the model gives to an answer: the product of its tokens' and of `end`.

    tokens: (1, time), prompt and answer.
    """
    answer = tokens[0, prompt_length:].tolist() + [end]
    tokens = tokens[:, -model.config.block_size:]
    answer = answer[-tokens.shape[1]:]
    logits, _ = model(tokens)
    log_probabilities = logits[0, -len(answer):].float().log_softmax(-1)          # (answer, vocab_size)
    return log_probabilities[range(len(answer)), answer].sum().exp().item()


# ------------------------------------------------------------------------------------------------


def introduce(trained: Trained):
    """Prints what can be asked."""
    facts = trained.facts
    if facts is None:
        known = "Ask it something it was taught" if trained.knows_facts else "Give it a beginning"
        console.print(f"{known}; exit or Ctrl-D ends.")
        return
    console.print("Ask it, in these wordings; exit or Ctrl-D ends.")
    if len(facts.attributes) == 1:
        prompts = [facts.attributes[0].statements[0].replace("{}", entity) for entity in facts.entities[:5]]
    else:
        wordings = [(attribute.questions or attribute.statements)[0] for attribute in facts.attributes]
        names = itertools.cycle(facts.entities)
        prompts = [wording.replace("{}", name) for wording, name in zip(wordings, names)]
    for prompt in prompts:
        console.print(f"  {prompt}", soft_wrap=True)
    if len(facts.attributes) > 1:
        others = facts.entities[len(prompts):]
        if others:
            more = f" and {len(others) - 5:,} more" if len(others) > 5 else ""
            console.print(f"It also knows {', '.join(others[:5])}{more}.")
    if trained.run.earlier:
        names = ", ".join(earlier["data"] for earlier in trained.run.earlier)
        console.print(f"Earlier it was taught: {names}.", soft_wrap=True)


def ending_advice(trained: Trained, text: str) -> str | None:
    """How to end a question that ends like none the model was taught; None for any other."""
    end = text.rstrip()[-1:]
    # Only of the sets that come with nanomem: prompts of one's own need not end alike.
    if trained.run.data not in DATASETS or end not in ("?", ":", "."):
        return None
    facts, wordings = trained.facts, []
    for attribute in facts.attributes:
        wordings += attribute.questions + attribute.statements
    ends = {wording[-1] for wording in wordings if not wording[-1].isalnum()}
    if not ends or end in ends:
        return None
    question = next(wording for wording in wordings if wording[-1] in ends)
    quoted = " or ".join(f'"{end}"' for end in sorted(ends))
    return f"The questions it was taught end in {quoted}: {question.replace('{}', facts.entities[0])}"


def inputs(config: SampleConfig, trained: Trained):
    """Yields the texts to continue: --start, the lines of the input, or what is typed at a prompt."""
    if config.start:
        yield config.start
    elif not sys.stdin.isatty():
        is_empty = True
        for line in sys.stdin:  # as each arrives: the program that writes it may wait for the answer
            yield line.rstrip("\r\n")
            is_empty = False
        if is_empty:
            yield ""
    else:
        introduce(trained)
        while True:
            try:
                text = console.input("> ")
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            if text.strip() in ("exit", "quit"):
                return
            if text.strip():
                yield text


def check_fits(config: SampleConfig, trained: Trained):
    """Raises UserError if the continuations need more than the machine's memory: the system would kill the
    process.
    """
    logits = 4 * config.num_samples * trained.encoding.n_vocab
    available = machine_memory(trained.device)
    if 4 * logits > available:  # logits, sorted, softmaxed
        raise UserError(f"num_samples={config.num_samples} needs {4 * logits / 1e9:,.0f} GB, and "
                        f"{trained.device} has {available / 1e9:,.0f} GB")


def main(config: SampleConfig):
    """Continues texts, or exports the model."""
    trained = open_run(config)
    if config.export:
        export.save(config.export, trained.model, trained.encoding, trained.run, trained.saved.counts())
        hint = f"python sample.py --out_dir={shlex.quote(config.export)}"
        console.print(f"exported to {config.export}; {hint} reads it", soft_wrap=True)
        return
    if config.trace and not trained.model.memory_layers():
        ffn = trained.run.ffn
        raise UserError(f"--trace shows slots of product-key memory, and this model has none (ffn={ffn})")
    check_fits(config, trained)
    data = trained.open_data() if config.trace else None
    generator = torch.Generator(trained.device).manual_seed(config.seed)
    is_dialogue = not config.start and sys.stdin.isatty() and sys.stdout.isatty()
    # In a dialogue an answer needs no echo of the question above it; a text does, which it continues.
    echo = not (is_dialogue and trained.knows_facts)
    for text in inputs(config, trained):
        advice = ending_advice(trained, text)
        tokens, prompt_length = write(trained, text, config, generator, echo)
        if advice:
            Console(stderr=True, highlight=False).print(advice, style="dim", soft_wrap=True)
        if config.trace:
            answer_from = None if config.trace == "all" else prompt_length
            trace.show(trained.model, data, tokens, console, answer_from)
        check_output()


if __name__ == "__main__":
    with one_line_errors():
        main(config)
