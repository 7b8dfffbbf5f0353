"""nanomem/adapter.py on tiny random models of transformers."""

import copy
import dataclasses

import pytest
import torch
import torch.nn as nn

from nanomem import adapter, pretrained
from nanomem.retrofit import add_memory

pytest.importorskip("transformers")
from tiny_models import KINDS, SHAPE, facts_of_names, logits, make, tokens  # noqa: E402

WORDINGS = [20, 21, 22], [23, 24, 25], [26, 27, 28]


def test_only_slots_of_single_facts_are_taught():
    model = make()
    memory = add_memory(model, [0, 1], n_slots=64**2, heads=2, knn=8, k_dim=8, silence=0.2, all_slots=False)
    adapter.centre_queries(model, memory, tokens(2, 20))
    statements, text = facts_of_names(range(100, 112), WORDINGS), torch.tensor([[100, 31, 32]])
    found = adapter.lookups_of(model, memory.lookup, [one.prompt for one in statements])
    chosen = adapter.slots_to_teach(model, memory.lookup, statements, found, text)

    def slots(sequence):
        state, = adapter.hidden_states(model, memory.lookup.place, [sequence])
        return memory.lookup(state)[0]                                          # (time, lookups)

    assert chosen.any() and chosen.float().mean() < 0.1
    assert not chosen[slots([20, 21, 22])].any()                # all facts read them
    assert not chosen[slots([100, 31, 32])[0]].any()            # ordinary text reads them
    assert chosen[slots(statements[15].tokens[:4])[3]].any()    # a name, after one of its wordings

    teachable, again = adapter.choose_slots(model, memory, statements, text)
    prompts = [statement.tokens[:7] for statement in statements]
    states = list(adapter.hidden_states(model, memory.lookup.place, prompts))
    reads = [len(memory.lookup.read(state)[0]) > 0 for state in states]
    assert teachable == [statement for statement, is_read in zip(statements, reads) if is_read]
    assert again == [] and memory.lookup.statements == statements
    assert all(reads[3:])  # the first name is in the text
    before = logits(model)
    pretrained.teach(model, [adapter.build_adam(memory)], statements, 3, batch_size=4)
    assert len(memory.tables[0].values) == 2 + chosen.sum()
    assert all(table.values.any() for table in memory.tables)
    assert torch.equal(logits(model, torch.tensor([[20, 21, 22]])),
                       logits(make(), torch.tensor([[20, 21, 22]])))  # silent
    assert not torch.equal(logits(model, torch.tensor([statements[15].tokens])),
                           logits(make(), torch.tensor([statements[15].tokens])))
    assert torch.equal(before, logits(make()))  # choosing slots changes nothing


def test_the_slots_where_a_name_ends():
    slots = torch.tensor([[0, 1], [2, 3], [4, 5]])
    weights = torch.tensor([[0.5, 0.5], [0.4, 0.6], [0.5, 0.5]])

    def end(*worth):
        return sorted(adapter.slots_of_end(slots, weights, torch.tensor(worth)).tolist())

    assert end(1.0, 1.0, 1.0, 1.0, 0.0, 0.9) == [2, 3]  # the last token has less than half of it
    assert end(1.0, 1.0, 1.0, 1.0, 0.1, 1.0) == [4, 5]
    assert end(0.2, 0.2, 0.0, 0.1, 0.0, 0.0) == [0, 1]
    assert end(0.0, 0.0, 0.0, 0.0, 0.0, 0.0) == []


