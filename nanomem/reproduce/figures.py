"""Rows as Markdown tables, and as figures (pip install -e '.[plot]')."""

import statistics
from collections.abc import Callable
from pathlib import Path

from nanomem.cli import UserError

BASELINE, MEMORY = "#8a9ba8", "#d9822b"  # colors
TITLES = {
    "recall": "recall, questions never asked",
    "recall_taught": "recall, taught wording",
    "bits_known": "bits known of the facts never asked",
    "bits_per_byte": "bits per byte of text (lower is better)",
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
        columns["recall, %"] = lambda row: percent(row["recall"])
        columns["taught wording, %"] = lambda row: percent(row["recall_taught"])
    if "bits_known" in rows[0]:
        columns["bits known, thousands"] = thousand_bits
        columns["nats per answer"] = lambda row: f"{statistics.mean(row['answer_nll']):.3f}"
    columns["val loss"] = lambda row: f"{statistics.mean(row['loss']):.3f}"
    if "bits_per_byte" in rows[0]:
        columns["bits per byte, each seed"] = lambda row: ", ".join(f"{x:.3f}" for x in row["bits_per_byte"])
    if "seconds" in rows[0]:
        columns["learning rate"] = lambda row: f"{row['learning_rate']:g}"
        columns["seconds"] = lambda row: f"{row['seconds']:.0f}"
    if any("behind_memory" in row for row in rows):
        columns["Memory+ is ahead by"] = ahead_by
    return table_of(columns, rows)


def table_of(columns: dict[str, Callable[[dict], str]], rows: list[dict]) -> str:
    """A Markdown table of rows. columns: {name: function from a row to its cell}."""
    return table(list(columns), [[text_of(row) for text_of in columns.values()] for row in rows])


def thousand_bits(row: dict) -> str:
    """Bits known, in thousands: '14.2', or one for each seed: '14.2, 14.7'."""
    return ", ".join(f"{bits / 1000:.1f}" for bits in row["bits_known"])


def ahead_by(row: dict) -> str:
    """How far Memory+ is ahead of a row, in thousand bits or bits per byte, with the t-test over seeds."""
    if "behind_memory" not in row:
        return ""
    test = row["behind_memory"]
    sign = 1 if "bits_known" in row else -1  # of bits per byte, fewer are better
    scale, digits = (1000, 1) if "bits_known" in row else (1, 3)
    ahead = f"{sign * test['mean'] / scale:.{digits}f}"
    p = "p < 0.0001" if test["p"] < 1e-4 else f"p = {test['p']:.2g}"
    return f"{ahead} (t = {sign * test['t']:.1f}, {p}, n = {test['n']})"


def table(header: list[str], cells: list[list[str]]) -> str:
    """A Markdown table. The first column is aligned to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *cells])


def percent(numbers: list[float]) -> str:
    """Shares in percent: '71.2', or one for each seed: '70.0, 72.4'."""
    return ", ".join(f"{100 * number:.1f}" for number in numbers)


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


def forgetting_table(rows: list[dict]) -> str:
    """What `forgetting` found as a Markdown table."""
    header = ["what is trained", "rate", "kept where 90% of the new is known, %, each seed",
              "most of the new, %", "kept at the end, %", "after ten rounds, known of the first round, %",
              "and of the people before, %"]
    cells = []
    for row in rows:
        most = highest(row["curves"], "new")
        at_end = percent([curve[-1]["kept"] for curve in row["curves"]])
        first = percent([known[-1] for known in row.get("rounds_first", [])])
        old = percent([known[-1] for known in row.get("rounds_old", [])])
        kept = or_never(row["kept"], ".1f", 100)
        cells.append([row["model"], f"{row['rate']:g}", kept, most, at_end, first, old])
    return table(header, cells)


def retrofit_table(rows: list[dict]) -> str:
    """What `retrofit` has found so far as Markdown tables: one with a column for each method, one of the
    tries.
    """
    lines = [
        ("learning rate", lambda row: f"{row['rate']:g}"),
        ("million trained parameters", lambda row: or_never(row["trained"], ".1f", 1e-6)),
        ("**500 facts, where 95% are known**: readings", lambda row: where_enough(row, "readings", ".0f")),
        ("known in wordings never taught, %", lambda row: where_enough(row, "held_out", ".1f", 100)),
        ("rise of the loss on other text", lambda row: where_enough(row, "loss", "+.3f")),
        *lines_at_end("500 facts, at the end", "curves"),
    ]
    if all(row["cities"] for row in rows):
        lines += lines_at_end("500 real cities, at the end", "cities")
    if all(row["sets"] for row in rows):
        lines += lines_of_sets()
    cells = [[words, *(text_of(row) for row in rows)] for words, text_of in lines]
    return f"{table(['', *map(with_rank, rows)], cells)}\n{tries_table(rows)}"


def lines_at_end(words: str, curves: str) -> list[tuple]:
    """Lines of retrofit_table: (what a line says, function from a row to its cell)."""
    return [
        (f"**{words}**: readings", lambda row: ", ".join(map(str, at_end(row, curves, "readings")))),
        ("known, %", lambda row: percent(at_end(row, curves, "taught"))),
        ("known in wordings never taught, %", lambda row: percent(at_end(row, curves, "held_out"))),
        ("rise of the loss on other text", lambda row: or_never(at_end(row, curves, "loss"), "+.3f", 1)),
        ("common questions answered wrongly now", lambda row: now_wrong(row, at_end(row, curves, "kept"))),
    ]


def lines_of_sets() -> list[tuple]:
    """Lines of retrofit_table about sets taught in turn, as lines_at_end has them."""
    return [
        ("**five sets of 200**: first set, when just taught, %",
         lambda row: percent([shares[0] for shares in of_sets(row, "first")])),
        ("first set, after the last, %",
         lambda row: percent([shares[-1] for shares in of_sets(row, "first")])),
        ("all sets, after the last, %", lambda row: percent(map(statistics.mean, of_sets(row, "last")))),
        ("rise of the loss on other text", lambda row: or_never(of_sets(row, "loss"), "+.3f", 1)),
        ("common questions answered wrongly now", lambda row: now_wrong(row, of_sets(row, "kept"))),
        ("earlier facts taught again", lambda row: ", ".join(map(str, map(sum, of_sets(row, "again"))))),
    ]


def tries_table(rows: list[dict]) -> str:
    """What each try knew at its end, as a Markdown table."""
    tries = [one | {"model": row["model"], "curves": [one["curve"]]}
             for row in rows for one in row["tries"] + row["gentler"]]
    return table_of({
        "tries": with_rank,
        "rate": lambda one: f"{one['rate']:g}",
        "facts": lambda one: str(one["facts"]),
        "known at the end, %": lambda one: percent(at_end(one, "curves", "taught")),
        "in wordings never taught, %": lambda one: percent(at_end(one, "curves", "held_out")),
        "rise of the loss": lambda one: or_never(at_end(one, "curves", "loss"), "+.3f", 1),
        "rise of the loss where 95% are known": lambda one: where_enough(one, "loss", "+.3f"),
    }, tries)


def shapes_table(rows: list[dict]) -> str:
    """What `shapes` has found so far as a Markdown table."""
    return table_of({
        "100 facts, 40 readings": lambda row: row["memory"],
        "million trained parameters": lambda row: or_never(row["trained"], ".1f", 1e-6),
        "known, %": lambda row: percent(at_end(row, "curves", "taught")),
        "in wordings never taught, %": lambda row: percent(at_end(row, "curves", "held_out")),
        "rise of the loss": lambda row: or_never(at_end(row, "curves", "loss"), "+.3f", 1),
    }, rows)


def where_enough(row: dict, key: str, form: str, factor: float = 1) -> str:
    """A number where each seed's curve reaches 95% known."""
    from nanomem.reproduce import retrofit  # imports the layer

    return or_never([retrofit.at_enough(curve, key) for curve in row["curves"]], form, factor)


def at_end(row: dict, curves: str, key: str) -> list:
    """A number at the last point of each seed's curve."""
    from nanomem.reproduce import retrofit  # imports the layer

    return [retrofit.end_of(curve)[key] for curve in row[curves]]


def of_sets(row: dict, key: str) -> list:
    """What was found of sets taught in turn, for each seed."""
    return [sets[key] for sets in row["sets"]]


def now_wrong(row: dict, kept: list[int]) -> str:
    """How many of the questions that a method's model knew are answered wrongly, for each seed."""
    return f"{', '.join(str(row['knew'] - number) for number in kept)} of {row['knew']}"


def highest(curves, key):
    """The largest number in each curve, in percent."""
    return percent([max(point[key] for point in curve) for curve in curves])


def with_rank(row):
    """A method's name, with LoRA's rank."""
    return f"{row['model']}, rank {row['rank']}" if row["rank"] else row["model"]


def or_never(numbers, form, factor):
    """Numbers times a factor, "never" for None, joined by commas."""
    return ", ".join("never" if number is None else f"{factor * number:{form}}" for number in numbers)


# ------------------------------------------------------------------------------------------------
# Figures


def draw(command: str, rows: list[dict], path: Path):
    """Draws the rows of a command of DRAWN."""
    figure = DRAWN[command](rows)
    figure.savefig(path, dpi=150)
    pyplot().close(figure)


def draw_curves(rows):
    """What is known against tokens: a thick line for the mean of the seeds, a thin one for each. The last
    evaluation asks more questions than those before it, so it is a dot and not part of the lines.
    """
    keys = ("recall", "bits_known") if "bits_known_curve" in rows[0] else ("recall", "recall_taught")
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, key in zip(axes, keys):
        for row in rows:
            tokens = [point / 1e6 for point in row["tokens"]]
            color, style = CURVES[row["model"]]
            means = [statistics.mean(seeds) for seeds in zip(*row[f"{key}_curve"])]
            label = row["model"].replace("4x", "four times the FLOPs").replace("2x", "twice the FLOPs")
            axis.plot(tokens[:-1], means[:-1], style, color=color, linewidth=2.5, label=label)
            axis.plot(tokens[-1], means[-1], "o", color=color)
            for seed in row[f"{key}_curve"]:
                axis.plot(tokens[:-1], seed[:-1], style, color=color, linewidth=0.7, alpha=0.6)
        axis.set_xlabel("million tokens of training")
        axis.set_title(TITLES[key], fontsize=10)
        axis.set_ylim(bottom=0)
        if key != "bits_known":
            in_percent(axis.yaxis)
        axis.grid(alpha=0.3)
    title = "lines: 400 questions (thick: mean, thin: each seed); dots: all questions, mean"
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rows),
                  fontsize=8, title=title, title_fontsize=8)
    return figure


