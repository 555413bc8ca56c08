"""Links of the pages lead somewhere, and the paths and dotted names between their backticks exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.support.documents import MAPS, PAGES, Page
from tests.support.paths import ROOT

TOP = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "models"}
FILE = re.compile(r"[\w.-]+(/[\w.-]+)*\.(py|md|toml|txt|patch|png|gz)|[\w.-]+(/[\w.-]+)*/|[\w.-]+(/[\w.-]+)+")
DOTTED = re.compile(r"(evalkit|explainers|scorers|rqae)(\.\w+)+")
# Names of files that a run, a recipe or another project writes: no files of ours.
FOREIGN = re.compile(
    r"(text|explanations|plots|corpus|examples|collected|exported|scores|runs|latents|OUT|prices|demo)\b.*"
)
ENDINGS = (".py", ".md", ".toml")


def by_name(page: Page) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_and_anchors_resolve(page: Page) -> None:
    for link in page.links():
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        path = (page.path.parent / target) if target else page.path
        assert path.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in Page(str(path.resolve().relative_to(ROOT))).anchors(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", MAPS, ids=by_name)
def test_paths_between_backticks_exist(page: Page) -> None:
    """A path counts from the root, from the page's folder, or from the folder of the path before it on its line."""
    missing = []
    for spans in page.code_spans():
        folder = ROOT
        for span in spans:
            if not is_a_path(span):
                continue
            places = [base / span for base in (ROOT, page.path.parent, folder)]
            found = next((place for place in places if place.exists()), None)
            if found is None:
                missing.append(span)
            else:
                folder = found if found.is_dir() else found.parent
    assert not missing, f"{page.name}: {missing}"


def is_a_path(span: str) -> bool:
    """Whether it should be a file of ours: below a folder at the top, or a source file by its ending."""
    if not FILE.fullmatch(span) or FOREIGN.fullmatch(span):
        return False
    return Path(span).parts[0] in TOP or span.endswith(ENDINGS)


@pytest.mark.parametrize("page", MAPS, ids=by_name)
def test_dotted_names_between_backticks_exist(page: Page) -> None:
    for span in {span for spans in page.code_spans() for span in spans if DOTTED.fullmatch(span)}:
        if span.removeprefix("evalkit.") not in ("explainers", "judges", "scorers", "sources", "clients"):
            assert resolves(span), f"{page.name}: {span}"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_every_page_of_the_manual_is_in_its_index() -> None:
    listed = set(Page("docs/README.md").links())
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed
