"""`ctclip models`: the named model sizes and what they cost."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.unused import refuse_unused


def models(
    context: typer.Context,
    names: list[str] = typer.Argument(
        None, help="Names of sizes in configs/models, or YAML files. Default: all of configs/models."
    ),
    spec: str = typer.Option("ct_224", help="Preprocessing spec that gives the size of the volumes."),
    model: Path = typer.Option(None, "--model", "-m", help="Instead, describe this model folder and its heads."),
) -> None:
    """Show the parameters and operations of each model size, or describe one model folder.

    `ctclip models`

    A size stands for the whole `model:` section of a recipe: `model: base`.
    """
    from ctclip.errors import ConfigError

    if model is not None:
        refuse_unused(context, "does not apply to --model, which has its own", "spec")
        if names:
            raise ConfigError("give either names of sizes or --model")
        _describe(model)
        return
    from rich.console import Console
    from rich.table import Table

    from ctclip.config_files import configs_folder, load_size
    from ctclip.models.sizes import measure
    from ctclip.preprocessing.spec import PreprocessingSpec

    sizes = names or ["tiny", "small", "base", "large", "ct_clip"]
    table = Table(title=f"models of {configs_folder() / 'models'}" if not names else None)
    for head in ("model", "encoder", "voxels", "tokens", "volume side", "text side", "GFLOP per volume"):
        table.add_column(head, justify="left" if head in ("model", "encoder") else "right", no_wrap=True)
    for name in sizes:
        size = measure(load_size(name), PreprocessingSpec.load("ct_clip" if name == "ct_clip" else spec))
        shape = "×".join(map(str, size.shape))
        table.add_row(
            name, size.kind, shape, str(size.tokens), f"{size.volume_parameters / 1e6:.1f} M",
            f"{size.text_parameters / 1e6:.1f} M", f"{size.flops / 1e9:.0f}",
        )  # fmt: skip
    # A table that is piped is not cut at 80 columns.
    Console(width=max(Console().width, 100)).print(table)


def _describe(folder: Path) -> None:
    from ctclip.inference.model import load

    loaded = load(folder)
    facts = loaded.folder.trained_on.model_dump(exclude_none=True)
    print(loaded)
    print(
        "trained on: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value != "")
    )
    for head in loaded.heads:
        calibrated = "calibrated" if head.calibrated else "not calibrated"
        learned = "" if head.supervision == "none" else f", {head.supervision}"
        print(f"head {head.name}: {head.kind}, {len(loaded.head(head.name).names)} names, {calibrated}{learned}")
