"""How often each abnormality occurs, and with which others: CT-RATE's figures, in one readable table."""

from __future__ import annotations

import functools

import numpy as np
from scipy.stats import multivariate_normal, norm

# Per cent of CT-RATE's training volumes (Hamamci et al. 2024).
PREVALENCE = {
    "Medical material": 12.3,
    "Arterial wall calcification": 28.4,
    "Cardiomegaly": 11.3,
    "Pericardial effusion": 7.2,
    "Coronary artery wall calcification": 25.5,
    "Hiatal hernia": 14.3,
    "Lymphadenopathy": 25.9,
    "Emphysema": 19.3,
    "Atelectasis": 26.0,
    "Lung nodule": 45.3,
    "Lung opacity": 36.9,
    "Pulmonary fibrotic sequela": 26.7,
    "Pleural effusion": 12.1,
    "Mosaic attenuation pattern": 7.7,
    "Peribronchial thickening": 10.5,
    "Consolidation": 17.6,
    "Bronchiectasis": 10.0,
    "Interlobular septal thickening": 7.9,
}

# What a phantom can show, in the published order.
FINDINGS = tuple(PREVALENCE)

# Correlations (of 0/1 labels) above 0.2 in CT-RATE's training set; pairs that are not listed
# have only what these imply.
CORRELATION = {
    ("Arterial wall calcification", "Coronary artery wall calcification"): 0.74,
    ("Arterial wall calcification", "Cardiomegaly"): 0.34,
    ("Lung opacity", "Consolidation"): 0.33,
    ("Cardiomegaly", "Coronary artery wall calcification"): 0.33,
    ("Pericardial effusion", "Pleural effusion"): 0.31,
    ("Peribronchial thickening", "Bronchiectasis"): 0.30,
    ("Atelectasis", "Pleural effusion"): 0.28,
    ("Cardiomegaly", "Pleural effusion"): 0.28,
    ("Arterial wall calcification", "Emphysema"): 0.28,
    ("Medical material", "Pleural effusion"): 0.26,
    ("Pleural effusion", "Interlobular septal thickening"): 0.26,
    ("Cardiomegaly", "Mosaic attenuation pattern"): 0.25,
    ("Coronary artery wall calcification", "Emphysema"): 0.24,
    ("Arterial wall calcification", "Atelectasis"): 0.23,
}


def draw_findings(random: np.random.Generator, rare_floor: float = 0.0) -> frozenset[str]:
    """The abnormalities of one scan. ``rare_floor`` is the least prevalence (0 to 1) any of them has."""
    thresholds, root = _latent(rare_floor)
    latent = root @ random.standard_normal(len(FINDINGS))
    return frozenset(name for name, value, least in zip(FINDINGS, latent, thresholds, strict=True) if value > least)


@functools.cache
def _latent(rare_floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and matrix root of the Gaussian copula whose binary margins and correlations are the table's."""
    rates = np.array([max(PREVALENCE[name] / 100, rare_floor) for name in FINDINGS])
    thresholds = norm.isf(rates)
    listed = np.eye(len(FINDINGS), dtype=bool)
    wanted = np.eye(len(FINDINGS))
    for (first, second), correlation in CORRELATION.items():
        i, j = FINDINGS.index(first), FINDINGS.index(second)
        listed[i, j] = listed[j, i] = True
        wanted[i, j] = wanted[j, i] = _tetrachoric(thresholds[i], thresholds[j], rates[i], rates[j], correlation)
    # Pairs set one by one need not fit together: alternate between the listed values and the nearest matrix that
    # is a correlation (Higham 2002); pairs that are not listed take what the listed ones imply, no more.
    matrix = wanted
    for _ in range(200):
        values, vectors = np.linalg.eigh(np.where(listed, wanted, matrix))
        # Of a matrix's roots the symmetric one: the eigenvectors' signs, which differ between processors, cancel in it.
        root = vectors * np.sqrt(np.clip(values, 1e-6, None)) @ vectors.T
        matrix = root @ root.T
    return thresholds, root / np.linalg.norm(root, axis=1, keepdims=True)


def _tetrachoric(a: float, b: float, p: float, q: float, wanted: float) -> float:
    """The latent correlation whose thresholded variables have correlation ``wanted``, by bisection."""
    spread = np.sqrt(p * (1 - p) * q * (1 - q))
    low, high = 0.0, 0.999
    for _ in range(24):
        middle = (low + high) / 2
        both = multivariate_normal.cdf([-a, -b], mean=[0, 0], cov=[[1, middle], [middle, 1]])
        low, high = (middle, high) if (both - p * q) / spread < wanted else (low, middle)
    return (low + high) / 2
