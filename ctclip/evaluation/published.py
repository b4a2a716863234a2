"""Published mean zero-shot AUROCs, and how their protocols differ from the one in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CT_RATE = "CT-RATE validation"


@dataclass(frozen=True)
class Published:
    """One published result. None: not stated by the publication."""

    model: str
    auroc: float
    labels: int | None
    volumes: int | None
    supervision: str
    note: str = ""
    cohort: str = CT_RATE


PUBLISHED = (
    Published("CT-CLIP", 0.731, 18, 3039, "reports only", "thresholds chosen on the test volumes; trained on findings "
                                                          "only"),
    Published("BIUD", 0.713, 18, None, "reports only", "as rerun by others"),
    Published("Merlin", 0.728, None, None, "reports only", "0.595 to 0.728, depending on the source; developed for the "
                                                           "abdomen"),
    Published("fVLM", 0.778, 16, None, "reports only", "trained with organ masks; without Medical material and "
                                                       "Lymphadenopathy"),
    Published("MedVista3D", 0.782, None, None, "reports only"),
    Published("ViSD-Boost", 0.790, None, None, "reports only"),
    Published("COLIPRI", 0.798, None, None, "reports only", "also trained on scans without reports"),
    Published("MPS-CT", 0.838, None, None, "label-supervised", "labels derived from the reports"),
    Published("GreenRFM", 0.848, None, None, "label-supervised", "labels extracted from the reports by a language "
                                                                 "model; 3-D ResNet-18"),
)  # fmt: skip


def differences(line: Published, metrics: dict[str, Any]) -> str:
    """Describe how the protocol of a published result differs from that of ``metrics``."""
    protocol = metrics["protocol"]
    labels, volumes = len(protocol["labels"]), metrics["volumes"]
    notes = []
    if protocol.get("cohort") != line.cohort:
        notes.append(f"{line.cohort}, here {protocol.get('cohort') or 'a cohort that the protocol does not name'}")
    elif line.volumes is None:
        notes.append("the volumes are not stated")
    elif line.volumes != volumes:
        notes.append(f"{line.volumes:,} volumes, here {volumes:,}")
    if line.labels is None:
        notes.append("the labels are not stated")
    elif line.labels != labels:
        notes.append(f"{line.labels} labels, here {labels}")
    ours = metrics.get("supervision")
    if ours and ours != line.supervision:
        notes.append(f"{line.supervision}, here {ours}")
    return "; ".join(notes) or "same labels, volumes and supervision"


def published_table(metrics: dict[str, Any]) -> list[list[str]]:
    """This run's mean AUROC among the published ones, sorted, each with its protocol and how it differs."""
    zero, protocol = metrics["zero_shot"], metrics["protocol"]
    mean = zero["mean_auroc"]
    ours = [
        "this run", "undefined" if mean is None else f"{mean:.3f}",
        f"{zero['labels_defined']} labels, {metrics['volumes']:,} volumes; {metrics.get('supervision') or 'supervision not stated'}",
        protocol["describes"], "this run",
    ]  # fmt: skip
    rows = [(line.auroc, _row(line, metrics)) for line in PUBLISHED] + [(mean or 0.0, ours)]
    ordered = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    return [["model", "mean AUROC", "labels, volumes, supervision", "protocol", "differs from this run"], *ordered]


def _row(line: Published, metrics: dict[str, Any]) -> list[str]:
    labels = "labels not stated" if line.labels is None else f"{line.labels} labels"
    volumes = "volumes not stated" if line.volumes is None else f"{line.volumes:,} volumes"
    facts = f"{labels}, {volumes}; {line.supervision}"
    return [line.model, f"{line.auroc:.3f}", facts, "; ".join(filter(None, (line.cohort, line.note))), differences(line, metrics)]  # fmt: skip
