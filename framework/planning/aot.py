"""Planning for devices that nobody has here: described ones, to trace and to place on; those of XLA's compilers for
TPUs and GPUs, and simulated ones, to compile for; and what a compiler says of a program."""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from meshway.framework.errors import UserError, first_line
from meshway.framework.partitioning.partitioner import Partitioner
from meshway.framework.planning.collectives import Collective, read_collectives
from meshway.framework.planning.topology import Chip, Topology


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
        platform = {"gpu": "cuda"}.get(
            where.platform, where.platform
        )  # which of two makers' is told by a real one's client
        return [DescribedDevice(number, where.kind, platform) for number in range(where.num_devices)]
    sides = [ring.size for ring in where.rings]
    sides += [1] * (3 - len(sides))
    places = itertools.product(range(where.slices), *map(range, reversed(sides)), range(where.chip.cores))
    return [
        DescribedDevice(number, where.kind, "tpu", (x, y, z), core, part)
        for number, (part, z, y, x, core) in enumerate(places)
    ]


def compiled_for(where: Topology) -> list[jax.Device]:
    """Returns the devices of a topology that XLA can compile for; nothing runs on those of TPUs and GPUs.

    Raises:
      UserError: the compiler for them is not installed, or does not know the topology.
    """
    makers = {"tpu": _tpu_devices, "gpu": _gpu_devices, "cpu": _cpu_devices}
    return list(makers[where.platform](where))


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


def _tpu_devices(where: Topology) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for TPUs needs libtpu, of the extra 'plan': pip install 'meshway[plan]'; or add --analytic for "
            "closed forms alone"
        )
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
        return topologies.get_topology_desc(name, platform="tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"libtpu knows no topology {name}: {first_line(error)}") from error


@dataclasses.dataclass(frozen=True)
class _Multiprocessors:
    """What XLA:GPU asks of a GPU beyond `topology.Chip`, as its programming guide or data sheet has it.

    Attributes:
      capability: CUDA's compute capability.
      count: streaming multiprocessors, each of so many float32 `lanes`.
      shared_kib: memory of one, of which a block may have a KiB less.
      l2_mib: of the cache.
      gigahertz: boost clock.
    """

    capability: tuple[int, int]
    count: int
    lanes: int
    shared_kib: int
    l2_mib: int
    gigahertz: float


_HOPPER = _Multiprocessors((9, 0), 132, 128, 228, 50, 1.98)
_GPUS: Mapping[str, _Multiprocessors] = {
    "NVIDIA A100-SXM4-80GB": _Multiprocessors((8, 0), 108, 64, 164, 40, 1.41),
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA H200": _HOPPER,
    "NVIDIA B200": _Multiprocessors((10, 0), 148, 128, 228, 126, 1.965),
}
_MACHINE = 8  # GPUs, at most


def _gpu_devices(where: Topology) -> Sequence[jax.Device]:
    found = [name for name in ("xla_cuda13", "xla_cuda12") if _is_plugged(name)]
    if not found:
        raise UserError(
            "compiling for GPUs needs XLA's plugin for them, of the extra 'plan-gpu' (no GPU, no driver): "
            "pip install 'meshway[plan-gpu]'; or add --analytic for closed forms alone"
        )
    count = where.num_devices
    machine = max(size for size in range(1, _MACHINE + 1) if count % size == 0)
    shape, target = f"1 x {count // machine} x {machine}", _target_config(where.kind, where.chip)
    try:
        return topologies.get_topology_desc("", platform="cuda", topology=shape, target_config=target).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"XLA's plugin for GPUs does not describe {where.name}: {first_line(error)}") from error


def _is_plugged(name: str) -> bool:
    try:
        return importlib.util.find_spec(f"jax_plugins.{name}") is not None
    except ModuleNotFoundError:  # no plugin at all
        return False


def _target_config(kind: str, chip: Chip) -> str:
    """Returns what XLA compiles for, as the text of its GpuTargetConfigProto."""
    gpu = _GPUS[kind]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "registers_per_block_limit": 65536,
        "registers_per_core_limit": 65536,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_block_optin": (gpu.shared_kib - 1) * 1024,
        "shared_memory_per_core": gpu.shared_kib * 1024,
        "core_count": gpu.count,
        "fpus_per_core": gpu.lanes,
        "l2_cache_size": gpu.l2_mib * 2**20,
        "clock_rate_ghz": gpu.gigahertz,
        "memory_bandwidth": int(chip.memory_bandwidth),
        "device_memory_size": chip.memory_bytes,
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    major, minor = gpu.capability
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" runtime_version {{ major: 13 }} dnn_version_info {{ major: 9 minor: 12 }} '
        f'device_description_str: "{kind}"'
    )


