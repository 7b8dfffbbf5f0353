"""
Which memory slots a prompt and its answer read, and what else reads them: sample.py --trace.
"""

from collections import Counter

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nanomem.data import FactData, TextData
from nanomem.model import GPT
from nanomem.observe import lookups_of

N_BATCHES, BATCH_SIZE = 20, 16  # of training data in which to look for readers of a slot
N_SLOTS, N_READERS = 3, 5  # to show
N_HITS = 300  # of a slot to look at, the heaviest


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
            total = Counter()
            for slot, weight in zip(slots[start:stop].flatten().tolist(),
                                    weights[start:stop].flatten().tolist()):
                total[slot] += weight / (stop - start) / shape.mem_heads
            top = total.most_common(N_SLOTS)
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


def split_words(encoding, tokens: list[int], prompt_length: int | None) -> list[tuple[int, int]]:
    """(start, stop) of each token; if tokens are bytes, of each word. A word begins with a blank, or where
    the answer begins.
    """
    starts = []
    for place, token in enumerate(tokens):
        is_special = token == encoding.eot_token
        after_special = place > 0 and tokens[place - 1] == encoding.eot_token
        begins = is_special or after_special or encoding.decode_single_token_bytes(token)[:1].isspace()
        if place in (0, prompt_length) or begins or not is_of_bytes(encoding):
            starts.append(place)
    return list(zip(starts, starts[1:] + [len(tokens)]))


def is_of_bytes(encoding) -> bool:
    """Whether each token is a byte."""
    return encoding.n_vocab <= 257


def readers(model: GPT, data, slots: set, console: Console) -> dict:
    """Which tokens of the training data read these slots most: {(layer, slot): texts, the heaviest first}.

    A text is a token after the few before it.
    """
    before = 14 if is_of_bytes(data.encoding) else 3  # tokens of context
    device = next(model.parameters()).device
    wanted = {layer: torch.tensor([slot for at, slot in slots if at == layer]) for layer, _ in slots}
    sequences, found = [], {layer: [] for layer in wanted}
    for i in track(range(N_BATCHES), "searching the training data", console=console, transient=True):
        start = 10**9 + i * BATCH_SIZE  # far from the sequences it was trained on
        x, _ = data.batch("train", start, BATCH_SIZE)
        for layer, (indices, weights) in lookups_of(model, x.to(device)).items():
            hits = torch.isin(indices, wanted[layer])                            # (n, heads, knn)
            positions = hits.nonzero()[:, 0] + i * x.numel()  # in all batches' tokens
            found[layer].append((indices[hits], weights[hits], positions))
        sequences.append(x)
    sequences = torch.cat(sequences)

    texts = {}
    for layer, slot in slots:
        indices, weights, positions = map(torch.cat, zip(*found[layer]))
        weights, positions = weights[indices == slot], positions[indices == slot]
        top = weights.topk(min(N_HITS, len(weights))).indices
        total = Counter()
        for weight, position in zip(weights[top].tolist(), positions[top].tolist()):
            sequence, column = divmod(position, sequences.shape[1])
            context = sequences[sequence, max(0, column - before):column + 1].tolist()
            total[data.encoding.decode(context).split("<|endoftext|>")[-1]] += weight
        texts[layer, slot] = [text for text, _ in total.most_common(N_READERS)]
    return texts


def visible(text: str) -> str:
    """Text with its line ends and other control characters written out, as in a Python string."""
    return repr(text.strip(" "))[1:-1]
