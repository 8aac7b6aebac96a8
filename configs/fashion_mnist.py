"""Fashion-MNIST, 28x28: a flow by OT-CFM with a small U-Net, fitted to a machine without an accelerator.

python -m launch.train --config=configs/fashion_mnist.py --workdir=workdir/fashion_mnist    # OT-CFM
    --config.coupling=independent                  # I-CFM
    --config.coupling=independent --config.conditional=True --config.label_dropout=0.1 --config.guidance=2.0
    --config.data.source_dir=FOLDER                # of the four original files; otherwise TFDS downloads them (31 MB)
python -m launch.evaluate --workdir=workdir/fashion_mnist    # distances against NFE

On a CPU a convolution takes one thread: NPROC=32 XLA_FLAGS=--xla_force_host_platform_device_count=2 uses two cores.
"""

from ml_collections import config_dict

from configs import base


def get_config():
    """Return the experiment."""
    c = base.get_config()
    text = lambda: config_dict.placeholder(str)  # one per field: a common placeholder would be one value
    c.data = {"name": "fashion_mnist", "source_dir": text(), "data_dir": text(), "verify": True}
    c.data.update({"stream": False, "validation": 5000})  # the last training images choose strengths
    c.log_every, c.save_every, c.sample_every = 50, 250, 500
    c.net = {"name": "unet", "channels": 16, "multipliers": (1, 2, 4), "blocks": 1, "attention": (7,)}
    c.batch_size, c.steps, c.learning_rate, c.beta2, c.ema = 64, 2500, 1e-3, 0.999, 0.998
    c.sampling = {"seeds": 3, "samples": 500}
    c.samplers = {"euler": (2, 4, 8, 16, 100)}
    return base.finish(c)
