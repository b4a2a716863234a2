"""A step of the engine against plain PyTorch: two passes give the gradient of one, and the logged values are correct.

A few lines replace DeepSpeed at stage 0 on one rank; DeepSpeed itself is in tests/distributed.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from ctclip.config import Config
from ctclip.data.batch import Batch
from ctclip.errors import ConfigError
from ctclip.labels import labels_of_columns
from ctclip.models.batchnorm import GlobalBatchNorm3d
from ctclip.objectives.objective import Context
from ctclip.training.engine import Engine
from ctclip.training.optimizer import rate_factor
from ctclip.training.step import TrainingStep, pairs_of, parts_of
from tests.unit.small import dual_encoder

TEXTS = ["The heart is enlarged.", "No nodule is seen.", "A nodule lies in the upper lobe.", "There is no effusion."]
LABELS = labels_of_columns("two", ["heart", "nodule"])


class PlainDeepSpeed:
    """Losses are divided by the accumulation steps unless this is switched off, and gradients are averaged at the
    boundary."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: int) -> None:
        self.module, self.optimizer, self.parts = model, optimizer, parts
        self.boundaries: list[bool] = []
        self.boundary = True
        self.gradients: dict[str, Tensor] = {}
        self.passes: list[bool] = []
        self.norm: Any = None

    def __call__(self, *given: Any, **more: Any) -> Any:
        self.passes.append(torch.is_grad_enabled())
        return self.module(*given, **more)

    def train(self) -> None:
        self.module.train()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundary = is_boundary

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        (loss / self.parts if scale_wrt_gas else loss).backward()
        self.boundaries.append(self.boundary)

    def step(self) -> None:
        assert self.boundary
        gradients = {n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None}
        self.gradients = gradients
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> Any:
        return self.norm


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The calls that DeepSpeed received."""
    told: dict[str, Any] = {}

    def initialize(model: nn.Module, model_parameters: list[dict[str, Any]], config: dict[str, Any]) -> Any:
        told.update(config)
        optimizer = torch.optim.AdamW(model_parameters, fused=True)
        return PlainDeepSpeed(model, optimizer, config["gradient_accumulation_steps"]), optimizer, None, None

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    return told


def engine(
    objectives: dict[str, Any] | None = None, resumed: dict[str, Tensor] | None = None, seed: int = 0, **training: Any
) -> Engine:
    config = Config.model_validate({
        "objectives": objectives or {"clip": 1.0}, "seed": seed,
        "training": {"batch": 4, "learning_rate": 1e-3, "zero": {"stage": 0}, **training},
    })  # fmt: skip
    step = TrainingStep(Context(dual_encoder(), LABELS, sentences=tuple(TEXTS)), config.objectives)
    return Engine(step, config, torch.device("cpu"), resumed)


def batch(of: Engine, views: int = 1) -> Batch:
    parts, texts = of.parts, [text for text in TEXTS for _ in range(views)]
    texts = texts if views == 1 else [*TEXTS, *TEXTS[::-1]]
    size = len(texts) // parts
    cuts = [slice(number * size, (number + 1) * size) for number in range(parts)]
    per = 4 // parts
    tokenisers = of.tokenisers
    return Batch(
        torch.rand(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        [tokenisers.texts(texts[cut]) for cut in cuts],
        torch.arange(4), torch.arange(4 * views),
        words=None if tokenisers.words is None else [tokenisers.words(TEXTS[n * per : (n + 1) * per]) for n in range(parts)],
        columns={
            "labels": torch.tensor([[0.0, 1], [1, math.nan], [0, 0], [1, 1]]),
            "sentences": torch.tensor([[0, 1], [1, -1], [2, -1], [3, 0]]),
        },
    )  # fmt: skip


def with_one_graph(of: Engine, given: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, its parts and the gradients, with all parts encoded in one graph."""
    step = copy.deepcopy(of.module).train()
    encoded = [step(part, progress=progress) for part in parts_of(given, of.parts)]
    features = torch.cat([one.volumes for one in encoded]), torch.cat([one.texts for one in encoded])
    loss, logged = step(None, pairs_of(given), features, progress)
    for name in encoded[0].losses:
        logged[name] = torch.stack([one.losses[name] for one in encoded]).mean()
        loss = loss + logged[name]
    loss.backward()
    return loss, logged, {n: p.grad for n, p in step.named_parameters() if p.grad is not None}


