"""The model process: reads scans, encodes them in batches, and answers questions about them.

It exchanges plain dictionaries with the service over a pipe; ``Client`` in ``service.py`` is the other end.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from isal import igzip
from torch import Tensor

from ctclip.drift.facts import Source
from ctclip.errors import CtclipError
from ctclip.explanation.explain import Explanation, explain, write_nifti
from ctclip.heads.head import Head
from ctclip.heads.prompts import PromptHead
from ctclip.inference.index import Index
from ctclip.inference.model import Model, asking, load
from ctclip.inference.scans import StoredScans
from ctclip.models.encoded import Encoded
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.geometry import grid_affine
from ctclip.preprocessing.pipeline import Prepared
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.volume import FileGrid, Volume
from ctclip.serve.drafts import Drafts
from ctclip.serve.exports import write_dicom, write_sheet
from ctclip.serve.findings import of_detection, of_model
from ctclip.serve.memory import EncodedScan, Memory
from ctclip.serve.settings import Settings

Request = dict[str, Any]
READERS = 2
# Requests that are answered in milliseconds.
QUICK = ("text", "similar", "embed")


@dataclass
class Ready:
    """A scan that has been read and waits to be encoded; ``source``: the scan before preprocessing, if known."""

    request: Request
    prepared: Prepared
    source: Source | None


class Worker:
    """Reads in ``READERS`` threads, encodes in one thread, and answers in two others, so that questions do not wait for
    scans, and quick questions do not wait for slow ones."""

    def __init__(self, pipe: Connection, settings: Settings) -> None:
        self.pipe, self.settings = pipe, settings
        self.writing = threading.Lock()
        self.model: Model = load(settings.model, settings.device, precision=settings.precision)
        self.store = StoredScans(VolumeStore(settings.store), None, self.model.spec, self.model.folder.path) if settings.store else None  # fmt: skip
        self.index = Index.load(settings.index, self.model.folder.hash) if settings.index else None
        self.head = self.model.head()
        self.drafts = Drafts(self.model, self.head, self.index)
        self.scans = Memory(settings.keep)
        # Held while the layers of the volume encoder are used in a way that would disturb other threads.
        self.encoding = threading.Lock()
        self.ready: queue.Queue[Ready] = queue.Queue(maxsize=2 * settings.batch)
        self.answers: dict[str, Callable[[Request], Any]] = {
            "text": self.text, "similar": self.similar, "embed": self.embed, "explain": self.explain,
            "dicom": self.dicom, "sheet": self.sheet, "draft": self.draft,
        }  # fmt: skip

    def _read_first(self) -> None:
        """Read one volume of the store at the start, because the first read takes seconds."""
        if self.store is not None and (names := self._stored()):
            with contextlib.suppress(CtclipError, PreprocessingError, OSError):
                stored(self.store.store, names[0])

    def run(self) -> None:
        """Run until the pipe closes."""
        self._read_first()
        threading.Thread(target=self._encode_for_ever, daemon=True).start()
        facts = of_model(self.model) | {
            "stored": self._stored(),
            "index": self.index is not None,
            "draft": self.drafts.method,
        }
        self.send(0, ready=facts)
        with (
            ThreadPoolExecutor(READERS) as readers,
            ThreadPoolExecutor(1) as quick,
            ThreadPoolExecutor(1) as slow,
        ):
            while True:
                try:
                    request = self.pipe.recv()
                except (EOFError, OSError):
                    readers.shutdown(wait=False, cancel_futures=True)
                    return
                if request["task"] == "forget":
                    self.scans.forget(request["scan"])
                elif request["task"] == "encode":
                    self.scans.begin(request["scan"])
                    readers.submit(self._guarded, self._read, request)
                else:
                    answering = quick if request["task"] in QUICK else slow
                    answering.submit(self._guarded, self._answer, request)

    def send(self, number: int, **message: Any) -> None:
        """Send a message about a request."""
        with self.writing:
            self.pipe.send({"request": number, **message})

    def text(self, request: Request) -> dict[str, Any]:
        """The score of a text."""
        detection = self.model.detection(self.scans.get(request["scan"]).encoded, self._head_for(request["text"]), "")
        return of_detection(detection)["findings"][0]  # type: ignore[no-any-return]

    def explain(self, request: Request) -> dict[str, Any]:
        """Locate a finding, or any text: returns its peak and writes its map for the viewer."""
        explanation = self._explained(request, [request["finding"]], request["method"])
        place = next(iter(explanation.places.values()))
        write_map(Path(request["map"]), place.map(), place.prepared.file_grid, place.finding)
        return place.facts() | {
            "level": place.level * place.height,
            "height": place.height,
            "seconds": explanation.seconds,
        }

    def dicom(self, request: Request) -> None:
        """Write a zip of DICOM objects for the uploaded series: of ``findings``, or of the findings at or above their
        threshold."""
        encoded = self.scans.get(request["scan"]).encoded
        with torch.inference_mode():
            probabilities = self.head.probabilities(self.head.score(encoded).float())[0].tolist()
        thresholds = self.head.thresholds()
        above = [n for n, p in zip(self.head.names, probabilities, strict=True) if p >= thresholds.get(n, 2)]
        write_dicom(self._explained(request, request["findings"] or above), Path(request["to"]))

    def sheet(self, request: Request) -> None:
        """Write one page as PDF, with the place of ``finding``, if given."""
        scan, facts = self.scans.get(request["scan"]), self.model.folder.trained_on
        detection = self.model.detection(scan.encoded, self.head, "", scan.prepared.warnings)
        finding = request["finding"]
        place = next(iter(self._explained(request, [finding]).places.values())) if finding else None
        write_sheet(
            Path(request["to"]),
            of_detection(detection),
            place,
            name=request["name"],
            trained_on=f"The model was trained on: {facts.words()}.",
        )

    def _explained(self, request: Request, findings: list[str], by: str | None = None) -> Explanation:
        """Locate ``findings``: names that the head scores, none, or one free text."""
        asked = next((name for name in findings if name not in self.head.names), None)
        head = self.head if asked is None else self._head_for(asked)
        method = by or self.model.method()
        if asked is not None and len(findings) > 1:
            raise CtclipError(f"{asked[:60]!r}: not a finding of this model; free text can be located one at a time")
        # Attention is recorded in the layers during the forward pass, so no other scan may be encoded meanwhile.
        with self.encoding if method == "attention" else contextlib.nullcontext():
            return explain(
                self.model.dual, head, self.scans.get(request["scan"]).prepared, findings if asked is None else head.names[:1], scan="the scan",
                model_hash=self.model.folder.hash, model_name=self.model.folder.path.name, by=method, locator=self.model.locator(),
            )  # fmt: skip

    def _head_for(self, words: str) -> Head:
        """A head that scores ``words`` by templates of the model's prompts."""
        known = self.model.head()
        if not isinstance(known, PromptHead):
            raise CtclipError("this model has no prompts, so it cannot score a text")
        return asking(self.model.folder, known.prompts, [words], known)

    def similar(self, request: Request) -> dict[str, Any]:
        """The nearest scans and reports of the index."""
        if self.index is None:
            raise CtclipError("the service was started without an index: start it with --index")
        vector = self._embedding(request)
        patient = self._patient(self.scans.get(request["scan"]))
        every = {}
        for kind, reports in {"scans": False, "reports": True}.items():
            hits = self.index.similar(vector, request["count"], reports=reports)
            of_patient = [patient is not None and str(each) == patient for each in hits.pop("patient")]
            every[kind] = hits.assign(same_patient=of_patient).to_dict("records")
        return every

    def draft(self, request: Request) -> dict[str, Any]:
        """The draft of a report. The reports of the patient of a stored volume are not copied."""
        scan = self.scans.get(request["scan"])
        return self.drafts.of(scan.encoded, self._patient(scan))

    def embed(self, request: Request) -> dict[str, Any]:
        """The unit vector of a scan."""
        return {"embedding": self._embedding(request).tolist(), "model": self.model.folder.hash}

    def _embedding(self, request: Request) -> np.ndarray:
        embedding = self.scans.get(request["scan"]).encoded.embedding
        assert embedding is not None
        vector: np.ndarray = embedding[0].float().cpu().numpy()
        return vector

    def _patient(self, scan: EncodedScan) -> str | None:
        """The patient of a volume of the store; None for an uploaded scan."""
        if self.store is None or scan.volume is None:
            return None
        table = self.store.table
        return str(table.loc[table["volume"].astype(str) == scan.volume, "patient"].iloc[0])

    def _answer(self, request: Request) -> None:
        self.send(request["request"], result=self.answers[request["task"]](request))

    def _read(self, request: Request) -> None:
        if self._is_cancelled(request):
            return
        self.send(request["request"], stage="reading")
        if "volume" in request:
            prepared = self._of_store(request)
            source = Source.of_notes(self.store.store.notes(request["volume"])) if self.store else None
        else:
            reading = self.settings.reading.copy()
            reading["headers"] = True
            prepared = self.model.prepare(request["path"], **reading)
            source = Source(prepared.source_spacing, prepared.source_shape)
            _ = prepared.voxels
        write_view(prepared.scan.array, prepared.scan.affine, Path(request["view"]))
        # From here on the scan can be viewed while it waits for the model.
        self.send(request["request"], stage="encoding")
        self.ready.put(Ready(request, prepared, source))

    def _of_store(self, request: Request) -> Prepared:
        if self.store is None:
            raise CtclipError("the service was started without a store: start it with --store")
        volumes, name = self.store.store, request["volume"]
        if name not in set(self._stored()):
            raise CtclipError(f"{name[:80]!r}: no such volume in the store")
        return stored(volumes, name)

    def _stored(self) -> list[str]:
        return [] if self.store is None else [str(name) for name in self.store.table["volume"]]

    def _encode_for_ever(self) -> None:
        while True:
            several = [self.ready.get()]
            while len(several) < self.settings.batch and not self.ready.empty():
                several.append(self.ready.get())
            several = [one for one in several if not self._is_cancelled(one.request)]
            if several:
                self._encode(several)

    def _encode(self, several: list[Ready]) -> None:
        try:
            voxels = torch.from_numpy(np.stack([one.prepared.voxels for one in several]))[:, None]
            with self.encoding:
                together = self.model.encode(voxels)
        except Exception as error:
            if len(several) == 1:
                self._fail(several[0].request, error)
                return
            # An error in one scan must not affect the others.
            for one in several:
                self._encode([one])
            return
        for number, one in enumerate(several):
            try:
                self._score(one, alone(together, number))
            except Exception as error:
                self._fail(one.request, error)

    def _score(self, one: Ready, encoded: Encoded) -> None:
        request, prepared = one.request, one.prepared
        far = self.model.drift(prepared, encoded, one.source)
        detection = self.model.detection(encoded, self.head, "", [*prepared.warnings, *far])
        result = of_detection(detection) | {"dicom": bool(prepared.headers)}
        self.scans.add(request["scan"], EncodedScan(encoded, prepared, request.get("volume"), request["lifetime"]))
        self.send(request["request"], result=result)
        self.scans.finish(request["scan"])

    def _is_cancelled(self, request: Request) -> bool:
        cancelled = self.scans.cancelled(request["scan"])
        if cancelled:
            self.scans.finish(request["scan"])
        return cancelled

    def _guarded(self, deed: Callable[[Request], None], request: Request) -> None:
        try:
            deed(request)
        except Exception as error:
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        if isinstance(error, CtclipError | PreprocessingError):
            line = " ".join(str(error).split())
        else:
            # The message of other errors may contain a path of the service.
            line = f"an unexpected fault ({getattr(error, 'strerror', None) or type(error).__name__})"
        # Do not reveal the folder of the upload.
        line = line.replace(f"{request.get('folder', '')}/", "") if request.get("folder") else line
        self.send(request["request"], refused=line[:500])
        if request["task"] == "encode":
            self.scans.finish(request["scan"])


