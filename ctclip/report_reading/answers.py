"""Answers of a slow reader, kept by the hash of their text: what was read once is not read again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ctclip.preprocessing.files import refuse_special
from ctclip.report_reading.reader import Reading, Statement, Status


class Answers:
    """A file of one answer a line, to which answers are added as they come; a line that was cut off is left out."""

    def __init__(self, folder: Path | None, identity: str) -> None:
        """``identity``: of the reader, whose answers alone are taken; without a ``folder`` nothing is kept on disk."""
        self.known: dict[str, Reading] = {}
        self.path = None if folder is None else folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.jsonl"
        if self.path is None:
            return
        refuse_special(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                self._take(line)

    def get(self, text: str) -> Reading | None:
        return self.known.get(_key(text))

    def add(self, texts: list[str], readings: list[Reading]) -> None:
        """Keep answers, on disk before it returns."""
        lines = []
        for text, reading in zip(texts, readings, strict=True):
            self.known[_key(text)] = reading
            said = {name: [statement.status.value, statement.sentence] for name, statement in reading.items()}
            lines.append(json.dumps({"text": _key(text), "labels": said}, ensure_ascii=False))
        if self.path is not None and lines:
            whole = not self.path.is_file() or self.path.read_bytes()[-1:] in (b"", b"\n")
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(("" if whole else "\n") + "\n".join(lines) + "\n")

    def _take(self, line: str) -> None:
        try:
            record = json.loads(line)
            reading = {
                name: Statement(Status(status), sentence) for name, (status, sentence) in record["labels"].items()
            }
            self.known[str(record["text"])] = reading
        except (ValueError, KeyError, TypeError, AttributeError):
            return


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
