"""The published implementation of the encoder against ours with the same weights: ``python -m
tests.benchmarks.encoders``.

``--only zero_shot`` (or step, batches, ranking, vit3d) runs a part; the whole takes half an hour on an idle core.

The published implementation: float32, explicit attention matrices, the position network evaluated for every pair of
positions at every call, texts padded to 512 tokens, the volume encoded again for each abnormality, Adam. Full size (240
x 480 x 480 voxels), a BERT of base size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tests.benchmarks import vit3d
from tests.benchmarks.common import apart, machine, peak_gb, processor_seconds, table

ABNORMALITIES = 18
HERE = "tests.benchmarks.encoders"
PADDED = 512
PARTS = ("zero_shot", "step", "batches", "ranking", "vit3d")


def build(checkpointed: bool = False) -> Any:
    """A model of the published shape with random weights, the same in every run."""
    from transformers import BertConfig, BertModel

    from ctclip.config import ModelConfig, TextConfig
    from ctclip.models.ctvit import CTViT, CTViTConfig
    from ctclip.models.dual_encoder import DualEncoder
    from ctclip.models.text import TextEncoder, train_tokenizer
    from ctclip.preprocessing.spec import PreprocessingSpec

    torch.manual_seed(0)
    text = TextConfig(pooling="cls", width=768, depth=12, heads=12)
    volume = CTViTConfig(activation_checkpointing=checkpointed)
    bert = BertModel(BertConfig(vocab_size=30522), add_pooling_layer=False)
    tokenizer = train_tokenizer(["finding is present .", "finding is not present ."], 60)
    model = DualEncoder(
        CTViT(volume, PreprocessingSpec.load("ct_clip")),
        TextEncoder(bert, tokenizer, text),
        ModelConfig(volume=volume, text=text, dim=512),
    )
    for name, parameter in model.volume_encoder.named_parameters():
        # Scales and biases start at one and zero, which would hide errors in them.
        if parameter.ndim < 2:
            torch.nn.init.uniform_(parameter, 0.8, 1.2) if "weight" in name or "scale" in name else None
    return model


def volume() -> Tensor:
    """One smooth volume at full size."""
    coarse = torch.rand(1, 1, 24, 48, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(coarse, (240, 480, 480), mode="trilinear")


@contextlib.contextmanager
def published_way() -> Iterator[None]:
    """Attention, position bias and codes as the published code computes them, with gradients by PyTorch."""
    from ctclip.models import by_hand, ctvit
    from ctclip.models.text import TextEncoder

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

    def patches(self: Any, given: Tensor) -> Tensor:
        pt, p1, p2 = self.config.patch
        return self.embed(rearrange(given, "b c (t pt) (h p1) (w p2) -> b t h w (c pt p1 p2)", pt=pt, p1=p1, p2=p2))

    def padded(self: Any, texts: Any) -> dict[str, Tensor]:
        tokens = tokenise(self, texts)
        return {name: F.pad(ids, (0, PADDED - ids.shape[1])) for name, ids in tokens.items()}

    tokenise = TextEncoder.tokenise
    with (
        mock.patch.object(ctvit.Layer, "_attend", attend),
        mock.patch.object(ctvit.RelativeBias, "forward", all_pairs),
        mock.patch.object(ctvit.CTViT, "patches", patches),
        by_hand.switched_off(),
        mock.patch.object(TextEncoder, "tokenise", padded),
    ):
        yield


def prompts() -> tuple[list[str], list[str]]:
    names = [f"finding {number}" for number in range(ABNORMALITIES)]
    return [f"{name} is present." for name in names], [f"{name} is not present." for name in names]


def their_zero_shot(passes: int) -> dict[str, Any]:
    """Seconds of one encoding and of a pass over the abnormalities, and the scores of the first ``passes``."""
    model, given = build().eval(), volume()
    positive, negative = prompts()
    scores = []

    def detect() -> None:
        for yes, no in zip(positive[:passes], negative[:passes], strict=True):
            logits = model.logits(model.encode_volume(given), model.encode_text([yes, no]))
            scores.append(float(logits.softmax(dim=1)[0, 0]))

    with published_way(), torch.inference_mode():
        one = processor_seconds(lambda: model.encode_volume(given), 2)
        seconds = processor_seconds(detect, 1) * ABNORMALITIES / passes
    return {"one": one, "seconds": seconds, "scores": scores, "gb": peak_gb()}


def our_zero_shot() -> dict[str, Any]:
    """The same for ``PromptHead``: prompts and volume are encoded once."""
    from ctclip.heads.prompts import PromptHead
    from ctclip.prompts import load_prompts

    model, given = build().eval(), volume()
    names = [f"finding {number}" for number in range(ABNORMALITIES)]
    published = load_prompts("published")
    with torch.inference_mode():
        one = processor_seconds(lambda: model.encode_volume(given), 2)
        head = PromptHead(model, published, names)
        later = processor_seconds(lambda: head.score(model.encode(given)), 1)
        seconds = processor_seconds(lambda: PromptHead(model, published, names).score(model.encode(given)), 1)
        scores = head.probabilities(head.score(model.encode(given)))[0].tolist()
    return {"one": one, "seconds": seconds, "later": later, "scores": scores, "gb": peak_gb()}


def training_step(way: str) -> dict[str, float]:
    """Seconds and peak memory of one contrastive step at batch 1: forward, backward, the optimizer."""
    from ctclip import distributed
    from ctclip.training.allocator import keep_freed_memory

    if way != "published":  # as ``ctclip train`` begins
        distributed.prepare_environment()
        keep_freed_memory()
    model = build(checkpointed=way.endswith("checkpointed")).train()
    given = volume()
    tokens = ["A nodule is seen in the right upper lobe."]
    if way == "published":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        volumes = model.similarity.volume(model.volume_features(given))
        texts = model.similarity.text(model.text_features(model.text_encoder.tokenise(tokens)))
        # At batch 1 InfoNCE is constant: the logit itself has the same graph and a gradient.
        model.logits(volumes, texts).sum().backward()
        optimizer.step()

    with published_way() if way == "published" else contextlib.nullcontext():
        # The first step allocates memory that later steps reuse, mainly Adam's moments.
        seconds = processor_seconds(step, 2)
    return {"seconds": seconds, "gb": peak_gb()}


def ranking(volumes: int = 50) -> dict[str, float]:
    """Scores of phantoms by the published shape with random weights, on a smaller grid to save time."""
    from ctclip.config import ModelConfig, TextConfig
    from ctclip.heads.prompts import PromptHead
    from ctclip.models.ctvit import CTViTConfig
    from ctclip.models.dual_encoder import build_model
    from ctclip.models.text import train_tokenizer
    from ctclip.phantom.scan import make_scan
    from ctclip.preprocessing.spec import PreprocessingSpec
    from ctclip.prompts import load_prompts

    torch.manual_seed(0)
    config = ModelConfig(
        volume=CTViTConfig(codebook_size=8192),
        text=TextConfig(width=64, depth=2, heads=2, max_tokens=64),
    )
    tokenizer = train_tokenizer(["finding is present .", "finding is not present ."], 60)
    spec = dataclasses.replace(PreprocessingSpec.load("ct_clip"), shape=(120, 240, 240))
    model = build_model(config, spec, tokenizer).eval()
    head = PromptHead(model, load_prompts("published"), [f"finding {number}" for number in range(ABNORMALITIES)])

    def chest(patient: int) -> Tensor:
        hu = torch.from_numpy(make_scan(1, patient, scale=8.0).reconstructions[0].hu.astype("float32"))[None, None]
        return F.interpolate(hu, spec.shape, mode="trilinear").clamp(-1000, 1000) / 1000

    with torch.inference_mode():
        # A trained codebook is close to the tokens; random rows are equally far from all of them.
        encoder = model.volume_encoder
        tokens = torch.cat(
            [encoder.encode(encoder.patches(chest(patient))) for patient in range(volumes, volumes + 11)]
        )
        encoder.codebook.rows.copy_(F.normalize(tokens.flatten(0, 3)[: config.volume.codebook_size], dim=-1))
    return _ranked(head, (chest(patient) for patient in range(volumes)))


def ranking_of(model: str, store: str, volumes: int = 50) -> dict[str, float]:
    """Scores of a trained model on one stored volume of each of the first held-out scans."""
    from ctclip.heads.folder import PROMPTS, load_head
    from ctclip.inference.scans import StoredScans
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.store import VolumeStore

    loaded = load_model(Path(model))
    scans = StoredScans(VolumeStore(Path(store)), "valid", loaded.spec, Path(model))
    scans.table = scans.table.drop_duplicates("scan").head(volumes).reset_index(drop=True)
    head = load_head(loaded.path, PROMPTS, loaded.model)
    return _ranked(head, (torch.from_numpy(scans.voxels(row)[0])[None, None] for row in range(len(scans.table))))


def _ranked(head: Any, volumes: Iterable[Tensor]) -> dict[str, float]:
    """Rank correlation of float32 and bfloat16 scores over volumes, for each abnormality."""
    from scipy.stats import spearmanr

    whole, half = [], []
    for given in volumes:
        whole.append(head.score(head.model.encode(given))[0])
        with torch.autocast("cpu", torch.bfloat16):
            half.append(head.score(head.model.encode(given))[0].float())
    a, b = torch.stack(whole), torch.stack(half)
    found = [float(spearmanr(a[:, column], b[:, column]).statistic) for column in range(a.shape[1])]
    return {"lowest": min(found), "mean": sum(found) / len(found), "difference": float((a - b).abs().max()), "spread": float(a.std(dim=0).mean())}  # fmt: skip


def large_batch(batch: int) -> dict[str, float]:
    """Peak memory and seconds of one step of ``batch`` full-size volumes, encoded one at a time (GradCache)."""
    from ctclip import distributed
    from ctclip.config import Config
    from ctclip.data.batch import Batch
    from ctclip.objectives.objective import Context
    from ctclip.training.engine import Engine
    from ctclip.training.step import TrainingStep

    with distributed.process_group() as device:
        config = Config.model_validate({"training": {"batch": batch, "micro_batch": 1, "zero": {"stage": 1}}})
        engine = Engine(TrainingStep(Context(build(checkpointed=True)), config.objectives), config, device)
        tokens = [engine.tokenisers.texts([f"finding {i} is present."]) for i in range(batch)]
        volumes = volume().expand(batch, -1, -1, -1, -1).contiguous()
        given = Batch(volumes, tokens, torch.arange(batch), torch.arange(batch))
        return {"seconds": processor_seconds(lambda: engine.step(given, 0, 10), 1), "gb": peak_gb()}


def show_zero_shot(threads: int, passes: int) -> None:
    theirs = apart(HERE, "their_zero_shot", passes, threads=threads)
    ours = apart(HERE, "our_zero_shot", threads=threads)
    difference = max(abs(a - b) for a, b in zip(theirs["scores"], ours["scores"], strict=False))
    rows = [
        ["one encoding, seconds", f"{theirs['one']:.2f}", f"{ours['one']:.2f}", f"{theirs['one'] / ours['one']:.1f} x faster"],
        [f"zero-shot of {ABNORMALITIES} abnormalities, the first volume", f"{theirs['seconds']:.1f}", f"{ours['seconds']:.2f}", f"{theirs['seconds'] / ours['seconds']:.1f} x faster (bar 20)"],
        ["each further volume", f"{theirs['seconds']:.1f}", f"{ours['later']:.2f}", f"{theirs['seconds'] / ours['later']:.1f} x faster (bar 20)"],
        ["largest difference of a score", "", "", f"{difference:.1e} (bar 1e-4)"],
        ["memory, GB", f"{theirs['gb']:.1f}", f"{ours['gb']:.1f}", ""],
    ]  # fmt: skip
    ran = "" if passes == ABNORMALITIES else f"; published way: {passes} of {ABNORMALITIES} passes run, times {ABNORMALITIES / passes:.1f}"  # fmt: skip
    print(table(f"The published encoder, zero-shot of one volume{ran}", ["", "published way", "ctclip", ""], rows), flush=True)  # fmt: skip


def show_step(threads: int) -> None:
    ways = ("published", "ctclip", "ctclip, checkpointed")
    steps = {way: apart(HERE, "training_step", way, threads=threads) for way in ways}
    rows = [[way, f"{s['seconds']:.1f}", f"{steps['published']['seconds'] / s['seconds']:.2f} x (bar 2)", f"{s['gb']:.1f}"] for way, s in steps.items()]  # fmt: skip
    print(table("Its training step, batch 1", ["", "seconds", "speed", "peak GB"], rows))
    print(floor(threads), flush=True)


def floor(threads: int) -> str:
    """The time that the matrix products alone take at this machine's rate, for both implementations."""
    rate = apart("tests.benchmarks.vit3d", "matmul_rate", threads=threads)
    with torch.device("meta"):
        encoder = build().volume_encoder
        given = torch.zeros(1, 1, 240, 480, 480)
    ours = vit3d.products(lambda: encoder(given).pooled.sum().backward()) / 1e9
    # Forward and twice that backward: the position network over all pairs of 576 places, BERT's layers over 512 tokens.
    places = 3 * 2 * 576**2 * (2 * 512 + 512 * 512 + 512 * 8) / 1e9
    text = 3 * 2 * PADDED * 12 * (12 * 768**2) / 1e9
    # The gradient of the patches before their linear map.
    patches = 2 * 24**3 * 4000 * 512 / 1e9
    return "".join(
        f"Products of {way}: {count:,.0f} GFLOP; at {rate:.0f} GFLOP/s they take {count / rate:.1f} s.\n"
        for way, count in (("the published way", ours + places + text + patches), ("ctclip", ours))
    )


