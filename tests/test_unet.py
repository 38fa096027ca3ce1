"""The networks against the design's table, written a second time as functions of a state dict."""

import pytest
import torch
import torch.nn.functional as F

import config
import unet
from unet import PlainUNet, UNet

BLOCKS = {"enc1": (3, 64), "enc2": (64, 128), "bottleneck": (128, 256), "dec1": (256, 128), "dec2": (128, 64)}


def table_state():
    """Random weights with the names and shapes of the table."""
    shapes = {"time_mlp.0": (256, 1), "time_mlp.2": (256, 256), "final": (3, 64, 1, 1)}
    for name, (c_in, c_out) in BLOCKS.items():
        shapes[f"{name}.conv1"] = (c_out, c_in, 3, 3)
        shapes[f"{name}.conv2"] = (c_out, c_out, 3, 3)
        shapes[f"{name}.t_proj"] = (c_out, 256)
        shapes[f"{name}.shortcut"] = (c_out, c_in, 1, 1)
    random = torch.Generator().manual_seed(1)
    state = {}
    for name, shape in shapes.items():
        fan_in = torch.tensor(shape[1:]).prod().item()
        state[f"{name}.weight"] = torch.randn(shape, generator=random) / fan_in**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=random)
    for name, (c_in, c_out) in {"up1": (256, 128), "up2": (128, 64)}.items():
        state[f"{name}.weight"] = torch.randn((c_in, c_out, 2, 2), generator=random) / c_in**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(c_out, generator=random)
    return state


def table_forward(s, x, t):
    def apply(function, name, x, **options):
        return function(x, s[f"{name}.weight"], s[f"{name}.bias"], **options)

    def block(name, x):
        h = apply(F.conv2d, f"{name}.conv1", x, padding=1).relu()
        h = h + apply(F.linear, f"{name}.t_proj", t_emb)[..., None, None]
        h = apply(F.conv2d, f"{name}.conv2", h, padding=1).relu()
        return h + apply(F.conv2d, f"{name}.shortcut", x)

    t_emb = apply(F.linear, "time_mlp.2", apply(F.linear, "time_mlp.0", t.float().view(-1, 1)).relu())
    e1 = block("enc1", x)
    e2 = block("enc2", F.max_pool2d(e1, 2))
    h = block("bottleneck", F.max_pool2d(e2, 2))
    h = block("dec1", torch.cat([apply(F.conv_transpose2d, "up1", h, stride=2), e2], 1))
    h = block("dec2", torch.cat([apply(F.conv_transpose2d, "up2", h, stride=2), e1], 1))
    return apply(F.conv2d, "final", h)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_the_network_computes_in_the_type_of_its_weights(dtype, tolerance):
    model = UNet()
    model.load_state_dict(table_state())
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 9])
    expected = model(x, t)
    found = model.to(dtype)(x.to(dtype), t)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < tolerance * expected.std()


def test_unet_is_the_table():
    model, state = UNet(), table_state()
    assert sum(p.numel() for p in model.parameters()) == 2_176_515
    model.load_state_dict(state, strict=True)
    x, t = torch.randn(3, 3, 32, 40), torch.tensor([1, 5, 9])
    torch.testing.assert_close(model(x, t), table_forward(state, x, t), rtol=1e-5, atol=1e-5)


def test_time_step_matters_and_may_be_float():
    model, x = UNet().eval(), torch.randn(2, 3, 8, 8)
    same = model(x, torch.tensor([3, 3]))
    torch.testing.assert_close(same, model(x, torch.tensor([3.0, 3.0])), rtol=0, atol=0)
    assert (same - model(x, torch.tensor([3.5, 3.5]))).abs().max() > 1e-6


def test_plain_unet_is_the_table():
    model = PlainUNet().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics other than 0 and 1, so that they count
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    s = model.state_dict()

    def block(name, x):
        for conv, norm in ((0, 1), (3, 4)):
            p = f"{name}.{norm}."
            x = F.conv2d(x, s[f"{name}.{conv}.weight"], s[f"{name}.{conv}.bias"], padding=1)
            x = (x - s[p + "running_mean"].view(-1, 1, 1)) / (s[p + "running_var"].view(-1, 1, 1) + 1e-5).sqrt()
            x = (x * s[p + "weight"].view(-1, 1, 1) + s[p + "bias"].view(-1, 1, 1)).relu()
        return x

    def up(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    x = torch.randn(2, 3, 16, 24)
    e1 = block("enc1", x)
    e2 = block("enc2", F.max_pool2d(e1, 2))
    h = block("dec1", torch.cat([up(block("bottleneck", F.max_pool2d(e2, 2))), e2], 1))
    h = block("dec2", torch.cat([up(h), e1], 1))
    expected = F.conv2d(h, s["final.weight"], s["final.bias"])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x, torch.tensor([1, 9])), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(4, 4), (8, 36), (64, 32)])
