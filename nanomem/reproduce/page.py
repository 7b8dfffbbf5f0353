"""
Writes the tables of README.md and of pages in docs from assets/*.json.

A page says where a table goes, and what is between these two lines is replaced:

    <!-- table: scaling -->
    <!-- end -->
"""

import re
import statistics
from pathlib import Path

from nanomem.checkpoint import read_json, write_text
from nanomem.cli import UserError
from nanomem.reproduce import figures

PAGES = ("README.md", "docs/results.md", "docs/retrofit.md", "docs/teaching.md")
TIMED = {"forgetting": "of training the models that are taught", "retrofit": "in all", "shapes": "in all"}
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def write_pages(root: Path, assets: Path) -> list[Path]:
    """Writes the tables of all pages under `root` anew. Returns the pages that changed."""
    changed = []
    for name in PAGES:
        path = root / name
        before = path.read_text(encoding="utf-8")
        after = filled(before, assets)
        if after != before:
            write_text(path, after)
            changed.append(path)
    return changed


def filled(text: str, assets: Path) -> str:
    """A page's text with its tables written anew. Raises UserError for a table that isn't known, or whose
    results are missing.
    """
    return PLACE.sub(lambda match: f"{match[1]}{place_text(match[2], assets)}{match[3]}", text)


def place_text(name, assets):
    """What belongs in one place of a page."""
    command = name.partition("-")[0]  # of table1-world: table1
    if command not in TABLES:
        raise UserError(f"there is no table {name}; known are {', '.join(TABLES)}")
    path = assets / f"{name}.json"
    results = read_json(path)
    remedy = f"python -m nanomem.reproduce {command}"
    if name.endswith("-world"):
        remedy += " --preset=night"
    if command in ("retrofit", "shapes"):
        remedy += " --model=NAME"
    if results is None:
        raise UserError(f"{path} is missing; {remedy} makes it")
    table = TABLES[command](results["rows"])
    return f"\n{table}\n{origin(results, TIMED.get(command, 'of training'))}\n"


def origin(results: dict, timed: str) -> str:
    """The line below a table: command, commit, machine, seeds and time. timed: what took that time."""
    parts = [f"`{results['command']}`", f"commit {results['commit']}", results["machine"]]
    if results["seeds"]:
        noun = "seeds" if len(results["seeds"]) > 1 else "seed"
        parts.append(f"{noun} {', '.join(map(str, results['seeds']))}")
    if results["minutes"]:
        parts.append(f"{results['minutes']} minutes {timed}")
    if results.get("updates"):  # an export does not say
        parts.append(f"a model trained for {results['updates']:,} updates")
    return f"({'; '.join(parts)})\n"


def curves_table(rows: list[dict]) -> str:
    """What each model of `curves` knows at the end, the best first, as a Markdown table."""
    columns = {
        "model": lambda row: row["model"],
        "million FLOPs per token": lambda row: f"{row['flops_per_token'] / 1e6:.2f}",
        "million parameters": lambda row: f"{row['params'] / 1e6:.1f}",
        "million tokens": lambda row: f"{row['tokens'][-1] / 1e6:.1f}",
        "recall, %, each seed": lambda row: figures.percent(row["recall"]),
    }
    if "bits_known" in rows[0]:
        columns["bits known, thousands"] = figures.thousand_bits
    else:
        columns["taught wording, %"] = lambda row: figures.percent(row["recall_taught"])
    best_first = sorted(rows, key=lambda row: -statistics.mean(row["recall"]))
    return figures.table_of(columns, best_first)


TABLES = {
    "curves": curves_table,
    "table1": figures.markdown,
    "scaling": figures.markdown,
    "layers": figures.markdown,
    "ablations": figures.markdown,
    "text": figures.markdown,
    "slots": figures.slots_table,
    "forgetting": figures.forgetting_table,
    "retrofit": figures.retrofit_table,
    "shapes": figures.shapes_table,
}  # command -> function of its rows
