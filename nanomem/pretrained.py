"""
A pretrained language model of transformers: opening it, teaching it facts, asking it, its loss on other text.

A fact has one or more wordings, each a prompt. A statement is a prompt, a space, the answer and the token
that ends a text. Only the answer and the end count in the loss. Which parameters learn is up to the caller:
those of a memory (retrofit.py), LoRA's, or all.
"""

import contextlib
import importlib.util
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanomem import checkpoint
from nanomem.cli import UserError
from nanomem.facts import FactSet, read_text
from nanomem.prose import SAMPLE, TEXT

IGNORED = -100  # the target of a token that doesn't count in the loss

# ------------------------------------------------------------------------------------------------
# Opening


def open_model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, object]:
    """A causal language model and its tokenizer: by name, from a folder, or from a GGUF file.

    Raises UserError, in one line, if a package is missing, if the model is neither on this machine nor can be
    downloaded, and if it isn't a causal language model.
    """
    need("transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without network, it reports each attempt
    path, options = name, {}
    if checkpoint.is_run_or_export(Path(name)):
        raise UserError(f"--model={name} is a model of train.py's; python train.py --init_from={name} "
                        "--data=facts.jsonl teaches it")
    if name.lower().endswith(".gguf"):
        if not os.path.isfile(name):
            raise UserError(f"--model={name}: there is no such file")
        need("gguf")
        path, options = str(Path(name).parent), {"gguf_file": Path(name).name}
    is_here = os.path.exists(path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        if is_here or not isinstance(error, OSError):
            raise UserError(f"--model={name} can't be opened as a causal language model ({reason})") from None
        raise UserError(
            f"--model={name} is no file or folder here and can't be downloaded; on a machine with network "
            f"run `hf download {name} --local-dir model`, bring the folder here, then use --model=model"
        ) from None
    return model.to(device).eval(), tokenizer


def need(package: str):
    """Raises UserError with the remedy if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"this needs the package {package}: pip install -e '.[hf]'")


# ------------------------------------------------------------------------------------------------
# Facts


@dataclass(frozen=True)
class Statement:
    """A prompt and one of its answers, as tokens."""

    fact: int  # the number of its fact
    tokens: list[int]  # prompt, answer, end
    start: int  # where the answer begins

    @property
    def prompt(self) -> list[int]:
        """The tokens before the answer."""
        return self.tokens[:self.start]


def encode_fact(tokenizer, fact: int, prompt: str, answer: str) -> Statement:
    """Prompt and answer as the tokenizer reads them together."""
    alone, whole = tokenizer(prompt).input_ids, tokenizer(f"{prompt} {answer}").input_ids
    end = tokenizer.eos_token_id
    if end is not None:
        alone, whole = drop_end(alone, end), drop_end(whole, end) + [end]
    start = 0  # up to where the two are the same
    while start < len(alone) and alone[start] == whole[start]:
        start += 1
    return Statement(fact, whole, max(1, start))


def drop_end(tokens, end):
    """Tokens without the end that some tokenizers add."""
    return tokens[:-1] if tokens and tokens[-1] == end else tokens


def taught_statements(tokenizer, facts: FactSet) -> list[Statement]:
    """What to teach: each taught wording of each fact, with its first answer."""
    found = []
    for e, prompt in enumerate(facts.entities):
        found.append(encode_fact(tokenizer, int(facts.subjects[e]), prompt, facts.answers(e, 0)[0]))
    return found


def questions(tokenizer, facts: FactSet) -> list[list[Statement]]:
    """What to ask: for each wording, a statement with each of its accepted answers."""
    found = []
    for e, prompt in enumerate(facts.entities):
        fact, accepted = int(facts.subjects[e]), facts.answers(e, 0)
        found.append([encode_fact(tokenizer, fact, prompt, answer) for answer in accepted])
    return found


def answer_loss(model: nn.Module, statements: list[Statement]) -> tuple[Tensor, Tensor]:
    """(the mean loss of the answers' tokens; which answers greedy decoding would give, (n,) bool).

    Greedy decoding gives an answer if each of its tokens is the likeliest after those before it.
    """
    device = next(model.parameters()).device
    tokens, mask = pad([statement.tokens for statement in statements])          # (batch, time)
    targets = torch.full_like(tokens, IGNORED)
    for i, statement in enumerate(statements):
        end = len(statement.tokens)
        targets[i, statement.start - 1:end - 1] = tokens[i, statement.start:end]  # of the token before each
    is_answer = targets != IGNORED                                              # (batch, time)
    options = {}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of peft's
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        # In a small model, the output layer is a fifth of the work.
        kept = is_answer.any(dim=0).nonzero().squeeze(1)
        targets, is_answer = targets[:, kept], is_answer[:, kept]
        options["logits_to_keep"] = kept.to(device)
    options |= {"attention_mask": mask.long().to(device), "use_cache": False}
    logits = model(tokens.to(device), **options).logits
    answers = logits[is_answer.to(device)].float()                              # (answers' tokens, vocab)
    wanted = targets[is_answer].to(device)
    is_hit = torch.ones(is_answer.shape, dtype=torch.bool)
    is_hit[is_answer] = (answers.detach().argmax(-1) == wanted).cpu()
    return F.cross_entropy(answers, wanted), is_hit.all(dim=1)


def pad(rows) -> tuple[Tensor, Tensor]:
    """Token sequences as (batch, time) int64, padded on the right, and where they are: (batch, time) bool."""
    longest = max(map(len, rows))
    x = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        x[i, :len(row)], mask[i, :len(row)] = torch.tensor(row), True
    return x, mask


@torch.no_grad()
def ask(model: nn.Module, asked: list[list[Statement]], batch_size: int = 32) -> np.ndarray:
    """Which questions the model answers, greedily, with an accepted answer and then the end: (n,) bool."""
    flat = [(i, statement) for i, accepted in enumerate(asked) for statement in accepted]
    flat.sort(key=lambda pair: len(pair[1].tokens))  # so that a batch needs little padding
    known = np.zeros(len(asked), dtype=bool)
    for begin in range(0, len(flat), batch_size):
        numbers, statements = zip(*flat[begin:begin + batch_size])
        hits = answer_loss(model, list(statements))[1].numpy()
        np.logical_or.at(known, list(numbers), hits)
    return known


# ------------------------------------------------------------------------------------------------
# Other text


def windows(tokenizer, text: str, length: int = 256, most: int = 64) -> Tensor:
    """The first windows of a text, (at most `most`, length) int64; a shorter text is one window.

    Raises ValueError for a text of fewer than two tokens.
    """
    tokens = tokenizer(text[:length * most * 16], add_special_tokens=False, verbose=False).input_ids
    if len(tokens) < 2:
        raise ValueError("expected a text of two tokens or more")
    length = min(length, len(tokens))
    count = min(most, len(tokens) // length)
    return torch.tensor(tokens[:count * length]).view(count, length)


def split_text(tokenizer, path: str) -> tuple[Tensor, Tensor]:
    """(passages to measure the loss on, passages that show what ordinary text is like), (n, time) int64 each.

    path: a text file. Its first 16,384 tokens are measured; the next 128,000 are the others, or a short
    built-in text if there are none. "" takes both from built-in texts.
    """
    found = windows(tokenizer, read_text(path) if path else TEXT, most=64 + 500)
    measured, others = found[:64], found[64:]
    if not len(others):
        others = windows(tokenizer, SAMPLE, length=32)
    return measured, others


@torch.no_grad()
def text_loss(model: nn.Module, tokens: Tensor, batch_size: int = 2) -> float:
    """The mean loss of a text's tokens, in nats: windows (n, time).

    A small batch keeps the logits small: on 2 cores, batches of 2 windows take a fifth less time than batches
    of 8.
    """
    device, total = next(model.parameters()).device, 0.0
    for x in tokens.split(batch_size):
        x = x.to(device)
        logits = model(input_ids=x, use_cache=False).logits[:, :-1].float()     # (batch, time - 1, vocab)
        total += F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


# ------------------------------------------------------------------------------------------------
# Teaching


def batches(statements: list[Statement], right: Tensor, batch_size: int,
            generator: torch.Generator) -> list[Tensor]:
    """The batches of one round: the numbers of their statements. The round reads each fact once, in
    a wording drawn from those last answered wrongly, or from all if none was.

    right: which statements were last answered correctly, (n,) bool. A batch has statements of similar length,
    so that little of it is padding: an update takes three quarters of the time of one with a random batch.
    """
    wordings, unknown = {}, {}
    for i, statement in enumerate(statements):
        wordings.setdefault(statement.fact, []).append(i)
        if not right[i]:
            unknown.setdefault(statement.fact, []).append(i)
    chosen = []
    for fact, numbers in wordings.items():
        numbers = unknown.get(fact, numbers)
        chosen.append(numbers[torch.randint(len(numbers), (), generator=generator)])
    order = torch.tensor(chosen)[torch.randperm(len(chosen), generator=generator)]
    lengths = torch.tensor([len(statements[i].tokens) for i in order])
    found = order[lengths.argsort(stable=True)].split(batch_size)
    return [found[i] for i in torch.randperm(len(found), generator=generator)]


def teach(model: nn.Module, optimizers: list, statements: list[Statement], rounds: int,
          batch_size: int = 32, seed: int = 0, stop_at: float = 1.0,
          after_update: Callable[[float, float], bool | None] = lambda done, known: None) -> int:
    """Trains for some rounds, or until a share stop_at of the statements is known. Returns the updates made.

    The learning rate falls from the optimizers' "peak_lr" (or "lr", if a group has none) to a tenth of it, in
    a straight line.

    after_update(done, known) gets the share of the rounds done and the share of statements whose answer was
    right when last seen; it may return True to stop. Once that share is stop_at, all are asked, to be sure.

    Raises UserError if the loss diverges, and ValueError without statements.
    """
    if not statements:
        raise ValueError("there are no statements to teach")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    right = torch.zeros(len(statements), dtype=torch.bool)
    updates = 0
    for number in range(rounds):
        for group in groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * (1 - 0.9 * number / rounds)
        chosen = batches(statements, right, batch_size, generator)
        for i, batch in enumerate(chosen, 1):
            right[batch] = update(model, optimizers, [statements[n] for n in batch])
            updates += 1
            if after_update((number + i / len(chosen)) / rounds, right.float().mean().item()):
                return updates
        if right.float().mean() >= stop_at:
            right = torch.from_numpy(ask(model, [[statement] for statement in statements]))
            if right.float().mean() >= stop_at:
                return updates
    return updates


def update(model: nn.Module, optimizers: list, statements: list[Statement]) -> Tensor:
    """One step of the optimizers on a batch. Returns which answers were right before it: (n,) bool."""
    # In bfloat16 on a CPU, the backward pass of torch's flash attention takes 40% of a step. With MATH it
    # takes almost no time, since statements are short.
    is_on_cpu = next(model.parameters()).device.type == "cpu"
    with sdpa_kernel(SDPBackend.MATH) if is_on_cpu else contextlib.nullcontext():
        loss, hits = answer_loss(model, statements)
        if not torch.isfinite(loss):
            raise UserError("the loss is not finite; a lower learning rate may help")
        loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return hits