@pytest.mark.parametrize("n_facts", [4, 12])
def test_few_facts_are_stored_at_their_names_too(n_facts):
    model = make()
    memory = add_memory(model, [0, 1], n_slots=64**2, heads=4, knn=6, k_dim=16, all_slots=False)
    statements = facts_of_names(range(100, 100 + n_facts), WORDINGS)
    adapter.centre_queries(model, memory, tokens(2, 20))
    adapter.choose_slots(model, memory, statements, torch.tensor([[31, 32]]))
    prompts = [statement.tokens[:7] for statement in statements]
    for state in adapter.hidden_states(model, memory.lookup.place, prompts):
        assert 3 in memory.lookup.read(state)[0]  # where the name is


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_the_weighted_sum_of_the_rows_of_one_set(kind):
    """The output against sums written out, token by token."""
    model = make(kind)
    memory = add_memory(model, [0, 2], **SHAPE, silence=0.4, all_slots=False)
    lookup, generator = memory.lookup, torch.Generator().manual_seed(1)
    sets = [torch.randperm(64, generator=generator)[:size].tolist() for size in (25, 25, 30)]
    for slots in sets:
        memory.add_set(torch.tensor(slots))
    rows_of = lookup.row_of.tolist()
    torch.manual_seed(2)
    for table in memory.tables:
        nn.init.normal_(table.values)
    seen, x = {}, tokens(2, 9)
    for place in memory.places:
        model.get_submodule(place).register_forward_hook(
            lambda module, args, output, place=place: seen.update({place: (args[0], output)}))
    logits(model, x)
    n_silent, read, states = 0, set(), seen[lookup.place][0].flatten(0, 1)
    for place, table in zip(memory.places, memory.tables):
        args, output = seen[place]
        with torch.no_grad():
            alone = type(model.get_submodule(place)).forward(model.get_submodule(place), args).flatten(0, 1)
        for t, state in enumerate(states):
            slots, weights = (found[0].tolist() for found in lookup(state[None]))
            shares = [sum(w for slot, w in zip(slots, weights) if slot in group) for group in sets]
            best = shares.index(max(shares)) if max(shares) > 0.4 else None
            expected = alone[t]
            if best is not None:
                values = table.values.detach()
                expected = expected + values[lookup.first_row[best]]
                for slot, weight in zip(slots, weights):
                    if slot in sets[best]:
                        expected = expected + weight * values[rows_of[best][slot]]
                read.add(best)
            else:
                n_silent += 1
            torch.testing.assert_close(output.flatten(0, 1)[t], expected)
    assert n_silent and len(read) > 1


def test_rows_of_sets():
    model = make()
    memory = add_memory(model, [2], **SHAPE, all_slots=False)
    assert memory.add_set(torch.tensor([5, 9, 5])).tolist() == [1, 2, 3]
    with torch.no_grad():
        memory.tables[0].values.normal_()
    values = memory.tables[0].values.detach().clone()
    assert memory.add_set(torch.tensor([9, 3])).tolist() == [4, 5, 6]
    assert memory.lookup.row_of[:, [5, 9, 3, 7]].tolist() == [[2, 3, 0, 0], [0, 6, 5, 0]]
    assert memory.lookup.first_row.tolist() == [1, 4]
    assert torch.equal(memory.tables[0].values[:4], values)
    assert torch.equal(memory.tables[0].values[4], values[1])  # starts as the first row of the set before
    assert not memory.tables[0].values[5:].any()


def test_facts_that_are_taught_later_leave_those_before_as_they_are():
    model = make()
    memory = add_memory(model, [0, 1], n_slots=64**2, heads=2, knn=8, k_dim=8, silence=0.2, all_slots=False)
    statements, text = facts_of_names(range(100, 120), WORDINGS), torch.tensor([[31, 32]])
    earlier, later, names = statements[:30], statements[30:], torch.arange(100, 110)[:, None]
    for lesson, is_new in ((earlier, True), (later, True), (earlier, False)):
        before = [table.values.detach().clone() for table in memory.tables]
        names_before = logits(model, names)
        assert adapter.choose_slots(model, memory, lesson, text) == (lesson, [])
        pretrained.teach(model, [adapter.build_adam(memory)], lesson, 3, batch_size=4)
        n_before = len(before[0])
        assert (len(memory.tables[0].values) > n_before) == is_new
        for table, values in zip(memory.tables, before):
            assert torch.equal(table.values[:n_before], values) == is_new
            assert torch.equal(table.values[0], values[0])
        if lesson is later:
            assert torch.equal(logits(model, names), names_before)
        else:
            assert not torch.equal(logits(model, names), names_before)
    assert len(memory.lookup.statements) == len(statements)


