"""Whether a dictionary can read a subject model at all: the width of its states, and the module path it reads.

Knows names and sizes; reads and writes nothing.
"""

from __future__ import annotations

from evalkit.errors import SiteMismatch
from evalkit.records import Site, SubjectInfo

__all__ = ["check_subject"]


def check_subject(name: str, site: Site, d_model: int, subject: SubjectInfo) -> None:
    """Raises SiteMismatch for a subject of another width, or without the module path of the site."""
    if subject.d_model != d_model:
        raise SiteMismatch(
            name,
            expected=f"a subject model with d_model {d_model} ({site.model})",
            seen=f"{subject.model} with d_model {subject.d_model}",
            fix="score it with the model it was trained on",
        )
    if subject.sites and site.path not in subject.sites:
        raise SiteMismatch(
            name,
            expected=f"a subject model with the module path {site.path}",
            seen=f"{subject.model} with {subject.n_layers} layers",
            fix="score it with the model it was trained on, or name its site with the option site=",
        )
