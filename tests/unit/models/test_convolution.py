"""3-D convolutions on a CPU, compared with float64, where each position of the kernel extends beyond few slices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ctclip.heads.decoder import Decoder, Networks
from ctclip.models.convolution import Convolution3d, right_convolutions
from ctclip.models.resnet3d import ResNet3D, ResNet3DConfig
from tests.unit.small import spec_of

SPEC = spec_of((16, 16, 24), (3.0, 1.5, 1.5))


def gradients(convolution: nn.Conv3d, cells: Tensor, bf16: bool = False) -> list[Tensor]:
    """The output and the gradients of weights and cells of a fixed loss."""
    convolution.zero_grad()
    cells = cells.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        made = convolution(cells)
    (made.to(cells.dtype) * made.numel()).square().mean().backward()
    assert convolution.weight.grad is not None
    assert cells.grad is not None
    return [made.detach().double(), convolution.weight.grad.double(), cells.grad.double()]


def spoil_memory() -> None:
    """Leave NaN in memory that is allocated next."""
    kinds = (torch.float32, torch.bfloat16)
    blocks = [torch.full((1 << size,), math.nan, dtype=kind) for size in (14, 16, 18, 20, 21) for kind in kinds]
    del blocks


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "slices"),
    [(3, 1, 1), (3, 1, 2), (3, 1, 3), (3, 2, 2), (7, 2, 3), (7, 2, 4), (7, 2, 6), (7, 2, 7), (7, 2, 8)],
)
def test_gradients_are_right_with_few_slices(kernel: int, stride: int, slices: int, bf16: bool) -> None:
    torch.manual_seed(0)
    convolution = Convolution3d(64, 64, kernel, stride, padding=kernel // 2)
    cells = torch.randn(4, 64, slices, 3, 4)
    # Float64 does not use oneDNN.
    wanted = gradients(convolution.double(), cells.double())
    convolution.float()
    for _ in range(3):
        spoil_memory()
        for one, other in zip(gradients(convolution, cells, bf16), wanted, strict=True):
            assert (one - other).norm() < (0.02 if bf16 else 1e-5) * other.norm()


def test_only_kernels_that_extend_beyond_the_slices_are_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, inner = list[int](), nn.Conv3d._conv_forward

    def noted(self: nn.Conv3d, cells: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        usual.append(cells.shape[2])
        return inner(self, cells, weight, bias)

    monkeypatch.setattr(nn.Conv3d, "_conv_forward", noted)
    for kernel, slices in ((3, 2), (3, 3), (1, 1), (7, 6), (7, 7)):
        convolution = Convolution3d(8, 8, kernel, padding=kernel // 2)
        assert convolution(torch.randn(1, 8, slices, 4, 4)).shape == (1, 8, slices, 4, 4)
    assert usual == [3, 1, 7]


def test_networks_of_others_have_right_convolutions_and_the_same_weights() -> None:
    plain = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Sequential(nn.Conv3d(2, 1, 1)), nn.Linear(1, 1))
    names = list(plain.state_dict())
    right_convolutions(plain)
    assert list(plain.state_dict()) == names
    networks = [
        plain,
        ResNet3D(ResNet3DConfig(width_factor=0.125), SPEC),
        Decoder((8, 8, 8), 4, Networks(fold=2, channels=(8,), latent=2, patch=2, width=(32,), depth=1)),
    ]
    for network in networks:
        kinds = {type(part) for part in network.modules() if isinstance(part, nn.Conv3d)}
        assert kinds == {Convolution3d}
