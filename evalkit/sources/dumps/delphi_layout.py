"""Names of the files that eai-delphi and an export to it hold. Knows names only; loads no torch.

``explanations/MODULE_latentN.txt`` and ``scores/SCORER/MODULE_latentN.txt``, with "--" for "/" in MODULE. An export has
``CARD`` beside these folders, which says which module is which dictionary.
"""

from __future__ import annotations

import re

__all__ = ["CARD", "LATENT_FILE", "module_name"]

CARD = "evalkit.json"
LATENT_FILE = re.compile(r"(?P<module>.+)_latent(?P<latent>\d{1,12})\.(?:txt|json)", re.ASCII)


def module_name(name: str) -> str:
    """A name as it stands in a file name."""
    return name.replace("/", "--")
