"""Devices arranged as a named mesh."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from meshway.framework.errors import UserError


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of named mesh axes: `ici` within a slice (fast links), `dcn` across slices (slow network).

    An axis in both is the product of its two sizes, slow part outermost. One size of `ici` may be -1: it takes the
    devices that the others leave.
    """

    ici: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
    dcn: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Axis names in order: those that exist only across slices come first."""
        return (*[name for name in self.dcn if name not in self.ici], *self.ici)

    def sizes(self, num_devices: int, kind: str | None = None) -> tuple[dict[str, int], dict[str, int]]:
        """Resolves -1 and returns (ici, dcn) sizes over all `names`; `kind` of device is what errors name.

        Raises:
          UserError: a size is no positive number, two are -1, or the mesh needs more devices than there are.
        """
        dcn = {name: self.dcn.get(name, 1) for name in self.names}
        ici = {name: self.ici.get(name, 1) for name in self.names}
        free = [name for name, size in ici.items() if size == -1]
        wrong = [f"{name}={size}" for name, size in (*ici.items(), *dcn.items()) if size < 1 and size != -1]
        if wrong or len(free) > 1 or -1 in dcn.values():
            raise UserError(
                "MeshShape: sizes must be positive, and one of ici may be -1; "
                f"got ici={dict(self.ici)}, dcn={dict(self.dcn)}"
            )
        fixed = math.prod(size for size in ici.values() if size != -1) * math.prod(dcn.values())
        if fixed > num_devices or (free and num_devices % fixed):
            kind = kind or jax.default_backend()
            simulate = f" or add --simulated_devices={fixed}" if kind == "cpu" else ""
            raise UserError(
                f"the mesh ici={dict(self.ici)} dcn={dict(self.dcn)} needs "
                f"{'a multiple of ' if free else ''}{fixed} devices, and there are {num_devices} ({kind}); "
                f"change MeshShape.ici{simulate}"
            )
        if free:
            ici[free[0]] = num_devices // fixed
        return ici, dcn

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Returns the mesh over `devices` (default all); a smaller mesh takes the first of them.

        Raises:
          UserError: see `sizes`; or a process would own no device of the mesh.
        """
        devices = list(jax.devices() if devices is None else devices)
        ici, dcn = self.sizes(len(devices), devices[0].device_kind)
        used = devices[: math.prod(ici.values()) * math.prod(dcn.values())]
        idle = {d.process_index for d in devices} - {d.process_index for d in used}
        if idle:
            raise UserError(
                f"the mesh ici={ici} dcn={dcn} uses {len(used)} of {len(devices)} devices and leaves processes "
                f"{sorted(idle)} without any; make the sizes' product {len(devices)}, or give one axis -1"
            )
        return Mesh(_arrange(used, tuple(ici.values()), tuple(dcn.values())), self.names)


def _arrange(devices: list[jax.Device], ici: tuple[int, ...], dcn: tuple[int, ...]) -> np.ndarray:
    """Returns the devices in the mesh's order: neighbours along an axis are neighbours in the torus where they can be.

    Raises:
      UserError: the torus has no such parts.
    """
    try:
        return _in_order(devices, ici, dcn)
    except (NotImplementedError, ValueError, AssertionError) as error:  # jax says which axis it could not place
        why = "they are no block of the torus" if isinstance(error, AssertionError) else str(error).splitlines()[0]
        sizes = "x".join(map(str, [slow * fast for slow, fast in zip(dcn, ici, strict=True)]))
        raise UserError(
            f"a mesh of {sizes} does not tile these {len(devices)} {devices[0].device_kind} devices "
            f"({why}): choose sizes that are products of the torus's sides"
        ) from error


def _in_order(devices: list[jax.Device], ici: tuple[int, ...], dcn: tuple[int, ...]) -> np.ndarray:
    if math.prod(dcn) == 1:
        if (count := len({getattr(device, "slice_index", 0) for device in devices})) > 1:
            raise UserError(
                f"the mesh lies on {count} slices: say which of its axes runs across them, as MeshShape.dcn = "
                f"{{'replica': {count}}} in a layout with such an axis (replica_fsdp, replica_fsdp_model)"
            )
        # A size that no sides' product is takes a part of a side.
        return mesh_utils.create_device_mesh(ici, devices, allow_split_physical_axes=True)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    granules = slices if len(slices) > 1 else {device.process_index for device in devices}
    if len(granules) == 1 and devices[0].platform == "cpu":  # simulated devices may play any number of slices
        parts = np.array(devices).reshape(*dcn, *ici)
        order = [axis for pair in zip(range(len(dcn)), range(len(dcn), 2 * len(dcn)), strict=True) for axis in pair]
        return parts.transpose(order).reshape([slow * fast for slow, fast in zip(dcn, ici, strict=True)])
    if math.prod(dcn) != len(granules):
        raise UserError(
            f"MeshShape.dcn has {math.prod(dcn)} parts, but the devices lie on {len(granules)} "
            f"{'slices' if len(slices) > 1 else 'processes'}: the product of dcn must be that number"
        )
    return mesh_utils.create_hybrid_device_mesh(
        ici, dcn, devices, process_is_granule=len(slices) == 1, allow_split_physical_axes=True
    )


def free_memory(device: jax.Device) -> int | None:
    """Returns the bytes that a device has for more than it holds; of a CPU its share of what the machine has free; None
    where nothing tells."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 // len(jax.local_devices(backend="cpu")) if found else None
