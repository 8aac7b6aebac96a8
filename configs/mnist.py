"""MNIST, 28x28: a flow by OT-CFM with a small U-Net, fitted to a machine without an accelerator.

python -m launch.train --config=configs/mnist.py --workdir=workdir/mnist    # OT-CFM
    --config.coupling=independent                  # I-CFM
    --config.coupling=independent --config.conditional=True --config.label_dropout=0.1 --config.guidance=2.0
    --config.data.source_dir=FOLDER                # of the four original files; otherwise TFDS downloads them (12 MB)
python -m launch.evaluate --workdir=workdir/mnist    # distances against NFE
"""

from ml_collections import config_dict

from configs import base


def get_config():
    """Return the experiment."""
    c = base.get_config()
    text = lambda: config_dict.placeholder(str)  # one per field: a common placeholder would be one value
    c.data = {"name": "mnist", "source_dir": text(), "data_dir": text(), "verify": True}
    c.data.update({"stream": False, "validation": 5000})  # the last training images choose strengths
    c.log_every, c.save_every, c.sample_every = 50, 250, 500
    c.net = {"name": "unet", "channels": 16, "multipliers": (1, 2, 4), "blocks": 1, "attention": (7,)}
    c.batch_size, c.steps, c.learning_rate, c.beta2, c.ema = 64, 2500, 1e-3, 0.999, 0.998
    c.sampling = {"seeds": 3, "samples": 500}
    c.samplers = {"euler": (2, 4, 8, 16, 100)}
    return base.finish(c)
