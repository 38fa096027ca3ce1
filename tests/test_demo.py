"""demo.py: what the page does with a picture, without a browser; what needs Gradio is skipped where that is absent."""

import importlib.util
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import data
import demo
import denoise
import unet
from support import pictures, script

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is not installed")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    cfg = config.defaults(unet.SETTINGS | data.SETTINGS | data.NOISE_SETTINGS, widths=(4, 4, 8), t_dim=8)
    model = unet.build(**unet.describe(cfg)).eval()
    return denoise.Network(model, cfg, Path("tiny.pth"), torch.device("cpu"), "float32", 24)


def noisy(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype)


def test_a_picture_comes_back_in_full(network, tmp_path):
    deep = noisy(30, 50, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    (before, after), target, text = demo.clean(tmp_path / "deep.tif", False, 30, 1.5, network, 10**6, tmp_path)
    expected = denoise.denoise_pixels(network, torch.from_numpy(deep)[None], 30, 1.5).clean[0]
    saved = Image.open(target)
    assert Path(target).name == "deep_denoised.png" and saved.mode == "I;16"
    np.testing.assert_array_equal(saved, expected)
    for shown, values in ((before, deep), (after, expected.numpy())):
        assert shown.mode == "RGB"
        np.testing.assert_allclose(np.asarray(shown)[..., 0], values / 257, atol=0.51)
    assert text.startswith("sigma 30 (given), times 1.5")


def test_a_large_picture_is_shown_reduced_and_saved_whole(network, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SHOWN", 40)
    Image.fromarray(noisy(60, 80, 3)).save(tmp_path / "a.png")
    views, target, text = demo.clean(tmp_path / "a.png", True, 30, 1, network, 10**6, tmp_path)
    assert [view.size for view in views] == [(40, 30)] * 2 and Image.open(target).size == (80, 60)
    assert "(estimated; " in text and "what you save has all 80 x 60" in text


def test_what_reading_a_file_loses_is_said_each_time(network, tmp_path):
    frames = [Image.fromarray(noisy(20, 24, 3)) for _ in range(2)]
    frames[1].putpixel((0, 0), (1, 2, 3))
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    for _ in range(2):
        *_, text = demo.clean(tmp_path / "a.webp", True, 30, 1, network, 10**6, tmp_path)
        assert "only the first picture is read" in text


def test_a_bad_file_is_a_line(network, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(pictures.DataError, match=r"a\.png cannot be read"):
        demo.clean(tmp_path / "a.png", True, 30, 1, network, 10**6, tmp_path)


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setattr(demo, "gr", None)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(config.UserError, match=r"pip install -r requirements-demo\.txt"):
        demo.main()


@needs_gradio
def test_what_the_page_runs(network, tmp_path, monkeypatch):
    blocks = demo.page(network, 10**6, tmp_path)
    update = next(event.fn for event in blocks.fns.values() if event.fn.__name__ == "update")
    view, save, text = update(None, True, 30, 1)
    assert (view, save.interactive, text) == (None, False, "")
    Image.fromarray(noisy(20, 24, 3)).save(tmp_path / "a.png")
    view, save, text = update(str(tmp_path / "a.png"), True, 30, 1)
    assert len(view) == 2 and save.interactive and os.path.exists(save.value["path"]) and text.startswith("sigma")

    def lack(*_):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    with monkeypatch.context() as full, pytest.raises(demo.gr.Error, match="not enough memory for this picture"):
        full.setattr(denoise, "denoise_pixels", lack)
        update(str(tmp_path / "a.png"), True, 30, 1)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(demo.gr.Error, match="cannot be read"):
        update(str(tmp_path / "a.png"), True, 30, 1)


@needs_gradio
def test_the_page_is_for_this_machine_alone(network, monkeypatch, capsys):
    asked = {}

    def launch(blocks, **options):
        asked.update(options, analytics=blocks.analytics_enabled, folder=os.environ["GRADIO_TEMP_DIR"])
        assert os.path.isdir(asked["folder"])
        return None, "http://127.0.0.1:7", None

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # to have it back after the test
    monkeypatch.setattr(demo.gr.Blocks, "launch", launch)
    monkeypatch.setattr(demo.gr.Blocks, "block_thread", lambda blocks: None)
    monkeypatch.setattr(denoise, "load", lambda *_: network)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--port", "7"])
    script.run(demo.main)
    assert (asked["server_name"], asked["server_port"]) == ("127.0.0.1", 7)
    assert asked["share"] is False and asked["analytics"] is False and not asked["theme"]._stylesheets
    assert not os.path.exists(asked["folder"])  # nor is anything left on it
    assert "open http://127.0.0.1:7 in a browser" in capsys.readouterr().out


@needs_gradio
def test_a_port_in_use(network, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr(denoise, "load", lambda *_: network)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["demo.py", "--port", str(port)])
        with pytest.raises(config.UserError, match=f"port {port} cannot be used; choose another --port"):
            demo.main()
