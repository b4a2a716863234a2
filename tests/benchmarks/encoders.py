"""The published encoder run the published way, and ours with the same weights: ``python -m tests.benchmarks.encoders``.

The published way: float32, score matrices written out, the position network run over every pair of places at every
call, the volume encoded once more for each abnormality. Full size (240 x 480 x 480 voxels), a BERT of base size.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tests.benchmarks.common import apart, best_of, machine, peak_gb, table

ABNORMALITIES = 18


def build(checkpointed: bool = False) -> Any:
    """The published model's shape with random weights, every run the same."""
    from transformers import BertConfig, BertModel

    from ctclip.config import CTViTConfig, ModelConfig, TextConfig
    from ctclip.models.ctvit import CTViT
    from ctclip.models.dual_encoder import DualEncoder
    from ctclip.models.text import TextEncoder, train_tokenizer

    torch.manual_seed(0)
    text = TextConfig(pooling="cls", width=768, depth=12, heads=12)
    volume = CTViTConfig(activation_checkpointing=checkpointed)
    bert = BertModel(BertConfig(vocab_size=30522), add_pooling_layer=False)
    tokenizer = train_tokenizer(["finding is present .", "finding is not present ."], 60)
    model = DualEncoder(
        CTViT(volume), TextEncoder(bert, tokenizer, text), ModelConfig(volume=volume, text=text, dim=512)
    )
    for name, parameter in model.volume_encoder.named_parameters():
        # Scales and biases begin at one and zero, where a fault in them would not show.
        if parameter.ndim < 2:
            torch.nn.init.uniform_(parameter, 0.8, 1.2) if "weight" in name or "scale" in name else None
    return model


