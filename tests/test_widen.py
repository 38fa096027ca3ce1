"""A wider network begins as the narrower one."""

import pytest
import torch

from support.widen import widened
from unet import UNet

NARROW = dict(widths=(4, 6, 10), t_dim=8, blocks=2)


def pair(**wider):
    torch.manual_seed(0)
    narrow, wide = UNet(**NARROW), UNet(**NARROW | wider)
    wide.load_state_dict(widened(narrow.state_dict(), wide))
    return narrow, wide


@pytest.mark.parametrize(
    "wider",
    [
        dict(widths=(7, 6, 10)),
        dict(widths=(4, 9, 10)),
        dict(widths=(4, 6, 12)),
        dict(t_dim=11),
        dict(widths=(5, 8, 16), t_dim=9),
    ],
)
def test_it_computes_the_same_and_all_of_it_learns(wider):
    narrow, wide = pair(**wider)
    x, t = torch.randn(3, 3, 16, 20), torch.tensor([0.5, 4, 9])
    torch.testing.assert_close(wide(x, t), narrow(x, t))
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    for _ in range(4):  # what a new channel gives is used, step by step, by what follows it; then it learns itself
        optimizer.zero_grad()
        (wide(x, t) - torch.randn_like(x)).square().mean().backward()
        optimizer.step()
    old = narrow.state_dict()
    for name, parameter in wide.named_parameters():
        new = torch.ones_like(parameter, dtype=torch.bool)
        new[tuple(map(slice, old[name].shape))] = False
        if new.any():
            assert (parameter.grad[new] != 0).float().mean() > 0.5, name


def test_weights_that_do_not_fit_are_left_for_the_loader_to_refuse():
    torch.manual_seed(0)
    for other in (dict(widths=(4, 5, 10)), dict(blocks=1), dict(blocks=3)):
        weights = UNet(**NARROW | other).state_dict()
        model = UNet(**NARROW | dict(widths=(4, 6, 9)) if "widths" in other else NARROW)
        assert widened(weights, model) is weights


def test_tensors_of_another_kind_are_left_for_the_loader_to_refuse():
    torch.manual_seed(0)
    weights = UNet(**NARROW).state_dict()
    weights["final.bias"] = weights["final.bias"].long()
    assert widened(weights, UNet(**NARROW)) is weights


def test_the_same_widths_change_nothing():
    narrow, wide = pair()
    for name, value in narrow.state_dict().items():
        assert torch.equal(value, wide.state_dict()[name])
