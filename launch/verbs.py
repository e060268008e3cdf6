"""The verbs of the command line. Light: `--help` must be quick."""

import dataclasses
from collections.abc import Mapping

from meshway.launch.bench_flags import (
    BenchAcceleratorFlags,
    BenchDataFlags,
    BenchDecodeFlags,
    BenchParallelFlags,
    BenchPlanFlags,
    BenchRoutingFlags,
    BenchServeFlags,
    BenchTrainFlags,
)
from meshway.launch.invocation import MACROS
from meshway.launch.verb_flags import (
    CacheFlags,
    ConvertFlags,
    EvalFlags,
    ExportFlags,
    InferFlags,
    InspectDataFlags,
    InspectLayoutFlags,
    NoFlags,
    PlanFlags,
    ServeFlags,
    StatusFlags,
    TrainFlags,
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a verb may act on, as `data` in `meshway bench data`; `recipe` is whether it takes one, and devices."""

    help: str
    flags: type = NoFlags
    recipe: bool = True


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb: its module's `run(invocation)` does the work, and is imported only then."""

    module: str
    help: str
    flags: type = NoFlags
    subjects: Mapping[str, Subject] = dataclasses.field(default_factory=dict)
    default: str = ""  # the subject where none is given
    is_room: bool = False  # whether `module` is a folder, with a module for each subject
    instead: str = ""  # the flag that serves where no recipe is given
    recipe: bool = True  # whether it takes one at all
    on_devices: bool = True
    slow: bool = True  # whether it takes seconds to start, and shows what it is doing
    keeps_programs: bool = False  # whether what it compiles is kept for its next start; benchmarks compile anew
    macros: tuple[str, ...] = tuple(MACROS)  # those that the help lists

    def flags_for(self, subject: str | None) -> type:
        """Returns the dataclass of the flags that this verb has with a subject."""
        return self.subjects[subject].flags if subject and self.subjects else self.flags

    def takes_recipe(self, subject: str | None) -> bool:
        """Returns whether it takes a recipe, with a subject if it has any."""
        return self.recipe and (not subject or not self.subjects or self.subjects[subject].recipe)

    def takes_devices(self, subject: str | None) -> bool:
        """Returns whether it has flags of devices and processes."""
        return self.on_devices and (not self.is_room or self.takes_recipe(subject))


VERBS = {
    "train": Verb(
        "meshway.launch.train",
        "train a recipe, or go on from its last checkpoint",
        flags=TrainFlags,
        keeps_programs=True,
    ),
    "eval": Verb(
        "meshway.launch.evaluate",
        "evaluate checkpoints of a run: one, several, or each as it appears",
        flags=EvalFlags,
        keeps_programs=True,
        instead="--model_dir",
        macros=("MODEL_DIR", "MIXTURE_OR_TASK_NAME", "TASK_FEATURE_LENGTHS", "BATCH_SIZE", "CACHE_DIR", "LAYOUT"),
    ),
    "infer": Verb(
        "meshway.launch.infer",
        "predict or score an input with a run's checkpoint; killed and run again, it goes on",
        flags=InferFlags,
        keeps_programs=True,
        instead="--model_dir",
        macros=("MODEL_DIR", "MIXTURE_OR_TASK_NAME", "TASK_FEATURE_LENGTHS", "CACHE_DIR", "LAYOUT"),
    ),
    "export": Verb(
        "meshway.launch.export",
        "write predict and score of a run's checkpoint as StableHLO programs, which run without meshway",
        flags=ExportFlags,
        keeps_programs=True,
        instead="--model_dir",
        macros=("MODEL_DIR", "TASK_FEATURE_LENGTHS", "LAYOUT"),
    ),
    "serve": Verb(
        "meshway.launch.serve",
        "serve a run's checkpoint over HTTP, as OpenAI's clients speak it",
        flags=ServeFlags,
        keeps_programs=True,
        instead="--model_dir",
        macros=("MODEL_DIR", "TASK_FEATURE_LENGTHS", "LAYOUT"),
    ),
    "status": Verb(
        "meshway.launch.status",
        "show the state of a run: who runs it, steps reported and saved, rate, time left, last evaluation",
        flags=StatusFlags,
        recipe=False,
        on_devices=False,
        slow=False,
        macros=(),
    ),
    "plan": Verb(
        "meshway.launch.plan",
        "say what training costs on chips that are not here: memory, time, what is sent; or inference, by each layout",
        flags=PlanFlags,
        on_devices=False,
        macros=("TASK_FEATURE_LENGTHS", "BATCH_SIZE", "LAYOUT"),
    ),
    "inspect": Verb(
        "meshway.launch.inspection",
        "print every tensor: axes, sharding, bytes a device, and the rule; or what the data is like",
        subjects={
            "layout": Subject("print every tensor: axes, sharding, bytes a device, and the rule", InspectLayoutFlags),
            "data": Subject(
                "show examples as the model sees them, their lengths, density and mixture shares", InspectDataFlags
            ),
        },
        default="layout",
    ),
    "cache": Verb(
        "meshway.launch.cache",
        "prepare the tasks of a recipe, or --task, once and keep them",
        flags=CacheFlags,
        instead="--task",
        on_devices=False,
        macros=("MIXTURE_OR_TASK_NAME", "MIXTURE_OR_TASK_MODULE", "CACHE_DIR"),
    ),
    "convert": Verb(
        "meshway.launch.convert",
        "take a Hugging Face, T5X or Mesh-TensorFlow model in, with its recipe, or write a run as one of the first two",
        flags=ConvertFlags,
        recipe=False,
        on_devices=False,
        macros=(),
    ),
    "bench": Verb(
        "meshway.launch.bench",
        "time a recipe's step on synthetic data, or its data path; or count what layouts make devices send",
        subjects={
            "train": Subject(
                "time a recipe's step on synthetic data, beside the machine's matmul peak", BenchTrainFlags
            ),
            "data": Subject("time how examples become batches, stage by stage, beside seqio", BenchDataFlags),
            "parallel": Subject("count what each layout makes devices send, beside the least", BenchParallelFlags),
            "routing": Subject("compare who gets the experts' room, by accuracy", BenchRoutingFlags),
            "moe": Subject("time a mixture of experts in each form of dispatch, in turn"),
            "attention": Subject("time attention by each of several kernels, at several lengths, in turn"),
            "plan": Subject("compare plans with compiled steps and with published runs", BenchPlanFlags, recipe=False),
            "decode": Subject("time what a token costs, beside how fast memory is read", BenchDecodeFlags),
            "accelerator": Subject(
                "check kernels and layouts on a GPU or TPU; measure start-up, MFU and decoding",
                BenchAcceleratorFlags,
            ),
            "serve": Subject("load a running server, and measure what its users see", BenchServeFlags, recipe=False),
        },
        is_room=True,
    ),
    "launch": Verb(
        "meshway.launch.cluster.launch",
        "run a command on many processes, here or on a cluster",
        on_devices=False,
        slow=False,
    ),
}


def module_of(verb: str, subject: str | None) -> str:
    """Returns the name of the module whose `run` does a command's work."""
    entry = VERBS[verb]
    return f"{entry.module}.{subject}" if entry.is_room else entry.module