def test_earlier_statements_that_new_facts_change_are_taught_again():
    model = make()
    memory = add_memory(model, [0, 1], n_slots=64**2, heads=2, knn=8, k_dim=8, silence=0.2, all_slots=False)
    earlier, text = facts_of_names(range(100, 112), WORDINGS), torch.tensor([[31, 32]])
    adapter.choose_slots(model, memory, earlier, text)
    pretrained.teach(model, [adapter.build_adam(memory)], earlier, 3, batch_size=4)
    before = [logits(model, torch.tensor([statement.tokens[:-1]])) for statement in earlier]
    names = [103, 104, 105, *range(120, 129)]  # three of them have a fact already
    later = facts_of_names(names, [[30, 33, 34], [35, 36, 37]])
    teachable, again = adapter.choose_slots(model, memory, later, text)
    assert len(teachable) > 20
    renumbered = [dataclasses.replace(one, fact=12 + one.fact) for one in earlier]
    assert memory.lookup.statements == renumbered + later
    pretrained.teach(model, [adapter.build_adam(memory)], teachable, 3, batch_size=4)
    is_again = [one in again for one in renumbered]
    assert any(is_again) and not all(is_again)
    for statement, old, is_changed in zip(earlier, before, is_again):
        assert torch.equal(logits(model, torch.tensor([statement.tokens[:-1]])), old) != is_changed


def able_to_learn():
    """A model whose weights are large enough for its answers to change, and its memory."""
    model = make(hidden_size=128, initializer_range=0.1)
    return model, add_memory(model, [0, 1], n_slots=64**2, heads=4, knn=6, k_dim=16, all_slots=False)


def learn(model, memory, statements):
    """Teaches statements until all are known, with those that must be taught again."""
    teachable, again = adapter.choose_slots(model, memory, statements, torch.tensor([[31, 32]]))
    pretrained.teach(model, [adapter.build_adam(memory)], teachable + again, 100, batch_size=12)
    return teachable, again


def test_what_is_taught_again_is_known_again():
    model, memory = able_to_learn()
    earlier = facts_of_names(range(100, 112), WORDINGS, range(50, 55))
    learn(model, memory, earlier)
    assert pretrained.ask(model, [[one] for one in earlier]).all()
    names = [103, 104, 105, *range(120, 129)]  # three of them have a fact already
    later = facts_of_names(names, [[21, 20, 22], [24, 23, 25]], range(60, 65))
    teachable, again = learn(model, memory, later)
    assert again
    assert pretrained.ask(model, [[one] for one in earlier]).all()  # if not taught again, 78%
    assert pretrained.ask(model, [[one] for one in teachable]).mean() > 0.8


def test_a_new_answer_replaces_the_old_one():
    model, memory = able_to_learn()
    statements = facts_of_names(range(100, 112), WORDINGS, range(50, 55))
    learn(model, memory, statements)
    corrected = [dataclasses.replace(statements[7], fact=0, tokens=[*statements[7].prompt, 51, 2])]
    teachable, again = learn(model, memory, corrected)
    assert teachable == corrected and pretrained.ask(model, [corrected]).all()
    # The other wordings of that fact are not taught again with the old answer.
    tokens = [one.tokens for one in memory.lookup.statements]
    assert tokens == [one.tokens for one in statements[:6] + statements[9:] + corrected]
    assert not any(one.tokens[3] == 102 for one in again)


