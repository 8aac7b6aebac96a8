"""Handwritten digits, 8x8, offline: a flow by OT-CFM, its marginals, correctors and a two-time flow map.

python -m launch.pipeline --config=configs/digits.py --workdir=workdir/digits   # the pipeline
python -m launch.train --config=configs/digits.py --workdir=workdir/flow        # the flow alone
    --config.conditional=True --config.label_dropout=0.1 --config.guidance=2.0 --config.coupling=independent
"""

from configs import base


def get_config():
    """Return the experiment: the base config with correctors, a flow map and corrections picked by hand."""
    c = base.get_config()
    robust = {"name": "classifier_corrector", "eps": 0.5, "steps": 3}
    small = {"name": "mlp", "width": 128, "depth": 3, "logit": True}
    c.correctors = {
        "score": base.score(c),
        "classifier": base.stage(c, net=small, method=robust, steps=600, learning_rate=1e-3, weight_decay=0.05),
    }
    c.flow_map = base.lagrangian(c, steps=2000)
    c.samplers = {"euler": (4, 8, 16, 32), "rk4": (2, 4, 8), "flow_map": (1, 2, 4)}
    rk4, jump = {"solver": "rk4", "steps": 8}, {"solver": "flow_map", "steps": 4}
    push = lambda by, alpha, beta=0.0: {"by": by, "alpha": alpha, "beta": beta}
    end = lambda solver, steps, by: {"solver": solver, "steps": steps, "at": (steps,), "by": by}
    fitted = (("rk4", 8), ("rk4", 2), ("euler", 4), ("flow_map", 1), ("flow_map", 2), ("flow_map", 4))
    c.corrections = {
        # what to use first: fitted on samples of each sampler in closed form, at strength 1
        **{f"{solver}_{steps}": end(solver, steps, "affine_push") for solver, steps in fitted},
        "push": end("rk4", 8, "push"),
        "affine": end("rk4", 8, "affine"),
        "map_push": end("flow_map", 4, "push"),
        "map_affine": end("flow_map", 4, "affine"),
        # what it is compared with
        "start": {**rk4, "at": (0,), **push("score", 0.5, 0.4)},
        "end": {**rk4, "at": (8,), **push("score", 0.5)},
        "three": {**rk4, "at": (0, 4, 8), **push("score", 0.1, 0.1)},
        "all": {**rk4, "at": tuple(range(9)), **push("score", 0.1, 0.1)},
        "apart_end": {**rk4, "at": (8,), **push("classifier", 0.1)},
        "apart_three": {**rk4, "at": (0, 4, 8), **push("classifier", 0.03)},
        "drift": {**rk4, "at": (8,), **push("drift", 0.5), "bandwidth": 1.0},
        "map_start": {**jump, "at": (0,), **push("score", 0.5, 0.4)},
        "map_end": {**jump, "at": (4,), **push("score", 0.5)},
        "map_three": {**jump, "at": (0, 2, 4), **push("score", 0.1, 0.1)},
        "map_apart": {**jump, "at": (4,), **push("classifier", 0.1)},
        "map_drift": {**jump, "at": (4,), **push("drift", 0.5), "bandwidth": 1.0},
        "map_restart": {**jump, "at": (3,), "by": {"name": "restart", "to": 0.25}},
    }
    return base.finish(c)
