"""The config of the tests that damage, kill and race whole runs: points, a network of 8 neurons, a few steps."""

from configs import base


def get_config():
    """Return a config that each command works through in seconds."""
    c = base.get_config()
    c.data = {"name": "checkerboard", "train": 96, "validation": 64, "test": 64, "seed": 0}
    c.net = {"name": "mlp", "width": 8, "depth": 1}
    c.log_every, c.save_every, c.sample_every = 2, 2, 0
    c.coupling, c.schedule, c.batch_size, c.steps, c.warmup = "independent", "constant", 32, 4, 0
    c.solver_steps, c.forward_examples = 2, 32
    logit = {"net": {"name": "mlp", "width": 8, "depth": 1, "logit": True}, "method": {"name": "classifier_corrector"}}
    c.correctors = {"score": base.score(c, steps=4), "classifier": base.stage(c, **logit)}
    c.flow_map = base.lagrangian(c, steps=4)
    c.sampling = {"seeds": 3, "samples": 16}
    c.samplers = {"rk4": (2,), "flow_map": (1,)}
    c.corrections = {"end": {"solver": "rk4", "steps": 2, "at": (2,), "by": "score", "alpha": 0.5, "beta": 0.1}}
    c.metrics = ("sliced_w2_to",)
    c.straighten = base.straighten(
        c, grid_steps=2, grid="even", examples=32, allocations=((1, 1),), reference_steps=2, baselines=(2,), probes=16,
        parts={"data half": (1,)}, sharing=("shared",), full=False,
    )  # fmt: skip
    return c.lock()
