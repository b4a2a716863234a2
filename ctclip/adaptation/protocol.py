"""Performance as a function of the number of labels: settings, draws of each setting, and mean AUROC on held-out
patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ctclip.adaptation.draws import fraction_draw, shot_draw
from ctclip.adaptation.examples import Labelled
from ctclip.errors import DataError
from ctclip.evaluation.metrics import auroc, mean_defined


@dataclass(frozen=True)
class Setting:
    """``kind``: fraction (``amount`` per cent of the training patients) or shots (``amount`` patients per label and
    class)."""

    kind: str
    amount: float

    def __str__(self) -> str:
        if self.kind == "fraction":
            return f"{self.amount:g} %"
        return f"{self.amount:g} shot{'s' if self.amount != 1 else ''}"

    def draw(self, train: Labelled, seed: int) -> np.ndarray:
        """The labels (n, L) of one draw."""
        if self.kind == "shots":
            return shot_draw(train.labels, train.patients, int(self.amount), train.names, seed)
        if self.amount == 100:
            return train.labels
        return fraction_draw(train.labels, train.patients, self.amount, train.names, seed)

    @property
    def repeated(self) -> bool:
        """Whether draws of this setting differ."""
        return self != Setting("fraction", 100.0)


@dataclass(frozen=True)
class Draw:
    """Draw ``number`` of a setting: labels (n, L) of the training volumes, NaN for those not used."""

    setting: Setting
    number: int
    labels: np.ndarray

    @property
    def used(self) -> np.ndarray:
        """(n,) bool: volumes with at least one label in the draw."""
        return np.asarray(~np.isnan(self.labels).all(axis=1))


def settings_of(fractions: str, shots: str) -> list[Setting]:
    """Parse lists such as ``1,10,100`` and ``1,4,16`` into settings. Raises DataError."""
    wanted = [Setting("fraction", value) for value in _numbers(fractions, "--percent")]
    for setting in wanted:
        if not 0 < setting.amount <= 100:
            raise DataError(f"--percent {setting.amount:g}: give percentages above 0 and up to 100")
    counts = _numbers(shots, "--shots")
    if any(count < 1 or count != int(count) for count in counts):
        raise DataError(f"--shots {shots}: give whole numbers from 1, such as 1,4,16")
    return [*(Setting("shots", value) for value in counts), *wanted]


def _numbers(text: str, option: str) -> list[float]:
    try:
        return sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise DataError(f"{option} {text}: give numbers separated by commas") from error


def draws_of(settings: Sequence[Setting], train: Labelled, count: int) -> list[Draw]:
    """``count`` draws of each setting. All are drawn before anything is read or fitted, so that an impossible setting
    fails at once with DataError."""
    return [
        Draw(setting, number, setting.draw(train, number))
        for setting in settings
        for number in range(count if setting.repeated else 1)
    ]


def measure(
    draws: Sequence[Draw], train: Labelled, test: Labelled, scores_of: Callable[[Draw], np.ndarray]
) -> pd.DataFrame:
    """One row per setting, draw and label: setting, draw, patients and volumes with labels in the draw, label, auroc
    (NaN if the test volumes have one class). ``scores_of``: fits to a draw and scores the test volumes (n, L)."""
    rows = []
    for draw in draws:
        facts = {
            "setting": str(draw.setting), "draw": draw.number,
            "patients": len(np.unique(train.patients[draw.used])), "volumes": int(draw.used.sum()),
        }  # fmt: skip
        values = aurocs(test, scores_of(draw))
        rows += [facts | {"label": name, "auroc": value} for name, value in zip(test.names, values, strict=True)]
    return pd.DataFrame(rows)


def aurocs(test: Labelled, scores: np.ndarray) -> list[float]:
    """AUROC of each label (L,) from scores (n, L); NaN for a label with one class."""
    values = []
    for label in range(scores.shape[1]):
        known = ~np.isnan(test.labels[:, label])
        values.append(auroc(test.labels[known, label], scores[known, label]) if known.any() else float("nan"))
    return values


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per setting: patients and volumes (means over draws), draws, mean AUROC over labels, and its 95 %
    interval over draws (Student's t; NaN for one draw)."""
    rows = []
    for setting, part in table.groupby("setting", sort=False):
        means = np.array([mean_defined(draw["auroc"].to_numpy()) for _, draw in part.groupby("draw")])
        lower, upper = t_interval(means)
        rows.append({
            "setting": setting, "patients": part["patients"].mean(), "volumes": part["volumes"].mean(), "draws": len(means),
            "labels": int(part.groupby("label")["auroc"].first().notna().sum()), "mean_auroc": mean_defined(means), "lower": lower, "upper": upper,
        })  # fmt: skip
    return pd.DataFrame(rows)


def t_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The 95 % confidence limits of the mean of ``values`` (n,) by Student's t; NaN for fewer than two."""
    from scipy.stats import t as student

    if len(values) < 2:
        return float("nan"), float("nan")
    half = float(student.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half
