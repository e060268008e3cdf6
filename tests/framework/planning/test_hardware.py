import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from meshway.framework.planning import hardware
from meshway.framework.planning.topology import CHIPS


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    device_kind: str
    platform: str = "tpu"


def test_known_devices_add_up_and_name_their_source() -> None:
    peak, source = hardware.peak_flops([FakeDevice("TPU v5 lite")] * 4, "bfloat16")
    assert peak == 4 * 197e12
    assert source == "4 x TPU v5 lite, bfloat16: Google Cloud TPU documentation, v5e"
    gpu = [FakeDevice("NVIDIA H100 80GB HBM3", "gpu")]
    assert hardware.peak_flops(gpu, jnp.bfloat16)[0] == 2 * hardware.peak_flops(gpu, jnp.float32)[0]


def test_every_figure_is_plausible() -> None:
    for kind, chip in CHIPS.items():
        assert 1e14 < chip.bfloat16 < 1e16 and chip.float32 <= chip.bfloat16, kind
        assert 10e9 < chip.memory_bytes < 400e9 and chip.source, kind


def test_measured_peaks_of_cpu_and_of_unknown_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"float32": 3.0, "bfloat16": 5.0}
    monkeypatch.setattr(hardware, "measure_matmul_peak", lambda dtype, seconds=0.5: peaks[dtype])
    cpus = [FakeDevice("cpu", "cpu")] * 8
    assert hardware.peak_flops(cpus, "float32") == (3.0, "measured: this machine's best float32 matmul")
    assert hardware.peak_flops(cpus, "bfloat16") == (5.0, "measured: this machine's best bfloat16 matmul")
    peak, source = hardware.peak_flops([FakeDevice("NVIDIA X1", "gpu")] * 2, "bfloat16")
    assert peak == 10.0 and "one NVIDIA X1 (not in the table) x 2" in source


def test_devices_of_two_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="one kind"):
        hardware.peak_flops([FakeDevice("TPU v4"), FakeDevice("TPU v5")], "bfloat16")


def test_one_device_is_measured_also_under_a_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[jax.Array] = []
    time_once = hardware._time
    monkeypatch.setattr(
        hardware, "_time", lambda multiply, matrix: (measured.append(matrix), time_once(multiply, matrix))[1]
    )
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        peak = hardware.measure_matmul_peak(seconds=0.05)
        assert jax.sharding.get_abstract_mesh() == mesh.abstract_mesh
    assert 1e8 < peak < 1e14
    assert all(matrix.devices() == {jax.local_devices()[0]} for matrix in measured)
