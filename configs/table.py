"""Vectors of a file of arrays (x, perhaps y): a flow with a residual MLP, its score corrector and a flow map.

python -m launch.train --config=configs/table.py --workdir=W --config.data.path=X.npz    # or launch.pipeline
    --config.conditional=True --config.label_dropout=0.1 --config.guidance=2.0    # on y: labels, or floats
python -m launch.evaluate --workdir=W    # distances against NFE
python -m launch.sample --workdir=W --count=1000 --out=rows.npz

x is [n, d], floats of any scale: columns are standardised for the network, and samples have the units of the file.
"""

from ml_collections import config_dict

from configs import base


def get_config():
    """Return the experiment."""
    c = base.get_config()
    c.data = {"name": "arrays", "path": config_dict.placeholder(str), "standardise": True, "stream": False}
    c.data.update({"validation": 0.1, "test": 0.1, "seed": 0})
    c.coupling = "independent"
    c.log_every, c.save_every, c.sample_every = 100, 1000, 0
    c.net = {"name": "mlp", "width": 256, "depth": 4}
    c.batch_size, c.steps, c.learning_rate, c.warmup, c.ema = 128, 5000, 1e-3, 200, 0.999
    c.forward_examples = 1600
    c.sampling = {"seeds": 3, "samples": 400}
    c.samplers = {"euler": (8, 32), "rk4": (8,)}
    c.corrections = {"end": {"solver": "rk4", "steps": 8, "at": (8,), "by": "score", "alpha": 0.1}}
    return base.finish(c)
