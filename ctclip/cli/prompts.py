"""`ctclip prompts`: list prompt sets, mine one from reports, or check one against a model."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.unused import refuse_unused

prompts = typer.Typer(
    help="List prompt sets, mine one from reports, or check one against a model.", no_args_is_help=True
)


@prompts.command("list")
def list_sets() -> None:
    """List the prompt sets in configs/prompts.

    `ctclip prompts list`
    """
    from ctclip.config_files import configs_folder
    from ctclip.prompts import load_prompts

    for path in sorted((configs_folder() / "prompts").glob("*.yaml")):
        prompt_set = load_prompts(path)
        phrasings = sum(len(prompt_set.side(name, side)) for name in prompt_set.names() for side in (True, False))
        graded = f", {len(prompt_set.graded)} graded findings" if prompt_set.graded else ""
        count = (
            f"{len(prompt_set.names())} abnormalities, {phrasings} phrasings"
            if prompt_set.names()
            else "templates for any name"
        )
        print(f"{path.stem}: {count}, sections {', '.join(prompt_set.sections)}{graded}")


@prompts.command()
def lint(
    prompts: str = typer.Argument(..., help="A prompt set: a YAML file, or the name of one in configs/prompts."),
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a name on the Hugging Face Hub."),
    too_close: float = typer.Option(
        0.95, help="Warn if the positive and negative prompts of a finding have a cosine similarity above this."
    ),
) -> None:
    """Warn of prompts that a model cannot distinguish. Exit code 3: there are warnings.

    `ctclip prompts lint report_style --model runs/demo/train/model`
    """
    from ctclip.inference.lint import check_prompts
    from ctclip.models.folder import load_model
    from ctclip.prompts import load_prompts

    loaded, prompt_set = load_model(model), load_prompts(prompts)
    checks = check_prompts(loaded.model, prompt_set, too_close, prompt_set.names() or loaded.labels.names)
    for check in checks:
        print(f"{check.cosine:+.3f}  {check.abnormality}")
        for warning in check.warnings:
            print(f"        warning: {warning}")
    warned = sum(len(check.warnings) for check in checks)
    print(f"{len(checks)} pairs, {warned} warnings")
    if warned:
        raise typer.Exit(3)


@prompts.command()
def mine(
    context: typer.Context,
    store: Path = typer.Option(..., help="A store written by `ctclip preprocess`, with reports."),
    label_set: str = typer.Option(
        None,
        help="A label set: a YAML file, or the name of one in configs/labels. Default: the label set of the store.",
    ),
    output: Path = typer.Option(Path("mined.yaml"), "--output", "-o", help="The prompt set (YAML) to write."),
    split: str = typer.Option("train", help="Read the reports of this split."),
    reader: str = typer.Option("rules", help="The reader of `ctclip read-reports` that finds labels in sentences."),
    terms: str = typer.Option(
        None,
        help="rules: a YAML file of terms, or the name of one in configs/terms. Default: the terms of the label set.",
    ),
    language: str = typer.Option("english", help="rules: a YAML file, or the name of one in configs/languages."),
    reader_model: Path = typer.Option(None, help="classifier, language-model: the local folder of the text model."),
    max_phrasings: int = typer.Option(24, min=1, help="Maximum number of phrasings for each label, side and section."),
    min_scans: int = typer.Option(2, min=1, help="Leave out phrasings found in the reports of fewer scans than this."),
    others: str = typer.Option(
        None,
        help="The prompt set to borrow from where no report states, or denies, a label. Default: the prompts of the label set.",
    ),
    model: str = typer.Option(
        None,
        "--model",
        "-m",
        help="Keep the phrasings of --others for each label whose mined phrasings do not separate the reports of "
        "--judge better with this model.",
    ),
    judge: str = typer.Option("calibration", help="The split whose reports are used with --model."),
    force: bool = typer.Option(False, "--force", help="Overwrite an existing prompt set."),
) -> None:
    """Mine prompts from training reports: sentences that state each label, and sentences that deny it.

    `ctclip prompts mine --store store --output mined.yaml`

    `ctclip prompts mine --store store --model model --output mined.yaml`

    `ctclip zero-shot --model model --store store --split valid --prompts mined.yaml`

    Only reports are read, no labels.
    """
    from ctclip.errors import DataError
    from ctclip.labels import load_labels, store_labels
    from ctclip.preprocessing.store import VolumeStore
    from ctclip.prompts import load_prompts
    from ctclip.report_reading.mine import SECTIONS, check_prompts_file, mine_prompts, save_prompts
    from ctclip.report_reading.reader import Options
    from ctclip.report_reading.run import build_reader

    if reader == "rules":
        refuse_unused(context, "applies only to --reader classifier and language-model", "reader_model")
    if reader in ("classifier", "language-model"):
        refuse_unused(context, "applies only to --reader rules", "terms")
    if model is None:
        refuse_unused(context, "needs --model", "judge")
    check_prompts_file(output, force=force)
    opened = VolumeStore(store)
    labels = load_labels(label_set) if label_set is not None else store_labels(opened)
    if labels is None:
        raise DataError(f"{store}: has no label set; name one with --label-set")
    options = Options(terms=terms, language=language, model=reader_model)
    built, written = build_reader(reader, labels, options), load_prompts(others or labels.prompts or "generic")
    if model is not None and judge == split:
        raise DataError(f"--judge {judge}: name another split than --split, whose reports are mined")
    mined = mine_prompts(
        opened, labels, built, written, split=split, name=output.stem, most=max_phrasings, least=min_scans
    )
    chosen = mined.prompts
    if model is not None:
        from ctclip.data.dataset import stored_volumes, with_report
        from ctclip.data.reports import reports_of
        from ctclip.inference.choose_prompts import choose_prompts
        from ctclip.models.folder import load_model

        table = stored_volumes(opened, judge).drop_duplicates("scan")
        texts = [
            report.text() for report in reports_of(with_report(table, SECTIONS, f"{store}: split {judge!r}"), SECTIONS)
        ]
        choice = choose_prompts(load_model(model).model, chosen, written, texts, built, f"split {judge}")
        chosen = choice.prompts
        for name, (ours, theirs) in choice.auroc.items():
            kept = "mined" if name in choice.mined else "written"
            print(f"{name}: {kept} (AUROC on {len(texts)} reports: written {ours:.3f}, mined {theirs:.3f})")
    save_prompts(chosen, output, force=force)
    for name, (present, absent) in mined.kept.items():
        print(f"{name}: {present} present, {absent} absent")
    for side in mined.borrowed:
        print(f"note: no sentence states only {side}; its phrasings come from {others or labels.prompts or 'generic'}")
    print(f"prompts: {output} ({mined.prompts.provenance['reports']} reports, {mined.prompts.identity()})")
