"""Fashion-MNIST, 28x28: a flow by OT-CFM with a small U-Net, fitted to a machine without an accelerator.

python -m launch.train --config=configs/fashion_mnist.py --workdir=workdir/fashion_mnist
    --config.coupling=independent               # I-CFM
    --config.data.source_dir=FOLDER             # of the four original files; otherwise TFDS downloads them (31 MB)
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """All fields of the experiment; any can be changed by ``--config.FIELD=VALUE``."""
    c = ConfigDict()
    c.seed = 0
    c.data = {"name": "fashion_mnist", "source_dir": config_dict.placeholder(str)}
    c.data.data_dir = config_dict.placeholder(str)  # of the prepared records: TFDS's own
    c.flip = False
    c.path = "linear"
    c.fsdp = False
    c.log_every, c.save_every, c.sample_every, c.keep = 50, 500, 500, 2

    c.net = {"name": "unet", "channels": 32, "multipliers": (1, 2), "blocks": 1, "attention": (14,)}
    c.method = "flow_matching"
    c.coupling = "minibatch_ot"
    c.batch_size, c.steps, c.target = 128, 5000, "self"
    c.learning_rate, c.warmup, c.schedule = 1e-3, 200, "cosine"
    c.clip, c.beta2, c.weight_decay, c.ema = 1.0, 0.999, 0.0, 0.999
    return c.lock()
