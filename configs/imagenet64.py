"""ImageNet at 64x64, conditional: flow matching with the network of ADM (arXiv 2105.05233), read from disk.

python -m launch.train --config=configs/imagenet64.py --workdir=workdir/imagenet64 --config.data.source_dir=FOLDER
    --config.data.archive=downsampled --config.conditional=False --config.label_dropout=0.0    # without labels

FOLDER has Imagenet64_train_part1_npz.zip, Imagenet64_train_part2_npz.zip and Imagenet64_val_npz.zip from image-net.org
(14 GB); the first start checks them and writes 16 GB of records to data.data_dir.

Not run with this code. Published on ImageNet-64: FID 1.64 by flow matching (flow_matching, faces blurred, dopri5),
1.36 by EDM with this network, which took 13 days on 32 A100; 15.11 unconditional by OT-CFM with 8 RK4 steps. Hardware:
32 or more accelerators with 40 GB, one process a host (FMJAX_DISTRIBUTED=1); its wall-clock is not known.
"""

from ml_collections import config_dict

from configs import base


def get_config():
    """Return the experiment."""
    c = base.get_config()
    text = lambda: config_dict.placeholder(str)  # one per field: a common placeholder would be one value
    c.data = {"name": "imagenet64", "source_dir": text(), "data_dir": text(), "archive": "resized", "verify": True}
    c.data.update({"stream": True, "validation": 50_000})  # the last training images choose strengths
    c.flip, c.conditional, c.label_dropout, c.fsdp, c.coupling = True, True, 0.1, True, "independent"
    c.log_every, c.save_every, c.sample_every, c.keep = 100, 2500, 10_000, 3
    c.net = {"name": "unet", "channels": 192, "multipliers": (1, 2, 3, 4), "blocks": 3, "attention": (32, 16, 8)}
    c.net.update({"head_channels": 64, "middle": True, "dropout": 0.1, "resample": "block", "dtype": "bfloat16"})
    c.batch_size, c.steps = 1024, 500_000
    c.learning_rate, c.warmup, c.schedule, c.ema = 1e-4, 10_000, "constant", 0.9999
    c.sampling = {"seeds": 3, "samples": 10_000}
    c.samplers = {"euler": (2, 4, 8, 16, 100), "rk4": (8,)}
    return base.finish(c)
