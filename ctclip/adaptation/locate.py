"""Train a locator on a trained model with frozen encoders: it learns which cells of a volume a sentence describes.

Training needs no positions of findings. In the first stage, each cell of a volume gets the volume's report as its
target. A ridge regression from the features of cells to these targets is high only for cells that occur mainly in
volumes whose reports state the finding. Some cells of each volume are sampled, half of them weighted by how unusual they
are; sampling that does not depend on the report does not bias the regression. In later rounds (``sharpen.py``), volumes
are encoded again, and the locator learns from the cells that it chooses itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ctclip.adaptation.caption import prompts_of
from ctclip.adaptation.influence import influence
from ctclip.adaptation.keep import add_head, check_head_name
from ctclip.adaptation.sharpen import Meanings, choose, sharpen
from ctclip.adaptation.sides import fit_sides, side_cleaner
from ctclip.adaptation.stages import STATE, Stages, resumed, save_stages
from ctclip.data.dataset import some_scans, with_report
from ctclip.data.reports import reports_of
from ctclip.errors import DataError
from ctclip.evaluation.adapted import Adaptation
from ctclip.evaluation.tables import write_predictions
from ctclip.heads.locator import Cells, LocateHead, Locator, levels_of
from ctclip.inference.run import batches, report_embeddings, run_key
from ctclip.inference.scans import StoredScans
from ctclip.language import load_language
from ctclip.models.encoded import Level, finest
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.outputs import check_folder, claimed_folder, made_by_us
from ctclip.preprocessing.store import VolumeStore
from ctclip.schema import Section
from ctclip.sentences import sentences

METHOD, LOSSES, COLUMNS = "locate", "locate.csv", ("stage", "ridge", "loss", "held_out_loss")
# Number of volumes encoded at a time, and number of first volumes that give the means and standard deviations.
BATCH, FIRST = 4, 64
# Sentences stated by fewer or more reports are not used.
RAREST, COMMONEST = 0.004, 0.9
# Ridge penalties, as multiples of the mean variance of a feature.
RIDGES = tuple(10.0**power for power in range(-6, 2))


class LocateConfig(Section):
    """How a locator is trained."""

    cells: int = Field(192, ge=8, le=10**5, description="number of cells sampled from each volume")
    volumes: int | None = Field(None, ge=3, description="number of training volumes to use; null: all")
    sentences: int = Field(
        2000, ge=2, le=10**5, description="number of distinct report sentences used for training, the most frequent"
    )
    same: float = Field(
        0.55, gt=-1, le=1, description="minimum cosine of two centred sentence embeddings with the same meaning"
    )
    other: float = Field(
        0.42, ge=-1, lt=1, description="cosine of two centred sentence embeddings below which their meanings differ"
    )
    features: int = Field(512, ge=8, le=10**5, description="number of random features of a cell")
    waves: int = Field(
        4,
        ge=0,
        le=64,
        description="number of sine and cosine waves that encode the position along each axis; 0: no position",
    )
    tokens: bool = Field(
        False,
        description="also use the tokens of an encoder that pools finer grids; through attention, a token may respond "
        "to a finding elsewhere",
    )
    halves: bool = Field(
        False,
        description="also use the voxels of half cells: maps have twice the resolution and take longer",
    )
    held_out: float = Field(
        0.1, gt=0, lt=0.9, description="fraction of the training patients held out to choose the ridge penalty"
    )
    rounds: int = Field(
        2,
        ge=0,
        le=20,
        description="how often the locator chooses the cells that the sentences of a report describe, and learns from "
        "them; each round encodes the volumes again",
    )
    chosen: int = Field(
        4000,
        ge=3,
        description="largest number of training volumes of these rounds, drawn at random; the chosen cells of all are kept in memory",
    )
    influence_volumes: int = Field(
        1500,
        ge=0,
        description="largest number of training volumes of a last round, in which cells also count by how much the "
        "model's own match with the sentence depends on them (one gradient per sentence); 0: no such round",
    )
    epochs: int = Field(10, ge=1, le=10**4, description="passes over the chosen cells in each round")
    language: str = Field(
        "english", description="language of the reports: a YAML file, or its name in configs/languages"
    )


@dataclass(frozen=True)
class Stated:
    """What reports state. ``sentences`` (q, dim): unit vectors of the sentences used; ``says`` (n, q) int8: 1 stated, 0
    not stated, -1 unclear; ``mean`` (dim,): mean embedding of all sentences."""

    sentences: Tensor
    says: Tensor
    mean: Tensor

    def targets(self, same: float) -> Tensor:
        """Regression targets (n, dim): vectors whose dot product with a sentence approximates, in standard deviations,
        how unusual it is that the report states it. Each meaning has the same weight, however many sentences express
        it."""
        rate = (self.says == 1).float().mean(dim=0)
        stated = torch.where(self.says < 0, rate, self.says.float())
        unusual = (stated - rate) / (rate * (1 - rate)).sqrt()
        alike = (self.sentences @ self.sentences.T >= same).sum(dim=1)
        weighted = self.sentences / alike[:, None]
        gram = (weighted.T @ self.sentences).double() + 0.05 * torch.eye(self.sentences.shape[1], dtype=torch.float64)
        return torch.linalg.solve(gram, (unusual @ weighted).T.double()).T.float()


@dataclass
class Sums:
    """Sufficient statistics of a ridge regression over cells, in float64: sums of features (K,), of targets (dim,), of
    products of features (K, K), of products of features and targets (K, dim), of squared targets, and the number of
    cells."""

    features: Tensor
    targets: Tensor
    products: Tensor
    both: Tensor
    squares: float = 0.0
    count: int = 0

    @classmethod
    def of(cls, width: int, dim: int) -> Sums:
        features, targets, products, both = (
            torch.zeros(*shape, dtype=torch.float64) for shape in ((width,), (dim,), (width, width), (width, dim))
        )
        return cls(features, targets, products, both)

    def add(self, features: Tensor, target: Tensor) -> None:
        """Add the features (cells, K) of one volume and its target (dim,)."""
        total = features.sum(dim=0).double().cpu()
        self.features += total
        self.targets += target.double() * len(features)
        self.products += (features.T @ features).double().cpu()
        self.both += total[:, None] * target.double()
        self.squares += float(target.double().square().sum()) * len(features)
        self.count += len(features)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean squared error of features @ weight (K, dim) + bias (dim,)."""
        if not self.count:
            return float("nan")
        crossed = (weight * self.both).sum() + bias @ self.targets
        squared = (
            (weight * (self.products @ weight)).sum() + 2 * (self.features @ weight) @ bias + self.count * bias @ bias
        )
        return float(squared - 2 * crossed + self.squares) / self.count


