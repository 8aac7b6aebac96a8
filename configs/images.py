"""A folder of images (PNG, JPEG, WebP): a flow with a U-Net, its score corrector and a flow map.

python -m launch.train --config=configs/images.py --workdir=W --config.data.path=FOLDER    # or launch.pipeline
    --config.data.size=32                # height and width; the middle of each image is taken (default 64)
    --config.data.channels=1             # grey images
    --config.conditional=True --config.label_dropout=0.1 --config.guidance=2.0    # labels are the sub-folders
python -m launch.evaluate --workdir=W    # distances against NFE
python -m launch.sample --workdir=W --count=36 --out=grid.png

The network is for an accelerator; on a CPU take --config.data.size=16 --config.net.channels=16.
"""

from ml_collections import config_dict

from configs import base


def get_config():
    """Return the experiment."""
    c = base.get_config()
    text, switch = (lambda: config_dict.placeholder(str)), config_dict.placeholder(bool)
    c.data = {"name": "folder", "path": text(), "size": 64, "channels": 3, "validation": 0.1, "test": 0.1}
    c.data.update({"seed": 0, "stream": switch, "data_dir": text()})
    c.flip, c.coupling = True, "independent"
    c.log_every, c.save_every, c.sample_every = 50, 500, 500
    c.net = {
        "name": "unet",
        "channels": 64,
        "multipliers": (1, 2, 2, 4),
        "blocks": 2,
        "attention": (8,),
        "middle": True,
    }
    c.batch_size, c.steps, c.learning_rate, c.warmup, c.beta2, c.ema = 32, 20_000, 5e-4, 500, 0.999, 0.999
    c.forward_examples = 400
    c.sampling = {"seeds": 2, "samples": 64}
    c.samplers = {"euler": (8, 32), "rk4": (8,)}
    c.corrections = {"end": {"solver": "rk4", "steps": 8, "at": (8,), "by": "score", "alpha": 0.1}}
    return base.finish(c)
