"""Reads a sweep from one TOML file: the subject model, the dictionaries and the protocol.

The keys are the fields of ``RunConfig``, plus ``features`` in the form of ``--features``. A dictionary is a path, or a
table with ``path`` and its own options. Relative paths start at the current directory. Knows nothing of the stages;
writes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evalkit.config.feature_selection import parse_features
from evalkit.config.run_config import RunConfig, read_toml
from evalkit.errors import BadConfig

__all__ = ["read_sweep"]


def read_sweep(path: Path, **changes: Any) -> RunConfig:
    """The configuration of a sweep; ``changes`` that are not None replace values of the file.

    Raises MissingFile if the file does not exist, and BadConfig, naming the key, if a value is invalid.
    """
    spec = read_toml(path)
    unknown = sorted(spec.keys() - RunConfig.model_fields.keys() - {"features"})
    if unknown:
        import difflib

        known = sorted({*RunConfig.model_fields, "features"})
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise BadConfig(
            f"{path}: {unknown[0]}",
            expected=f"one of the keys {', '.join(known)}",
            seen=unknown[0],
            fix=f"did you mean {near[0]}?" if near else "remove it",
        )
    if "features" in spec:
        if clash := sorted(spec.keys() & {"n_features", "feature_ids", "density_band"}):
            raise BadConfig(
                f"{path}: features",
                expected="either features, or n_features, feature_ids and density_band",
                seen=f"features and {clash[0]}",
                fix="remove one of them",
            )
        spec |= parse_features(spec.pop("features")).fields()
    given = {name: value for name, value in changes.items() if value is not None}
    if "dictionaries" not in spec.keys() | given.keys():
        raise BadConfig(f"{path}: dictionaries", expected="a list", seen="none", fix="add dictionaries = […]")
    return RunConfig.create(**{**spec, **given})
