"""Heads of a model folder: ``heads/<name>/`` holds the files of the head, ``head.yaml`` (its kind),
``calibration.json``, and, for heads fitted to labels, ``adaptation.json``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from ctclip import plugins
from ctclip.errors import CheckpointError, ConfigError
from ctclip.evaluation.adapted import FILE as ADAPTATION
from ctclip.evaluation.adapted import Adaptation
from ctclip.evaluation.calibration import Calibration
from ctclip.heads.head import Head
from ctclip.heads.linear import LinearHead
from ctclip.heads.prompts import PromptHead
from ctclip.labels import load_labels
from ctclip.models.checksums import checked_sha256, finite, write_checksums
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.folder import LABELS_BEFORE, is_head_folder
from ctclip.preprocessing.files import write_text
from ctclip.preprocessing.named_files import installed_file
from ctclip.preprocessing.outputs import check_replaceable, put_in_place
from ctclip.preprocessing.plain_yaml import read_yaml
from ctclip.preprocessing.scratch import scratch_folder
from ctclip.prompts import PromptSet, load_prompts

FOLDER, PROMPTS = "heads", "prompts"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class HeadFacts:
    """A head of a model folder that has not been loaded."""

    name: str
    kind: str
    supervision: str
    calibrated: bool


def list_heads(model: Path) -> list[HeadFacts]:
    """Heads of a model folder, by name."""
    if not (model / FOLDER).is_dir():
        before = [HeadFacts(PROMPTS, PromptHead.kind, PromptHead.supervision, (model / "calibration.json").is_file())]
        if (model / "classifier.safetensors").is_file():
            before.append(HeadFacts("linear", LinearHead.kind, LinearHead.supervision, False))
        return before
    facts = []
    for folder in sorted((model / FOLDER).glob("*/head.yaml")):
        values = _facts(folder.parent)
        calibrated = (folder.parent / "calibration.json").is_file()
        facts.append(HeadFacts(folder.parent.name, values["kind"], values.get("supervision", ""), calibrated))
    return facts


def save_head(model: Path, name: str, head: Head) -> Path:
    """Save ``head`` in a model folder under ``name``; a head of that name is replaced."""
    if not NAME.fullmatch(name):
        raise CheckpointError(f"{name!r} is not a valid name for a head: use letters, digits, - and _")
    folder = model / FOLDER / name
    check_replaceable(folder, is_head_folder, "head")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written outside heads/, so that an unfinished head is never read.
    with scratch_folder(f".{name[:60]}.", ".partial", model) as partial:
        head.save(partial)
        write_checksums(partial)
        facts = {"kind": head.kind, "supervision": head.supervision, "names": list(head.names)}
        write_text(partial / "head.yaml", yaml.safe_dump(facts, sort_keys=False, allow_unicode=True))
        if head.calibration is not None:
            head.calibration.save(partial / "calibration.json")
        if head.adaptation is not None:
            head.adaptation.save(partial / ADAPTATION)
        partial.chmod(0o755)
        put_in_place(partial, folder, is_head_folder, "head")
    return folder


def write_prompt_head(model: Path, prompts: PromptSet, names: Sequence[str], name: str = PROMPTS) -> None:
    """Save a prompt set as a head without encoding it: in training the weights may be sharded over ranks."""
    folder = model / FOLDER / name
    folder.mkdir(parents=True)
    PromptHead.write(folder, prompts, names)
    facts = {"kind": PromptHead.kind, "supervision": PromptHead.supervision, "names": list(names)}
    write_text(folder / "head.yaml", yaml.safe_dump(facts, sort_keys=False, allow_unicode=True))


def calibration_file(model: Path, name: str) -> Path:
    """The file with the calibration of a head. Raises CheckpointError if the model has no such head."""
    known = [head.name for head in list_heads(model)]
    if name not in known:
        raise CheckpointError(f"{model}: no head {name!r} (it has: {', '.join(known) or 'none'})")
    return (model / FOLDER / name if (model / FOLDER).is_dir() else model) / "calibration.json"


def load_head(model_folder: Path, name: str, model: DualEncoder) -> Head:
    """The head ``name`` of a model folder, with its calibration. Raises CheckpointError."""
    folder = model_folder / FOLDER / name
    if not (model_folder / FOLDER).is_dir():
        return _head_before(model_folder, name, model)
    if not NAME.fullmatch(name) or not (folder / "head.yaml").is_file():
        known = ", ".join(head.name for head in list_heads(model_folder)) or "none"
        raise CheckpointError(f"{model_folder}: no head {name!r} (it has: {known})")
    kind = str(_facts(folder)["kind"])
    plugins.refuse_unknown_code("head", kind, str(folder))
    try:
        found = plugins.find("head", kind)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'head.yaml'}: {error}") from error
    for weights in sorted(folder.glob("*.safetensors")):
        checked_sha256(weights)
    head: Head = found.load(folder, model)
    for weights in sorted(folder.glob("*.safetensors")):
        finite(load_file(weights), weights)
    if (folder / "calibration.json").is_file():
        head.calibration = Calibration.load(folder / "calibration.json")
    if (folder / ADAPTATION).is_file():
        head.adaptation = Adaptation.load(folder / ADAPTATION)
    return head


def _head_before(model_folder: Path, name: str, model: DualEncoder) -> Head:
    """A head of a model folder written by version 0.2, which kept prompts, classifier and calibration at the top
    level."""
    calibration = model_folder / "calibration.json"
    names = load_labels(installed_file(LABELS_BEFORE, "labels")).names
    if name == PROMPTS:
        path = model_folder / "prompts.yaml"
        head = PromptHead(
            model,
            load_prompts(path if path.is_file() else installed_file("report_style", "prompts")),
            None if path.is_file() else names,
        )
        head.calibration = Calibration.load(calibration) if calibration.is_file() else None
        return head
    path = model_folder / "classifier.safetensors"
    if name == "linear" and path.is_file():
        try:
            tensors = load_file(path)
            return LinearHead(model, names, tensors["weight"], tensors["bias"], relu=True)
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{path}: damaged; import the checkpoint again") from error
    known = ", ".join(head.name for head in list_heads(model_folder))
    raise CheckpointError(f"{model_folder}: no head {name!r} (it has: {known})")


def _facts(folder: Path) -> dict[str, str]:
    try:
        values = read_yaml(folder / "head.yaml")
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder / 'head.yaml'}: cannot be read; copy the model folder again") from error
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise CheckpointError(f"{folder / 'head.yaml'}: has no 'kind'; copy the model folder again")
    return values