def test_a_correction_is_taught_in_the_rows_that_its_wordings_read():
    model, memory = able_to_learn()
    text = torch.tensor([[31, 32]])
    statements = facts_of_names(range(100, 140), WORDINGS, range(50, 55))
    teachable, _ = adapter.choose_slots(model, memory, statements, text)
    assert len(teachable) < len(statements)
    for fact in range(40):
        corrected = [dataclasses.replace(one, fact=0, tokens=[*one.prompt, 56, 2])
                     for one in statements if one.fact == fact]
        expected = [new for new in corrected if any(new.prompt == old.prompt for old in teachable)]
        changed = copy.deepcopy(memory)
        assert adapter.choose_slots(model, changed, corrected, text)[0] == expected
        assert len(changed.tables[0].values) == len(memory.tables[0].values)


def test_new_facts_beside_facts_that_have_rows_choose_no_common_words():
    model, memory = able_to_learn()
    text = torch.tensor([[31, 32]])
    old = facts_of_names(range(100, 140), WORDINGS, range(50, 55))
    adapter.choose_slots(model, memory, old, text)
    both = facts_of_names(range(100, 143), WORDINGS, range(50, 55))
    adapter.choose_slots(model, memory, both, text)
    is_in = memory.lookup.row_of > 0
    found = adapter.lookups_of(model, memory.lookup, [one.prompt for one in both])
    sets = [memory.lookup.best_set(is_in[:, slots], weights) for slots, weights in found]
    reads_new = [(read == 1).any().item() for read in sets]
    assert len(is_in) == 2 and sum(reads_new[120:]) >= 6  # of 9 statements about the new names
    assert sum(reads_new[:120]) < 12


def test_a_fact_that_was_given_but_has_no_rows_is_new():
    model, memory = able_to_learn()
    statements = facts_of_names(range(100, 112), WORDINGS, range(50, 55))
    memory.lookup.statements = statements
    teachable, _ = adapter.choose_slots(model, memory, statements, torch.tensor([[31, 32]]))
    assert len(memory.lookup.row_of) == 1 and len(teachable) > 30


def test_a_correction_is_learnt_beside_new_facts():
    model, memory = able_to_learn()
    statements = facts_of_names(range(100, 112), WORDINGS, range(50, 55))
    learn(model, memory, statements)
    corrected = [dataclasses.replace(one, fact=4, tokens=[*one.prompt, 57, 2]) for one in statements[:3]]
    new = facts_of_names(range(120, 124), WORDINGS, range(50, 55))
    teachable, _ = learn(model, memory, new + corrected)
    assert teachable == new + corrected
    assert pretrained.ask(model, [[one] for one in corrected]).all()


def test_a_fact_that_is_taught_again_in_one_wording_stays_one_fact():
    memory = add_memory(make(), [0, 1], all_slots=False, **SHAPE)
    first, second = facts_of_names([100], WORDINGS[:2])
    memory.lookup.statements = [first, second]
    again = dataclasses.replace(first, fact=5)
    memory.lookup.statements = adapter.earlier_statements(memory.lookup, [again]) + [again]
    assert [one.fact for one in memory.lookup.statements] == [5, 5]
    corrected = dataclasses.replace(first, tokens=[*first.prompt, 51, 2])
    assert adapter.earlier_statements(memory.lookup, [corrected]) == []


def test_what_slots_cannot_be_chosen_for():
    model = make()
    memory = add_memory(model, [0], **SHAPE)
    statements, text = facts_of_names([100], WORDINGS), torch.tensor([[31, 32]])
    with pytest.raises(ValueError, match="values for all slots; make it with all_slots=False"):
        adapter.choose_slots(model, memory, statements, text)
    with pytest.raises(ValueError, match="no statements"):
        adapter.choose_slots(model, memory, [], text)


def test_centred_queries():
    model = make()
    memory = add_memory(model, [1], **SHAPE)
    x = tokens(2, 9)
    adapter.centre_queries(model, memory, x)
    states = []
    model.get_submodule("model.layers.1.mlp").register_forward_hook(
        lambda module, args, output: states.append(args[0]))
    model(x)
    torch.testing.assert_close(memory.lookup.mean, states[0].mean(dim=(0, 1)))
