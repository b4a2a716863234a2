"""What can be added without changing ctclip: encoders, objectives and heads, found by name.

A name is one of ours (the table below), one that an installed package announces as an entry point of the group
``ctclip.encoders``, ``ctclip.objectives`` or ``ctclip.heads``, or ``module:Name``, a class in anybody's own file.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from importlib import metadata
from typing import Any, Literal

from ctclip.errors import ConfigError

Kind = Literal["encoder", "objective", "head"]

# One line registers one of ours.
OURS: dict[Kind, dict[str, str]] = {
    "encoder": {
        "vit3d": "ctclip.models.vit3d:ViT3D",
        "ctvit": "ctclip.models.ctvit:CTViT",
        "resnet3d": "ctclip.models.resnet3d:ResNet3D",
        "slices": "ctclip.models.slices:SliceEncoder",
    },
    "objective": {
        "clip": "ctclip.objectives.clip:Clip",
        "convirt": "ctclip.objectives.convirt:ConVIRT",
        "siglip": "ctclip.objectives.siglip:SigLIP",
        "labels": "ctclip.objectives.labels:Labels",
        "prompts": "ctclip.objectives.prompts:Prompts",
        "captioning": "ctclip.objectives.captioning:Captioning",
        "mlm": "ctclip.objectives.mlm:MaskedWords",
    },
    "head": {
        "prompts": "ctclip.heads.prompts:PromptHead",
        "linear": "ctclip.heads.linear:LinearHead",
    },
}


def find(kind: Kind, name: str) -> Any:
    """The class called ``name``. Raises ConfigError listing the names there are."""
    address = OURS[kind].get(name)
    if address is not None:
        return _imported(address, name)
    for entry in metadata.entry_points(group=f"ctclip.{kind}s"):
        if entry.name == name:
            return _complete(kind, name, entry.load())
    if ":" in name:
        return _complete(kind, name, _imported(name, name))
    known = [*OURS[kind], *(entry.name for entry in metadata.entry_points(group=f"ctclip.{kind}s"))]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    article = "an" if kind[0] in "eo" else "a"
    raise ConfigError(
        f"no {kind} {name!r}: {hint}Give one of {', '.join(known)}, or {article} {kind} of your own as module:Name"
    )


def refuse_unknown_code(kind: Kind, name: str, source: str) -> None:
    """A model folder may name a class, never bring one: ``module:Name`` must have been imported by the user before.

    Raises ConfigError otherwise.
    """
    if ":" in name and name.partition(":")[0] not in sys.modules:
        module = name.partition(":")[0]
        raise ConfigError(
            f"{source}: names the {kind} {name!r}, which is code of its author's: if you trust it, import {module} first "
            f"(on the command line: `ctclip --plugin {module} ...`)"
        )


def _complete(kind: Kind, name: str, found: Any) -> Any:
    if not isinstance(found, type):
        raise ConfigError(f"{name!r}: not a class, so no {kind}; see docs/extending.md")
    if lacking := sorted(getattr(found, "__abstractmethods__", ())):
        raise ConfigError(
            f"{name!r}: every {kind} needs {', '.join(lacking)}, which this one lacks; see docs/extending.md"
        )
    return found


def _imported(address: str, name: str) -> Any:
    module, _, attribute = address.partition(":")
    if "" not in sys.path:
        # A file beside the configuration or the notebook, as `python -m` would find it.
        sys.path.append("")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ConfigError(f"{name!r}: there is no module {module!r} in this folder or this environment") from error
    except AttributeError as error:
        raise ConfigError(f"{name!r}: the module {module!r} has no {attribute!r}") from error