def run_locate(
    loaded: ModelFolder,
    store: Path,
    output: Path,
    config: LocateConfig,
    *,
    head: str = METHOD,
    split: str = "train",
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Train a locator on the volumes and reports of a split and save it in the model folder; returns its folder.

    Writes ``locate.csv`` with the errors to ``output``. Raises DataError or PreprocessingError, and saves nothing, if
    the store has no report, too few patients, or the output cannot be used. An interrupted run resumes after its last
    complete stage.
    """
    check_folder(output, made_by_us, "output of `ctclip adapt --method locate`")
    check_head_name(loaded, head, LocateHead.kind)
    cleaner = side_cleaner(loaded, config.language)
    scans = StoredScans(VolumeStore(store), split, loaded.spec, loaded.path)
    where = f"{store}: split {split!r}"
    scans.table = with_report(scans.table, loaded.trained_on.sections, where)
    if config.volumes is not None:
        scans.table = some_scans(scans.table, config.volumes, seed)
    if scans.table["patient"].nunique() < 3:
        raise DataError(f"{where}: fewer than 3 patients with a report; a locator cannot be learned from them")
    key = run_key(loaded.hash, scans.origin(), list(scans.table["volume"]), config.model_dump_json(), f"{head} {seed}")
    with claimed_folder(output, "adapt", key, (LOSSES,), made_by_us, force=force):
        stated = stated_sentences(loaded, scans.table, config, where)
        patients = scans.table["patient"].astype(str).to_numpy()
        names = np.unique(patients)
        drawn = np.random.default_rng([seed, 43]).permutation(names)[: max(1, round(config.held_out * len(names)))]
        refused: dict[str, str] = {}
        held_out = np.isin(patients, drawn)
        stages = resumed(output / STATE, key, loaded.model.device)
        if stages is None:
            drawn_cells = _drawn(loaded, scans, config, seed, refused)
            stages = Stages(*fit_locator(drawn_cells, stated, held_out, config, seed), 0, refused)
            save_stages(output / STATE, key, stages)
        locator, losses, refused = stages.locator, stages.losses, stages.refused
        for number in range(stages.rounds, config.rounds + (config.influence_volumes > 0)):
            losses += _round(number, loaded, scans, locator, stated, held_out, config, seed, refused)
            save_stages(output / STATE, key, Stages(locator, losses, number + 1, refused))
        located = LocateHead(loaded.model, locator, prompts_of(loaded), loaded.labels.names)
        if cleaner is not None:
            rows = np.flatnonzero(held_out).tolist()
            located.certain = fit_sides(loaded, located, scans, rows, cleaner, refused)
        for reason in refused.values():
            print(f"refused: {reason}")
        words = f"{len(scans.table) - len(refused)} volumes of {len(names)} patients, split {split}"
        located.adaptation = Adaptation.to(METHOD, words, loaded.hash, scans.table["patient"].astype(str))
        card = f"a locator of what sentences describe, fitted to reports of {words}"
        folder = add_head(loaded.path, head, located, card)
        write_predictions(output / LOSSES, pd.DataFrame(losses, columns=list(COLUMNS)))
        (output / STATE).unlink(missing_ok=True)
    return folder


def stated_sentences(loaded: ModelFolder, table: pd.DataFrame, config: LocateConfig, where: str) -> Stated:
    """Determine which sentences each report states: a report states a sentence if it contains one with the same
    meaning, judged by their embeddings. Sentences that report absence or normality are not used."""
    language = load_language(config.language)
    reports = [list(dict.fromkeys(sentences(one.text()))) for one in reports_of(table, loaded.trained_on.sections)]
    count: dict[str, int] = {}
    for report in reports:
        for sentence in report:
            count[sentence] = count.get(sentence, 0) + 1
    with torch.inference_mode():
        every = torch.from_numpy(report_embeddings(loaded.model, list(count))).float()
    mean = every.mean(dim=0)
    texts = [sentence for sentence in count if not language.negates(sentence)]
    if len(texts) < 2:
        raise DataError(
            f"{where}: the reports state only that findings are absent; a locator cannot be learned from them"
        )
    number = {sentence: index for index, sentence in enumerate(count)}
    vectors = F.normalize(every[[number[text] for text in texts]] - mean, dim=-1)
    place = {text: index for index, text in enumerate(texts)}
    learned = vectors[sorted(range(len(texts)), key=lambda index: -count[texts[index]])[: config.sentences]]
    says = torch.zeros(len(reports), len(learned), dtype=torch.int8)
    for row, report in enumerate(reports):
        own = [place[sentence] for sentence in report if sentence in place]
        if own:
            nearest = (learned @ vectors[own].T).amax(dim=1)
            says[row][nearest >= config.other] = -1
            says[row][nearest >= config.same] = 1
    rate = (says == 1).float().mean(dim=0)
    used = (rate >= RAREST) & (rate <= COMMONEST)
    if not used.any():
        raise DataError(f"{where}: every sentence is stated by too few or too many of the reports; use more scans")
    return Stated(learned[used], says[:, used], mean)


@dataclass(frozen=True)
class Drawn:
    """Cells sampled from one volume: ``parts`` (cells, C) for each grid; ``position`` (cells, 3); ``row`` of the cohort
    table."""

    parts: list[Tensor]
    position: Tensor
    row: int


def _drawn(
    loaded: ModelFolder, scans: StoredScans, config: LocateConfig, seed: int, refused: dict[str, str]
) -> Iterator[Drawn]:
    """Encode every volume once and sample its cells. Volumes that cannot be read are skipped and added to
    ``refused``."""
    device = loaded.model.device
    random = np.random.default_rng([seed, 41])
    order = random.permutation(len(scans.table)).tolist()
    for members, _, levels in _encoded(loaded, scans, config, order, refused, "encoding"):
        cells = Cells(levels, loaded.spec)
        weights = sum(_unusual(level)[:, within.to(device)] for level, within in zip(levels, cells.within, strict=True))
        assert isinstance(weights, Tensor)
        if cells.real is not None:
            weights = weights * cells.real
        for one, row in enumerate(members):
            chosen = torch.from_numpy(_draw(weights[one].double().cpu().numpy(), config.cells, random))
            parts = [
                level.features[one][within[chosen].to(device)]
                for level, within in zip(levels, cells.within, strict=True)
            ]
            yield Drawn(parts, cells.position[chosen].to(device), row)


def _encoded(
    loaded: ModelFolder, scans: StoredScans, config: LocateConfig, order: list[int], refused: dict[str, str], what: str
) -> Iterator[tuple[list[int], Tensor, list[Level]]]:
    """Rows of the cohort table, a few at a time, their volumes (B, 1, D, H, W) and the grids of these."""
    for members, voxels, _ in batches(scans, order, BATCH, refused, what):
        volumes = torch.from_numpy(voxels).to(loaded.model.device)
        with torch.inference_mode():
            levels = levels_of(loaded.model.volume_encoder, volumes, tokens=config.tokens, halves=config.halves)
        yield members, volumes, levels


def _round(
    number: int, loaded: ModelFolder, scans: StoredScans, locator: Locator, stated: Stated, held_out: np.ndarray,
    config: LocateConfig, seed: int, refused: dict[str, str],
) -> list[tuple[str, float, float, float]]:  # fmt: skip
    """Choose cells with the locator and train it on them; returns the losses, one row per epoch. The round after the
    last of ``config.rounds`` also weighs cells by their influence."""
    random = np.random.default_rng([seed, 53, number])
    last = number == config.rounds
    order = random.permutation(len(scans.table))[: config.influence_volumes if last else config.chosen].tolist()
    meanings = Meanings.of(stated.sentences, stated.says, config.same)
    vectors = stated.sentences.to(loaded.model.device)
    found = []
    for members, volumes, levels in _encoded(
        loaded, scans, config, order, refused, f"choosing cells, round {number + 1}"
    ):
        for one, row in enumerate(members):
            own = [level.one(one) for level in levels]
            present, absent = meanings.draw(row, random)
            weights = None
            if last and present:
                weights = influence(loaded.model, volumes[one : one + 1], vectors[present], finest(own).grid)
            cells = choose(locator, own, loaded.spec, vectors, present, absent, row, random, weights)
            found += [cells] if cells is not None else []
    if all(held_out[one.row] for one in found):
        return []
    losses = sharpen(locator, found, vectors, held_out, config.epochs, seed)
    return [(f"round {number + 1}, epoch {epoch}", np.nan, *pair) for epoch, pair in enumerate(losses, start=1)]


def _unusual(level: Level) -> Tensor:
    """Squared mean distance (B, N) of each cell from the mean over the batch, in standard deviations of each
    channel."""
    features = level.features.float()
    spread, mean = torch.std_mean(features.flatten(0, 1), dim=0)
    return ((features - mean).abs() / spread.clamp(min=1e-6)).mean(dim=2) ** 2


def _draw(weights: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw ``count`` sorted indices without replacement, half with probability proportional to ``weights`` (N,), half
    uniformly among those above 0; fewer indices if fewer are above 0."""
    there = weights > 0
    if not there.any():
        there = np.ones(len(weights), bool)
    share = there / there.sum() + weights / max(weights.sum(), 1e-12)
    return np.sort(random.choice(len(weights), min(count, int(there.sum())), replace=False, p=share / share.sum()))


@torch.no_grad()
def fit_locator(
    drawn: Iterable[Drawn], stated: Stated, held_out: np.ndarray, config: LocateConfig, seed: int
) -> tuple[Locator, list[tuple[str, float, float, float]]]:
    """Fit the ridge regression from the features of cells to the targets of their volumes, with the penalty that is
    best on the volumes of ``held_out`` (n,) bool; also return the errors for all penalties. Raises DataError if there
    is no cell."""
    targets = stated.targets(config.same)
    stream = iter(drawn)
    first = list(itertools.islice(stream, FIRST))
    if not first:
        raise DataError("no volume can be read")
    locator = _new_locator(first, stated, config, seed)
    sums = [Sums.of(locator.width, targets.shape[1]) for _ in range(2)]
    for volume in itertools.chain(first, stream):
        sums[int(held_out[volume.row])].add(locator.features(volume.parts, volume.position), targets[volume.row])
    train, test = sums
    if not train.count:
        raise DataError("all readable volumes belong to held-out patients")
    centre, level = train.features / train.count, train.targets / train.count
    values, axes = torch.linalg.eigh(train.products - train.count * torch.outer(centre, centre))
    toward = axes.T @ (train.both - train.count * torch.outer(centre, level))
    best, errors = np.inf, []
    for strength in RIDGES:
        weight = axes @ (toward / (values.clamp(min=0) + strength * values.clamp(min=0).mean())[:, None])
        bias = level - centre @ weight
        error = test.error(weight, bias)
        errors.append(("first", strength, train.error(weight, bias), error))
        if len(errors) == 1 or error < best:
            best = error
            locator.weight.copy_(weight)
            locator.bias.copy_(bias)
    return locator, errors


def _new_locator(first: Sequence[Drawn], stated: Stated, config: LocateConfig, seed: int) -> Locator:
    """An untrained locator, initialised with the means and standard deviations of its inputs."""
    widths = [part.shape[1] for part in first[0].parts]
    devices = [first[0].position.device] if first[0].position.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        locator = Locator(
            widths, stated.sentences.shape[1], features=config.features, waves=config.waves, tokens=config.tokens,
            halves=config.halves,
        )  # fmt: skip
    locator.text_mean.copy_(stated.mean)
    for number in range(len(widths)):
        spread, mean = torch.std_mean(torch.cat([volume.parts[number] for volume in first]).float(), dim=0)
        locator.means[number].copy_(mean)
        locator.scales[number].copy_(spread.clamp(min=1e-4))
    return locator.to(first[0].position.device)
