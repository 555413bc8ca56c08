"""Whether a dictionary can read a subject model at all: the width of its states, and the module path it reads.

Knows names and sizes; reads and writes nothing.
"""

from __future__ import annotations

import re

from evalkit.errors import SiteMismatch
from evalkit.records import Site, SubjectInfo

__all__ = ["check_subject"]


_OWN_WIDTH = re.compile(r"\.(?:o_proj|down_proj):in$")  # as wide as the heads or the MLP, not as the residual stream
_PLAIN = re.compile(r"layers\.\d+(?:\.(?:self_attn|mlp))?")
_LAYER = re.compile(r"layers\.(\d+)")


def check_subject(name: str, site: Site, d_model: int, subject: SubjectInfo) -> None:
    """Raises SiteMismatch for a subject of another width, or without the module path of the site."""
    if subject.d_model != d_model and not _OWN_WIDTH.search(site.path):
        raise SiteMismatch(
            name,
            expected=f"a subject model with d_model {d_model} ({site.model})",
            seen=f"{subject.model} with d_model {subject.d_model}",
            fix="score it with the model it was trained on",
        )
    layer = _LAYER.match(site.path)
    missing = site.path not in subject.sites if _PLAIN.fullmatch(site.path) else False
    if subject.sites and (missing or (layer and int(layer[1]) >= subject.n_layers)):
        raise SiteMismatch(
            name,
            expected=f"a subject model with the module path {site.path}",
            seen=f"{subject.model} with {subject.n_layers} layers",
            fix="score it with the model it was trained on, or name its site with the option site=",
        )
