# %% [markdown]
# # Handwritten digits, from data to a report
#
# The quickstart in Python, with less training: a flow, its marginals, a score corrector, a flow map, samples and a
# report. `bash launch/quickstart.sh` runs the same pipeline with the full config `configs/digits.py`.

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import fmjax
from configs import base
from fmjax.experiments import pipeline, settings

c = base.get_config()  # every field with its default
c.steps, c.net["width"], c.net["depth"] = 1500, 192, 3
c.samplers = {"euler": (4, 8, 16), "rk4": (4,), "flow_map": (1, 2, 4)}
c.sampling = {"seeds": 2, "samples": 300}
c.corrections = {"end": {"solver": "rk4", "steps": 4, "at": (4,), "by": "drift", "alpha": 0.5, "bandwidth": 1.0}}
c.solver_steps, c.sample_every, c.log_every = 4, 0, 250
c = base.finish(c)  # adds a score corrector and a Lagrangian flow map

workdir = Path(tempfile.mkdtemp()) / "digits"
pipeline.main(settings.read(c), workdir)

# %% [markdown]
# The run folder holds everything: config, checkpoints, marginals, samples, numbers and the page `report.html`. A
# pipeline that is run again continues where it stopped.

# %%
record = json.loads((workdir / "metrics.json").read_text())
for row in record["rows"]:
    values = ", ".join(f"{name} {mean:.3g} ± {se:.1g}" for name, (mean, se) in row["distances"].items())
    print(f"{row['name']:34s} NFE {row['nfe']:3d}  {values}")

# %% [markdown]
# `fmjax.load` opens a run folder. Sample $i$ of a seed is the same in every command.

# %%
run = fmjax.load(workdir)
digits = fmjax.data.digits()
rows = {
    "data": digits.test.x[:12],
    "flow map, 1 evaluation": run.sample(12, solver="flow_map", steps=1),
    "flow map, 4 evaluations": run.sample(12, solver="flow_map", steps=4),
    "RK4, 32 evaluations": run.sample(12, solver="rk4", steps=8),
}
figure, axes = plt.subplots(4, 1, figsize=(7, 3))
for axis, (name, images) in zip(axes, rows.items()):
    axis.imshow(
        np.hstack([np.pad(image[..., 0], 1, constant_values=-1) for image in images]), cmap="gray", vmin=-1, vmax=1
    )
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)

# %% [markdown]
# Encode a digit, decode it again, and interpolate between two digits:

# %%
a, b = digits.test.x[0], digits.test.x[5]
between = run.interpolate(a, b, 9, steps=16)
error = np.abs(run.decode(run.encode(a[None], steps=64), steps=64)[0] - a).max()
print(f"largest error of a round trip with 64 steps: {error:.2g}")
plt.figure(figsize=(6, 1))
plt.imshow(np.hstack([x[..., 0] for x in between]), cmap="gray", vmin=-1, vmax=1)
plt.axis("off")
