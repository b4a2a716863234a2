"""Report views, batches and labels."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from ctclip.config import AugmentConfig, DataConfig
from ctclip.data.augment import Change, draw_change, rotate, shift
from ctclip.data.dataset import StoredVolumes, Tokenisers, as_read, label_array, some_scans, with_report
from ctclip.data.normalise import to_model_input
from ctclip.data.reports import Report, ReportViews, reports_of
from ctclip.data.sampler import ScanSampler, rarity_weights
from ctclip.errors import DataError
from ctclip.labels import labels_of_columns
from ctclip.language import load_language
from ctclip.phantom.prevalence import FINDINGS
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.sentences import sentences

FINDINGS_TEXT = "The heart is enlarged. No pleural effusion is seen. There is a nodule."
REPORT = Report({"findings": FINDINGS_TEXT, "impression": "Cardiomegaly. Nodule."})
ENGLISH = load_language("english")
SECTIONS = ("findings", "impression")
RANDOM = np.random.default_rng


def test_views_show_what_they_say() -> None:
    view = lambda name: ReportViews({name: 1}, ENGLISH).draw(REPORT, RANDOM(0))  # noqa: E731
    assert view("impression") == "Cardiomegaly. Nodule."
    assert "pleural" not in view("positive")
    assert "enlarged" in view("positive")
    assert view("sentence").count(".") == 1
    assert view("findings") == FINDINGS_TEXT
    assert view("report") == f"{FINDINGS_TEXT} Cardiomegaly. Nodule."


def test_an_empty_section_falls_back_to_the_report() -> None:
    report = Report({"findings": "A nodule.", "impression": ""})
    assert ReportViews({"impression": 1}, ENGLISH).draw(report, RANDOM(0)) == "A nodule."


@pytest.mark.parametrize(
    ("text", "negative"), [("No nodule.", True), ("Heart size is normal.", True), ("A nodule is noted.", False)]
)
def test_negation_by_wording(text: str, negative: bool) -> None:
    assert ENGLISH.negates(text) is negative


def test_batches_do_not_depend_on_ranks_and_never_repeat_a_scan() -> None:
    scans = np.repeat(np.arange(20), 2)
    make = lambda rank, world, start=0: list(  # noqa: E731
        ScanSampler(scans, 8, 6, seed=3, rank=rank, world_size=world, start=start)
    )
    whole = make(0, 1)
    for step, batch in enumerate(whole):
        assert len({scans[row] for row, _ in batch}) == 8
        assert make(0, 2)[step] + make(1, 2)[step] == batch
    assert make(0, 1, start=4) == whole[4:]
    assert {row for batch in whole for row, _ in batch} != set(range(0, 40, 2)), "reconstructions are drawn anew"


def test_too_few_scans_say_what_to_do() -> None:
    with pytest.raises(DataError, match=r"training\.batch=3"):
        ScanSampler(np.arange(3), 8, 1, seed=0, rank=0, world_size=1)


def test_items_are_deterministic_and_without_labels(store) -> None:
    data = StoredVolumes(DataConfig(store=str(store)), "train", seed=1)
    batch, again = data.batch([(0, 5), (1, 0)]), data.batch([(1, 0), (0, 5)])
    assert batch.texts == again.texts[::-1]
    assert torch.equal(batch.hu, again.hu.flip(0))
    assert batch.changes == again.changes[::-1]
    assert batch.hu.shape == (2, 1, 64, 80, 112)
    assert batch.columns == {}
    volumes = batch.to(torch.device("cpu"), data.spec).volumes
    assert -1 <= float(volumes.min()) <= float(volumes.max()) <= 1


def test_a_worker_reads_into_memory_it_shares(store) -> None:
    data, keys = StoredVolumes(DataConfig(store=str(store)), "train", seed=1), [(0, 5), (1, 0)]
    here = data.batch(keys)
    (there,) = DataLoader(data, batch_sampler=[keys], collate_fn=as_read, num_workers=1)
    assert there.hu.is_shared()
    assert not here.hu.is_shared()
    assert torch.equal(here.hu, there.hu)
    assert here.texts == there.texts


def test_shift_moves_and_fills_with_air() -> None:
    voxels = torch.rand(4, 5, 6)
    moved = shift(voxels, (1, -2, 0))
    assert torch.equal(moved[1:, :3], voxels[:3, 2:])
    assert (moved[0] == -1).all()
    assert (moved[:, 3:] == -1).all()


def test_a_store_without_the_split_is_named(store) -> None:
    with pytest.raises(DataError, match="'test'"):
        StoredVolumes(DataConfig(store=str(store)), "test")


def test_a_turn_is_a_turn_in_millimetres() -> None:
    """Compared with SciPy's resampling by the same rotation, written out by hand; voxels are not cubes."""
    from scipy.ndimage import affine_transform

    index = np.stack(np.meshgrid(*map(np.arange, (20, 24, 28)), indexing="ij"), axis=-1)
    blob = np.exp(-((index - np.array([8, 15, 10])) ** 2).sum(axis=-1) / 18).astype(np.float32) * 2 - 1
    spacing, angle, zoom = (3.0, 1.5, 2.0), 0.3, 1.1
    found = rotate(torch.from_numpy(blob), (angle, 0.0, 0.0), zoom, spacing).numpy()
    scale = np.diag(spacing)
    rotation = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    back = np.linalg.inv(scale) @ rotation @ scale / zoom
    centre = (np.array(blob.shape) - 1) / 2
    expected = affine_transform(blob, back, centre - back @ centre, order=1, mode="grid-constant", cval=-1)
    inner = (slice(2, -2),) * 3
    assert np.abs(found - expected)[inner].max() < 1e-4
    assert np.abs(rotate(torch.from_numpy(blob), (0.0, 0.0, 0.0), 1.0, spacing).numpy() - blob).max() < 1e-5


