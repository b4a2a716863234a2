"""The decoder: a flow follows its condition, a killed run produces identical files, and the head is saved, sampled, and
refused with another model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import ctclip
from ctclip.adaptation import autoencoder, decode, resumable
from ctclip.adaptation.decode import estimate
from ctclip.adaptation.decode_config import DecodeConfig
from ctclip.cli import main
from ctclip.config_files import find_config, load_section
from ctclip.errors import CheckpointError, ConfigError
from ctclip.heads.decode import SIZE, WEIGHTS
from ctclip.heads.decoder import (
    Decoder,
)
from ctclip.heads.folder import load_head
from ctclip.heads.prior import WEIGHTS as PRIOR_WEIGHTS
from ctclip.heads.prior import Prior
from ctclip.imagining.imagine import Imagining, decoder_of, imagine
from ctclip.imagining.synthetic import is_synthetic
from ctclip.models.checksums import write_checksums
from ctclip.models.folder import load_model
from tests.unit.drafting.conftest import Clinic, clinic, clinic_files  # noqa: F401
from tests.unit.heads.test_decoder import TINY, tiny
from tests.unit.small import dual_encoder

WORDS = [
    "networks.channels=[8]", "networks.latent=2", "networks.width=[32]", "networks.depth=1", "autoencoder.steps=3",
    "autoencoder.batch=2", "flow.steps=3", "flow.batch=2", "prior.excerpts=1", "prior.epochs=1", "prior.width=8",
    "crop=null",
]  # fmt: skip
TEXT = "A nodule is seen on the left."


def test_a_fraction_of_the_volumes_has_no_condition() -> None:
    decoder, config = tiny((4, 4, 4)), DecodeConfig.model_validate({"networks": TINY, "untold": 0.3})
    embeddings = F.normalize(torch.randn(2000, 4), dim=1)
    torch.manual_seed(0)
    given = decode.drawn_conditions(decoder, embeddings, config)
    told = given.any(dim=1)
    assert told.float().mean() == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(given[told], decoder.condition(embeddings)[told])


@pytest.mark.parametrize("fast", [False, True])
def test_bf16_is_used_where_the_processor_has_it(fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "cpu_multiplies_bf16", lambda: fast)
    model, seen = dual_encoder().eval().requires_grad_(False), list[bool]()

    def loss(self: Decoder, latents: torch.Tensor, conditions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(torch.is_autocast_enabled("cpu"))
        clean = self.denoise(latents, torch.ones(len(latents)), conditions).float()
        return clean.square().mean(), clean

    monkeypatch.setattr(Decoder, "flow_loss", loss)
    for precision, expected in (("auto", fast), ("fp32", False), ("bf16", True)):
        config = DecodeConfig.model_validate(
            {"networks": TINY, "precision": precision, "flow": {"steps": 1, "batch": 2}, "autoencoder": {"steps": 1}}
        )
        decoder = tiny(dim=12)
        latents = torch.zeros(2, 2, *decoder.grid).half()
        estimate(model, decoder, config)
        decode._fit_flow(model, decoder, latents, torch.ones(2, 12), config, tmp_path, precision, 0)
        assert set(seen) == {expected}
        seen.clear()


def test_a_training_of_days_asks_for_a_card() -> None:
    config = DecodeConfig.model_validate({"networks": TINY, "flow": {"steps": 10**8, "batch": 10**4}})
    with pytest.raises(ConfigError, match=r"needs a GPU: on this CPU it would take about \d+ days"):
        estimate(dual_encoder(), tiny(dim=12), config)
    words = {"networks": TINY, "flow": {"steps": 1}, "autoencoder": {"steps": 1}}
    assert 0 < estimate(dual_encoder(), tiny(dim=12), DecodeConfig.model_validate(words)) < 60


@pytest.mark.parametrize("name", ["decode", "phantom_imagine"])
def test_the_recipes_are_read(name: str) -> None:
    config = load_section(DecodeConfig, find_config(name, "adapt"), [])
    assert config.flow.steps > 1000


def test_one_setting_of_a_section_leaves_the_others() -> None:
    flow = DecodeConfig.model_validate({"flow": {"steps": 5}}).flow
    assert (flow.steps, flow.batch, flow.learning_rate) == (5, 32, 2e-4)
    prior = DecodeConfig.model_validate({"prior": {"epochs": 1}}).prior
    assert (prior.kind, prior.excerpts, prior.epochs) == ("diffusion", 5, 1)
    assert DecodeConfig.model_validate({"prior": {"kind": "ridge"}}).prior.kind == "ridge"


@pytest.fixture(scope="module")
def decoded(clinic_files: Clinic, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A model with a decoder, trained by the command."""
    folder = tmp_path_factory.mktemp("decoded")
    shutil.copytree(clinic_files.model, folder / "model")
    assert (
        main(["adapt", "--method", "decode", *WORDS, *given(folder / "model", clinic_files.store, folder / "out")]) == 0
    )
    return folder


