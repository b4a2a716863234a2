"""Label sets: names, aliases and columns, storage in stores, and comparison of two sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from ctclip.cli import main
from ctclip.config_files import configs_folder
from ctclip.errors import ConfigError, DataError
from ctclip.labels import (
    FILE,
    installed_sets,
    keep_labels,
    labels_of_columns,
    load_labels,
    require_same,
    store_labels,
)
from ctclip.phantom.prevalence import FINDINGS
from ctclip.preprocessing.cohorts.table import COLUMNS
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import load_prompts

LUNG: dict[str, Any] = {
    "name": "lung",
    "labels": [
        {"name": "Nodule", "aliases": ["Pulmonary nodule"], "columns": {"other": ["nodule", "scattered_nod"]}},
        "Effusion",
        {"name": "Emphysema", "aliases": ["COPD", "bullae"]},
    ],
}


def test_a_word_in_any_case_finds_its_label() -> None:
    lung = load_labels(LUNG)
    assert lung.names == ("Nodule", "Effusion", "Emphysema")
    assert [lung.resolve(word) for word in ("nodule", "PULMONARY NODULE", "copd", "effusion", "Mass")] == [
        "Nodule", "Nodule", "Emphysema", "Effusion", None,
    ]  # fmt: skip


def test_columns_are_found_by_cohort_then_name_then_alias() -> None:
    lung = load_labels(LUNG)
    # The columns of the other cohort apply only to that cohort, whatever their case in the table.
    table = ["volume", "NODULE", "scattered_nod", "Bullae", "copd"]
    assert lung.columns(table, "other") == {"Nodule": ("NODULE", "scattered_nod"), "Emphysema": ("copd",)}
    assert lung.columns(table) == {"Nodule": ("NODULE",), "Emphysema": ("copd",)}
    assert lung.columns(["scattered_nod"], "other") == {"Nodule": ("scattered_nod",)}
    assert lung.columns(["scattered_nod", "Effusion"]) == {"Effusion": ("Effusion",)}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["Nodule", "Nodule"], "a label is listed twice"),
        (["Nodule", "nodule"], "'nodule' names both 'Nodule' and 'nodule'"),
        ([{"name": "Nodule", "aliases": ["mass"]}, {"name": "Mass"}], "'Mass' names both 'Nodule' and 'Mass'"),
        ([{"name": "A", "aliases": ["x"]}, {"name": "B", "aliases": ["X"]}], "'X' names both 'A' and 'B'"),
        (["\x1b]0;owned\x07"], "contains control characters"),
        ([], "labels"),
        ([""], "labels.0.name"),
        ([{"name": "A", "alias": ["x"]}], "'labels.0.alias'.*'labels.0.aliases'"),
    ],
)
def test_a_set_that_cannot_be_meant_is_refused(labels: list[Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "labels": labels}))
    with pytest.raises(ConfigError, match=rf"mine\.yaml: .*{message}") as refused:
        load_labels(path)
    assert "\n" not in str(refused.value)


def test_identity_is_of_names_and_their_order() -> None:
    lung = load_labels(LUNG)
    renamed = [{"name": "Nodules"}, *LUNG["labels"][1:]]
    turned = LUNG["labels"][::-1]
    assert load_labels(LUNG | {"description": "something else"}).identity == lung.identity
    others = [load_labels(LUNG | {"labels": labels}) for labels in (renamed, turned)]
    assert len({lung.identity, *(other.identity for other in others)}) == 3
    require_same(lung, lung.identity, "table.csv")
    require_same(lung, "", "table.csv")
    for other in others:
        with pytest.raises(ConfigError, match=rf"table\.csv: has the label set '{other.identity}', not 'lung "):
            require_same(lung, other, "table.csv")


def test_a_set_survives_its_file(tmp_path: Path) -> None:
    for labels in (load_labels(LUNG), *installed_sets()):
        labels.save(tmp_path / FILE)
        assert load_labels(tmp_path / FILE) == labels


def test_an_unknown_set_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no label set 'ct_rate' .*ct_rate_18, merlin_30, rad_chestct") as refused:
        load_labels("ct_rate")
    assert "\n" not in str(refused.value)


def test_installed_sets_have_the_prompts_they_name_and_hold_each_other() -> None:
    """CT-RATE's names in their published order, as the phantom writes them; RAD-ChestCT's own names are what the 18 are
    the unions of."""
    ct_rate, rad = load_labels("ct_rate_18"), load_labels("rad_chestct")
    assert ct_rate.names == tuple(FINDINGS)
    assert len(rad.names) == 84
    assert len(load_labels("merlin_30").names) == 30
    parts = {column for label in ct_rate.labels for column in label.columns.get("rad_chestct", ())}
    assert parts <= set(rad.names)
    for labels in installed_sets():
        assert labels.prompts is not None
        prompts = load_prompts(labels.prompts)
        assert not prompts.names() or set(labels.names) <= set(prompts.names())
        assert labels.protocol is None or (configs_folder() / "protocols" / f"{labels.protocol}.yaml").is_file()


def test_a_set_of_a_tables_columns() -> None:
    labels = labels_of_columns("table.csv", ["Gallstones", "Ascites"], "abdomen")
    assert labels.names == ("Gallstones", "Ascites")
    assert labels.body_part == "abdomen"
    with pytest.raises(DataError, match=r"table\.csv: has no label column"):
        labels_of_columns("table.csv", [])
    with pytest.raises(ConfigError, match="names both"):
        labels_of_columns("table.csv", ["Ascites", "ascites"])


def store_of(folder: Path, columns: dict[str, list[float]]) -> VolumeStore:
    """A store of two volumes that have not been written, with label columns."""
    store = VolumeStore.create(folder, PreprocessingSpec.load("phantom"))
    table = pd.DataFrame({name: ["a", "b"] for name in COLUMNS})
    table.assign(**{name: pd.array(values, "Int8") for name, values in columns.items()}).to_parquet(
        folder / "cohort.parquet"
    )
    return store


def test_a_store_keeps_the_set_it_was_given(tmp_path: Path) -> None:
    """Its columns are recognised by the set's aliases; a set without any column in the table is refused."""
    (tmp_path / "lung.yaml").write_text(yaml.safe_dump(LUNG))
    store = store_of(tmp_path / "store", {"COPD": [0, 1], "Pulmonary nodule": [1, 0]})
    assert keep_labels(store, str(tmp_path / "lung.yaml")) == load_labels(LUNG)
    assert store_labels(store) == load_labels(LUNG)
    other = store_of(tmp_path / "other", {"Gallstones": [0, 1]})
    with pytest.raises(DataError, match=r"no column of the label set 'lung' \(it has Gallstones\)"):
        keep_labels(other, str(tmp_path / "lung.yaml"))
    assert not (tmp_path / "other" / FILE).exists()


