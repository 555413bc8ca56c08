"""Files with checksums: every changed byte is noticed when its block is read, and writing stays atomic."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evalkit.errors import DamagedFile, MissingFile
from evalkit.util import sealed_files
from evalkit.util.sealed_files import (
    BlockChecks,
    is_sealed,
    open_sealed,
    read_sealed,
    read_sealed_json,
    seal,
    sealed_path,
    sidecar,
    verify,
    write_sealed,
)
from tests.support.paths import ROOT

MIB = 1 << 20
SOUND = np.random.default_rng(0).bytes(3 * MIB + 17)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_sealed(tmp_path / "data.bin", SOUND)
    return tmp_path / "data.bin"


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))


def test_a_sound_file_is_read_as_written(path: Path) -> None:
    assert read_sealed(path, fix="f") == path.read_bytes() == SOUND
    verify(path, fix="f")
    with open_sealed(path, fix="f") as stream:
        assert stream.seek(-20, 2) == len(SOUND) - 20
        assert stream.read(50) == SOUND[-20:]
        stream.seek(MIB - 3)
        assert stream.read(6) == SOUND[MIB - 3 : MIB + 3]
        assert stream.tell() == MIB + 3


def test_the_checksums_are_those_of_an_independent_computation(path: Path) -> None:
    held = json.loads(sidecar(path).read_text())
    blocks = [
        hashlib.blake2b(SOUND[start : start + MIB], digest_size=8).hexdigest() for start in range(0, 4 * MIB, MIB)
    ]
    assert held["blocks"] == blocks and held["bytes"] == len(SOUND)


@pytest.mark.parametrize("place", [0, MIB - 1, MIB, 2 * MIB + 5, len(SOUND) - 1])
def test_a_flipped_bit_is_found_where_it_is(path: Path, place: int) -> None:
    flip(path, place, place % 8)
    start = place // MIB * MIB
    with pytest.raises(DamagedFile) as caught:
        read_sealed(path, fix="delete it")
    end = min(start + MIB, len(SOUND))
    assert str(caught.value) == (
        f"{path}: expected the bytes that were written; seen other bytes between byte {start} and byte {end}; "
        "fix: delete it"
    )
    with pytest.raises(DamagedFile):
        verify(path, fix="f")
    checks = BlockChecks.of(path, fix="f")
    with pytest.raises(DamagedFile):
        checks.check(place, place + 1)
    for block in set(range(4)) - {place // MIB}:  # a partial read of sound blocks goes well
        checks.check(block * MIB, block * MIB + 1)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b""])
def test_another_size_is_found_at_once(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    path.write_bytes(change(SOUND))
    with pytest.raises(DamagedFile, match=f"expected {len(SOUND)} bytes, as written; seen "):
        BlockChecks.of(path, fix="f")


def test_every_flipped_bit_of_the_checksums_is_found(tmp_path: Path) -> None:
    path = tmp_path / "small"
    write_sealed(path, b"small")
    sound = sidecar(path).read_bytes()
    for place in range(len(sound) - 1):  # the last byte ends the line
        for bit in range(8):
            flip(sidecar(path), place, bit)
            with pytest.raises(DamagedFile):
                read_sealed(path, fix="f")
            sidecar(path).write_bytes(sound)


def test_checksums_of_another_file_do_not_fit(path: Path) -> None:
    other = path.with_name("other.bin")
    other.write_bytes(SOUND)
    sidecar(other).write_bytes(sidecar(path).read_bytes())
    with pytest.raises(DamagedFile, match=r"expected the checksums of other\.bin, as written; seen others"):
        verify(other, fix="f")


def test_a_file_without_checksums_is_read_and_can_get_them(tmp_path: Path) -> None:
    path = tmp_path / "older"
    path.write_bytes(SOUND)
    assert not is_sealed(path) and read_sealed(path, fix="f") == SOUND
    seal(path)
    assert is_sealed(path) and read_sealed(path, fix="f") == SOUND
    flip(path, 5)
    with pytest.raises(DamagedFile):
        read_sealed(path, fix="f")


def test_a_missing_file_and_text_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="seen no such file; fix: f"):
        read_sealed(tmp_path / "none", fix="f")
    write_sealed(tmp_path / "text", b"{")
    with pytest.raises(DamagedFile, match=r"expected a list; seen invalid JSON \(line 1, column 2\); fix: f"):
        read_sealed_json(tmp_path / "text", expected="a list", fix="f")


def test_a_failed_write_leaves_the_old_file_and_its_checksums(path: Path) -> None:
    with pytest.raises(RuntimeError), sealed_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert read_sealed(path, fix="f") == SOUND
    assert sorted(one.name for one in path.parent.iterdir()) == ["data.bin", "data.bin.checksums"]


def test_a_killed_writer_never_leaves_a_file_beside_other_checksums(tmp_path: Path) -> None:
    """Killed while it replaces the file again and again: the file is absent, or verified, at any moment."""
    code = f"""
from pathlib import Path
from evalkit.util.sealed_files import write_sealed
print("go", flush=True)
for number in range(10**6):
    write_sealed(Path({str(tmp_path / "f")!r}), str(number).encode() * 9)
"""
    for number in range(5):
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert writer.stdout is not None and writer.stdout.readline() == "go\n"
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(0.1 + 0.07 * number)
        writer.kill()
        writer.communicate()
        if (tmp_path / "f").exists():
            assert is_sealed(tmp_path / "f")
            verify(tmp_path / "f", fix="f")


def test_a_block_is_hashed_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    real = sealed_files._hash
    monkeypatch.setattr(sealed_files, "_hash", lambda data: hashed.append(len(data)) or real(data))
    checks = BlockChecks.of(path, fix="f")
    hashed.clear()
    for start in range(0, len(SOUND), 4096):
        checks.check(start, min(start + 4096, len(SOUND)))
    assert hashed == [MIB, MIB, MIB, 17]
