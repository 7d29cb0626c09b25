"""What the pages show must work: their TOML parses, and their links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from meshproxy.config import Settings, parse

ROOT = Path(__file__).parents[2]
BENCHMARKS = [path for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    targets = [((page.parent / path if path else page).resolve(), anchor) for path, anchor in links]
    lost = [str(target.relative_to(ROOT)) for target, anchor in targets if not _leads_somewhere(target, anchor)]
    assert lost == []


def test_the_index_names_every_page():
    docs = ROOT / "docs"
    pages = {str(page.relative_to(docs)) for page in docs.rglob("*.md")} - {"README.md"}
    assert pages - set(re.findall(r"\]\(([^)#]*)", (docs / "README.md").read_text(encoding="utf-8"))) == set()


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_every_benchmark_tells_how_it_is_run(path):
    module = "benchmarks" if path.stem == "__main__" else f"benchmarks.{path.stem}"
    command = (sys.executable, "-m", module, "--help")
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout
    assert told.startswith(f"usage: python -m {module} ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_configuration_shown_is_one(page):
    for shown in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        assert parse(shown) != Settings()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_import_of_ours_that_is_shown_works(page):
    for line in re.findall(
        r"^(from meshproxy\S* import .*|import meshproxy.*)$", page.read_text(encoding="utf-8"), re.MULTILINE
    ):
        exec(line, {})


def _leads_somewhere(target: Path, anchor: str) -> bool:
    if not target.exists():
        return False
    headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
    return not anchor or anchor in {
        re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings
    }


def test_every_event_of_the_log_is_documented():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "meshproxy").rglob("*.py"))
    events = set(re.findall(r'_log\.(?:debug|info|warning|error|exception)\(\s*"(\w+)"', sources))
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "CHANGELOG.md")
    assert {event for event in events if f"`{event}`" not in pages} == set()
    assert "journal_in_memory" in events


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_that_is_named_exists(page):
    packages = "|".join(sorted(path.parent.name for path in (ROOT / "meshproxy").glob("*/__init__.py")))
    named = set(re.findall(rf"[`*](?:meshproxy/)?((?:{packages})/\w+)[`*,/]", page.read_text(encoding="utf-8")))
    here = [ROOT / "meshproxy", ROOT / "tests"]  # docs/reliability.md names tests so
    assert {
        name for name in named if not any((root / f"{name}{end}").exists() for root in here for end in ("", ".py"))
    } == set()


BASE = {"config", "errors", "units"}  # one box of the drawing


def test_the_drawing_of_the_layers_is_what_they_import():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = set(re.findall(r"^ +(\w+)(?:\[.*?\])? --> (\w+)", page.split("```")[1], re.MULTILINE))
    imported = _imports_between_packages()
    assert drawn - imported == set()
    assert imported - _implied(drawn) == set()


def _imports_between_packages() -> set[tuple[str, str]]:
    pairs = set()
    for path in (ROOT / "meshproxy").glob("*/*.py"):
        source = path.parent.name
        for found in re.findall(r"^ *(?:from|import) meshproxy\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            pairs.add(("base" if source in BASE else source, "base" if found in BASE else found))
    return {(source, target) for source, target in pairs if source != target}


def _implied(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs that a path of arrows connects."""
    while more := {(a, d) for a, b in arrows for c, d in arrows if b == c} - arrows:
        arrows = arrows | more
    return arrows
