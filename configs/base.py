"""Every field of an experiment, once; the other configs are what differs from these."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Return all fields with their defaults: a flow of handwritten digits, its marginals, correctors and flow map."""
    c = ConfigDict()
    c.seed = 0  # of everything that is drawn
    c.data = {"name": "digits"}  # a data set of fmjax.data, or "package.module:factory"
    c.flip = False  # mirror half of the training images
    c.conditional = False  # condition the network on the labels (or other conditions) of the data
    c.label_dropout = 0.0  # fraction of the examples trained without their condition; guidance needs 0.1 or so
    c.guidance = 1.0  # scale of classifier-free guidance when sampling; 1 is no guidance
    c.negatives = config_dict.placeholder(str)  # 'any' or 'other_label': the negatives of the contrastive method
    c.path = "linear"  # an interpolant of fmjax.paths
    c.init = config_dict.placeholder(str)  # run folder whose averaged parameters training starts from
    c.teacher = config_dict.placeholder(str)  # run folder whose averaged parameters are the target of target='frozen'
    c.fsdp = False  # split parameters, optimiser and average over the devices

    c.log_every = 25  # steps between records of the losses
    c.save_every = 500  # steps between checkpoints
    c.sample_every = 1000  # steps between pictures of samples; 0 draws none
    c.keep = 2  # checkpoints kept

    # training of the flow; every other stage has the same fields
    c.net = {"name": "mlp", "width": 256, "depth": 4}  # a network of fmjax.nets
    c.method = "flow_matching"  # a method of fmjax.methods
    c.weighting = config_dict.placeholder(str)  # 'adaptive' or 'learned'
    c.coupling = "minibatch_ot"  # how source and data are paired, of fmjax.couplings
    c.batch_size = 128  # examples a step, over all devices
    c.steps = 4500  # of the optimiser
    c.target = "self"  # whose parameters a loss takes as its teacher: 'self', 'ema' or 'frozen'
    c.learning_rate = 2e-3  # the peak rate
    c.warmup = 100  # steps until the rate is reached
    c.schedule = "cosine"  # of the learning rate after the warm-up, or 'constant'
    c.clip = 1.0  # largest norm of the gradient
    c.beta2 = 0.99  # Adam's decay of the second moment
    c.weight_decay = 0.0  # of matrices
    c.ema = 0.995  # decay of the averaged parameters, which are the ones that are used

    # marginals p_n (from noise) and q_n (from data) on the grid of a solver
    c.solver = "rk4"  # a solver of fmjax.sampling, or 'flow_map'
    c.solver_steps = 8  # uniform steps of that solver
    c.backward_map = "reverse"  # how q_n goes back: 'reverse' solves the ODE backwards, 'inverse' inverts each step

    c.forward_examples = 1600  # examples of p_n; q_n has the training data

    c.correctors = {}  # name -> stage(c, ...): networks trained on the marginals
    c.flow_map = {}  # stage(c, ...): a few-step map that starts from the flow

    # what is drawn and compared
    c.sampling = {"seeds": 4, "samples": 400}  # runs of so many samples, which give the errors
    c.samplers = {"euler": (4, 8, 16, 32)}  # solver -> numbers of steps, or name -> {"solver", "steps", "grid"}
    c.corrections = {}  # name -> {"solver", "steps", "at", "by", ...}: a sampler corrected at the steps 'at'
    c.metrics = ()  # distances of fmjax.metrics; () for those that suit the data
    c.straighten = {}  # straighten(c, ...): students on parts of the time axis (launch.reflow)
    return c


def finish(c: ConfigDict) -> ConfigDict:
    """Return the config, locked; a score corrector and a flow map are there even where a config names none."""
    with c.ignore_type():
        c.correctors = c.correctors or {"score": score(c)}
        c.flow_map = c.flow_map or lagrangian(c)
    return c.lock()


TRAINING = (
    "coupling", "batch_size", "steps", "target", "learning_rate", "warmup", "schedule", "clip", "beta2",
    "weight_decay", "ema",
)  # fmt: skip


def stage(c: ConfigDict, **differs) -> dict:
    """Return the fields of a training stage: those of the flow, but for ``differs``; without ``net`` the flow's."""
    fields = {"net": None, "weighting": None, **{name: c[name] for name in TRAINING}}
    none = config_dict.placeholder(str)
    return {name: none if value is None else value for name, value in {**fields, **differs}.items()}


def score(c: ConfigDict, **differs) -> dict:
    """Return a corrector that learns the score of the backward marginals, with the network of the flow."""
    method = {"name": "score_corrector", "sigma": 0.2}
    fields = {"net": c.net.to_dict(), "method": method, "weighting": None, "steps": max(1, c.steps // 3)}
    return stage(c, **{**fields, "learning_rate": c.learning_rate, **differs})


def lagrangian(c: ConfigDict, **differs) -> dict:
    """Return a flow map learned from the flow by Lagrangian self-distillation."""
    method = {"name": "lagrangian", "diagonal": 0.75}
    fields = {"method": method, "weighting": None, "steps": max(1, c.steps // 2), "learning_rate": c.learning_rate / 2}
    return stage(c, **{**fields, **differs})


def straighten(c: ConfigDict, **differs) -> dict:
    """Return the fields of half-straightening: those of a stage, and which students are trained and compared."""
    fields = {
        "seed": 0,  # of the trajectories' noise and of the students
        "bounds": (0.0, 0.5, 1.0),  # of the segments of the time axis
        "parts": {"noise half": (0,), "data half": (1,), "both halves": (0, 1)},  # which segments are straightened
        "sharing": ("shared", "retained", "conditioned", "gated"),  # how a student treats the kept segments
        "full": True,  # also a full reflow
        "grid": "edm",  # of the teacher's trajectories, or 'even'
        "grid_steps": 40,
        "solver": "heun",
        "examples": 20_000,  # trajectories
        "allocations": ((1, 1), (1, 9), (9, 1), (9, 9)),  # Euler steps in each segment
        "reference_steps": 80,  # of the solver, for the samples that others are paired with
        "baselines": (2, 10, 18),  # evaluations at which other samplers of the teacher are compared
        "probes": 1024,  # examples of the straightness measures
    }
    return stage(c, **{"method": {"name": "straighten"}, "target": "frozen", **fields, **differs})
