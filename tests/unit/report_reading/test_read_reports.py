"""`ctclip read-reports`: tables of many kinds in, labels and sentences out; unread reports are listed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from ctclip.cli import main
from ctclip.config_files import load_config
from ctclip.errors import CtclipError, DataError
from ctclip.evaluation.tables import read_labels
from ctclip.labels import load_labels
from ctclip.language import load_language
from ctclip.phantom import language as phantom_language
from ctclip.phantom.prevalence import FINDINGS
from ctclip.preprocessing.cohorts import label_names, read_cohort
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.report_reading.compare import compare
from ctclip.report_reading.reader import NOTHING, Options, Status
from ctclip.report_reading.reports import load_reports
from ctclip.report_reading.rules import RulesReader
from ctclip.report_reading.run import Values, load_statements, read_all, statements_file, write_readings
from ctclip.report_reading.terms import load_terms
from ctclip.training.run_model import _card, describe_training
from tests.phantom_reports import phantom_reports

LABELS = load_labels("ct_rate_18")


def run(*arguments: str | Path) -> int:
    return main(["read-reports", *map(str, arguments)])


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_reports_of_the_phantom_are_read_as_they_were_drawn(tmp_path: Path) -> None:
    reports, truth = phantom_reports(300, seed=7)
    source = table(
        tmp_path / "reports.csv", [{"VolumeName": f"train_{i}_a_1.nii.gz", **r} for i, r in enumerate(reports)]
    )
    output = tmp_path / "labels.csv"
    assert run(source, "--label-set", "ct_rate_18", "-o", output, "--workers", 1) == 0
    read = read_labels(output, list(FINDINGS)).to_numpy()
    assert f1_score(truth, read == 1, average="macro", zero_division=1) >= 0.98


def test_every_phrasing_of_the_phantom_is_read_for_its_finding_alone() -> None:
    words = dict.fromkeys(("where", "where_cap"), "the right upper lobe") | dict.fromkeys(("side", "Side_cap"), "left")
    words |= dict(on_side="on the left", size="12", severity="mild", Severity="Mild", severity_ly="mildly", Number="A")
    kinds = {"Lymphadenopathy": "mediastinal", "Lung nodule": "solid"}
    reader = RulesReader.build(LABELS, Options())
    for name, (findings, impressions, negatives) in phantom_language.PHRASES.items():
        kind = kinds.get(name, "cardiac pacemaker")
        for texts, status in (((*findings, *impressions), Status.present), (negatives, Status.absent)):
            for text in texts:
                read = reader.read([text.format(**words, kind=kind, Kind=kind.capitalize())])[0]
                assert read.get(name, NOTHING).status is status, text
                others = {other for other, said in read.items() if said.status is not Status.absent} - {name}
                assert not others, text


def test_each_label_comes_with_its_sentence(tmp_path: Path) -> None:
    source = table(
        tmp_path / "r.csv", [{"volume": "v1", "text": "Heart size is normal. Consolidation cannot be excluded."}]
    )
    output = tmp_path / "out.csv"
    assert run(source, "--label-set", "ct_rate_18", "--output", output) == 0
    kept = load_statements(statements_file(output))["v1"]
    assert kept["Cardiomegaly"].status is Status.absent
    assert kept["Cardiomegaly"].sentence == "Heart size is normal."
    assert kept["Consolidation"].status is Status.uncertain
    row = pd.read_csv(output).iloc[0]
    assert row["Cardiomegaly"] == 0
    assert np.isnan(row["Consolidation"])
    assert row["Emphysema"] == 0, "a label that is not mentioned is taken as absent"
    assert row["label_source"].startswith("read from reports by rules: ct_rate_18 ")


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"id": "v1"}', '{"id": "v1", "labels": {"Emphysema": {"status": "perhaps"}}}', "\xff"]
)
def test_damaged_statements_are_told_in_one_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.statements.jsonl"
    path.write_bytes(b"{}\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"labels\.statements\.jsonl: damaged; write it again"):
        load_statements(path)


@pytest.mark.parametrize(
    ("options", "values"),
    [((), (0, None)), (("--uncertain", "1"), (0, 1)), (("--not-mentioned", "empty"), (None, None))],
)
def test_what_is_uncertain_and_what_is_not_mentioned_is_the_users_choice(
    options: tuple[str, ...], values: tuple[int | None, int | None], tmp_path: Path
) -> None:
    source = table(tmp_path / "r.csv", [{"volume": "v1", "text": "Possible consolidation at the left base."}])
    assert run(source, "--label-set", "ct_rate_18", "-o", tmp_path / "out.csv", *options) == 0
    row = pd.read_csv(tmp_path / "out.csv").iloc[0]
    got = [None if pd.isna(row[name]) else int(row[name]) for name in ("Emphysema", "Consolidation")]
    assert got == list(values)


@pytest.mark.parametrize(
    "columns",
    [
        ("VolumeName", "Findings_EN", "Impressions_EN"),
        ("AccessionNo", "report_text", None),
        ("study_id", "Findings", "Conclusion"),
        ("volume", "findings", None),
    ],
)
def test_columns_are_found_under_the_names_that_tables_have(
    columns: tuple[str, str, str | None], tmp_path: Path
) -> None:
    id_column, first, second = columns
    row = {id_column: "one", first: "A nodule is seen."} | ({second: "Emphysema."} if second else {})
    reports = load_reports(table(tmp_path / "r.csv", [row]))
    assert (reports.id_column, reports.ids) == (id_column, ["one"])
    assert reports.texts() == ["A nodule is seen.\nEmphysema." if second else "A nodule is seen."]


def test_a_table_without_reports_and_an_id_with_two_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"r\.csv: has no column of reports \(it has volume, note\)"):
        load_reports(table(tmp_path / "r.csv", [{"volume": "v", "note": "x"}]))
    with pytest.raises(DataError, match=r"volume 'v' has two different reports"):
        load_reports(table(tmp_path / "r.csv", [{"volume": "v", "text": "a"}, {"volume": "v", "text": "b"}]))
    with pytest.raises(DataError, match="volume 'v' has two different reports"):
        load_reports(table(tmp_path / "r.csv", [{"volume": "v.nii.gz", "text": "a"}, {"volume": "v", "text": "b"}]))
    with pytest.raises(DataError, match="no such file"):
        load_reports(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="is a folder, but not a store"):
        load_reports(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ("report", "Impression"),
            r"has whole reports \(report\) and sections \(Impression\); remove one or the other",
        ),
        (("text", "findings"), r"has whole reports \(text\) and sections \(findings\)"),
        (("report", "text"), r"has 2 columns of whole reports \(text, report\); keep one of them"),
        (("impression", "conclusion"), r"has 2 columns of impression \(impression, conclusion\); keep one"),
    ],
)
def test_no_column_of_text_is_ignored(columns: tuple[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_reports(table(tmp_path / "r.csv", [{"volume": "v", columns[0]: "Emphysema.", columns[1]: "A nodule."}]))


FOREIGN = {
    "german": "Keine Pleuraergüsse. Das Herz ist normal groß. In beiden Lungen finden sich keine Rundherde.",
    "turkish": "Trakea ve her iki ana bronş açıktır. Perikardiyal efüzyon izlenmedi. Plevral efüzyon saptanmadı.",
    "spanish": "No se observa derrame pleural. El corazón es de tamaño normal. Nódulo pulmonar de 7 mm.",
    "dutch": "Geen pleuravocht. Het hart is niet vergroot. In de rechter bovenkwab is een nodus van 7 mm te zien.",
    "japanese": "胸水は認めません。心拡大なし。右上葉に7mmの結節を認めます。リンパ節腫大はありません。",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_report_of_another_language_is_said_and_not_guessed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"volume": "english", "text": "A nodule is seen in the left lung."},
        {"volume": "other", "text": FOREIGN[name]},
    ]
    assert run(table(tmp_path / "r.csv", rows), "--label-set", "ct_rate_18", "-o", tmp_path / "out.csv") == 3
    assert (
        "note: report 'other' is not in english, judging by its words: its labels are left empty"
        in capsys.readouterr().out
    )
    labels = pd.read_csv(tmp_path / "out.csv").set_index("volume")[list(FINDINGS)]
    assert labels.loc["other"].isna().all()
    assert labels.loc["english", "Lung nodule"] == 1


def test_telegrams_are_english() -> None:
    reader = RulesReader.build(LABELS, Options())
    assert not reader.is_foreign(
        "Emphysema. Cardiomegaly. 7 mm nodule RUL. Small hiatal hernia. Coronary calcification."
    )


def test_an_empty_report_and_a_very_long_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "Trachea and both main bronchi are open. " * 700 + "A consolidation is seen in the left lower lobe."
    assert len(long.split()) > 4900
    rows = [{"volume": "empty", "text": "Not given."}, {"volume": "long", "text": long}]
    assert run(table(tmp_path / "r.csv", rows), "--label-set", "ct_rate_18", "-o", tmp_path / "out.csv") == 3
    assert "note: report 'empty' is empty: its labels are left empty" in capsys.readouterr().out
    labels = pd.read_csv(tmp_path / "out.csv").set_index("volume")
    assert labels.loc["long", "Consolidation"] == 1
    assert labels.loc["empty", list(FINDINGS)].isna().all()


def test_another_language_is_one_file_away(tmp_path: Path) -> None:
    """As docs/words.md describes it: terms and scopes in German."""
    (tmp_path / "deutsch.yaml").write_text(
        "name: deutsch\nnegations: [kein, keine]\ncommon: [der, die, das, ist, in, und, keine, kein, mit]\n"
        "scopes:\n  absent_before: [kein|keine|keinen, kein nachweis von]\n  absent_after: [nicht]\n"
        "  uncertain_after: [nicht auszuschließen]\n  verbs: [ist, sind]\n  joins: [und, oder]\n"
    )
    (tmp_path / "begriffe.yaml").write_text(
        "name: begriffe\nlabels:\n  Rundherd: {present: [rundherd*]}\n  Erguss: {present: [pleuraerg*, erguss|ergüsse]}\n"
    )
    labels = load_labels({"name": "lunge", "labels": ["Rundherd", "Erguss"]})
    reader = RulesReader(
        load_terms(labels, str(tmp_path / "begriffe.yaml")), load_language(str(tmp_path / "deutsch.yaml"))
    )
    text = "Keine Pleuraergüsse. In der Lunge ist ein Rundherd nicht auszuschließen."
    assert not reader.is_foreign(text)
    assert reader.is_foreign("The heart is enlarged and a nodule is seen in the left lung.")
    assert {name: said.status.value for name, said in reader.read([text])[0].items()} == {
        "Erguss": "absent", "Rundherd": "uncertain",
    }  # fmt: skip


def test_a_language_without_scopes_and_terms_of_other_labels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("name: short\nnegations: [kein]\n")
    with pytest.raises(CtclipError, match="the language 'short' has no scopes"):
        RulesReader.build(LABELS, Options(language=str(tmp_path / "short.yaml")))
    (tmp_path / "terms.yaml").write_text("name: t\nlabels: {Nodule: {present: [nodule]}}\n")
    with pytest.raises(CtclipError, match=r"terms\.yaml: 'Nodule' is not a label of 'ct_rate_18'"):
        load_terms(LABELS, str(tmp_path / "terms.yaml"))
    one = load_labels({"name": "one", "labels": ["Nodule", "Cyst"]})
    with pytest.raises(CtclipError, match=r"terms\.yaml: has no terms for 'Cyst'"):
        load_terms(one, str(tmp_path / "terms.yaml"))


def test_workers_read_what_one_process_reads(tmp_path: Path) -> None:
    reports, _ = phantom_reports(1300, seed=3)
    source = table(tmp_path / "r.csv", [{"VolumeName": f"v{i}", **report} for i, report in enumerate(reports)])
    one, two = (read_all(load_reports(source), LABELS, "rules", Options(), workers) for workers in (1, 2))
    assert one.readings == two.readings


def test_labels_of_another_run_are_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "labels.csv"
    first = table(tmp_path / "a.csv", [{"volume": "v", "text": "A nodule is seen."}])
    other = table(tmp_path / "b.csv", [{"volume": "w", "text": "No nodule is seen."}])
    arguments = ("--label-set", "ct_rate_18", "-o", output)
    assert run(first, *arguments) == 0
    assert run(first, *arguments) == 0, "the same run may be repeated"
    kept = output.read_bytes()
    assert run(other, *arguments) == 2
    assert "holds labels of another reader, of other reports or with other values" in capsys.readouterr().err
    assert run(first, *arguments, "--not-mentioned", "empty") == 2
    assert output.read_bytes() == kept
    assert run(other, *arguments, "--force") == 0
    precious = tmp_path / "mine.csv"
    precious.write_text("volume,x\n")
    assert run(first, "--label-set", "ct_rate_18", "-o", precious) == 2
    assert precious.read_text() == "volume,x\n"


def test_reports_and_the_labels_to_compare_with_are_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "a.csv", [{"volume": "v", "text": "A nodule is seen."}])
    against = tmp_path / "theirs.csv"
    against.write_text("volume,Lung nodule\nv,0\n")
    before = source.read_bytes(), against.read_bytes()
    for output in (source, tmp_path / "." / "theirs.csv"):
        assert run(source, "--label-set", "ct_rate_18", "--against", against, "-o", output, "--force") == 2
        assert "is read by this command, which would replace it; give another --output" in capsys.readouterr().err
    assert (source.read_bytes(), against.read_bytes()) == before


def test_two_readings_are_compared_label_by_label(tmp_path: Path) -> None:
    """Compared with figures computed by hand: 4 reports; for nodules the two readers state 1,1,0,0 and 1,0,0,0."""
    texts = ["A nodule is seen.", "There is a nodule.", "No nodule is seen.", "The lungs are clear."]
    source = table(tmp_path / "r.csv", [{"volume": f"v{i}", "text": text} for i, text in enumerate(texts)])
    theirs = pd.DataFrame(
        {"volume": [f"v{i}" for i in range(4)], "Lung nodule": [1, 0, 0, 0], "Emphysema": [0, 0, 0, 0]}
    )
    theirs.to_csv(tmp_path / "theirs.csv", index=False)
    result = read_all(load_reports(source), LABELS, "rules", Options())
    agreements, disagreements = compare(result, tmp_path / "theirs.csv", Values())
    by_name = {agreement.label: agreement for agreement in agreements}
    nodule = by_name["Lung nodule"]
    # Observed agreement 3/4; by chance 2/4 * 1/4 + 2/4 * 3/4 = 1/2; kappa (0.75 - 0.5) / (1 - 0.5).
    assert (nodule.agreement, nodule.kappa, nodule.f1) == (0.75, pytest.approx(0.5), pytest.approx(2 / 3))
    assert (by_name["Emphysema"].kappa, by_name["Emphysema"].f1) == (None, None)
    assert [(d.report, d.ours, d.theirs, d.our_sentence) for d in disagreements] == [("v1", 1, 0, "There is a nodule.")]
    write_readings(result, tmp_path / "ours.csv", Values())
    again, none = compare(result, tmp_path / "ours.csv", Values())
    assert not none
    assert {agreement.agreement for agreement in again} == {1.0}
    (tmp_path / "other.csv").write_text("volume,Lung nodule\nelsewhere,1\n")
    with pytest.raises(DataError, match="shares no report"):
        compare(result, tmp_path / "other.csv", Values())


def test_labels_that_were_read_label_a_cohort(tmp_path: Path) -> None:
    """In CT-RATE's layout, and as a table of paths: the labels are found, and the reader is recorded."""
    texts = ("Emphysema.", "A nodule is seen.")
    empty = {"ClinicalInformation_EN": "", "Technique_EN": "", "Impressions_EN": ""}
    rows = [{"VolumeName": f"train_{i}_a_1.nii.gz", "Findings_EN": text, **empty} for i, text in enumerate(texts)]
    for row in rows:
        scan = tmp_path / "dataset" / "train" / row["VolumeName"]
        scan.parent.mkdir(parents=True, exist_ok=True)
        scan.touch()
    source = table(tmp_path / "dataset" / "reports.csv", rows)
    assert run(source, "--label-set", "ct_rate_18", "-o", tmp_path / "dataset" / "labels.csv") == 0
    cohort = read_cohort(tmp_path).table.set_index("volume")
    assert label_names(cohort.reset_index()) == list(FINDINGS)
    assert cohort["Lung nodule"].tolist() == [0, 1]
    assert cohort["Emphysema"].tolist() == [1, 0]
    assert cohort["label_source"].str.startswith("read from reports by rules").all()
    (tmp_path / "phantom.json").write_text("{}")
    sources = read_cohort(tmp_path).table["label_source"]
    assert sources.str.startswith("synthetic, read from reports by rules").all(), "a phantom stays one"
    paths = pd.read_csv(tmp_path / "dataset" / "labels.csv").assign(path=lambda t: "train/" + t["VolumeName"])
    paths.drop(columns="VolumeName").to_csv(tmp_path / "dataset" / "scans.csv", index=False)
    again = read_cohort(tmp_path / "dataset" / "scans.csv").table
    assert label_names(again) == list(FINDINGS)
    assert again["label_source"].str.startswith("read from reports by rules").all()


