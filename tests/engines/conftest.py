"""Tests on the real engine. They run in an environment that has it; where it must be there, its absence is a failure."""

from __future__ import annotations

import importlib.util
import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is not None or os.environ.get("EVALKIT_REQUIRE_ENGINE"):
        return
    for item in items:
        if "engines" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="no vLLM in this environment: `make test-engines` makes one"))
