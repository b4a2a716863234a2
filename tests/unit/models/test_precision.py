"""Precisions: what is computed at which precision, what a check saves, and what ``auto`` chooses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import ctclip
from ctclip.cli import main
from ctclip.heads.folder import write_prompt_head
from ctclip.heads.prompts import PromptHead
from ctclip.inference.precision import Agreement, PrecisionError, check_precision, fastest, keep, set_precision
from ctclip.labels import load_labels
from ctclip.models.ctvit import Codebook
from ctclip.models.folder import is_model_folder, load_model, save_model
from ctclip.models.precision import at_precision
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import load_prompts
from tests.unit.small import dual_encoder, spec_of

SPEC = spec_of((8, 8, 8))
NAMES = ("Lung nodule", "Pleural effusion")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prompts = load_prompts("report_style")
    return save_model(
        tmp_path / "model", dual_encoder(spec=SPEC), load_labels("ct_rate_18"),
        write_more=lambda partial: write_prompt_head(partial, prompts, NAMES),
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """20 volumes that differ enough to have the same order at any precision."""
    import pandas as pd

    store, random = VolumeStore.create(tmp_path / "store", SPEC), np.random.default_rng(0)
    names = [f"v{number}" for number in range(20)]
    for name in names:
        store.write(name, random.integers(-1000, 1000, SPEC.shape).astype(np.int16))
    columns = {name: names for name in ("volume", "patient", "scan")}
    table = pd.DataFrame({**columns, "reconstruction": 1, "split": "valid", "path": names, "rescale_slope": 1.0,
                          "rescale_intercept": 0.0} | dict.fromkeys(("clinical_information", "technique", "findings",
                                                                     "impression", "label_source"), ""))  # fmt: skip
    table.to_parquet(store.path / "cohort.parquet", index=False)
    return store.path


def head_of(loaded) -> PromptHead:  # type: ignore[no-untyped-def]
    return PromptHead(loaded.model, load_prompts("report_style"), list(NAMES))


def test_bfloat16_changes_the_encoder_and_nothing_around_it(folder: Path) -> None:
    loaded = load_model(folder)
    volume = torch.rand(2, 1, 8, 8, 8) * 2 - 1
    kinds = []
    loaded.model.volume_encoder.register_forward_hook(lambda *_: kinds.append(torch.is_autocast_enabled("cpu")))
    with torch.inference_mode():
        exact = loaded.model.encode_volume(volume)
        assert set_precision(loaded, "bf16") == "bf16"
        rounded = loaded.model.encode_volume(volume)
        texts = loaded.model.encode_text(["There is an effusion."])
        set_precision(loaded, "fp32")
        assert torch.equal(loaded.model.encode_volume(volume), exact)
        assert torch.equal(loaded.model.encode_text(["There is an effusion."]), texts)
    assert kinds == [False, True, False]
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.1


def test_codes_are_chosen_in_float32() -> None:
    """Rows that bfloat16 cannot distinguish."""
    codebook = Codebook(2, 3).eval()
    codebook.rows.copy_(torch.nn.functional.normalize(torch.tensor([[1.0, 0.001, 0.0], [1.0, 0.0, 0.001]]), dim=-1))
    token = torch.tensor([[[1.0, 0.0, 0.001]]])
    with at_precision("bf16", torch.device("cpu")):
        assert codebook(token)[1].item() == 1
        assert codebook(token[..., [0, 2, 1]])[1].item() == 0


def test_a_check_is_kept_and_auto_heeds_it(folder: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctclip.load(folder).dual.precision == "fp32", "nothing was checked"
    assert main(["check-precision", "--model", str(folder), "--store", str(store), "--count", "18"]) == 0
    printed = capsys.readouterr().out
    assert "18 volumes on " in printed
    assert is_model_folder(folder), "it may be replaced still"
    kept = json.loads((folder / "precision.json").read_text())
    (entry,) = kept["devices"].values()
    results = [Agreement(**result) for result in entry["results"]]
    assert [result.precision for result in results] == ["fp32", "bf16"]
    assert (results[0].change, results[0].correlation) == (0.0, 1.0)
    assert ctclip.load(folder).dual.precision == fastest(results)
    assert f"`ctclip zero-shot --precision auto` uses {fastest(results)}" in printed
    entry["results"][0]["seconds"] = 1.0
    for seconds, change, chosen in ((0.001, 0.001, "bf16"), (0.001, 0.011, "fp32"), (100.0, 0.001, "fp32")):
        entry["results"][1] |= {"seconds": seconds, "change": change, "correlation": 0.9995}
        (folder / "precision.json").write_text(json.dumps(kept))
        assert ctclip.load(folder).dual.precision == chosen
        assert ctclip.load(folder, precision="fp32").dual.precision == "fp32"
    entry["results"][1] |= {"seconds": 0.001, "change": 0.001, "correlation": 0.9985}
    (folder / "precision.json").write_text(json.dumps(kept))
    assert ctclip.load(folder).dual.precision == "fp32"


@pytest.mark.parametrize("spoil", [
    lambda kept: kept | {"weights": "another"}, lambda kept: [], lambda kept: kept | {"devices": 3},
    lambda kept: kept | {"devices": {name: {"results": [{"precision": "fp8"}]} for name in kept["devices"]}},
    lambda kept: kept | {"devices": {f"another {name}": entry for name, entry in kept["devices"].items()}},
])  # fmt: skip
def test_a_check_of_other_weights_or_devices_is_not_heeded(folder: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    loaded = load_model(folder)
    path = keep(loaded, [Agreement("fp32", 0.0, 1.0, 2.0), Agreement("bf16", 0.0, 1.0, 1.0)], 20)
    assert set_precision(loaded) == "bf16"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    assert set_precision(loaded) == "fp32"


def test_figures_of_a_check_are_scipys(folder: Path) -> None:
    loaded, random = load_model(folder), torch.Generator().manual_seed(0)
    batches = [torch.rand(6, 1, 8, 8, 8, generator=random) * 2 - 1 for _ in range(3)]
    head = head_of(loaded)
    results, count = check_precision(loaded, head, batches)
    assert count == 18
    scores, probabilities = [], []
    with torch.inference_mode():
        for name in ("fp32", "bf16"):
            loaded.model.precision = name  # type: ignore[assignment]
            scores.append(torch.cat([head.score(loaded.model.encode(batch)) for batch in batches]))
            probabilities.append(head.probabilities(scores[-1]))
    least = min(spearmanr(scores[0][:, i], scores[1][:, i]).statistic for i in range(len(NAMES)))
    assert results[1].correlation == pytest.approx(least)
    assert results[1].change == pytest.approx(float((probabilities[0] - probabilities[1]).abs().max()))


def test_what_cannot_be_is_one_line(folder: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(folder)
    with pytest.raises(PrecisionError, match="'tf32' is not supported by this device"):
        set_precision(loaded, "tf32")
    with pytest.raises(PrecisionError, match="15 volumes are too few"):
        check_precision(loaded, head_of(loaded), [torch.zeros(5, 1, 8, 8, 8)] * 3)
    assert (
        main(
            [
                "zero-shot",
                "--model",
                str(folder),
                "--store",
                str(store),
                "--precision",
                "tf32",
                "--output",
                str(store.parent / "p"),
            ]
        )
        == 2
    )
    assert "choose auto, fp32, bf16" in capsys.readouterr().err


def test_the_table_says_at_which_precision_it_was_scored(folder: Path, store: Path) -> None:
    import pandas as pd

    given = ["zero-shot", "--model", str(folder), "--store", str(store), "--output", str(store.parent / "p")]
    assert main([*given, "--precision", "bf16"]) == 0
    table = pd.read_csv(store.parent / "p" / "predictions.csv")
    assert set(table["precision"]) == {"bf16"}
    # Another precision counts as a different run.
    assert main([*given, "--precision", "fp32"]) == 2
    assert main([*given, "--precision", "fp32", "--force"]) == 0
    exact = pd.read_csv(store.parent / "p" / "predictions.csv")
    assert 0 < (exact[list(NAMES)] - table[list(NAMES)]).abs().max().max() < 0.05
