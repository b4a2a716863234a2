"""`ctclip imagine`: a dream raises the score of its text, its file has the stated geometry, and is marked as synthetic
everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F

from ctclip.cli import main
from ctclip.errors import ExplanationError
from ctclip.imagining.dream import dream, noise_volume
from ctclip.imagining.synthetic import (
    DESCRIPTION,
    KIND,
    Synthetic,
    is_synthetic,
    page_file,
    to_hu,
    volume_files,
    write_volume,
    write_volumes,
)
from ctclip.models.folder import load_model
from ctclip.preprocessing import PreprocessingError, prepare
from ctclip.preprocessing.outputs import claimed_file
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore
from tests.unit.drafting.conftest import SPEC, Clinic, clinic, clinic_files  # noqa: F401
from tests.unit.small import dual_encoder, spec_of

TEXT = "A nodule is seen on the left."


def test_a_dream_comes_nearer_to_what_is_asked_and_repeats() -> None:
    model = dual_encoder(spec=SPEC).eval()
    wanted = F.normalize(torch.randn(model.config.dim, generator=torch.Generator().manual_seed(3)), dim=0)
    begin = noise_volume(model, 0)
    one, again, other = (dream(model, wanted, begin, steps=8, seed=seed, everywhere=True) for seed in (0, 0, 1))
    assert one.after > one.before + 0.03
    np.testing.assert_array_equal(one.voxels, again.voxels)
    assert not np.array_equal(one.voxels, other.voxels)
    assert (one.voxels.min(), one.voxels.max()) >= (-1, -1)
    assert np.abs(one.voxels).max() <= 1
    recomputed = model.encode_volume(torch.from_numpy(one.voxels)[None, None]) @ wanted
    assert one.after == pytest.approx(float(recomputed.detach()), abs=1e-5)


def test_a_dream_from_a_scan_leaves_its_air_alone() -> None:
    model = dual_encoder(spec=spec_of((16, 16, 16), (4.0, 4.0, 4.0))).eval()
    begin = torch.full((1, 1, 16, 16, 16), -1.0)
    begin[..., 8:] = 0
    wanted = F.normalize(torch.randn(model.config.dim, generator=torch.Generator().manual_seed(3)), dim=0)
    made = dream(model, wanted, begin, steps=5).voxels
    assert (made[..., :5] == -1).all()
    assert (made[..., 9:] != 0).any()


def test_an_encoder_without_a_gradient_is_refused() -> None:
    model = dual_encoder(spec=SPEC).eval()
    encode = model.encode_volume
    model.encode_volume = lambda volume, mask=None: encode(volume.detach())  # type: ignore[method-assign]
    with pytest.raises(ExplanationError, match="no gradient"):
        dream(model, torch.ones(model.config.dim), noise_volume(model, 0), steps=2, everywhere=True)


@pytest.mark.parametrize("published", [False, True])
def test_a_file_lies_where_it_says_and_is_read_back(published: bool, tmp_path: Path) -> None:
    spec = spec_of((6, 10, 14), (5.0, 3.0, 2.0), published=published)
    volume = np.random.default_rng(0).uniform(-1, 1, (6, 14, 10) if published else (6, 10, 14)).astype(np.float32)
    hu = to_hu(volume, spec)
    np.testing.assert_allclose(spec.normalise(hu), volume, atol=1e-5)
    path = tmp_path / "a_synthetic.nii.gz"
    write_volume(path, Synthetic(hu, TEXT, "dream", "hash", 0), spec)
    expected = np.rint(hu.transpose(0, 2, 1) if published else hu)
    image = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), expected)
    # SimpleITK uses LPS: columns to the left, rows to the back, slices up, around the origin.
    np.testing.assert_allclose(image.GetDirection(), np.eye(3).ravel(), atol=1e-6)
    np.testing.assert_allclose(image.GetSpacing(), (2.0, 3.0, 5.0))
    centre = image.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in image.GetSize()])
    np.testing.assert_allclose(centre, 0, atol=1e-5)
    header = nib.load(path).header
    assert header["descrip"].item().decode() == DESCRIPTION
    assert DESCRIPTION.startswith(KIND)
    note = json.loads(header.extensions[0].get_content().decode() if isinstance(header.extensions[0].get_content(), bytes) else header.extensions[0].get_content())  # fmt: skip
    assert (note["text"], note["kind"], note["seed"]) == (TEXT, KIND, 0)
    assert is_synthetic(path)


def test_a_volume_is_the_one_that_the_model_saw(tmp_path: Path) -> None:
    """Read again by the pipeline, the file gives the voxels that were written, within half a HU."""
    spec = PreprocessingSpec("test", spacing=(4.0, 4.0, 4.0), shape=(12, 16, 20))
    volume = np.random.default_rng(0).uniform(-1, 1, (12, 16, 20)).astype(np.float32)
    path = tmp_path / "a_synthetic.nii"
    write_volume(path, Synthetic(to_hu(volume, spec), TEXT, "dream", "hash", 0), spec)
    ready = prepare(path, spec, expect="any")
    np.testing.assert_allclose(ready.voxels, volume, atol=0.6 / 1000)


def test_names_say_synthetic() -> None:
    assert [path.name for path in volume_files(Path("x.nii.gz"), 1)] == ["x_synthetic.nii.gz"]
    assert [path.name for path in volume_files(Path("Synthetic_x.nii"), 1)] == ["Synthetic_x.nii"]
    names = [path.name for path in volume_files(Path("a/x.nii.gz"), 12)]
    assert (names[0], names[-1], len(set(names))) == ("x_synthetic_01.nii.gz", "x_synthetic_12.nii.gz", 12)


def test_the_command_writes_volumes_and_a_page(
    clinic: Clinic,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    words = [
        "imagine",
        TEXT,
        "There is no effusion.",
        "--model",
        str(clinic.model),
        "--output",
        str(tmp_path / "x.nii.gz"),
    ]
    words += ["--store", str(clinic.store), "--steps", "2"]
    assert main(words) == 0
    files = sorted(path.name for path in tmp_path.glob("x*"))
    assert files == ["x_synthetic.html", *(f"x_synthetic_{number}.nii.gz" for number in range(1, 3))]
    page = (tmp_path / "x_synthetic.html").read_text()
    assert KIND in page
    assert page.count("SYNTHETIC") + page.count("synthetic") > 4
    first = (tmp_path / "x_synthetic_1.nii.gz").read_bytes()
    assert "from the mean of the split train" in capsys.readouterr().out
    assert main(words) == 0, "earlier volumes are replaced"
    assert (tmp_path / "x_synthetic_1.nii.gz").read_bytes() == first, "a seed decides"
    mean = np.mean([VolumeStore(clinic.store).voxels(f"v{number:02d}") for number in range(8)], axis=0)
    begun = nib.load(tmp_path / "x_synthetic_1.nii.gz").get_fdata().transpose(2, 1, 0)
    assert np.corrcoef(begun.ravel(), mean.ravel())[0, 1] > 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("The weather is fine.", "--output", "x.nii.gz"),
            "names no finding of the label set clinic (Nodule, Effusion",
        ),
        ((TEXT, "--output", "x.png"), "x.png: end the name in .nii.gz"),
        ((TEXT, "--output", "x.nii.gz", "--store", "other"), "but the model"),
        ((TEXT, "--output", "x.nii.gz", "--store", "STORE", "--split", "nowhere"), "nowhere"),
        ((TEXT, "--output", "mine_synthetic.nii.gz"), "exists and was not written by this command"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    message: str,
    clinic: Clinic,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_synthetic.nii.gz").write_bytes(b"of somebody")
    if "other" in words:
        other = VolumeStore.create(tmp_path / "other", spec_of((8, 8, 8), (3.0, 3.0, 3.0)))
        (tmp_path / "other" / "cohort.parquet").write_bytes((clinic.store / "cohort.parquet").read_bytes())
        assert other.spec.hash != load_model(clinic.model).spec.hash
    given = [str(clinic.store) if word == "STORE" else word for word in words]
    assert main(["imagine", *given, "--model", str(clinic.model), "--steps", "2"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert (tmp_path / "mine_synthetic.nii.gz").read_bytes() == b"of somebody"
    assert not list(tmp_path.glob("x_*"))


def test_two_commands_do_not_mix_their_volumes(tmp_path: Path) -> None:
    output, spec = tmp_path / "x.nii.gz", spec_of((6, 10, 14), (5.0, 3.0, 2.0))
    volumes = [Synthetic(np.zeros(spec.shape, np.float32), TEXT, "dream", "hash", seed) for seed in range(2)]
    with claimed_file(page_file(output)), pytest.raises(PreprocessingError, match="another command is writing it"):
        list(write_volumes(output, volumes, 2, spec))
    assert list(tmp_path.iterdir()) == []
    assert all(is_synthetic(path) for path, _ in write_volumes(output, volumes, 2, spec))
    assert page_file(output).is_file()


def test_each_volume_is_written_before_the_next_is_generated(tmp_path: Path) -> None:
    output, spec = tmp_path / "x.nii.gz", spec_of((6, 10, 14), (5.0, 3.0, 2.0))

    def volumes() -> Iterator[Synthetic]:
        for seed in range(3):
            assert len(list(tmp_path.glob("x_*.nii.gz"))) == seed
            yield Synthetic(np.zeros(spec.shape, np.float32), TEXT, "dream", "hash", seed)

    assert len(list(write_volumes(output, volumes(), 3, spec))) == 3
