"""Channels in use, and recycling those that are not."""

import types

import pytest
import torch
from conftest import SMALL, states_equal

import config
import diffusion
import train
from support import channels, checkpoint, held_out
from unet import PlainUNet, UNet


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 16, 16, generator=random), torch.tensor([1, 3, 5, 9])


def network():
    torch.manual_seed(0)
    return UNet(widths=(8, 8, 16), t_dim=8)


def test_channels_that_never_open_are_counted_block_by_block(batch):
    model = network()
    for parameter in model.parameters():
        parameter.data.zero_()
    model.enc2.conv2.bias.data[:] = torch.tensor([1.0, 1, 1, 1, 1, 1, -1, 0])
    model.dec1.conv1.bias.data[:] = 1.0  # the first ReLU of a block does not count
    shares = channels.in_use(model, [batch])
    assert shares == {"enc1": 0, "enc2": 0.75, "bottleneck": 0, "dec1": 0, "dec2": 0}


def test_a_channel_must_be_active_in_more_than_a_hundredth_of_the_places(batch):
    model = torch.nn.Sequential(torch.nn.ReLU())
    model.forward = lambda x, t: torch.nn.Sequential.forward(model, x)
    x = -torch.ones(1, 2, 10, 20)
    x[0, 0, 0, :2] = x[0, 1, 0, :3] = 1  # 1% and 1.5%
    assert channels.in_use(model, [(x, None)]) == {"0": 0.5}


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_few_images_at_a_time_count_as_all_together(batch, at_once):
    model = network()
    parts = zip(*(tensor.split(at_once) for tensor in batch))
    assert channels.in_use(model, parts) == channels.in_use(model, [batch])


def test_large_images_are_counted_a_few_at_a_time():
    model, seen = network(), []
    x0 = torch.zeros(90, 3, 128, 128, dtype=torch.uint8)
    model.forward = lambda x, t: seen.append(len(x))
    held_out.channels_in_use(config.defaults(train.SETTINGS), model, x0)
    assert sum(seen) == 90 and max(seen) * 128**2 <= held_out.PIXELS


def test_the_control_has_blocks_too(batch):
    model = PlainUNet(widths=(4, 4, 8))
    assert list(channels.in_use(model, [batch])) == ["enc1", "enc2", "bottleneck", "dec1", "dec2"]
    assert model.training


def test_channels_that_are_the_same_everywhere_are_left_off(batch):
    model = network()
    model.enc2.conv1.bias.data[:] = -100.0
    for parameter in (*model.enc2.t_proj.parameters(), model.enc2.conv2.bias):
        parameter.data.zero_()
    channels.recycle(model, torch.optim.AdamW(model.parameters()), *batch, torch.Generator().manual_seed(1))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_every_block_of_a_level_is_counted(batch):
    model = UNet(widths=(8, 8, 16), t_dim=8, blocks=2)
    model.enc1.conv2.bias.data[:] = -100.0
    shares = channels.in_use(model, [batch])
    blocks = ("enc1", "enc2", "bottleneck", "dec1", "dec2")
    assert sorted(shares) == sorted([*blocks, *(f"{block}.more.0" for block in blocks)])
    assert shares["enc1"] == 0 and shares["enc1.more.0"] > 0


def test_recycling_opens_channels_and_hardly_changes_the_output(batch):
    model = network()
    model.bottleneck.conv2.bias.data[:12] = -100.0
    optimizer = torch.optim.AdamW(model.parameters())
    model(*batch).square().mean().backward()
    optimizer.step()
    before = model(*batch)
    spared = model.bottleneck.conv2.weight[12:].clone()
    assert channels.in_use(model, [batch])["bottleneck"] == pytest.approx(4 / 16)
    assert channels.recycle(model, optimizer, *batch, torch.Generator().manual_seed(1)) >= 12
    assert channels.in_use(model, [batch])["bottleneck"] == 1
    assert torch.equal(model.bottleneck.conv2.weight[12:], spared)
    moments = optimizer.state[model.bottleneck.conv2.weight]["exp_avg"]
    assert (moments[:12] == 0).all() and (moments[12:] != 0).any()
    change = (model(*batch) - before).std() / before.std()
    assert 0 < change < 0.1
    assert channels.recycle(model, optimizer, *batch, torch.Generator().manual_seed(1)) == 0


