"""A step reads nothing back from the device: it runs on parameters and volumes without values; only the output of the
reading processes (ids, and which tokens contain body) is real."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from ctclip.config import ModelConfig, TextConfig, encoder_config, objective_configs
from ctclip.labels import labels_of_columns
from ctclip.models.dual_encoder import build_model
from ctclip.models.text import train_tokenizer
from ctclip.objectives.objective import Context, Features
from ctclip.objectives.sentences import Sentences, SentencesConfig
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.prompts import load_prompts
from ctclip.training.step import Pairs, Part, TrainingStep
from tests.unit.small import dual_encoder

SPEC = PreprocessingSpec("test", spacing=(3.0, 3.0, 3.0), shape=(16, 24, 32))
TEXTS = ["The heart is enlarged. No nodule is seen.", "A nodule lies in the upper lobe.", "There is no effusion."]
ENCODERS: dict[str, dict[str, Any]] = {
    "vit3d": {"kind": "vit3d", "stages": [[8, 1]], "patch": [2, 2, 2], "width": 24, "heads": 2, "drop_air": True},
    "windows": {"kind": "vit3d", "stages": [], "width": 24, "heads": 2, "drop_air": True, "window": [2, 2, 3], "global_every": 2},
    "ctvit": {"kind": "ctvit", "patch": [4, 8, 8], "width": 16, "heads": 2, "head_width": 8, "spatial_depth": 1, "temporal_depth": 1, "codebook_size": 8},
    "resnet3d": {"kind": "resnet3d", "width_factor": 0.125},
}  # fmt: skip
OBJECTIVES = {"clip": {"queue": 8}, "convirt": 1, "siglip": 1, "labels": 1, "captioning": 1}


@pytest.mark.parametrize("name", ENCODERS)
def test_no_value_is_asked_of_the_device(name: str) -> None:
    tokenizer = train_tokenizer(TEXTS * 20, 200)
    labels = labels_of_columns("test", ["heart", "nodule"])
    config = ModelConfig(
        volume=encoder_config(ENCODERS[name]), text=TextConfig(width=16, depth=1, heads=2), dim=12, standardise=True
    )
    model = build_model(config, SPEC, tokenizer)
    tokens, bodies = model.text_encoder.tokenise(TEXTS), None
    finder = model.volume_encoder.body_tokens()
    if finder is not None:
        volume = torch.full((3, 1, *SPEC.shape), -1.0)
        volume[:, :, :, 8:16, 8:24] = 0.0
        bodies = torch.from_numpy(finder.of_volumes(volume))
        assert not bodies.all()
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        warnings.simplefilter("ignore")
        step = TrainingStep(Context(model, labels, load_prompts("generic")), objective_configs(OBJECTIVES))
        words = step.words(TEXTS)
        for module in step.modules():
            for held in (module._parameters, module._buffers):
                for key, value in held.items():
                    if value is not None:
                        empty = fake.from_tensor(value.detach())
                        held[key] = torch.nn.Parameter(empty) if isinstance(value, torch.nn.Parameter) else empty  # type: ignore[assignment]
        part = Part(torch.empty(3, 1, *SPEC.shape), tokens, words, bodies, {})
        identities = torch.empty(3, dtype=torch.long)
        pairs = Pairs(identities, identities, {"labels": torch.empty(3, 2)})
        loss, parts = step(part, pairs, progress=0.5)
        loss.backward()
    assert isinstance(loss, FakeTensor)
    assert set(parts) == {*OBJECTIVES, "logit_scale"}


def test_sentences_ask_nothing_of_the_device() -> None:
    """While the text encoder is locked, from the second step on."""
    model = dual_encoder()
    model.lock_text()
    objective = Sentences(SentencesConfig(), Context(model, sentences=tuple(TEXTS)))
    given = lambda: Features(  # noqa: E731
        torch.rand(3, 12, requires_grad=True), torch.rand(3, 12), torch.ones(1), torch.ones(1),
        torch.arange(3), torch.arange(3), slice(0, 3),
    )  # fmt: skip
    objective(given(), torch.zeros(3, 2, dtype=torch.long))
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = objective(given(), torch.empty(3, 2, dtype=torch.long))
        loss.backward()
    assert isinstance(loss, FakeTensor)


def test_a_value_that_is_asked_for_is_noticed() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        float(torch.empty(3).sum())
