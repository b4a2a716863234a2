"""Prevalences and co-occurrence of abnormalities: CT-RATE's figures, from ``prevalence.yaml``."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import yaml
from scipy.stats import multivariate_normal, norm

_TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
# Per cent of volumes, by abnormality.
PREVALENCE: dict[str, float] = _TABLE["prevalence"]
# The abnormalities that a phantom can show, in the published order.
FINDINGS = tuple(PREVALENCE)
CORRELATION: dict[tuple[str, str], float] = {(first, second): value for first, second, value in _TABLE["correlation"]}
# Abnormalities of the mediastinum and the chest wall; the others belong to the lungs.
MEDIASTINUM = frozenset(_TABLE["mediastinum"])


def draw_findings(random: np.random.Generator, rare_floor: float = 0.0) -> frozenset[str]:
    """The abnormalities of one scan. ``rare_floor`` is the minimum prevalence (0 to 1) of each."""
    thresholds, root = _latent(rare_floor)
    latent = root @ random.standard_normal(len(FINDINGS))
    return frozenset(name for name, value, least in zip(FINDINGS, latent, thresholds, strict=True) if value > least)


@functools.cache
def _latent(rare_floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and matrix root of the Gaussian copula whose binary margins and correlations are those of the
    table."""
    rates = np.array([max(PREVALENCE[name] / 100, rare_floor) for name in FINDINGS])
    thresholds = norm.isf(rates)
    listed = np.eye(len(FINDINGS), dtype=bool)
    latent = np.eye(len(FINDINGS))
    for (first, second), correlation in CORRELATION.items():
        i, j = FINDINGS.index(first), FINDINGS.index(second)
        listed[i, j] = listed[j, i] = True
        latent[i, j] = latent[j, i] = _tetrachoric(thresholds[i], thresholds[j], rates[i], rates[j], correlation)
    # Correlations set pair by pair need not form a valid matrix: alternate between the listed values and the nearest
    # correlation matrix (Higham 2002); unlisted pairs get the values that the listed ones imply.
    matrix = latent
    for _ in range(200):
        values, vectors = np.linalg.eigh(np.where(listed, latent, matrix))
        # Use the symmetric matrix root, in which the signs of eigenvectors, which differ between CPUs, cancel.
        root = vectors * np.sqrt(np.clip(values, 1e-6, None)) @ vectors.T
        matrix = root @ root.T
    return thresholds, root / np.linalg.norm(root, axis=1, keepdims=True)


def _tetrachoric(a: float, b: float, p: float, q: float, target: float) -> float:
    """The latent correlation whose thresholded variables have correlation ``target``, by bisection."""
    spread = np.sqrt(p * (1 - p) * q * (1 - q))
    low, high = 0.0, 0.999
    for _ in range(24):
        middle = (low + high) / 2
        both = multivariate_normal.cdf([-a, -b], mean=[0, 0], cov=[[1, middle], [middle, 1]])
        low, high = (middle, high) if (both - p * q) / spread < target else (low, middle)
    return (low + high) / 2
