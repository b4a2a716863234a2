"""Encoders: shapes, refusals, air tokens, batch norm over ranks' sums, text chunks, and the model folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ctclip.config import ModelConfig, TextConfig, objective_configs
from ctclip.data.air import BodyTokens
from ctclip.data.reports import Report
from ctclip.errors import CheckpointError, ConfigError
from ctclip.labels import labels_of_columns
from ctclip.models.batchnorm import GlobalBatchNorm3d
from ctclip.models.dual_encoder import DualEncoder, build_model
from ctclip.models.folder import load_model, save_model
from ctclip.models.resnet3d import ResNet3D, ResNet3DConfig
from ctclip.models.text import build_text_encoder, train_tokenizer
from ctclip.models.vit3d import ViT3D, ViT3DConfig
from ctclip.objectives.objective import Context
from ctclip.training.step import Pairs, Part, TrainingStep
from ctclip.training.text_warmup import lock_text
from tests.unit.small import spec_of

SMALL = ViT3DConfig(stages=((8, 1), (16, 0)), width=24, heads=2, depth=2, patch=(2, 2, 2), registers=2)
SPEC = spec_of((16, 16, 24), (3.0, 1.5, 1.5))
LABELS = labels_of_columns("two", ["Nodule", "Effusion"])
SENTENCES = ["The heart is enlarged.", "No pleural effusion is seen.", "A nodule lies in the upper lobe."]


def model() -> DualEncoder:
    torch.manual_seed(0)
    config = ModelConfig(volume=SMALL, text=TextConfig(width=16, depth=1, heads=2, max_tokens=16), dim=12)
    return build_model(config, SPEC, train_tokenizer(SENTENCES * 20, 200))


def volume(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 1, 16, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_spec_that_tokens_do_not_divide_is_refused_when_the_model_is_built() -> None:
    with pytest.raises(ConfigError, match=r"tokens of 8 x 8 x 8 voxels .* \(16 x 12 x 24 voxels\): prepare them"):
        build_model(ModelConfig(volume=SMALL), spec_of((16, 12, 24), (3.0, 1.5, 1.5)))


def test_tokens_keep_their_grid_and_everything_learns() -> None:
    encoder = ViT3D(SMALL.model_copy(update={"pooling": ("attention", "mean", "max")}), SPEC)
    found = encoder(volume())
    assert found.grid == (2, 2, 3)
    assert found.tokens.shape == (2, 12, 24)
    assert found.pooled.shape == (2, encoder.width)
    found.pooled.square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_residual_network_of_monai() -> None:
    encoder = ResNet3D(ResNet3DConfig(width_factor=0.125), SPEC).eval()
    found = encoder(volume())
    assert found.pooled.shape == (2, encoder.width)
    assert found.tokens.shape[1] == found.grid[0] * found.grid[1] * found.grid[2]
    alone = torch.cat([encoder(part).pooled for part in volume().split(1)])
    assert torch.allclose(found.pooled, alone, atol=1e-5)


def test_a_volume_is_encoded_the_same_in_any_batch() -> None:
    encoder = ViT3D(SMALL, SPEC).eval()
    alone = torch.cat([encoder(part).pooled for part in volume(3).split(1)])
    assert torch.allclose(encoder(volume(3)).pooled, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(2, 16, 16, 24), r"\(B, 1, D, H, W\)"),
        (torch.zeros(1, 1, 15, 16, 24), "axis order"),
        (torch.full((1, 1, 16, 16, 24), -1000.0), "Hounsfield"),
        (torch.full((1, 1, 16, 16, 24), torch.nan), "nan"),
    ],
)
def test_a_wrong_volume_is_explained(given: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model().encode(given)
    with pytest.raises(ValueError, match=said):
        model().encode_volume(given)


def test_air_outside_is_dropped_and_lungs_never() -> None:
    body = torch.full((1, 1, 16, 48, 48), -1.0)
    body[..., 12:36, 12:36] = 0.04
    body[..., 18:30, 18:30] = -0.98  # as empty as emphysema, but within the chest wall
    spec = spec_of((16, 48, 48))
    dropped = ~BodyTokens((4, 4, 4), spec).of_volumes(body)[0].reshape(4, 12, 12)
    assert dropped[:, 0].all()
    assert not dropped[:, 3:9, 3:9].any()
    config = SMALL.model_copy(update={"drop_air": True})
    encoder = ViT3D(config, spec).eval()
    found = encoder(body)
    kept = found.tokens.abs().sum(dim=2).reshape(found.grid) > 0
    assert kept.any()
    assert not kept.all()
    assert found.real is not None
    assert torch.equal(found.real.reshape(found.grid), kept)
    bodies = torch.cat([body, torch.full_like(body, 0.04)])
    assert torch.allclose(encoder(bodies).pooled[:1], found.pooled, atol=1e-5), "a fuller neighbour changes nothing"


def test_padding_takes_no_part() -> None:
    encoder = ViT3D(SMALL, SPEC).eval()
    mask = torch.ones(1, 1, 16, 16, 24, dtype=torch.bool)
    mask[..., 16:] = False
    found = encoder(volume(1), mask)
    assert (found.tokens.reshape(1, 2, 2, 3, 24)[..., 2, :] == 0).all()


def test_the_stem_is_pooled_over_real_cells_alone() -> None:
    torch.manual_seed(0)
    encoder = ViT3D(SMALL.model_copy(update={"pool_stem": True}), SPEC).eval()
    mask = torch.ones(1, 1, 16, 16, 24, dtype=torch.bool)
    mask[..., 16:] = False
    seen = {}
    for number, layer in enumerate(encoder.stem.convolutions):
        layer.register_forward_pre_hook(lambda _, inputs, number=number: seen.__setitem__(number, inputs[0][0]))
    pooled = encoder(volume(1), mask).pooled[0, 24 * 2 :]
    fine, coarse = seen[1][..., :8], seen[2][..., :4]
    expected = [
        fine.mean(dim=(1, 2, 3)),
        fine.amax(dim=(1, 2, 3)),
        coarse.mean(dim=(1, 2, 3)),
        coarse.amax(dim=(1, 2, 3)),
    ]
    torch.testing.assert_close(pooled, torch.cat(expected))


def test_extremes_are_those_of_each_patch_and_window() -> None:
    torch.manual_seed(0)
    windows = ((-1000.0, 1000.0), (-160.0, 240.0))
    stem = ViT3D(SMALL.model_copy(update={"extremes": True, "stages": (), "windows": windows}), SPEC).stem
    torch.nn.init.zeros_(stem.embed.weight)
    torch.nn.init.zeros_(stem.embed.bias)
    found, _ = stem(volume(1))
    shown = torch.cat([volume(1), ((volume(1) * 1000 - 40) / 200).clamp(-1, 1)], dim=1)
    highest, lowest = (sign * torch.nn.functional.max_pool3d(sign * shown, stem.patch) for sign in (1, -1))
    expected = torch.einsum(
        "bkdhw,ck->bcdhw", torch.stack([lowest, highest], dim=2).flatten(1, 2), stem.extremes.weight
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_global_batch_norm_is_batch_norm() -> None:
    torch.manual_seed(0)
    ours, theirs = GlobalBatchNorm3d(5), torch.nn.BatchNorm3d(5)
    x, weight = torch.randn(4, 5, 3, 4, 2) * 3 + 1, torch.randn(4, 5, 3, 4, 2)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (ours(a) * weight).square().sum().backward()
    (theirs(b) * weight).square().sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-3, rtol=1e-4)
    assert torch.allclose(ours.weight.grad, theirs.weight.grad, rtol=1e-4)
    assert torch.allclose(ours.running_var, theirs.running_var, rtol=1e-4)


def test_long_reports_are_chunked_not_cut() -> None:
    text = model().text_encoder
    long = " ".join(SENTENCES * 4)
    tokens = text.tokenise([long, SENTENCES[0]])
    assert tokens["input_ids"].shape[1] <= 16
    assert tokens["owner"].tolist().count(0) > 2
    ids = text.tokenizer(long, add_special_tokens=False)["input_ids"]
    kept = tokens["input_ids"][tokens["chunk"][tokens["owner"] == 0]]
    special = {text.tokenizer.cls_token_id, text.tokenizer.sep_token_id, text.tokenizer.pad_token_id}
    assert [int(i) for row in kept for i in row if int(i) not in special] == ids
    assert text(**tokens).shape == (2, 16)


def test_any_folder_of_bert_with_its_tokenizer(shared, tmp_path) -> None:
    folder = shared / "text" / "cxr_bert_tokenizer"
    config = TextConfig(pretrained=str(folder), weights="random", pooling="cls")
    encoder = build_text_encoder(config)
    assert encoder(**encoder.tokenise(["Cardiomegaly.", "No cardiomegaly."])).shape == (2, 768)
    with pytest.raises(CheckpointError, match="weights=random"):
        build_text_encoder(TextConfig(pretrained=str(folder)))


def test_a_model_folder_round_trips(tmp_path) -> None:
    made = model().eval()
    save_model(tmp_path / "model", made, LABELS)
    loaded = load_model(tmp_path / "model")
    assert torch.equal(loaded.model.encode_volume(volume()), made.encode_volume(volume()))
    assert torch.equal(loaded.model.encode_text(SENTENCES), made.encode_text(SENTENCES))
    assert loaded.spec == SPEC
    assert loaded.labels == LABELS


def test_a_damaged_model_folder_is_named(tmp_path) -> None:
    save_model(tmp_path / "model", model(), LABELS)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(tmp_path / "model")
    with pytest.raises(CheckpointError, match="not a ctclip model folder"):
        load_model(tmp_path)


def test_a_model_too_large_for_its_weights_is_named_before_it_is_built(tmp_path: Path) -> None:
    save_model(tmp_path / "model", model(), LABELS)
    path = tmp_path / "model" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    # Each layer would need 200 GB.
    values["volume"]["width"] = 65536
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(CheckpointError, match=r"config\.yaml: describes a volume encoder of [\d,]+ million parameters"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value: float, tmp_path: Path) -> None:
    """Of a training that diverged; their scores would be empty cells of a table."""
    save_model(tmp_path / "model", model(), LABELS)
    weights = tmp_path / "model" / "model.safetensors"
    (weights.parent / "SHA256SUMS").unlink()
    state = load_file(weights)
    state["text_projection.weight"][0, 0] = value
    save_file(state, weights)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: text_projection\.weight holds values that are not finite"
    ):
        load_model(tmp_path / "model")


def test_a_model_card_is_text_for_people(tmp_path: Path) -> None:
    """In folders of version 0.2, which the user may have edited in another encoding."""
    save_model(tmp_path / "model", model(), LABELS)
    (tmp_path / "model" / "trained_on.yaml").unlink()
    (tmp_path / "model" / "model_card.md").write_bytes("M\xfcller\nsupervision: reports\n".encode("latin-1"))
    assert load_model(tmp_path / "model").trained_on.supervision == "reports"


def test_a_report_is_the_mean_of_its_sentences_and_shared_ones_are_encoded_once() -> None:
    reports = ["There is an effusion. No nodule is seen.", "No nodule is seen.", "No nodule is seen. Normal heart. There is an effusion."]  # fmt: skip
    encoder = build_text_encoder(
        TextConfig(vocabulary=200, width=16, depth=1, heads=2, max_tokens=64, chunks="sentence"),
        train_tokenizer(reports, 200),
    ).eval()
    tokens = encoder.tokenise(reports)
    assert len(tokens["input_ids"]) == 3
    found = encoder(**tokens)
    alone = {
        text: encoder(**encoder.tokenise([text]))[0]
        for text in ("There is an effusion.", "No nodule is seen.", "Normal heart.")
    }
    expected = (alone["There is an effusion."] + alone["No nodule is seen."]) / 2
    assert torch.allclose(found[0], expected, atol=1e-6)
    assert torch.allclose(found[1], alone["No nodule is seen."], atol=1e-6)
    assert torch.allclose(found[2], torch.stack(list(alone.values())).mean(dim=0), atol=1e-6)


def test_a_locked_text_side_is_a_fixed_function_of_the_text() -> None:
    """After it is locked: standardised over all reports, the same in training and in use, and unchanged by every
    step."""
    torch.manual_seed(0)
    config = ModelConfig(
        volume=SMALL, text=TextConfig(width=16, depth=1, heads=2, max_tokens=32), dim=12, standardise=True
    )
    dual = build_model(config, SPEC, train_tokenizer(SENTENCES * 20, 200)).train()
    reports = [
        Report({"findings": one, "impression": other}) for one in SENTENCES for other in SENTENCES if one != other
    ]
    lock_text(dual, reports, torch.device("cpu"))
    texts = [report.text() for report in reports]
    features = dual.text_features(dual.text_encoder.tokenise(texts))
    expected = (features - features.mean(dim=0)) / (features.var(dim=0) + 1e-5).sqrt()
    torch.testing.assert_close(dual.encode_prompts(texts), expected, atol=1e-4, rtol=1e-4)
    step = TrainingStep(Context(dual.train()), objective_configs({"clip": {"queue": 4}}))
    before = dual.encode_text(texts[:1])  # a single volume in training: the statistics of a batch would refuse it
    optimizer = torch.optim.SGD([p for p in step.parameters() if p.requires_grad], lr=0.1)
    pairs = Pairs(torch.arange(2), torch.arange(2), {})
    loss, _ = step(Part(volume(), dual.text_encoder.tokenise(texts[:2])), pairs)
    loss.backward()
    optimizer.step()
    assert all(p.grad is None for name, p in dual.named_parameters() if "text" in name)
    assert torch.equal(dual.encode_text(texts[:1]), before)
    assert torch.equal(dual.eval().encode_text(texts[:1]), before)
