"""A page on which to denoise a picture by eye, for this machine alone.

    pip install -r requirements-demo.txt
    python demo.py                         then open the address that it prints, http://127.0.0.1:7860

Drop a picture on it: the noise level is estimated, and before and after are compared under one slider. What is saved is
a PNG file of full size. Nothing leaves the machine; results stay in the system's folder for temporary files until the
page ends.
"""

import os
import tempfile
from pathlib import Path

import config
import denoise
from config import Setting, UserError, whole
from support import memory, picture_files, pictures, pixels, script, sheets

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when Gradio is imported

try:
    import gradio as gr
except ImportError:
    gr = None

SETTINGS = {
    "port": Setting(None, whole(1, 65535), "port of the page; None: the first that is free from 7860 on"),
} | {key: denoise.SETTINGS[key] for key in ("weights", "max_pixels", "device", "precision")}  # fmt: skip

SHOWN = 2000  # pixels, height and width of the largest picture that is sent to the browser; larger ones are reduced


def clean(path, estimated, sigma, strength, network, max_pixels, folder):
    """Denoise a picture file: ((before, after) to show, path of the PNG file in `folder`, what to say about it).

    sigma: on the 0-255 scale, ignored if it is to be estimated. Raises UserError.
    """
    image = pictures.read(path, max_pixels, pixels.to_supported_mode)
    target = Path(tempfile.mkdtemp(dir=folder)) / f"{Path(path).stem[:60]}_denoised.png"
    options, _ = picture_files.options_for(image, target)
    noisy, pack = pixels.unpack(image)
    given = None if estimated else sigma
    result = denoise.denoise_pixels(network, noisy, given, strength)
    picture_files.write(pack(result.clean), target, options, overwrite=True)
    notes = [denoise.describe(result.level, given, strength), *image.info.get(pictures.NOTES_KEY, [])]
    if doubt := denoise.doubt(noisy, result, network, strength):
        notes.append(doubt.replace("--sigma", "sigma").replace("--strength", "strength"))  # as the sliders are named
    if max(image.size) > SHOWN:
        notes.append(f"shown reduced to {SHOWN} pixels; what you save has all {image.width} x {image.height}")
    return (
        tuple(sheets.shown(view, largest=SHOWN) for view in (noisy, result.clean)),
        str(target),
        "  \n".join(notes),
    )


def page(network, max_pixels, folder):
    """The page, a gradio.Blocks."""

    def update(path, estimated, sigma, strength):
        if path is None:
            return None, gr.DownloadButton(interactive=False), ""
        try:
            views, target, text = clean(path, estimated, sigma, strength, network, max_pixels, folder)
        except (UserError, OSError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None
        except (MemoryError, RuntimeError) as error:
            if not memory.out_of_memory(error):
                raise
            text = "there is not enough memory for this picture; use a smaller one"
            raise gr.Error(text, duration=None, print_exception=False) from None
        return views, gr.DownloadButton(value=target, interactive=True), text

    with gr.Blocks(title="Denoise a picture", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(f"## Denoise a picture\nwith `{network.path.name}`, on this machine: nothing leaves it")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                file = gr.File(label="Drop a picture here", file_types=sorted(pictures.IMAGE_FILES), height=140)
                estimated = gr.Checkbox(True, label="Estimate the noise level")
                sigma = gr.Slider(1, 100, 25, step=1, label="sigma, on the 0-255 scale", interactive=False)
                strength = gr.Slider(0.25, 3, 1, step=0.05, label="strength: more is smoother, less keeps more detail")
                text = gr.Markdown(elem_id="text")
                save = gr.DownloadButton("Save as PNG", variant="primary", interactive=False)
            with gr.Column(scale=3):
                view = gr.ImageSlider(label="before | after", format="png", max_height=900, interactive=False)
        estimated.change(lambda yes: gr.Slider(interactive=not yes), estimated, sigma)
        gr.on(
            [file.change, estimated.change, sigma.change, strength.change],
            update,
            [file, estimated, sigma, strength],
            [view, save, text],
            trigger_mode="always_last",
        )
    return blocks


def main():
    cfg = config.parse(__doc__, SETTINGS)
    if gr is None:
        raise UserError("Gradio is not installed; run pip install -r requirements-demo.txt")
    memory.keep_freed_memory(of_any_size=True)
    network = denoise.load(cfg.weights, cfg.device, cfg.precision)
    font = ["system-ui", "sans-serif"]  # of the machine: others would be fetched from the network
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and results go with the page
        blocks = page(network, cfg.max_pixels, folder)
        options = dict(server_name="127.0.0.1", server_port=cfg.port, share=False, ssr_mode=False)
        theme = gr.themes.Default(font=font, font_mono=["monospace"])
        try:
            _, address, _ = blocks.launch(**options, theme=theme, footer_links=[], quiet=True, prevent_thread_lock=True)
        except OSError:
            raise UserError(f"port {cfg.port or '7860 and the next'} cannot be used; choose another --port") from None
        print(f"open {address} in a browser; Ctrl-C ends")
        blocks.block_thread()


if __name__ == "__main__":
    script.run(main)
    os._exit(0)  # Ctrl-C: a picture that is being denoised must not hold up the end, or turn it into a crash
