"""Puts a finished demo run into results/demo and its short table into the README.

    make demo && python results/recipes/demo_results.py

Reads runs/demo; writes results/demo/{table.md,table.csv,scores.*,features.*} and the marked block of README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from evalkit.report.plots import plot_run
from evalkit.report.render import render
from evalkit.report.tables import footer, summary_table
from evalkit.store import read_run

ROOT = Path(__file__).parent.parent.parent
BEGIN, END = "<!-- demo table: begin -->", "<!-- demo table: end -->"


def short_table(table: pd.DataFrame) -> str:
    """AUROC by dictionary: both scorers, the shuffled null, z over it."""
    lines = [
        "| dictionary | detection | null | z | fuzzing | null | z | features |",
        "|---|---|---|---|---|---|---|---|",
    ]
    auroc = table[table["metric"] == "auroc"]
    for name, group in auroc.groupby("dictionary", sort=False):
        cells = []
        for scorer in ("detection", "fuzzing"):
            row = group[group["scorer"] == scorer].iloc[0]
            cells += [f"{row['mean']:.3f} ± {row['se']:.3f}", f"{row['null_mean']:.3f}", f"{row['z']:.1f}"]
        first = group.iloc[0]
        lines.append(f"| {name} | {' | '.join(cells)} | {first['n_features']}/{first['n_tried']} |")
    return "\n".join(lines)


def main() -> None:
    """Write everything."""
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
