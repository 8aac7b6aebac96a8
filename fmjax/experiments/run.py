"""A trained run as an object: ``fmjax.load(W).sample(16)``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import sampling
from fmjax.checks import Range, Refusal, check_range, nearest
from fmjax.data.units import Units, from_record, to_units
from fmjax.experiments import build, drawing, networks, pushes, samplers, settings, workdir
from fmjax.experiments.drawing import Models
from fmjax.experiments.samplers import DRIFT, FLOW, FLOW_MAP, NOISE, PUSHES, Sampler
from fmjax.experiments.settings import Settings
from fmjax.types import Cond, Method, Params

SOLVER, STEPS = "rk4", 16


def load(path: str | Path, *, trust: bool = False) -> Run:
    """Load the networks of a run folder.

    Args:
        path: the folder of a flow, of a pipeline, or of a converted network.
        trust: run code outside the package that the folder's config names.

    Returns:
        The run, with its newest averaged parameters.

    Raises:
        WorkdirError: no run folder, no trained flow, or code outside the package without ``trust``.
    """
    path = workdir.local(path)
    config = settings.read(workdir.read_config(path, trust=trust))
    return Run(config, path)


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A trained run.

    Attributes:
        settings: the config, read and checked.
        path: the run folder.
    """

    settings: Settings
    path: Path

    def __repr__(self) -> str:
        names = ", ".join(self.models.methods)
        return f"Run({str(self.path)!r}: {names}, step {self._loaded[2]}, examples {list(self.models.shape)})"

    @functools.cached_property
    def _loaded(self) -> tuple[Models, str, int]:
        return networks.load_models(self.settings, self.path)

    @property
    def models(self) -> Models:
        """The trained networks in the form that samplers use."""
        return self._loaded[0]

    @property
    def identity(self) -> str:
        """The digest of the parameters."""
        return self._loaded[1]

    @property
    def config(self) -> dict[str, Any]:
        """The config as plain values."""
        return self.settings.config

    @property
    def params(self) -> Params:
        """The averaged parameters of the flow."""
        return self.models.params[FLOW]

    @property
    def method(self) -> Method:
        """The method of the flow."""
        return self.models.methods[FLOW]

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What the run folder records of its data set."""
        return networks.example_facts(self.path)

    @functools.cached_property
    def units(self) -> Units | None:
        """How the data were standardised for the network; ``None`` for data in their own units."""
        return from_record(self.facts.get("units"))

    def velocity(self, x, t, cond: Cond = None):
        """Return the flow's velocity at ``x: [B, ...]`` and ``t``, guided as the config says.

        Examples and conditions are in the units of the network (``units``).
        """
        return self.method.velocity(self.params)(jnp.asarray(x), t, cond)

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        label: int | str | None = None,
        cond: Cond = None,
        guidance: float | None = None,
        solver: Any = None,
        steps: int | None = None,
        grid: Any = None,
        corrections: Mapping[str, Any] | None = None,
        first: int = 0,
    ) -> np.ndarray:
        """Draw samples. Sample ``i`` of a seed is the same whatever ``n`` is, and in every command.

        Args:
            n: number of samples.
            seed: seed of the starts, which come from the source of the config, and of noise on the way.
            label: one label for all samples, or the name of its class.
            cond: conditions ``[n, ...]``; by default labels one after the other, if the run has labels. Floats are in
                the units of the data.
            guidance: guidance scale; by default the config's.
            solver: a solver, or ``"flow_map"``; by default the flow map if the run has one, else ``"rk4"``.
            steps: number of steps; by default 16, and 4 for a flow map.
            grid: time grid; by default the uniform one.
            corrections: ``{"at": steps, "by": corrector, ...}`` as in ``corrections`` of a config.
            first: index of the first sample.

        Returns:
            Samples ``[n, ...]`` in the units of the data set: standardised data are returned to their units.

        Raises:
            ValueError: a label or condition that the network cannot take, or a sampler that cannot be drawn.
        """
        check_range("n", n, Range(1, 1e9))
        check_range("seed", seed, Range(0, 2**32 - 1))
        sampler = self.sampler(solver, steps, grid, corrections)
        cond = self._in_network(self.conditions(n, label, cond, first), "conditions")
        models, program = self.prepare(sampler, guidance, cond)
        keys = drawing.sample_keys(seed, 0, first + n)[first:]
        return self._in_data(drawing.in_chunks(lambda keys, cond: program(models.params, keys, cond), keys, cond))

    def encode(self, x, *, cond: Cond = None, steps: int = 64) -> np.ndarray:
        """Return the state at ``t = 0``, a point of the source, that the flow carries to ``x``, by RK4 steps backwards.

        Args:
            x: examples ``[B, ...]``, in the units of the data.
            cond: conditions of the examples ``[B, ...]``.
            steps: number of steps.

        Returns:
            Points of the source ``[B, ...]``.
        """
        x = self._in_network(np.asarray(x), "examples")
        return self._solve(x, cond, np.linspace(1.0, 0.0, steps + 1, dtype=np.float32))

    def decode(self, z, *, cond: Cond = None, steps: int = 64) -> np.ndarray:
        """Return the examples to which the flow carries points of the source, by RK4 steps.

        Args:
            z: points of the source ``[B, ...]``.
            cond: conditions ``[B, ...]``.
            steps: number of steps.

        Returns:
            Examples ``[B, ...]``, in the units of the data.
        """
        return self._in_data(self._solve(z, cond, np.linspace(0.0, 1.0, steps + 1, dtype=np.float32)))

    def interpolate(self, a, b, n: int, *, cond: Cond = None, steps: int = 64) -> np.ndarray:
        """Interpolate between two examples along the great circle of their noise.

        Args:
            a: first example, without a batch axis.
            b: last example.
            n: number of examples, both ends included.
            cond: condition of both, without a batch axis.
            steps: solver steps in each direction.

        Returns:
            Examples ``[n, ...]``.

        Raises:
            ValueError: a source other than N(0, I), which no great circle follows.
        """
        self.models.source.check_normal("the great circle of interpolate", "Interpolate between encode(a), encode(b)")
        add = lambda tree: None if tree is None else jax.tree.map(lambda v: jnp.asarray(v)[None], tree)
        za, zb = (self.encode(add(x), cond=add(cond), steps=steps)[0] for x in (a, b))
        angle = np.arccos(np.clip(np.sum(za * zb) / (np.linalg.norm(za) * np.linalg.norm(zb)), -1, 1))
        f = np.linspace(0, 1, n).reshape(-1, *[1] * za.ndim)
        z = (np.sin((1 - f) * angle) * za + np.sin(f * angle) * zb) / np.sin(angle) if angle > 1e-6 else za + 0 * f
        rows = jax.tree.map(lambda v: jnp.repeat(v, n, 0), add(cond))
        return self.decode(z.astype(np.float32), cond=rows, steps=steps)

    def log_prob(self, x, *, cond: Cond = None, seed: int = 0, probes: int | None = None, first: int = 0) -> np.ndarray:
        """Return the log-density of the flow, by an adaptive solver.

        Args:
            x: examples ``[B, ...]``.
            cond: conditions of the examples.
            seed: seed of the probes.
            probes: Hutchinson probes an example; by default the exact divergence up to 64 dimensions, else 1.
            first: index of the first example, for the seeds of its probes.

        Returns:
            ``log p(x)``, ``[B]``: the density in the units of the data; ``-inf`` for examples that come from where the
            density of the source is zero.

        Raises:
            ValueError: a path that scales the source, or a source without a density.
            RuntimeError: the adaptive solver failed.
        """
        if drawing.source_scale(self.models.path) != 1:
            raise Refusal("path", self.settings.common.path, "it scales the source", "Use a path with alpha_0 = 1")
        x = jnp.asarray(self._in_network(np.asarray(x), "examples"), jnp.float32)
        cond = self._in_network(self._checked(cond, len(x)), "conditions")
        if probes is None and x[0].size > 64:
            probes = 1
        key = None if probes is None else drawing.sample_keys(seed, 0, first + len(x), purpose=5)[first:]
        density = self._density(x, cond=cond, key=key, probes=probes)
        volume = 0.0 if self.units is None else np.log(np.broadcast_to(self.units.scale, x.shape[1:])).sum()
        return np.asarray(sampling.checked_density(density)) - np.float32(volume)

    def sampler(self, solver: Any, steps: int | None, grid: Any, corrections: Mapping[str, Any] | None) -> Sampler:
        """Return the checked sampler for arguments of ``sample``."""
        if solver is None:
            solver = FLOW_MAP if FLOW_MAP in self.models.methods else SOLVER
        if solver == FLOW_MAP and FLOW_MAP not in self.models.methods:
            raise Refusal("solver", solver, "this run has no flow map", "Take a solver, such as 'rk4'")
        steps = (4 if solver == FLOW_MAP else STEPS) if steps is None else steps
        plain = samplers.plain_samplers({"sample": {"solver": solver, "steps": steps, "grid": grid}})
        if not corrections:
            return plain[0]
        entry = {"solver": solver, "steps": steps, "grid": grid, **corrections}
        trained = [name for name in self.models.methods if name not in (FLOW, FLOW_MAP)]
        return next(s for s in samplers.corrected_samplers({"sample": entry}, plain, trained) if s.by != NOISE)

    def guided(self, scale: float | None) -> Models:
        """Return the networks with another guidance scale."""
        if scale is None or scale == self.settings.common.guidance:
            return self.models
        check_range("guidance", scale, Range())
        if not (self.settings.common.conditional and self.settings.common.label_dropout):
            wrong = "this run was trained without label dropout, which gives the network of no label"
            raise Refusal("guidance", scale, wrong, "Leave guidance out, or train with label_dropout=0.1")
        common = dataclasses.replace(self.settings.common, guidance=float(scale))
        return networks.load_models(self.settings._replace(common=common), self.path)[0]

    def prepare(self, sampler: Sampler, guidance: float | None, cond: Cond) -> tuple[Models, Any]:
        """Return the networks and the program of a sampler, checked; a program is compiled once."""
        name = repr((sampler, guidance, jax.tree.structure(cond)))
        if name not in self._programs:
            models = self.guided(guidance)
            if sampler.by == DRIFT and (banks := networks.stored_bank(self.path, self.params)) is not None:
                models = models._replace(params=models.params | {DRIFT: banks[0]}, ts=banks[1])
            if sampler.by in PUSHES:
                models = pushes.add(models, {samplers.push_key(sampler): self._push(sampler, models, guidance)})
            drawing.check_sampler(sampler, models, cond=cond)
            self._programs[name] = models, drawing.program(sampler, models)
        return self._programs[name]

    def _push(self, sampler: Sampler, models: Models, guidance: float | None):
        """Return the stored push of a sampler, or fit one to the data set of the run; that is not stored."""
        common = self.settings.common
        common = common if guidance is None else dataclasses.replace(common, guidance=float(guidance))
        config = self.settings._replace(common=common)
        push = pushes.stored(sampler, models, config, self.path / pushes.STAGE)
        if push is None:
            data = build.data(common.data)
            pushes.check(config, data, [sampler])
            push = pushes.fit(sampler, models, config, *pushes.examples(config, data))
        return push

    def conditions(self, n: int, label: int | str | None, cond: Cond, first: int = 0) -> Cond:
        """Return the conditions of ``n`` samples, in the units of the data; see ``sample``."""
        facts = self.facts
        if label is not None:
            if not self.settings.common.conditional or not facts["classes"]:
                raise Refusal("label", label, "this run has no labels", "Leave label out")
            names = facts.get("labels", [])
            if isinstance(label, str) and label in names:
                label = names.index(label)
            elif isinstance(label, str):
                known = ", ".join(names[:9]) or f"0 .. {facts['classes'] - 1}"
                raise Refusal("label", label, f"no such label{nearest(label, names)}", f"There are {known}")
            if not 0 <= label < facts["classes"]:
                raise Refusal("label", label, f"labels are 0 .. {facts['classes'] - 1}", "Give one of them")
            return np.full(n, label, np.int32)
        if cond is not None or not (self.settings.common.conditional and facts["classes"]):
            return self._checked(cond, n)
        return np.arange(first, first + n, dtype=np.int32) % facts["classes"]

    def _checked(self, cond: Cond, n: int) -> Cond:
        """Return the conditions of ``n`` examples, lists as arrays; refuse others than the run was trained with."""
        facts = self.facts
        if not self.settings.common.conditional:
            if cond is not None:
                raise Refusal("cond", type(cond).__name__, "this run takes no conditions", "Leave cond out")
            return None
        expected = [] if facts["classes"] else facts.get("cond")
        form = (
            "integer labels [n]"
            if facts["classes"]
            else f"floats [{', '.join(['n', *map(str, ['...'] if expected is None else expected)])}]"
        )
        if cond is None:
            raise ValueError(f"cond=None: this run is conditioned on {form}. Give cond.")
        if isinstance(cond, list):
            cond = np.asarray(cond, np.int32 if facts["classes"] else np.float32)
        if any(np.shape(leaf)[:1] != (n,) for leaf in jax.tree.leaves(cond)):
            shapes = [np.shape(leaf) for leaf in jax.tree.leaves(cond)]
            raise Refusal("cond", shapes, f"not {n} conditions", "Give arrays [n, ...]")
        if expected is not None and list(np.shape(cond)[1:]) != expected:
            raise Refusal("cond", list(np.shape(cond)), "another shape than in training", f"Give {form}")
        return cond

    @functools.cached_property
    def _density(self):
        source = None if self.models.source.normal else self.models.source
        solve = functools.partial(sampling.log_density, self.velocity, source=source)
        return jax.jit(solve, static_argnames="probes")

    @functools.cached_property
    def _programs(self) -> dict[str, tuple[Models, Any]]:
        return {}

    def _in_network(self, value: Any, of: str) -> Any:
        return to_units(self.units, value, of=of, to="network")

    def _in_data(self, x: np.ndarray) -> np.ndarray:
        return to_units(self.units, x, of="examples", to="data")

    def _solve(self, x, cond: Cond, ts: np.ndarray) -> np.ndarray:
        cond = self._in_network(self._checked(cond, len(x)), "conditions")

        @jax.jit
        def solve(params, x, cond):
            return sampling.sample(sampling.rk4(self.method.velocity(params)), x, ts, cond=cond)

        params = self.params  # read here, and not while the program is traced
        return drawing.in_chunks(functools.partial(solve, params), jnp.asarray(x, jnp.float32), cond)
