"""`ctclip ask`: closed questions about a scan."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.reading import EXPECT, GEOMETRY, HU, LARGEST_GB, SERIES, Expected, Geometry, Trusted, reading_of


def ask(
    scan: Path = typer.Argument(..., help="A volume file or DICOM folder."),
    question: list[str] = typer.Argument(..., help="Is there ...? On which side, in which lobe, how large?"),
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a hub name."),
    prompts: str = typer.Option(None, help="A prompt file, or the name of one; the model's own if not given."),
    terms: str = typer.Option(None, help="A file of terms; that of the model's label set if not given."),
    language: str = typer.Option("english", help="A YAML file, or the name of one in configs/languages."),
    hu: Trusted = HU,
    geometry: Geometry = GEOMETRY,
    expect: Expected = EXPECT,
    series: str = SERIES,
    largest_gb: float = LARGEST_GB,
) -> None:
    """Answer closed questions about a scan by matching answers as prompts. Answers are no measurements and no diagnosis.

    `ctclip ask scan.nii.gz "Is there a pleural effusion on the left?" "How large is the nodule?" --model model`
    """
    import ctclip
    from ctclip.heads.prompts import PromptHead
    from ctclip.inference.ask import Respondent
    from ctclip.inference.model import asking
    from ctclip.report_reading.questions import Questioner
    from ctclip.report_reading.reader import Options
    from ctclip.report_reading.rules import RulesReader

    loaded = ctclip.load(model)
    questioner = Questioner(RulesReader.build(loaded.labels, Options(terms=terms, language=language)))
    asked = [questioner.question(text) for text in question]
    head = loaded.head()
    assert isinstance(head, PromptHead)
    if prompts is not None:
        head = asking(loaded.folder, prompts, list(loaded.labels.names), head)
    respondent = Respondent(loaded.dual, head, questioner)
    ready = loaded.prepare(scan, **reading_of(hu, geometry, expect, series, largest_gb))
    embedding = loaded.encode_volume(ready)[0]
    for text, understood in zip(question, asked, strict=True):
        answer = respondent.answer_question(understood, embedding)
        shares = ", ".join(f"{name} {share:.2f}" for name, share in answer.probabilities.items())
        print(f"{text} {answer.answer} ({understood.label}: {shares})")
    for warning in ready.warnings:
        print(f"warning: {warning}")
    if not head.thresholds():
        print("note: this model is not calibrated: yes and no may lean to one side; `ctclip calibrate` mends it")
