"""What a step sums: the objective on prompts is the cross-entropy of what detection says; who is whose negative."""

from __future__ import annotations

import pytest
import torch
from ctclip.inference.detector import Detector
from sklearn.metrics import log_loss

from ctclip.config import ModelConfig, ObjectiveConfig, TextConfig, ViT3DConfig
from ctclip.data.reports import Report
from ctclip.models.dual_encoder import DualEncoder, build_model
from ctclip.models.text import train_tokenizer
from ctclip.phantom.prevalence import FINDINGS
from ctclip.prompts import load_prompts
from ctclip.training.step import ContrastiveStep
from ctclip.training.text_warmup import lock_text

REPORTS = ["The heart is enlarged. No nodule is seen.", "A nodule lies in the upper lobe.", "There is no effusion."]


def small(standardise: bool = False) -> DualEncoder:
    torch.manual_seed(0)
    volume = ViT3DConfig(stages=(), width=24, heads=2, depth=1, patch=(4, 4, 4), registers=1)
    text = TextConfig(width=16, depth=1, heads=2, max_tokens=24)
    config = ModelConfig(volume=volume, text=text, dim=12, standardise=standardise)
    return build_model(config, train_tokenizer(REPORTS * 20, 200)).train()


@pytest.mark.parametrize("locked", [False, True])
def test_the_loss_is_that_of_the_detector(locked: bool) -> None:
    model = small(standardise=True)
    if locked:
        lock_text(model, [Report(one, one) for one in REPORTS], torch.device("cpu"))
    prompts = load_prompts("report_style")
    step = ContrastiveStep(model, ObjectiveConfig(prompts=2.0), FINDINGS[:4], prompts)
    labels = torch.tensor([[1, 0, torch.nan, 1], [0, 0, 1, 1], [1, 1, 0, torch.nan]])
    known = ~labels.isnan()
    inputs = {"volumes": torch.rand(3, 1, 8, 8, 8) * 2 - 1, "tokens": model.text_encoder.tokenise(REPORTS)}
    identities = {"scans": torch.arange(3), "text_identities": torch.arange(3), "labels": labels}
    before = model.similarity.text_standard.running_mean.clone()
    features = step("features", **inputs)[:2]
    loss, parts = step("loss", volume_features=features[0], text_features=features[1], **identities)
    # Statistics of the reports go on, those of the prompts are no part of them.
    statistics = model.similarity.text_standard.running_mean.clone()
    expected = before if locked else 0.9 * before + 0.1 * features[1].mean(dim=0)
    torch.testing.assert_close(statistics, expected)
    volumes = model.similarity.volume(features[0])
    model.eval()
    detector = Detector(model, prompts, FINDINGS[:4])
    probabilities = detector.probabilities(detector.margins(volumes.detach()))
    assert float(parts["prompts"]) == pytest.approx(
        2 * log_loss(labels[known], probabilities[known].double()), rel=1e-4
    )
    loss.backward()
    assert model.volume_projection.weight.grad.abs().sum() > 0
    alone, zeroed = step(
        "loss", volume_features=features[0], text_features=features[1], **identities, labels_alone=True
    )
    assert float(zeroed["clip"]) == 0
    assert float(alone.detach()) == pytest.approx(float(zeroed["prompts"]))


@pytest.mark.parametrize("by_identity", [True, False])
def test_by_position_all_but_the_own_report_are_negatives(by_identity: bool) -> None:
    """Two volumes of one scan, one of them met before: against cross-entropy over the columns that are left."""
    model = small()
    step = ContrastiveStep(model, ObjectiveConfig(memory=4, by_identity=by_identity))
    earlier, volumes, texts = (torch.nn.functional.normalize(torch.randn(n, 12), dim=1) for n in (1, 3, 3))
    step.memory.remember(earlier, torch.tensor([7]), torch.tensor([1]))
    identities = {"scans": torch.tensor([7, 7, 8]), "text_identities": torch.tensor([1, 1, 2])}
    loss, _ = step("loss", volume_features=volumes, text_features=texts, **identities)
    scale, rows = model.similarity.scale().detach(), []
    left_out = {(0, 1), (1, 0), (0, 3), (1, 3)} if by_identity else set()
    for one, other in ((volumes, torch.cat([texts, earlier])), (texts, volumes)):
        for row in range(3):
            columns = [c for c in range(len(other)) if (row, c) not in left_out]
            logits = (scale * other[columns] @ one[row]).double()
            rows.append(torch.logsumexp(logits, dim=0) - logits[columns.index(row)])
    assert float(loss.detach()) == pytest.approx(float(torch.stack(rows).sum() / 3 / 2), rel=1e-5)


def test_the_order_of_its_settings_is_explained() -> None:
    with pytest.raises(ValueError, match="labels_first needs labels or prompts"):
        ObjectiveConfig(labels_first=0.2)
    assert ObjectiveConfig(prompts=1, labels_first=0.2).reads_labels


def test_encoders_run_in_bfloat16_whatever_is_around_them() -> None:
    """DeepSpeed calls the module with autocast switched off; losses are in float32 either way."""
    model = small()
    step = ContrastiveStep(model, ObjectiveConfig())
    inputs = {"volumes": torch.rand(3, 1, 8, 8, 8) * 2 - 1, "tokens": model.text_encoder.tokenise(REPORTS)}
    exact = step("features", **inputs)[:2]
    step.bf16 = True
    with torch.autocast("cpu", enabled=False):
        rounded = step("features", **inputs)[:2]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.volume_features(inputs["volumes"]), model.text_features(inputs["tokens"])
        loss, _ = step("step", **inputs, scans=torch.arange(3), text_identities=torch.arange(3))
    for found, wanted, whole in zip(rounded, expected, exact, strict=True):
        assert torch.equal(found, wanted)
        assert not torch.equal(found.float(), whole)
    assert loss.dtype == torch.float32
