"""ImageNet at 64x64, conditional: flow matching with the network of ADM (arXiv 2105.05233), read from disk.

python -m launch.train --config=configs/imagenet64.py --workdir=workdir/imagenet64 --config.data.source_dir=FOLDER
    --config.data.archive=downsampled --config.classes=0 --config.label_dropout=0    # the set without labels

FOLDER has Imagenet64_train_part1_npz.zip, Imagenet64_train_part2_npz.zip and Imagenet64_val_npz.zip from image-net.org
(14 GB); the first start checks them and writes 16 GB of records to data.data_dir.

Not run with this code. Published on ImageNet-64: FID 1.64 by flow matching (flow_matching, faces blurred, dopri5),
1.36 by EDM with this network, which took 13 days on 32 A100; 15.11 unconditional by OT-CFM with 8 RK4 steps. Hardware:
32 or more accelerators with 40 GB, one process a host (FMJAX_DISTRIBUTED=1); its wall-clock is not known.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """All fields of the experiment; any can be changed by ``--config.FIELD=VALUE``."""
    c = ConfigDict()
    c.seed = 0
    c.data = {"name": "imagenet64", "source_dir": config_dict.placeholder(str)}
    c.data.update({"data_dir": config_dict.placeholder(str), "archive": "resized", "verify": True, "stream": True})
    c.flip = True
    c.classes, c.label_dropout, c.guidance = 1000, 0.1, 1.0
    c.negatives = config_dict.placeholder(str)  # 'any', 'other_label': what the contrastive method needs
    c.path = "linear"
    # runs whose averaged parameters training starts from, and whose are the target of target='frozen'
    c.init, c.teacher = config_dict.placeholder(str), config_dict.placeholder(str)
    c.fsdp = True
    c.log_every, c.save_every, c.sample_every, c.keep = 100, 2500, 10_000, 3

    c.net = {"name": "unet", "channels": 192, "multipliers": (1, 2, 3, 4), "blocks": 3, "attention": (32, 16, 8)}
    c.net.update({"head_channels": 64, "middle": True, "dropout": 0.1, "resample": "block", "dtype": "bfloat16"})
    c.method = "flow_matching"
    c.coupling = "independent"
    c.batch_size, c.steps, c.target = 1024, 500_000, "self"
    c.learning_rate, c.warmup, c.schedule = 1e-4, 10_000, "constant"
    c.clip, c.beta2, c.weight_decay, c.ema = 1.0, 0.99, 0.0, 0.9999

    # what launch.evaluate draws
    c.sampling = {"seeds": 3, "samples": 10_000, "euler": (2, 4, 8, 16, 100), "rk4": (8,)}
    return c.lock()
