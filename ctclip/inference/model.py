"""A loaded model with its heads, preprocessing and calibration, the only object that a notebook needs."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pandas as pd
import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor

from ctclip.drafting.draft import Draft
from ctclip.drafting.drafter import Drafter, Drafting, Method, caption_head_name
from ctclip.drift.facts import Source
from ctclip.errors import CheckpointError, PromptError
from ctclip.evaluation.adapted import FILE as ADAPTATION
from ctclip.evaluation.adapted import Adaptation
from ctclip.evaluation.calibration import Calibration
from ctclip.explanation.explain import Explanation, explain
from ctclip.explanation.find import Found, contrast_texts, find
from ctclip.explanation.place import LEVEL
from ctclip.heads.caption import CaptionHead, Decoding
from ctclip.heads.folder import PROMPTS, HeadFacts, list_heads, load_head
from ctclip.heads.head import Head
from ctclip.heads.locator import LocateHead, Locator
from ctclip.heads.prompts import PromptHead
from ctclip.inference.drift import drift_warnings, usable_summary
from ctclip.inference.precision import Asked, set_precision
from ctclip.inference.show import Detection, calibrated
from ctclip.labels import LabelSet
from ctclip.models.encoded import Encoded
from ctclip.models.folder import KIND, ModelFolder, check_output, is_model_folder, load_model
from ctclip.models.reading import word_vectors
from ctclip.preprocessing.csv_files import CONTROL
from ctclip.preprocessing.outputs import put_in_place
from ctclip.preprocessing.pipeline import Prepared, Reading, prepare
from ctclip.preprocessing.scratch import scratch_folder
from ctclip.prompts import PromptSet, load_prompts
from ctclip.report_reading.absence import states_absence


class Model(ModelHubMixin, library_name="ctclip", tags=["computed-tomography", "zero-shot"]):
    """A model folder in memory: ``detect`` scans, ``encode_volume``, ``encode_text``.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` are Hugging Face's; they copy the model folder.
    """

    def __init__(self, folder: ModelFolder) -> None:
        # The folder holds everything; the mixin would record the constructor's arguments, which is a path.
        self._hub_mixin_config = None
        # Heads are read lazily, when the working directory may have changed.
        self.folder = replace(folder, path=Path(os.path.abspath(folder.path)))
        self.dual = folder.model
        self.spec = folder.spec
        self._heads: dict[str, Head] = {}
        self._summary = usable_summary(folder)

    def __repr__(self) -> str:
        names = ", ".join(head.name for head in self.heads)
        volume = sum(parameter.numel() for parameter in self.dual.volume_encoder.parameters())
        text = sum(parameter.numel() for parameter in self.dual.text_encoder.parameters())
        shape, spacing = (
            " x ".join(f"{value:g}" for value in values) for values in (self.spec.shape, self.spec.spacing)
        )
        return (
            f"ctclip model {self.folder.hash} ({self.folder.path})\n"
            f"  encoders:   {self.dual.config.volume.kind}, {volume / 1e6:.1f} M parameters; text, {text / 1e6:.1f} M\n"
            f"  volumes:    spec {self.spec.name}, {shape} voxels of {spacing} mm\n"
            f"  labels:     {self.labels.name} ({len(self.labels.names)})\n"
            f"  heads:      {names or 'none'}\n"
            f"  trained on: {self.folder.trained_on.words()}"
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **given: Any) -> str | None:
        """Save a copy for publication, without the patient digests of calibrations; see Hugging Face's
        ``ModelHubMixin`` for the other arguments. An existing copy is replaced. Raises PreprocessingError if the folder
        holds anything but a model."""
        # Check before the mixin runs, which would delete any config.json.
        check_output(save_directory)
        return super().save_pretrained(Path(save_directory), **given)  # type: ignore[no-any-return]

    def _save_pretrained(self, save_directory: Path) -> None:
        final = Path(os.path.abspath(save_directory))
        if final.resolve() == self.folder.path.resolve():
            return
        with scratch_folder(f".{final.name[:60]}.", ".partial", final.parent) as partial:
            # Copy files, not a snapshot's links to them.
            shutil.copytree(self.folder.path, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
            # Read the files at their source, so that an error names it.
            source = self.folder.path
            for path in (source / "calibration.json", *source.glob("heads/*/calibration.json")):
                if path.is_file():
                    Calibration.load(path).without_patients().save(partial / path.relative_to(source))
            for path in (source / ADAPTATION, *source.glob(f"heads/*/{ADAPTATION}")):
                if path.is_file():
                    Adaptation.load(path).without_patients().save(partial / path.relative_to(source))
            partial.chmod(0o755)
            put_in_place(partial, final, is_model_folder, KIND)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str | torch.device = "cpu", revision: str | None = None, **given: object
    ) -> Model:
        """``model_id``: a folder or hub name; see ``ctclip.load``."""
        if revision is not None and not Path(model_id).is_dir():
            raise CheckpointError(
                f"{model_id}: a revision cannot be chosen; fetch it with `hf download {model_id} --revision {revision} "
                f"--local-dir FOLDER` and load the folder"
            )
        return load(model_id, map_location)

    @property
    def labels(self) -> LabelSet:
        """The findings of the model."""
        return self.folder.labels

    @property
    def heads(self) -> list[HeadFacts]:
        """The heads of the model, which turn a scan into named scores."""
        return list_heads(self.folder.path)

    def head(self, name: str = PROMPTS) -> Head:
        """A head by name; loaded once."""
        if not isinstance(name, str):
            raise CheckpointError(f"{self.folder.path}: {name!r} is not the name of a head")
        if name not in self._heads:
            self._heads[name] = usable_head(self.folder, name)
        return self._heads[name]

    def prepare(self, scan: str | os.PathLike[str], **reading: Unpack[Reading]) -> Prepared:
        """Read one scan from disk and preprocess it for this model; see ``ctclip.preprocessing.prepare``."""
        return prepare(scan, self.spec, **self.folder.reading(reading))

    def detect(
        self,
        scan: str | os.PathLike[str] | Prepared,
        abnormalities: str | Sequence[str] | None = None,
        *,
        head: str = PROMPTS,
        **reading: Unpack[Reading],
    ) -> Detection:
        """Detect findings in one scan (a volume file, a DICOM folder, a zip), or in the result of ``prepare``.

        ``abnormalities``: one or more names to detect instead of the model's own findings, also names outside its label
        set; ``head``: the head that computes the scores; ``reading``: see ``ctclip.preprocessing.pipeline.Reading``.
        Raises PreprocessingError if the scan cannot be trusted, and PromptError for names that are not text.
        """
        ready = self._ready(scan, **reading)
        scorer = self.head(head) if abnormalities is None else self._asking(abnormalities, head)
        encoded = self.encode(ready)
        far = self.drift(ready, encoded, Source(ready.source_spacing, ready.source_shape))
        return self.detection(encoded, scorer, _name(ready), [*ready.warnings, *far])

    def drift(self, ready: Prepared, encoded: Encoded, source: Source | None) -> list[str]:
        """A warning if a scan is far from the model's training scans. ``source``: spacing and shape of the scan before
        preprocessing, None if unknown."""
        assert encoded.embedding is not None
        vectors = encoded.embedding.float().cpu().numpy()
        return [line for line in drift_warnings(self._summary, self.spec, [ready.voxels], vectors, [source]) if line]

    def detection(self, encoded: Encoded, scorer: Head, scan: str, warnings: Sequence[str] = ()) -> Detection:
        """The detection by ``scorer`` in the single scan of ``encoded``; ``scan``: its name."""
        with torch.inference_mode():
            scores, values = scorer.score(encoded).float(), scorer.values(encoded).float()
            probabilities = scorer.probabilities(scores)
        names = scorer.names
        return Detection(
            scan=scan,
            probabilities=dict(zip(names, probabilities[0].tolist(), strict=True)),
            margins=dict(zip(names, scores[0].tolist(), strict=True)),
            values=dict(zip(scorer.values_of, values[0].tolist(), strict=True)),
            thresholds=scorer.thresholds(),
            intervals={
                name: (low, high)
                for name, (low, high) in zip(names, scorer.intervals(scores)[0].tolist(), strict=True)
                if math.isfinite(low)
            },
            calibrated=calibrated(scorer),
            model=self.folder.hash,
            spec=self.spec.hash,
            warnings=(*warnings, *self.folder.trained_on.caveats()),
            trained_on=self.folder.trained_on.words(),
        )

    def explain(
        self,
        scan: str | os.PathLike[str] | Prepared,
        abnormalities: str | Sequence[str] | None = None,
        *,
        head: str | None = None,
        method: str | None = None,
        level: float = LEVEL,
        budget: int = 600,
        shifts: int | None = None,
        **reading: Unpack[Reading],
    ) -> Explanation:
        """Where the model sees findings in one scan: maps on the scan's own grid, peaks, sizes, sides.

        ``abnormalities``: one or more names; default: findings at or above their threshold. ``head``, ``reading``: as
        in ``detect``. ``method``: by default ``learned`` if the model has a locator, else ``similarity``. ``level``,
        ``budget`` and ``shifts``: see ``ctclip.explanation.explain``. Raises PreprocessingError or ExplanationError.
        """
        name = head or PROMPTS
        scorer = self.head(name)
        names = None
        if abnormalities is not None:
            names = [self.labels.resolve(one) or one for one in _checked(abnormalities)]
            if isinstance(scorer, PromptHead) and not set(names) <= set(scorer.names):
                scorer = self._asking(names, name)
        ready = self._ready(scan, **reading)
        return explain(
            self.dual, scorer, ready, names, scan=_name(ready), model_hash=self.folder.hash,
            model_name=self.folder.path.name, by=method or self.method(), level=level, budget=budget,
            shifts=shifts, locator=self.locator(), warnings=(*ready.warnings, *self.folder.trained_on.caveats()),
        )  # fmt: skip

    def method(self) -> str:
        """The method of explanation that is used if none is named."""
        return "similarity" if self.locator() is None else "learned"

    def locator(self) -> Locator | None:
        """The locator trained by `ctclip adapt --method locate`; None if the model has none."""
        located = self._located()
        return None if located is None else located.locator

    def _located(self) -> LocateHead | None:
        name = next((head.name for head in self.heads if head.kind == LocateHead.kind), None)
        head = None if name is None else self.head(name)
        return head if isinstance(head, LocateHead) else None

    def find(
        self,
        scan: str | os.PathLike[str] | Prepared,
        text: str,
        *,
        method: str | None = None,
        level: float = LEVEL,
        most: int = 5,
        budget: int = 600,
        shifts: int | None = None,
        **reading: Unpack[Reading],
    ) -> Found:
        """Regions of one scan that any text describes, at most ``most``, with positions and sizes. A size in the text
        ("larger than 10 mm") selects regions. Other arguments as in ``explain``."""
        others = contrast_texts(self.head(PROMPTS))
        ready = self._ready(scan, **reading)
        return find(
            self.dual, ready, text, others, scan=_name(ready), model_hash=self.folder.hash, by=method or self.method(),
            level=level, most=most, budget=budget, shifts=shifts, locator=self.locator(), warnings=(*ready.warnings, *self.folder.trained_on.caveats()),
        )  # fmt: skip

    def draft(
        self,
        scan: str | os.PathLike[str] | Prepared,
        *,
        method: str | None = None,
        head: str | None = None,
        index: str | os.PathLike[str] | None = None,
        prompted: bool = False,
        beams: int = 1,
        nucleus: float | None = None,
        seed: int = 0,
        detector: str = PROMPTS,
        places: bool = True,
        **reading: Unpack[Reading],
    ) -> Draft:
        """The draft of a report of one scan: findings and impression, each sentence with its claims, their probability
        by ``detector`` (a head), and their location.

        ``method``: caption, retrieval or template; the default depends on the heads of the model and on ``index`` (a
        folder of `ctclip index`). ``head``: the caption head; ``prompted``: prompt it with the detector's findings;
        ``beams``, ``nucleus``, ``seed``: see ``Decoding``. Raises CtclipError or PreprocessingError with a one-line
        message.
        """
        settings = Drafting(
            Method.named(method), head, None if index is None else Path(index), prompted,
            Decoding(beams, nucleus, seed),
        )  # fmt: skip
        ready = self._ready(scan, **reading)
        warnings = (*ready.warnings, *self.folder.trained_on.caveats())
        return self.drafter(settings, detector).draft(ready, _name(ready), warnings, places=places)

    def drafter(self, settings: Drafting, detector: str = PROMPTS) -> Drafter:
        """A drafter that drafts reports of many scans with the same settings."""
        name = caption_head_name(self.folder, settings)
        caption = None if name is None else self.head(name)
        assert caption is None or isinstance(caption, CaptionHead)
        return Drafter(self.folder, self.head(detector), caption, settings, self._located())

    def embed(self, scan: str | os.PathLike[str] | Prepared, **reading: Unpack[Reading]) -> np.ndarray:
        """The unit vector (dim,) of one scan from disk, or of the result of ``prepare``."""
        return self.encode_volume(self._ready(scan, **reading))[0].float().cpu().numpy()

    def _ready(self, scan: str | os.PathLike[str] | Prepared, **reading: Unpack[Reading]) -> Prepared:
        if not isinstance(scan, Prepared):
            return self.prepare(scan, **reading)
        if reading:
            raise ValueError(f"{', '.join(reading)}: this scan has been read already; give it to model.prepare")
        return scan

    @torch.inference_mode()
    def encode(self, volume: Tensor | np.ndarray | Prepared, mask: Tensor | None = None) -> Encoded:
        """Located tokens, pooled vectors and embeddings; see ``Encoded``.

        ``volume``: (B, 1, D, H, W) in [-1, 1], one volume (D, H, W), or what ``prepare`` returns. Raises ValueError
        for any other type or shape, for voxels outside [-1, 1], and for a scan prepared with another spec than the
        model's.
        """
        return self.dual.encode(self._batch(volume).to(self.dual.device), mask)

    def encode_volume(self, volume: Tensor | np.ndarray | Prepared, mask: Tensor | None = None) -> Tensor:
        """``volume`` as ``encode`` takes it -> (B, dim) unit vectors."""
        embedding = self.encode(volume, mask).embedding
        assert embedding is not None
        return embedding

    @torch.inference_mode()
    def encode_text(
        self,
        texts: Sequence[str] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Strings, or input_ids with attention_mask (n, L) -> (n, dim) unit vectors. Raises ValueError if there is no
        text, or an item is not a text."""
        if texts is not None:
            if isinstance(texts, bytes | Set | Mapping | pd.DataFrame) or not isinstance(texts, Iterable):
                # A set has no order, and iterating over the others would give their keys.
                raise ValueError(f"expected texts, found {type(texts).__name__}: give a list of them")
            texts = [texts] if isinstance(texts, str) else list(texts)
            wrong = next((repr(text) for text in texts if not isinstance(text, str) or not text.strip()), None)
            if wrong is not None or not texts:
                raise ValueError(f"expected texts, found {'nothing' if wrong is None else wrong[:60]}")
        elif input_ids is not None:
            input_ids, attention_mask = _checked_ids(
                input_ids, attention_mask, word_vectors(self.dual.text_encoder.bert)
            )
        return self.dual.encode_text(texts, input_ids=input_ids, attention_mask=attention_mask)

    @torch.inference_mode()
    def logits(self, volumes: Tensor, texts: Tensor) -> Tensor:
        """Unit vectors (n, dim), (m, dim) -> (n, m), scaled by the learned temperature."""
        return self.dual.logits(volumes, texts)

    def _batch(self, volume: Tensor | np.ndarray | Prepared) -> Tensor:
        if isinstance(volume, Prepared):
            if volume.spec.hash != self.spec.hash:
                raise ValueError(
                    f"this scan was prepared with spec {volume.spec.name!r}, but the model needs {self.spec.name!r}: use model.prepare"
                )
            volume = volume.voxels
        if not isinstance(volume, Tensor | np.ndarray):
            raise ValueError(
                f"expected a tensor, an array, or what model.prepare returns, found {type(volume).__name__}"
            )
        if isinstance(volume, np.ndarray):
            if isinstance(volume, np.ma.MaskedArray) or volume.dtype.kind not in "iuf":
                kind = "a masked array" if isinstance(volume, np.ma.MaskedArray) else f"an array of {volume.dtype}"
                raise ValueError(f"expected numbers in [-1, 1], found {kind}")
            # Accept any byte order and strides.
            volume = np.ascontiguousarray(volume, dtype=np.float32)
        tensor = torch.as_tensor(volume)
        if tensor.dtype == torch.bool or tensor.is_complex() or not tensor.numel():
            raise ValueError(f"expected volumes, found shape {tuple(tensor.shape)} of {tensor.dtype}")
        tensor = tensor.float()
        return tensor[None, None] if tensor.ndim == 3 else tensor

    def _asking(self, abnormalities: str | Sequence[str], head: str) -> Head:
        """A prompt head for ``abnormalities`` instead of its own names, with the calibration of the names it knows."""
        known = self.head(head)
        if not isinstance(known, PromptHead):
            raise ValueError(f"the head {head!r} scores only {', '.join(known.names)}; prompts can ask for other names")
        return asking(self.folder, known.prompts, abnormalities, known)


def _name(ready: Prepared) -> str:
    """The name of a scan: that of its file or folder, with patient details from its header masked."""
    return Path(ready.scan.source).name


def usable_head(folder: ModelFolder, name: str) -> Head:
    """A head of a model folder; a calibration that was fitted to other weights or prompts is not used, with a warning.

    Raises CheckpointError for a head that was fitted to another model.
    """
    head = load_head(folder.path, name, folder.model)
    if head.adaptation is not None and head.adaptation.model != folder.hash:
        raise CheckpointError(
            f"{folder.path}: its head {name!r} was fitted to another model ({head.adaptation.model}, this one is "
            f"{folder.hash}); fit it again with `ctclip probe` or `ctclip adapt`"
        )
    calibration = head.calibration
    if calibration is not None and calibration.model != folder.hash:
        _unused(f"the calibration of {folder.path} was fitted to other weights ({calibration.model})")
        head.calibration = None
    elif calibration is not None and calibration.prompts and calibration.prompts != head.source:
        _unused(f"the calibration of {folder.path} was fitted to {calibration.prompts}, not to {head.source}")
        head.calibration = None
    return head


def asking(
    folder: ModelFolder, prompts: PromptSet | str, names: str | Sequence[str] | None, known: Head | None = None
) -> PromptHead:
    """A head that scores ``names`` with ``prompts``; names are resolved by the model's label set, so that aliases work.
    ``known``: a head whose calibration is used for the names it shares, if its prompts are the same. Raises PromptError
    if ``names`` is empty or contains anything but names, the statement of an absence, or only words
    outside the model's vocabulary."""
    prompt_set = load_prompts(prompts) if isinstance(prompts, str) else prompts
    findings = None if names is None else list(dict.fromkeys(folder.labels.resolve(n) or n for n in _checked(names)))
    if findings is None and not prompt_set.names():
        findings = list(folder.labels.names)
    for name in findings or ():
        if name not in {*folder.labels.names, *prompt_set.names()}:
            if states_absence(name):
                raise PromptError(
                    f"{name[:60]!r}: states an absence; name the finding, whose probability says whether it is there"
                )
            _check_readable(folder.model.text_encoder.tokenizer, name)
    head = PromptHead(folder.model, prompt_set, findings)
    if known is not None and known.source == head.source:
        head.calibration = known.calibration
    elif known is not None and known.calibration is not None:
        _unused(f"the calibration of {folder.path} was fitted to {known.source}, not to {head.source}")
    return head


def _check_readable(tokenizer: Any, text: str) -> None:
    """Of a text of unknown tokens alone, in another script say, every score would be the same and mean nothing."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if all(token == tokenizer.unk_token_id for token in tokens):
        raise PromptError(
            f"{text[:60]!r}: the model knows none of these words; use the language of its training reports"
        )


def _checked(names: str | Sequence[str]) -> list[str]:
    every: list[Any]
    try:
        every = [names] if isinstance(names, str) else list(names)
    except TypeError:
        every = [names]
    wrong = next(
        (repr(name) for name in every if not isinstance(name, str) or not name.strip() or CONTROL.search(name)), None
    )
    if wrong is not None or not every:
        raise PromptError(f"expected a finding in words, found {'none' if wrong is None else wrong[:60]}")
    return [" ".join(name.split()) for name in every]


def _checked_ids(ids: object, mask: object, vocabulary: int | None) -> tuple[Tensor, Tensor]:
    """Check input_ids and attention_mask (n, L) and return them as whole numbers. Raises ValueError for other shapes
    and unknown tokens."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        raise ValueError("expected input_ids (n, L), a tensor of whole numbers")
    mask = torch.ones_like(ids) if mask is None else mask
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise ValueError(f"expected an attention_mask of the shape of input_ids, {tuple(ids.shape)}")
    if int(ids.min()) < 0 or (vocabulary is not None and int(ids.max()) >= vocabulary):
        raise ValueError(
            f"input_ids from {int(ids.min())} to {int(ids.max())}, but the model knows {vocabulary} tokens"
        )
    return ids, mask


def _unused(reason: str) -> None:
    print(f"warning: {reason}, so it is not used; `ctclip calibrate` fits one", file=sys.stderr)


def load(source: str | os.PathLike[str], device: str | torch.device = "cpu", *, precision: Asked = "auto") -> Model:
    """See ``ctclip.load``."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise CheckpointError(
            f"device {device!r} cannot be used here; give 'cpu', or 'cuda' on a machine with a GPU"
        ) from error
    folder = load_model(os.fsdecode(source) if isinstance(source, bytes) else source, device)
    set_precision(folder, precision)
    return Model(folder)
