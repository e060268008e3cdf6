"""meshway bench plan: what plans of training say, beside what the compiler makes of the same steps, and others' runs.

    meshway bench plan --table=times     # published step times, beside closed forms; nothing is compiled
    meshway bench plan --table=memory    # recipes on three meshes, compiled by XLA:TPU: minutes each
    meshway bench plan --table=flops     # two layers of each recipe, unrolled on one chip

Recipes, meshes and published runs are those below; docs/planning.md has the tables.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence

import jax

from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.planning import aot
from meshway.framework.planning.memory import Memory, step_memory
from meshway.framework.planning.train_plan import TrainPlan
from meshway.framework.terminal import format_bytes, format_columns
from meshway.launch.invocation import Invocation
from meshway.launch.train_plan import Planner, format_seconds, planner_of
from meshway.launch.verb_flags import PlanFlags


@dataclasses.dataclass(frozen=True)
class Step:
    """A recipe's step: a shipped model, trained by AdamW in bfloat16.

    Attributes:
      bindings: what else is bound.
    """

    model: str
    lengths: dict[str, int]
    batch: int
    bindings: tuple[str, ...] = ()

    def on(self, topology: str, *bindings: str) -> Planner:
        """Returns what plans it for chips, with more bindings."""
        bound = (
            f"TASK_FEATURE_LENGTHS={self.lengths}",
            f"BATCH_SIZE={self.batch}",
            "DTYPE='bfloat16'",
            *self.bindings,
            *bindings,
        )
        files = (f"models/{self.model}.gin", "optimizers/adamw.gin")
        return planner_of(Invocation("plan", gin_files=files, bindings=bound, options=PlanFlags(topology)))


# Of different kinds, sizes for 16 chips; of the larger ones few layers, as a loop compiles once.
RECIPES = {
    "t5_1_1/base": Step("t5_1_1/base", {"inputs": 512, "targets": 128}, 64),
    "llama/3_2_1b": Step("llama/3_2_1b", {"targets": 2048}, 32),
    "gpt2/medium": Step("gpt2/medium", {"targets": 1024}, 64, ("VOCAB_SIZE=50304",)),
    "palm/8b": Step("palm/8b", {"targets": 2048}, 32, ("NUM_LAYERS=8",)),
    "mixtral/8x7b": Step("mixtral/8x7b", {"targets": 2048}, 32, ("NUM_LAYERS=8",)),
    "bert/base": Step("bert/base", {"targets": 512}, 64),
}
CHIPS = "v5p:2x2x4"
MESHES = {
    "fsdp": ("LAYOUT='fsdp'",),
    "fsdp_model": ("LAYOUT='fsdp_model'",),
    "model_1d": ("LAYOUT='model_1d'",),
}
OF_EXPERTS = {"fsdp_expert": ("LAYOUT='fsdp_expert'",)}  # in place of model_1d: the state of a mixture is large


@dataclasses.dataclass(frozen=True)
class Published:
    """A run that others timed.

    Attributes:
      seconds: of a step; 0 where the utilisation is published.
      mfu: with attention's scores in full.
      source: file of a public repository, or a paper.
    """

    name: str
    step: Step
    topology: str
    source: str
    seconds: float = 0.0
    mfu: float = 0.0


def _kept(how: str, *names: str) -> str:
    return f"REMAT={dict.fromkeys(names, how)}"


_QKV = ("query_proj", "key_proj", "value_proj")
_OFFLOADED = _kept("offload", "layer_input", "out_proj", *_QKV)
_AXLEARN = _kept("device", "out_proj", "attention_out", *_QKV)
_FSDP = "LAYOUT='fsdp'"
_TRILLIUM, _V5P = "tpu-recipes, training/trillium/", "tpu-recipes, training/v5p/"
_FUJI = "axlearn, experiments/text/gpt/fuji.py"


def _replicas(replica: int, fsdp: int, across: int = 1) -> tuple[str, ...]:
    dcn = {"replica": across} if across > 1 else {}
    return (
        "LAYOUT='replica_fsdp'",
        f"mesh.MeshShape.ici={{'replica': {replica}, 'fsdp': {fsdp}}}",
        f"mesh.MeshShape.dcn={dcn}",
    )


PUBLISHED = (
    Published(
        "PaLM 540B, 2 x 3,072 v4",
        Step(
            "palm/540b",
            {"targets": 2048},
            2048,
            (
                "VOCAB_SIZE=256032",  # that 12 chips share
                "LAYOUT='replica_fsdp_model'",
                "mesh.MeshShape.ici={'fsdp': 256, 'model': 12}",
                "mesh.MeshShape.dcn={'replica': 2}",
                "REMAT='full'",
            ),
        ),
        "v4:12x16x16x2slices",
        "Chowdhery et al. 2022, arXiv:2204.02311, table 3",
        mfu=0.462,
    ),
    Published(
        "Llama 7B, 512 v4",
        Step("llama/2_7b", {"targets": 2048}, 2048, (*_replicas(32, 16), _AXLEARN)),
        "v4:8x8x8",
        _FUJI,
        3.03,
    ),
    Published(
        "Llama 7B, 256 v5p",
        Step("llama/2_7b", {"targets": 2048}, 2048, (*_replicas(32, 8), _AXLEARN)),
        "v5p:8x8x4",
        _FUJI,
        2.85,
    ),
    Published(
        "Llama 2 7B, 4 x 256 v5e",
        Step("llama/2_7b", {"targets": 4096}, 1024, (*_replicas(1, 256, 4), "REMAT='dots'")),
        "v5e:16x16x4slices",
        _FUJI,
        2.21,
    ),
    Published(
        "Llama 3.1 405B, 512 v5p",
        Step("llama/3_1_405b", {"targets": 8192}, 1024, (_FSDP, "REMAT='full'")),
        "v5p:8x8x8",
        f"{_V5P}Llama3.1-405B-MaxText",
        131.474,
    ),
    Published(
        "Mistral 7B, 8 v6e",
        Step("mistral/7b_v0_1", {"targets": 8192}, 48, (_FSDP, _OFFLOADED)),
        "v6e:2x4",
        f"{_TRILLIUM}Mistral-7B-MaxText",
        6.320,
    ),
    Published(
        "Llama 3.1 8B, 256 v6e",
        Step("llama/3_1_8b", {"targets": 8192}, 1024, (_FSDP, _OFFLOADED)),
        "v6e:16x16",
        f"{_TRILLIUM}Llama3.1-8B-MaxText/v6e-256",
        4.546,
    ),
    Published(
        "Llama 2 70B, 256 v6e",
        Step("llama/2_70b", {"targets": 4096}, 512, (_FSDP, _kept("offload", *_QKV))),
        "v6e:16x16",
        f"{_TRILLIUM}Llama2-70B-MaxText",
        9.052,
    ),
    Published(
        "Llama 3.1 70B, 256 v6e",
        Step("llama/3_1_70b", {"targets": 8192}, 1280, (_FSDP, _kept("offload", "layer_input", *_QKV))),
        "v6e:16x16",
        f"{_TRILLIUM}Llama3.1-70B-MaxText/v6e-256",
        42.656,
    ),
    Published(
        "Mixtral 8x7B, 256 v6e",
        Step("mixtral/8x7b", {"targets": 4096}, 3072, (_FSDP, _OFFLOADED, "DISPATCH='all_to_all'")),
        "v6e:16x16",
        f"{_TRILLIUM}Mixtral-8x7B-MaxText",
        13.484,
    ),
    Published(
        "Llama 2 7B, 8 H100",
        Step("llama/2_7b", {"targets": 4096}, 16, (_FSDP, "REMAT='minimal'")),
        "h100:8",
        "JAX-Toolbox, docs/frameworks/maxtext/README.md",
        0.721,
    ),
)


@dataclasses.dataclass(frozen=True)
class Held:
    """The memory of a device in a step, planned and as compiled.

    Attributes:
      arguments: state and batch as they lie in memory.
      temporaries: all else, gradients too.
    """

    recipe: str
    mesh: str
    planned: Memory
    arguments: int
    temporaries: int

    @property
    def ratios(self) -> tuple[float, float]:
        """Planned by compiled: of arguments, of the rest."""
        planned = self.planned
        rest = planned.gradients + planned.activations
        return (planned.total - rest) / self.arguments, rest / self.temporaries


def meshes_of(recipe: str) -> dict[str, tuple[str, ...]]:
    """Returns the meshes that a recipe is compiled for, by name, and what each binds."""
    third = OF_EXPERTS if "mixtral" in recipe else {"model_1d": MESHES["model_1d"]}
    return {"fsdp": MESHES["fsdp"], "fsdp_model": MESHES["fsdp_model"], **third}


def memory_table(recipes: Sequence[str], only: str | None = None) -> Iterator[Held]:
    """Yields a row for each recipe and mesh, or the one mesh named `only`, as it is compiled.

    Raises:
      UserError: libtpu is missing, or the compiler refuses a step.
    """
    for recipe in recipes:
        for mesh, bindings in meshes_of(recipe).items():
            if only not in (None, mesh):
                continue
            planner = RECIPES[recipe].on(CHIPS, *bindings)
            program = planner.program((), aot.compiled_for(planner.where))
            (compiled,) = aot.compile_programs(program.partitioner, program.compile_step)
            yield Held(recipe, mesh, step_memory(program), compiled.arguments, compiled.temporaries)


def flops_table(recipes: Sequence[str]) -> Iterator[tuple[str, float, float]]:
    """Yields (recipe, FLOPs of a step that a plan counts, and that XLA does), unrolled: XLA counts a loop once.

    XLA counts elementwise operations too, and no kernel's: attention is the reference's.

    Raises:
      UserError: as `memory_table`.
    """
    for recipe in recipes:
        layers = ("NUM_ENCODER_LAYERS=2", "NUM_DECODER_LAYERS=2") if "t5" in recipe else ("NUM_LAYERS=2",)
        plain = ("LAYOUT='single'", "SCAN=False", "ATTENTION_KERNEL=@reference.dot_product_attention")
        planner = dataclasses.replace(RECIPES[recipe], batch=2).on("v5p:1x1x1", *layers, *plain)
        program = planner.program((), aot.compiled_for(planner.where)[:1])
        counted = program.compile_step().cost_analysis() or {}
        yield recipe, float(program.flops), float(counted["flops"])


def times_table() -> Iterator[tuple[Published, float, TrainPlan]]:
    """Yields (run, its published seconds, its plan)."""
    for run in PUBLISHED:
        plan = run.step.on(run.topology).traced()
        yield run, run.seconds or plan.flops.model / (plan.peak * run.mfu), plan


def _print_memory(recipes: Sequence[str]) -> None:
    _print_row("recipe", "mesh", "parameters", "optimizer", "gradients", "padded", "XLA", "rest", "XLA", "off by")
    for held in memory_table(recipes):
        planned = held.planned
        rest = planned.gradients + planned.activations
        sizes = (planned.parameters, planned.optimizer, planned.gradients, planned.total - rest, held.arguments)
        texts = [format_bytes(size) for size in (*sizes, rest, held.temporaries)]
        _print_row(held.recipe, held.mesh, *texts, f"{held.ratios[1] - 1:+.1%}")


def _print_flops(recipes: Sequence[str]) -> None:
    _print_row("recipe", "", "planned", "XLA", "off by")
    for recipe, planned, counted in flops_table(recipes):
        _print_row(recipe, "", f"{planned:.4g}", f"{counted:.4g}", f"{planned / counted - 1:+.1%}")


def _print_row(recipe: str, mesh: str, *cells: str) -> None:
    """Prints a row as soon as it is known: each takes minutes."""
    print(f"{recipe:14}{mesh:12}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def _print_times(_: Sequence[str]) -> None:
    rows: list[tuple[str, ...]] = [
        ("run", "published", "estimated", "ratio", "side by side", "one after the other", "source")
    ]
    ratios = []
    for run, seconds, plan in times_table():
        cost = plan.cost
        ratios.append(seconds / cost.estimate)
        figures = (seconds, cost.estimate, ratios[-1], cost.least, cost.most)
        texts = [f"{each:.2f}" if each is ratios[-1] else format_seconds(each) for each in figures]
        rows.append((run.name, *texts, run.source))
    print("\n".join(format_columns(rows, right=(1, 2, 3, 4, 5))))
    ends = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"published / estimated: {statistics.median(ratios):.2f} in the middle, {ends} in all {len(ratios)}")


TABLES: dict[str, Callable[[Sequence[str]], None]] = {
    "times": _print_times,
    "memory": _print_memory,
    "flops": _print_flops,
}


def run(invocation: Invocation) -> None:
    """Runs `meshway bench plan`."""
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: accelerators stay free
    options = invocation.options
    named = [name for name in (options.recipes or "").split(",") if name] or list(RECIPES)
    for name in named:
        if name not in RECIPES:
            raise UserError(f"--recipes: {name!r} is none of {', '.join(RECIPES)}{did_you_mean(name, RECIPES) or ''}")
    if options.recipes and options.table == "times":
        raise UserError("--recipes: published runs are compared all together; leave it out, or --table=times")
    for table in [options.table] if options.table else list(TABLES):
        TABLES[table](named)
