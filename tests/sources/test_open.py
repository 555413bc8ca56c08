"""Opening by path: where it looks, which reader it takes, which options each gets, and names that never collide."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evalkit.errors import BadConfig, BadFile, MissingExtra, MissingFile
from evalkit.sources import load_source, open_dictionaries, open_dictionary
from tests.support.dictionaries import write_rqae
from tests.support.gemma_scope_2 import D, tensors, write_gemma_scope_2

TOY = {"model": "toy"}


def one(folder: Path) -> Path:
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **tensors())
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EVALKIT_CACHE", str(tmp_path / "unpacked"))
    monkeypatch.delenv("EVALKIT_HUB", raising=False)


def names(path: str | Path, **options: Any) -> list[str]:
    return [source.name for source in open_dictionary(path, **options)]


def test_files_folders_globs_and_the_package(tmp_path: Path) -> None:
    for l0 in (9, 20):
        one(tmp_path / "google/gemma-scope-2b-pt-res/layer_3/width_64" / f"average_l0_{l0}")
    both = [f"gemma-2-2b/layers.3/sae/width-64/l0-{l0}" for l0 in (9, 20)]
    assert names("google/gemma-scope-2b-pt-res/layer_3") == both
    assert names(tmp_path / "google/*/layer_3/width_64/*") == both
    assert names("google/*/layer_3/width_64/*_20/params.npz", depths=(4,), density=0.1, revision="x") == both[1:]
    assert len(names("bundled:sae/layer_15/width_2k")) == 3
    assert load_source("bundled:sae/layer_15/width_2k/*_32").info.width == 2048
    with pytest.raises(BadConfig, match=r"expected one dictionary; seen 2: gemma-2-2b/layers\.3"):
        load_source("google/gemma-scope-2b-pt-res/layer_3")


def test_what_is_on_disk_comes_before_the_hub_unless_the_hub_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVALKIT_HUB", str(tmp_path / "tree"))
    place = "google/gemma-scope-2b-pt-res/layer_3/width_64"
    one(tmp_path / "tree" / place / "average_l0_20")
    assert names(f"{place}/l0_18") == ["gemma-2-2b/layers.3/sae/width-64/l0-20"]
    assert names("gemma-scope:2b/layer_3/width_64/*") == ["gemma-2-2b/layers.3/sae/width-64/l0-20"]
    one(tmp_path / place / "average_l0_9")
    assert names(place) == ["gemma-2-2b/layers.3/sae/width-64/l0-9"]
    assert names(f"hub:{place}") == ["gemma-2-2b/layers.3/sae/width-64/l0-20"]
    with pytest.raises(
        MissingFile, match="a dictionary: a file, a folder, a glob of these, bundled:NAME, or OWNER/NAME"
    ):
        open_dictionary(f"{place}/l0_18")


@pytest.mark.parametrize("path", ["", "none", "/none/at/all", "./none/here", "bundled:none", "**x/y"])
def test_nothing_there(path: str) -> None:
    with pytest.raises(MissingFile) as caught:
        open_dictionary(path)
    assert "seen no such path; fix: check the path; bundled dictionaries: rqae-256, sae/layer_15/" in str(caught.value)


def test_an_address_without_the_hub(tmp_path: Path) -> None:
    with pytest.raises(
        MissingFile,
        match=r"someone/thing/layer_1: expected a dictionary: .*; a repository with that name in the local cache",
    ):
        open_dictionary("someone/thing/layer_1")


def test_unknown_folders_say_what_they_hold(tmp_path: Path) -> None:
    folder = tmp_path / "odd" / "deep"
    folder.mkdir(parents=True)
    with pytest.raises(
        BadFile, match=r"odd: expected a dictionary in one of the formats .*gemma-scope, .*rqae.*seen deep;"
    ):
        open_dictionary(tmp_path / "odd")
    (folder / "weights.bin").write_bytes(b"?")
    with pytest.raises(
        BadFile, match=r"seen deep/weights\.bin; fix: give the path of the folder that holds the weights"
    ):
        open_dictionary(tmp_path / "odd")
    (tmp_path / "file.txt").write_text("?")
    with pytest.raises(BadFile, match=r"seen file\.txt"):
        open_dictionary(tmp_path / "file.txt")


def test_a_folder_above_several_formats_names_them(tmp_path: Path) -> None:
    one(tmp_path / "all/gemma-scope-2b-pt-res/layer_3/width_64/average_l0_9")
    write_gemma_scope_2(tmp_path / "all/second/resid_post/layer_3_width_64_l0_small")
    with pytest.raises(BadFile) as caught:
        open_dictionary(tmp_path / "all")
    assert str(caught.value) == (
        f"{tmp_path / 'all'}: expected dictionaries of one format; seen gemma-scope "
        "(gemma-scope-2b-pt-res/layer_3/width_64/average_l0_9) and gemma-scope-2 "
        "(second/resid_post/layer_3_width_64_l0_small); fix: open each folder separately, or set the format"
    )
    assert names(tmp_path / "all", format="gemma-scope-2") == ["gemma-3-1b-pt/layers.3/sae/width-64/l0-9"]
    assert names(tmp_path / "all/second") == ["gemma-3-1b-pt/layers.3/sae/width-64/l0-9"]


def test_no_two_sources_share_a_name(tmp_path: Path) -> None:
    for run in ("first", "second"):
        for l0 in (9, 20):
            one(tmp_path / run / "layer_3" / "width_64" / f"average_l0_{l0}")
    end = "layer_3/width_64/average_l0"
    expected = [f"toy/layers.3/sae/width-64/l0-{l0}@{run}/{end}_{l0}" for run in ("first", "second") for l0 in (9, 20)]
    everything = open_dictionary(tmp_path / "*" / "layer_3", model="toy")
    assert [source.name for source in everything] == expected
    assert [s.name for s in open_dictionaries([(tmp_path / run, TOY) for run in ("first", "second")])] == expected
    reverse = open_dictionaries([(tmp_path / run, TOY) for run in ("second", "first")])
    assert {source.name for source in reverse} == set(expected)
    assert names(tmp_path / "first", model="toy") == [f"toy/layers.3/sae/width-64/l0-{l0}" for l0 in (9, 20)]
    with pytest.raises(BadConfig, match=r"expected different dictionaries; seen .*first/layer_3.* more than once"):
        open_dictionaries([(tmp_path / "first", TOY)] * 2)


def test_sources_of_every_kind_are_told_apart(tmp_path: Path) -> None:
    for run in ("first", "second"):
        write_rqae(tmp_path / run / "same", D, 2, model="toy", site="layers.3")
    sources = open_dictionaries([(tmp_path / run / "same", {"depths": (1,)}) for run in ("first", "second")])
    assert len({source.name for source in sources}) == 2
    assert all(source.name.endswith("/depth-1") for source in sources)
    assert ["first/same" in source.name for source in sources] == [True, False]


def test_the_registry_of_sae_lens(tmp_path: Path) -> None:
    if "sae_lens" in sys.modules:
        pytest.skip("sae-lens is installed")
    with pytest.raises((MissingExtra, BadConfig, MissingFile)) as caught:
        open_dictionary("saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre", depths=(3,), model="gpt2")
    assert "sae" in str(caught.value)
