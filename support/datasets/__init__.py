"""The data sets. To add one: a file beside this one, and its line in DATASETS; its name then works with --dataset.

A data set is a module with

    SETTINGS           its own options, a dict of config.Setting
    load(split, cfg)   (images, source) of split "train" or "test": a uint8 tensor (N, 3, S, S), and a few words that
                       follow "of" ("CIFAR-10 in data"); or, for crops drawn anew every epoch, a list of whole pictures
                       (3, H, W). Raises support.pictures.DataError
    resolve(cfg)       optional: cfg with those of its options that are None given the values they stand for
    files(split, cfg)  optional: the whole pictures of a split, as [(relative name, path)]
"""

from support.datasets import cifar10, folder, leaves

DATASETS = {"cifar10": cifar10, "folder": folder, "leaves": leaves}
