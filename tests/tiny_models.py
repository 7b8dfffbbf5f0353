"""Tiny random models of transformers, for the tests of what is added to them."""

import torch
import transformers

from nanomem.pretrained import Statement

SHAPE = dict(n_slots=64, heads=2, knn=3, k_dim=8)
LLAMA = dict(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=64)
GPT2 = dict(vocab_size=300, n_embd=16, n_inner=32, n_layer=3, n_head=2, n_positions=64)
KINDS = ("llama", "qwen2", "mistral", "gpt2")


def make(kind="llama", seed=0, **changes):
    """A tiny random model."""
    torch.manual_seed(seed)
    shape = (GPT2 if kind == "gpt2" else LLAMA) | changes
    config = transformers.AutoConfig.for_model(kind, **shape, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokens(*shape, seed=0):
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(seed))


def logits(model, x=None):
    with torch.no_grad():
        return model(tokens(2, 9) if x is None else x).logits


def facts_of_names(names, wordings, answers=range(50, 51)):
    """A fact about each name, a token, in several wordings: the tokens before and after the name. The answers
    are tokens, in turn.
    """
    statements = []
    for fact, name in enumerate(names):
        answer = answers[fact % len(answers)]
        for words in wordings:
            statements.append(Statement(fact, [*words, name, *words, answer, 2], start=7))
    return statements
