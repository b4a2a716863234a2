"""vit3d against the published encoder, its cost by number of tokens, and the effect of leaving out air.

Called by ``python -m tests.benchmarks.encoders``; times are processor seconds on one thread (``processor_seconds``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ctclip.models import vit3d
from ctclip.models.ctvit import CTViT, CTViTConfig
from ctclip.models.vit3d import ViT3D, ViT3DConfig
from ctclip.preprocessing.spec import PreprocessingSpec
from tests.benchmarks.common import apart, peak_gb, processor_seconds, table

HERE = "tests.benchmarks.vit3d"
SPEC = PreprocessingSpec.load("ct_clip")
PUBLISHED = SPEC.shape
REAL = Path(__file__).parents[3] / "shared" / "ct" / "dicom"
# As many parameters as the published encoder on its grid of 24 x 24 x 24 tokens; every third layer attends between windows.
EQUAL = ViT3DConfig(
    patch=(10, 20, 20), stages=(), width=512, heads=8, depth=7, window=(4, 6, 6), global_every=3,
    global_over="windows", drop_air=True, pooling=("attention", "mean"),
)  # fmt: skip
LAST = {"global_every": EQUAL.depth, "global_over": "tokens"}
SMALL = ViT3DConfig(patch=(4, 4, 4), stages=(), width=192, heads=6, depth=4, window=(4, 6, 6), global_every=4)


def chest(shape: tuple[int, int, int] = PUBLISHED) -> Tensor:
    """A phantom's chest (1, 1, *shape) in [-1, 1]."""
    from ctclip.phantom.scan import make_scan

    hu = torch.from_numpy(make_scan(1, 0, scale=4.0).reconstructions[0].hu.astype(np.float32))
    return F.interpolate(hu[None, None], shape, mode="trilinear").clamp(-1000, 1000) / 1000


def _seconds(encoder: nn.Module, volume: Tensor, times: int = 2) -> dict[str, float]:
    """Processor seconds of encoding and of a training step's forward and backward."""

    def step() -> None:
        encoder.zero_grad()
        encoder(volume).pooled.square().mean().backward()

    with torch.inference_mode():
        encoder.eval()(volume)
        encoding = processor_seconds(lambda: encoder(volume), times)
    encoder.train()
    return {"encoding": encoding, "step": processor_seconds(step, 2)}


def at_equal_parameters() -> dict[str, Any]:
    volume, found = chest(), {}
    torch.manual_seed(0)
    encoders = {
        "ctvit": CTViT(CTViTConfig(), SPEC),
        "vit3d, all tokens": ViT3D(EQUAL.model_copy(update={"drop_air": False}), SPEC),
        "vit3d, air left out": ViT3D(EQUAL, SPEC),
        "vit3d, air left out, the last layer over all tokens": ViT3D(EQUAL.model_copy(update=LAST), SPEC),
    }
    for name, encoder in encoders.items():
        parameters = sum(p.numel() for p in encoder.parameters()) / 1e6
        found[name] = {"parameters": parameters, "operations": operations(encoder, volume), **_seconds(encoder, volume)}
    air = left_out(encoders["vit3d, air left out"], volume)
    return {"rows": found, "air": air, "rate": matmul_rate()}


def left_out(encoder: Any, volume: Tensor) -> float:
    """Share of the tokens that are air outside the body."""
    return 1 - float(encoder.body_tokens().of_volumes(volume).mean())


def cube(side: int) -> PreprocessingSpec:
    """Volumes of ``side`` ^ 3 voxels."""
    return PreprocessingSpec("cube", spacing=(1.5, 1.5, 1.5), shape=(side, side, side))


def _fused_attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Operations of the fused CPU attention, which the counter does not know; shapes (B, heads, n, c)."""
    batch, heads, rows, width = query
    return int(4 * batch * heads * rows * key[2] * width)


def operations(encoder: nn.Module, volume: Tensor) -> float:
    """GFLOP of the matrix products of encoding ``volume``, counted as they are run."""
    with torch.inference_mode():
        return products(lambda: encoder(volume)) / 1e9


def matmul_rate() -> float:
    """GFLOP per second of the layer's largest matrix product, by processor time."""
    a, b = torch.randn(13824, 512), torch.randn(512, 2730)
    return 2 * 13824 * 512 * 2730 / processor_seconds(lambda: a @ b, 3) / 1e9


def products(action: Callable[[], object]) -> float:
    """Operations of all matrix products in ``action``, forward and backward.

    Backward passes of convolutions are left out, because the counter treats depthwise convolutions as dense.
    """
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        action()
    counts = counter.get_flop_counts()["Global"]
    return float(sum(count for operation, count in counts.items() if "convolution_backward" not in str(operation)))


WAYS = {
    "full": ("full attention", {"window": None}),
    "windows": ("windows of 4 x 6 x 6, the last layer over all tokens", {}),
    "between": ("windows of 4 x 6 x 6, the last layer between windows", {"global_over": "windows"}),
}


def of_tokens(grids: list[int]) -> list[dict[str, float]]:
    """Seconds to encode n ^ 3 tokens for each n of ``grids``, with each kind of attention."""
    found = []
    for side in grids:
        spec = cube(4 * side)
        encoders = {name: ViT3D(SMALL.model_copy(update=changes), spec).eval() for name, (_, changes) in WAYS.items()}
        volume = torch.rand(1, 1, 4 * side, 4 * side, 4 * side) * 2 - 1
        with torch.inference_mode():
            row = {name: processor_seconds(lambda e=e, v=volume: e(v), 1) for name, e in encoders.items()}
        found.append({"tokens": float(side**3), **row})
    return found


