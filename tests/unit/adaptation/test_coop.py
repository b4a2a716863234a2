"""Learned prompts: they start from the written ones with every text encoder, and keep their positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ctclip.adaptation.coop import CoopConfig, fit_contexts, initial_contexts
from ctclip.adaptation.shrinkage import Towards, fit_towards
from ctclip.config import ModelConfig, TextConfig
from ctclip.errors import CheckpointError, ConfigError
from ctclip.heads.contexts import ContextHead, directions, nearest_words, prompts_in_words, with_vectors
from ctclip.heads.folder import load_head, save_head
from ctclip.heads.prompts import pair_vectors
from ctclip.labels import labels_of_columns
from ctclip.models.dual_encoder import DualEncoder, build_model
from ctclip.models.folder import load_model, save_model
from ctclip.models.vit3d import ViT3DConfig
from ctclip.prompts import PromptSet, load_prompts
from tests.unit.models.families import FAMILIES, family_folder
from tests.unit.small import dual_encoder, spec_of

NAMES = ("nodule", "pleural effusion")
VOLUME = ViT3DConfig(patch=(4, 4, 4), stages=(), width=16, depth=1, heads=2, registers=1)
PROMPTS: PromptSet = load_prompts({
    "name": "two",
    "abnormalities": {
        name: {
            "positive": {"findings": [f"A {name} is seen.", "The heart is enlarged."], "impression": [f"{name}."]},
            "negative": {"findings": [f"No {name} is seen in the lungs."], "impression": [f"No {name}."]},
        }
        for name in NAMES
    },
})  # fmt: skip


def model_of(family: str, folder: Path, tuning: str = "frozen") -> DualEncoder:
    source = family_folder(family, folder)
    pooling = "last" if "last" in FAMILIES[family].poolings and "cls" not in FAMILIES[family].poolings else "mean"
    torch.manual_seed(1)
    text = TextConfig(pretrained=str(source), pooling=pooling, tuning=tuning, lora_rank=2)
    return build_model(ModelConfig(volume=VOLUME, text=text, dim=8), spec_of((8, 8, 8))).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_learning_begins_at_the_written_prompts_and_moves_them(family: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path / "text")
    contexts = initial_contexts(model, NAMES, PROMPTS, CoopConfig())
    with torch.no_grad():
        positive, negative = pair_vectors(model, PROMPTS, NAMES)
        begun = directions(model, contexts, 2, PROMPTS.ensemble)
    assert torch.allclose(begun, positive - negative, atol=1e-5)
    moved = contexts.vectors.clone().requires_grad_(True)
    directions(model, with_vectors(contexts, moved), 2, PROMPTS.ensemble).square().sum().backward()
    assert moved.grad is not None
    assert moved.grad.abs().sum() > 0


@pytest.mark.parametrize("ensemble", ["embeddings", "logits"])
@pytest.mark.parametrize("standardise", [False, True])
def test_a_standardised_model_and_both_ensembles_begin_alike(ensemble: str, standardise: bool) -> None:
    model = dual_encoder(standardise=standardise).eval()
    if standardise:
        model.similarity.text_standard.running_mean.copy_(torch.linspace(-1, 1, 12))
    prompts = PROMPTS.model_copy(update={"ensemble": ensemble, "average": "section"})
    contexts = initial_contexts(model, NAMES, prompts, CoopConfig())
    with torch.no_grad():
        positive, negative = pair_vectors(model, prompts, NAMES)
        assert torch.allclose(directions(model, contexts, 2, ensemble), positive - negative, atol=1e-5)


@pytest.mark.parametrize(("place", "expected"), [("front", "vvvvn"), ("middle", "vvnvv"), ("after", "nvvvv")])
def test_vectors_stand_where_they_are_put(place: str, expected: str) -> None:
    model = dual_encoder().eval()
    contexts = initial_contexts(model, ("nodule",), PROMPTS, CoopConfig(vectors=4, place=place))
    around = model.text_encoder.reading
    for slots, mask in zip(contexts.slot.tolist(), contexts.mask.tolist(), strict=True):
        inner = slots[len(around.prefix) : sum(mask) - len(around.suffix)]
        collapsed = "".join("v" if slot >= 0 else "n" for slot in inner)
        assert collapsed.replace("nn", "n").replace("nn", "n").replace("nn", "n") == expected
    assert len(contexts.vectors) == 8, "four for either side"


def test_unified_contexts_are_shared_and_specific_ones_are_not() -> None:
    model = dual_encoder().eval()
    written = {"positive": "There is {x} in the lung.", "negative": "There is no {x}."}
    unified = initial_contexts(model, NAMES, PROMPTS, CoopConfig(contexts="unified", **written))
    specific = initial_contexts(model, NAMES, PROMPTS, CoopConfig(**written))
    assert 2 * len(unified.vectors) == len(specific.vectors)
    assert len(initial_contexts(model, NAMES, PROMPTS, CoopConfig(contexts="unified", vectors=3)).vectors) == 6
    random = unified.vectors + 0.1 * torch.randn(unified.vectors.shape, generator=torch.Generator().manual_seed(0))
    head = ContextHead(model, NAMES, with_vectors(unified, random))
    first, _, second, _ = prompts_in_words(head)
    # The words around the name are the same for both labels.
    assert first.split(": ")[1].split(" [")[0] == second.split(": ")[1].split(" [")[0]


def test_what_was_learned_is_saved_and_scores_alike(tmp_path: Path) -> None:
    model = dual_encoder(standardise=True).eval()
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(40, 12)).astype("f4")
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    labels = (embeddings[:, :2] > 0).astype(float)
    labels[::3, 1] = np.nan
    config = CoopConfig(steps=30, learning_rate=0.3, anchor=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    begun = initial_contexts(model, NAMES, PROMPTS, config)
    patients = np.arange(40).astype(str)
    learned = fit_contexts(model, begun, embeddings, labels, patients, config, "embeddings")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "encoders are frozen"
    assert any(parameter.requires_grad for parameter in model.parameters())
    close = CoopConfig(steps=30, learning_rate=0.3, anchor=100.0)
    held = fit_contexts(model, begun, embeddings, labels, patients, close, "embeddings")
    with torch.no_grad():
        start, free, kept = (directions(model, one, 2, "embeddings") for one in (begun, learned, held))
    assert (kept - start).norm() < 0.5 * (free - start).norm(), "the anchor holds"
    save_model(tmp_path / "model", model, labels_of_columns("two", NAMES))
    head = ContextHead(model, NAMES, learned)
    save_head(tmp_path / "model", "coop", head)
    again = load_head(tmp_path / "model", "coop", load_model(tmp_path / "model").model)
    assert isinstance(again, ContextHead)
    assert torch.allclose(again.directions, head.directions, atol=1e-6)
    assert again.identity() == head.identity()
    with pytest.raises(CheckpointError, match="do not fit 3 labels"):
        ContextHead(model, (*NAMES, "third"), learned)


def test_words_come_to_the_directions_that_the_labels_ask_for_and_a_label_without_a_choice_keeps_its_prompts() -> None:
    model = dual_encoder().eval()
    random = np.random.default_rng(2)
    embeddings = random.normal(size=(60, 12)).astype("f4")
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    labels = np.full((60, 2), np.nan)
    labels[:, 0] = embeddings[:, 3] > 0
    labels[[0, 1], 1] = [0, 1]
    patients = np.arange(60).astype(str)
    config = CoopConfig(steps=80, learning_rate=0.3)
    begun = initial_contexts(model, NAMES, PROMPTS, config)
    learned = fit_contexts(model, begun, embeddings, labels, patients, config, "embeddings")
    with torch.no_grad():
        start, now = (directions(model, one, 2, "embeddings") for one in (begun, learned))
    assert torch.equal(now[1], start[1]), "one shot: too few patients to choose by"
    free = fit_towards(embeddings, labels, patients, Towards(start.numpy(), float(model.similarity.scale().detach())))
    asked = torch.from_numpy(free.weight[0]).float()
    before, after = (torch.cosine_similarity(one[0], asked, dim=0) for one in (start, now))
    assert after > 0.9 > before


def test_shared_words_stay_for_labels_that_keep_their_prompts() -> None:
    model = dual_encoder().eval()
    embeddings = np.eye(12, dtype="f4")[np.arange(24) % 12]
    labels = np.full((24, 2), np.nan)
    labels[:2, 0] = [0, 1]
    config = CoopConfig(contexts="unified", positive="There is {x}.", negative="There is no {x}.", steps=3)
    begun = initial_contexts(model, NAMES, PROMPTS, config)
    learned = fit_contexts(model, begun, embeddings, labels, np.arange(24).astype(str), config, "embeddings")
    assert torch.equal(learned.vectors, begun.vectors)


def test_nearest_words_of_word_vectors_are_the_words() -> None:
    model = dual_encoder().eval()
    contexts = initial_contexts(model, ("nodule",), PROMPTS, CoopConfig(positive="heart {x}", negative="no {x}"))
    words = [word for ((word, distance),) in nearest_words(model, contexts.vectors) if distance < 1e-4]
    assert words[0] == "heart"
    assert "no" in words


@pytest.mark.parametrize(
    "values",
    [
        {"contexts": "unified"}, {"positive": "There is {x}."}, {"positive": "It.", "negative": "No {x}."},
        {"positive": "{x}.", "negative": "No {x}.", "vectors": 4},
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"give|begins with|no \{x\}"):
        CoopConfig(**values)


def test_prompts_without_a_word_to_learn_are_refused() -> None:
    model = dual_encoder().eval()
    with pytest.raises(ConfigError, match="nothing to learn"):
        initial_contexts(model, ("nodule",), PROMPTS, CoopConfig(positive="{x}", negative="{x}"))
