"""
Which memory slots a prompt and its answer read, and what else reads them: sample.py --trace.
"""

import functools

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nanomem.data import FactData, TextData
from nanomem.model import GPT
from nanomem.observe import lookups_of, slot_shares
from nanomem.readers import Sample, split_words, visible

N_BATCHES = 20  # of training data in which to look for readers of a slot
N_SLOTS, N_READERS = 3, 5  # to show


def show(
        model: GPT, data: FactData | TextData, tokens: torch.Tensor, console: Console,
        prompt_length: int | None):
    """Prints the slots that each word read, and what else in the training data reads the heaviest of them.

    tokens: (1, time) int64, prompt and answer. With prompt_length, only what the answer was made from: the
    prompt's last word, and the answer's words.
    """
    words = split_words(data.encoding, tokens[0].tolist(), prompt_length)
    if prompt_length is not None:
        words = [(start, stop) for start, stop in words if stop >= prompt_length]
    shape, first = model.config, max(0, tokens.shape[1] - model.config.block_size)
    words = [(max(0, start - first), stop - first) for start, stop in words if stop > first]
    tokens = tokens[:, first:]
    looked_up = lookups_of(model, tokens)

    heads = "1 head" if shape.mem_heads == 1 else f"{shape.mem_heads} heads"
    table = Table(title=f"Slots read: the {N_SLOTS} heaviest of {heads} x {shape.mem_knn}")
    table.add_column("word", overflow="fold")
    for layer in looked_up:
        table.add_column(f"layer {layer}, slot:weight")
    heaviest = set()  # (layer, slot)
    for start, stop in words:
        cells = []
        for layer, (slots, weights) in looked_up.items():
            top = slot_shares(slots[start:stop], weights[start:stop]).most_common(N_SLOTS)
            cells.append(" ".join(f"{slot}:{weight:.0%}" for slot, weight in top))  # wraps between entries
            heaviest.add((layer, top[0][0]))
        table.add_row(visible(data.encoding.decode(tokens[0, start:stop].tolist())), *cells)
    console.print(table)
    show_readers(model, data, heaviest, console)


def show_readers(model, data, slots, console):
    """Prints which tokens of the training data read slots most, with what came before them."""
    table = Table(title="What else reads each word's heaviest slot")
    for title in ("layer", "slot"):
        table.add_column(title)
    table.add_column("tokens of the training data, in context", no_wrap=True, overflow="ellipsis")
    found = readers(model, data, slots, console)
    for layer, slot in sorted(slots):
        contexts = [visible(context) for context in found[layer, slot]]
        table.add_row(str(layer), str(slot), "\n".join(contexts) or "nothing in the sample",
                      end_section=True)
    console.print(table)


def readers(model: GPT, data, slots: set, console: Console) -> dict:
    """Which tokens of the training data read these slots most: {(layer, slot): texts, the heaviest first}.

    A text is a token after the few before it.
    """
    wanted = {}
    for layer, slot in slots:
        wanted.setdefault(layer, []).append(slot)
    tracked = functools.partial(
        track, description="searching the training data", total=N_BATCHES, console=console, transient=True)
    sample = Sample.of_training(model, data, N_BATCHES, wanted=wanted, track=tracked)
    texts = {}
    for layer, slot in slots:
        texts[layer, slot] = [text for text, _ in sample.contexts(layer, slot, N_READERS)]
    return texts
