"""Planning for devices that nobody has here: described ones, to trace and to place on; libtpu's, to compile for; and
what the compiler says of a step."""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from meshway.framework.errors import UserError, first_line
from meshway.framework.planning.collectives import Collective, read_collectives
from meshway.framework.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class DescribedDevice:
    """What a mesh and a trace ask of a `jax.Device`: nothing can be compiled for it or put on it.

    Attributes:
      coords: of its chip in the torus.
    """

    id: int
    device_kind: str
    platform: str
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0


def described_devices(where: Topology) -> list[Any]:
    """Returns the devices of a topology, as objects that have their attributes."""
    if not where.chip.torus:
        return [DescribedDevice(number, where.kind, "cuda") for number in range(where.num_devices)]
    sides = [ring.size for ring in where.rings]
    sides += [1] * (3 - len(sides))
    places = itertools.product(range(where.slices), *map(range, reversed(sides)), range(where.cores))
    return [
        DescribedDevice(number, where.kind, "tpu", (x, y, z), core, part)
        for number, (part, z, y, x, core) in enumerate(places)
    ]


# What libtpu needs to know of a chip beyond its name: the two cores of a v4 are one device.
_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "TPU v4": {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)},
}
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at a time
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def compiled_for(where: Topology) -> list[jax.Device]:
    """Returns the devices of a topology that XLA can compile for; nothing runs on them.

    Raises:
      UserError: libtpu is not installed, or does not know the topology, or it is of GPUs.
    """
    if not where.chip.torus:
        raise UserError(f"{where.name}: steps are compiled for TPUs alone; add --analytic for closed forms")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for TPUs needs libtpu, of the extra 'plan': pip install 'meshway[plan]'; or add --analytic for "
            "closed forms alone"
        )
    from jax.experimental import topologies

    options = dict(_CONFIGS.get(where.kind, {}))
    sides = [ring.size for ring in where.rings]
    if math.prod(sides) < math.prod(options.get("chips_per_host_bounds", (1,))):
        options["chips_per_host_bounds"] = tuple(sides)
    if where.slices > 1:
        options["num_slices"] = where.slices
    name = f"{where.name.partition(':')[0].lower()}:{'x'.join(map(str, sides))}"
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(name, platform="tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"libtpu knows no topology {name}: {first_line(error)}") from error
    return list(found)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled step, bytes on one device.

    Attributes:
      seconds: that compiling took.
      arguments: state and batch as they lie in memory, padded.
      outputs: results that do not reuse an argument's buffer.
      temporaries: everything that is made and freed within the step: gradients, activations, buffers of collectives.
      code: of the program.
      collectives: what it sends; empty where the program cannot be read.
      unread: why it cannot be, "" where it can.
    """

    seconds: float
    arguments: int
    outputs: int
    temporaries: int
    code: int
    collectives: tuple[Collective, ...]
    unread: str = ""

    @property
    def total(self) -> int:
        """All of them."""
        return self.arguments + self.outputs + self.temporaries + self.code


class TooLarge(UserError):
    """The compiler found no room for a step."""


def compile_step(program: Any) -> CompiledStep:
    """Compiles the step of a `training.program.TrainProgram` for its devices.

    Raises:
      TooLarge: a device's memory does not hold it.
      UserError: the model does not fit the layout, or the compiler refuses an operation.
    """
    start = time.perf_counter()
    try:
        compiled = program.compile_step()
    except jax.errors.JaxRuntimeError as error:
        raise _refusal(error) from error
    seconds = time.perf_counter() - start
    sizes: Any = compiled.memory_analysis()
    unread, text = "", ""
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:  # jaxlib does not print all of what libtpu makes
        unread = first_line(error)
    rows = read_collectives(text, dict(program.partitioner.mesh.shape)) if text else []
    return CompiledStep(
        seconds,
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.generated_code_size_in_bytes,
        tuple(rows),
        unread,
    )


def _refusal(error: jax.errors.JaxRuntimeError) -> UserError:
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text:
        return TooLarge(f"the step does not fit: {first_line(error)}")
    if option := re.search(r"\bxla_\w+", text):
        return UserError(
            f"the compiler refuses the step, by its option {option[0]}: {first_line(error)}; mend "
            "Layout.compiler_options in the layout file"
        )
    operation = re.search(r'op_name="([^"]*)"', text)
    where = f" at {operation[1]}" if operation else ""
    return UserError(
        f"the compiler refuses the step{where}: {first_line(error)}; try a layout whose axes of this operation are "
        "sharded otherwise (powers of two divide best), or another attention kernel"
    )