def test_augmentation_is_a_function_of_its_seed() -> None:
    hu = torch.from_numpy(RANDOM(0).integers(-1200, 1200, (1, 1, 8, 10, 12), dtype=np.int16))
    config = AugmentConfig(shift_voxels=1, scale=0.05, noise_hu=10, rotate_degrees=5, zoom=0.05, window_hu=50, crop=0.3)
    spec = PreprocessingSpec.load("phantom")
    one, two, other = (to_model_input(hu, spec, [draw_change(config, RANDOM(seed))]) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.min() >= -1
    assert one.max() <= 1


def test_without_a_change_a_model_is_shown_what_inference_reads(store) -> None:
    stored = StoredVolumes(DataConfig(store=str(store)), "train").store
    name = stored.volumes[0]
    hu = torch.empty((1, 1, *stored.spec.shape), dtype=torch.int16)
    stored.read_into(name, hu.numpy()[0, 0])
    assert np.array_equal(hu[0, 0], stored.read(name))
    for changes in ([], [draw_change(AugmentConfig(), RANDOM(0))]):
        assert np.array_equal(to_model_input(hu, stored.spec, changes)[0, 0], stored.voxels(name))


def test_contrast_changes_about_air() -> None:
    hu = torch.tensor([-1000, 0, 500], dtype=torch.int16).reshape(1, 1, 1, 1, 3)
    change = Change((0.0, 0.0, 0.0), 1.0, (0, 0, 0), 1.1, 0.0, 0)
    found = to_model_input(hu, PreprocessingSpec.load("phantom"), [change])
    torch.testing.assert_close(found.flatten(), torch.tensor([-1.0, 0.1, 0.65]))


def test_a_moved_window_is_that_window_read_anew() -> None:
    hu = torch.linspace(-1000, 1000, 60).round().to(torch.int16).reshape(1, 1, 3, 4, 5)
    spec = PreprocessingSpec.load("phantom")
    change = Change((0.0, 0.0, 0.0), 1.0, (0, 0, 0), 1.0, 0.0, 0, window_hu=(80.0, -120.0))
    expected = ((hu.float() + 920) / 900 - 1).clamp(-1, 1)  # -920 to 880 HU
    torch.testing.assert_close(to_model_input(hu, spec, [change]), expected)


def test_a_crop_leaves_a_box_in_air() -> None:
    hu = torch.zeros((1, 1, 20, 10, 10), dtype=torch.int16)
    spec = PreprocessingSpec.load("phantom")
    change = Change((0.0, 0.0, 0.0), 1.0, (0, 0, 0), 1.0, 0.0, 0, crop=((0.25, 0.1), (0.0, 0.3), (0.0, 0.0)))
    expected = torch.full((20, 10, 10), -1.0)
    expected[5:18, :7] = to_model_input(hu, spec)[0, 0, 0, 0, 0]
    assert torch.equal(to_model_input(hu, spec, [change])[0, 0], expected)
    config = AugmentConfig(crop=0.4)
    gone = np.array([[sum(ends) for ends in draw_change(config, RANDOM(seed)).crop] for seed in range(500)])
    assert 0.39 < gone.max() < 0.4
    assert gone.mean() == pytest.approx(0.2, abs=0.02)


def test_rare_labels_are_drawn_more_often() -> None:
    scans = np.repeat(np.arange(100), 2)
    labels = np.zeros((200, 2))
    labels[scans < 50, 0], labels[scans < 4, 1] = 1, 1
    weights = rarity_weights(labels, scans, 1.0)
    # 1 / 0.04 for the four with the rare label, 1 / 0.5 for the common label and for no label.
    assert weights / weights[-1] == pytest.approx(np.where(np.arange(100) < 4, 12.5, 1.0))
    batches = list(ScanSampler(scans, 10, 400, seed=0, rank=0, world_size=1, weights=weights))
    drawn = np.array([scans[row] for batch in batches for row, _ in batch])
    assert all(len({scans[row] for row, _ in batch}) == 10 for batch in batches)
    assert 2.2 < np.mean(drawn < 4) / 0.04 < 9, "without replacement in a batch the share is below its weight"
    resumed = list(ScanSampler(scans, 10, 400, seed=0, rank=0, world_size=1, weights=weights, start=123))
    assert resumed == batches[123:]


def test_fewer_volumes_are_part_of_more_and_of_whole_scans() -> None:
    rows = pd.DataFrame({"volume": [f"v{i:02d}" for i in range(30)], "scan": [f"s{i // 3}" for i in range(30)]})
    few, more = some_scans(rows, 6, seed=2), some_scans(rows, 15, seed=2)
    assert len(few) == 6
    assert few["scan"].nunique() == 2
    assert set(few["volume"]) < set(more["volume"])
    assert set(some_scans(rows, 6, seed=3)["volume"]) != set(few["volume"])


def test_volumes_without_a_report_are_not_learned_from() -> None:
    rows = pd.DataFrame(
        {"volume": ["a", "b", "c"], "findings": ["A nodule.", " ", ""], "impression": ["", None, "Normal."]}
    )
    assert list(with_report(rows, SECTIONS, "store")["volume"]) == ["a", "c"]
    with pytest.raises(DataError, match="store: split 'train' has no volume with a report"):
        with_report(rows.iloc[1:2], SECTIONS, "store: split 'train'")


def test_sections_and_language_are_the_cohorts_own() -> None:
    """A report with other sections than ours, in another language, of which nothing is known beforehand."""
    rows = pd.DataFrame({"volume": ["a"], "befund": ["Kein Erguss. Ein Rundherd."], "beurteilung": ["Rundherd."]})
    (report,) = reports_of(rows, ("befund", "beurteilung", "anhang"))
    assert report.text() == "Kein Erguss. Ein Rundherd. Rundherd."
    german = ENGLISH.model_copy(update={"name": "german", "negations": ("kein",)})
    assert ReportViews({"positive": 1}, german).draw(report, RANDOM(0)) == "Ein Rundherd. Rundherd."
    assert ReportViews({"beurteilung": 1}, german).draw(report, RANDOM(0)) == "Rundherd."


def test_a_view_that_is_no_section_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no view 'impresion'; choose from report, sentence"):
        DataConfig(views={"impresion": 1})
    with pytest.raises(ValueError, match="at least one view a weight above 0"):
        DataConfig(views={"report": 0})
    assert DataConfig(sections=("befund",), views={"befund": 1}).views == {"befund": 1}


def test_labels_of_a_batch_are_the_columns_of_the_label_set(store) -> None:
    """In the order of the set, whatever that of the table; a union of columns is 1 if any of them is."""
    labels = labels_of_columns("two", [FINDINGS[5], FINDINGS[2]])
    data = StoredVolumes(DataConfig(store=str(store)), "train", columns=("labels",), labels=labels)
    rows = [3, 0, 1]
    batch = data.batch([(row, 0) for row in rows])
    expected = data.table.iloc[rows][[FINDINGS[5], FINDINGS[2]]].to_numpy(float)
    assert np.array_equal(batch.columns["labels"].numpy(), expected)
    assert batch.columns["labels"].dtype == torch.float32
    with pytest.raises(DataError, match="no column for the label 'Gallstones'"):
        label_array(data.table, labels_of_columns("other", ["Gallstones"]))
    with pytest.raises(DataError, match="no label set is named"):
        StoredVolumes(DataConfig(store=str(store)), "train", columns=("labels",))


def test_texts_are_cut_into_the_micro_batches_of_a_step(store) -> None:
    """Tokens of two views per volume in one batch; words of the first view only."""
    data = StoredVolumes(DataConfig(store=str(store), views_per_volume=2, views={"sentence": 1}), "train", seed=1)
    shown: list[list[str]] = []
    words: list[list[str]] = []
    data.tokenisers = Tokenisers(
        lambda texts: shown.append(list(texts)) or {}, lambda texts: words.append(list(texts)) or {}, parts=2
    )
    batch = data.batch([(0, 5), (1, 5), (2, 5), (3, 5)])
    assert shown == [batch.texts[:4], batch.texts[4:]]
    assert words == [batch.texts[0:4:2], batch.texts[4:8:2]]
    assert len(batch.text_identities) == 8


def test_sentences_of_a_batch_are_those_of_whole_reports(store) -> None:
    """Whatever view is drawn. Another split has the numbers of the training sentences."""
    config = DataConfig(store=str(store), views={"impression": 1})
    data = StoredVolumes(config, "train", columns=("sentences",))
    assert list(data.sentences) == sorted(set(data.sentences))
    rows = [3, 0, 1]
    found = data.batch([(row, 0) for row in rows]).columns["sentences"]
    assert found.dtype == torch.int64
    for row, numbers in zip(rows, found.tolist(), strict=True):
        read = [data.sentences[number] for number in numbers if number >= 0]
        assert read == list(dict.fromkeys(sentences(data.reports[row].text())))
        assert len(read) > 3
    held = StoredVolumes(config, "valid", training=False, columns=("sentences",), sentences=data.sentences[::2])
    assert held.sentences == data.sentences[::2]
    known = {
        held.sentences[number] for number in held.batch([(0, 0)]).columns["sentences"].unique().tolist() if number >= 0
    }
    assert known == {*sentences(held.reports[0].text())} & {*data.sentences[::2]}
    assert known
    assert StoredVolumes(config, "train").sentences == ()


def test_a_column_of_the_store_is_not_taken_for_sentences(store, tmp_path) -> None:
    shutil.copytree(store, tmp_path / "store")
    (tmp_path / "store" / "columns" / "sentences").mkdir(parents=True)
    with pytest.raises(DataError, match=r"columns/sentences: .*rename the column"):
        StoredVolumes(DataConfig(store=str(tmp_path / "store")), "train", columns=("sentences",))
