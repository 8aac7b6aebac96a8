"""What every test needs before JAX is imported: eight virtual CPU devices, and compiled programs that are kept.

Most of a test's time is compilation. Three settings cut it. Programs are not optimised (except with ``-m slow``, whose
programs run long). A cache on disk keeps every compiled program for the other workers, for the processes that tests
start and for the next session: ``~/.cache/fmjax/tests-...``, or ``JAX_COMPILATION_CACHE_DIR``. Programs in memory are
dropped after each test module, so that a worker does not grow with the suite.
"""

import ctypes
import gc
import hashlib
import os
import platform
import signal
from importlib.metadata import version
from pathlib import Path

CACHE_LIMIT = 4 * 2**30  # bytes


def cache_folder() -> Path:
    """Return the folder of compiled programs of this version of JAX on this kind of processor."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else platform.processor()
    features = next((line for line in info.splitlines() if line.lower().startswith(("flags", "features"))), info)
    machine = f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmjax" / f"tests-{version('jax')}-{machine}"
    )


def shrink(folder: Path) -> None:
    """Delete the oldest programs of a folder that holds more than ``CACHE_LIMIT`` bytes."""
    total = 0
    for stat, path in sorted(((p.stat(), p) for p in folder.glob("*")), key=lambda f: -f[0].st_mtime):
        total += stat.st_size
        if total > CACHE_LIMIT:
            path.unlink(missing_ok=True)


for sign in (signal.SIGINT, signal.SIGHUP):  # a background job of a shell ignores them, and so would what it starts
    if signal.getsignal(sign) is signal.SIG_IGN:
        signal.signal(sign, signal.default_int_handler if sign == signal.SIGINT else signal.SIG_DFL)

OWN_CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder())) == str(cache_folder())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("NPROC", "32")  # no deadlock of chained steps on few cores
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config):
    if config.option.markexpr != "not slow":  # for all of the session: fixtures serve many tests, and processes many
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
        jax.config.update("jax_disable_most_optimizations", False)
    if OWN_CACHE and not hasattr(config, "workerinput"):
        shrink(cache_folder())


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_module():
    """Drop compiled programs after each module, and give the memory back to the system."""
    yield
    jax.clear_caches()
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def x64():
    """Float64 for a test that compares with a closed form to rounding."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_users_call():
    """Without the run-time check of array types, which only this suite has: what is refused then is refused by us."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def key():
    return jax.random.key(0)
