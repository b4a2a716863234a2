"""The slices of an example go through a finding, at the position of its mask according to nibabel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from ctclip.evaluation import figures
from ctclip.evaluation.figures import Focus
from ctclip.inference.focus import smallest_finding
from ctclip.labels import load_labels
from ctclip.preprocessing import PreprocessingSpec, prepare
from ctclip.preprocessing.store import VolumeStore

NAMES = load_labels("ct_rate_18").names


@pytest.mark.parametrize("published", [False, True])
def test_a_focus_lies_in_its_mask(cohort: Path, published: bool) -> None:
    """For both orders of indices in stored volumes."""
    spec = replace(
        PreprocessingSpec.load("phantom"),
        published_geometry=published,
        interpolation="linear" if published else "antialiased",
    )
    of = smallest_finding(cohort, cohort / "masks", spec)
    looked_at = 0
    for path in sorted((cohort / "masks").rglob("*_findings.nii.gz"))[:6]:
        volume = path.name.removesuffix("_findings.nii.gz")
        focus = of(volume)
        mask = nib.load(path)
        bits = np.asarray(mask.dataobj).astype(int)
        counts = {name: int((bits >> number & 1).sum()) for number, name in enumerate(NAMES)}
        if focus is None:
            assert sum(counts.values()) == 0
            continue
        scan = next((cohort / "dataset").rglob(f"{volume}.nii.gz"))
        ready = prepare(scan, spec)
        # The mask is [slice, row, column]; a published volume [slice, column, row].
        order = [0, 2, 1] if published else [0, 1, 2]
        assert focus.mask.transpose(order).shape == ready.stored.shape
        lps = (ready.affine @ [*np.array(focus.at)[order], 1])[:3]
        voxel = np.rint(np.linalg.inv(mask.affine) @ [-lps[0], -lps[1], lps[2], 1])[:3].astype(int)
        # Within one voxel, because the grids differ.
        low = np.maximum(voxel - 1, 0)
        near = bits[tuple(slice(a, b + 2) for a, b in zip(low, voxel, strict=True))]
        assert (near >> NAMES.index(focus.finding) & 1).any()
        # No other finding is much smaller.
        assert counts[focus.finding] <= 2 * min(count for count in counts.values() if count)
        looked_at += 1
    assert looked_at >= 3
    assert of("no such volume") is None


def test_a_volume_of_a_store_has_the_grid_of_its_focus(cohort: Path, store: Path) -> None:
    kept = VolumeStore(store)
    of = smallest_finding(cohort, cohort / "masks", kept.spec)
    for volume in kept.volumes[:3]:
        focus = of(volume)
        assert focus is None or focus.mask.shape == kept.read(volume).shape


@pytest.mark.parametrize("focused", [False, True])
def test_the_slices_go_through_the_focus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, focused: bool) -> None:
    hu = np.full((20, 24, 28), -800, np.int16)
    mask = np.zeros(hu.shape, bool)
    mask[4:6, 6:8, 5:7] = True
    hu[mask] = 100
    drawn = []
    save = figures._save

    def kept(figure: object, path: Path) -> None:
        drawn.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "_save", kept)
    windows = {"lung window": (-1350.0, 150.0), "soft-tissue window": (-160.0, 240.0)}
    focus = Focus("Lung nodule", mask) if focused else None
    figures.example(tmp_path / "a.png", hu, (3.0, 1.0, 1.0), "A nodule.", [("Lung nodule", 0.5, 1)], windows, focus)
    FigureCanvasAgg(drawn[0])
    panels = [axis for axis in drawn[0].axes if axis.images]
    assert len(panels) == 6
    # The nodule is in each slice through it, and in no slice through the middle.
    assert [bool((panel.images[0].get_array() == 100).any()) for panel in panels] == [focused] * 6
    titles = [panel.get_title() for panel in panels]
    assert titles[0] == f"axial, slice {5 if focused else 11} of 20\nlung window, -1350 to 150 HU"
    letters = [{text.get_text() for text in panel.texts} for panel in panels]
    assert letters[:3] == [{"R", "L", "A", "P"}, {"R", "L", "S", "I"}, {"A", "P", "S", "I"}]
    assert Image.open(tmp_path / "a.png").width > 800
