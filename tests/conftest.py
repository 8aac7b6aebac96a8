"""Eight virtual CPU devices, and no deadlock of chained steps on few cores, before JAX is imported.

Most of the time of a test is a compiler's: programs are not optimised, but with ``-m slow``, which runs them long.
What one test has compiled another need not: the workers, and the processes that tests start, share a compilation cache
that begins empty and ends with the session. ``JAX_COMPILATION_CACHE_DIR`` names one that stays.
"""

import atexit
import os
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fmjax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("NPROC", "32")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest


def pytest_configure(config):
    if config.option.markexpr != "not slow":  # for all of the session: fixtures serve many tests, and processes many
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64():
    """Float64 for a test that compares with a closed form to rounding."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)
