"""`ctclip config`: the keys of a configuration, their meaning, and the origin of a value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ctclip.config_keys import Key

config = typer.Typer(
    help="List configuration keys, show the values of a recipe, or explain a key.", no_args_is_help=True
)
OVERRIDES = typer.Argument(
    None, metavar="[KEY=VALUE]...", help="Values that override the configuration, such as training.epochs=5."
)


@config.command("list")
def list_keys(section: str = typer.Argument("", help="Only the keys of this section, for example training.")) -> None:
    """List every key with its default and meaning.

    `ctclip config list training`
    """
    from ctclip.config_keys import key, keys

    for one in key(section) if section else keys():
        print(f"{_name(one)}={one.default}\n    {one.meaning}")


@config.command("show")
def show(
    name: str = typer.Argument(..., help="A YAML file, or the name of one in configs/."),
    overrides: list[str] = OVERRIDES,
) -> None:
    """Show every value of a recipe and where it comes from.

    `ctclip config show phantom_tiny training.epochs=5`
    """
    from ctclip.config_files import read_config
    from ctclip.config_keys import values_with_origins

    resolved, origins = read_config(name, overrides or [])
    lines = values_with_origins(resolved, origins)
    width = min(60, max(len(f"{path}={value}") for path, value, _ in lines))
    for path, value, origin in lines:
        print(f"{f'{path}={value}':<{width}}  # {origin}")


@config.command("explain")
def explain(
    path: str = typer.Argument(..., metavar="KEY", help="A key, for example training.batch, or a whole section."),
    name: str = typer.Option(None, "--config", "-c", help="Also show the value in this recipe."),
    overrides: list[str] = OVERRIDES,
) -> None:
    """Explain a key: meaning, type, default and, with --config, its value and where it comes from.

    `ctclip config explain training.batch --config ct_rate_vit3d_base`
    """
    from ctclip.config_files import read_config
    from ctclip.config_keys import key, values_with_origins

    chosen = {}
    if name is not None:
        chosen = {
            path: (value, origin) for path, value, origin in values_with_origins(*read_config(name, overrides or []))
        }
    for one in key(path):
        print(f"{_name(one)}\n  {one.meaning}\n  type: {one.type}\n  default: {one.default}")
        if one.path in chosen:
            print("  value: {} ({})".format(*chosen[one.path]))


def _name(key: Key) -> str:
    kind = f" ({key.kind})" if key.kind and key.path.startswith("model.volume.") else ""
    return f"{key.path}{kind}"