def _cpu_devices(where: Topology) -> Sequence[jax.Device]:
    with contextlib.suppress(RuntimeError):  # JAX has begun: those that it has must do
        jax.config.update("jax_num_cpu_devices", where.num_devices)
    there = jax.devices("cpu")
    if len(there) < where.num_devices:
        raise UserError(f"{where.name}: this process has begun with {len(there)} simulated devices")
    return there[: where.num_devices]


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A compiled program, bytes on one device.

    Attributes:
      seconds: that compiling took.
      arguments: as they lie in memory, padded; of a step state and batch.
      outputs: results that do not reuse an argument's buffer.
      temporaries: everything that is made and freed within the program: gradients, activations, buffers of collectives.
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
    """The compiler found no room for a program."""


class Recorder:
    """Compiles what a partitioner lowers (`Partitioner.compiling_by`), and reads what the compiler made of it.

    Attributes:
      programs: in the order in which they were compiled.
    """

    def __init__(self, mesh: Mapping[str, int], platform: str, what: str):
        """`mesh` has the sizes of its axes, `platform` is its devices'; `what` is the program in words, for errors."""
        self.programs: list[CompiledProgram] = []
        self._mesh, self._platform, self._what = mesh, platform, what

    def __call__(self, lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> jax.stages.Compiled:
        """Raises as `compile_programs`; the partitioner tells of options that the compiler does not know."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                printing = _printing(self._platform, Path(folder))
                compiled = lowered.compile(compiler_options={**options, **printing} or None)
            except jax.errors.JaxRuntimeError as error:
                if "compile option" in str(error):
                    raise
                raise refusal(error, self._what) from error
            seconds = time.perf_counter() - start
            text, unread = _text(compiled, Path(folder))
        sizes: Any = compiled.memory_analysis()
        self.programs.append(
            CompiledProgram(
                seconds,
                sizes.argument_size_in_bytes,
                sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
                sizes.temp_size_in_bytes,
                sizes.generated_code_size_in_bytes,
                tuple(read_collectives(text, self._mesh)) if text else (),
                unread,
            )
        )
        return compiled


def compile_programs(
    partitioner: Partitioner, compiles: Callable[[], object], what: str = "the step"
) -> list[CompiledProgram]:
    """Compiles programs for their devices, and reads what the compiler made of them.

    Args:
      partitioner: by which they are compiled.
      compiles: does so.
      what: they in words, for errors.

    Raises:
      TooLarge: a device's memory does not hold one.
      UserError: the model does not fit the layout, or the compiler refuses an operation.
    """
    mesh = partitioner.mesh
    recorder = Recorder(dict(mesh.shape), mesh.devices.flat[0].platform, what)
    with partitioner.compiling_by(recorder):
        try:
            compiles()
        except NotImplementedError as error:  # jax has no words for an operation on this platform
            raise UserError(f"{what} cannot be lowered: {first_line(error)}; compute that otherwise") from error
    return recorder.programs


_PRINTING = ("tpu",)


def _printing(platform: str, folder: Path) -> dict[str, Any]:
    """Returns options that make libtpu print what it compiles: jaxlib reads back only what is in its own version of
    HLO."""
    if platform not in _PRINTING:
        return {}
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def _text(compiled: jax.stages.Compiled, folder: Path) -> tuple[str, str]:
    """Returns the HLO of a program, as printed, else as read back; and why there is none, "" where there is."""
    printed = sorted(folder.glob("*.after_optimizations.txt"))
    if len(printed) == 1:
        return printed[0].read_text(encoding="utf-8", errors="replace"), ""
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        return "", first_line(error)
    return text, "" if text else "the compiler returns none"


def refusal(error: jax.errors.JaxRuntimeError, what: str) -> UserError:
    """Returns what a compiler's refusal means: which operation, and what to try."""
    text = str(error)
    if "space=vmem" in text:  # which says nothing of a device's memory
        kernel = re.search(r":: ([\w.-]+)\s*$", text)
        at = f" at the kernel {kernel[1]}" if kernel else ""
        return UserError(
            f"the compiler refuses {what}{at}, whose blocks do not fit into a core's vector memory: "
            f"{first_line(error)}; give it smaller blocks (SplashAttention.block), or take another attention kernel "
            "(ATTENTION_KERNEL) or a layout that shards its heads or lengths further"
        )
    if "RESOURCE_EXHAUSTED" in text:
        return TooLarge(f"{what} does not fit: {first_line(error)}")
    if option := re.search(r"\bxla_\w+", text):
        return UserError(
            f"the compiler refuses {what}, by its option {option[0]}: {first_line(error)}; mend "
            "Layout.compiler_options in the layout file"
        )
    operation = re.search(r'op_name="([^"]*)"', text)
    where = f" at {operation[1]}" if operation else ""
    return UserError(
        f"the compiler refuses {what}{where}: {first_line(error)}; try a layout whose axes of this operation are "
        "sharded otherwise (powers of two divide best), or another attention kernel"
    )
