"""The one object a notebook needs: a loaded model with its prompts, its preprocessing and its calibration."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor

from ctclip.evaluation.calibration import Calibration
from ctclip.inference.detector import Detector
from ctclip.inference.prompts import PromptSet, load_prompts
from ctclip.inference.show import Detection, calibrated
from ctclip.models.folder import ModelFolder, load_model
from ctclip.preprocessing.pipeline import Expect, Prepared, Trust, prepare


class Model(ModelHubMixin, library_name="ctclip", tags=["computed-tomography", "zero-shot"]):
    """A model folder in memory: ``detect`` scans, ``encode_volume``, ``encode_text``.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` are Hugging Face's; the folder they move is ours.
    """

    def __init__(self, folder: ModelFolder) -> None:
        # The folder says everything: the mixin's own record of how this object was made would be a path.
        self._hub_mixin_config = None
        self.folder = folder
        self.dual = folder.model
        self.spec = folder.spec
        self.prompts = load_prompts(folder.prompts or "report_style")
        self.calibration = calibration_of(folder, self.prompts)

    def _save_pretrained(self, save_directory: Path) -> None:
        shutil.copytree(self.folder.path, save_directory, dirs_exist_ok=True)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", **given: object) -> Model:
        """``model_id``: a folder or hub name; see ``ctclip.load``."""
        return load(model_id, map_location)

    @cached_property
    def detector(self) -> Detector:
        """Of the model's own prompts."""
        return Detector(self.dual, self.prompts, None, self.calibration)

    def prepare(self, scan: str | os.PathLike[str], *, trust: Trust = "auto", expect: Expect = "any") -> Prepared:
        """One scan of disk as this model wants it; see ``ctclip.preprocessing.prepare``."""
        return prepare(scan, self.spec, trust=trust, expect=expect)

    def detect(
        self,
        scan: str | os.PathLike[str],
        abnormalities: Sequence[str] | None = None,
        *,
        trust: Trust = "auto",
        expect: Expect = "any",
    ) -> Detection:
        """What the model sees in one scan (a volume file, a DICOM folder, a zip).

        ``abnormalities``: names to look for instead of the model's own, listed or not. Raises PreprocessingError if
        the scan cannot be trusted.
        """
        ready = self.prepare(scan, trust=trust, expect=expect)
        detector = self.detector
        if abnormalities is not None:
            detector = Detector(self.dual, self.prompts, abnormalities, self.calibration)
        found = detector.detect(torch.from_numpy(ready.voxels)[None, None])
        names = detector.abnormalities
        return Detection(
            scan=Path(scan).name,
            probabilities=dict(zip(names, found.probabilities[0].tolist(), strict=True)),
            margins=dict(zip(names, found.margins[0].tolist(), strict=True)),
            values=dict(zip(detector.graded, found.values[0].tolist(), strict=True)),
            thresholds=detector.thresholds(),
            calibrated=calibrated(detector),
            model=self.folder.hash,
            spec=self.spec.hash,
            warnings=tuple(ready.warnings),
        )

    def embed(self, scan: str | os.PathLike[str], *, trust: Trust = "auto", expect: Expect = "any") -> np.ndarray:
        """The unit vector (dim,) of one scan of disk."""
        ready = self.prepare(scan, trust=trust, expect=expect)
        return self.encode_volume(torch.from_numpy(ready.voxels)[None, None])[0].float().cpu().numpy()

    @torch.inference_mode()
    def encode_volume(self, volume: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, 1, D, H, W) in [-1, 1] -> (B, dim) unit vectors."""
        return self.dual.encode_volume(volume.to(self.dual.similarity.logit_scale.device), mask)

    @torch.inference_mode()
    def encode_text(
        self,
        texts: Sequence[str] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Strings, or input_ids with attention_mask (n, L) -> (n, dim) unit vectors."""
        return self.dual.encode_text(texts, input_ids=input_ids, attention_mask=attention_mask)

    def logits(self, volumes: Tensor, texts: Tensor) -> Tensor:
        """Unit vectors (n, dim), (m, dim) -> (n, m), scaled by the learned temperature."""
        return self.dual.logits(volumes, texts)


def calibration_of(folder: ModelFolder, prompts: PromptSet) -> Calibration | None:
    """The calibration kept with a model, if there is one and it is of these weights and prompts."""
    path = folder.path / "calibration.json"
    if not path.is_file():
        return None
    found = Calibration.load(path)
    if found.model != folder.hash:
        _unused(f"{path} was fitted to other weights ({found.model})")
        return None
    if found.prompts and found.prompts != prompts.identity():
        _unused(f"{path} was fitted to the prompts {found.prompts}, these are {prompts.identity()}")
        return None
    return found


def _unused(reason: str) -> None:
    print(f"warning: {reason}: not used; `ctclip calibrate` fits one", file=sys.stderr)


def load(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> Model:
    """See ``ctclip.load``."""
    return Model(load_model(source, device))
