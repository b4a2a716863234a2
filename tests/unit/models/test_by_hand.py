"""Hand-written gradients, compared with finite differences and with PyTorch's own."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctclip.models import by_hand
from ctclip.models.ctvit import CTViT, CTViTConfig, in_eights
from tests.unit.small import spec_of


def given(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def convolved(cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    convolution = nn.Conv3d(len(weight), len(weight), 3, groups=len(weight))
    del convolution.weight, convolution.bias
    convolution.weight, convolution.bias = weight, bias
    return by_hand.depthwise(cells, convolution)


CASES = {
    "gated": (by_hand.gated, [(3, 70, 6)]),
    "attention": (lambda q, k, v, b: by_hand.attention(q, k, v, b, 0.7), [(3, 2, 5, 4)] * 3 + [(2, 5, 5)]),
    "depthwise": (convolved, [(2, 4, 12, 5, 2), (2, 1, 3, 3, 3), (2,)]),
    "unit": (by_hand.unit, [(3, 200, 2, 4), (4,)]),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_what_differences_say(name: str) -> None:
    torch.manual_seed(0)
    action, shapes = CASES[name]
    inputs = [given(*shape) for shape in shapes]
    made = action(*inputs)
    assert "_" + name in type(made.grad_fn).__name__.lower(), "the one written by hand"
    assert torch.autograd.gradcheck(action, inputs, fast_mode=True)
    with by_hand.switched_off():
        torch.testing.assert_close(made, action(*inputs))


def test_planes_make_the_depthwise_convolution() -> None:
    """The computation that a GPU uses instead."""
    torch.manual_seed(0)
    inputs = [given(2, 4, 5, 3, 2), given(2, 1, 3, 3, 3), given(2)]
    made = [way(*inputs) for way in (by_hand._by_planes, by_hand._convolve)]
    torch.testing.assert_close(*made)
    slope = torch.randn_like(made[0])
    torch.testing.assert_close(*(torch.autograd.grad(one, inputs, slope) for one in made))


def test_a_feed_forward_in_eights_is_the_same() -> None:
    torch.manual_seed(0)
    rows, up_gate, down = given(7, 4), given(2 * 13, 4), given(4, 13)
    for_a_card = in_eights(up_gate, down)
    assert [tuple(weight.shape) for weight in for_a_card] == [(2 * 16, 4), (4, 16)]
    ways = [F.linear(by_hand.gated(F.linear(rows, wide)), narrow) for wide, narrow in ((up_gate, down), for_a_card)]
    torch.testing.assert_close(*ways)
    gradients = [torch.autograd.grad(way.square().sum(), [rows, up_gate, down]) for way in ways]
    torch.testing.assert_close(*gradients)


def test_memory_in_any_order_gives_the_same_gradient() -> None:
    torch.manual_seed(0)
    heads, scale, slope = given(3, 5, 2, 4), given(4), torch.randn(3, 2, 5, 4, dtype=torch.float64).transpose(1, 2)
    ours = torch.autograd.grad(by_hand.unit(heads, scale), [heads, scale], slope)
    theirs = torch.autograd.grad(by_hand.unit(heads, scale), [heads, scale], slope.contiguous())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_encoder_learns_the_same(checkpointed: bool) -> None:
    torch.manual_seed(0)
    config = CTViTConfig(
        patch=(4, 8, 8), width=16, spatial_depth=2, temporal_depth=1, heads=2, head_width=8, quantise=False,
        activation_checkpointing=checkpointed,
    )  # fmt: skip
    encoder = CTViT(config, spec_of((12, 24, 24)))
    volume = torch.rand(2, 1, 12, 24, 24) * 2 - 1
    gradients = []
    for by in (by_hand._by_hand, lambda _: False):
        encoder.zero_grad()
        with mock.patch.object(by_hand, "_by_hand", by):
            encoder(volume).pooled.square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