CURVES = {
    "Memory+": (MEMORY, "-"),
    "dense": (BASELINE, "-"),
    "dense, four times as long": (BASELINE, "--"),
    "dense, three times as long": (BASELINE, "--"),
    "Memory+, three times as long": (MEMORY, "--"),
    "dense, 2x": ("#2f4858", "-"),
    "dense, 4x": ("#2f4858", "-"),
    "mixture of experts": ("#7a5195", "-"),
}  # model -> color, line style


def draw_forgetting(rows):
    """The share kept of the old facts against new facts learnt; and what is known of ten rounds."""
    figure, (axis, rounds) = pyplot().subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for row, color in zip(rows, pyplot().cm.tab20.colors):
        means = []
        for points in zip(*row["curves"]):
            means.append([statistics.mean(point[key] for point in points) for key in ("new", "kept")])
        axis.plot(*zip((0, 1), *means), ".-", color=color, label=row["model"])
        if "rounds_at_end" in row:
            known = [statistics.mean(seeds) for seeds in zip(*row["rounds_at_end"])]
            rounds.plot(range(1, len(known) + 1), known, ".-", color=color, label=row["model"])
            for seed in row["rounds_at_end"]:
                rounds.plot(range(1, len(seed) + 1), seed, color=color, linewidth=0.7, alpha=0.6)
    axis.set_xlabel("new facts known, never asked")
    axis.set_title("old facts kept, of those known before (mean of seeds)", fontsize=10)
    rounds.set_xlabel("round of 200 new people")
    rounds.set_title("known of each round after the last", fontsize=10)
    for each in (axis, rounds):
        in_percent(each.yaxis)
        each.set_ylim(0, 1.02)
        each.grid(alpha=0.3)
    in_percent(axis.xaxis)
    axis.legend(fontsize=7)
    rounds.legend(fontsize=7)
    return figure


