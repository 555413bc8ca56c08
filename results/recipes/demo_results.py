"""Writes the results of a finished demo run to results/demo, and its short table into the README.

    make demo && python results/recipes/demo_results.py

Reads runs/demo; writes results/demo/{table.md,table.csv,scores.*,features.*} and the marked block of README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from evalkit.report.footer import footer
from evalkit.report.plots.files import plot_run
from evalkit.report.render import render
from evalkit.report.tables import headline, summary_table
from evalkit.store.run_store import read_run

ROOT = Path(__file__).parent.parent.parent
BEGIN, END = "<!-- demo table: begin -->", "<!-- demo table: end -->"


def short_table(table: pd.DataFrame) -> str:
    """AUROC per dictionary and scorer: the value, its shuffled null, z, the lexical baseline; no density-matched rows."""
    scorers = ("detection", "fuzzing")
    titles = " | ".join(f"{scorer} | null | z | lexical" for scorer in scorers)
    lines = [f"| dictionary | {titles} | features |", "|---" * (4 * len(scorers) + 2) + "|"]
    for name, group in headline(table).groupby("dictionary", sort=False):
        if " (density " in str(name):
            continue
        rows = group.set_index("scorer")
        cells = []
        for scorer in scorers:
            row = rows.loc[scorer]
            cells += [row["AUROC"], row["AUROC null"].split()[0], row["AUROC z"], row["AUROC lexical"].split()[0]]
        lines.append(f"| {name} | {' | '.join(cells)} | {rows['features'].iloc[0]} |")
    return "\n".join(lines)


def main() -> None:
    """Write the files and the README's table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo")
    run = parser.parse_args().run
    frames = read_run(run)
    table = summary_table(frames)
    out = ROOT / "results" / "demo"
    out.mkdir(exist_ok=True)
    (out / "table.md").write_text(str(render(table, "markdown", footer(frames, table))), encoding="utf-8")
    (out / "table.csv").write_text(str(render(table, "csv")), encoding="utf-8")
    plot_run(frames, out)
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{short_table(table)}\n{END}{after}", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
