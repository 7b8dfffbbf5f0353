"""
The memory that retrofit.py adds to a pretrained model: one product-key lookup, values for several layers.

    s, I = softmax and slots of the k highest <W (x - mean), K_i>    per head, as in memory.py
    y_l  = V_l[0] + sum of s_i V_l[i]                                over the slots i of I that hold the facts

x is the input of a low layer's feed-forward module, and y_l is added to the output of layer l's. W and K are
random and fixed: they hash the hidden state, so that tokens with similar states read the same slots. In a low
layer, the state where a name ends hardly depends on the words around it. So a fact that is stored there is
found in new wordings, too, and the layers above choose from it what a prompt asks for.

Only slots chosen for some facts have values. A token with too little weight in them reads nothing, so that
other text is left as it was. Facts taught at one time are a set, with slots of their own and a row V_l[0] for
what they have in common. A token reads from one set only, so that later sets leave earlier ones as they were.
"""

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


class Lookup(nn.Module):
    """Which rows of values each token reads, the same in all layers of a memory.

    Args:
        place: the name of the module whose input is looked up.
        width: of that input.
        n_slots, heads, knn, k_dim: as in memory.py.
        silence: a token reads nothing unless more than this share of its weights lies in slots of one set.
    """

    def __init__(self, place: str, width: int, n_slots: int, heads: int, knn: int, k_dim: int,
                 silence: float):
        super().__init__()
        ops.check_lookup(n_slots, heads, knn, k_dim)
        self.place, self.width, self.n_slots, self.heads = place, width, n_slots, heads
        self.knn, self.k_dim, self.silence = knn, k_dim, silence
        keys = torch.randn(heads, 2, math.isqrt(n_slots), k_dim // 2)
        self.register_buffer("query_weight", torch.randn(heads * k_dim, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("keys", F.normalize(keys, dim=-1))
        self.register_buffer("set_of", torch.zeros(n_slots, dtype=torch.int64))  # each slot's; 0: none
        self.register_buffer("row_of", torch.zeros(n_slots, dtype=torch.int64))  # each slot's; 0: none
        self.register_buffer("first_row", torch.zeros(1, dtype=torch.int64))     # of each set, 0 included
        self.found = None  # what the tokens of the pass under way read

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The slots to read and their weights: x (n, width) -> (n, heads * knn) int64 and float."""
        centred = x.to(self.keys.dtype) - self.mean
        queries = F.linear(centred, self.query_weight).view(-1, self.heads, 2, self.k_dim // 2)
        queries = F.normalize(queries, dim=-1) * self.k_dim**0.5
        scores, slots = product_key_topk(queries, self.keys, self.knn)          # (n, heads, knn) each
        return slots.flatten(1), F.softmax(scores, dim=-1).flatten(1) / self.heads

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of x (n, width) that aren't silent, (m,) int64; rows and weights, (m, 1 + lookups) each.

        The first row is that of the set in which a token has the most weight. Other sets' slots weigh 0.
        """
        slots, weights = self(x)
        sets = self.set_of[slots]                                               # (n, lookups)
        shares = weights.new_zeros(len(x), len(self.first_row)).scatter_add(1, sets, weights)
        shares[:, 0] = 0.0                                                      # of slots without values
        share, best = shares.max(dim=1)                                         # (n,) each
        tokens = (share > self.silence).nonzero().squeeze(1)                    # (m,)
        weights = weights * (sets == best[:, None])
        rows = torch.cat([self.first_row[best][:, None], self.row_of[slots]], dim=1)
        return tokens, rows[tokens], F.pad(weights[tokens], (1, 0), value=1.0)

    @torch.no_grad()
    def keep(self, module, args, kwargs):
        """A hook before the module at `place`: keeps what its tokens read for the layers above."""
        x = args[0] if args else next(iter(kwargs.values()))
        self.found = self.read(x.reshape(-1, self.width))


class Values(MemoryTable):
    """The values of one layer. Its gradient is sparse on every device: torch.optim.SparseAdam takes it."""

    def __init__(self, n_rows: int, width: int):
        super().__init__(n_rows, width)
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
            raise ValueError(f"a memory can't be beside {type(module).__name__}: "
                             f"it returns a {type(output).__name__}, not a tensor")
        tokens, rows, weights = self.lookup.found
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
        """Makes a set of those slots (n,) int64 that have no values yet. Returns their rows in each table.

        Build optimizers after it. Values start at zero, except for the set's first row, which starts as that
        of the set before.
        """
        lookup = self.lookup
        new = slots.to(lookup.row_of.device).unique()
        new = new[lookup.row_of[new] == 0]
        if not len(new):
            return new
        first = len(self.tables[0].values)
        rows = torch.arange(first, first + 1 + len(new), device=new.device)
        before = lookup.first_row[-1]
        lookup.set_of[new], lookup.row_of[new] = len(lookup.first_row), rows[1:]
        lookup.first_row = torch.cat([lookup.first_row, rows[:1]])
        for table in self.tables:
            added = table.values.new_zeros(len(rows), table.v_dim)
            added[0] = table.values[before]
            table.values = nn.Parameter(torch.cat([table.values, added]))
            table.n_slots = len(table.values)
        return rows

    def teach_only(self, rows: Tensor):
        """From now on, only these rows (n,) int64 of each table get a gradient. Build optimizers after it."""
        is_fixed = torch.ones(len(self.tables[0].values), dtype=torch.bool, device=rows.device)
        is_fixed[rows] = False
        for table in self.tables:
            table.values = nn.Parameter(table.values.detach())  # one without the hook of an earlier call
            table.values.register_hook(functools.partial(without_rows, is_fixed))


def without_rows(is_fixed: Tensor, grad: Tensor) -> Tensor:
    """A sparse gradient in which these rows (n_rows,) bool are zero."""
    rows, grads = grad._indices()[0], grad._values()
    grads = grads.masked_fill(is_fixed[rows][:, None], 0.0)
    return torch.sparse_coo_tensor(rows[None], grads, grad.shape, check_invariants=False)


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
        states.append(args[0] if args else next(iter(kwargs.values())))
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

    All hidden states have a large part in common. Without it, different tokens read different slots.
    """
    states = torch.cat(list(hidden_states(model, memory.lookup.place, tokens.tolist())))
    memory.lookup.mean.copy_(states.float().mean(dim=0))


@torch.no_grad()
def choose_slots(model: nn.Module, memory: Memory, statements: list[Statement], text: Tensor) -> int:
    """Makes these facts a set; from then on only their slots are taught. Returns how many statements can't be
    taught, since their prompts read too few of these slots.

    What earlier sets hold stays as it is, except where a statement reads only from them: a fact about the
    same name, or the same fact again.

    text: ordinary text, (n, time) int64.
    """
    lookup = memory.lookup
    n_rows_before = len(memory.tables[0].values)
    taught, n_silent = [memory.add_set(slots_to_teach(model, lookup, statements, text))], 0
    prompts = [statement.tokens[:statement.start] for statement in statements]
    for x in hidden_states(model, lookup.place, prompts):
        tokens, rows, weights = lookup.read(x)                                  # rows (m, 1 + lookups)
        n_silent += len(tokens) == 0
        if (rows[:, 0] < n_rows_before).all():
            taught.append(rows[:, 1:][weights[:, 1:] > 0])
    memory.teach_only(torch.cat(taught))
    return n_silent


@torch.no_grad()
def slots_to_teach(model: nn.Module, lookup: Lookup, statements: list[Statement], text: Tensor,
                   least: float = 0.3, most: float = 0.1, most_in_text: float = 0.35) -> Tensor:
    """The slots by which facts can be told from each other and from other text: (n,) int64.

    Those that a share `least` of the wordings of a fact read, and that at most a share `most` of the facts
    read (or eight of them). Of these, leaves out the ones read by tokens of a text that have more than
    `most_in_text` of their weights in them.

    Args:
        text: ordinary text, (n, time) int64.
    """
    is_chosen, has_values = slots_of_facts(model, lookup, statements, least, most), lookup.row_of > 0
    for x in hidden_states(model, lookup.place, text.tolist()):
        slots, weights = lookup(x)                                              # (time, lookups) each
        share = (weights * (is_chosen | has_values)[slots]).sum(dim=1)          # (time,)
        is_chosen[slots[share > most_in_text]] = False
    return is_chosen.nonzero().squeeze(1)


def slots_of_facts(model, lookup, statements, least, most):
    """The slots that wordings of a fact share and few other facts read: (n_slots,) bool."""
    prompts = [statement.tokens[:statement.start] for statement in statements]
    wordings = {}  # fact -> the slots that each of its prompts reads
    for x, statement in zip(hidden_states(model, lookup.place, prompts), statements):
        wordings.setdefault(statement.fact, []).append(lookup(x)[0].unique())
    is_shared = torch.zeros_like(lookup.row_of, dtype=torch.bool)
    n_facts = torch.zeros_like(lookup.row_of)                                   # that read each slot
    for of_fact in wordings.values():
        slots, counts = torch.cat(of_fact).unique(return_counts=True)
        is_shared[slots[counts >= least * len(of_fact)]] = True
        n_facts[slots] += 1
    return is_shared & (n_facts <= max(8, most * len(wordings)))
