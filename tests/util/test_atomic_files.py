from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from evalkit.errors import StorageError
from evalkit.util.atomic_files import atomic_path, write_bytes


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.bin"
    write_bytes(target, b"abc")
    assert target.read_bytes() == b"abc"
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    write_bytes(target, b"old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert target.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_one_storage_error(tmp_path: Path) -> None:
    """A file-size limit makes the real write fail like a full disk does."""
    code = f"""
import resource, signal
from pathlib import Path
from evalkit.errors import StorageError
from evalkit.util.atomic_files import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path({str(tmp_path / "big.bin")!r}), bytes(100_000))
except StorageError as error:
    print(error.expected, "|", error.seen)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "a file that can be written | File too large"
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(StorageError, match="a file that can be written"):
        write_bytes(tmp_path / "taken" / "file.bin", b"x")
