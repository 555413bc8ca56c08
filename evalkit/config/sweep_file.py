"""A sweep as one file: the subject model, the dictionaries and the protocol, as TOML.

Its keys are those of a run's configuration (``config.RunConfig``), and ``features`` as ``--features`` has it. A
dictionary is a path, or a table with ``path`` and options of its own. Relative paths are relative to where the command is
run. Reads the file; knows no stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evalkit.config.feature_selection import parse_features
from evalkit.config.run_config import RunConfig, read_toml
from evalkit.errors import BadConfig

__all__ = ["read_sweep"]


def read_sweep(path: Path, **changes: Any) -> RunConfig:
    """The configuration of a sweep, with what ``changes`` replace. Raises MissingFile, BadConfig (naming the key)."""
    spec = read_toml(path)
    unknown = sorted(spec.keys() - RunConfig.model_fields.keys() - {"features"})
    if unknown:
        import difflib

        known = sorted({*RunConfig.model_fields, "features"})
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise BadConfig(
            f"{path}: {unknown[0]}",
            expected=f"some of the keys {', '.join(known)}",
            seen=unknown[0],
            fix=f"did you mean {near[0]}?" if near else "remove it",
        )
    if "features" in spec:
        if clash := sorted(spec.keys() & {"n_features", "feature_ids", "density_band"}):
            raise BadConfig(f"{path}: features", expected="it, or its parts", seen=f"also {clash[0]}", fix="keep one")
        spec |= parse_features(spec.pop("features")).fields()
    given = {name: value for name, value in changes.items() if value is not None}
    if "dictionaries" not in spec.keys() | given.keys():
        raise BadConfig(f"{path}: dictionaries", expected="a value", seen="none", fix="add a line dictionaries = …")
    return RunConfig.create(**{**spec, **given})
