"""The memory layer's speed beside the same layer written with PyTorch's parts: `python -m nanomem.bench`."""