def test_a_store_without_a_set_has_the_one_that_its_columns_are(tmp_path: Path) -> None:
    """An installed set if its names match, in any order of the table; otherwise a set with the name of the store."""
    ours = store_of(tmp_path / "ours", {name: [0, 1] for name in reversed(FINDINGS)})
    assert store_labels(ours) == load_labels("ct_rate_18")
    assert not (tmp_path / "ours" / FILE).exists(), "asking writes nothing"
    own = store_of(tmp_path / "clinic", {"Gallstones": [0, 1], "Ascites": [1, 1]})
    labels = store_labels(own)
    assert labels is not None
    assert (labels.name, labels.names) == ("clinic", ("Gallstones", "Ascites"))
    assert keep_labels(own, None) == labels
    (tmp_path / "clinic").rename(tmp_path / "moved")
    assert store_labels(VolumeStore(tmp_path / "moved")) == labels, "kept, not derived anew"
    bare = store_of(tmp_path / "bare", {})
    assert store_labels(bare) is None
    assert keep_labels(bare, None) is None
    assert not (tmp_path / "bare" / FILE).exists()


def test_a_label_set_is_made_again_but_never_over_an_edited_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.csv").write_text("volume,Lung nodule\na,1\nb,0\n")
    given = ["labels", "from-csv", str(tmp_path / "table.csv"), "--output", str(tmp_path / "mine.yaml")]
    for _ in range(2):
        assert main(given) == 0
    edited = (tmp_path / "mine.yaml").read_text() + "# mine\n"
    (tmp_path / "mine.yaml").write_text(edited)
    assert main(given) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == edited
