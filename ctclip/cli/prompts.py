"""`ctclip prompts`: list prompt sets, mine one from reports, or check one against a model."""

from __future__ import annotations

from pathlib import Path

import typer

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
    """Warn of prompts that a model cannot tell apart. Exit code 3: there are warnings.

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
    store: Path = typer.Option(..., help="A store of `ctclip preprocess`; its training reports are read."),
    labels: str = typer.Option(None, "--labels", help="A label set; the store's own if not given."),
    output: Path = typer.Option(Path("mined.yaml"), "--output", "-o", help="The prompt set to write."),
    split: str = typer.Option("train", help="Whose reports are read."),
    reader: str = typer.Option("rules", help="rules, or another reader of `ctclip read-reports`."),
    terms: str = typer.Option(None, help="rules: a file of terms; the label set's own if not given."),
    language: str = typer.Option("english", help="rules: a YAML file, or the name of one in configs/languages."),
    model: Path = typer.Option(None, "--model", "-m", help="classifier, language-model: a local model folder."),
    most: int = typer.Option(24, min=1, help="Phrasings of a label, side and section at most."),
    least: int = typer.Option(2, min=1, help="Scans whose reports must have a phrasing."),
    others: str = typer.Option(
        None, help="The prompt set that lends a side no report states; that of the label set if not given."
    ),
    force: bool = typer.Option(False, "--force", help="Replace a prompt set."),
) -> None:
    """Prompts from training reports: how they state each label, and how they deny it.

    `ctclip prompts mine --store store --output mined.yaml`

    `ctclip zero-shot --model model --store store --split valid --prompts mined.yaml`

    Reports alone are read, no label of a volume.
    """
    from ctclip.errors import DataError
    from ctclip.labels import load_labels, store_labels
    from ctclip.preprocessing.outputs import check_file, file_holds
    from ctclip.preprocessing.store import VolumeStore
    from ctclip.prompts import load_prompts
    from ctclip.report_reading.mine import mine_prompts, save_prompts
    from ctclip.report_reading.reader import Options
    from ctclip.report_reading.run import build_reader

    check_file(output, file_holds(b"provenance:"), force=force)
    opened = VolumeStore(store)
    label_set = load_labels(labels) if labels is not None else store_labels(opened)
    if label_set is None:
        raise DataError(f"{store}: keeps no label set; name one with --labels")
    options = Options(terms=terms, language=language, model=model)
    mined = mine_prompts(
        opened, label_set, build_reader(reader, label_set, options),
        load_prompts(others or label_set.prompts or "generic"),
        split=split, name=output.stem, most=most, least=least,
    )  # fmt: skip
    save_prompts(mined.prompts, output)
    for name, (present, absent) in mined.kept.items():
        print(f"{name}: {present} present, {absent} absent")
    for side in mined.borrowed:
        print(f"note: no report states {side} alone: phrasings of {others or label_set.prompts or 'generic'} stand in")
    print(f"prompts: {output} ({mined.prompts.provenance['reports']} reports, {mined.prompts.identity()})")
