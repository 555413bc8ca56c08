"""Addresses of the hub: a folder tree in its place, its cache without it, and a small server that answers as it does."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from evalkit.errors import BadConfig, BadFile, MissingFile
from evalkit.sources.hub import Address, fetch, looks_like_address, parse_address

REPOSITORY = "google/gemma-scope-2b-pt-res"
L0S = (22, 41, 82, 176, 445)
FILES = {
    **{f"layer_12/width_16k/average_l0_{l0}/params.npz": b"n" * l0 for l0 in L0S},
    **{f"layer_13/width_16k/average_l0_{l0}/params.npz": b"n" for l0 in (80, 84)},
    "layer_12/width_16k/average_l0_82/examples.safetensors": b"big",
    "layer_12/width_16k/average_l0_82/plot.png": b"png",
    "layer_12/width_16k/average_l0_82/card.json": b"{}",
    "layer_12/cfg.json": b"{ }",
    "README.md": b"text",
    "trainers/trainer_0/ae.pt": b"pt",
    "trainers/trainer_0/config.json": b"{  }",
    "trainers/trainer_0/checkpoints/ae_10.pt": b"pt",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "tree"
    lay_out(root / REPOSITORY)
    monkeypatch.setenv("EVALKIT_HUB", str(root))
    return root / REPOSITORY


def lay_out(folder: Path) -> None:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("text", "repository", "parts"),
    [
        ("a/b", "a/b", ()),
        ("hub:a/b.c-d_e/x/*/", "a/b.c-d_e", ("x", "*")),
        ("gemma-scope:2b", "google/gemma-scope-2b-pt-res", ()),
        ("gemma-scope:2b/layer_12/width_16k/*", REPOSITORY, ("layer_12", "width_16k", "*")),
        ("hub:gemma-scope:9b-it/layer_9", "google/gemma-scope-9b-it-res", ("layer_9",)),
        ("gemma-scope:9b-att/layer_9", "google/gemma-scope-9b-pt-att", ("layer_9",)),
        ("gemma-scope:2b-transcoders", "google/gemma-scope-2b-pt-transcoders", ()),
        ("gemma-scope:27b-pt-mlp", "google/gemma-scope-27b-pt-mlp", ()),
        ("gemma-scope-2:1b-it/resid_post", "google/gemma-scope-2-1b-it", ("resid_post",)),
        ("gemma-scope-2:270m", "google/gemma-scope-2-270m-pt", ()),
    ],
)
def test_addresses(text: str, repository: str, parts: tuple[str, ...]) -> None:
    assert parse_address(text) == Address(repository, parts)


@pytest.mark.parametrize(
    "text", ["", "a", "/a/b", "./a/b", "../a/b", "~/a", "a/../b", "a/b/../../c", "gemma-scope:3b", "-/-"]
)
def test_what_is_no_address(text: str, tree: Path) -> None:
    assert parse_address(text) is None
    assert not looks_like_address(text)
    with pytest.raises(BadConfig, match="expected owner/name, owner/name/path"):
        fetch(f"hub:{text}")


def test_a_first_part_that_is_a_folder_here_is_meant_for_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert looks_like_address("runs/mine")
    (tmp_path / "runs").mkdir()
    assert not looks_like_address("runs/mine")
    assert looks_like_address("hub:runs/mine")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("layer_12/width_16k/average_l0_82", ["layer_12/width_16k/average_l0_82"]),
        ("layer_12/width_16k/average_l0_82/params.npz", ["layer_12/width_16k/average_l0_82/params.npz"]),
        ("layer_13/*/*", ["layer_13/width_16k/average_l0_80", "layer_13/width_16k/average_l0_84"]),
        ("layer_12", ["layer_12"]),
        ("layer_1[23]/width_16k", ["layer_12/width_16k", "layer_13/width_16k"]),
        ("layer_12/width_16k/l0_80", ["layer_12/width_16k/average_l0_82"]),
        ("layer_12/width_16k/average_l0_~30", ["layer_12/width_16k/average_l0_22"]),
        ("layer_12/width_16k/l0_1000", ["layer_12/width_16k/average_l0_445"]),
        ("layer_13/width_16k/l0_82", ["layer_13/width_16k/average_l0_80"]),  # as near as 84: the sparser one
        ("layer_*/width_16k/l0_82", ["layer_12/width_16k/average_l0_82", "layer_13/width_16k/average_l0_80"]),
        ("trainers/*", ["trainers/trainer_0"]),
        ("", [""]),
    ],
)
def test_a_tree_stands_for_the_hub(tree: Path, path: str, found: list[str]) -> None:
    assert fetch(f"{REPOSITORY}/{path}") == [tree / each for each in found]


@pytest.mark.parametrize("path", ["layer_1", "layer_1/width_16k", "layer_1/*/l0_40", "layer_?/width_16k"])
def test_layer_1_is_not_layer_10(tree: Path, path: str) -> None:
    for layer in ("layer_1", "layer_10"):
        (tree / layer / "width_16k/average_l0_40").mkdir(parents=True)
        (tree / layer / "width_16k/average_l0_40/params.npz").write_bytes(b"n")
    assert {found.relative_to(tree).parts[0] for found in fetch(f"{REPOSITORY}/{path}")} == {"layer_1"}


def test_the_nearest_l0_is_said(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "evalkit"):
        fetch("gemma-scope:2b/layer_12/width_16k/l0_80", revision="v1")
    assert caplog.messages == [
        f"EVALKIT_HUB has no revisions: using its copy of {REPOSITORY}, ignoring revision v1",
        f"{REPOSITORY}/layer_12/width_16k: the nearest average L0 to 80 is 82; available: 22, 41, 82, 176, 445",
    ]


def test_what_is_not_there_is_named_with_what_is(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingFile) as caught:
        fetch(f"{REPOSITORY}/layer_12/width_16k/average_l0_80")
    message = str(caught.value)
    assert f"{REPOSITORY}/layer_12/width_16k/average_l0_80: expected a path in that repository" in message
    assert "seen no average_l0_80 there, but average_l0_82" in message
    assert "l0_80" in message
    with pytest.raises(MissingFile, match=r"seen no layer_14 there, but layer_1[23], layer_1[23]"):
        fetch(f"{REPOSITORY}/layer_14/width_16k")
    with pytest.raises(MissingFile, match=r"no README\.md there"):
        fetch(f"{REPOSITORY}/README.md")
    with pytest.raises(MissingFile, match=r"\(EVALKIT_HUB\); seen google/gemma-scope-2b-pt-res; fix: check the name"):
        fetch("google/gemma-scope-2b-pt-rex/layer_1")
    monkeypatch.setenv("EVALKIT_HUB", str(tmp_path / "none"))
    with pytest.raises(MissingFile, match=r"seen no such folder"):
        fetch(f"{REPOSITORY}/layer_1")


def test_nobody_opens_hundreds_by_accident(tree: Path) -> None:
    for layer in range(101):
        (tree / f"many/layer_{layer}").mkdir(parents=True)
        (tree / f"many/layer_{layer}/params.npz").write_bytes(b"")
    with pytest.raises(BadConfig, match=r"100 weight files; seen 101 weight files, such as many/layer_0/params\.npz"):
        fetch(f"{REPOSITORY}/many/*")
    with pytest.raises(BadConfig, match="at most 100 weight files"):
        fetch(REPOSITORY)


def test_no_path_leads_out_of_the_tree(tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    lay_out(outside / "secret")
    (tree.parent / "linked").symlink_to(outside / "secret", target_is_directory=True)
    with pytest.raises(MissingFile, match="EVALKIT_HUB"):
        fetch("google/linked/layer_12")
    (tree / "layer_14").symlink_to(outside / "secret" / "layer_12", target_is_directory=True)
    with pytest.raises(MissingFile, match="no layer_14 there"):
        fetch(f"{REPOSITORY}/layer_14")
    folder = tree / "layer_15"
    folder.mkdir()
    (folder / "params.npz").symlink_to(outside / "secret" / "layer_13/width_16k/average_l0_80/params.npz")
    with pytest.raises(MissingFile, match="no layer_15 there"):
        fetch(f"{REPOSITORY}/layer_15")
    (folder / "other.npz").write_bytes(b"n")
    with pytest.raises(BadFile, match=r"params\.npz: expected a file inside .*; seen a link that leads out of it"):
        fetch(f"{REPOSITORY}/layer_15")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_without_the_hub_its_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVALKIT_HUB", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    base = tmp_path / "models--google--gemma-scope-2b-pt-res"
    lay_out(base / "snapshots" / COMMIT)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(COMMIT)
    found = base / "snapshots" / COMMIT / "layer_12/width_16k/average_l0_82"
    assert fetch("gemma-scope:2b/layer_12/width_16k/l0_80") == [found]
    assert fetch("gemma-scope:2b/layer_12/width_16k/l0_80", revision=COMMIT) == [found]
    with pytest.raises(MissingFile) as caught:
        fetch("gemma-scope:9b/layer_12")
    message = str(caught.value)
    expected = "a repository with that name in the local cache (the hub cannot be reached)"
    assert message.startswith(f"google/gemma-scope-9b-pt-res: expected {expected}; seen ")
    assert "\n" not in message
    assert message.endswith("(set HF_TOKEN for gated repositories), or give a local folder")
    with pytest.raises(MissingFile, match="in the local cache"):
        fetch("gemma-scope:2b/layer_12", revision="other")


class Server(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub: the list of a repository, then each file."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            return self.answer(b"hub", body)
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": oid(data)} for name, data in FILES.items()
            ]
            return self.answer(json.dumps(entries).encode(), body)
        if path in (
            f"/api/models/{REPOSITORY}",
            *(f"/api/models/{REPOSITORY}/revision/{r}" for r in ("main", "v1", COMMIT)),
        ):
            files = [{"rfilename": name} for name in [*FILES, "../../evil.npz"]]
            return self.answer(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": files}).encode(), body)
        name = path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
        if name in FILES:
            if body:
                self.asked.append(name)
            return self.answer(FILES[name], body)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def answer(self, data: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{oid(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    Server.asked = []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("EVALKIT_HUB", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield Server.asked
    running.shutdown()
    running.server_close()


def test_only_what_a_dictionary_needs_is_downloaded(server: list[str], tmp_path: Path) -> None:
    (found,) = fetch("gemma-scope:2b/layer_12/width_16k/l0_80", revision="v1")
    assert (found / "params.npz").read_bytes() == b"n" * 82
    wanted = {
        "layer_12/cfg.json",
        *(f"layer_12/width_16k/average_l0_82/{name}" for name in ("params.npz", "card.json")),
    }
    assert set(server) == wanted
    assert found == tmp_path / f"cache/models--google--gemma-scope-2b-pt-res/snapshots/{COMMIT}" / (
        "layer_12/width_16k/average_l0_82"
    )
    server.clear()
    (again,) = fetch("hub:google/gemma-scope-2b-pt-res/trainers/trainer_0")
    assert sorted(server) == ["trainers/trainer_0/ae.pt", "trainers/trainer_0/config.json"]
    assert (again / "ae.pt").read_bytes() == b"pt"


def test_a_repository_that_the_hub_does_not_have(server: list[str]) -> None:
    with pytest.raises(MissingFile, match=r"google/none: expected a repository with that name on the hub; seen \w+: "):
        fetch("google/none/layer_1")
    with pytest.raises(MissingFile, match="on the hub"):
        fetch(f"{REPOSITORY}/layer_12", revision="v2")
    assert server == []
