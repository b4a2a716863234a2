"""`ctclip ask`: closed questions about a scan."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.reading import EXPECT, GEOMETRY, HU, LARGEST_GB, SERIES, Expected, Geometry, Trusted, reading_of


def ask(
    scan: Path = typer.Argument(..., help="A volume file, a DICOM folder, or an archive of one of these."),
    question: list[str] = typer.Argument(
        ..., help="A question: is there ...? on which side ...? in which lobe ...? how large ...?"
    ),
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a name on the Hugging Face Hub."),
    prompts: str = typer.Option(
        None,
        help="A prompt set: a YAML file, or the name of one in configs/prompts. Default: the prompts of the model.",
    ),
    terms: str = typer.Option(
        None,
        help="A YAML file of terms, or the name of one in configs/terms. Default: the terms of the model's label set.",
    ),
    language: str = typer.Option("english", help="A YAML file, or the name of one in configs/languages."),
    hu: Trusted = HU,
    geometry: Geometry = GEOMETRY,
    expect: Expected = EXPECT,
    series: str = SERIES,
    largest_gb: float = LARGEST_GB,
) -> None:
    """Answer closed questions about a scan by comparing it with a prompt for each answer. Answers are neither measurements nor a
    diagnosis.

    `ctclip ask scan.nii.gz "Is there a pleural effusion on the left?" "How large is the nodule?" --model model`
    """
    import ctclip
    from ctclip.heads.prompts import PromptHead
    from ctclip.inference.ask import Respondent
    from ctclip.inference.model import asking
    from ctclip.inference.sides import mapped_sides
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
    embedding, locator = loaded.encode_volume(ready)[0], loaded.locator()
    sides = None if locator is None else mapped_sides(loaded.dual, head, locator, ready)
    for text, understood in zip(question, asked, strict=True):
        answer = respondent.answer_question(understood, embedding, sides)
        shares = ", ".join(f"{name} {share:.2f}" for name, share in answer.probabilities.items())
        print(f"{text} {answer.answer} ({understood.label}: {shares})")
    for warning in ready.warnings:
        print(f"warning: {warning}")
    if not head.thresholds():
        print(
            "note: this model is not calibrated, so its answers may lean towards yes or towards no; run `ctclip calibrate`"
        )
