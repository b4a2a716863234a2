"""`ctclip config`: every key has a meaning, every default is that of the schema, and every value has an origin."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ctclip import plugins
from ctclip.config import Config
from ctclip.config_files import build_config, load_config, read_config
from ctclip.config_keys import key, keys, section_keys, values_with_origins
from ctclip.errors import ConfigError
from ctclip.evaluation.protocol import Protocol
from ctclip.labels import LabelSet
from ctclip.prompts import PromptSet

KEYS = keys()


def test_every_key_has_a_meaning() -> None:
    others = [one for schema in (LabelSet, PromptSet, Protocol) for one in section_keys(schema)]
    assert not [one.path for one in [*KEYS, *others] if len(one.meaning) < 5]


def test_keys_are_those_of_a_configuration() -> None:
    """The list contains everything in a dump, with every encoder and objective in turn."""
    listed = {one.path for one in KEYS}
    dumped: set[str] = set()
    for encoder in plugins.OURS["encoder"]:
        dumped |= {path for path, _, _ in values_with_origins(_config({"model": {"volume": {"kind": encoder}}}), {})}
    for objective in plugins.OURS["objective"]:
        dumped |= {path for path, _, _ in values_with_origins(_config({"objectives": {objective: 1.0}}), {})}
    assert dumped == listed


def test_defaults_are_those_of_the_schema() -> None:
    shared = {one.path: one.default for one in KEYS if one.kind in ("", "vit3d", "clip")}
    for path, value, _ in values_with_origins(Config(), {}):
        assert shared[path] == value


def test_a_default_that_is_written_down_changes_nothing() -> None:
    overrides = [f"{one.path}={one.default}" for one in KEYS if not one.kind and one.path != "model.volume.kind"]
    assert load_config("phantom_tiny", overrides).training == Config().training


def test_where_a_value_came_from(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: small\nname: mine\ntraining: {zero: 2}\n")
    config, origins = read_config(str(recipe), ["training.epochs=3", "model.dim=64"])
    found = {path: (value, origin) for path, value, origin in values_with_origins(config, origins)}
    assert found["name"] == ("mine", str(recipe))
    assert found["model.volume.width"] == ("384", "configs/models/small.yaml")
    assert found["model.dim"] == ("64", "command line")
    assert found["training.epochs"] == ("3.0", "command line")
    assert found["training.zero.stage"] == ("2", str(recipe))
    assert found["training.batch"] == ("32", "default")


def test_a_size_is_named_on_the_command_line() -> None:
    small = load_config("ct_rate_vit3d_base", ["model=small", "model.dim=64"])
    assert small.model.model_copy(update={"dim": 512}) == load_config("ct_rate_vit3d_base", ["model=small"]).model
    assert (small.model.dim, small.model.volume.depth) == (64, 8)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="did you mean small"):
        load_config("ct_rate_vit3d_base", ["model=smal"])
    whole = load_config("ct_rate_vit3d_base", ["model={dim: 32}"])
    assert whole.model.dim == 32


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"training\.batch"):
        key("training.bacth")
    assert {one.kind for one in key("model.volume.depth")} == {"vit3d", "resnet3d", "slices"}
    assert len(key("training.zero")) == 2


def _config(values: dict) -> Config:  # type: ignore[type-arg]
    return build_config(yaml.safe_load(yaml.safe_dump(values)), "test")