def alone(together: Encoded, number: int) -> Encoded:
    """Copy one volume of an encoded batch, because a view would keep the whole batch in memory."""

    def own(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.clone()

    one = together.one(number)
    return one._replace(
        tokens=one.tokens.clone(), pooled=one.pooled.clone(), real=own(one.real), embedding=own(one.embedding), local=own(one.local),
    )  # fmt: skip


def stored(store: VolumeStore, name: str) -> Prepared:
    """A stored volume in the form of a prepared scan, on the grid of the store, with coordinates in mm relative to its
    centre."""
    hu, spec = store.read(name), store.spec
    if spec.published_geometry:
        hu = hu.transpose(0, 2, 1)
    affine = grid_affine(spec)
    volume = Volume(np.ascontiguousarray(hu), affine, name)
    prepared = Prepared(volume, spec, affine[:, [0, 2, 1, 3]] if spec.published_geometry else affine, FileGrid.of(hu.shape, affine, False))  # fmt: skip
    # Do not resample a second time.
    prepared.__dict__["voxels"] = store.voxels(name)
    return prepared


def write_view(hu: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write int16 HU [slice, row, column] with its affine to LPS mm as NIfTI for a viewer: columns first, RAS."""
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    whole = np.clip(np.rint(hu), -32768, 32767).astype(np.int16)
    image = nib.Nifti1Image(whole.transpose(2, 1, 0), ras[:, [2, 1, 0, 3]])
    image.header.set_xyzt_units("mm")
    with igzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(image.to_bytes())


def write_map(path: Path, values: np.ndarray, grid: FileGrid, finding: str) -> None:
    """Write a map on the file's grid as 8-bit steps from 0 to its highest value."""
    top = float(values.max()) or 1.0
    steps = np.rint(np.clip(values, 0, None) * (255 / top)).astype(np.uint8)
    write_nifti(path, steps, grid, {"finding": finding}, slope=top / 255)
