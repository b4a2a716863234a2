"""Methods on all encoders: pooled vectors match their stated evidence, maps point to the cause, refusals are clear."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ctclip.config import EncoderConfig
from ctclip.errors import ExplanationError
from ctclip.explanation.attention import _back
from ctclip.explanation.method import METHODS, Subject, method
from ctclip.heads.linear import LinearHead
from ctclip.heads.locator import Locator, levels_of
from ctclip.models.attention import Attention, Seen
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded, VolumeEncoder, axis_shape
from ctclip.models.vit3d import ViT3DConfig
from ctclip.preprocessing.spec import PreprocessingSpec
from tests.unit.explanation.known import SPEC, BlockMeans, Brightness, known_model
from tests.unit.models.test_token_places import CASES, VIT, build
from tests.unit.small import dual_encoder, spec_of

STEM = ViT3DConfig(patch=(2, 2, 2), stages=((8, 1), (12, 0)), pool_stem=True, pooling=("mean", "max", "attention"), **VIT)  # fmt: skip
STEM_SPEC = spec_of((16, 24, 32), (3.0, 2.0, 2.0))


def encoder(name: str, folder: Path) -> tuple[VolumeEncoder, PreprocessingSpec]:
    if name != "pooled stem":
        return build(name, folder), CASES[name][1]
    return dual_encoder(STEM, STEM_SPEC).volume_encoder.eval(), STEM_SPEC


def subject(name: str, folder: Path) -> Subject:
    made, spec = encoder(name, folder)
    model: DualEncoder = dual_encoder().eval()
    model.volume_encoder = made
    model.volume_projection = nn.Linear(made.width, model.config.dim)
    random = torch.Generator().manual_seed(0)
    head = LinearHead(model, ["A", "B"], torch.randn(2, model.config.dim, generator=random), torch.zeros(2))
    volume = torch.rand(1, 1, *axis_shape(spec), generator=random) * 2 - 1
    return Subject(model, head, [1, 0], volume, budget=20, locator=locator_of(model, volume, head.texts()))


def locator_of(model: DualEncoder, volume: torch.Tensor, texts: torch.Tensor) -> Locator:
    """With random weights, whose maps are above 0."""
    with torch.no_grad():
        levels = levels_of(model.volume_encoder, volume, tokens=False, halves=True)
    locator = Locator([level.features.shape[2] for level in levels], model.config.dim, features=8, halves=True)
    locator.weight.normal_()
    locator.bias.copy_(100 * locator.centred(texts).sum(dim=0))
    return locator


@pytest.mark.parametrize("name", [*CASES, "pooled stem"])
def test_evidence_is_what_was_pooled(name: str, tmp_path: Path) -> None:
    made, spec = encoder(name, tmp_path)
    volume = torch.rand(2, 1, *axis_shape(spec), generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        evidence, plain = made.evidence(volume), made(volume)
        features = [level.features for level in evidence.levels]
        torch.testing.assert_close(evidence.pool(features), plain.pooled)
        directions = torch.randn(3, made.width)
        alone = evidence.alone(features, directions)
    for one, level in zip(alone, evidence.levels, strict=True):
        assert one.shape == (2, 3, int(np.prod(level.grid)))
        assert level.features.shape[1] == np.prod(level.grid)


@pytest.mark.parametrize("name", ["vit3d", "ctvit", "resnet3d", "pooled stem"])
def test_alone_is_the_projection_of_a_volume_of_one_token(name: str, tmp_path: Path) -> None:
    """Fill every token (of CT-ViT: of its position in the slab) with one of them: the contribution to the pooled vector
    is as stated."""
    made, spec = encoder(name, tmp_path)
    volume = torch.rand(1, 1, *axis_shape(spec), generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        evidence = made.evidence(volume)
        features = [level.features for level in evidence.levels]
        directions = torch.randn(2, made.width)
        alone = evidence.alone(features, directions)
        zeros = [torch.zeros_like(one) for one in features]
        for level in range(len(features)):
            for token in (0, 7):
                filled = list(zeros)
                if name == "ctvit":
                    plane = evidence.levels[0].grid[1] * evidence.levels[0].grid[2]
                    filled[0] = zeros[0].clone()
                    filled[0][:, token % plane :: plane] = features[0][:, [token]]
                else:
                    filled[level] = features[level][:, [token]].expand_as(features[level])
                expected = evidence.pool(filled) @ directions.T
                torch.testing.assert_close(alone[level][0, :, token], expected[0], rtol=1e-4, atol=1e-5)


EVERY = [
    # Gradients down to the voxels of the largest volume take a minute.
    pytest.param(name, by, marks=[pytest.mark.slow] if (name, by) == ("resnet3d", "counterfactual") else [])
    for name in (*CASES, "pooled stem")
    for by in METHODS
]


@pytest.mark.parametrize(("name", "by"), EVERY)
def test_every_method_on_every_encoder(name: str, by: str, tmp_path: Path) -> None:
    """A map of each finding in the requested order, finite and not constant; or a one-line error if a method cannot
    compute it."""
    given = subject(name, tmp_path)
    if by == "attention" and name in ("resnet3d", "slices"):
        with pytest.raises(ExplanationError, match="has no attention layers: use --method"):
            method(by).maps(given)
        return
    maps = method(by).maps(given)
    assert maps.values.dtype == np.float32
    assert len(maps.values) == 2
    assert np.isfinite(maps.values).all()
    swapped = method(by).maps(dataclasses.replace(given, findings=[0, 1]))
    np.testing.assert_allclose(maps.values[0], swapped.values[1], rtol=1e-4, atol=1e-5)
    assert np.ptp(maps.values) > 0
    assert not any(layer.seen is not None for layer in given.model.modules() if isinstance(layer, Attention))


def test_a_method_that_does_not_exist() -> None:
    with pytest.raises(ExplanationError, match="give one of similarity, contribution"):
        method("magic")


def test_a_head_without_a_gradient_is_told_to_occlude() -> None:
    model, head = known_model()

    class Closed(Brightness):
        def score(self, encoded: Encoded) -> torch.Tensor:
            return super().score(encoded).detach()

    volume = torch.rand(1, 1, *SPEC.shape) * 2 - 1
    with pytest.raises(ExplanationError, match="is not differentiable: use --method occlusion"):
        method("similarity").maps(Subject(model, Closed(model), [0], volume))
    assert method("occlusion").maps(Subject(model, Closed(model), [0], volume, budget=50)).values.any()
    assert head.names == ("Lesion", "Dark")


def test_an_encoder_that_does_not_say_how_it_pools() -> None:
    """The default applies only to a mean; another pooling is not mistaken for a mean."""

    class Largest(BlockMeans):
        Config = EncoderConfig

        def forward(self, *args: torch.Tensor, **options: torch.Tensor) -> Encoded:
            encoded = super().forward(*args, **options)
            return encoded._replace(pooled=encoded.tokens.max(dim=1).values)

    model, head = known_model()
    model.volume_encoder = Largest(SPEC)
    with pytest.raises(ExplanationError, match="does not pool by the mean of its tokens"):
        method("similarity").maps(Subject(model, head, [0], torch.rand(1, 1, *SPEC.shape)))


def test_attention_written_out_is_the_fused_one() -> None:
    layer, random = Attention(), torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 10, 8, generator=random)
    mask = torch.rand(2, 1, 1, 10, generator=random) > 0.3
    mask[..., 0] = True
    bias = torch.randn(4, 10, 10, generator=random)
    for options in ({"mask": mask}, {"scale": 8.0}, {"bias": bias, "scale": 8.0}):
        fused = layer(query, key, value, **options)
        layer.seen = []
        torch.testing.assert_close(layer(query, key, value, **options), fused)
        assert layer.seen[0].probabilities.shape == (2, 4, 10, 10)
        layer.seen = None


def test_relevance_passes_within_its_own_sequences() -> None:
    """Two slabs of three positions: within slabs relevance stays in its slab, along slabs at its position; registers
    are skipped. Every value is written out by hand."""
    given = Encoded(torch.zeros(1, 6, 1), (2, 1, 3), torch.zeros(1, 1), np.eye(4))
    evidence = type("Given", (), {"encoded": given})()
    row = torch.tensor([1.0, 0, 0, 0, 0, 0])
    plane = torch.zeros(2, 1, 3, 3)
    plane[0, 0, 0, 2] = 0.5
    after = _back(row, Seen(plane, True), torch.ones_like(plane), evidence)  # type: ignore[arg-type]
    assert after.tolist() == [1, 0, 0.5, 0, 0, 0]
    along = torch.zeros(3, 1, 2, 2)
    along[0, 0, 0, 1] = 0.25
    after = _back(row, Seen(along, False), torch.ones_like(along), evidence)  # type: ignore[arg-type]
    assert after.tolist() == [1, 0, 0, 0.25, 0, 0]
    full = torch.zeros(1, 1, 8, 8)
    full[0, 0, 2, 7] = 0.125
    full[0, 0, 2, 0] = 9.0
    after = _back(row, Seen(full, False), torch.ones_like(full), evidence)  # type: ignore[arg-type]
    assert after.tolist() == [1, 0, 0, 0, 0, 0.125]
    assert _back(row, Seen(full, False), -torch.ones_like(full), evidence).tolist() == row.tolist()  # type: ignore[arg-type]