def volume() -> Tensor:
    """One volume at full size; smooth, as a scan is."""
    coarse = torch.rand(1, 1, 24, 48, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(coarse, (240, 480, 480), mode="trilinear")


@contextlib.contextmanager
def published_way() -> Iterator[None]:
    """Attention and position bias as the published code computes them."""
    from ctclip.models import ctvit

    def attend(self: Any, rows: Tensor, bias: Tensor | None) -> Tensor:
        query = rearrange(self.to_query(self.norm(rows)), "s n (h c) -> s h n c", h=self.heads)
        key, value = rearrange(self.to_key_value(rows), "s n (two h c) -> two s h n c", two=2, h=self.heads)
        query, key = F.normalize(query, dim=-1) * self.query_scale, F.normalize(key, dim=-1) * self.key_scale
        scores = query @ key.transpose(-1, -2) * ctvit.ATTENTION_SCALE
        if bias is not None:
            scores = scores + bias
        return self.out(rearrange(scores.softmax(dim=-1) @ value, "s h n c -> s n (h c)"))

    def all_pairs(self: Any, height: int, width: int) -> Tensor:
        places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
        places = places.reshape(-1, 2).float()
        offsets = places[:, None] - places[None, :]
        return self.net(torch.sign(offsets) * torch.log(offsets.abs() + 1)).permute(2, 0, 1)

    with mock.patch.object(ctvit.Layer, "_attend", attend), mock.patch.object(ctvit.RelativeBias, "forward", all_pairs):
        yield


def prompts() -> tuple[list[str], list[str]]:
    names = [f"finding {number}" for number in range(ABNORMALITIES)]
    return [f"{name} is present." for name in names], [f"{name} is not present." for name in names]


def their_zero_shot(passes: int) -> dict[str, Any]:
    """Seconds of one encoding and of a pass over the abnormalities, and the scores of the first ``passes``."""
    model, given = build().eval(), volume()
    positive, negative = prompts()
    with published_way(), torch.inference_mode():
        model.encode_volume(given)
        one = best_of(lambda: model.encode_volume(given), 1)
        began, scores = time.perf_counter(), []
        for yes, no in zip(positive[:passes], negative[:passes], strict=True):
            logits = model.logits(model.encode_volume(given), model.encode_text([yes, no]))
            scores.append(float(logits.softmax(dim=1)[0, 0]))
        seconds = (time.perf_counter() - began) * ABNORMALITIES / passes
    return {"one": one, "seconds": seconds, "scores": scores, "gb": peak_gb()}


def our_zero_shot() -> dict[str, Any]:
    """The same of ``Detector``: prompts embedded once, the volume encoded once."""
    from ctclip.inference.detector import Detector
    from ctclip.inference.prompts import load_prompts

    model, given = build().eval(), volume()
    names = [f"finding {number}" for number in range(ABNORMALITIES)]
    published = load_prompts("published")
    with torch.inference_mode():
        model.encode_volume(given)
        one = best_of(lambda: model.encode_volume(given), 2)
        began = time.perf_counter()
        scores = Detector(model, published, names).detect(given).probabilities[0].tolist()
        seconds = time.perf_counter() - began
    return {"one": one, "seconds": seconds, "scores": scores, "gb": peak_gb()}


def training_step(way: str) -> dict[str, float]:
    """Seconds and peak memory of one contrastive step at batch 1: forward, backward, AdamW."""
    model = build(checkpointed=way == "checkpointed").train()
    given = volume()
    tokens = model.text_encoder.tokenise(["A nodule is seen in the right upper lobe."])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        volumes = model.similarity.volume(model.volume_features(given))
        texts = model.similarity.text(model.text_features(tokens))
        # At batch 1 InfoNCE is constant: the logit itself has the same graph and a gradient.
        model.logits(volumes, texts).sum().backward()
        optimizer.step()

    with published_way() if way == "published" else contextlib.nullcontext():
        step()
        seconds = best_of(step, 1)
    return {"seconds": seconds, "gb": peak_gb()}


def large_batch(batch: int) -> dict[str, float]:
    """Peak memory and seconds of one step of ``batch`` full-size volumes, encoded one at a time (GradCache)."""
    from ctclip import distributed
    from ctclip.config import Config
    from ctclip.data.dataset import Batch
    from ctclip.training.engine import Engine
    from ctclip.training.step import ContrastiveStep

    with distributed.process_group() as device:
        config = Config.model_validate({"training": {"batch": batch, "micro_batch": 1, "zero": {"stage": 1}}})
        engine = Engine(ContrastiveStep(build(checkpointed=True), config.objectives), config, device)
        given = Batch(volume().expand(batch, -1, -1, -1, -1).contiguous(), [f"finding {i} is present." for i in range(batch)],
                      torch.arange(batch), torch.arange(batch), None)  # fmt: skip
        began = time.perf_counter()
        engine.step(given, 0, 10)
        return {"seconds": time.perf_counter() - began, "gb": peak_gb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--passes", type=int, default=ABNORMALITIES, help="of the published zero-shot that are run")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[2, 8], help="full-size batches whose memory is shown"
    )
    chosen = parser.parse_args()
    here, threads = "tests.benchmarks.encoders", len(os.sched_getaffinity(0))
    print(f"{machine()}; float32, {threads} threads\n")
    theirs, ours = (
        apart(here, "their_zero_shot", chosen.passes, threads=threads),
        apart(here, "our_zero_shot", threads=threads),
    )
    difference = max(abs(a - b) for a, b in zip(theirs["scores"], ours["scores"], strict=False))
    rows = [
        ["one encoding, seconds", f"{theirs['one']:.2f}", f"{ours['one']:.2f}", f"{theirs['one'] / ours['one']:.1f} x faster"],
        [f"zero-shot of {ABNORMALITIES} abnormalities, seconds", f"{theirs['seconds']:.1f}", f"{ours['seconds']:.2f}", f"{theirs['seconds'] / ours['seconds']:.1f} x faster (bar 20)"],
        ["largest difference of a score", "", "", f"{difference:.1e} (bar 1e-4)"],
        ["memory, GB", f"{theirs['gb']:.1f}", f"{ours['gb']:.1f}", ""],
    ]  # fmt: skip
    print(
        table("The published encoder, zero-shot of one volume", ["", "published way", "ctclip", ""], rows), flush=True
    )
    steps = {way: apart(here, "training_step", way, threads=threads) for way in ("published", "plain", "checkpointed")}
    rows = [[way, f"{s['seconds']:.1f}", f"{steps['published']['seconds'] / s['seconds']:.2f} x", f"{s['gb']:.1f}"] for way, s in steps.items()]  # fmt: skip
    print(table("Its training step, batch 1", ["", "seconds", "speed", "peak GB"], rows), flush=True)
    rows = []
    for batch in chosen.batches:
        found = apart(here, "large_batch", batch, threads=threads)
        rows.append([str(batch), f"{found['gb']:.1f}", f"{found['seconds'] / batch:.1f}"])
    print(table("Larger batches, encoded one volume at a time with exact gradients", ["batch", "peak GB (bar at 8: 16)", "seconds a volume"], rows))  # fmt: skip


if __name__ == "__main__":
    main()
