"""Planted confounders come first, nothing is significant without one, and the statistics equal SciPy's."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import label
from scipy.stats import false_discovery_control, norm, t, ttest_ind
from sklearn.metrics import log_loss, roc_auc_score

from ctclip.audit.associations import differences, false_discovery, normal_scores
from ctclip.audit.concepts import load_concepts
from ctclip.audit.data_audit import Sheet, audit_data
from ctclip.audit.groups import group_columns
from ctclip.audit.measures import MEASURES, measure
from ctclip.audit.model_audit import audit_errors, errors, fairness, shortcuts
from ctclip.audit.permutations import Moments, Standardised, compare, family_wise, shuffled
from ctclip.drift.facts import Source
from ctclip.phantom.scan import make_scan
from ctclip.preprocessing.geometry import resample
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.volume import Volume

PATIENTS = 400
CONCEPTS = {
    "pacemaker": "device",
    "table": "technique",
    "kernel": "technique",
    "metal": "picture",
    "effusion": "finding",
}


def sheet(seed: int, plant: str = "") -> Sheet:
    random = np.random.default_rng(seed)
    split = random.choice(["train", "valid"], PATIENTS, p=[0.7, 0.3])
    labels = {name: (random.random(PATIENTS) < 0.3).astype(int) for name in ("Cardiomegaly", "Nodule", "Effusion")}
    values = random.normal(0, 1, (PATIENTS, len(CONCEPTS)))
    values[:, 4] += 2 * labels["Effusion"]
    # The model confuses the same findings in both splits.
    values[:, 0] += 0.8 * labels["Nodule"]
    if plant == "device":
        values[:, 0] += 1.0 * labels["Cardiomegaly"] * (split == "train")
    if plant == "kernel":
        values[:, 2] += 0.6 * (split == "train")
    if plant == "table":
        values[:, 1] += 0.6 * labels["Nodule"]
    table = pd.DataFrame(
        {"patient": np.arange(PATIENTS).astype(str), "split": split, "sex": random.choice(["F", "M"], PATIENTS)}
    )
    for name, column in labels.items():
        table[name] = pd.array(column, dtype="Int8")
    return Sheet(table, values, tuple(CONCEPTS), tuple(CONCEPTS.values()))


@pytest.mark.parametrize(
    ("plant", "line"),
    [
        ("device", ("pacemaker", "Cardiomegaly", "train more than valid")),
        ("kernel", ("kernel", "split: train against valid", "all")),
        ("table", ("table", "Nodule", "all")),
    ],
)
def test_a_planted_confounder_stands_in_the_first_lines(plant: str, line: tuple[str, str, str]) -> None:
    for seed in range(5):
        lines = audit_data(sheet(seed, plant))
        first = lines.head(3)[["concept", "group", "where"]].itertuples(index=False, name=None)
        assert line in list(first)
        assert lines["significant"].iloc[0]


def test_scanners_that_differ_do_not_bury_a_shortcut() -> None:
    made = sheet(0)
    random = np.random.default_rng(1)
    sharp, old = random.random(PATIENTS) < 0.5, random.random(PATIENTS) < 0.5
    values = made.values.copy()
    values[:, 2] += 5 * sharp
    table = made.table.assign(
        kernel=np.where(sharp, "sharp", "soft"),
        age=np.where(old, "080Y", "030Y"),
        Nodule=pd.array(np.where(old & (random.random(PATIENTS) < 0.8), 1, made.table["Nodule"]), dtype="Int8"),
        Cardiomegaly=pd.array(np.where(random.random(PATIENTS) < 0.5, sharp, made.table["Cardiomegaly"]), dtype="Int8"),
    )
    lines = audit_data(Sheet(table, values, made.names, made.kinds))
    shortcuts, others = (lines[lines["family"] == family] for family in ("shortcut", "difference"))
    assert lines["family"].tolist() == ["shortcut"] * len(shortcuts) + ["difference"] * len(others)
    # The label that correlates with the kernel, by its column and by its noise; not the label that correlates with age.
    assert set(shortcuts.head(2)["concept"]) == {"kernel", "kernel: sharp"}
    assert set(shortcuts.head(2)["group"]) == {"Cardiomegaly"}
    assert not (shortcuts["concept"] == "kernel: soft").any()
    of_labels = shortcuts[(shortcuts["where"] == "all") & ~shortcuts["group"].str.startswith("split")]
    assert not of_labels["concept"].str.startswith(("age", "sex")).any()
    assert others["adjusted_p"].to_numpy() == pytest.approx(false_discovery_control(others["p"]))
    assert others.iloc[0][["concept", "group"]].tolist() == ["kernel", "kernel: sharp against soft"]


def test_without_a_confounder_hardly_anything_is_significant() -> None:
    """With few patients and rare scanners too, whose comparisons have small p values by chance."""
    alarms = []
    for seed in range(40):
        made, random = sheet(seed), np.random.default_rng([seed, 1])
        rare = random.choice(["a", "b", "c", "d"], PATIENTS, p=[0.85, 0.05, 0.05, 0.05])
        values = np.exp(2 * made.values)
        table = made.table.assign(Nodule=pd.array(random.random(PATIENTS) < 0.08, dtype="Int8"), scanner=rare)
        some = np.sort(random.choice(PATIENTS, 250, replace=False))
        lines = audit_data(
            Sheet(table.iloc[some].reset_index(drop=True), values[some], made.names, made.kinds), permutations=99
        )
        alarms.append(lines.loc[lines["family"] == "shortcut", "significant"].any())
    assert np.mean(alarms) <= 0.125


def test_permuted_differences_are_students() -> None:
    random = np.random.default_rng(0)
    values = random.normal(0, 1, (60, 3))
    values[4, 1] = np.nan
    values[:, 2] = 1.0
    member = np.arange(60) < 25
    members = np.stack([member, random.permutation(member), np.arange(60) < 9])
    tested = Standardised.between(Moments.of(members, values), Moments.of(~members, values))
    for row in (0, 1):
        for column, result in enumerate(tested.differences(row)[:2]):
            sides = [values[side, column][~np.isnan(values[side, column])] for side in (members[row], ~members[row])]
            expected = ttest_ind(*sides)
            assert result is not None
            assert result.p == pytest.approx(expected.pvalue)
            assert result.value / tested.error[row, column] == pytest.approx(expected.statistic)
            assert result.lower / result.value == pytest.approx(
                expected.confidence_interval().low / (sides[0].mean() - sides[1].mean())
            )
            assert result.patients == (len(sides[0]), len(sides[1]))
            normal = norm.isf(t.sf(abs(expected.statistic), expected.df))
            assert tested.normal()[row, column] == pytest.approx(normal, rel=0.01)
    # Columns that do not vary, and groups of nine, are not compared.
    assert tested.differences()[2] is None
    assert tested.differences(2) == [None] * 3
    assert not tested.normal()[2].any()
    less = tested.less(Standardised.between(*(Moments.of(one, values[::-1]) for one in (members, ~members))))
    assert less.error[0, 0] == pytest.approx(np.sqrt(2) * tested.error[0, 0])
    assert less.freedom[0, 0] == pytest.approx(2 * 58)


def test_p_is_the_share_of_permutations_with_a_line_as_large() -> None:
    random = np.random.default_rng(0)
    values = random.normal(0, 1, (60, 30))
    assignments = shuffled(np.arange(60) < 25, random, 450)
    assert (assignments.sum(axis=1) == 25).all()
    assert len(np.unique(assignments, axis=0)) == 451

    def differ(members: np.ndarray) -> Standardised:
        return Standardised.between(Moments.of(members, values), Moments.of(~members, values))

    results, statistics, largest = compare(assignments, differ)
    every = differ(assignments).normal()
    assert [result.value for result in results if result] == pytest.approx(differ(assignments[:1]).value[0].tolist())
    assert largest == pytest.approx(every[1:].max(axis=1))
    line = int(statistics.argmax())
    expected = (1 + (every[1:].max(axis=1) >= every[0, line]).sum()) / 451
    assert family_wise(statistics, largest)[line] == pytest.approx(expected)


def test_differences_are_welchs_by_patient() -> None:
    random = np.random.default_rng(0)
    values, patients = random.normal(0, 1, (90, 2)), np.repeat(np.arange(45), 2).astype(str)
    member = np.repeat(np.arange(45) < 20, 2)
    values[member] += 0.4
    values[3, 1] = np.nan
    means = pd.DataFrame(values).groupby(patients.astype(int)).mean().to_numpy()
    for column, result in enumerate(differences(values, member, patients)):
        expected = ttest_ind(means[:20, column], means[20:, column], equal_var=False)
        assert result is not None
        assert result.p == pytest.approx(expected.pvalue)
        interval = expected.confidence_interval()
        assert result.lower / result.value == pytest.approx(
            interval.low / (means[:20, column].mean() - means[20:, column].mean())
        )
        assert result.patients == (20, 25)
    assert differences(values, np.arange(90) < 10, patients) == [None, None]


def test_scores_and_correction() -> None:
    values = np.array([[5.0], [1.0], [np.nan], [9.0]])
    assert normal_scores(values)[:, 0] == pytest.approx([0, norm.ppf(0.25), np.nan, norm.ppf(0.75)], nan_ok=True)
    assert false_discovery(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.04, 0.04])
    assert len(false_discovery(np.array([]))) == 0


def test_errors_and_fairness() -> None:
    random = np.random.default_rng(0)
    made = sheet(1)
    labels = made.table[["Cardiomegaly", "Nodule"]].to_numpy(dtype=float)
    # Margins contain no information on the women.
    signal = np.where(made.table["sex"] == "F", 0.0, 10.0)[:, None]
    margins = signal * (labels - 0.5) + 3 * random.normal(0, 1, labels.shape)
    labels[0] = np.nan
    loss = errors(labels, margins)
    assert np.isnan(loss[0])
    assert loss[1:].mean() < log_loss(labels[1:, 0], np.full(PATIENTS - 1, labels[1:, 0].mean()))
    # Each class of a label has the same mean error, even if it is rare.
    one = errors(labels[:, :1], margins[:, :1])
    assert np.nanmean(one[labels[:, 0] == 1]) == pytest.approx(np.nanmean(one[labels[:, 0] == 0]))
    lines = audit_errors(made, loss)
    by_sex = lines[lines["concept"] == "sex: F"].iloc[0]
    assert by_sex["significant"]
    assert by_sex["lower"] > 0
    fair = fairness(made.table, labels, margins, resamples=100)
    worst = fair[fair["group"] == "sex"].iloc[0]
    assert worst["value"] == "F"
    assert worst["difference_upper"] < 0
    women = (made.table["sex"] == "F").to_numpy() & ~np.isnan(labels[:, 0])
    expected = np.mean([roc_auc_score(labels[women, c], margins[women, c]) for c in (0, 1)])
    assert worst["mean_auroc"] == pytest.approx(expected)


def test_a_probe_tells_what_embeddings_know() -> None:
    random = np.random.default_rng(0)
    made = sheet(2)
    vectors = random.normal(0, 1, (PATIENTS, 10))
    vectors[:, 3] += 3 * (made.table["sex"] == "F").to_numpy()
    told = shortcuts(made.table, vectors, random.normal(0, 1, (PATIENTS, 5))).iloc[0]
    assert told["embeddings"] > 0.85
    assert abs(told["histogram"] - 0.5) < 0.1


def test_groups_of_a_cohort() -> None:
    table = sheet(0).table.assign(
        age=["063Y", "30", "81.0", "abc"] * 100, note=np.arange(PATIENTS).astype(str), z_spacing="3"
    )
    groups = group_columns(table)
    assert set(groups) == {"split", "sex", "age"}
    assert set(groups["age"]) == {"60 to 74 years", "0 to 39 years", "75 years and older", ""}


def test_strange_columns_are_grouped_or_left_out() -> None:
    table, random = sheet(0).table, np.random.default_rng(0)
    ward = [f"Köln, Haus {number}" for number in random.choice(40, PATIENTS, p=np.linspace(1, 3, 40) / 80)]
    weight = random.normal(75, 15, PATIENTS).round(1)
    groups = group_columns(
        table.assign(
            StudyDate=[f"20{18 + number % 3}0{1 + number % 9}1{number % 10}" for number in range(PATIENTS)],
            weight=np.where(np.arange(PATIENTS) < 20, np.nan, weight),
            AccessionNumber=np.arange(PATIENTS) * 7,
            ward=ward,
            one="here",
            empty=None,
            age=[None] * PATIENTS,
        )
    )
    assert set(groups) == {"split", "sex", "StudyDate", "weight", "ward"}
    # Names of patients are not groups, even with many volumes each.
    names = [f"patient {number // 20}" for number in range(PATIENTS)]
    assert "called" not in group_columns(table.assign(called=names, patient=names))
    assert set(groups["StudyDate"]) == {"2018", "2019", "2020"}
    assert len(set(groups["ward"]) - {""}) == 12
    assert set(groups["ward"]) - {""} <= set(ward)
    low, high = np.quantile(weight[20:], [1 / 3, 2 / 3])
    assert set(groups["weight"]) == {"", f"below {low:g}", f"{low:g} to {high:g}", f"above {high:g}"}
    assert np.flatnonzero(groups["weight"] == f"below {low:g}").tolist() == [
        row for row in range(20, PATIENTS) if weight[row] < low
    ]


def test_the_concepts_that_come_with_it() -> None:
    concepts = load_concepts()
    assert len(concepts.concepts) == 60
    prompts = concepts.prompts()
    assert prompts.side("pacemaker", positive=True)[0].startswith("A pacemaker")
    assert prompts.side("Cardiomegaly", positive=False)[0] == "No Cardiomegaly is seen."


def test_measures_of_a_phantom() -> None:
    made = make_scan(0, 4).reconstructions[0]
    spec, grid = PreprocessingSpec.load("phantom"), made.acquisition.grid
    hu = resample(Volume(made.hu, np.diag([*grid.spacing, 1.0]), "phantom"), spec, "hu")
    source = Source(grid.spacing, grid.shape)
    values = dict(zip(MEASURES, measure(hu, spec, source), strict=True))
    patient = make_scan(0, 4).patient
    assert values["slice spacing"] == grid.spacing[0]
    assert values["body width"] == pytest.approx(2 * patient.half_width, rel=0.12)
    assert 1000 < values["lung volume"] < 8000
    noisy = dict(
        zip(MEASURES, measure(hu + np.random.default_rng(0).normal(0, 40, hu.shape), spec, source), strict=True)
    )
    assert noisy["noise in soft tissue"] > values["noise in soft tissue"] + 15
    assert noisy["sharpness of noise (kernel)"] > values["sharpness of noise (kernel)"]
    raised = hu.copy()
    body = np.flatnonzero((hu > -300).any(axis=(0, 2)))[-1]
    raised[:, min(body + 3, hu.shape[1] - 2) :, 45:67] += 300
    tabled = dict(zip(MEASURES, measure(raised, spec, source), strict=True))
    assert tabled["table: curvature (middle less sides)"] > values["table: curvature (middle less sides)"] + 20
    # Air within the lungs, as in emphysema, contains no information on the scanner.
    bullous = hu.copy()
    regions, _ = label((hu > -950) & (hu < -600))
    lung = regions == np.bincount(regions.ravel())[1:].argmax() + 1
    bullous[lung] = np.random.default_rng(0).uniform(-1010, -950, int(lung.sum()))
    blown = dict(zip(MEASURES, measure(bullous, spec, source), strict=True))
    assert blown["noise in the air"] == pytest.approx(values["noise in the air"], rel=0.02)
