"""The configuration: what it accepts, and how it says what it does not."""

from __future__ import annotations

import pytest

from ctclip.config import Config
from ctclip.config_files import build_config, configs_folder, differing_keys, dump_config, load_config, read_mapping
from ctclip.errors import ConfigError
from ctclip.models.sizes import measure
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.training.plan import describe, make_plan
from tests.benchmarks.recipes import VARIANTS


@pytest.mark.parametrize("path", sorted(configs_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_survives_its_dump(path, tmp_path) -> None:
    config = load_config(str(path))
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert build_config(read_mapping(tmp_path / "again.yaml"), "again") == config


@pytest.mark.parametrize("path", sorted(configs_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_planned(path) -> None:
    config = load_config(str(path))
    plan = make_plan(config, ranks=2)
    # Two cards share what ZeRO shares: each stage needs less than the one before, but for the copy that 1 and 2 keep.
    states = [stage.states for stage in plan.stages]
    assert states[3] < states[2] < states[1]
    if config.training.text_warmup.locks:
        # The sum below is of parameters that all learn; a locked side has neither gradients nor moments.
        less, plan = plan, make_plan(load_config(str(path), ["training.text_warmup.lock=false"]), ranks=2)
        assert all(fewer.states < stage.states for fewer, stage in zip(less.stages, plan.stages, strict=True))
    # All that stage 0 holds, and the copy, shared by two.
    sharded = [stage.states - stage.buffers for stage in plan.stages]
    assert sharded[3] == pytest.approx(20 / 16 * sharded[0] / 2, rel=0.01)
    said = describe(config, plan, "a100", 24128)
    assert said.count("<- configured") == 1
    assert "an epoch of 24128 scans" in said


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_comparison_is_a_configuration(name: str) -> None:
    # A switch that was renamed would be found after an hour of training.
    config, *overrides = VARIANTS[name]
    changed = load_config(config, overrides)
    assert overrides == [] or changed != load_config(config)
    # Names are listed with commas between and a colon before the seeds.
    assert not set(name) & set(",:'/")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.epoch=3", "'training.epochs'"),
        ("model.volume.widht=3", "width"),
        ("trainng.epochs=3", "'training"),
        ("training.batch=many", "training.batch"),
        ("training.batch=1", "training.batch"),
        ("model.volume.kind=vit", "no encoder 'vit': did you mean 'vit3d'"),
        ("model.volume.kind=nowhere:Encoder", "there is no module 'nowhere'"),
        ("model.volume.spacing=[3, 1, 1]", "unknown key 'model.volume.spacing'"),
        ("objectives.clipp=1", "no objective 'clipp': did you mean 'clip'"),
        ("objectives.clip.qeue=4", "'objectives.clip.queue'"),
        ("objectives.clip=0", "objectives: give at least one a weight above 0"),
        ("objectives.clip.begin=1.5", "objectives.clip.begin"),
        ("data.views={impresion: 1}", "no view 'impresion'"),
        ("training.freeze.volume=first", "training.freeze.volume"),
        ("training.layer_decay=0", "training.layer_decay"),
        ("model.init_sides=image", "model.init_sides"),
        ("training.epochs", "key=value"),
        ("training.zero=4", r"training.zero: write 0, 1, 2 or 3.*3\+offload"),
        ("training.zero=offload", "training.zero: write 0"),
        ("training.zero=0+offload", "offload needs stage 1"),
        ("model.volume.global_over=windows", "global_over=windows needs window"),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + said) as refused:
        load_config("phantom_tiny", [override])
    assert "\n" not in str(refused.value)


def test_overrides_are_typed() -> None:
    config = load_config("phantom_tiny", ["training.learning_rate=1e-3", "training.zero.stage=3", "seed=7"])
    assert (config.training.learning_rate, config.training.zero.stage, config.seed) == (1e-3, 3, 7)


@pytest.mark.parametrize(("word", "stage", "offload"), [("0", 0, False), ("2", 2, False), ("3+offload", 3, True)])
def test_one_key_chooses_zero(word: str, stage: int, offload: bool) -> None:
    chosen = load_config("phantom_tiny", [f"training.zero={word}"]).training.zero
    assert (chosen.stage, chosen.offload) == (stage, offload)


def test_differing_keys_are_paths() -> None:
    assert differing_keys(Config(), Config.model_validate({"training": {"epochs": 3}})) == ["training.epochs"]


def test_planned_operations_are_three_forward_passes() -> None:
    """The gradient of a matrix product is two more; that of voxels is not asked for, and codes have none."""
    config, tokens = load_config("phantom_published"), 8 * 5 * 7
    forward = measure(config.model, PreprocessingSpec.load("phantom")).flops
    patches, codes = 2 * tokens * (8 * 16 * 16) * 192, 2 * tokens * 1024 * 192
    # Of 256 words: four maps of attention, two of the feed-forward layer, scores and weighted sums.
    text = 2 * (2 * 256 * 12 * 128**2 + 2 * 2 * 256**2 * 128)
    expected = 3 * (forward + text) - patches - 2 * codes
    assert make_plan(config, ranks=1).flops == pytest.approx(expected, rel=0.01)


def test_a_number_is_the_weight_of_an_objective() -> None:
    config = load_config("phantom_tiny", ["objectives.mlm=0.3", "objectives.clip.queue=16"])
    assert config.objectives["mlm"].weight == 0.3
    assert config.objectives["clip"].model_dump() == {
        "weight": 1.0, "begin": 0.0, "negatives": None, "by_identity": True, "queue": 16,
    }  # fmt: skip
    assert set(load_config("phantom_tiny", ["objectives={clip: 0, siglip: 1}"]).objectives) == {"siglip"}


def test_an_encoder_and_an_objective_of_a_file_of_ones_own(tmp_path, monkeypatch) -> None:
    """`module:Name`, with a section of its own that is checked like ours."""
    (tmp_path / "mine.py").write_text(
        "from typing import Literal\n"
        "from ctclip.config import EncoderConfig, ObjectiveConfig\n"
        "from ctclip.models.encoded import VolumeEncoder\n"
        "from ctclip.objectives.objective import Objective\n"
        "class Size(EncoderConfig):\n"
        "    kind: Literal['mine:Encoder'] = 'mine:Encoder'\n"
        "    cells: int = 4\n"
        "class Encoder(VolumeEncoder):\n"
        "    Config = Size\n"
        "class Margin(ObjectiveConfig):\n"
        "    margin: float = 0.1\n"
        "class Triplet(Objective):\n"
        "    Config = Margin\n"
        "    needs = ('features', 'ages')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    values = {
        "model": {"volume": {"kind": "mine:Encoder", "cells": 6}},
        "objectives": {"mine:Triplet": {"margin": 0.5}},
    }
    config = build_config(values, "mine")
    assert config.model.volume.model_dump()["cells"] == 6
    assert config.objectives["mine:Triplet"].model_dump()["margin"] == 0.5
    assert config.reads("ages")
    assert not config.reads_labels
    assert build_config(config.model_dump(mode="json"), "again") == config
    with pytest.raises(ConfigError, match=r"'model\.volume\.cell'.*'model\.volume\.cells'"):
        build_config({"model": {"volume": {"kind": "mine:Encoder", "cell": 6}}}, "mine")
    with pytest.raises(ConfigError, match="module 'mine' has no 'Decoder'"):
        build_config({"model": {"volume": {"kind": "mine:Decoder"}}}, "mine")