@pytest.mark.parametrize(
    ("sources", "reads", "stated", "synthetic"),
    [
        (["read from reports by rules: x"] * 2, True, "read from reports by rules: x", False),
        (["synthetic, read from reports by rules: x", "synthetic"], True, "synthetic; synthetic, read from reports by rules: x", True),
        (["CT-RATE labels CSV", ""], True, "CT-RATE labels CSV", False),
        (["read from reports by rules: x"], False, "", False),
    ],
)  # fmt: skip
def test_a_model_states_who_read_the_labels_it_learned_from(
    sources: list[str], reads: bool, stated: str, synthetic: bool
) -> None:
    config = load_config("phantom_labels" if reads else "phantom_tiny")
    assert config.reads_labels is reads
    store = SimpleNamespace(path=Path("store"), spec=SimpleNamespace(spacing=(1.0, 1.0, 1.0)))
    data = SimpleNamespace(store=store, table=pd.DataFrame({"label_source": sources}))
    cohort = SimpleNamespace(seen=sources, patients=sources)
    facts = describe_training(config, data, cohort, LABELS)  # type: ignore[arg-type]
    assert (facts.label_source, facts.synthetic) == (stated, synthetic)
    assert ("labels: " in _card(config, facts)) is bool(stated)


def test_the_comparison_is_written_whole(tmp_path: Path) -> None:
    source = table(tmp_path / "r.csv", [{"volume": "v", "text": "A nodule is seen."}])
    (tmp_path / "theirs.csv").write_text("volume,Lung nodule\nv,0\n")
    arguments = ("--label-set", "ct_rate_18", "-o", tmp_path / "out.csv", "--against", tmp_path / "theirs.csv")
    (tmp_path / "out.comparison.json").write_text("mine")
    assert run(source, *arguments) == 2
    assert (tmp_path / "out.comparison.json").read_text() == "mine"
    (tmp_path / "out.comparison.json").unlink()
    assert run(source, *arguments) == run(source, *arguments) == 0
    values = json.loads((tmp_path / "out.comparison.json").read_text())
    assert values["disagreements"] == [
        {"report": "v", "label": "Lung nodule", "ours": 1, "theirs": 0, "our_sentence": "A nodule is seen.", "their_sentence": ""}
    ]  # fmt: skip


def test_what_cannot_be_written_is_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises((DataError, PreprocessingError), match=r"\.csv or \.parquet"):
        write_readings(read_all(load_reports(table(tmp_path / "r.csv", [{"id": "1", "text": "Emphysema."}])), LABELS, "rules", Options()), tmp_path / "out.xlsx", Values())  # fmt: skip
