"""
Talk to a model that train.py made.

    python sample.py                                        a prompt: ask, and it answers
    python sample.py --start="Who employs Anna Oakworth:"
    python sample.py --start="Who employs Anna Oakworth:" --trace      and which memory slots each token read
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
    trace: bool = setting(False, "show the memory slots each token read, and what else reads them")
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
import shlex
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nanomem import checkpoint, export, tokenizer
from nanomem.data import open_data, open_tokenizer
from nanomem.facts import teaches_facts
from nanomem.model import GPT
from nanomem.observe import observe_lookups

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

    def __post_init__(self):
        self.device = next(self.model.parameters()).device
        self.knows_facts = teaches_facts(self.run.data)  # otherwise it has learned from text

    def open_data(self):
        """The data it was trained on."""
        return open_data(self.run, Path(self.run.out_dir) / "tokenizer.tiktoken")


def open_run(config: SampleConfig) -> Trained:
    """The model of the run or export in config.out_dir. Raises UserError if there is none."""
    out_dir = latest_run() if config.out_dir == "auto" else Path(config.out_dir)
    device = pick_device(config.device)
    if (out_dir / export.FILE).exists():
        model, run = export.load(out_dir)
        about = f"{out_dir}: {run.data}, {run.ffn}"
    else:
        folder, header, refused = checkpoint.newest(out_dir)
        if header is None:
            raise UserError(f"{checkpoint.none_in(out_dir)}; --out_dir must name the folder of a run")
        for problem in refused.values():
            console.print(f"{problem}: using {folder}", soft_wrap=True)
        run = Config.from_saved(header["config"], out_dir)
        model = GPT(run)
        checkpoint.load(folder, model)
        about = f"{out_dir}: {run.data}, {run.ffn}, {header['iteration']} iterations"
    encoding = open_tokenizer(run, out_dir / "tokenizer.tiktoken", None)
    console.print(about, style="dim", soft_wrap=True)
    return Trained(model.to(device).eval(), encoding, run.replace(out_dir=str(out_dir)))


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


def write(trained: Trained, text: str, config: SampleConfig, generator: torch.Generator) -> torch.Tensor:
    """Prints num_samples continuations of text, a single one as it is written.

    Returns the prompt and the last continuation, (1, time) int64.
    """
    encoding, facts, end = trained.encoding, trained.knows_facts, trained.encoding.eot_token
    prompt = tokenizer.encode(encoding, text).tolist()
    if facts or not prompt:
        prompt = [end] + prompt  # facts come after <|endoftext|>, and end with it
    temperature = config.temperature
    if temperature < 0:
        temperature = 0.0 if facts else 0.8
    idx = torch.tensor([prompt] * config.num_samples, device=trained.device)
    stream = trained.model.generate(
        idx, config.max_new_tokens, temperature, config.top_k or None, end if facts else None, generator,
        config.top_p, tokenizer.unassigned(encoding))
    started, is_single = time.perf_counter(), config.num_samples == 1
    continuations = [[] for _ in range(config.num_samples)]
    characters = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens
    if is_single:
        console.out(text, style="bold", end="", highlight=False)
    for column in stream:  # (num_samples, 1)
        tokens = column.flatten().tolist()
        for continuation, token in zip(continuations, tokens):
            continuation.append(token)
        check_output()
        if is_single and not (facts and tokens[0] == end):
            written = characters.decode(encoding.decode_single_token_bytes(tokens[0]))
            console.out(written, end="", highlight=False)
    seconds = time.perf_counter() - started
    if facts:
        continuations = [tokens[:tokens.index(end)] if end in tokens else tokens for tokens in continuations]
    if is_single:
        console.print()
    else:
        for tokens in continuations:
            console.out(text, style="bold", end="", highlight=False)
            console.out(encoding.decode(tokens) + "\n", highlight=False)
    count = sum(len(tokens) for tokens in continuations)
    speed = f"{count} tokens, {count / seconds:,.0f} tokens/s"
    Console(stderr=True, highlight=False).print(speed, style="dim")
    return torch.tensor([prompt + continuations[-1]], device=trained.device)


# ------------------------------------------------------------------------------------------------
# --trace


def lookups_of(model: GPT, tokens: torch.Tensor) -> dict:
    """{layer number: (slots, weights)}, (batch * time, lookups) each; a token's weights add up to the
    number of heads.
    """
    number_of = {layer: number for number, layer in model.memory_layers().items()}
    seen = {}

    def keep(layer, indices, weights):
        seen[number_of[layer]] = indices.flatten(1).cpu(), weights.flatten(1).float().cpu()

    with torch.no_grad(), observe_lookups(model, keep):
        model(tokens)
    return seen


def readers(trained: Trained, data, slots: set, batches: int = 20, batch_size: int = 16) -> dict:
    """Which tokens of the training data read these slots: {(layer, slot): Counter of weight by token in
    context}.
    """
    found, wanted = defaultdict(Counter), defaultdict(list)
    for layer, slot in sorted(slots):
        wanted[layer].append(slot)
    for i in range(batches):
        start = 10**9 + i * batch_size  # far from the sequences it was trained on
        x, _ = data.batch("train", start, batch_size)
        for layer, (indices, weights) in lookups_of(trained.model, x.to(trained.device)).items():
            for position, lookup in torch.isin(indices, torch.tensor(wanted[layer])).nonzero().tolist():
                sequence, column = divmod(position, x.shape[1])
                context = x[sequence, max(0, column - 3):column + 1].tolist()
                text = data.encoding.decode(context).split("<|endoftext|>")[-1]
                slot = indices[position, lookup].item()
                found[layer, slot][text] += weights[position, lookup].item()
    return found


def visible(text: str) -> str:
    """Text with its line ends and other control characters written out, as in a Python string."""
    return repr(text)[1:-1]


def trace(trained: Trained, data, tokens: torch.Tensor, shown: int = 3):
    """Prints the slots each token read, most weight first, and the training tokens that read the top slots
    most.
    """
    shape = trained.model.config
    tokens = tokens[:, -shape.block_size:]
    looked_up = lookups_of(trained.model, tokens)
    heads = f"{shape.mem_heads} head" if shape.mem_heads == 1 else f"{shape.mem_heads} heads"
    table = Table(title=f"Slots read, and their weights within a head (the {shown} heaviest of "
                        f"{heads} x {shape.mem_knn} slots)")
    for title in ("token", *(f"layer {layer}" for layer in looked_up)):
        table.add_column(title)
    heaviest = set()  # (layer, slot) for each token
    for t, token in enumerate(tokens[0].tolist()):
        cells = []
        for layer, (indices, weights) in looked_up.items():
            weight, lookup = weights[t].topk(min(shown, weights.shape[1]))
            slots = indices[t, lookup].tolist()
            cells.append("  ".join(f"{slot}: {w:.2f}" for slot, w in zip(slots, weight.tolist())))
            heaviest.add((layer, slots[0]))
        word = visible(data.encoding.decode([token])).replace(" ", "·")
        table.add_row(word, *cells)
    console.print(table)

    table = Table(title="What else reads each token's heaviest slot: the training tokens with most weight, "
                        "after what came before them")
    for title in ("layer", "slot", "read by"):
        table.add_column(title)
    found = readers(trained, data, heaviest)
    for layer, slot in sorted(heaviest):
        contexts = "  |  ".join(visible(context) for context, _ in found[layer, slot].most_common(5))
        table.add_row(str(layer), str(slot), contexts or "nothing in the sample")
    console.print(table)


# ------------------------------------------------------------------------------------------------


def example(trained: Trained) -> str | None:
    """A question to try; None for a model of text, or if the file of facts is gone."""
    if not trained.knows_facts:
        return None
    with contextlib.suppress(OSError, ValueError):
        facts = trained.open_data().facts
        attribute = facts.attributes[-1]
        return (attribute.questions or attribute.statements)[0].replace("{}", facts.entities[0])
    return None


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
        console.print("Ask it something it was taught, or give it a beginning; Ctrl-D ends.")
        question = example(trained)
        if question:
            console.print(f"For example: {question}", soft_wrap=True)
        while True:
            try:
                text = console.input("> ")
            except (EOFError, KeyboardInterrupt):
                console.print()
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
        export.save(config.export, trained.model, trained.encoding, trained.run)
        hint = f"python sample.py --out_dir={shlex.quote(config.export)}"
        console.print(f"exported to {config.export}; {hint} reads it", soft_wrap=True)
        return
    if config.trace and not trained.model.memory_layers():
        ffn = trained.run.ffn
        raise UserError(f"--trace shows slots of product-key memory, and this model has none (ffn={ffn})")
    check_fits(config, trained)
    data = trained.open_data() if config.trace else None
    generator = torch.Generator(trained.device).manual_seed(config.seed)
    for text in inputs(config, trained):
        tokens = write(trained, text, config, generator)
        if config.trace:
            trace(trained, data, tokens)
        check_output()


if __name__ == "__main__":
    with one_line_errors():
        main(config)
