"""How long a training step of each model takes."""

import statistics
import time

import torch

from nanomem import optim
from nanomem.config import Config, pick_device
from nanomem.data import open_data
from nanomem.model import GPT


def step_seconds(configs: dict[str, Config], steps: int = 4, rounds: int = 6) -> dict[str, float]:
    """The median time of a training step: {name: seconds}. All configs must have the same data.

    The models take turns, a few steps each, so that a change in the machine's speed affects all of them.
    Nothing else should be running.
    """
    device = pick_device("auto")
    data = open_data(next(iter(configs.values())))
    parts = {name: build(config, data, device) for name, config in configs.items()}
    seconds = {name: [] for name in configs}
    for turn in range(rounds + 1):
        for name in configs:
            started = time.perf_counter()
            for _ in range(steps):
                loss = train_step(*parts[name], device)
            loss.item()  # waits for the GPU
            if turn > 0:  # the first is a warm-up
                seconds[name].append((time.perf_counter() - started) / steps)
    return {name: statistics.median(times) for name, times in seconds.items()}


def build(config, data, device):
    """(model, optimizers, batch) of a config."""
    with device:
        model = GPT(config)
    optimizers = optim.build_optimizer(
        model, config.learning_rate, config.mem_lr, config.weight_decay, mem_beta2=config.mem_beta2)
    batch = [tensor.to(device) for tensor in data.batch("train", 0, config.batch_size)]
    return model, optimizers, batch


def train_step(model, optimizers, batch, device):
    """One step of train.py's loop. Returns the loss."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        loss = model(*batch)[1]
    loss.backward()
    optim.clip_gradients(model, 1.0, optimizers)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss
