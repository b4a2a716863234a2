"""The drafter of a model: its detector, the writer of the chosen method, and the reader of claims."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path

import torch

from ctclip.drafting.draft import Draft, draft, with_places
from ctclip.drafting.writers import (
    CaptionWriter,
    Detected,
    RetrievalWriter,
    TemplateWriter,
    Writer,
    check_index,
    known_prompts,
)
from ctclip.errors import DataError
from ctclip.explanation.place import by_side
from ctclip.heads.caption import CaptionHead, Decoding
from ctclip.heads.folder import list_heads
from ctclip.heads.head import Head
from ctclip.heads.locator import LocateHead
from ctclip.inference.index import Index
from ctclip.inference.sides import certain_sides
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.pipeline import Prepared
from ctclip.report_reading.findings import Cleaner
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader


class Method(StrEnum):
    """Ways to write a report."""

    caption = "caption"
    retrieval = "retrieval"
    template = "template"

    @classmethod
    def named(cls, name: str | None) -> Method | None:
        """The method called ``name``; None for None. Raises DataError."""
        if name is not None and name not in list(cls):
            raise DataError(f"no method {name!r}: give one of {', '.join(cls)}")
        return None if name is None else cls(name)


@dataclass(frozen=True)
class Drafting:
    """Settings of a draft. ``method``: by default, `retrieval` if there is an ``index``, else `caption` if the model has a
    caption head, else `template`. ``head``: the name of the caption head; by default, the first."""

    method: Method | None = None
    head: str | None = None
    index: Path | None = None
    prompted: bool = False
    decoding: Decoding = Decoding()  # noqa: RUF009 (frozen)
    terms: str | None = None
    language: str = "english"

    def chosen(self, folder: ModelFolder) -> Method:
        """The method; if none is set, the default for ``folder`` and the other settings."""
        if self.method is not None:
            return self.method
        if self.index is not None:
            return Method.retrieval
        return Method.caption if self._for_captions() or caption_heads(folder) else Method.template

    def check(self, method: Method) -> None:
        """Raise DataError if a setting has no effect with this method."""
        if self.index is not None and method is not Method.retrieval:
            raise DataError(f"an index applies only to --method retrieval, not to {method.value}")
        if self._for_captions() and method is not Method.caption:
            raise DataError(
                f"a caption head, --prompted, --beams and --nucleus apply only to --method caption, not to {method.value}"
            )

    def _for_captions(self) -> bool:
        sampled = self.decoding.beams > 1 or self.decoding.nucleus is not None
        return self.head is not None or self.prompted or sampled


class Drafter:
    """Drafts reports of volumes encoded with one model."""

    def __init__(
        self,
        folder: ModelFolder,
        detector: Head,
        caption: CaptionHead | None,
        drafting: Drafting,
        located: LocateHead | None = None,
    ) -> None:
        """``detector``: scores findings; ``caption``: the head for the method `caption`; ``located``: its locator locates
        findings and their sides, by default similarity locates them. Raises CtclipError."""
        self.located = located
        self.folder, self.detector, self.method = folder, detector, drafting.chosen(folder)
        drafting.check(self.method)
        self.cleaner = Cleaner(
            RulesReader.build(folder.labels, Options(terms=drafting.terms, language=drafting.language))
        )
        self.writer = self._writer(caption, drafting)

    @property
    def words(self) -> str:
        """The method in words."""
        prompted = isinstance(self.writer, CaptionWriter) and self.writer.prompted
        return f"{self.method.value}{', prompted' if prompted else ''}"

    def draft(self, prepared: Prepared, scan: str, warnings: tuple[str, ...] = (), *, places: bool = True) -> Draft:
        """The draft of one scan; ``places`` needs a second encoding."""
        model = self.folder.model
        volume = torch.from_numpy(prepared.voxels)[None, None].to(model.device)
        with torch.inference_mode():
            encoded = model.encode(volume)
        (detected,) = Detected.by(self.detector, encoded)
        if self.located is not None:
            halves = partial(by_side, prepared=prepared)
            detected = replace(detected, sides=certain_sides(self.located, volume, halves))
        sections, notes = draft(encoded, detected, self.writer, self.cleaner), list[str]()
        if places:
            sections, notes = with_places(
                sections,
                model,
                self.detector,
                prepared,
                None if self.located is None else self.located.locator,
                scan=scan,
                model_hash=self.folder.hash,
            )
        return Draft(scan, self.folder.hash, self.words, sections, (*warnings, *notes))

    def _writer(self, caption: CaptionHead | None, drafting: Drafting) -> Writer:
        if self.method is Method.template:
            return TemplateWriter(self.detector.names, known_prompts(self.folder, self.detector), self.cleaner)
        if self.method is Method.retrieval:
            return RetrievalWriter(Index.load(check_index(drafting.index), self.folder.hash))
        assert caption is not None
        return CaptionWriter.of(
            self.folder, self.detector, caption, drafting.decoding, self.cleaner, prompted=drafting.prompted
        )


def caption_heads(folder: ModelFolder) -> list[str]:
    """Names of the caption heads of a model."""
    return [head.name for head in list_heads(folder.path) if head.kind == CaptionHead.kind]


def caption_head_name(folder: ModelFolder, drafting: Drafting) -> str | None:
    """The caption head to load; None for another method. Raises DataError if the model has none."""
    if drafting.chosen(folder) is not Method.caption:
        return None
    known = caption_heads(folder)
    if drafting.head is None and known:
        return known[0]
    if drafting.head in known:
        return drafting.head
    asked = f"no caption head {drafting.head!r}" if drafting.head is not None else "no caption head"
    raise DataError(
        f"{folder.path}: has {asked} (it has: {', '.join(known) or 'none'}); train one with `ctclip adapt --method caption`, or "
        f"choose --method template or retrieval"
    )
