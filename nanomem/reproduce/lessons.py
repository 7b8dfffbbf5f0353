"""What `forgetting`, `retrofit` and `shapes` share: results of lessons in files, and reading their curves."""

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from nanomem.checkpoint import read_json, write_text
from nanomem.reproduce.runs import here


def saved_or_run(path: Path, about: dict, run: Callable[[], dict]) -> dict:
    """A result from its file; or `about` with what run() returns, and where it was measured, saved there."""
    saved = read_json(path)
    if saved:
        return saved
    where = here()  # before it runs, so that a commit made meanwhile isn't its own
    begun = time.perf_counter()
    result = about | run() | where
    result["seconds"] = time.perf_counter() - begun
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    return result


def result_path(folder: Path, words: str, deciding: list) -> Path:
    """The file of a result. Its name has a hash of what decides it, besides words for people."""
    digest = hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:8]
    words = re.sub(r"[^\w.]+", "-", words)
    return folder / f"{words}-{digest}.json"


def read_off(curve: list[dict], known: str, enough: float, key: str, start: dict) -> float | None:
    """A curve's number `key` where its share `known` first reaches enough, between evaluations on a straight
    line; None if it doesn't. start: the point before the first.
    """
    before = start
    for point in curve:
        if point[known] >= enough:
            part = (enough - before[known]) / (point[known] - before[known])
            return before[key] + part * (point[key] - before[key])
        before = point
    return None


def best_try(curves: dict, known: str, cost: Callable[[list[dict]], float | tuple | None]):
    """The try whose curve has the lowest cost; if that is None for all, the one that learns most.

    curves: try (a rate, say) -> its curve.
    """
    costs = {one: cost(curve) for one, curve in curves.items()}
    reaching = {one: number for one, number in costs.items() if number is not None}
    if reaching:
        return min(reaching, key=reaching.get)
    return max(curves, key=lambda one: max((point[known] for point in curves[one]), default=0.0))
