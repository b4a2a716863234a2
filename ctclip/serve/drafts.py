"""Drafts of reports for the page, by the caption head or, without one, from the report of the nearest scan."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from ctclip.drafting.draft import NOTE, Draft, draft
from ctclip.drafting.drafter import Method, caption_heads
from ctclip.drafting.writers import CaptionWriter, Detected, RetrievalWriter, Writer
from ctclip.errors import CtclipError
from ctclip.heads.caption import CaptionHead, Decoding
from ctclip.heads.head import Head
from ctclip.inference.index import Index
from ctclip.inference.model import Model
from ctclip.models.encoded import Encoded
from ctclip.report_reading.findings import Cleaner
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader


class Drafts:
    """``method``: None if the model has no caption head and there is no ``index``."""

    def __init__(self, model: Model, detector: Head, index: Index | None) -> None:
        self.model, self.detector, self.index = model, detector, index
        self.heads = caption_heads(model.folder)
        self.method = Method.caption if self.heads else Method.retrieval if index is not None else None

    def of(self, encoded: Encoded, patient: str | None = None) -> dict[str, Any]:
        """The draft of one encoded scan as JSON, without places. ``patient``: the patient, if known, whose own reports
        are not copied. Raises CtclipError if there is no method."""
        (detected,) = Detected.by(self.detector, encoded)
        writer, copied = self._writer(patient), None
        if isinstance(writer, RetrievalWriter):
            volume, similarity, _ = writer.nearest(encoded)
            copied = {"volume": volume, "similarity": similarity}
        sections = draft(encoded, detected, writer, self._cleaner)
        drafted = Draft("", self.model.folder.hash, str(self.method), sections).facts()
        return {
            "method": drafted["method"], "model": drafted["model"], "note": NOTE, "copied_from": copied,
            "calibrated": bool(self.detector.thresholds()), **{name: drafted[name] for name in sections},
        }  # fmt: skip

    def _writer(self, patient: str | None) -> Writer:
        if self.heads:
            head = self.model.head(self.heads[0])
            assert isinstance(head, CaptionHead)
            return CaptionWriter.of(self.model.folder, self.detector, head, Decoding(), self._cleaner)
        if self.index is None:
            raise CtclipError(
                "no draft: the model has no caption head (`ctclip adapt --method caption` trains one), and the service was "
                "started without an index (--index)"
            )
        return RetrievalWriter(self.index, patient)

    @cached_property
    def _cleaner(self) -> Cleaner:
        return Cleaner(RulesReader.build(self.model.folder.labels, Options()))
