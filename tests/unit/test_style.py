"""Phrases that the style page of CONTRIBUTING.md replaces do not return, and no merge was left unfinished."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
READ = (".py", ".md", ".yaml", ".yml", ".js", ".html", ".sbatch", ".sh", ".toml", ".ipynb")


def test_what_was_replaced_does_not_come_back() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page[page.index("| before | after |") :].split("\n\n")[0].splitlines()[2:]
    before = [row.split("|")[1].strip() for row in table]
    assert len(before) >= 8
    names = subprocess.run(
        ["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    files = [ROOT / name for name in names if name.endswith(READ) and name != "CONTRIBUTING.md"]
    texts = {
        file: " ".join(re.sub(r"[#\s]+", " ", file.read_text(encoding="utf-8")).split())
        for file in files
        if file.is_file()
    }
    assert len(texts) > 300
    again = [
        f"{file.relative_to(ROOT)}: {phrase}" for file, text in texts.items() for phrase in before if phrase in text
    ]
    assert not again


def test_no_merge_was_left_unfinished() -> None:
    marks = subprocess.run(
        ["git", "-C", ROOT, "grep", "-nE", "^(<{7}|>{7}) ", "--", "."], capture_output=True, text=True
    )
    assert marks.returncode == 1, marks.stdout
