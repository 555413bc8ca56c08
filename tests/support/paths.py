"""Folders that tests read from, in one place, so that a test file can move without looking for them again."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
GOLDEN_PROMPTS = GOLDEN / "prompts"
SOURCES_DATA = ROOT / "tests" / "sources" / "data"
DELPHI_LATENTS = SOURCES_DATA / "delphi" / "latents"
DELPHI_TOKENIZER = SOURCES_DATA / "delphi" / "tokenizer"
BUNDLED = ROOT / "evalkit" / "data" / "dictionaries"
