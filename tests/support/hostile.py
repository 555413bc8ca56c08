"""What a hostile file holds, for the tests of every reader."""

from __future__ import annotations

from pathlib import Path

__all__ = ["Bomb", "cut"]


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def cut(file: Path) -> None:
    """The first half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
