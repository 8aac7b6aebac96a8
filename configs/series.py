"""Series of a file of arrays (x, perhaps y): a flow with a U-Net along time, its score corrector and a flow map.

python -m launch.train --config=configs/series.py --workdir=W --config.data.path=X.npz    # or launch.pipeline
    --config.conditional=True        # on y: the past of each series, numbers, or labels
python -m launch.evaluate --workdir=W    # distances against NFE
python -m launch.sample --workdir=W --count=8 --out=lines.png --cond=PAST.npz

x is [n, length, channels], floats of any scale, of a length divisible by 4: channels are standardised for the network,
and samples have the units of the file. A y of the same length enters by channels, any other y by its embedding.
"""

from ml_collections import config_dict

from configs import base


def get_config():
    """Return the experiment."""
    c = base.get_config()
    c.data = {"name": "arrays", "path": config_dict.placeholder(str), "standardise": True, "stream": False}
    c.data.update({"validation": 0.1, "test": 0.1, "seed": 0})
    c.coupling = "independent"
    c.log_every, c.save_every, c.sample_every = 100, 1000, 1000
    c.net = {"name": "unet", "channels": 32, "multipliers": (1, 2, 4), "blocks": 1, "middle": True}
    c.batch_size, c.steps, c.learning_rate, c.warmup, c.ema = 64, 5000, 1e-3, 200, 0.999
    c.forward_examples = 800
    c.sampling = {"seeds": 3, "samples": 200}
    c.samplers = {"euler": (8, 32), "rk4": (8,)}
    c.corrections = {"end": {"solver": "rk4", "steps": 8, "at": (8,), "by": "score", "alpha": 0.1}}
    return base.finish(c)
