"""The grammar of site names: parses and writes them, converts hook names to them, and checks that a model has a site.

A site is a module path of the subject model, with the same names for every family: ``layers.12``, ``layers.12.mlp``,
``layers.12.self_attn.o_proj``, ``layers.12.pre_mlp_norm``, ``embed``. With the suffix ``:in`` it is the input of that
module instead of its output. Three names are no module of their own, because families compute them in different modules:
``layers.12.resid_mid`` is the residual stream between attention and MLP, ``layers.12.attn_out`` and ``layers.12.mlp_out``
are what attention and MLP add to it; ``block_parts`` finds them in a loaded model. Every regular expression for site or
hook names is here. Knows names and sizes, no module; reads and writes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from evalkit.errors import SiteMismatch
from evalkit.records import Site, SubjectInfo

__all__ = [
    "ATTN_OUT",
    "EMBED",
    "INPUT",
    "MLP_OUT",
    "PRE_MLP_NORM",
    "RESID_MID",
    "BlockSite",
    "check_subject",
    "parse_hook",
    "parse_site",
    "site_of_hook",
]

EMBED = "embed"
INPUT = ":in"
RESID_MID, ATTN_OUT, MLP_OUT, PRE_MLP_NORM = "resid_mid", "attn_out", "mlp_out", "pre_mlp_norm"
_SITE = re.compile(r"(?:.*?\.)?(?:layers|h|blocks|block)\.(0|[1-9][0-9]*)(?:\.([^:]+))?(:in)?")
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_HOOKS = {
    "hook_resid_post": "",
    "hook_mlp_out": f".{MLP_OUT}",
    "hook_attn_out": f".{ATTN_OUT}",
    "attn.hook_z": ".self_attn.o_proj:in",
    "hook_resid_mid": f".{RESID_MID}",
    "ln2.hook_normalized": ".pre_mlp_norm:in",  # declared as the norm without its gain by the source that reads it
    "hook_mlp_in": ".pre_mlp_norm:in",
    "mlp.hook_in": ".mlp:in",
    "mlp.hook_post": ".mlp.down_proj:in",
}
_PREFIXES = re.compile(r"^(?:model|transformer|gpt_neox|backbone|language_model|decoder)\.")
_ATTENTION = re.compile(r"^(?:attn|attention|self_attention)(?=\.|$)")
_LISTS = re.compile(r"^(?:layers|h|blocks)\.(\d+)(?:\.(.+))?$")
# The inputs of these modules are as wide as the heads or the MLP, not as the residual stream.
_OWN_WIDTH = ("o_proj", "down_proj")
_LISTED = ("", ".self_attn", ".mlp")  # parts of a block that ``SubjectInfo.sites`` lists


@dataclass(frozen=True, slots=True)
class BlockSite:
    """A site in a transformer block. ``part``: the module path inside the block, empty for the block itself."""

    layer: int
    part: str = ""
    is_input: bool = False

    @property
    def within(self) -> str:
        """The part of the name after the layer number: ``""``, ``":in"``, ``".mlp"``, ``".mlp:in"``."""
        return (f".{self.part}" if self.part else "") + (INPUT if self.is_input else "")

    def __str__(self) -> str:
        return f"layers.{self.layer}{self.within}"


def parse_site(path: str) -> BlockSite | None:
    """The parts of a site's name, with any family's name for its list of blocks; None for a site outside the blocks.

    The name of a TransformerLens hook is converted to its site first.
    """
    if parse_hook(path):
        path = site_of_hook(path) or path
    found = _SITE.fullmatch(path)
    return BlockSite(int(found[1]), found[2] or "", found[3] is not None) if found else None


def parse_hook(name: str) -> tuple[int, str] | None:
    """Layer and hook of a TransformerLens name: ``blocks.3.hook_mlp_out`` gives ``(3, "hook_mlp_out")``."""
    found = _HOOK.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def site_of_hook(name: str) -> str | None:
    """The site that corresponds to a TransformerLens hook or Hugging Face module name; None for an unknown name.

    ``blocks.8.hook_resid_pre`` is the output of the block before: ``layers.7``, or ``layers.0:in`` for the first block.
    """
    name = name.strip()
    if hooked := parse_hook(name):
        layer, hook = hooked
        if hook == "hook_resid_pre":
            return "layers.0:in" if layer == 0 else f"layers.{layer - 1}"
        return f"layers.{layer}{_HOOKS[hook]}" if hook in _HOOKS else None
    if name in ("hook_embed", EMBED):
        return EMBED
    name, suffix = (name.removesuffix(INPUT), INPUT) if name.endswith(INPUT) else (name, "")
    bare = name
    while (shorter := _PREFIXES.sub("", bare)) != bare:
        bare = shorter
    if found := _LISTS.match(bare):
        rest = "" if found[2] is None else f".{_ATTENTION.sub('self_attn', found[2])}"
        return f"layers.{int(found[1])}{rest}{suffix}"
    if bare in ("embed_tokens", "wte", "embed_in"):
        return EMBED
    return None


def check_subject(name: str, site: Site, d_model: int, subject: SubjectInfo) -> None:
    """Check that a dictionary can read a subject model. Raises SiteMismatch for another width or a missing site."""
    block = parse_site(site.path)
    own_width = block is not None and block.is_input and block.part.endswith(tuple(f".{part}" for part in _OWN_WIDTH))
    width = subject.widths.get(site.path, d_model if own_width else subject.d_model)
    if width != d_model:
        at = "d_model" if width == subject.d_model else f"states at {site.path} of width"
        raise SiteMismatch(
            name,
            expected=f"a subject model with {at} {d_model} ({site.model})",
            seen=f"{subject.model} with {at} {width}",
            fix="score it with the model it was trained on",
        )
    if not subject.sites or block is None:
        return
    if block.layer >= subject.n_layers or (block.within in _LISTED and str(block) not in subject.sites):
        raise SiteMismatch(
            name,
            expected=f"a subject model with the module path {site.path}",
            seen=f"{subject.model} with {subject.n_layers} layers",
            fix="score it with the model it was trained on, or name its site with the option site=",
        )
