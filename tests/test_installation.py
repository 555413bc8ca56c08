"""The install command for an extra, by how evalkit was installed. The files are those that pip and uv write (PEP 610)."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import MissingExtra, require
from evalkit.installation import DISTRIBUTION, install_command, known_extras
from tests.support.paths import ROOT

Installed = Callable[..., None]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Writes evalkit's metadata into a site folder that is all of ``sys.path``."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])

    def write(
        url: dict[str, Any] | str | None = None, installer: str = "pip", extras: tuple[str, ...] = ("api",)
    ) -> None:
        folder = tmp_path / "site" / "evalkit_autointerp-0.1.0.dist-info"
        folder.mkdir(parents=True)
        lines = ["Metadata-Version: 2.4", f"Name: {DISTRIBUTION}", "Version: 0.1.0"]
        (folder / "METADATA").write_text("\n".join([*lines, *(f"Provides-Extra: {one}" for one in extras)]) + "\n")
        (folder / "INSTALLER").write_text(f"{installer}\n")
        if url is not None:
            (folder / "direct_url.json").write_text(url if isinstance(url, str) else json.dumps(url))

    return write


def test_from_the_package_index(installed: Installed) -> None:
    installed()
    assert known_extras() == ["api"]
    assert install_command("api") == "pip install 'evalkit-autointerp[api]'"
    assert install_command() == "pip install evalkit-autointerp"


def test_by_uv(installed: Installed) -> None:
    installed(installer="uv")
    assert install_command("api") == "uv pip install 'evalkit-autointerp[api]'"


@pytest.mark.parametrize("editable", [True, False])
def test_from_a_checkout(installed: Installed, tmp_path: Path, editable: bool) -> None:
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    installed({"url": checkout.as_uri(), "dir_info": {"editable": True} if editable else {}})
    words = shlex.split(install_command("api"))
    assert words == ["pip", "install", *(["-e"] if editable else []), f"{checkout}[api]"]


def test_from_a_wheel(installed: Installed, tmp_path: Path) -> None:
    wheel = tmp_path / "evalkit_autointerp-0.1.0-py3-none-any.whl"
    wheel.touch()
    installed({"url": wheel.as_uri(), "archive_info": {}})
    assert shlex.split(install_command("api")) == ["pip", "install", f"{wheel}[api]"]


def test_from_a_wheel_that_is_gone(installed: Installed, tmp_path: Path) -> None:
    installed({"url": (tmp_path / "gone.whl").as_uri(), "archive_info": {}})
    assert install_command("api") == "pip install 'evalkit-autointerp[api]'"


def test_from_a_repository(installed: Installed) -> None:
    installed({"url": "https://example.org/evalkit.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}})
    command = "pip install 'evalkit-autointerp[api] @ git+https://example.org/evalkit.git@0a1b'"
    assert install_command("api") == command


@pytest.mark.parametrize("content", ["not JSON", "[1]", '{"url": 3}', ""])
def test_metadata_that_cannot_be_read_counts_as_none(installed: Installed, content: str) -> None:
    installed(content)
    assert install_command("api") == "pip install 'evalkit-autointerp[api]'"


def test_not_installed_or_older_than_its_source_folder(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir(exist_ok=True)
    from_source = f"pip install -e {shlex.quote(f'{ROOT}[api]')}"
    assert install_command("api") == from_source
    installed(extras=("model",))
    assert install_command("api") == from_source
    assert install_command("model") == "pip install 'evalkit-autointerp[model]'"
    assert install_command("model", again=True) == f"pip install -e {shlex.quote(f'{ROOT}[model]')}"


def test_a_missing_package_names_the_command(installed: Installed) -> None:
    installed()
    with pytest.raises(MissingExtra, match=r"fix: pip install 'evalkit-autointerp\[api\]'"):
        require("a_package_that_is_not_there", "api")
