"""Tensors read in part from strangers' files: the numbers that the libraries wrote, and no more bytes than asked."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from evalkit.errors import BadFile, BadShape, EvalkitError, MissingFile
from evalkit.util.npz_files import open_npz
from evalkit.util.tensor_files import Stored, open_safetensors, open_torch, take, whole

ROWS, COLUMNS = 7, 300


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVALKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def values(dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(3).normal(size=(ROWS, COLUMNS)).astype(dtype)


def npz(path: Path, compressed: bool = False, **arrays: np.ndarray) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def by_library(tmp_path: Path, kind: str) -> tuple[Stored, np.ndarray]:
    """One matrix written by the library of the format, and what the library's own conversion to float32 makes of it."""
    library, dtype = kind.split("-")
    path = tmp_path / f"one.{library}"
    if library == "npz":
        matrix = values(dtype)
        return open_npz(npz(path, a=matrix))["a"], matrix.astype(np.float32)
    tensor = torch.from_numpy(values("float64")).to(getattr(torch, dtype))
    if library == "safetensors":
        save_file({"a": tensor}, path)
        return open_safetensors(path)["a"], tensor.float().numpy()
    torch.save({"a": tensor}, path)
    return open_torch(path)["a"], tensor.float().numpy()


KINDS = [
    *(f"npz-{dtype}" for dtype in ("float16", "float32", "float64")),
    *(
        f"{library}-{dtype}"
        for library in ("safetensors", "pt")
        for dtype in ("float16", "bfloat16", "float32", "float64")
    ),
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_reads_as_float32(tmp_path: Path, kind: str) -> None:
    stored, expected = by_library(tmp_path, kind)
    assert (stored.shape, stored.ndim, stored.T.shape) == ((ROWS, COLUMNS), 2, (COLUMNS, ROWS))
    found = stored.read()
    assert (found.dtype, found.is_contiguous()) == (torch.float32, True)
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(stored.T.read().numpy(), expected.T)
    np.testing.assert_array_equal(stored.T.T.read().numpy(), expected)
    columns, rows = np.array([299, 0, 5, 6, 5, 250]), np.array([3, 3, 0, 6])
    np.testing.assert_array_equal(stored.take(columns, 1).numpy(), expected[:, columns])
    np.testing.assert_array_equal(stored.take(rows, 0).numpy(), expected[rows])
    np.testing.assert_array_equal(stored.T.take(columns, 0).numpy(), expected.T[columns])
    np.testing.assert_array_equal(stored.T.take(rows, 1).numpy(), expected.T[:, rows])
    np.testing.assert_array_equal(take(stored, slice(2, 5), 0).numpy(), expected[2:5])
    np.testing.assert_array_equal(take(stored, slice(100, 103), 1).numpy(), expected[:, 100:103])
    assert whole(stored).shape == (ROWS, COLUMNS)
    assert stored.file == tmp_path / f"one.{kind.split('-')[0]}"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, COLUMNS - 1), max_size=40), st.sampled_from([0, 1]), st.booleans())
def test_any_rows_and_columns_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, chosen: list[int], axis: int, transposed: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "property.npz"
    matrix = np.random.default_rng(1).normal(size=(COLUMNS, COLUMNS)).astype(np.float32)
    if not path.exists():
        npz(path, a=matrix)
    stored = open_npz(path)["a"]
    index = np.array(chosen, dtype=np.int64)
    found = (stored.T if transposed else stored).take(index, axis).numpy()
    np.testing.assert_array_equal(found, np.take(matrix.T if transposed else matrix, index, axis=axis))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_compressed_and_column_ordered_archives(tmp_path: Path, compressed: bool, order: str, cache: Path) -> None:
    matrix = np.asarray(values(), order=order)  # type: ignore[call-overload]
    path = npz(tmp_path / "one.npz", compressed, a=matrix, vector=np.arange(5, dtype=np.float16))
    for _ in range(2):
        tensors = open_npz(path)
        np.testing.assert_array_equal(tensors["a"].read().numpy(), matrix)
        np.testing.assert_array_equal(tensors["a"].take(np.array([9, 2]), 1).numpy(), matrix[:, [9, 2]])
        np.testing.assert_array_equal(tensors["vector"].read().numpy(), np.arange(5))
        assert tensors["a"].file == path
    assert len(list(cache.rglob("*.npy"))) == (2 if compressed else 0)
    changed = npz(path, compressed, a=matrix + 1)
    os.utime(changed, ns=(1, 1))
    np.testing.assert_array_equal(open_npz(path)["a"].read().numpy(), matrix + 1)


