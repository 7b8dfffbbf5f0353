"""Rows as Markdown tables, and as figures (pip install -e '.[plot]')."""

import statistics
from pathlib import Path

from nanomem.cli import UserError

BASELINE, MEMORY = "#8a9ba8", "#d9822b"  # colors
TITLES = {
    "recall": "recall of facts never asked about",
    "recall_taught": "recall in a taught wording",
    "loss": "validation loss",
    "bits_per_byte": "bits per byte of text",
}


def pyplot():
    """matplotlib.pyplot, for drawing into files. Raises UserError if matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("figures need matplotlib: pip install -e '.[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


# ------------------------------------------------------------------------------------------------
# Tables


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = {
        "model": lambda row: row["model"],
        "FLOPs per token": lambda row: f"{row['flops_per_token'] / 1e6:.3f} million",
        "parameters": lambda row: f"{row['params']:,}",
        "in tables or experts": lambda row: f"{row['mem_params']:,}",
    }
    if "recall" in rows[0]:
        columns["recall"] = lambda row: percent(row["recall"])
        columns["in a taught wording"] = lambda row: percent(row["recall_taught"])
    columns["val loss"] = lambda row: f"{statistics.mean(row['loss']):.3f}"
    if "bits_per_byte" in rows[0]:
        columns["bits per byte, each seed"] = lambda row: ", ".join(f"{x:.3f}" for x in row["bits_per_byte"])
    if "bits_per_byte" in rows[0] or "recall_equal_time" in rows[0]:
        columns["learning rate"] = lambda row: f"{row['learning_rate']:g}"
    if "recall_equal_time" in rows[0]:
        columns["seconds"] = lambda row: f"{row['seconds']:.0f}"
        columns["recall at equal wall-clock"] = lambda row: f"{row['recall_equal_time']:.1%}"
    cells = [[text_of(row) for text_of in columns.values()] for row in rows]
    return table(list(columns), cells)


def table(header: list[str], cells: list[list[str]]) -> str:
    """A Markdown table. The first column is aligned to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *cells])


def percent(numbers: list[float]) -> str:
    """'71.2%', or of several numbers each, from the first seed on, and their mean: '70.0, 72.4: 71.2%'."""
    mean = f"{statistics.mean(numbers):.1%}"
    if len(numbers) == 1:
        return mean
    return ", ".join(f"{100 * x:.1f}" for x in numbers) + f": {mean}"


def slots_table(rows: list[dict]) -> str:
    """What `slots` found as a Markdown table."""
    compared = list(rows[0]["overlaps"]["name"])
    cells = []
    for row in rows:
        for position, overlaps in row["overlaps"].items():
            numbers = [f"{overlaps[name]:.2f}" for name in compared]
            cells.append([f"layer {row['layer']}, {position}", f"{row['share used']:.1%}", f"{row['kl']:.2f}",
                          *numbers])
    header = ["layer and token", "slots used", "KL from uniform, nats"]
    return table(header + [f"overlap with {name}" for name in compared], cells)


# ------------------------------------------------------------------------------------------------
# Figures


def draw(command: str, rows: list[dict], path: Path):
    """Draws the rows of a command."""
    figure = draw_scaling(rows) if command == "scaling" else draw_models(rows)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def draw_scaling(rows):
    """Recall and loss against the number of slots."""
    figure, axes = pyplot().subplots(1, 3, figsize=(12, 3.4))
    points = [row for row in rows if row["slots"]]
    n_slots = [row["slots"] for row in points]
    for axis, key in zip(axes, ("recall", "recall_taught", "loss")):
        means = [statistics.mean(row[key]) for row in points]
        axis.plot(n_slots, means, "o-", color=MEMORY)
        axis.axhline(statistics.mean(rows[0][key]), color=BASELINE, linestyle="--", label="no memory")
        for row, mean in zip(points, means):
            axis.plot([row["slots"]] * len(row[key]), row[key], "k.", markersize=4)
            axis.annotate(f"{row['flops_per_token'] / 1e6:.2f}", (row["slots"], mean),
                          textcoords="offset points", xytext=(0, 6), fontsize=7)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("slots (beside each point: million FLOPs per token)")
        axis.set_title(TITLES[key], fontsize=10)
        axis.legend(fontsize=7)
    return figure


def draw_models(rows):
    """A bar for each model, with a dot for each seed."""
    keys = ("recall", "recall_taught") if "recall" in rows[0] else ("bits_per_byte",)
    size = (5 + 4 * len(keys), 0.32 * len(rows) + 1)
    figure, axes = pyplot().subplots(1, len(keys), figsize=size, sharey=True, squeeze=False)
    is_baseline = [row["model"].startswith(("dense", "mixture")) for row in rows]
    colors = [BASELINE if baseline else MEMORY for baseline in is_baseline]
    places = range(len(rows))
    for axis, key in zip(axes[0], keys):
        means = [statistics.mean(row[key]) for row in rows]
        if key == "bits_per_byte":
            # The models are hundredths apart. Bars have to start at 0, which would hide that; marks don't.
            axis.scatter(means, places, 400, colors, marker="|", linewidths=4)
            axis.margins(y=0.3)
        else:
            axis.barh(places, means, color=colors)
        axis.set_xlabel(TITLES[key])
        for place, row in zip(places, rows):
            axis.plot(row[key], [place] * len(row[key]), "k.", markersize=4)
            if key == "recall" and "recall_equal_time" in row:
                axis.plot(row["recall_equal_time"], place, "wD", markeredgecolor="black", markersize=5)
    axes[0][0].set_yticks(places, [row["model"] for row in rows])
    axes[0][0].invert_yaxis()
    return figure


def draw_slots(rows: list[dict], path: Path):
    """Draws how evenly slots are used, and each layer's overlaps."""
    size = (4 + 3.6 * len(rows), 3.2)
    figure, axes = pyplot().subplots(1, 1 + len(rows), figsize=size)
    for row in rows:
        used = [weight for weight in row["sorted"] if weight > 0]
        shares = [weight / sum(used) for weight in used]
        label = f"layer {row['layer']}: {row['share used']:.0%} used"
        axes[0].loglog(range(1, len(used) + 1), shares, label=label)
    axes[0].set_xlabel("slots, most read first")
    axes[0].set_title("share of all weight", fontsize=9)
    axes[0].legend(fontsize=7)
    for row, axis in zip(rows, axes[1:]):
        names = list(row["overlaps"]["name"])
        for i, (position, overlaps) in enumerate(row["overlaps"].items()):
            heights = [place + 0.4 * i - 0.2 for place in range(len(names))]
            axis.barh(heights, [overlaps[name] for name in names], 0.38, label=f"at the {position}")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlim(0, 1)
        axis.set_title(f"layer {row['layer']}: lookups in common with", fontsize=9)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
