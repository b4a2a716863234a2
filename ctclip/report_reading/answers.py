"""A cache for the answers of a slow reader, keyed by the hash of the text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ctclip.preprocessing import plain_json
from ctclip.preprocessing.files import refuse_special
from ctclip.report_reading.reader import Reading, Statement, Status


class Answers:
    """A file with one answer per line. Answers are appended as they arrive; an incomplete line is ignored."""

    def __init__(self, folder: Path | None, identity: str) -> None:
        """``identity``: the reader's identity; each reader has its own file. Without ``folder``, answers are kept in
        memory only."""
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
        """Save answers; they are on disk when this returns."""
        lines = []
        for text, reading in zip(texts, readings, strict=True):
            self.known[_key(text)] = reading
            stored = {name: [statement.status.value, statement.sentence] for name, statement in reading.items()}
            lines.append(json.dumps({"text": _key(text), "labels": stored}, ensure_ascii=False))
        if self.path is not None and lines:
            whole = not self.path.is_file() or self.path.read_bytes()[-1:] in (b"", b"\n")
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(("" if whole else "\n") + "\n".join(lines) + "\n")

    def _take(self, line: str) -> None:
        try:
            record = plain_json.loads(line)
            reading = {
                name: Statement(Status(status), sentence) for name, (status, sentence) in record["labels"].items()
            }
            self.known[str(record["text"])] = reading
        except (ValueError, KeyError, TypeError, AttributeError):
            return


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
