"""Training that begins with a published checkpoint: imported, fine-tuned on another cohort, frozen in part, adapted."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ctclip.inference.import_published import import_published
from ctclip.models.folder import load_model
from ctclip.models.start import rate_factors, volume_layers
from ctclip.preprocessing.cohort_run import preprocess_cohort
from ctclip.preprocessing.spec import PreprocessingSpec

from ..robustness.processes import Command
from ..robustness.runs import last_line, losses

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PLACES = (ROOT / "tests" / "golden" / "data", ROOT.parent / "shared" / "upstream_parity")
# The small checkpoint's grid, enlarged to a whole chest; the checkpoint's own spacing is CT-CLIP's.
SPEC = dataclasses.replace(PreprocessingSpec.load("ct_clip"), name="chest_40", spacing=(14, 9, 9), shape=(20, 40, 40))
WAIT = 600  # seconds, on a loaded machine
STEPS = {"few": 2.0, "fifty": 25.0}  # epochs of two steps


@pytest.fixture(scope="module")
def published(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint as a model folder, with a tokenizer of the same vocabulary size."""
    place = next((place for place in PLACES if (place / "checkpoint.pt").is_file()), None)
    if place is None:
        pytest.skip("the published model's small checkpoint is not here")
    text = tmp_path_factory.mktemp("text")
    tables = (pd.read_csv(path) for path in (cohort / "dataset" / "radiology_text_reports").glob("*.csv"))
    words = Counter(re.findall(r"[a-z]+|[.,]", " ".join(table.to_csv() for table in tables).lower()))
    common = [word for word, _ in words.most_common(115)]
    (text / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *common]))
    (text / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    shape = json.loads((place / "config.json").read_text())["bert"]
    # Each rank draws different dropout: without dropout one process and two compute the same.
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (text / "config.json").write_text(json.dumps({"model_type": "bert", **shape, **still}))
    return import_published(place / "checkpoint.pt", text / "model", str(text))


@pytest.fixture(scope="module")
def chests(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom cohort on that grid."""
    folder = tmp_path_factory.mktemp("chests") / "store"
    preprocess_cohort(cohort, folder, SPEC, workers=1)
    return folder


def recipe(folder: Path, init: Path, epochs: float = STEPS["few"]) -> Path:
    path = folder / "finetune.yaml"
    training = {
        "batch": 4,
        "epochs": epochs,
        "learning_rate": 1e-4,
        "warmup": 0,
        "log_every": 1,
        "checkpoint_every": 40,
    }
    values = {
        "name": "finetune", "preprocessing": SPEC.name, "data": {"workers": 0}, "model": {"init": str(init)}, "training": training,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    return path


def tuned(
    tmp_path: Path, init: Path, store: Path, *overrides: str, epochs: float = STEPS["few"]
) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors of the model folder that a run writes to ``tmp_path``, and the text of its stderr."""
    words = [
        "train",
        "--config",
        str(recipe(tmp_path, init, epochs)),
        "--store",
        str(store),
        "--output",
        str(tmp_path / "run"),
    ]
    done = Command([*words, *overrides]).wait(WAIT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "run").values())
    return load_file(tmp_path / "run" / "model" / "model.safetensors"), done.stderr


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], prefix: str = "") -> set[str]:
    """Names of the tensors that are not bit-identical."""
    shared = [name for name in before if name.startswith(prefix) and name in after]
    return {name for name in shared if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("steps", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_one_process_and_two_fine_tune_alike(published: Path, chests: Path, tmp_path: Path, steps: int) -> None:
    words = ["train", "--config", str(recipe(tmp_path, published, steps / 2)), "--store", str(chests)]
    runs = {
        count: Command([*words, "--output", str(tmp_path / str(count)), "--processes", str(count)]) for count in (1, 2)
    }
    done = {count: process.wait(WAIT) for count, process in runs.items()}
    for one in done.values():
        assert one.returncode == 0, one.stderr[-3000:]
        # The line on tensors taken appears once, whatever the number of ranks.
        (line,) = [line for line in one.stderr.splitlines() if "tensors taken" in line]
        assert line.startswith(f"from {published}: ")
    assert "initialised at random" not in done[1].stderr, "everything of the checkpoint fits"
    assert len(losses(tmp_path / "1")) == steps
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
    one, two = (load_file(tmp_path / str(count) / "model" / "model.safetensors") for count in (1, 2))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert load_model(tmp_path / "1" / "model").trained_on.init == str(published)


def test_fifty_steps_and_neither_resuming_nor_exporting_needs_the_folder(
    published: Path, chests: Path, tmp_path: Path
) -> None:
    init = tmp_path / "init"
    shutil.copytree(published, init)
    before = load_file(init / "model.safetensors")
    after, _ = tuned(tmp_path, init, chests, epochs=STEPS["fifty"])
    curve = list(losses(tmp_path / "run").values())
    assert len(curve) == 50
    assert "volume_encoder.codebook.rows" in moved(before, after), "codes move without gradients"
    assert all(tensor.isfinite().all() for tensor in after.values())
    shutil.rmtree(init)
    shutil.rmtree(tmp_path / "run" / "model")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    exported = Command(["export", str(tmp_path / "run"), "--output", str(tmp_path / "exported")]).wait(WAIT)
    assert exported.returncode == 0, exported.stderr
    assert moved(after, load_file(tmp_path / "exported" / "model.safetensors")) == set()
    # Return to step 40 and train to the end again.
    shutil.rmtree(newest)
    again, _ = tuned(tmp_path, init, chests, epochs=STEPS["fifty"])
    assert list(losses(tmp_path / "run").values()) == pytest.approx(curve, abs=1e-6)
    assert max(float((again[name].double() - after[name].double()).abs().max()) for name in after) < 1e-6


def test_a_frozen_volume_encoder_keeps_every_bit(published: Path, chests: Path, tmp_path: Path) -> None:
    before = load_file(published / "model.safetensors")
    after, _ = tuned(tmp_path, published, chests, "training.freeze.volume=all")
    assert moved(before, after, "volume_encoder.") == set()
    assert {"volume_projection.weight", "text_projection.weight"} <= moved(before, after)


def test_frozen_layers_keep_every_bit_and_those_after_them_learn(published: Path, chests: Path, tmp_path: Path) -> None:
    before = load_file(published / "model.safetensors")
    after, _ = tuned(tmp_path, published, chests, "training.freeze.volume=0-1", "training.freeze.text=all")
    learned = moved(before, after)
    kept = ("volume_encoder.embed.", "volume_encoder.bias.", "volume_encoder.spatial.0.", "text_encoder.")
    assert not [name for name in learned if name.startswith(kept)]
    assert any(name.startswith("volume_encoder.spatial.1.") for name in learned)
    assert any(name.startswith("volume_encoder.temporal.1.") for name in learned)


def test_low_rank_adapters_leave_the_weights_and_learn_beside_them(
    published: Path, chests: Path, tmp_path: Path
) -> None:
    before = load_file(published / "model.safetensors")
    after, _ = tuned(tmp_path, published, chests, "model.volume.tuning=lora", "model.volume.lora_rank=2")
    adapters = [name for name in after if ".lora_" in name]
    assert len(adapters) == 2 * 3 * 4, "two matrices beside each of three maps of four layers"
    assert all(after[name].abs().sum() > 0 for name in adapters), "those that begin at zero have learned"
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in after.items() if ".lora_" not in name}
    weights = {name for name in moved(before, plain, "volume_encoder.") if not name.endswith("codebook.rows")}
    assert weights == set()
    # The folder opens as a model with adapters.
    assert load_model(tmp_path / "run" / "model").model.config.volume.tuning == "lora"


def test_the_first_layers_learn_slowest_with_layer_decay(published: Path, chests: Path, tmp_path: Path) -> None:
    model = load_model(published).model
    factors = rate_factors(model, 0.3)
    depth = len(volume_layers(model))
    assert factors[id(model.volume_encoder.embed[1].weight)] == pytest.approx(0.3**depth)
    # The first step of Adam is as long as the learning rate, whatever the gradient.
    before = load_file(published / "model.safetensors")
    after, _ = tuned(tmp_path, published, chests, "training.layer_decay=0.3", "training.weight_decay=0", epochs=0.1)
    assert len(losses(tmp_path / "run")) == 1
    step = lambda name: float((after[name] - before[name]).abs().max())  # noqa: E731
    longest = step("volume_encoder.temporal.1.up_gate.weight")
    assert longest == pytest.approx(1e-4 * 0.3, rel=0.05)
    assert step("volume_encoder.temporal.0.up_gate.weight") == pytest.approx(longest * 0.3, rel=0.05)
    assert step("volume_projection.weight") == pytest.approx(1e-4, rel=0.05)


def test_the_volume_side_alone_is_taken_beside_another_text_encoder(
    published: Path, chests: Path, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertModel

    text = tmp_path / "bert"
    BertModel(BertConfig(vocab_size=130, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(text)  # fmt: skip
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(125))]
    (text / "vocab.txt").write_text("\n".join(words))
    (text / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    before = load_file(published / "model.safetensors")
    more = ("model.init_sides=volume", f"model.text.pretrained={text}", "model.dim=24", "training.freeze.volume=all")
    after, said = tuned(tmp_path, published, chests, *more)
    assert moved(before, after, "volume_encoder.") == set()
    assert after["text_encoder.bert.embeddings.word_embeddings.weight"].shape == (130, 16)
    assert f"from {published}: " in said


def test_the_text_side_alone_is_taken_beside_another_volume_encoder(
    published: Path, chests: Path, tmp_path: Path
) -> None:
    before = load_file(published / "model.safetensors")
    volume = "{kind: vit3d, patch: [5, 10, 10], stages: [], width: 12, heads: 2, depth: 1}"
    more = ("model.init_sides=text", f"model.volume={volume}", "model.dim=24", "training.freeze.text=all")
    after, said = tuned(tmp_path, published, chests, *more)
    assert moved(before, after, "text_encoder.") == set()
    assert "volume_encoder.blocks.0.qkv.weight" in after
    assert "tensors taken" in said


def test_a_store_of_a_larger_plane_begins_with_a_new_projection_and_says_so(
    published: Path, cohort: Path, tmp_path: Path
) -> None:
    """Attention and codes fit any grid; the map from all positions of a plane to the joint space does not."""
    wide = dataclasses.replace(SPEC, name="chest_60", shape=(20, 60, 60), spacing=(14, 6, 6))
    preprocess_cohort(cohort, tmp_path / "store", wide, workers=1)
    after, said = tuned(tmp_path, published, tmp_path / "store", "preprocessing=chest_60")
    assert after["volume_projection.weight"].shape == (24, 6 * 6 * 48)
    assert "1 with another shape in the source, initialised at random: volume_projection.weight" in said


def test_a_store_whose_voxels_the_patches_do_not_divide_is_refused(
    published: Path, store: Path, tmp_path: Path
) -> None:
    words = [
        "train",
        "--config",
        str(recipe(tmp_path, published)),
        "--store",
        str(store),
        "--output",
        str(tmp_path / "run"),
    ]
    line = last_line(Command([*words, "preprocessing=phantom"]).wait(WAIT))
    assert "112" in line
    assert "10" in line


def test_a_folder_that_does_not_fit_or_is_not_there_is_one_line(published: Path, chests: Path, tmp_path: Path) -> None:
    words = [
        "train",
        "--config",
        str(recipe(tmp_path, tmp_path / "nothing")),
        "--store",
        str(chests),
        "--output",
        str(tmp_path / "run"),
    ]
    assert "no such model folder" in last_line(Command(words).wait(WAIT))
