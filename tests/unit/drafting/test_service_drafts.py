"""Drafts of the service: by a caption head, or otherwise the report of the nearest scan, never that of the same
patient."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import ctclip
from ctclip.drafting.writers import Detected
from ctclip.errors import CtclipError
from ctclip.inference.index import Index
from ctclip.inference.model import Model
from ctclip.preprocessing.store import VolumeStore
from ctclip.serve.drafts import Drafts
from tests.unit.drafting.conftest import VOLUMES, Clinic, report


def check_caption_drafts(model: Model, store: VolumeStore) -> None:
    """With a model whose caption head has learned the clinic's reports; ``test_caption_training`` trains one."""
    drafts = Drafts(model, model.head(), None)
    assert drafts.method == "caption"
    encoded = model.encode(torch.from_numpy(store.voxels("v01"))[None, None])
    answer = drafts.of(encoded)
    (detected,) = Detected.by(model.head(), encoded)
    written = [sentence for section in ("findings", "impression") for sentence in answer[section]]
    assert " ".join(sentence["text"] for sentence in written).lower() == " ".join(report(1)).lower().replace(
        " on the left", ""
    ), "of 8 reports no side is sure"
    nodule, effusion = (sentence["claims"][0] for sentence in answer["findings"])
    assert (nodule["finding"], nodule["status"], nodule["side"]) == ("Nodule", "present", None)
    assert nodule["probability"] == pytest.approx(detected.probabilities["Nodule"], abs=1e-4)
    assert nodule["denied"] is not detected.present["Nodule"]
    assert effusion["probability"] == pytest.approx(1 - detected.probabilities["Effusion"], abs=1e-4)
    assert answer["copied_from"] is None


def test_without_one_the_report_of_the_nearest_other_patient_is_copied(clinic: Clinic) -> None:
    pytest.importorskip("faiss")
    model, store = ctclip.load(clinic.model), VolumeStore(clinic.store)
    names = [f"v{number:02d}" for number in range(VOLUMES)]
    with torch.inference_mode():
        vectors = np.stack([model.encode_volume(torch.from_numpy(store.voxels(name))[None, None])[0].numpy() for name in names])  # fmt: skip
    index = Index.build(pd.read_parquet(clinic.store / "cohort.parquet"), vectors, None, model.folder.hash)
    drafts = Drafts(model, model.head(), index)
    encoded = model.encode(torch.from_numpy(store.voxels("v05"))[None, None])
    near = np.argsort(-vectors @ vectors[5])
    assert near[0] == 5
    for patient, expected in ((None, 5), ("p05", int(near[1]))):
        answer = drafts.of(encoded, patient)
        assert answer["method"] == "retrieval"
        assert answer["copied_from"] == {"volume": names[expected], "similarity": pytest.approx(vectors[expected] @ vectors[5], abs=1e-5)}  # fmt: skip
        assert " ".join(one["text"] for one in answer["findings"]) == report(expected)[0]


def test_where_nothing_can_write_it_is_one_line(clinic: Clinic) -> None:
    model = ctclip.load(clinic.model)
    drafts = Drafts(model, model.head(), None)
    assert drafts.method is None
    with pytest.raises(CtclipError, match="no caption head") as error:
        drafts.of(model.encode(torch.zeros(1, 1, *model.spec.shape)))
    assert "\n" not in str(error.value)
