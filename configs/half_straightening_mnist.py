"""Half-straightening on MNIST, 28x28, with a small transformer: a teacher by OT-CFM, fitted to a CPU.

python -m launch.reflow --config=configs/half_straightening_mnist.py --workdir=workdir/half_straightening_mnist
    --config.data.source_dir=FOLDER                # of the four original files; otherwise TFDS downloads them (12 MB)
"""

from ml_collections import config_dict

from configs import base


def get_config():
    """Return the experiment: 16 tokens an image; noise half [0, 0.5], data half [0.5, 1]."""
    c = base.get_config()
    text = lambda: config_dict.placeholder(str)  # one per field: a common placeholder would be one value
    c.data = {"name": "mnist", "source_dir": text(), "data_dir": text(), "verify": True}
    c.data.update({"stream": False, "validation": 5000})  # the last training images choose strengths
    c.log_every, c.save_every, c.sample_every = 50, 250, 0
    c.net = {"name": "dit", "width": 128, "depth": 4, "heads": 4, "patch": 7}
    c.batch_size, c.steps, c.beta2, c.ema = 64, 5000, 0.999, 0.998
    fields = {"sharing": ("shared", "retained", "gated"), "grid": "even", "grid_steps": 20, "examples": 4000}
    fields |= {"reference_steps": 40, "probes": 128}
    c.straighten = base.straighten(c, steps=800, learning_rate=5e-4, warmup=0, **fields)
    c.sampling = {"seeds": 3, "samples": 250}
    c.samplers = {"euler": (2, 10, 18)}
    return base.finish(c)
