"""Runs every benchmark, prints its JSON lines as they arrive, and writes them as tables to RESULTS.md beside this file.

Run: ``make bench``, on an idle machine.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENGINE = ("bench_vllm_client.py",)  # run with the environment of vLLM if it exists


def lines_of(script: Path) -> Iterator[dict[str, Any]]:
    engine = HERE.parents[1] / ".venv-engine/bin/python"
    python = str(engine) if script.name in ENGINE and engine.is_file() else sys.executable
    with subprocess.Popen([python, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        print(f"{script.name}: exit code {process.returncode}; its results are dropped", file=sys.stderr)


def table(lines: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    rows = [columns, ["---"] * len(columns), *([str(line.get(key, "")) for key in columns] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    versions = [
        subprocess.run([sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    ]
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {versions[0].stdout.strip()}"


def main() -> None:
    parts = [
        "# Benchmarks",
        f"Written by `make bench` on {date.today()}: {machine()}. Medians; see each script for what is measured.",
    ]
    for script in sorted(HERE.glob("bench_*.py")):
        lines = list(lines_of(script))
        if lines:
            said = script.read_text("utf-8").split('"""')[1].strip().splitlines()[0]
            parts += [f"## {script.name}", said, table(lines)]
    (HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n", "utf-8")


if __name__ == "__main__":
    main()