def show_batches(threads: int, batches: list[int]) -> None:
    rows = []
    for batch in batches:
        found = apart(HERE, "large_batch", batch, threads=threads)
        rows.append([str(batch), f"{found['gb']:.1f}", f"{found['seconds'] / batch:.1f}"])
    print(table("Larger batches, encoded one volume at a time with exact gradients", ["batch", "peak GB (bar at 8: 16)", "seconds a volume"], rows), flush=True)  # fmt: skip


def show_ranking(threads: int, model: Path | None, store: Path) -> None:
    if model is None:
        found, of = apart(HERE, "ranking", threads=threads), "phantoms (grid of 12 x 12 x 12, random weights)"
    else:
        found, of = apart(HERE, "ranking_of", str(model), str(store), threads=threads), f"held-out scans by {model}"
    rows = [["lowest of 18", f"{found['lowest']:.4f} (bar 0.999)"], ["mean of 18", f"{found['mean']:.4f}"],
            ["largest difference of a margin", f"{found['difference']:.1e}"], ["deviation of a margin over volumes", f"{found['spread']:.1e}"]]  # fmt: skip
    print(table(f"Scores of 50 {of}, bfloat16 against float32", ["Spearman", ""], rows), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--passes", type=int, default=ABNORMALITIES, help="passes of the published zero-shot to run")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[2, 8], help="full-size batches to measure the memory of"
    )
    parser.add_argument(
        "--model", type=Path, default=None, help="trained model for the comparison of rankings; default: random weights"
    )
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"), help="store for that model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--plot", type=Path, default=Path("encoders.png"), help="file for the plot of cost against tokens"
    )
    chosen = parser.parse_args()
    print(f"{machine()}; float32, {chosen.threads} threads, processor seconds\n")
    if "zero_shot" in chosen.only:
        show_zero_shot(chosen.threads, chosen.passes)
    if "step" in chosen.only:
        show_step(chosen.threads)
    if "batches" in chosen.only:
        show_batches(chosen.threads, chosen.batches)
    if "ranking" in chosen.only:
        show_ranking(chosen.threads, chosen.model, chosen.store)
    if "vit3d" in chosen.only:
        vit3d.show(chosen.threads, chosen.plot)


if __name__ == "__main__":
    main()
