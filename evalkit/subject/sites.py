"""Where a dictionary reads, from the name its makers gave the place: TransformerLens hooks and Hugging Face modules.

A site is a module path of the subject model under names that hold for every family (``layers.12``, ``layers.12.mlp``,
``layers.12.self_attn.o_proj``, ``layers.12.pre_mlp_norm``, ``embed``); with ``:in`` behind it, what goes into the module
instead of what comes out. Knows names only.
"""

from __future__ import annotations

import re

__all__ = ["INPUT", "site_of_hook"]

INPUT = ":in"
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_HOOKS = {
    "hook_resid_post": "layers.{layer}",
    "hook_mlp_out": "layers.{layer}.mlp",
    "hook_attn_out": "layers.{layer}.self_attn",
    "attn.hook_z": "layers.{layer}.self_attn.o_proj:in",
    "hook_resid_mid": "layers.{layer}.pre_mlp_norm:in",
    "ln2.hook_normalized": "layers.{layer}.pre_mlp_norm:in",  # the reader declares the norm without its gain
    "hook_mlp_in": "layers.{layer}.pre_mlp_norm:in",
    "mlp.hook_in": "layers.{layer}.mlp:in",
    "mlp.hook_post": "layers.{layer}.mlp.down_proj:in",
}
_PREFIXES = re.compile(r"^(?:model|transformer|gpt_neox|backbone|language_model|decoder)\.")
_ATTENTION = re.compile(r"^(?:attn|attention|self_attention)(?=\.|$)")
_LISTS = re.compile(r"^(?:layers|h|blocks)\.(\d+)(?:\.(.+))?$")


def site_of_hook(name: str) -> str | None:
    """The site of a hook or module name, or None for one that stands for nothing known.

    ``blocks.8.hook_resid_pre`` is what comes out of the block before: ``layers.7``, or ``layers.0:in`` for the first block.
    """
    name = name.strip()
    if found := _BLOCK.fullmatch(name):
        layer, hook = int(found[1]), found[2]
        if hook == "hook_resid_pre":
            return "layers.0:in" if layer == 0 else f"layers.{layer - 1}"
        return _HOOKS[hook].format(layer=layer) if hook in _HOOKS else None
    if name in ("hook_embed", "embed"):
        return "embed"
    name, suffix = (name.removesuffix(INPUT), INPUT) if name.endswith(INPUT) else (name, "")
    bare = name
    while (shorter := _PREFIXES.sub("", bare)) != bare:
        bare = shorter
    if found := _LISTS.match(bare):
        rest = "" if found[2] is None else f".{_ATTENTION.sub('self_attn', found[2])}"
        return f"layers.{int(found[1])}{rest}{suffix}"
    if bare in ("embed_tokens", "wte", "embed_in"):
        return "embed"
    return None