def one_layer(way: str) -> dict[str, float]:
    """Seconds and peak memory of a layer's forward and backward over 24 ^ 3 tokens."""
    torch.manual_seed(0)
    config = SMALL.model_copy(update={"depth": 1, "global_every": 2, "window": None if way == "full" else SMALL.window})
    encoder, volume = ViT3D(config, cube(96)), torch.rand(1, 1, 96, 96, 96) * 2 - 1
    place = torch.stack(torch.meshgrid(*[torch.arange(24)] * 3, indexing="ij"), dim=-1).flatten(0, 2)
    window = place // torch.tensor(SMALL.window)
    own, before = vit3d.Block.forward, peak_gb()

    def masked(self: Any, tokens: Tensor, rotation: Any, attends: Any, windows: Any) -> Tensor:
        together = (window[:, None] == window[None]).all(dim=-1)
        registers = tokens.shape[1] - len(window)
        return own(self, tokens, rotation, F.pad(together, (registers, 0, registers, 0), value=True)[None, None])

    with mock.patch.object(vit3d.Block, "forward", masked if way == "masked" else own):
        seconds = processor_seconds(lambda: encoder(volume).pooled.square().mean().backward(), 1)
    return {"seconds": seconds, "gb": peak_gb() - before}


def air() -> list[list[str]]:
    """Share of tokens left out and the resulting speed, for a phantom and, if available, real scans."""
    from ctclip.preprocessing import prepare

    spec = PreprocessingSpec.load("ct_224")
    config = ViT3DConfig(patch=(8, 16, 16), stages=(), width=384, heads=6, depth=8, drop_air=True)
    given = {"phantom": chest(spec.shape)}
    for folder in sorted(REAL.glob("lungdx_*")):
        given[folder.name] = torch.from_numpy(prepare(folder, spec).voxels)[None, None]
    torch.manual_seed(0)
    drops, rows = ViT3D(config, spec), []
    keeps = ViT3D(config.model_copy(update={"drop_air": False}), spec)
    keeps.load_state_dict(drops.state_dict())
    for name, volume in given.items():
        with torch.inference_mode():
            cosine = float(F.cosine_similarity(drops.eval()(volume).pooled, keeps.eval()(volume).pooled))
        share = left_out(drops, volume)
        a, b = _seconds(keeps, volume), _seconds(drops, volume)
        rows.append([name, f"{100 * share:.0f} %", f"{a['encoding'] / b['encoding']:.2f} x", f"{a['step'] / b['step']:.2f} x", f"{cosine:.3f}"])  # fmt: skip
    return rows


def show_equal(threads: int) -> None:
    found = apart(HERE, "at_equal_parameters", threads=threads)
    base = found["rows"]["ctvit"]
    rows = [
        [name, f"{r['parameters']:.1f} M", f"{r['operations']:,.0f}", f"{r['encoding']:.1f}", f"{base['encoding'] / r['encoding']:.2f} x", f"{r['step']:.1f}", f"{base['step'] / r['step']:.2f} x"]
        for name, r in found["rows"].items()
    ]  # fmt: skip
    print(f"24 x 24 x 24 tokens of a phantom's chest, {100 * found['air']:.0f} % of them air outside the body; {found['rate']:.0f} GFLOP/s\n")  # fmt: skip
    print(table("vit3d and ctvit at equal parameters and one token grid", ["", "parameters", "GFLOP a volume", "encoding, s", "speed", "forward and backward, s", "speed (bar 2)"], rows), flush=True)  # fmt: skip


def show(threads: int, plot: Path) -> None:
    show_equal(threads)
    layers = {way: apart(HERE, "one_layer", way, threads=threads) for way in ("full", "masked", "windows")}
    rows = [[way, f"{r['seconds']:.2f}", f"{layers['full']['seconds'] / r['seconds']:.1f} x", f"{r['gb']:.2f}"] for way, r in layers.items()]  # fmt: skip
    print(table("One layer of width 192 over 13,824 tokens, forward and backward", ["attention", "seconds", "speed", "GB"], rows), flush=True)  # fmt: skip
    costs = apart(HERE, "of_tokens", [6, 8, 12, 16, 20, 24], threads=threads)
    rows = [[f"{r['tokens']:.0f}", *(f"{r[way]:.3f}" for way in WAYS), *(f"{r['full'] / r[way]:.1f} x" for way in list(WAYS)[1:])] for r in costs]  # fmt: skip
    print(table("Encoding against the number of tokens (width 192, 4 layers)", ["tokens", *(f"{said}, s" for said, _ in WAYS.values()), "", ""], rows), flush=True)  # fmt: skip
    draw(costs, plot)
    print(table("Air left out (width 384, 8 layers, spec ct_224)", ["chest", "left out", "encoding", "forward and backward", "cosine to looking at the air, untrained"], apart(HERE, "air", threads=threads)), flush=True)  # fmt: skip


def draw(costs: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    tokens = [row["tokens"] for row in costs]
    for name, (label, _) in WAYS.items():
        axes.loglog(tokens, [row[name] for row in costs], "o-", label=label)
    axes.loglog(tokens, [costs[0]["full"] * t / tokens[0] for t in tokens], ":", color="grey", label="linear")
    axes.set(xlabel="tokens", ylabel="processor seconds a volume", title="vit3d, width 192, 4 layers: cost of encoding")
    axes.set_xticks(tokens, [f"{t:,.0f}" for t in tokens], minor=False)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"plotted: {path}\n", flush=True)
