"""The configuration: accepted values, and the messages for others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from ctclip import plugins
from ctclip.config import Config
from ctclip.config_files import build_config, configs_folder, differing_keys, dump_config, load_config, read_mapping
from ctclip.errors import ConfigError
from ctclip.models.sizes import measure
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.schema import Section
from ctclip.training.plan import describe, make_plan
from tests.benchmarks.recipes import VARIANTS


@pytest.mark.parametrize("path", sorted(configs_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_survives_its_dump(path, tmp_path) -> None:
    config = load_config(str(path))
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert build_config(read_mapping(tmp_path / "again.yaml"), "again") == config


@pytest.mark.parametrize("path", sorted(configs_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_planned(path) -> None:
    # Short reports: a plan runs the text encoder, and these tests do not depend on the length.
    short = "model.text.max_tokens=64"
    config = load_config(str(path), [short])
    plan = make_plan(config, ranks=2)
    # Two cards share the parts that ZeRO shards: each stage needs less than the one before, except for the copy
    # that 1 and 2 keep.
    states = [stage.states for stage in plan.stages]
    assert states[3] < states[2] < states[1]
    if config.training.text_warmup.locks:
        # The sum below assumes that all parameters learn; a locked side has neither gradients nor moments.
        less, plan = plan, make_plan(load_config(str(path), [short, "training.text_warmup.lock=false"]), ranks=2)
        assert all(fewer.states < stage.states for fewer, stage in zip(less.stages, plan.stages, strict=True))
    # All the memory of stage 0, plus the copy, divided by two.
    sharded = [stage.states - stage.buffers for stage in plan.stages]
    assert sharded[3] == pytest.approx(20 / 16 * sharded[0] / 2, rel=0.01)
    said = describe(config, plan, "a100", 24128)
    assert said.count("<- configured") == 1
    assert "an epoch of 24128 scans" in said


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_comparison_is_a_configuration(name: str) -> None:
    # Otherwise a renamed switch would be noticed only after an hour of training.
    config, *overrides = VARIANTS[name]
    changed = load_config(config, overrides)
    assert overrides == [] or changed != load_config(config)
    # Names are separated by commas, with a colon before the seeds.
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
        ("objectives={clip: 0}", "objectives: give at least one a weight above 0"),
        ("objectives.clip.begin=1.5", "objectives.clip.begin"),
        ("data.views={impresion: 1}", "no view 'impresion'"),
        ("training.freeze.volume=first", "training.freeze.volume"),
        ("training.layer_decay=0", "training.layer_decay"),
        ("model.init_sides=image", "model.init_sides"),
        ("training.epochs", "key=value"),
        ("training.zero=4", r"training.zero: choose 0, 1, 2 or 3.*3\+offload"),
        ("training.zero=offload", "training.zero: choose 0"),
        ("training.zero=0+offload", "offload needs stage 1"),
        ("model.volume.global_over=windows", "global_over=windows needs window"),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + said) as refused:
        load_config("phantom_tiny", [override])
    assert "\n" not in str(refused.value)


OUT_OF_BOUNDS = [
    "seed=-1", "seed=1e20", "seed=0.5", "model.dim=0", "model.logit_scale=0", "model.logit_scale=200", "model.logit_scale_max=inf",
    "model.volume.heads=5", "model.volume.heads=0", "model.volume.width=0", "model.volume.width=-96", "model.volume.depth=0",
    "model.volume.registers=-1", "model.volume.patch=[0, 4, 4]", "model.volume.stages=[[0, 1]]", "model.volume.stages=[[8, -1]]",
    "model.volume.windows=[[1000, -1000]]", "model.volume.windows=[]", "model.volume.pooling=[]", "model.volume.window=[0, 1, 1]",
    "model.volume.global_every=0", "model.volume.lora_rank=0", "model.text.vocabulary=3", "model.text.width=0", "model.text.depth=0",
    "model.text.heads=5", "model.text.heads=-2", "model.text.max_tokens=0", "model.text.lora_rank=0", "data.workers=-1", "data.volumes=1",
    "data.views_per_volume=0", "data.rarity=-1", "data.views={report: -1}", "data.sections=[]", "data.augment.noise_hu=-1",
    "data.augment.noise_hu=inf", "objectives.clip.weight=-1", "objectives.clip.weight=nan", "objectives.clip.queue=-1",
    "training.epochs=0", "training.epochs=inf", "training.epochs=nan", "training.batch=0", "training.micro_batch=0", "training.learning_rate=0",
    "training.learning_rate=inf", "training.text_learning_rate=-1e-3", "training.weight_decay=-1", "training.betas=[0.9, 1]",
    "training.betas=[-0.1, 0.9]", "training.betas=[0.9]", "training.warmup=1", "training.gradient_clip=0", "training.layer_decay=1.5",
    "training.checkpoint_every=0", "training.keep_checkpoints=0", "training.validate_every=-1", "training.validate_volumes=1",
    "training.log_every=0", "training.text_warmup.steps=-1", "training.text_warmup.keep=0",
    "seed=true", "training.learning_rate=yes", "training.batch=off", "training.learning_rate=1e30", "training.epochs=1e30",
    "training.gradient_clip=1e30", "model.text.depth=1000000", "model.text.width=100000000", "model.volume.depth=1000000",
    "model.volume.width=96000000", "model.volume.patch=[1, 1, 1000000]", "data.workers=100000", "data.views_per_volume=1000",
    "data.rarity=1e9", "model.text.vocabulary=1000000000", "objectives.clip.queue=1000000000000", "training.batch=1000000000000",
]  # fmt: skip


@pytest.mark.parametrize("override", OUT_OF_BOUNDS)
def test_every_number_has_bounds(override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("phantom_tiny", [override])
    message, key = str(refused.value), override.partition("=")[0]
    assert "\n" not in message
    # A rule about two keys names the section that contains them, and both keys.
    section, _, name = key.rpartition(".")
    assert key in message or (f"{section}: " in message and name in message)


@pytest.mark.parametrize(
    "volume",
    [
        "{kind: ctvit, heads: 0}", "{kind: ctvit, head_width: 0}", "{kind: ctvit, spatial_depth: 0}", "{kind: ctvit, temporal_depth: -1}",
        "{kind: ctvit, codebook_size: 0}", "{kind: ctvit, patch: [0, 20, 20]}", "{kind: ctvit, width: 0}", "{kind: slices, depth: 0}",
        "{kind: slices, heads: 0}", "{kind: slices, every: 0}", "{kind: slices, slices_at_once: 0}", "{kind: slices, windows: [[5, 5]]}",
        "{kind: resnet3d, width_factor: 0}", "{kind: resnet3d, width_factor: 0.1}", "{kind: resnet3d, stem_stride: [0, 1, 1]}",
    ],
)  # fmt: skip
def test_every_number_of_an_encoder_has_bounds(volume: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.volume") as refused:
        load_config("phantom_tiny", [f"model.volume={volume}"])
    assert "\n" not in str(refused.value)
    assert volume.split()[2].rstrip(":") in str(refused.value)


def unbounded(schema: Any, key: str = "") -> Iterator[str]:
    """Keys of a JSON schema that hold a number without a lower and an upper bound; HU windows have an order instead."""
    if isinstance(schema, list):
        for one in schema:
            yield from unbounded(one, key)
    if not isinstance(schema, dict) or key == "windows":
        return
    if schema.get("type") in ("integer", "number") and "enum" not in schema:
        bounds = [{"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}]
        yield from [key] * any(not bound & set(schema) for bound in bounds)
    for name, inner in schema.items():
        if name in ("properties", "$defs"):
            for own, value in inner.items():
                yield from unbounded(value, own)
        elif name not in ("default", "enum"):
            yield from unbounded(inner, key)


SECTIONS = [
    Config,
    *(plugins.find(kind, name).Config for kind in ("encoder", "objective") for name in plugins.OURS[kind]),
]


@pytest.mark.parametrize("section", SECTIONS)
def test_no_number_is_without_bounds(section: type[Section]) -> None:
    assert list(unbounded(section.model_json_schema())) == []


PATHS = [
    "2024-01-05", "2024-01-05 10:00:00", "1e5", "1_000", "0x10", "12", "1.5", "null", "~", "yes", "true", "my store #1", "[v2]", "{a: b}",
    "a: b", "'quoted'", '"half', "&anchor", "*alias", "!tag", "%x", "@x", "- x", "store ", "größe/été", "a=b", "",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_a_path(path: str, tmp_path) -> None:
    config = load_config("phantom_tiny", values_set={"data.store": path})
    assert config.data.store == path
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert build_config(read_mapping(tmp_path / "config.yaml"), "again").data.store == path


@pytest.mark.parametrize("text", PATHS)
@pytest.mark.parametrize(
    "key", ["data.store", "model.init", "model.text.pretrained", "labels", "name", "data.train_split"]
)
def test_an_override_of_text_is_text(key: str, text: str) -> None:
    value = load_config("phantom_tiny", [f"{key}={text}"])
    for part in key.split("."):
        value = getattr(value, part)
    optional = key not in ("name", "data.train_split")
    assert value == (None if optional and text in ("null", "") else text)


def test_text_of_the_encoder_that_is_chosen_after_it() -> None:
    config = load_config(
        "phantom_tiny", ["model.volume={}", "model.volume.pretrained=2024-01-05", "model.volume.kind=slices"]
    )
    assert config.model.volume.model_dump()["pretrained"] == "2024-01-05"


@pytest.mark.parametrize("values", ["{seed: true}", "{training: {batch: yes}}", "{training: {micro_batch: false}}"])
def test_a_truth_value_of_a_file_is_no_number(values: str, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text(values)
    with pytest.raises(ConfigError, match=r"(seed|batch): .*(number|integer)"):
        load_config(str(tmp_path / "mine.yaml"))


def test_a_date_in_a_file_is_to_be_quoted(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {store: 2024-01-05}")
    with pytest.raises(ConfigError, match=r"data\.store: .* write it in quotes"):
        load_config(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    "override", ["training.betas=[0.9", "seed={", "data.views.report=[1", "objectives.clip={", "seed=2024-13-45"]
)
def test_an_override_that_cannot_be_read_is_named(override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("phantom_tiny", [override])
    assert "\n" not in str(refused.value)
    assert override.partition("=")[0].partition(".")[0] in str(refused.value)


BOMB = "a: &a [1]\n" + "\n".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in itertools.pairwise("abcdefghijkl")
)
STRANGE_YAML = {
    "a date that cannot be": "data: {store: 2024-13-45}",
    "more digits than Python reads": "seed: " + "9" * 5000,
    "deep nesting": "name: " + "[" * 3000 + "]" * 3000,
    "aliases that stand for a billion values": BOMB + "\nname: *l",
    "an alias": "name: &one run\nlabels: *one",
    "a long text where a number is meant": "training: {batch: '" + "x" * 100_000 + "'}",
    "a long list": "training: {batch: [" + "1, " * 10_000 + "1]}",
}  # fmt: skip


@pytest.mark.parametrize("text", STRANGE_YAML.values(), ids=STRANGE_YAML)
def test_a_strange_file_is_refused_in_one_short_line(text: str, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml: ") as refused:
        load_config(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


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
    """The gradient of a matrix product takes two more; that of the voxels is not computed, and codes have none."""
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
    """`module:Name`, with its own section, which is checked like ours."""
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
        "    def forward(self, volume, mask=None, body=None): ...\n"
        "class Margin(ObjectiveConfig):\n"
        "    margin: float = 0.1\n"
        "class Triplet(Objective):\n"
        "    Config = Margin\n"
        "    needs = ('features', 'ages')\n"
        "    def forward(self, features, ages): ...\n"
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
