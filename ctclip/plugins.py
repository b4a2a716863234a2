"""Find encoders, objectives, heads and report readers by name, including extensions outside ctclip.

A name is one of ctclip's (the table below), one that an installed package declares as an entry point of the group
``ctclip.encoders``, ``ctclip.objectives``, ``ctclip.heads`` or ``ctclip.readers``, or ``module:Name``, a class in a
user's own file.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from importlib import metadata
from typing import Any, Literal

from ctclip.errors import ConfigError

Kind = Literal["encoder", "objective", "head", "reader"]

# Each class of ctclip is registered with one line.
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
        "alignment": "ctclip.objectives.alignment:Alignment",
        "sentences": "ctclip.objectives.sentences:Sentences",
    },
    "head": {
        "prompts": "ctclip.heads.prompts:PromptHead",
        "linear": "ctclip.heads.linear:LinearHead",
        "text": "ctclip.heads.text:TextHead",
        "caption": "ctclip.heads.caption:CaptionHead",
        "contexts": "ctclip.heads.contexts:ContextHead",
        "prior": "ctclip.heads.prior:PriorHead",
        "locate": "ctclip.heads.locator:LocateHead",
        "decode": "ctclip.heads.decode:DecodeHead",
    },
    "reader": {
        "rules": "ctclip.report_reading.rules:RulesReader",
        "classifier": "ctclip.report_reading.classifier:ClassifierReader",
        "language-model": "ctclip.report_reading.language_model:LanguageModelReader",
    },
}


# Base class of a user's own class.
BASES: dict[Kind, str] = {
    "encoder": "ctclip.models.encoded:VolumeEncoder",
    "objective": "ctclip.objectives.objective:Objective",
    "head": "ctclip.heads.head:Head",
    "reader": "ctclip.report_reading.reader:Reader",
}


def find(kind: Kind, name: str) -> Any:
    """The class called ``name``. Raises ConfigError that lists the known names."""
    address = OURS[kind].get(name)
    if address is not None:
        return _imported(address, name)
    for entry in metadata.entry_points(group=f"ctclip.{kind}s"):
        if entry.name == name:
            return _whole(entry.load(), kind, name)
    if ":" in name:
        return _whole(_imported(name, name), kind, name)
    known = [*OURS[kind], *(entry.name for entry in metadata.entry_points(group=f"ctclip.{kind}s"))]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"no {kind} {name!r}: {hint}Give one of {', '.join(known)}, or {_a(kind)} of your own as module:Name"
    )


def refuse_unknown_code(kind: Kind, name: str, source: str) -> None:
    """A model folder may name a class but not contain its code: the user must have imported the module of
    ``module:Name``.

    Raises ConfigError otherwise.
    """
    if ":" in name and name.partition(":")[0] not in sys.modules:
        module = name.partition(":")[0]
        raise ConfigError(
            f"{source}: names the {kind} {name!r}, which is code of the model's author; if you trust it, import "
            f"{module} "
            "first (on "
            f"the command line: `ctclip --plugin {module} ...`)"
        )


def import_own(module: str, name: str) -> Any:
    """Import ``module``: a file beside the configuration or the notebook, as `python -m` would find it, or an
    installed one. Raises ConfigError, which begins with ``name``, if there is none; errors in the module's own code
    are passed on."""
    if "" not in sys.path:
        sys.path.append("")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"{name}: there is no module {module!r} in this folder or this environment") from error


def _imported(address: str, name: str) -> Any:
    module, _, attribute = address.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{name!r}: write your own class as module:Name")
    imported = import_own(module, repr(name))
    try:
        return getattr(imported, attribute)
    except AttributeError as error:
        raise ConfigError(f"{name!r}: the module {module!r} has no {attribute!r}") from error


def _whole(candidate: Any, kind: Kind, name: str) -> Any:
    """``candidate``, if it is a class derived from the base class of its kind and implements its abstract methods."""
    module, _, attribute = BASES[kind].partition(":")
    base = getattr(importlib.import_module(module), attribute)
    if not (isinstance(candidate, type) and issubclass(candidate, base)):
        raise ConfigError(
            f"{name!r}: not {_a(kind)}; derive a class from {module}.{attribute} (docs/extending.md shows one)"
        )
    if missing := sorted(getattr(candidate, "__abstractmethods__", ())):
        raise ConfigError(f"{name!r}: {_a(kind)} also needs {', '.join(missing)} (docs/extending.md shows one)")
    return candidate


def _a(kind: Kind) -> str:
    return f"{'a' if kind == 'head' else 'an'} {kind}"
