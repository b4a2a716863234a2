"""The prior: a ridge equals scikit-learn's, a diffusion samples both volumes of a text, and the head is saved and
loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge

import ctclip
from ctclip.adaptation import prior as prior_module
from ctclip.adaptation.prior import RIDGES, PriorConfig, TextPairs, fit_prior, run_prior
from ctclip.errors import CheckpointError, TrainingError
from ctclip.heads.folder import list_heads, load_head
from ctclip.heads.prior import SIZE, WEIGHTS, Prior, PriorHead, signal_and_noise
from ctclip.models.checksums import write_checksums
from ctclip.models.folder import load_model
from ctclip.preprocessing.store import VolumeStore
from tests.unit.drafting.conftest import Clinic, clinic, clinic_files  # noqa: F401

CPU = torch.device("cpu")


def pairs(count: int = 200, dim: int = 6, noise: float = 0.3) -> TextPairs:
    """Volumes are rotated and shifted texts: a gap between the modalities that a map can close."""
    random = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(count, dim, generator=random), dim=-1)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=random)).Q
    volumes = F.normalize(texts @ turn + 1.0 + noise * torch.randn(count, dim, generator=random), dim=-1)
    return TextPairs(texts, volumes, torch.arange(count) % 10 == 0)


def test_a_ridge_is_scikit_learns_at_the_best_strength_of_held_out_patients() -> None:
    given = pairs()
    prior, losses = fit_prior(given, PriorConfig(kind="ridge"), CPU, 0)
    train = ~given.held_out
    targets = prior.target(given.volumes).numpy()
    errors = []
    for strength in RIDGES:
        fitted = Ridge(alpha=strength).fit(given.texts[train].numpy(), targets[train])
        errors.append(np.mean((fitted.predict(given.texts[~train].numpy()) - targets[~train]) ** 2))
    np.testing.assert_allclose(losses["held_out_loss"], errors, rtol=1e-4)
    best = Ridge(alpha=RIDGES[int(np.argmin(errors))]).fit(given.texts[train].numpy(), targets[train])
    np.testing.assert_allclose(prior.regress(given.texts).detach(), best.predict(given.texts.numpy()), atol=1e-4)


@pytest.mark.parametrize("kind", ["ridge", "mlp", "diffusion"])
def test_every_kind_crosses_the_gap(kind: str) -> None:
    given = pairs()
    config = PriorConfig(kind=kind, width=48, depth=1, epochs=40, batch=60, learning_rate=3e-3, dropout=0)  # type: ignore[arg-type]
    prior, _ = fit_prior(given, config, CPU, 0)
    prior.eval()
    texts, volumes = given.texts[given.held_out], given.volumes[given.held_out]
    moved = prior.expected(texts)
    before, after = ((volumes.mean(0) - side.mean(0)).norm() for side in (texts, moved))
    assert after < 0.35 * before
    assert (moved * volumes).sum(1).mean() > 0.85 > (texts * volumes).sum(1).mean() + 0.3
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(len(moved)))
    torch.testing.assert_close(prior.expected(texts[:1]), moved[:1], msg="a text's volumes depend on no other text")


def test_a_diffusion_draws_both_volumes_of_a_text_and_a_regression_their_mean() -> None:
    text = torch.eye(4)[:1].expand(256, -1)
    one, other = F.normalize(torch.tensor([[1.0, 1, 0, 0], [1, -1, 0, 0]]), dim=-1)
    volumes = torch.where((torch.arange(256) % 2 == 0)[:, None], one, other)
    given = TextPairs(text, volumes, torch.arange(256) % 8 < 2)
    config = PriorConfig(kind="diffusion", width=48, depth=1, epochs=80, batch=96, learning_rate=3e-3, dropout=0)
    prior = fit_prior(given, config, CPU, 0)[0].eval()
    drawn = prior.sample(text[:1], 40)[0]
    near = torch.stack([drawn @ one, drawn @ other], dim=1)
    assert (near.max(dim=1).values > 0.95).float().mean() > 0.9
    assert 0.25 < (near.argmax(dim=1) == 0).float().mean() < 0.75
    assert torch.equal(drawn, prior.sample(text[:1], 40)[0]), "a seed decides"
    assert not torch.equal(drawn, prior.sample(text[:1], 40, seed=1)[0])
    ridge = fit_prior(given, PriorConfig(kind="ridge"), CPU, 0)[0]
    torch.testing.assert_close(ridge.expected(text[:1])[0], F.normalize(one + other, dim=0), atol=1e-3, rtol=0)
    # With guidance 0 the text has no effect; best takes the sample nearest to its text.
    asked = F.normalize(torch.tensor([[0.5, 1, 0, 0]]), dim=-1)
    assert prior.best(asked, 40)[0] @ asked[0] == pytest.approx(float((prior.sample(asked, 40)[0] @ asked[0]).max()))


def test_the_schedule_is_the_cosine_of_nichol_and_dhariwal() -> None:
    for time in (0.0, 0.3, 0.999):
        kept, lost = signal_and_noise(time)
        expected = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
        assert kept**2 == pytest.approx(expected)
        assert kept**2 + lost**2 == pytest.approx(1, abs=1e-6)


def test_a_prior_is_trained_kept_and_loaded_again(clinic: Clinic, tmp_path: Path) -> None:  # noqa: F811
    weights = load_file(clinic.model / "model.safetensors")
    folder = run_prior(load_model(clinic.model), clinic.store, tmp_path / "out", PriorConfig())
    assert folder == clinic.model / "heads" / "prior"
    again = load_file(clinic.model / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in weights.items()), "the encoders must not change"
    assert list(pd.read_csv(tmp_path / "out" / "prior.csv").columns) == ["ridge", "loss", "held_out_loss"]
    assert {head.name: head.kind for head in list_heads(clinic.model)}["prior"] == "prior"
    model = ctclip.load(clinic.model)
    head = model.head("prior")
    assert isinstance(head, PriorHead)
    encoded = model.encode(torch.from_numpy(VolumeStore(clinic.store).voxels("v09"))[None, None])
    with torch.inference_mode():
        assert head.score(encoded).shape == (1, 2)
    assert "prior: a prior" in (clinic.model / "model_card.md").read_text().lower()
    assert head.adaptation is not None
    assert head.adaptation.saw(["p00", "p09"]) == ["p00"], "only the training split is learned"
    (folder / WEIGHTS).write_bytes(b"no")
    write_checksums(folder)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_head(clinic.model, "prior", model.dual)
    save_file(Prior("ridge", 5).state_dict(), folder / WEIGHTS)
    write_checksums(folder)
    (folder / SIZE).write_text("{kind: ridge, dim: 5}")
    with pytest.raises(CheckpointError, match="it belongs to another model"):
        load_head(clinic.model, "prior", model.dual)


def test_a_prior_that_diverges_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior_module, "_loss", lambda prior, *_: prior.linear.weight.sum() * float("nan"))
    pairs = TextPairs(torch.eye(4), torch.eye(4), torch.tensor([False, False, True, True]))
    with pytest.raises(TrainingError, match=r"^mlp prior: the loss or its gradient is not a number"):
        fit_prior(pairs, PriorConfig(kind="mlp", width=8), torch.device("cpu"), 0)