def given(model: Path, store: Path, output: Path) -> list[str]:
    return ["--model", str(model), "--store", str(store), "--output", str(output)]


def test_a_killed_command_ends_with_the_same_decoder(
    decoded: Path,
    clinic: Clinic,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = pd.read_csv(decoded / "out" / "decode.csv")
    assert losses.columns.tolist() == ["network", "step", "loss"]
    assert losses["network"].tolist() == ["autoencoder", "flow"]
    assert pd.read_csv(decoded / "out" / "prior.csv").columns.tolist() == ["epoch", "loss", "held_out_loss"]
    loss, calls = Decoder.flow_loss, iter(range(100))

    def killed(*words: object) -> torch.Tensor:
        # The first two calls belong to the estimate.
        if next(calls) == 4:
            raise KeyboardInterrupt
        return loss(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(resumable, "SAVE_EVERY_SECONDS", 0.0)
    words = ["adapt", "--method", "decode", *WORDS, *given(clinic.model, clinic.store, tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "flow_loss", killed)
        main(words)
    assert not (clinic.model / "heads" / "decode").exists()
    monkeypatch.setattr(autoencoder, "autoencoder_loss", None)  # finished training is not repeated
    monkeypatch.setattr(decode, "estimate", lambda *_: 0.0)
    assert main(words) == 0
    for name in (WEIGHTS, SIZE, PRIOR_WEIGHTS):
        again = (clinic.model / "heads" / "decode" / name).read_bytes()
        assert again == (decoded / "model" / "heads" / "decode" / name).read_bytes()


def test_the_encoders_are_frozen(clinic: Clinic, tmp_path: Path) -> None:  # noqa: F811
    loaded = load_model(clinic.model)
    config = load_section(DecodeConfig, find_config("decode", "adapt"), [*WORDS, "consistency.begin=0"])
    decode.run_decode(loaded, clinic.store, tmp_path / "out", config)
    assert all(value.grad is None for value in loaded.model.parameters())


def test_volumes_of_texts_are_drawn_and_seeds_decide(
    decoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["imagine", TEXT, "--model", str(decoded / "model"), "--steps", "2", "--number", "2"]
    assert main([*words, "--output", str(tmp_path / "x.nii.gz")]) == 0
    assert "2 steps, guidance 4" in capsys.readouterr().out
    paths = sorted(tmp_path.glob("x_synthetic_*.nii.gz"))
    assert len(paths) == 2
    assert all(is_synthetic(path) for path in paths)
    images: list[Any] = [nib.load(path) for path in paths]
    volumes = [image.get_fdata().transpose(2, 1, 0) for image in images]
    assert volumes[0].shape == (8, 8, 8)
    assert not np.array_equal(volumes[0], volumes[1])
    loaded = ctclip.load(decoded / "model")
    again = list(imagine(loaded.folder, loaded.head(), ["No nodule is seen.", TEXT], Imagining(seed=1, steps=2)))
    np.testing.assert_array_equal(np.rint(again[1].hu), volumes[1])
    assert [one.method for one in again] == ["decoder", "decoder"]
    dreamt = next(imagine(loaded.folder, loaded.head(), [TEXT], Imagining(steps=1, method="dream")))
    assert "from noise" in dreamt.words


@pytest.mark.parametrize("kind", ["diffusion", "ridge"])
def test_a_volume_has_the_embedding_that_the_prior_draws(
    kind: str, decoded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = decoder_of(load_model(decoded / "model"))
    if kind == "ridge":
        head.prior = Prior("ridge", head.decoder.dim)
    seen: dict[str, Any] = {}

    def sample(conditions: torch.Tensor, seeds: list[int], **more: Any) -> torch.Tensor:
        seen.update(conditions=conditions, seeds=seeds, **more)
        return torch.zeros(1, 1, 2, 2, 2)

    monkeypatch.setattr(head.decoder, "sample", sample)
    assert head.generate(TEXT, 5, steps=3, guidance=1.5).shape == (2, 2, 2)
    wanted = head.prior.sample(head.model.encode_text([TEXT]), guidance=1.5, seed=5)[:, 0]
    torch.testing.assert_close(seen.pop("conditions"), head.decoder.condition(wanted))
    # Only one of the two exaggerates.
    assert seen == {"seeds": [5], "steps": 3, "guidance": 1.5 if kind == "ridge" else 1.0}
    head.generate(None, 5)
    assert seen.pop("guidance") == 1
    if kind == "ridge":
        torch.testing.assert_close(seen["conditions"], head.decoder.condition())
    else:
        torch.testing.assert_close(
            seen["conditions"], head.decoder.condition(head.prior.sample(wanted, guidance=0.0, seed=5)[:, 0])
        )


def test_a_decoder_of_another_model_or_a_stranger_is_refused(decoded: Path, tmp_path: Path) -> None:
    shutil.copytree(decoded / "model", tmp_path / "model")
    folder, dual = tmp_path / "model" / "heads" / "decode", load_model(tmp_path / "model").model
    size, weights = (folder / SIZE).read_text(), (folder / WEIGHTS).read_bytes()
    for before, after, message in (
        ("- 8\n- 8\n- 8\n", "- 8\n- 8\n- 16\n", "generates volumes of 8 x 8 x 16 voxels .* the model has 8 x 8 x 8"),
        ("dim: ", "dim: 1", "it belongs to another model"),
        ("latent: 2", "latent: 3", "missing or damaged"),
        ("- 32\n", "- 4096\n", "missing or damaged"),
        ("depth: 1", "depth: 1000000", "depth"),
        ("shape", "form", "missing or damaged"),
    ):
        assert before in size
        (folder / SIZE).write_text(size.replace(before, after))
        with pytest.raises((CheckpointError, ConfigError), match=message):
            load_head(tmp_path / "model", "decode", dual)
    (folder / SIZE).write_text(size)
    record = (folder / "adaptation.json").read_text()
    (folder / "adaptation.json").write_text(record.replace(load_model(tmp_path / "model").hash, "0" * 12))
    with pytest.raises(CheckpointError, match="'decode' was fitted to another model"):
        decoder_of(load_model(tmp_path / "model"))
    (folder / WEIGHTS).write_bytes(weights[:-40])
    write_checksums(folder)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_head(tmp_path / "model", "decode", dual)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "PLAIN", "--method", "decoder"), "has no decoder; train one with `ctclip adapt --method decode"),
        (("--model", "PLAIN", "--guidance", "3"), "--guidance and --decoder apply only to --method decoder"),
        (("--model", "DECODED", "--decoder", "other"), "no decoder 'other' (it has: decode)"),
        (("--model", "DECODED", "--store", "store"), "add --method dream"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[str, ...], message: str, decoded: Path, clinic_files: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    models = {"PLAIN": str(clinic_files.model), "DECODED": str(decoded / "model")}
    filled = [models.get(word, word) for word in words]
    assert main(["imagine", TEXT, *filled, "--output", str(tmp_path / "x.nii.gz")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())
