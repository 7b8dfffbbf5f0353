"""
The memory that retrofit.py adds to a pretrained model: one product-key lookup, values for several layers.

    q   = W (x - mean), each half scaled to norm sqrt(k_dim)   for each head
    I   = the k slots i with the highest <q, K_i>              of each head, as in memory.py
    s   = softmax(<q, K_I>) / number of heads
    S   = the set of facts whose slots have most of the weights s
    y_l = c_l[S] + sum of s_i V_l[S, i]                        over the slots of I in S

x is the input of a low layer's feed-forward module, and y_l is added to the output of layer l's. W and K are
random and fixed: they hash the hidden state, so that tokens with similar states read the same slots. In a low
layer, the state where a name ends hardly depends on the words around it. So a fact that is stored there is
found in new wordings, too, and the layers above choose from it what a prompt asks for.

Only slots chosen for some facts have values. A token with too little weight in them reads nothing, so nearly
all other text is left as it was. Facts taught at one time are a set, with rows of values of its own and a row
c_l for what its facts have in common. A token reads one set only.

New facts get new rows. But where names are similar, tokens of an earlier name may switch to the new set. So a
memory keeps all statements that it was given, and those that new facts affect are taught again.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanomem import ops
from nanomem.memory import MemoryTable, product_key_topk
from nanomem.pretrained import Statement, pad


def input_of(args, kwargs) -> Tensor:
    """What a module was called with, from the arguments of its hook."""
    return args[0] if args else next(iter(kwargs.values()))


class Lookup(nn.Module):
    """Which rows of values each token reads, the same in all layers of a memory.

    Args:
        place: the name of the module whose input is looked up.
        width: of that input.
        n_slots, heads, knn, k_dim: as in memory.py.
        silence: a token reads nothing unless more than this share of its weights lies in slots of one set.
        seed: of the random queries and keys.
    """

    def __init__(self, place: str, width: int, n_slots: int, heads: int, knn: int, k_dim: int,
                 silence: float, seed: int = 0):
        super().__init__()
        ops.check_lookup(n_slots, heads, knn, k_dim)
        self.place, self.width, self.n_slots, self.heads = place, width, n_slots, heads
        self.knn, self.k_dim, self.silence = knn, k_dim, silence
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(heads, 2, math.isqrt(n_slots), k_dim // 2, generator=generator)
        self.register_buffer("query_weight", torch.randn(heads * k_dim, width, generator=generator))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("keys", F.normalize(keys, dim=-1))
        # The row of each slot in each set, 0 if it has none; and the first row of each set. Row 0 is never
        # trained: slots without values read it, with a weight of 0.
        self.register_buffer("row_of", torch.zeros(0, n_slots, dtype=torch.int32))
        self.register_buffer("first_row", torch.zeros(0, dtype=torch.int32))
        self.statements: list[Statement] = []  # all it was given; no two facts have the same number
        self.current = None  # what the tokens of the forward pass under way read, as read() returns it

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The slots to read and their weights: x (n, width) -> (n, heads * knn) int64 and float."""
        centred = x.to(self.keys.dtype) - self.mean
        queries = F.linear(centred, self.query_weight).view(-1, self.heads, 2, self.k_dim // 2)
        queries = F.normalize(queries, dim=-1) * self.k_dim**0.5
        scores, slots = product_key_topk(queries, self.keys, self.knn)          # (n, heads, knn) each
        return slots.flatten(1), F.softmax(scores, dim=-1).flatten(1) / self.heads

    def best_set(self, is_in: Tensor, weights: Tensor) -> Tensor:
        """The set that each token reads, (n,) int64, or -1 for a silent token: the one with the largest share
        of the token's weights, the first if several are equal.

        is_in: which slots of each token are in each set, (n_sets, n, lookups) bool; weights (n, lookups).
        """
        shares = (weights * is_in).sum(dim=2)                                   # (n_sets, n)
        # The threshold comes first: it wins, as set -1, if no set exceeds it, or if there are no sets.
        threshold = torch.full_like(weights[None, :, 0], self.silence)          # (1, n)
        return torch.cat([threshold, shares]).argmax(dim=0) - 1

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of x (n, width) that aren't silent, (m,) int64; rows and weights, (m, 1 + lookups) each.

        The first row is that of the token's set, for what its facts have in common.
        """
        return self.rows_read(*self(x))

    def rows_read(self, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What read() returns for tokens with these slots and weights, (n, lookups) each."""
        best = self.best_set(self.row_of[:, slots] > 0, weights)
        tokens = (best >= 0).nonzero().squeeze(1)                               # (m,)
        best, slots, weights = best[tokens, None], slots[tokens], weights[tokens]
        rows = self.row_of[best, slots]                                         # (m, lookups)
        weights = weights * (rows > 0)
        return tokens, torch.cat([self.first_row[best], rows], dim=1), F.pad(weights, (1, 0), value=1.0)

    @torch.no_grad()
    def keep(self, module, args, kwargs):
        """A hook before the module at `place`: keeps what its tokens read for the layers above."""
        self.current = self.read(input_of(args, kwargs).reshape(-1, self.width))


class Values(MemoryTable):
    """The values of one layer. Its gradient is sparse on every device: torch.optim.SparseAdam takes it."""

    def reset_parameters(self):
        """Sets the values to zero, so that a new memory changes nothing."""
        nn.init.zeros_(self.values)

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of rows (m, lookups): -> (m, width)"""
        return F.embedding_bag(rows, self.values, per_sample_weights=weights.to(self.values.dtype),
                               mode="sum", sparse=True)


class LayerMemory(nn.Module):
    """What a memory adds to the output of one module."""

    def __init__(self, lookup: Lookup, table: Values):
        super().__init__()
        self.lookup, self.table = lookup, table

    def add(self, module, args, kwargs, output):
        """A hook after that module: its output, plus what its tokens read."""
        if not isinstance(output, Tensor):
            raise ValueError(f"a memory can't be added to {type(module).__name__}: "
                             f"it returns a {type(output).__name__}, not a tensor")
        tokens, rows, weights = self.lookup.current
        read = self.table(rows, weights).to(output.dtype)                       # (m, width)
        return output.reshape(-1, output.shape[-1]).index_add(0, tokens, read).view_as(output)


class Memory(nn.Module):
    """A memory that was added to a model.

    Args:
        lookup: what decides which rows are read.
        places: the names of the modules it adds to.
        tables: the values for each of them.
    """

    def __init__(self, lookup: Lookup, places: list[str], tables: list[Values]):
        super().__init__()
        self.lookup, self.places, self.tables = lookup, places, nn.ModuleList(tables)

    @torch.no_grad()
    def add_set(self, slots: Tensor) -> Tensor:
        """Makes a set of these slots (n,) int64. Returns its rows in each table.

        It makes new Parameters, so build optimizers after it. Values start at zero, except for the set's
        first row, which starts as that of the set before.
        """
        lookup, first = self.lookup, len(self.tables[0].values)
        slots = slots.to(lookup.row_of.device).unique()
        rows = torch.arange(first, first + 1 + len(slots), dtype=torch.int32, device=slots.device)
        for table in self.tables:
            added = table.values.new_zeros(len(rows), table.v_dim)
            if len(lookup.first_row):
                added[0] = table.values[lookup.first_row[-1]]
            table.values = nn.Parameter(torch.cat([table.values, added]))
            table.n_slots = len(table.values)
        of_set = lookup.row_of.new_zeros(1, lookup.n_slots)
        of_set[0, slots] = rows[1:]
        lookup.row_of = torch.cat([lookup.row_of, of_set])
        lookup.first_row = torch.cat([lookup.first_row, rows[:1]])
        return rows

    def teach_only(self, rows: Tensor) -> Tensor:
        """From now on, only these rows (n,) of each table get a gradient, and never row 0. Returns which
        those are, (n_rows,) bool.

        It makes new Parameters, so build optimizers after it. A copy of the model doesn't know about it.
        """
        is_taught = torch.zeros(len(self.tables[0].values), dtype=torch.bool, device=rows.device)
        is_taught[rows.long()] = True
        is_taught[0] = False  # no slot's
        for table in self.tables:
            table.values = nn.Parameter(table.values.detach())  # one without the hook of an earlier call
            table.values.register_hook(functools.partial(only_rows, is_taught))
        return is_taught


def only_rows(is_taught: Tensor, grad: Tensor) -> Tensor:
    """Drops the rows of a sparse gradient that aren't taught: is_taught (n_rows,) bool."""
    rows, grads = grad._indices()[0], grad._values()
    is_kept = is_taught.to(rows.device)[rows]
    return torch.sparse_coo_tensor(rows[None, is_kept], grads[is_kept], grad.shape, check_invariants=False)


def build_adam(memory: Memory, mem_lr: float = 0.5) -> torch.optim.Optimizer:
    """Adam for the rows that an update reads. It learns facts in fewer readings than RowAdam, and has 8 bytes
    of state for each number, where RowAdam has 8 for each row.
    """
    values = [table.values for table in memory.tables]
    return torch.optim.SparseAdam(values, lr=mem_lr, betas=(0.9, 0.95))


# ------------------------------------------------------------------------------------------------
# Which slots to teach


class Enough(Exception):
    """Ends a forward pass whose upper layers aren't needed."""


@torch.no_grad()
def hidden_states(model: nn.Module, place: str, sequences: list[list[int]],
                  batch_size: int = 64) -> Iterator[Tensor]:
    """What the module at a place gets for each sequence of tokens: (time, width). Runs no layer above it."""
    states = []

    def keep(module, args, kwargs):
        states.append(input_of(args, kwargs))
        raise Enough

    device = next(model.parameters()).device
    hook = model.get_submodule(place).register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
    try:
        for begin in range(0, len(sequences), batch_size):
            x, mask = pad(sequences[begin:begin + batch_size])
            try:
                model(x.to(device), attention_mask=mask.long().to(device), use_cache=False)
            except Enough:
                yield from (state[is_token] for state, is_token in zip(states.pop(), mask.to(device)))
    finally:
        hook.remove()


def centre_queries(model: nn.Module, memory: Memory, tokens: Tensor):
    """Makes a new memory subtract the mean hidden state over a text, tokens (n, time), before it looks up.

    Hidden states have a large part in common. Without that part, different tokens read different slots.
    """
    total, count = torch.zeros_like(memory.lookup.mean), 0
    for x in hidden_states(model, memory.lookup.place, tokens.tolist()):
        total += x.sum(dim=0, dtype=total.dtype)
        count += len(x)
    memory.lookup.mean.copy_(total / count)


@torch.no_grad()
def choose_slots(model: nn.Module, memory: Memory, statements: list[Statement],
                 text: Tensor) -> tuple[list[Statement], list[Statement]]:
    """Adds rows for these facts and makes only them trainable. Returns (new statements that read a trainable
    row, earlier ones that do). Train on both, or the earlier ones may be lost. Build optimizers after it.

    New facts get a new set of rows. A fact that was given before is taught in the rows that its wordings
    already read, or else these would go on giving the old answer. A fact also stays in old rows if none of
    its wordings reads the new set: then an earlier fact is about the same name. If a statement gives an
    earlier fact another answer, the earlier one is dropped from what is taught again.

    Raises ValueError without statements, and if the memory has values for all slots.

    text: ordinary text, (n, time) int64.
    """
    lookup = memory.lookup
    if not statements:
        raise ValueError("there are no statements to choose slots for")
    if (lookup.row_of > 0).all(dim=1).any():
        raise ValueError("this memory has values for all slots; make it with all_slots=False")
    found = lookups_of(model, lookup, [one.prompt for one in statements])
    taught = taught_before(lookup, statements, found)
    is_chosen = slots_to_teach(model, lookup, statements, found, text, taught)
    is_taught = memory.teach_only(rows_to_teach(memory, statements, found, is_chosen, taught))
    earlier = earlier_statements(lookup, statements)
    lookup.statements = earlier + statements
    # Of an earlier statement, the answer's tokens count, too, except for the last, which predicts nothing.
    found_earlier = lookups_of(model, lookup, [one.tokens[:-1] for one in earlier])
    return (those_reading(lookup, statements, found, is_taught),
            those_reading(lookup, earlier, found_earlier, is_taught))


def taught_before(lookup: Lookup, statements: list[Statement],
                  found: list[tuple[Tensor, Tensor]]) -> set[int]:
    """The facts of which a prompt was given before and reads some row.

    found: the lookups_of the statements' prompts.
    """
    prompts = {tuple(one.prompt) for one in lookup.statements}
    given = [i for i, one in enumerate(statements) if tuple(one.prompt) in prompts]
    return {statements[i].fact for i in given if len(lookup.rows_read(*found[i])[0])}


def rows_to_teach(memory: Memory, statements: list[Statement], found: list[tuple[Tensor, Tensor]],
                  is_chosen: Tensor, taught: set[int]) -> Tensor:
    """Makes a set of the chosen slots, (n_slots,) bool, if some token would read it. Returns the rows to
    teach: the new set's, and the old rows of facts that don't read it or are among those taught before.

    found: the lookups_of the statements' prompts.
    """
    lookup, new_set = memory.lookup, len(memory.lookup.row_of)
    # Which sets would be read if the new one were there already
    is_in = torch.cat([lookup.row_of > 0, is_chosen[None]])                     # (n_sets, n_slots)
    sets = [lookup.best_set(is_in[:, slots], weights) for slots, weights in found]  # (time,) each
    in_new = {statement.fact for statement, read in zip(statements, sets) if (read == new_set).any()}
    rows = [memory.add_set(is_chosen.nonzero().squeeze(1))] if in_new else []
    for statement, (slots, _), read in zip(statements, found, sets):
        if statement.fact in taught or statement.fact not in in_new:
            speaks = read >= 0
            rows.append(lookup.row_of[read[speaks, None], slots[speaks]].flatten())
    return torch.cat(rows)


def earlier_statements(lookup: Lookup, statements: list[Statement]) -> list[Statement]:
    """What a memory was given before and should keep: not the prompts of these statements, nor any wording
    of a fact to which they give another answer.

    Since a round reads each fact once, facts get new numbers: those that share a prompt with one of
    statements get its number, the others get numbers that statements don't use.
    """
    new = {tuple(one.prompt): one for one in statements}
    corrected, number_of = set(), {}
    for one in lookup.statements:
        same = new.get(tuple(one.prompt))
        if same:
            number_of[one.fact] = same.fact
            if same.tokens != one.tokens:
                corrected.add(one.fact)
    unused = 1 + max(one.fact for one in statements)
    return [dataclasses.replace(one, fact=number_of.get(one.fact, unused + one.fact))
            for one in lookup.statements if one.fact not in corrected and tuple(one.prompt) not in new]


def those_reading(lookup: Lookup, statements: list[Statement], found: list[tuple[Tensor, Tensor]],
                  is_taught: Tensor) -> list[Statement]:
    """The statements of which a token reads some row that is_taught, (n_rows,) bool.

    found: the lookups_of each statement's tokens.
    """
    reading = []
    for statement, (slots, weights) in zip(statements, found):
        _, rows, _ = lookup.rows_read(slots, weights)
        if is_taught[rows].any():
            reading.append(statement)
    return reading


@torch.no_grad()
def lookups_of(model: nn.Module, lookup: Lookup, sequences: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    """The slots that the tokens of each sequence look up and their weights, (time, lookups) each."""
    return [lookup(x) for x in hidden_states(model, lookup.place, sequences)]


@torch.no_grad()
def slots_to_teach(model: nn.Module, lookup: Lookup, statements: list[Statement],
                   found: list[tuple[Tensor, Tensor]], text: Tensor, taught: set[int] = frozenset(),
                   least: float = 0.3, most: float = 0.1, most_in_text: float = 0.35) -> Tensor:
    """The slots by which facts can be told from each other and from other text: (n_slots,) bool.

    1. Keeps the slots that at least a share `least` of a fact's wordings read.
    2. Drops those that more than a share `most` of the facts read, if these are more than eight.
    3. Drops what a token of ordinary text reads if more than `most_in_text` of its weights lie in those left.
    4. Keeps only those where a name ends.

    Args:
        found: the lookups_of the statements' prompts.
        text: ordinary text, (n, time) int64.
        taught: facts that have rows already. They only count as other facts, and get no slots.
    """
    if all(statement.fact in taught for statement in statements):
        return torch.zeros(lookup.n_slots, dtype=torch.bool, device=lookup.keys.device)
    wordings = {}  # fact -> for each of its prompts, the slots and weights of its tokens
    for statement, read in zip(statements, found):
        wordings.setdefault(statement.fact, []).append(read)
    n_facts, shared = slots_of_facts(wordings.values(), lookup.n_slots, least)
    is_rare = n_facts <= max(8, most * len(wordings))                           # (n_slots,)
    is_candidate = torch.zeros_like(is_rare)
    is_candidate[torch.cat(shared)] = True
    is_candidate &= is_rare
    for x in hidden_states(model, lookup.place, text.tolist()):
        slots, weights = lookup(x)
        share = (weights * is_candidate[slots]).sum(dim=1)                      # (time,)
        is_candidate[slots[share > most_in_text]] = False
    is_chosen = torch.zeros_like(is_rare)
    for fact, of_fact, slots_shared in zip(wordings, wordings.values(), shared):
        if fact in taught:
            continue
        worth = torch.zeros(lookup.n_slots, device=is_rare.device)
        worth[slots_shared] = is_candidate[slots_shared] / n_facts[slots_shared]
        for slots, weights in of_fact:
            is_chosen[slots_of_end(slots, weights, worth)] = True
    return is_chosen


def slots_of_facts(facts, n_slots: int, least: float) -> tuple[Tensor, list[Tensor]]:
    """How many facts read each slot, (n_slots,) int64; and the slots that a share `least` of the prompts of
    each fact read, a list of (u,) int64.

    facts: for each, a list of (slots, weights), (time, lookups) each, of its prompts.
    """
    n_facts, shared = 0, []
    for prompts in facts:
        slots, counts = torch.cat([slots.unique() for slots, _ in prompts]).unique(return_counts=True)
        n_facts = n_facts + torch.bincount(slots, minlength=n_slots)
        shared.append(slots[counts >= least * len(prompts)])
    return n_facts, shared


def slots_of_end(slots: Tensor, weights: Tensor, worth: Tensor) -> Tensor:
    """The slots with a worth that the end of a name reads: (u,) int64.

    That is the last token whose slots, weighted, are worth more than half of those of the best token.
    The tokens before it are parts of a name, which other names and other text have, too.

    slots, weights: of a prompt's tokens, (time, lookups) each. worth (n_slots,): 1 for a slot that only this
    fact reads, less for others, 0 for those that can't be used.
    """
    total = (weights * worth[slots]).sum(dim=1)                                 # (time,)
    ends = (total > total.max() / 2).nonzero().flatten()
    last = slots[ends[-1:]].flatten()
    return last[worth[last] > 0]
