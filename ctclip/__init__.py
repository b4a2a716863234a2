"""ctclip: 3-D vision-language learning on chest CT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctclip.caches import use_writable_caches

if TYPE_CHECKING:
    import os

    import torch

    from ctclip.inference.model import Model
    from ctclip.inference.precision import Asked

__version__ = "1.0.0"

# Before numba or matplotlib are imported, which read these variables at import.
use_writable_caches()


def load(source: str | os.PathLike[str], device: str | torch.device = "cpu", *, precision: Asked = "auto") -> Model:
    """Load a model from a model folder, or a name on the Hugging Face hub, in evaluation mode.

    ``precision`` of the volume encoder: ``"fp32"``, ``"tf32"`` (NVIDIA GPUs), ``"bf16"``, or ``"auto"``: the fastest
    whose scores agree with float32, as measured by `ctclip check-precision` on this device; float32 if it was not run.

    The model detects findings (``detect("scan.nii.gz")``) and encodes: ``encode_volume`` takes (B, 1, D, H, W) in [-1,
    1], ``encode_text`` strings or input_ids with attention_mask; both return unit vectors. Raises CheckpointError
    naming what is missing.
    """
    from ctclip.inference.model import load as load_from

    return load_from(source, device, precision=precision)