@pytest.mark.parametrize("channels", [1, 4])
def test_any_multiple_of_4_any_channels_any_widths(size, channels):
    x = torch.randn(2, channels, *size)
    for model in (UNet(channels, widths=(4, 6, 10), t_dim=8), PlainUNet(channels, widths=(4, 6, 10))):
        assert model(x, torch.tensor([1, 2])).shape == x.shape


@pytest.mark.parametrize("size", [(30, 32), (32, 30), (33, 32), (2, 4)])
def test_other_sizes_are_refused(size):
    for model in (UNet(), PlainUNet()):
        with pytest.raises(ValueError, match=f"multiples of 4, not {size[0]}x{size[1]}"):
            model(torch.zeros(1, 3, *size), torch.tensor([1]))


def test_the_embedding_sees_the_same_range_whatever_T():
    torch.manual_seed(0)
    ten = UNet(widths=(4, 4, 8), t_dim=8)
    thousand = UNet(widths=(4, 4, 8), t_dim=8, noise_steps=1000)
    thousand.load_state_dict(ten.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(thousand(x, torch.tensor([100, 900])), ten(x, torch.tensor([1, 9])))


def test_more_blocks_contain_the_network_of_one():
    """With --blocks 3 a block that adds nothing changes nothing, and the names of today's state dicts stay."""
    torch.manual_seed(0)
    one, three = UNet(widths=(4, 4, 8), t_dim=8), UNet(widths=(4, 4, 8), t_dim=8, blocks=3)
    missing, unexpected = three.load_state_dict(one.state_dict(), strict=False)
    assert not unexpected and len(missing) == 5 * 2 * 6 and all(".more." in name for name in missing)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([2, 7])
    assert (three(x, t) - one(x, t)).abs().max() > 1e-4
    for name, parameter in three.named_parameters():
        if ".more." in name and ".conv2." in name:
            parameter.data.zero_()
    torch.testing.assert_close(three(x, t), one(x, t))


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("rows, columns", [((0, 96), (0, 96)), ((0, 8), (40, 44)), ((36, 60), (92, 96))])
def test_what_is_needed_comes_out_as_in_the_whole(blocks, rows, columns):
    torch.manual_seed(0)
    model = UNet(widths=(4, 8, 8), t_dim=4, blocks=blocks).double()
    x, t = torch.randn(2, 3, 96, 96, dtype=torch.float64), torch.tensor([1, 9])
    inner = slice(*rows), slice(*columns)
    whole, eps_hat = model(x, t), model(x, t, inner)
    assert torch.allclose(eps_hat[(..., *inner)], whole[(..., *inner)], rtol=0, atol=1e-12)
    near = [range(max(start - 8 * blocks, 0), min(end + 8 * blocks, 96)) for start, end in (rows, columns)]
    assert eps_hat.count_nonzero() == 2 * 3 * len(near[0]) * len(near[1])  # no work elsewhere


@pytest.mark.parametrize("model", ["unet", "plain"])
def test_a_network_is_built_from_what_describes_it(model):
    cfg = config.defaults(unet.SETTINGS, model=model, widths=(4, 6, 8), t_dim=8, blocks=2, noise_steps=20)
    description = unet.describe(cfg)
    assert description["name"] == model and description["widths"] == (4, 6, 8)
    assert ("t_dim" in description) == (model == "unet")
    assert unet.build(**description).final.weight.shape == (3, 4, 1, 1)


def test_t_is_not_rounded_under_autocast():
    model, seen = UNet(widths=(4, 4, 8), t_dim=8, noise_steps=1000), []
    model.time_mlp.register_forward_hook(lambda _, __, out: seen.append(out))
    x, t = torch.zeros(2, 3, 8, 8), torch.tensor([897, 898])
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t)
    model(x, t)
    assert seen[0].dtype == torch.float32 and torch.equal(*seen)


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="no network 'hlaf'"):
        unet.build("hlaf")
