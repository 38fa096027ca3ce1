"""Random numbers: every purpose has streams of its own, and each number is a pure function of its key."""

import numpy as np
import torch

# Numbers are drawn from generator(device, seed, one of these, index): in training no two purposes share a stream.
ORDER, NOISE, HELD_OUT_NOISE, CHOICE, LEAVES, CROPS, KERNELS, JPEG = range(8)


def generator(device, *key):
    """A torch.Generator that is a pure function of its key, whole numbers of at least 0."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed))


def choice(count, limit):
    """`limit` of the numbers 0 ... count - 1, a fixed random choice, or None where no choice is needed."""
    if limit is None or limit >= count:
        return None
    return torch.randperm(count, generator=generator("cpu", 0, CHOICE, 0))[:limit]