def draw_retrofit(rows):
    """The rise of the loss on other text against facts known, in taught and in other wordings: a line for
    each seed, a dotted one for a gentler try.
    """
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for axis, key, words in zip(axes, ("taught", "held_out"), ("taught wordings", "wordings never taught")):
        for row, color in zip(rows, pyplot().cm.tab10.colors):
            for number, curve in enumerate(row["curves"]):
                label = with_rank(row) if number == 0 else None
                axis.plot(*trade_off(curve, key), ".-", color=color, label=label, alpha=0.8)
            for one in row["gentler"]:
                label = f"{with_rank(row)}, rate {one['rate']:g}"
                axis.plot(*trade_off(one["curve"], key), ".:", color=color, label=label)
        axis.set_xlabel(f"facts known in {words}")
        axis.grid(alpha=0.3)
        in_percent(axis.xaxis)
    axes[0].set_yscale("symlog", linthresh=0.01)  # the memory's rise is a hundredth of the others'
    axes[0].set_ylabel("rise of the loss on other text, nats per token")
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return figure


def trade_off(curve, key):
    """The points of a curve, starting at zero: the shares known, and how much the loss has risen."""
    return [0.0] + [point[key] for point in curve], [0.0] + [point["loss"] for point in curve]


def draw_scaling(rows):
    """Recall, bits and FLOPs against the number of slots."""
    figure, axes = pyplot().subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    points = [row for row in rows if row["slots"]]
    n_slots = [row["slots"] for row in points]
    for axis, key in zip(axes, ("recall", "bits_known")):
        means = [statistics.mean(row[key]) for row in points]
        axis.plot(n_slots, means, "o-", color=MEMORY, label="mean")
        for row in points:
            label = "each seed" if row is points[0] else None
            axis.plot([row["slots"]] * len(row[key]), row[key], "k.", markersize=4, label=label)
        axis.axhline(statistics.mean(rows[0][key]), color=BASELINE, linestyle="--", label="dense, mean")
        axis.set_title(TITLES[key], fontsize=10)
    in_percent(axes[0].yaxis)
    axes[1].legend(fontsize=8, loc="upper left")
    axes[2].plot(n_slots, [row["flops_per_token"] / 1e6 for row in points], "o-", color=MEMORY)
    axes[2].axhline(rows[0]["flops_per_token"] / 1e6, color=BASELINE, linestyle="--")
    axes[2].set_title("million FLOPs per token", fontsize=10)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("slots")
        axis.set_ylim(bottom=0)
    return figure


