"""The script of a release, and the links of the files in the root of the repository."""

from __future__ import annotations

import re
import runpy
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def test_a_release_sets_the_version_everywhere_and_leaves_unreleased_usable(tmp_path: Path) -> None:
    set_version = runpy.run_path(str(ROOT / ".ci" / "release"))["set_version"]
    (tmp_path / "ctclip").mkdir()
    for name in ("ctclip/__init__.py", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    set_version(tmp_path, "9.1.0", "2031-02-03")
    assert '__version__ = "9.1.0"\n' in (tmp_path / "ctclip" / "__init__.py").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ctclip.__version__"}, (
        "one place for the version"
    )
    citation = yaml.safe_load((tmp_path / "CITATION.cff").read_text())
    assert (citation["version"], str(citation["date-released"])) == ("9.1.0", "2031-02-03")
    changelog = (tmp_path / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.*?)\]", changelog, re.M)
    assert headings[:2] == ["Unreleased", "9.1.0"]
    before = (ROOT / "CHANGELOG.md").read_text().split("## [Unreleased]\n", 1)[1]
    assert changelog.split("## [9.1.0] - 2031-02-03\n", 1)[1] == before
    with pytest.raises(SystemExit, match="section"):
        set_version(tmp_path, "9.1.0", "2031-02-03")
    with pytest.raises(SystemExit, match="not a version"):
        set_version(tmp_path, "v9", "2031-02-03")


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_links_to_files_of_the_repository_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert "://" in target or target.startswith("mailto:") or (path.parent / target).exists(), target


def test_workflows_are_valid_yaml_and_name_commands_that_exist() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in commands
    goals = [command.split()[1] for command in commands if command.startswith("make ")]
    assert all(re.search(rf"^{goal}:", (ROOT / "Makefile").read_text(), re.M) for goal in goals)
