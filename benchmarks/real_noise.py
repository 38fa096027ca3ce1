"""What denoise.py makes of noise that is not white: PSNR by kind of noise, of one or several weights side by side.

    python -m benchmarks.real_noise --data-dir data/photographs --limit 8 --weights model/unet32.pth model/photo.pth

Whole test pictures, with noise of the kinds of benchmarks/noise_level.py, in 8 bits. Its level is estimated from each
picture, as denoise.py does by default.
"""

import numpy as np

import config
import data
import denoise
from benchmarks.noise_level import KINDS, OF_COLOURS, degrade
from config import Setting, positive
from support import devices, metrics, pixels, script

SETTINGS = data.PICTURE_SETTINGS | devices.SETTINGS | {
    "weights": Setting(("model/unet32.pth", "model/photo.pth"), config.file_name, "checkpoints to compare", "+"),
    "sigma": Setting(20, positive, "level of the noise, 0-255 scale"),
    "grey": Setting(False, bool, "make the pictures grey first: one channel, and no noise that needs three"),
}  # fmt: skip


def main():
    cfg = config.parse(__doc__, SETTINGS)
    pictures = [read() for read in data.whole_pictures("test", cfg)]
    if cfg.grey:
        pictures = [picture.float().mean(dim=0, keepdim=True).round().byte() for picture in pictures]
    networks = [denoise.load(weights, cfg.device, cfg.precision) for weights in cfg.weights]
    print(f"PSNR in dB of {len(pictures)} pictures")
    print("| noise | noisy |" + "".join(f" {weights} |" for weights in cfg.weights))
    print("|---|---" + "|---" * len(networks) + "|")
    for kind in [kind for kind in KINDS if not (cfg.grey and kind in OF_COLOURS)]:
        values = []
        for seed, clean in enumerate(pictures):
            noisy = clean.new_tensor(degrade(kind, clean.numpy(), cfg.sigma, seed))
            results = [noisy] + [denoise.denoise_pixels(network, noisy).clean for network in networks]
            values.append([metrics.psnr(*(pixels.to_x(x)[None] for x in (result, clean))).item() for result in results])
        print(f"| {kind} |" + "".join(f" {mean:.2f} |" for mean in np.mean(values, axis=0)), flush=True)


if __name__ == "__main__":
    script.run(main)
