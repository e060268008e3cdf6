"""meshway bench routing: what it costs a mixture of experts to have room for few tokens, by who gets it.

    meshway bench routing --gin_file=v_moe_digits
    meshway bench routing --gin_file=v_moe_digits --seeds=8 --gin.bench.routing.Routing.ratios='(0.5, 0.1)'

A recipe with the macros PRIORITY and EVAL_CAPACITY_FACTOR is trained from several seeds with each priority, and each
result is evaluated with both: tokens in order, and Batch Priority Routing (Riquelme et al. 2021, section 4). Seeds are
those of the initial parameters; batches and noise are the same for all, so that columns differ by routing alone.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from meshway.framework.distributed import processes
from meshway.framework.errors import UserError
from meshway.framework.evaluation.evaluation import Evaluation, Evaluator
from meshway.framework.evaluation.schedule import evaluated
from meshway.framework.terminal import format_columns
from meshway.launch.bench.rounds import require_at_least

if TYPE_CHECKING:
    from meshway.framework.data.source import DataSource
    from meshway.framework.training.program import TrainProgram
    from meshway.framework.training.step import TrainState
    from meshway.launch.invocation import Invocation

PRIORITIES = {"order": "in order", "score": "by priority"}


@dataclasses.dataclass(frozen=True)
class Routing:
    """What is compared; a recipe binds it.

    Attributes:
      program: model, optimizer and layout, of one variant.
      data: what it is trained and evaluated on.
      steps: of training.
      seeds: how many initial parameters to train from.
      ratios: capacity factors at inference.
      trained: priorities in training.
    """

    program: "TrainProgram"
    data: "DataSource"
    steps: int
    seeds: int = 4
    ratios: Sequence[float] = (0.5, 0.25, 0.15)
    trained: Sequence[str] = tuple(PRIORITIES)

    def __post_init__(self) -> None:
        require_at_least(1, "bench.routing.Routing", steps=self.steps, seeds=self.seeds)
        unknown = [name for name in self.trained if name not in PRIORITIES]
        if unknown or not self.trained or not self.ratios:
            raise UserError(
                f"bench.routing.Routing needs ratios, and in `trained` some of {list(PRIORITIES)}; not {unknown}"
            )


@dataclasses.dataclass(frozen=True)
class Variant:
    """One cell of the table: how it was trained and is evaluated."""

    trained: str
    evaluated: str
    ratio: float


Accuracies = dict[Variant, list[float]]  # in per cent, one a seed


def compare(invocation: "Invocation") -> Accuracies:
    """Trains, evaluates and prints the table.

    Raises:
      UserError: the recipe is wrong, or its tasks have no accuracy.
    """
    settings = _settings(invocation)
    evaluators = {}
    for priority in PRIORITIES:
        for ratio in settings.ratios:
            chosen = _settings(invocation, PRIORITY=priority, EVAL_CAPACITY_FACTOR=ratio)
            tasks = chosen.data.eval_tasks()
            evaluators[priority, ratio] = Evaluator(
                chosen.program.sharded,
                tasks,
                Evaluation(max_predictions=0),
            )
    found: Accuracies = {}
    for trained in settings.trained:
        chosen = _settings(invocation, PRIORITY=trained)
        step = chosen.program.compile_step()
        for seed in range(settings.seeds):
            params = _train(chosen, step, seed).params
            for (priority, ratio), evaluator in evaluators.items():
                found.setdefault(Variant(trained, priority, ratio), []).append(_accuracy(evaluator, params))
            print(f"trained {PRIORITIES[trained]}, seed {seed}: done", flush=True)
    print(f"\n{format_table(found)}")
    return found


def format_table(found: Accuracies) -> str:
    """Returns mean accuracies over seeds, a line for each ratio and way of training."""
    seeds = len(next(iter(found.values())))
    cells = [("trained", "room", *PRIORITIES.values(), "gain", "least gain of a seed")]
    for trained, ratio in dict.fromkeys((variant.trained, variant.ratio) for variant in found):
        vanilla, priority = (found[Variant(trained, name, ratio)] for name in PRIORITIES)
        gains = [better - plain for plain, better in zip(vanilla, priority, strict=True)]
        means = [f"{statistics.mean(values):.1f} %" for values in (vanilla, priority)]
        gain = (f"{statistics.mean(gains):+.1f}", f"{min(gains):+.1f}")
        cells.append((PRIORITIES[trained], f"{ratio:g}", *means, *gain))
    return "\n".join([f"accuracy on the validation split, mean of {seeds} seeds", *format_columns(cells)])


def _settings(invocation: "Invocation", **macros: Any) -> Routing:
    """Returns the recipe with some macros bound on top of the command line's."""
    from meshway.launch.recipe import config

    bindings = (*invocation.bindings, *[f"{name}={value!r}" for name, value in macros.items()])
    return Routing(**config.load(dataclasses.replace(invocation, bindings=bindings)).build("bench.routing.Routing"))


def _train(settings: Routing, step: Any, seed: int) -> "TrainState":
    program = settings.program
    state = program.init()
    init = program.partitioner.compile(
        program.model.init,
        jax.random.key(seed),
        in_shardings=program.partitioner.replicated,
        out_shardings=program.state_shardings.params,
    )
    state = dataclasses.replace(state, params=init(jax.random.key(seed)))
    batches = settings.data.train(program.partitioner.process_rows(program.batch_size))
    for _ in range(settings.steps):
        state, _ = step(state, program.shard_batch(next(batches)))
    return state


def _accuracy(evaluator: Evaluator, params: Any) -> float:
    scalars, reports = evaluated(evaluator, params)
    names = [f"validation/{task}/accuracy" for task in reports]
    if not names or not set(names) <= set(scalars):
        raise UserError("bench routing compares accuracies, and this recipe's tasks have none on a validation split")
    return 100 * statistics.mean(scalars[name] for name in names)


def run(invocation: "Invocation") -> None:
    """Runs `meshway bench routing`."""
    with processes.joined(*invocation.processes):
        compare(invocation)
