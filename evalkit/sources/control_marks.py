"""What marks a source as a control of the run. Knows records only; loads no torch."""

from __future__ import annotations

from dataclasses import replace

from evalkit.records import CONTROL_KIND, SourceInfo

__all__ = ["as_dictionary"]


def as_dictionary(info: SourceInfo) -> SourceInfo:
    """The record of a source that is no control: what its file or plug-in says of itself does not make it one."""
    return replace(info, kind=f"declared-{info.kind}") if info.kind.startswith(CONTROL_KIND) else info
