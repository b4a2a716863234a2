"""A copy of a model folder for publication, with a card that states training data, figures and limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from ctclip.errors import CheckpointError, CtclipError, EvaluationError
from ctclip.inference.model import Model, load
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import write_text

CARD = "README.md"
# The licence of CT-CLIP's weights and of CT-RATE, which also applies to weights derived from them.
PUBLISHED_LICENCE = "cc-by-nc-sa-4.0"


def publish(
    model: str | os.PathLike[str],
    output: Path,
    *,
    licence: str,
    evaluation: Path | None = None,
    repository: str | None = None,
    private: bool = True,
) -> str | None:
    """Copy a model folder to ``output`` with a full card and, if ``repository`` is given, upload it to the hub.

    ``licence``: its identifier on the hub, for example "cc-by-nc-sa-4.0"; ``evaluation``: a folder of `ctclip evaluate`
    of this model, whose figures the card shows. Returns the URL of the repository. Raises EvaluationError if the
    figures belong to another model, CheckpointError if ``output`` is the model itself or inside it, a head is damaged, or
    the hub cannot be reached or refuses.
    """
    loaded = load(model)
    for one in loaded.heads:
        # Raises CheckpointError if its files are damaged.
        loaded.head(one.name)
    if loaded.folder.path.resolve() in (output.resolve(), *output.resolve().parents):
        raise CheckpointError(
            f"{output}: is the model folder itself, or inside it; it holds digests of patients: give another --output for the copy"
        )
    card = model_card(loaded, licence, None if evaluation is None else read_figures(evaluation, loaded), repository)
    loaded.save_pretrained(output)
    write_text(output / CARD, card)
    return None if repository is None else _upload(output, repository, private)


def read_figures(evaluation: Path, model: Model) -> dict[str, Any]:
    """The content of ``metrics.json`` of an evaluation. Raises EvaluationError if it cannot be read, or belongs to
    another model."""
    path = evaluation / "metrics.json"
    try:
        figures: dict[str, Any] = plain_json.read(path)
        of = figures["model"]
        # Fails if a figure of the card is missing.
        _figures(figures)
    except UNFIT as error:
        raise EvaluationError(f"{path}: no evaluation could be read; give a folder of `ctclip evaluate`") from error
    if of != model.folder.hash:
        raise EvaluationError(
            f"{path}: holds figures of the model {of}, but this model is {model.folder.hash}; evaluate this model"
        )
    return figures


def model_card(model: Model, licence: str, figures: dict[str, Any] | None, repository: str | None = None) -> str:
    """The model card for the hub: YAML, then Markdown. ``figures``: ``metrics.json`` of its evaluation."""
    facts = model.folder.trained_on
    head: dict[str, Any] = {
        "license": licence, "library_name": "ctclip", "pipeline_tag": "zero-shot-image-classification",
        "tags": ["computed-tomography", "radiology", "3d", "zero-shot", *(["synthetic-data"] if facts.synthetic else [])],
    }  # fmt: skip
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {(repository or model.folder.path.name).rpartition('/')[2]}",
        "A dual encoder of CT volumes and radiology reports, trained with ctclip. Research use; **not a medical "
        "device**.",
        _learned_from(model),
        "## Figures\n\n" + ("Not evaluated." if figures is None else _figures(figures)),
        _limits(model),
        f"## Licence\n\n`{licence}`. Weights trained on CT-RATE, or started from those of CT-CLIP, are under the licence `{PUBLISHED_LICENCE}`.",
        f'## Use\n\n```python\nimport ctclip\n\nmodel = ctclip.load("{repository or model.folder.path.name}")\nprint(model.detect("scan.nii.gz"))\n```',
    ]
    return "\n\n".join(parts) + "\n"


def _learned_from(model: Model) -> str:
    facts, config, spec = model.folder.trained_on, model.dual.config, model.spec
    scans = {True: "phantoms", False: "scans of patients", None: "scans"}[facts.synthetic]
    size = "" if facts.volumes is None else f"{facts.volumes} volumes of {facts.patients or 'unknown'} patients, "
    rows = [
        ("data", f"{size}{scans}{f', cohort {facts.cohort}' if facts.cohort else ''}{f', {facts.body_part}' if facts.body_part else ''}"),
        ("supervision", facts.supervision or "not recorded"),
        *([("labels from", facts.label_source)] if facts.label_source else []),
        ("report sections", ", ".join(facts.sections)),
        ("begun from", facts.init or "random weights"),
        ("volume encoder", config.volume.kind),
        ("text encoder", config.text.pretrained or "BERT from scratch"),
        ("preprocessing", f"{spec.name} ({spec.hash}): {'x'.join(map(str, spec.shape))} voxels of {'x'.join(f'{step:g}' for step in spec.spacing)} mm, {spec.hu_window[0]:g} to {spec.hu_window[1]:g} HU"),
        ("label set", f"{model.labels.name}: {', '.join(model.labels.names)}"),
        ("heads", ", ".join(one.name if one.supervision == "none" else f"{one.name} ({one.supervision})" for one in model.heads)),
        ("weights", model.folder.hash),
    ]  # fmt: skip
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _figures(figures: dict[str, Any]) -> str:
    zero, protocol = figures["zero_shot"], figures["protocol"]
    low, high = zero["mean_auroc_interval"]
    lines = [
        f"Protocol `{protocol['name']}`: {figures['volumes']} volumes of {figures['patients']} patients. {_sentence(protocol['describes'])}",
        "",
        f"Mean AUROC of {zero['labels_defined']} labels: **{zero['mean_auroc']:.3f}** (95 % interval by patient {_number(low)} to {_number(high)}), "
        f"{figures.get('supervision') or 'supervision not recorded'}. Thresholds: {zero['thresholds'].split(';')[0]}.",
        "",
        "| label | AUROC | 95 % interval | positives |",
        "|---|---|---|---|",
    ]
    for name, entry in zero["auroc"].items():
        few = "" if entry["interval_trusted"] else ", fewer than ten patients"
        bounds = (entry["lower"], entry["upper"])
        interval = "none" if None in bounds else f"{_number(bounds[0])} to {_number(bounds[1])}"
        lines.append(f"| {name} | {_number(entry['value'])} | {interval}{few} | {entry['positives']} of {entry['n']} |")
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _limits(model: Model) -> str:
    facts = model.folder.trained_on
    limits = [
        *model.folder.trained_on.caveats(),
        f"Scans unlike those that the model was trained on ({facts.body_part or 'body part not recorded'}, {model.spec.name}) have not been tested.",
        "Probabilities rank scans; they match observed frequencies only if a head is calibrated, and only for patients "
        "like those of the calibration.",
        "Findings smaller than a voxel, and findings that the training reports never mention, are not detected.",
        "It is not for diagnosis, triage or any decision about a patient.",
    ]
    return "## Limits\n\n" + "\n".join(f"- {_sentence(limit)}" for limit in limits)


def _upload(folder: Path, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        api = HfApi()
        page = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model folder of ctclip")
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{repository}: not published ({reason}); the folder to upload is {folder}") from error
    return str(page)


def check_licence(licence: str) -> None:
    """Raise CtclipError for anything but a licence identifier of the hub, such as a sentence."""
    if not licence or not all(character.isalnum() or character in "-._" for character in licence):
        raise CtclipError(
            f"--licence {licence!r}: give an identifier of the hub, for example {PUBLISHED_LICENCE} or apache-2.0"
        )
