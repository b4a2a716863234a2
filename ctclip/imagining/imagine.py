"""Generate volumes from texts with one model: check the texts, generate each volume, and score it with the model's own
detector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ctclip.errors import DataError
from ctclip.explanation.find import contrast_texts
from ctclip.heads import decode
from ctclip.heads.decode import GUIDANCE, DecodeHead
from ctclip.heads.folder import list_heads
from ctclip.heads.head import Head
from ctclip.heads.text import TextHead
from ctclip.imagining.dream import dream, noise_volume
from ctclip.imagining.synthetic import Synthetic, to_hu
from ctclip.inference.model import usable_head
from ctclip.inference.scans import StoredScans
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.store import VolumeStore
from ctclip.report_reading.findings import Cleaner
from ctclip.report_reading.reader import Options
from ctclip.report_reading.rules import RulesReader

MEAN_OF = 200


MethodName = Literal["decoder", "dream"]
# Default number of steps of each method: of the flow, and of the optimisation.
STEPS: dict[MethodName, int] = {"decoder": decode.STEPS, "dream": 100}


@dataclass(frozen=True)
class Imagining:
    """How volumes are generated. ``method``: None uses the decoder if the model has one, else a dream; ``number``:
    volumes per text; ``steps``: steps of the method; ``guidance``: how much the decoder exaggerates the text;
    ``decoder``: name of its head; ``store`` and ``split``: a dream starts from the mean volume of this split, without a
    store from noise; ``language``: language of the texts."""

    number: int = 1
    seed: int = 0
    steps: int | None = None
    store: Path | None = None
    split: str = "train"
    language: str = "english"
    method: MethodName | None = None
    guidance: float | None = None
    decoder: str | None = None


@dataclass(frozen=True)
class Drawn:
    """One volume (D, H, W) in [-1, 1], its text and seed, and a description of how it was generated."""

    voxels: np.ndarray
    text: str
    seed: int
    words: str


def imagine(folder: ModelFolder, detector: Head, texts: Sequence[str], given: Imagining) -> Iterator[Synthetic]:
    """Generate ``number`` volumes from each text lazily, one at a time. Raises DataError at once for a text that names
    no finding, the method decoder without a decoder, or options of the other method; with the first volume, for a store
    of another spec."""
    check_texts(folder, texts, given.language)
    method = method_of(folder, given)
    steps = given.steps or STEPS[method]
    drawn = (
        _decoded(folder, texts, given, steps) if method == "decoder" else _dreamt(folder, detector, texts, given, steps)
    )
    return (
        Synthetic(
            to_hu(one.voxels, folder.spec), one.text, method, folder.hash, one.seed, one.words,
            _detected(folder, detector, one.voxels),
        )
        for one in drawn
    )  # fmt: skip


def method_of(folder: ModelFolder, given: Imagining) -> MethodName:
    """The method that ``given`` requests. Raises DataError if the model does not support it, or an option belongs to
    the other method."""
    decoders = [head.name for head in list_heads(folder.path) if head.kind == DecodeHead.kind]
    method = given.method or ("decoder" if decoders or given.decoder else "dream")
    if method == "decoder":
        if not decoders:
            raise DataError(
                f"{folder.path}: has no decoder; train one with `ctclip adapt --method decode --model {folder.path}`, or use "
                f"--method dream"
            )
        if given.decoder is not None and given.decoder not in decoders:
            raise DataError(f"{folder.path}: no decoder {given.decoder!r} (it has: {', '.join(decoders)})")
        if given.store is not None:
            raise DataError("--store gives a dream its initial volume, but the model has a decoder: add --method dream")
    elif given.guidance is not None or given.decoder is not None:
        raise DataError("--guidance and --decoder apply only to --method decoder")
    return method


def decoder_of(folder: ModelFolder, name: str | None = None) -> DecodeHead:
    """The decoder ``name``, or the first one of the model. Raises CheckpointError, also if it was trained for another
    model."""
    names = [head.name for head in list_heads(folder.path) if head.kind == DecodeHead.kind]
    head = usable_head(folder, name or names[0])
    assert isinstance(head, DecodeHead)
    return head


def _decoded(folder: ModelFolder, texts: Sequence[str], given: Imagining, steps: int) -> Iterator[Drawn]:
    """Generate volumes with the decoder."""
    head = decoder_of(folder, given.decoder)
    guidance = GUIDANCE if given.guidance is None else given.guidance
    wanted = [(text, given.seed + number) for text in texts for number in range(given.number)]
    for text, seed in track(wanted, len(wanted), "imagining", "volumes"):
        volume = head.generate(text, seed, steps=steps, guidance=guidance)
        yield Drawn(volume.float().cpu().numpy(), text, seed, f"{steps} steps, guidance {guidance:g}")


def _dreamt(folder: ModelFolder, detector: Head, texts: Sequence[str], given: Imagining, steps: int) -> Iterator[Drawn]:
    """Generate volumes with `dream`, starting from the mean volume of a split or from noise."""
    mean = None if given.store is None else mean_volume(folder, given.store, given.split)
    wanted = TextHead(folder.model, list(texts), contrast_texts(detector)).directions
    origin = "noise" if mean is None else f"the mean of the split {given.split}"
    for text, direction in zip(texts, wanted, strict=True):
        for seed in range(given.seed, given.seed + given.number):
            begin = noise_volume(folder.model, seed) if mean is None else mean
            made = dream(folder.model, direction, begin, steps=steps, seed=seed, everywhere=mean is None)
            words = f"{steps} steps from {origin}, cosine with the text {made.before:.2f} to {made.after:.2f}"
            yield Drawn(made.voxels, text, seed, words)


def check_texts(folder: ModelFolder, texts: Sequence[str], language: str = "english") -> None:
    """Raise DataError unless every text names a finding of the model's label set."""
    cleaner = Cleaner(RulesReader.build(folder.labels, Options(language=language)))
    for text in texts:
        if not any(sentence.findings for sentence in cleaner.clean(text)):
            some = ", ".join(folder.labels.names[:4])
            raise DataError(
                f"{text[:80]!r}: names no finding of the label set {folder.labels.name} ({some} ...); write it as a report would"
            )


def mean_volume(folder: ModelFolder, store: Path, split: str) -> Tensor:
    """The mean (1, 1, D, H, W) of the first volumes of a split. Raises DataError for a store of another spec."""
    scans = StoredScans(VolumeStore(store), split, folder.spec, folder.path)
    count = min(MEAN_OF, len(scans.table))
    if not count:
        raise DataError(f"{store}: no volume in split {split!r}")
    total: np.ndarray | None = None
    for index in track(range(count), count, "mean volume", "scans"):
        voxels = scans.voxels(index)[0].astype(np.float64)
        total = voxels if total is None else total + voxels
    assert total is not None
    return torch.from_numpy((total / count).astype(np.float32))[None, None].to(folder.model.device)


@torch.inference_mode()
def _detected(folder: ModelFolder, detector: Head, voxels: np.ndarray) -> dict[str, float]:
    encoded = folder.model.encode(torch.from_numpy(voxels)[None, None].to(folder.model.device))
    probabilities = detector.probabilities(detector.score(encoded).float())[0].tolist()
    return dict(zip(detector.names, probabilities, strict=True))
