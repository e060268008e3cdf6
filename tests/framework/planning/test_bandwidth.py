"""A streaming read reads every byte that it says, on every device."""

import jax
import numpy as np
from jax.sharding import AxisType

from meshway.framework.planning import hardware


def test_each_device_reads_its_own_array():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    read = hardware.StreamingRead(mesh, device_bytes=5 * 4 * 4096)
    assert read.bytes == 8 * 5 * 4 * 4096
    for way in read.ways:
        found = read.once(way)
        assert found.shape == (8, 5) and len({shard.device for shard in found.addressable_shards}) == 8
        np.testing.assert_array_equal(found, 4096.0)


def test_the_largest_cache_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "_CACHES", tmp_path)
    assert hardware.last_level_cache() == 64 * 2**20
    for level, size in enumerate(("48K", "2048K", "105M", "", "odd")):
        (tmp_path / f"index{level}").mkdir()
        (tmp_path / f"index{level}" / "size").write_text(f"{size}\n")
    assert hardware.last_level_cache() == 105 * 2**20
