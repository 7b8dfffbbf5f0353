"""The benchmark's results as tables."""

from rich import box
from rich.console import Console
from rich.table import Table

from nanomem.bench.settings import Shape

ALLOCATORS = {None: "", True: "train.py's", False: "default"}


def show_steps(console: Console, shape: Shape, results: dict):
    """Prints a table of the layers' steps.

    results: {(kind, whether with train.py's allocator settings): medians, or {"failed": reason}}.
    """
    table = Table(title=str(shape), box=box.SIMPLE, padding=(0, 1), title_justify="left")
    table.add_column("layer")
    table.add_column("allocator")
    for title in ("lookup", "read", "backward", "update", "step ms", "peak GB", "times as fast"):
        table.add_column(title, justify="right")
    for (kind, keeps_freed), result in results.items():
        cells = [kind, ALLOCATORS[keeps_freed]]
        if "failed" in result:
            table.add_row(*cells, result["failed"])
            continue
        if "forward" in result:  # of a compiled layer, lookup and read together
            cells += [f"{result['forward']:.1f}", ""]
        else:
            cells += [f"{result['lookup']:.1f}", f"{result['read']:.1f}"]
        cells += [f"{result[key]:.1f}" for key in ("backward", "update", "step", "peak_gb")]
        plain = results.get(("pytorch", keeps_freed), {})
        if "step" in plain:
            cells.append(f"{plain['step'] / result['step']:.2f}")
        table.add_row(*cells)
    console.print(table)
    ours, plain = results.get(("nanomem", True), {}), results.get(("pytorch", False), {})
    if "step" in ours and "step" in plain:
        console.print("  nanomem with train.py's allocator settings, pytorch with the default allocator: "
                      f"{plain['step'] / ours['step']:.2f} times as fast\n")


def show_parts(console: Console, result: dict):
    """Prints what the parts alone reach on a GPU."""
    if "failed" in result:
        console.print(f"the parts alone: {result['failed']}")
        return
    console.print(
        f"copy {result['copy_gb_s']:,.0f} GB/s   scores and top-k {result['topk']:.2f} ms, "
        f"their gradients {result['topk_backward']:.2f} ms; top-k alone {result['merge_halves']:.2f} ms, "
        f"two torch.topk in its place {result['two_torch_topk']:.2f} ms")
    console.print("   ".join(
        f"{name} {result[name]:.2f} ms, {result[name + '_share']:.0%} of the copy's bandwidth"
        for name in ("read", "backward", "update")))
    scattered = []
    for name, ms in result.items():
        if name.startswith("scattered_"):
            scattered.append(f"{name.removeprefix('scattered_')}: {ms:.2f} ms")
    console.print(
        f"read, backward and update of 100,000 slots scattered over {', '.join(scattered)}\n")
