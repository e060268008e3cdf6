"""`meshway bench plan`: plans beside published runs and compiled steps."""

import statistics

import pytest

from meshway.framework.planning.step_cost import COPIES, ERROR, PRODUCTS, StepCost
from meshway.launch import cli
from meshway.launch.bench import plan


def test_a_step_waits_for_activations_and_hides_weights_behind_products() -> None:
    cost = StepCost(1.0, 0.5, ici=2.0, dcn=0.25, latency=0.1, elementwise=0.2, waited=0.5)
    products = 1.0 / PRODUCTS
    assert cost.estimate == pytest.approx(products + 0.2 / COPIES + 0.5 + (2.25 - 0.5 - products) + 0.1)
    hidden = StepCost(3.0, 0.5, ici=2.0, dcn=0.25, latency=0.1, elementwise=0.2, waited=0.5)
    assert hidden.estimate == pytest.approx(3.0 / PRODUCTS + 0.2 / COPIES + 0.5 + 0.1)
    assert hidden.least < hidden.estimate and cost.bound == "ici"


@pytest.mark.slow
def test_the_error_of_an_estimate_is_that_of_the_published_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """What plans say of it, and the docs, is what the command finds."""
    rows = list(plan.times_table())
    ratios = [seconds / each.cost.estimate for _, seconds, each in rows]
    assert len(rows) >= 10 and len({run.source for run, _, _ in rows}) >= 8
    found = (min(ratios), statistics.median(ratios), max(ratios))
    assert tuple(round(each, 2) for each in found) == ERROR
    assert cli.main(["bench", "plan", "--table=flops", "--recipes=gtp2/medium"]) == 2
    assert "'gtp2/medium' is none of" in capsys.readouterr().err


# Meshes in turn, two recipes each: state is counted leaf by leaf, and activations by layer, whichever the recipe.
# `meshway bench plan --table=memory` compiles each for all, a minute each.
IN_TURN = [(recipe, list(plan.meshes_of(recipe))[n % 3]) for n, recipe in enumerate(plan.RECIPES)]


@pytest.mark.proofs
@pytest.mark.parametrize(("recipe", "mesh"), IN_TURN)
def test_the_compiler_s_memory_is_the_plan_s(recipe: str, mesh: str) -> None:
    """State exactly, with XLA:TPU's padding; the rest within a tenth."""
    pytest.importorskip("libtpu")
    (held,) = plan.memory_table([recipe], only=mesh)
    state, rest = held.ratios
    assert (held.recipe, held.mesh, state) == (recipe, mesh, 1)
    assert rest == pytest.approx(1, abs=0.1)
