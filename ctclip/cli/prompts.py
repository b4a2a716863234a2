"""`ctclip prompts`: look at prompt sets."""

from __future__ import annotations

import typer

prompts = typer.Typer(help="Prompt sets: list them, and let a model judge one.", no_args_is_help=True)


@prompts.command("list")
def list_sets() -> None:
    """The prompt sets of configs/prompts.

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
    prompts: str = typer.Argument(..., help="A prompt file, or the name of one in configs/prompts."),
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a hub name."),
    too_close: float = typer.Option(0.95, help="Warn of pairs whose sides have a larger cosine."),
) -> None:
    """Warn of prompts a model cannot tell apart. Exit code 3: there are warnings.

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
