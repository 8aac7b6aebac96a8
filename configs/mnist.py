"""MNIST, 28x28: a flow by OT-CFM with a small U-Net, fitted to a machine without an accelerator.

python -m launch.train --config=configs/mnist.py --workdir=workdir/mnist       # OT-CFM
    --config.coupling=independent                  # I-CFM
    --config.coupling=independent --config.classes=10 --config.label_dropout=0.1 --config.guidance=2.0   # with labels
    --config.data.source_dir=FOLDER                # of the four original files; otherwise TFDS downloads them (12 MB)
python -m launch.evaluate --config=configs/mnist.py --workdir=workdir/mnist    # distances against NFE

Not run to its end with this code; its recipe and network are those of fashion_mnist.py (36 minutes on two CPU cores).
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """All fields of the experiment; any can be changed by ``--config.FIELD=VALUE``."""
    c = ConfigDict()
    c.seed = 0
    c.data = {"name": "mnist", "source_dir": config_dict.placeholder(str)}
    c.data.update({"data_dir": config_dict.placeholder(str), "verify": True, "stream": False})
    c.flip = False
    c.classes, c.label_dropout, c.guidance = 0, 0.0, 1.0
    c.negatives = config_dict.placeholder(str)  # 'any', 'other_label': what the contrastive method needs
    c.path = "linear"
    # runs whose averaged parameters training starts from, and whose are the target of target='frozen'
    c.init, c.teacher = config_dict.placeholder(str), config_dict.placeholder(str)
    c.fsdp = False
    c.log_every, c.save_every, c.sample_every, c.keep = 50, 250, 500, 2

    c.net = {"name": "unet", "channels": 16, "multipliers": (1, 2, 4), "blocks": 1, "attention": (7,)}
    c.method = "flow_matching"
    c.coupling = "minibatch_ot"
    c.batch_size, c.steps, c.target = 64, 2500, "self"
    c.learning_rate, c.warmup, c.schedule = 1e-3, 100, "cosine"
    c.clip, c.beta2, c.weight_decay, c.ema = 1.0, 0.999, 0.0, 0.998

    # what launch.evaluate draws
    c.sampling = {"seeds": 3, "samples": 500, "euler": (2, 4, 8, 16, 100)}
    return c.lock()
