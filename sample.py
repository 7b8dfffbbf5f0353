"""
Talk to a model that train.py made.

    python sample.py                                        a prompt; answers as you ask
    python sample.py --start="Who employs Anna Oakworth:"
    python sample.py --start="Who employs Anna Oakworth:" --trace      and which memory slots each token read
    python sample.py --start="ROMEO:" --num_samples=4 --temperature=0.9 --top_p=0.95
    python sample.py --export=shared/model                  the model alone, in a folder that sample.py --out_dir=shared/model reads
"""

import codecs
import contextlib
import shlex
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nanomem import checkpoint, export, tokenizer
from nanomem.config import Config, UserError, one_line_errors, parse, pick_device, safe_streams, setting
from nanomem.data import open_data, open_tokenizer
from nanomem.facts import teaches_facts
from nanomem.observe import observe_lookups
from nanomem.model import GPT

safe_streams()
console = Console(highlight=False, markup=False, emoji=False)  # users' data is shown as it is


@dataclass
class SampleConfig:
    """The settings of sample.py."""

    out_dir: str = setting("auto", "folder of the run; auto: the latest in out/", group="Settings", path=True)
    start: str = setting("", "what to go on from; without it, each line of the input, or a prompt where that is a terminal")
    max_new_tokens: int = setting(100, "tokens to write at most")
    temperature: float = setting(-1.0, "0 takes the likeliest token, higher is bolder; -1: 0 for facts, 0.8 for text")
    top_k: int = setting(200, "choose among the top_k likeliest tokens; 0: among all")
    top_p: float = setting(1.0, "and among the fewest likeliest that have top_p of the probability")
    num_samples: int = setting(1, "how many continuations, written at the same time; one alone is shown as it comes")
    seed: int = setting(1337, "of the choice of tokens")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the first of cuda, mps and cpu that is there")
    trace: bool = setting(False, "show the memory slots each token read, and what else reads them")
    export: str = setting("", "write the model to this folder, without the optimizers' state", path=True)


