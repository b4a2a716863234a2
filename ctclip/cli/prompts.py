"""`ctclip prompts`: list prompt sets, or check one against a model."""

from __future__ import annotations

import typer

prompts = typer.Typer(help="List prompt sets, or check one against a model.", no_args_is_help=True)


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
        graded = f", {len(prompt_set.graded)} sizes" if prompt_set.graded else ""
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
