"""Anderson's acceleration against what it is for a linear residual, and what it leaves where there is no root."""

import jax
import jax.numpy as jnp
import numpy as np

from fmjax.sampling import fixed_point


def problem(batch=4, d=6):
    """Linear residuals ``b - A x``, ``A`` positive with eigenvalues 0.05 .. 6: ``x + b - A x`` is no contraction."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((batch, d, d)))[0]
    a = basis @ (np.geomspace(0.05, 6, d)[:, None] * basis.swapaxes(1, 2))
    root = rng.standard_normal((batch, d))
    b = np.einsum("bij,bj->bi", a, root)
    return root, lambda x: b - jnp.einsum("bij,bj->bi", jnp.asarray(a), x)


def test_a_linear_residual_takes_as_many_iterations_as_unknowns(x64):
    root, residual = problem()
    x = jnp.zeros(root.shape)
    gap = lambda n: float(jnp.abs(fixed_point.anderson(residual, x, iterations=n, memory=6) - root).max())
    assert gap(7) < 1e-9 and gap(5) > 1e-3
    plain = x
    for _ in range(20):
        plain = plain + residual(plain)
    assert float(jnp.abs(plain).max()) > 1e6


def test_examples_do_not_see_each_other(x64):
    root, residual = problem()
    alone = lambda i: fixed_point.anderson(
        lambda x: residual(jnp.tile(x, (4, 1)))[i : i + 1], jnp.zeros((1, 6)), iterations=4
    )
    together = fixed_point.anderson(residual, jnp.zeros((4, 6)), iterations=4)
    for i in range(4):
        np.testing.assert_allclose(alone(i)[0], together[i], rtol=1e-12, atol=1e-12)


def test_without_a_root_the_iterate_of_smallest_residual_is_returned():
    """``2 + x^2`` is least at 0, where the iteration starts; ``x - 3`` is not defined below 2.9 but at its start."""
    start = jnp.array([[0.0], [0.1]])
    np.testing.assert_array_equal(fixed_point.anderson(lambda x: 2 + x**2, start, iterations=30)[0], start[0])
    broken = lambda x: jnp.where((x < 2.9) & (x != 0), jnp.nan, -0.5 * (x - 3))
    np.testing.assert_array_equal(fixed_point.anderson(broken, jnp.zeros((1, 1)), iterations=5), [[0.0]])


def test_it_costs_one_residual_more_than_iterations():
    calls = []

    def residual(x):
        jax.debug.callback(lambda: calls.append(0))
        return 1 - x

    jax.block_until_ready(jax.jit(lambda x: fixed_point.anderson(residual, x, iterations=7))(jnp.zeros((2, 3))))
    jax.effects_barrier()
    assert len(calls) == 8