def draw_models(rows):
    """A bar for each model's mean, with a dot for each seed."""
    is_text = "bits_per_byte" in rows[0]
    if is_text:
        keys = ("bits_per_byte",)
    elif "bits_known" in rows[0]:
        keys = ("recall", "bits_known")
    else:
        keys = ("recall", "recall_taught")
    size = (5 + 4 * len(keys), 0.32 * len(rows) + 1.3)
    figure, axes = pyplot().subplots(1, len(keys), figsize=size, sharey=True, squeeze=False,
                                      layout="constrained")
    is_baseline = [row["model"].startswith(("dense", "mixture")) for row in rows]
    colors = [BASELINE if baseline else MEMORY for baseline in is_baseline]
    places = range(len(rows))
    for axis, key in zip(axes[0], keys):
        means = [statistics.mean(row[key]) for row in rows]
        if is_text:
            # The models are hundredths apart. Bars have to start at 0, which would hide that; marks don't.
            axis.scatter(means, places, 400, colors, marker="|", linewidths=4, label="mean")
            axis.margins(y=0.3)
        else:
            axis.barh(places, means, color=colors, label="mean")
            if key.startswith("recall"):
                in_percent(axis.xaxis)
        axis.set_xlabel(TITLES[key])
        for place, row in zip(places, rows):
            is_first = place == 0
            axis.plot(row[key], [place] * len(row[key]), "k.", markersize=4,
                      label="each seed" if is_first else None)
    axes[0][0].set_yticks(places, [row["model"] for row in rows])
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, fontsize=8, ncols=len(labels), loc="outside upper center", frameon=False)
    if is_text:
        for handle in legend.legend_handles:
            if hasattr(handle, "set_sizes"):  # the marks of the mean, which are too large for a legend
                handle.set_sizes([60])
    return figure


def draw_slots(rows):
    """How evenly slots are used, and each layer's overlaps."""
    size = (4.5 + 4 * len(rows), 3.2)
    figure, axes = pyplot().subplots(1, 1 + len(rows), figsize=size, layout="constrained")
    for row in rows:
        label = f"layer {row['layer']}: {row['share used']:.0%} of all slots are read"
        axes[0].loglog(*zip(*row["weights"]), label=label)
    axes[0].set_xlabel("rank of the slot, most read first")
    axes[0].set_ylabel("share of all weight")
    axes[0].legend(fontsize=7)
    for row, axis in zip(rows, axes[1:]):
        names = list(row["overlaps"]["name"])
        for i, (position, overlaps) in enumerate(row["overlaps"].items()):
            end_or_start = "ends" if position == "name" else "begins"
            heights = [place + 0.4 * i - 0.2 for place in range(len(names))]
            axis.barh(heights, [overlaps[name] for name in names], 0.38,
                      label=f"where the {position} {end_or_start}")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        in_percent(axis.xaxis)
        axis.set_xlim(0, 1)
        axis.set_xlabel("of the slots read, by weight")
        axis.set_title(f"layer {row['layer']}: a statement reads in common with", fontsize=9)
        axis.legend(fontsize=7)
    return figure


def in_percent(axis):
    """Labels an axis of shares in percent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


DRAWN = {
    "curves": draw_curves,
    "table1": draw_models,
    "layers": draw_models,
    "ablations": draw_models,
    "scaling": draw_scaling,
    "text": draw_models,
    "slots": draw_slots,
    "forgetting": draw_forgetting,
    "retrofit": draw_retrofit,
}