EVERYTHING = {"clip": 1.0, "captioning": 0.5, "labels": {"weight": 0.7, "begin": 0.5}}


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize(
    ("objectives", "views", "number"),
    [({"clip": 1.0}, 1, 0), ({"siglip": 2.0, "sentences": 3.0}, 2, 1), (EVERYTHING, 1, 1), (EVERYTHING, 1, 3)],
)
def test_two_passes_give_the_gradient_of_one(micro_batch, objectives, views, number) -> None:
    run = engine(objectives, micro_batch=micro_batch)
    given = batch(run, views)
    loss, parts, gradients = with_one_graph(run, given, number / 5)
    assert run.step(given, number, 5) is None
    told = run.deepspeed
    assert set(told.gradients) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(told.gradients[name], gradient, atol=2e-6, rtol=1e-4, msg=name)
    (logged,) = run.read()
    assert set(logged) == {"loss", "logit_scale", "gradient_norm", "learning_rate", *objectives}
    assert logged["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, value in parts.items():
        assert logged[name] == pytest.approx(float(value.detach()), rel=1e-5), name
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    assert logged["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    count = 4 // micro_batch
    if count == 1:
        assert (told.boundaries, told.passes) == ([True], [True])
    else:
        # Features without a graph, then the contrast, then each part again; gradients are averaged after the last part.
        assert told.passes == [False] * count + [True] * (count + 1)
        assert told.boundaries == [False] * count + [True]


def test_the_plain_step_is_divided_by_nothing_and_two_passes_neither(plain) -> None:
    for micro_batch, parts in ((None, 1), (4, 1), (2, 2), (1, 4)):
        run = engine(micro_batch=micro_batch)
        assert run.parts == run.tokenisers.parts == plain["gradient_accumulation_steps"] == parts


def test_rates_rise_and_fall_and_are_logged() -> None:
    run = engine({"clip": 1.0}, warmup=0.4, text_learning_rate=5e-4)
    base = [group["lr"] for group in run.optimizer.param_groups]
    assert {*base} == {1e-3, 5e-4}
    given, expected = batch(run), []
    for number in range(5):
        run.step(given, number, 5)
        factor = rate_factor(number / 5, 0.4)
        assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([rate * factor for rate in base])
        expected.append(1e-3 * factor)
    assert [step["learning_rate"] for step in run.read()] == pytest.approx(expected)
    assert run.read() == [], "what was read is not told again"
    run.step(given, 4, 5)
    assert len(run.read()) == 1


def test_the_next_step_starts_where_the_last_has_led() -> None:
    """The same steps in plain PyTorch."""
    run = engine(micro_batch=2)
    given, step = batch(run), copy.deepcopy(run.module).train()
    sides = [
        [p for n, p in step.named_parameters() if p.requires_grad and (p.ndim > 1) is many] for many in (True, False)
    ]
    adam = torch.optim.AdamW([{"params": sides[0], "weight_decay": 0.05}, {"params": sides[1], "weight_decay": 0.0}])
    for number in range(3):
        for group in adam.param_groups:
            group["lr"] = 1e-3 * rate_factor(number / 3, 0.05)
        encoded = [step(part) for part in parts_of(given, 2)]
        features = torch.cat([one.volumes for one in encoded]), torch.cat([one.texts for one in encoded])
        step(None, pairs_of(given), features)[0].backward()
        adam.step()
        adam.zero_grad()
        run.step(given, number, 3)
    # Where a gradient is zero except for rounding, Adam turns the rounding into steps.
    far = [
        (one - other).abs().max() > 1e-4 for one, other in zip(run.module.parameters(), step.parameters(), strict=True)
    ]
    assert sum(map(bool, far)) <= 2


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_gradient_that_is_no_number_moves_nothing_and_is_told(micro_batch: int) -> None:
    run = engine(micro_batch=micro_batch)
    given, before = batch(run), copy.deepcopy(run.module.state_dict())
    wrong = copy.copy(given)
    wrong.volumes = given.volumes.clone()
    wrong.volumes[1, 0, 2, 2, 2] = math.nan
    run.step(wrong, 1, 5)
    assert all(torch.equal(value, before[name]) for name, value in run.module.state_dict().items())
    (logged,) = run.read()
    assert math.isnan(logged["loss"])
    assert math.isnan(logged["gradient_norm"])
    run.step(given, 1, 5)
    assert any(not torch.equal(value, before[name]) for name, value in run.module.state_dict().items())
    assert math.isfinite(run.read()[0]["gradient_norm"])


@pytest.mark.parametrize(("norm", "logged"), [
    (2.5, 2.5), (0.0, 0.0), (None, math.nan), (-1.0, math.nan), (math.inf, math.nan), (torch.tensor(0.5), 0.5),
])  # fmt: skip
def test_at_higher_stages_deepspeed_says_the_norm(norm: Any, logged: float) -> None:
    run = engine()
    run.stage, run.deepspeed.norm = 1, norm
    run.step(batch(run), 0, 5)
    assert run.read()[0]["gradient_norm"] == pytest.approx(logged, nan_ok=True)
    assert not hasattr(run.optimizer, "found_inf"), "from stage 1 on it leaves parameters alone itself"


def test_random_numbers_are_those_of_the_step() -> None:
    """Random numbers depend on the seed, the step and the rank: dropout in a resumed run equals that in an
    uninterrupted one."""
    seeds = []
    for seed, number in ((0, 1), (0, 1), (0, 2), (5, 1)):
        run = engine(seed=seed)
        run.step(batch(run), number, 5)
        seeds.append(torch.initial_seed())
    assert seeds[0] == seeds[1]
    assert len({*seeds}) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_resumed_engine_makes_the_same_step() -> None:
    run = engine()
    given = batch(run)
    run.step(given, 1, 5)
    state = run.state()
    assert {name.split("/")[0] for name in state} == {"state", "exp_avg", "exp_avg_sq", "optimizer_step"}
    assert set(run.parameters()) == {name for name in state if name.startswith("state/")}
    again = engine(resumed=state)
    for one in (run, again):
        one.step(given, 2, 5)
    for name, value in run.state().items():
        torch.testing.assert_close(again.state()[name], value, msg=name)
    assert float(again.state()["optimizer_step"]) == 2


def test_what_the_engine_says_of_itself() -> None:
    run = engine({"clip": 1.0, "siglip": {"begin": 0.25}, "labels": {"begin": 0.5}})
    assert run.progress_at(10) == {3, 5}
    assert run.progress_at(9) == {3, 5}
    assert run.tokenisers.words is None
    assert not run.module.bf16
    with run.gathered():
        pass
    words = engine({"clip": 1.0, "captioning": 1.0}, precision="bf16")
    assert words.tokenisers.words is not None
    assert set(words.tokenisers.words(TEXTS)) == {"input_ids", "attention_mask"}
    assert words.module.bf16


@pytest.mark.parametrize("compiled", [True, False])
def test_the_volume_encoder_is_compiled_if_asked(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: calls.append(self))
    run = engine(compile=compiled)
    assert calls == ([run.module.model.volume_encoder] if compiled else [])


def test_the_encoder_ends_its_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = engine(micro_batch=1)
    calls: list[int] = []
    monkeypatch.setattr(type(run.module.model.volume_encoder), "end_step", lambda self: calls.append(1))
    run.module.eval()
    run.step(batch(run), 0, 5)
    assert calls == [1]
    assert run.module.training


def test_at_stage_3_the_text_side_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    @contextlib.contextmanager
    def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
        calls.append([id(parameter) for parameter in parameters])
        yield
        calls.append("left")

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", gathered)
    run = engine()
    for stage in (0, 2):
        run.stage = stage
        with run.gathered():
            assert calls == []
    run.stage = 3
    model = run.module.model
    with run.gathered():
        held = {
            id(p) for part in (model.text_encoder, model.text_projection, model.similarity) for p in part.parameters()
        }
        assert {*calls[0]} == held
        assert calls[1:] == []
    assert calls[1:] == ["left"]


@pytest.mark.parametrize("norm", [nn.BatchNorm3d, GlobalBatchNorm3d, nn.Identity])
def test_batch_norm_is_allowed_only_where_a_share_is_encoded_at_once(norm: type[nn.Module]) -> None:
    """Batch statistics depend on the volumes that are encoded together."""
    for micro_batch in (4, 2):
        config = Config.model_validate({"training": {"batch": 4, "micro_batch": micro_batch, "zero": {"stage": 0}}})
        step = TrainingStep(Context(dual_encoder()), config.objectives)
        step.model.volume_encoder.stem = nn.Sequential(norm(1))
        if micro_batch == 4 or norm is nn.Identity:
            Engine(step, config, torch.device("cpu"))
        else:
            with pytest.raises(ConfigError, match=r"training\.micro_batch: .*batch norm"):
                Engine(step, config, torch.device("cpu"))