def test_a_resumed_run_that_recycles_is_the_same_run(run, monkeypatch):
    monkeypatch.setattr(channels, "THRESHOLD", 0.5)  # so that there is something to recycle
    run("--recycle", 3, "--epochs", 3, "--optimizer", "muon", *SMALL)
    straight = checkpoint.load("model/unet32_e2.pth")
    run("--resume", "model/unet32_e0.pth", "--out-dir", "again", "--device", "cpu")
    assert states_equal(straight, checkpoint.load("again/unet32_e2.pth"))
    run("--recycle", 0, "--epochs", 3, "--optimizer", "muon", "--out-dir", "without", *SMALL)
    assert not torch.equal(
        straight["model"]["final.weight"], checkpoint.load("without/unet32_e2.pth")["model"]["final.weight"]
    )


def test_recycling_is_the_same_on_any_number_of_ranks():
    """Each rank has a share of the batch; weights and moments must become those of a run on the whole of it."""
    cfg, results = config.defaults(train.SETTINGS), []
    x0, eps = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, 3, 5, 9, 2, 4, 6, 8])
    x_t = diffusion.add_noise(x0, eps, t, cfg.noise_steps)
    for ranks, rank in ((1, 0), (2, 0), (2, 1)):
        share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)

        def gather(x, share=share):
            whole = x_t if x.ndim == 4 else t
            assert torch.equal(x, whole[share])
            return whole

        model = network()
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        model.enc1.conv2.bias.data[:] = 100.0
        model.bottleneck.conv2.bias.data[:] = -1.5  # some channels open on one half of the batch only
        world, run = types.SimpleNamespace(gather=gather, say=lambda text: None), types.SimpleNamespace(step=0)
        train.recycle(cfg, world, model, optimizer, x0[share], eps[share], t[share], run)
        results.append((model.state_dict(), optimizer.state_dict()["state"]))
    assert states_equal(results[0], results[1]) and states_equal(results[0], results[2])


def test_when_channels_are_recycled_and_which_block_is_told(run, monkeypatch, capsys):
    at = []
    monkeypatch.setattr(train, "recycle", lambda *args: at.append(args[-1].step))
    monkeypatch.setattr(train, "channels_in_use", lambda *_: {"enc1": 0.9, "dec1": 0.2, "dec2": 0.5})
    run("--recycle", 2, "--epochs", 3, *SMALL)
    assert at == [0, 4] and "20% of the channels of dec1 in use" in capsys.readouterr().out


def test_channels_are_counted_at_all_noise_levels():
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x, t):
            seen.append(t)
            return x

    images = torch.zeros(200, 3, 8, 8, dtype=torch.uint8)
    held_out.channels_in_use(config.defaults(train.SETTINGS), Network(), images)
    assert torch.bincount(seen[0]).tolist() == [0] + [10] * 9
    held_out.channels_in_use(
        config.defaults(train.SETTINGS, sigma_range=(51.0, 102.0), sigma_power=5.0), Network(), images
    )
    levels, counts = seen[1].unique(return_counts=True)
    assert counts.tolist() == [10] * 9 and 4 < levels.min() < 4.3 and 7.7 < levels.max() < 8


@pytest.mark.parametrize("blocks, part", [(1, "bottleneck"), (2, "bottleneck.more.0")])
def test_a_recycled_channel_adds_a_tenth_of_the_shortcuts_spread_and_no_mean(batch, blocks, part):
    torch.manual_seed(0)
    model, random = UNet(widths=(8, 8, 16), t_dim=8, blocks=blocks), torch.Generator().manual_seed(1)
    block = model.get_submodule(part)
    block.conv2.bias.data[:12] = -100.0
    parts, optimizer = (block, block.shortcut), torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        before, shortcut = (channels.outputs(model, parts, *batch)[part] for part in parts)
        channels.recycle_block(model, block, optimizer, *batch, random)
        added = (channels.outputs(model, parts, *batch)[block] - before)[:, :12]
    if blocks == 1:  # an identity has no bias from which the mean could be taken
        assert added.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    expected = 0.1 * shortcut[:, :12].std(dim=(0, 2, 3))
    torch.testing.assert_close(added.std(dim=(0, 2, 3)), expected, rtol=1e-3, atol=0)
