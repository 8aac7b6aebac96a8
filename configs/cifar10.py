"""CIFAR-10, 32x32: OT-CFM by torchcfm's recipe (github.com/atong01/conditional-flow-matching, examples/images/cifar10).

python -m launch.train --config=configs/cifar10.py --workdir=workdir/cifar10
    --config.coupling=independent               # I-CFM
    --config.net.dtype=bfloat16                 # compute in bfloat16; parameters stay float32
    --config.data.source_dir=FOLDER             # of cifar-10-binary.tar.gz; otherwise TFDS downloads it (170 MB)

Published by torchcfm for this recipe: FID 3.5 (clean-fid, legacy_tensorflow, 50,000 samples, dopri5 at 1e-5, about 134
NFE). Not run with this code. Hardware: one GPU with 16 GB, or a TPU host; its wall-clock is not known. The recipes
differ: here OT pairs are a permutation (there they are drawn from the plan with replacement), the average is warmed up
as min(0.9999, (1 + n) / (10 + n)), and the network also takes a second time.
"""

from ml_collections import config_dict

from configs import base


def get_config():
    """Return the experiment."""
    c = base.get_config()
    text = lambda: config_dict.placeholder(str)  # one per field: a common placeholder would be one value
    c.data = {"name": "cifar10", "source_dir": text(), "data_dir": text(), "verify": True}
    c.data.update({"stream": False, "validation": 5000})  # the last training images choose strengths
    c.flip = True
    c.log_every, c.save_every, c.sample_every, c.keep = 200, 5000, 20_000, 3
    c.net = {"name": "unet", "channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention": (16,)}
    c.net.update({"head_channels": 64, "dropout": 0.1, "film": False, "per_group": 1, "spectrum": "slow"})
    c.net.update({"middle": True, "resample": "conv", "dtype": "float32"})
    c.batch_size, c.steps = 128, 400_000
    c.learning_rate, c.warmup, c.schedule, c.beta2, c.ema = 2e-4, 5000, "constant", 0.999, 0.9999
    c.sampling = {"seeds": 3, "samples": 10_000}
    c.samplers = {"euler": (2, 4, 8, 16, 100), "rk4": (10,)}
    return base.finish(c)