def latest_run():
    """The folder in out/ with the newest checkpoint."""
    found = sorted(Path("out").glob(f"*/checkpoint-*/{checkpoint.HEADER}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("no run in out/: train one with python train.py, or name its folder with --out_dir")
    return found[-1].parent.parent


def open_run(config):
    """(model, encoding, settings) of the run in config.out_dir. Raises UserError where there is none."""
    out_dir = latest_run() if config.out_dir == "auto" else Path(config.out_dir)
    if (out_dir / export.FILE).exists():
        model, run = export.load(out_dir)
        console.print(f"{out_dir}: {run.data}, {run.ffn}", style="dim", soft_wrap=True)
        return model.to(pick_device(config.device)).eval(), open_tokenizer(run, out_dir / "tokenizer.tiktoken", None), run.replace(out_dir=str(out_dir))
    folder, header, refused = checkpoint.newest(out_dir)
    if header is None:
        raise UserError(f"{checkpoint.none_in(out_dir)}; --out_dir must name the folder of a run of train.py")
    for problem in refused.values():
        console.print(f"{problem}: using {folder}", soft_wrap=True)
    device = pick_device(config.device)
    run = Config.from_saved(header["config"], out_dir)
    encoding = open_tokenizer(run, out_dir / "tokenizer.tiktoken", None)
    model = GPT(run)
    checkpoint.load(folder, model)
    console.print(f"{out_dir}: {run.data}, {run.ffn}, {header['iteration']} iterations", style="dim", soft_wrap=True)
    return model.to(device).eval(), encoding, run.replace(out_dir=str(out_dir))


def check_output():
    """Ends the program once nobody reads on. Raises UserError if its output is lost: a full disk, say."""
    error = sys.stdout.error
    if isinstance(error, BrokenPipeError):
        sys.exit()
    if error:
        raise UserError(f"the output could not be written ({error.strerror or error})")


def write(model, encoding, text, config, facts, generator):
    """Writes num_samples continuations of text to the screen, one alone as it comes; returns all tokens of the last one, (1, time)."""
    end, device = encoding.eot_token, next(model.parameters()).device
    prompt = tokenizer.encode(encoding, text).tolist()
    prompt = [end] + prompt if facts or not prompt else prompt  # facts begin as documents do, after <|endoftext|>, and end with it
    temperature = config.temperature if config.temperature >= 0 else (0.0 if facts else 0.8)
    stream = model.generate(torch.tensor([prompt] * config.num_samples, device=device), config.max_new_tokens, temperature, config.top_k or None,
                            end if facts else None, generator, config.top_p, tokenizer.unassigned(encoding))
    rows, alone, started = [[] for _ in range(config.num_samples)], config.num_samples == 1, time.perf_counter()
    characters = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens
    if alone:
        console.out(text, style="bold", end="", highlight=False)
    for column in stream:
        for row, token in zip(rows, column.flatten().tolist()):
            row.append(token)
        check_output()
        if alone and not (facts and token == end):
            console.out(characters.decode(encoding.decode_single_token_bytes(token)), end="", highlight=False)
    seconds = time.perf_counter() - started
    if facts:
        rows = [row[:row.index(end)] if end in row else row for row in rows]
    count = sum(map(len, rows))
    if alone:
        console.print()
    else:
        for row in rows:
            console.out(text, style="bold", end="", highlight=False)
            console.out(encoding.decode(row) + "\n", highlight=False)
    Console(stderr=True, highlight=False).print(f"{count} tokens, {count / seconds:,.0f} tokens/s", style="dim")
    return torch.tensor([prompt + rows[-1]], device=device)


# ------------------------------------------------------------------------------------------------
# --trace


def lookups_of(model, tokens):
    """{layer number: (slots, weights)} for the last sequence: each (time, lookups), a token's weights summing to heads."""
    number_of = {layer: number for number, layer in model.memory_layers().items()}
    seen = {}

    def keep(layer, indices, weights):
        seen[number_of[layer]] = indices.flatten(1).cpu(), weights.flatten(1).float().cpu()

    with torch.no_grad(), observe_lookups(model, keep):
        model(tokens)
    return seen


def readers(model, data, slots, batches=20, batch_size=16):
    """Which tokens of the training data read these slots with most weight: {(layer, slot): Counter of token in context}."""
    found = defaultdict(Counter)
    wanted = {layer: torch.tensor(sorted(s for other, s in slots if other == layer)) for layer in {layer for layer, _ in slots}}
    for i in range(batches):
        start = 10**9 + i * batch_size  # far from the sequences it was trained on
        x, _ = data.batch("train", start, batch_size)
        for layer, (indices, weights) in lookups_of(model, x.to(next(model.parameters()).device)).items():
            for position, lookup in torch.isin(indices, wanted[layer]).nonzero().tolist():
                row, column = divmod(position, x.shape[1])
                context = data.encoding.decode(x[row, max(0, column - 3):column + 1].tolist()).split("<|endoftext|>")[-1]
                found[layer, indices[position, lookup].item()][context] += weights[position, lookup].item()
    return found


def visible(text):
    """Text with its line ends and other control characters written out, as in a Python string."""
    return repr(text)[1:-1]


def trace(model, data, tokens, shown=3):
    """Prints the slots each token read, most weight first, and the training tokens that read the top slots most."""
    looked_up = lookups_of(model, tokens[:, -model.config.block_size:])
    words = [data.encoding.decode([t]) for t in tokens[0, -model.config.block_size:].tolist()]
    table = Table(title=f"Slots read, and their weights within a head (the {shown} heaviest of "
                        f"{model.config.mem_heads} head{'s' * (model.config.mem_heads > 1)} x {model.config.mem_knn} slots)")
    for title in ("token", *(f"layer {layer}" for layer in looked_up)):
        table.add_column(title)
    heaviest = set()  # (layer, slot) of each token
    for t, word in enumerate(words):
        cells = []
        for layer, (indices, weights) in looked_up.items():
            weight, lookup = weights[t].topk(min(shown, weights.shape[1]))
            slots = indices[t, lookup].tolist()
            cells.append("  ".join(f"{slot}: {w:.2f}" for slot, w in zip(slots, weight.tolist())))
            heaviest.add((layer, slots[0]))
        table.add_row(visible(word).replace(" ", "·"), *cells)
    console.print(table)

    table = Table(title="What else reads each token's heaviest slot: the training tokens with most weight, after what came before them")
    for title in ("layer", "slot", "read by"):
        table.add_column(title)
    found = readers(model, data, heaviest)
    for layer, slot in sorted(heaviest):
        contexts = "  |  ".join(visible(context) for context, _ in found[layer, slot].most_common(5))
        table.add_row(str(layer), str(slot), contexts or "nothing in the sample")
    console.print(table)


# ------------------------------------------------------------------------------------------------


def answer(text):
    """Writes continuations of text, and traces the last of them if asked to."""
    tokens = write(model, encoding, text, config, teaches_facts(run.data), generator)
    if config.trace:
        trace(model, data, tokens)
    check_output()


with one_line_errors():
    config = SampleConfig(**parse(SampleConfig, sys.argv[1:]))
    if config.max_new_tokens < 1 or config.num_samples < 1 or config.top_k < 0:
        raise UserError("max_new_tokens and num_samples must be 1 or more, and top_k 0 or more")
    if not (0 <= config.temperature < float("inf") or config.temperature == -1):
        raise UserError(f"temperature must be 0 or more and finite, or -1 for the default; got {config.temperature}")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed must be from 0 to under 2**63, got {config.seed}")
    if not 0 < config.top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, got {config.top_p}")
    model, encoding, run = open_run(config)
    if config.export:
        export.save(config.export, model, encoding, run)
        hint = f"python sample.py --out_dir={shlex.quote(config.export)}"
        console.print(f"exported to {config.export}; {hint} reads it", soft_wrap=True)
        sys.exit()
    if config.trace and not model.memory_layers():
        raise UserError(f"--trace shows memory slots, and this model has no memory layers (ffn={run.ffn})")
    data = open_data(run, Path(run.out_dir) / "tokenizer.tiktoken") if config.trace else None
    generator = torch.Generator(next(model.parameters()).device).manual_seed(config.seed)
    if config.start:
        answer(config.start)
    elif not sys.stdin.isatty():
        empty = True
        for line in sys.stdin:  # as each arrives: the input may come from a program that waits for the answer
            answer(line.rstrip("\r\n"))
            empty = False
        if empty:
            answer("")
    else:
        console.print("Ask it something it was taught, or give it a beginning; Ctrl-D ends.")
        if teaches_facts(run.data):
            with contextlib.suppress(OSError, ValueError):  # a file of facts that is not there any more
                about = open_data(run, Path(run.out_dir) / "tokenizer.tiktoken").facts
                attribute = about.attributes[-1]
                console.print(f"For example: {(attribute.questions or attribute.statements)[0].replace('{}', about.entities[0])}", soft_wrap=True)
        while True:
            try:
                text = console.input("> ")
            except (EOFError, KeyboardInterrupt):
                console.print()
                break
            if text.strip():
                answer(text)
