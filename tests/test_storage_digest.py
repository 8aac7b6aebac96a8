"""The digest of arrays: the same for every container and sharding, another for every other content."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from test_storage_checkpoint import sharded

from fmjax.storage import checkpoint


def test_the_digest_of_rows_on_disk_is_that_of_the_array():
    """In several parts, of which the last is smaller, and in one."""

    class Disk:
        def __init__(self, x):
            self.x, self.shape, self.dtype, self.asked = x, x.shape, x.dtype, []

        def __len__(self):
            return len(self.x)

        def __getitem__(self, rows):
            self.asked.append(len(self.x[rows]))
            return self.x[rows]

    for x in (np.random.default_rng(0).standard_normal((5, 1024, 1300)).astype(np.float32), np.arange(7.0)):
        disk = Disk(x)
        assert checkpoint.digest_rows(disk) == checkpoint.digest_rows(x) == checkpoint.digest(x)
        assert sum(disk.asked) == len(x) and max(disk.asked) * x[:1].nbytes <= 2**24
    assert checkpoint.digest_rows(x[::-1]) == checkpoint.digest(x[::-1].copy()) != checkpoint.digest(x)


def test_digest_sees_bytes_shapes_dtypes_and_names_and_nothing_else():
    tree = {"a": jnp.arange(8.0), "b": jnp.ones((8, 2), jnp.bfloat16)}
    expected = checkpoint.digest(tree)
    assert checkpoint.digest(jax.tree.map(np.asarray, tree)) == expected
    assert checkpoint.digest(sharded(tree, 8)) == checkpoint.digest(sharded(tree, 2)) == expected
    assert checkpoint.digest(NamedTuple("T", [("b", Any), ("a", Any)])(tree["b"], tree["a"])) == expected
    others = [
        tree | {"a": tree["a"].at[3].set(3.0000002)},
        tree | {"a": tree["a"].reshape(2, 4)},
        tree | {"a": jax.lax.bitcast_convert_type(tree["a"], jnp.int32)},
        {"a": tree["a"], "c": tree["b"]},
        {"a": tree["a"]},
    ]
    assert len({expected, *map(checkpoint.digest, others)}) == 6