def test_a_few_columns_read_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(0).normal(size=(64, 20_000)).astype(np.float32)
    path = npz(tmp_path / "wide.npz", a=matrix)
    read: list[int] = []
    real = os.pread

    def counting(file: int, size: int, offset: int) -> bytes:
        read.append(size)
        return real(file, size, offset)

    monkeypatch.setattr(os, "pread", counting)
    stored = open_npz(path)["a"]
    assert read == []
    columns = np.array([19_999, 17, 18, 9_000])
    np.testing.assert_array_equal(stored.take(columns, 1).numpy(), matrix[:, columns])
    assert sum(read) == 64 * 4 * 4
    read.clear()
    np.testing.assert_array_equal(stored.take(np.array([5, 6, 7]), 0).numpy(), matrix[5:8])
    assert read == [3 * 20_000 * 4]
    assert stored.take(np.array([], dtype=np.int64), 1).shape == (64, 0)


@pytest.mark.parametrize("kind", ["npz-float32", "safetensors-bfloat16", "pt-float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_found_where_they_are_read(tmp_path: Path, kind: str, bad: float) -> None:
    library, dtype = kind.split("-")
    tensor = torch.from_numpy(values()).clone()
    tensor[3, 40] = bad
    path = tmp_path / f"bad.{library}"
    if library == "npz":
        npz(path, a=tensor.numpy())
        stored = open_npz(path)["a"]
    elif library == "pt":
        torch.save({"a": tensor}, path)
        stored = open_torch(path)["a"]
    else:
        save_file({"a": tensor.to(getattr(torch, dtype))}, path)
        stored = open_safetensors(path)["a"]
    assert stored.take(np.array([39, 41]), 1).shape == (ROWS, 2)
    with pytest.raises(BadFile) as caught:
        stored.take(np.array([40]), 1)
    assert str(caught.value) == (
        f"{path}: a: expected finite numbers; seen 1 of {ROWS} are NaN or infinite; "
        "fix: download or train the dictionary again"
    )


def test_float64_too_large_for_float32_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="1 of 2 are NaN or infinite"):
        open_npz(npz(tmp_path / "big.npz", a=np.array([1e300, 1.0])))["a"].read()


OPENERS: dict[str, Callable[[Path], dict[str, Stored]]] = {
    "npz": open_npz,
    "safetensors": open_safetensors,
    "pt": open_torch,
}
MEANT = {
    "npz": "an .npz archive of plain arrays",
    "safetensors": "plain tensors in a .safetensors file",
    "pt": "plain tensors in a file that torch wrote",
}


@pytest.mark.parametrize("kind", OPENERS)
def test_missing(tmp_path: Path, kind: str) -> None:
    with pytest.raises(MissingFile) as caught:
        OPENERS[kind](tmp_path / f"no.{kind}")
    expected = f"{tmp_path / f'no.{kind}'}: expected a file of weights; seen no such file; fix: check the path"
    assert str(caught.value) == expected


@pytest.mark.parametrize("kind", OPENERS)
def test_torn_anywhere(tmp_path: Path, kind: str) -> None:
    if kind == "npz":
        npz(tmp_path / "whole", a=values())
        (tmp_path / "whole.npz").rename(tmp_path / "whole")
    elif kind == "safetensors":
        save_file({"a": torch.from_numpy(values())}, tmp_path / "whole")
    else:
        torch.save({"a": torch.from_numpy(values())}, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    path = tmp_path / f"torn.{kind}"
    for cut in (0, 1, 4, 8, 9, 40, 100, len(data) // 2, len(data) - 60, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(BadFile) as caught:
            OPENERS[kind](path)["a"].read()
        assert str(path) in str(caught.value)
        assert MEANT[kind] in str(caught.value)
    for seed in range(60):  # flipped bytes: an error of ours or a finite tensor, nothing else
        rng = np.random.default_rng(seed)
        flipped = bytearray(data)
        for place in rng.integers(0, min(len(data), 700), size=4):
            flipped[place] = rng.integers(256)
        path.write_bytes(bytes(flipped))
        try:
            tensors = OPENERS[kind](path)
            found = tensors["a"].read() if "a" in tensors else None
        except EvalkitError as error:
            assert str(path) in str(error)
        else:
            assert found is None or torch.isfinite(found).all()


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = npz(tmp_path / "one.npz", a=values())
    stored = open_npz(path)["a"]
    os.truncate(path, 1000)
    with pytest.raises(BadFile, match="the file ends inside this tensor"):
        stored.read()
    path.unlink()
    with pytest.raises(MissingFile):
        stored.take(np.array([1]), 1)


def npy(shape: str, descr: str = "<f4", fortran: str = "False", body: bytes = b"\0" * 64) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


@pytest.mark.parametrize("shape", ["(1000000000, 1000000000)", "(9223372036854775807,)", "(17,)", "(-4, -4)"])
def test_an_archive_that_claims_more_than_it_has(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "huge.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy(shape))
    if shape == "(-4, -4)":
        with pytest.raises(BadFile):
            open_npz(path)["a"].read()
        return
    with pytest.raises(BadFile, match=r"a\.npy claims shape .* but has 64 bytes"):
        open_npz(path)


def test_safetensors_that_claim_more_than_they_have(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    for entry in (
        {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]},
        {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [16], "data_offsets": [64, 128]},
        {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]},
    ):
        header = json.dumps({"a": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
        with pytest.raises(BadFile, match=r"plain tensors in a \.safetensors file"):
            open_safetensors(path)
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(BadFile):
        open_safetensors(path)


@pytest.mark.parametrize(
    ("array", "seen"),
    [
        (np.arange(4), "int64"),
        (np.array([True, False]), "bool"),
        (np.array(["x", "y"]), "<U1"),
        (np.arange(4, dtype=">f4"), ">f4"),
        (np.arange(4).astype(np.complex64), "complex64"),
    ],
)
def test_dtypes_that_are_no_weights_are_named(tmp_path: Path, array: np.ndarray, seen: str) -> None:
    path = npz(tmp_path / "odd.npz", a=array)
    stored = open_npz(path)["a"]
    with pytest.raises(BadShape) as caught:
        stored.read()
    assert str(caught.value) == (
        f"{path}: a: expected float16, float32 or float64; seen {seen}; fix: save the dictionary again in floating point"
    )


def test_integers_of_tensor_files_are_left_out(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 2), "steps": torch.arange(3)}
    save_file(tensors, tmp_path / "t.safetensors")
    torch.save({**tensors, "note": "text"}, tmp_path / "t.pt")
    assert set(open_safetensors(tmp_path / "t.safetensors")) == set(open_torch(tmp_path / "t.pt")) == {"a"}


def test_zip_tricks(tmp_path: Path) -> None:
    path = tmp_path / "odd.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no arrays")
    with pytest.raises(BadFile, match="an archive without arrays"):
        open_npz(path)
    np.save(tmp_path / "single.npy", values())
    (tmp_path / "single.npy").rename(path)
    with pytest.raises(BadFile, match="a single array instead of an archive of arrays"):
        open_npz(path)
    with zipfile.ZipFile(path, "w") as archive:  # a path out of the folder is only a name
        archive.writestr("../../evil.npy", npy("(16,)"))
    assert open_npz(path)["../../evil"].read().shape == (16,)
    assert not (tmp_path.parent / "evil.npy").exists()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy("(16,)"))
    lying = packed.getvalue().replace(struct.pack("<I", len(npy("(16,)"))), struct.pack("<I", 2**31))
    path.write_bytes(lying)
    with pytest.raises(BadFile):
        open_npz(path)


def test_an_archive_that_would_unpack_to_gigabytes_is_refused(tmp_path: Path, cache: Path) -> None:
    path, size = tmp_path / "bomb.npz", (1 << 30) + 4096
    block = b"\0" * (1 << 22)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as stream:
        stream.write(npy(f"({size // 4},)", body=b""))
        left = size
        while left:
            left -= stream.write(block[:left])
    with pytest.raises(BadFile, match=r"a\.npy has \d+ bytes and would unpack to 1073746\d+"):
        open_npz(path)
    assert not list(cache.rglob("*")) if cache.exists() else True


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.target), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_payloads_do_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    objects = np.empty(3, dtype=object)
    objects[0] = Bomb(mark)
    files = [npz(tmp_path / "objects.npz", a=objects)]
    torch.save({"a": torch.ones(2), "b": Bomb(mark)}, tmp_path / "zip.pt")
    torch.save({"a": torch.ones(2), "b": Bomb(mark)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(mark)))
    files += [tmp_path / name for name in ("zip.pt", "old.pt", "plain.pt")]
    mark.unlink(missing_ok=True)
    for path in files:
        with pytest.raises(BadFile) as caught:
            (open_npz if path.suffix == ".npz" else open_torch)(path)
        assert "seen pickled objects, which could run code" in str(caught.value)
        assert str(caught.value).endswith("fix: download or save the dictionary again as safetensors")
    assert not mark.exists()


def test_torch_tensors_that_claim_more_than_their_storage(tmp_path: Path) -> None:
    path = tmp_path / "wide.pt"
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, path)
    with pytest.raises(BadFile, match=r"a claims shape \(1000000, 1000000\) but has fewer numbers"):
        open_torch(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(BadFile, match="a list instead of named tensors"):
        open_torch(path)
    torch.save({"model": {"a": torch.ones(2)}}, path)
    assert open_torch(path, select=lambda held: held["model"])["a"].read().tolist() == [1.0, 1.0]
    with pytest.raises(BadFile, match="state"):
        open_torch(path, select=lambda held: held["state"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a": torch.eye(3).to_sparse_csr(), "b": torch.eye(3).to_sparse(), "c": torch.ones(1)}, path)
    assert set(open_torch(path)) == {"c"}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_forward_module.module."])
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_the_prefix_of_a_wrapper_is_dropped(prefix: str, ending: str, tmp_path: Path) -> None:
    tensors = {"encoder.weight": torch.randn(3, 2), "bias": torch.randn(2)}
    path = tmp_path / f"wrapped{ending}"
    named = {prefix + name: value for name, value in tensors.items()}
    if ending == ".pt":
        torch.save({"step": 3, "state_dict": named}, path)
        found = open_torch(path)
    else:
        save_file(named, path)
        found = open_safetensors(path)
    assert {name: stored.read().tolist() for name, stored in found.items()} == {
        name: value.tolist() for name, value in tensors.items()
    }


def test_a_prefix_that_not_all_names_have_is_kept(tmp_path: Path) -> None:
    save_file({"module.weight": torch.ones(2), "bias": torch.ones(2)}, tmp_path / "two.safetensors")
    assert set(open_safetensors(tmp_path / "two.safetensors")) == {"module.weight", "bias"}
