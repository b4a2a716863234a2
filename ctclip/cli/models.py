"""`ctclip models`: the named sizes and what they cost."""

from __future__ import annotations

import typer


def models(
    names: list[str] = typer.Argument(None, help="Names in configs/models or YAML files; all named ones if not given."),
    spec: str = typer.Option("ct_224", help="Preprocessing spec whose volumes are counted."),
) -> None:
    """Parameters and operations of the named model sizes.

    `ctclip models`

    A size stands for the whole `model:` section of a recipe: `model: base`.
    """
    from rich.console import Console
    from rich.table import Table

    from ctclip.config_files import configs_folder, load_size
    from ctclip.models.sizes import measure
    from ctclip.preprocessing.spec import PreprocessingSpec

    wanted = names or ["tiny", "small", "base", "large", "ct_clip"]
    table = Table(title=f"models of {configs_folder() / 'models'}" if not names else None)
    for head in ("model", "encoder", "voxels", "tokens", "volume side", "text side", "GFLOP a volume"):
        table.add_column(head, justify="left" if head in ("model", "encoder") else "right", no_wrap=True)
    for name in wanted:
        size = measure(load_size(name), PreprocessingSpec.load(spec).shape)
        shape = "×".join(map(str, size.shape))
        table.add_row(
            name, size.kind, shape, str(size.tokens), f"{size.volume_parameters / 1e6:.1f} M",
            f"{size.text_parameters / 1e6:.1f} M", f"{size.flops / 1e9:.0f}",
        )  # fmt: skip
    # A table that is piped is not cut at 80 columns.
    Console(width=max(Console().width, 100)).print(table)
