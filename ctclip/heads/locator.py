"""A locator: predicts which cells of a volume a text describes, from the grids of a frozen encoder.

It is learned from volumes and reports alone (`ctclip adapt --method locate`). Each cell inherits the target of its
volume (the simplest multiple-instance learning: Dietterich et al. 1997; Ray and Craven 2005). The regression therefore
predicts the mean target of volumes with such a cell, which is high only for cells that volumes without the finding
lack. Features are random (Rahimi and Recht 2007); the linear map has a closed-form solution. In further rounds
(``ctclip.adaptation.sharpen``) both are trained on the cells that the locator itself chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctclip.errors import CheckpointError
from ctclip.heads.head import reading
from ctclip.heads.prompts import PromptHead, read_names
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Level, VolumeEncoder, axis_shape, axis_spacing, finest
from ctclip.preprocessing.plain_yaml import read_yaml
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.prompts import PromptSet, load_prompts

SIZE, WEIGHTS, SIDES = "locator.yaml", "locator.safetensors", "sides.yaml"
# Number of cells processed at a time, to fit the CPU cache, and the largest feature, in standard deviations.
AT_ONCE, LARGEST = 2**11, 8.0
# HU windows of lung and soft tissue; the means in these windows are features of half cells.
LUNG, SOFT = (-1000.0, -500.0), (-160.0, 240.0)


class Cells:
    """The cells of the finest of several grids, each with the cells of the other grids that contain it.

    ``within``: for each grid the (N,) index of the cell whose centre is nearest; ``position`` (N, 3): centres, from -1 to 1
    over the volume; ``grid`` and ``affine``: of the finest grid, as in ``Level``; ``real`` (B, N) bool, None for all.
    """

    def __init__(self, levels: Sequence[Level], spec: PreprocessingSpec) -> None:
        fine = finest(levels)
        self.grid, self.affine = fine.grid, fine.affine
        index = np.stack(np.meshgrid(*map(np.arange, fine.grid), indexing="ij"), axis=-1).reshape(-1, 3)
        mm = index @ fine.affine[:3, :3].T + fine.affine[:3, 3]
        self.within = [torch.from_numpy(_nearest(mm, level)) for level in levels]
        last = (np.array(axis_shape(spec)) - 1) * np.array(axis_spacing(spec))
        self.position = torch.from_numpy(2 * mm / np.maximum(last, 1e-6) - 1).float()
        self.real: Tensor | None = None
        for level, within in zip(levels, self.within, strict=True):
            if level.real is not None:
                real = level.real[:, within.to(level.real.device)]
                self.real = real if self.real is None else self.real & real


def _nearest(mm: np.ndarray, level: Level) -> np.ndarray:
    """Index (N,) of the cell of ``level`` whose centre is nearest to each point of ``mm`` (N, 3)."""
    leads = np.linalg.inv(level.affine)
    cell = np.rint(mm @ leads[:3, :3].T + leads[:3, 3] - 1e-9).astype(int)
    return np.ravel_multi_index(np.clip(cell, 0, np.array(level.grid) - 1).T, level.grid)


def levels_of(encoder: VolumeEncoder, volume: Tensor, *, tokens: bool, halves: bool) -> list[Level]:
    """The grids of a volume (B, 1, D, H, W) that an encoder pools. ``tokens``: also include the tokens of an encoder
    that pools finer grids; for other encoders, the tokens are the only grid. ``halves``: also include a grid of voxel
    features with half the size of the finest cell (see ``_halves``)."""
    try:
        levels = encoder.evidence(volume).levels
    except ValueError:  # an encoder without ``evidence``
        encoded = encoder(volume)
        levels = (Level(encoded.tokens, encoded.grid, encoded.affine, encoded.real),)
    chosen = list(levels if tokens or len(levels) == 1 else levels[1:])
    return [*chosen, _halves(encoder, volume, chosen)] if halves else chosen


def _halves(encoder: VolumeEncoder, volume: Tensor, levels: Sequence[Level]) -> Level:
    """Cells with half the size of the finest cell along each axis. Features (B, N, 5): mean, minimum and maximum voxel,
    and the means in the lung and soft tissue windows."""
    block = [max(1, extent // count // 2) for extent, count in zip(volume.shape[2:], finest(levels).grid, strict=True)]
    low, high = encoder.spec.hu_window
    parts = [F.avg_pool3d(volume, block), -F.max_pool3d(-volume, block), F.max_pool3d(volume, block)]
    for bottom, top in (LUNG, SOFT):
        first, last = ((value - low) / (high - low) * 2 - 1 for value in (bottom, top))
        parts.append(F.avg_pool3d(volume.clamp(first, last), block) * (2 / (last - first)))
    cells = torch.cat(parts, dim=1)
    grid = (cells.shape[2], cells.shape[3], cells.shape[4])
    affine = encoder.affine(block, [(extent - 1) / 2 for extent in block])
    return Level(cells.flatten(2).transpose(1, 2), grid, affine)


class Locator(nn.Module):
    """Random features of each cell, from all grids and its position, and a linear map to the space of texts.

    ``widths``: number of channels of each grid; ``tokens`` and ``halves``: see ``levels_of``; ``text``: dimension of
    text embeddings; ``features``: number of random features, which are trained too in rounds after the first stage;
    ``waves``: number of sines and cosines that encode the position along each axis; ``rounds``: number of these rounds.
    """

    text_mean: Tensor

    def __init__(
        self, widths: Sequence[int], text: int, *, features: int = 512, waves: int = 4, tokens: bool = False,
        halves: bool = False, rounds: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.size: dict[str, Any] = {
            "widths": [int(one) for one in widths], "text": text, "features": features, "waves": waves, "tokens": tokens,
            "halves": halves, "rounds": int(rounds),
        }  # fmt: skip
        self.waves, self.tokens, self.halves = waves, tokens, halves
        inputs = [*self.size["widths"], 6 * waves]
        self.width = features + sum(inputs)
        # Each grid and the position contribute equally to a feature.
        self.random = nn.ParameterList(
            nn.Parameter(torch.randn(one, features) / math.sqrt(max(one, 1)), requires_grad=False) for one in inputs
        )
        self.means = nn.ParameterList(nn.Parameter(torch.zeros(one), requires_grad=False) for one in widths)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(one), requires_grad=False) for one in widths)
        self.register_buffer("offset", torch.rand(features) * 3 - 1.5)
        self.register_buffer("weight", torch.zeros(self.width, text))
        self.register_buffer("bias", torch.zeros(text))
        self.register_buffer("text_mean", torch.zeros(text))

    offset: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def rounds(self) -> int:
        """Number of rounds in which the locator chose the cells that it learned from; 0: only the first stage."""
        return int(self.size["rounds"])

    def inputs(self, parts: Sequence[Tensor], position: Tensor) -> list[Tensor]:
        """Concatenate the standardised features (..., C) of each grid and the encoded positions (..., 3) in [-1, 1]."""
        seen = [
            ((part.float() - mean) / scale).clamp(-LARGEST, LARGEST)
            for part, mean, scale in zip(parts, self.means, self.scales, strict=True)
        ]
        angles = position[..., None] * torch.arange(1, self.waves + 1, device=position.device) * (math.pi / 2)
        return [*seen, torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)]

    def features(self, parts: Sequence[Tensor], position: Tensor) -> Tensor:
        """Inputs of the linear map (..., width)."""
        seen = self.inputs(parts, position)
        mixed = sum((one @ random for one, random in zip(seen, self.random, strict=True)), self.offset)
        return torch.cat([F.relu(mixed), *seen], dim=-1)

    def centred(self, texts: Tensor) -> Tensor:
        """Subtract the mean sentence from embeddings (T, text) of any norm and normalise them."""
        return F.normalize(F.normalize(texts.float(), dim=-1) - self.text_mean, dim=-1)

    def maps(
        self, levels: Sequence[Level], spec: PreprocessingSpec, texts: Tensor, *, centred: bool = False
    ) -> tuple[Tensor, Cells]:
        """The grids of one volume and embeddings (T, text) -> (T, N) float32 over the cells of the finest grid: how
        much more likely than average the report states each text, in standard deviations; after further rounds, the
        log odds that the text describes the cell (see ``ctclip.explanation.learned``). ``centred``: ``texts`` have been
        through ``self.centred``. Raises ValueError if the grids differ from those of training."""
        widths = [level.features.shape[2] for level in levels]
        if widths != self.size["widths"]:
            raise ValueError(f"grids have {widths} channels, in training they had {self.size['widths']}")
        cells, texts = Cells(levels, spec), texts if centred else self.centred(texts)
        weight, constant = self.weight @ texts.T, self.bias @ texts.T
        count, device = self.size["features"], texts.device
        seen = self.inputs([level.features[0] for level in levels], cells.position.to(device))
        parts = weight[count:].split([one.shape[1] for one in seen])
        within = [index.to(device) for index in cells.within] + [torch.arange(len(cells.position), device=device)]
        # Project each coarse cell once, not once for each finest cell in it.
        coarse = [
            (one @ random, one @ part) if len(one) < len(within[-1]) else None
            for one, random, part in zip(seen, self.random, parts, strict=True)
        ]
        values = []
        for first in range(0, len(cells.position), AT_ONCE):
            mixed, linear = self.offset, constant
            for number, index in enumerate(within):
                chosen, known = index[first : first + AT_ONCE], coarse[number]
                if known is None:
                    one = seen[number][chosen]
                    mixed, linear = mixed + one @ self.random[number], linear + one @ parts[number]
                else:
                    mixed, linear = mixed + known[0][chosen], linear + known[1][chosen]
            values.append(torch.addmm(linear, F.relu(mixed), weight[:count]).T)
        return torch.cat(values, dim=1), cells


class LocateHead(PromptHead):
    """Scores findings with the model's prompts; its locator computes the maps of `ctclip explain`."""

    kind = "locate"

    def __init__(self, model: DualEncoder, locator: Locator, prompts: PromptSet, names: Sequence[str] | None) -> None:
        super().__init__(model, prompts, names)
        self.locator = locator.to(model.device).eval()
        # The least share of a side at which hardly any is wrong, for findings for which there is one.
        self.certain: dict[str, float] = {}

    def save(self, folder: Path) -> None:
        super().save(folder)
        tensors = {name: value.cpu().contiguous() for name, value in self.locator.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)
        (folder / SIZE).write_text(yaml.safe_dump(self.locator.size, sort_keys=False), encoding="utf-8")
        if self.certain:
            (folder / SIDES).write_text(yaml.safe_dump(self.certain, sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, model: DualEncoder) -> LocateHead:
        with reading(folder, "its locator is"):
            size, tensors = read_yaml(folder / SIZE), load_file(folder / WEIGHTS)
            locator = built(size, tensors)
            certain = read_yaml(folder / SIDES) if (folder / SIDES).is_file() else {}
            least = {str(name): float(share) for name, share in certain.items()}
        if locator.size["text"] != model.config.dim:
            raise CheckpointError(
                f"{folder}: its locator compares cells with texts of {locator.size['text']} dimensions, but those of the "
                f"model have {model.config.dim}: it belongs to another model"
            )
        head = cls(model, locator, load_prompts(folder / "prompts.yaml"), read_names(folder))
        head.certain = {name: share for name, share in least.items() if name in head.names}
        return head


def built(size: dict[str, Any], tensors: dict[str, Tensor]) -> Locator:
    """A locator with these weights. Raises ValueError, TypeError, KeyError or RuntimeError if ``size`` does not fit
    them."""
    _check_size(size, tensors)
    locator = Locator(**size)
    locator.load_state_dict(tensors)
    return locator


def _check_size(size: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless the sizes in an untrusted file match its weights, before memory is allocated for them."""
    grids = sum(name.startswith("means.") for name in tensors)
    there = {
        "widths": [len(tensors[f"means.{number}"]) for number in range(grids)], "text": len(tensors["bias"]),
        "features": len(tensors["offset"]), "waves": len(tensors[f"random.{grids}"]) // 6,
        "tokens": bool(size["tokens"]), "halves": bool(size["halves"]),
        # Locators of version 1.0 learned in one stage.
        **({"rounds": int(size["rounds"])} if "rounds" in size else {}),
    }  # fmt: skip
    if not grids or size != there:
        raise ValueError("sizes and weights do not agree")
