"""What layers say reaches the loss and the metrics, whichever way a stack runs them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshway.models.layers.side_outputs import Reports, add_loss, add_metric, as_loss, capture, sow
from meshway.models.layers.stack import Stack
from meshway.models.module import param


class Saying(nnx.Module):
    """Adds its number to x and says it."""

    def __init__(self, d_model, *, rngs, name):
        self.number = param(jax.random.uniform(rngs.params(), (1,)), ("embed",))
        self.name = name

    def __call__(self, x, *, rng, cache):
        add_metric(self.name, self.number[0])
        add_loss("both", 2 * self.number[0])
        return x + self.number[...], cache


def stack(**options):
    def block(name):
        return lambda d_model, rngs: Saying(d_model, rngs=rngs, name=name)

    return Stack(6, 1, rngs=nnx.Rngs(0), blocks=[block("even"), block("odd")], **options)


@pytest.mark.parametrize("options", [{"scan": True}, {"scan": False}, {"scan": True, "remat": "full"}])
def test_a_stack_says_what_its_layers_say_in_their_order(options):
    made = stack(**options)
    numbers = np.stack([made.block_0.number[...], made.block_1.number[...]], axis=1)[..., 0]

    @jax.jit
    def run(x):
        with capture() as found:
            y, _ = made(x)
        return y, found

    y, found = run(jnp.zeros((1, 1, 1)))
    np.testing.assert_allclose(y[0, 0, 0], numbers.sum(), rtol=1e-6)
    np.testing.assert_array_equal(found.metrics["even"], numbers[:, 0])
    np.testing.assert_array_equal(found.metrics["odd"], numbers[:, 1])
    np.testing.assert_array_equal(found.losses["both"], 2 * numbers.reshape(-1))


def test_losses_are_added_as_sums_and_metrics_come_by_layer():
    reports = Reports({"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray(0.5)}, {"c": jnp.asarray([3.0, 4.0])})
    loss, metrics = as_loss(reports, jnp.asarray(10.0))
    assert float(loss) == 35.0
    means = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    assert means == {"a": 3.0, "b": 0.5, "c/layer_00": 3.0, "c/layer_01": 4.0}


def test_nobody_listening_keeps_nothing_and_names_do_not_clash():
    add_loss("lost", jnp.ones(()))
    with capture() as found:
        with capture() as inner:
            add_metric("x", jnp.ones(()))
        add_metric("x", jnp.zeros(()))
        sow(inner, "inner/")
        with pytest.raises(ValueError, match="'x' twice"):
            sow(inner)
    assert sorted(found.metrics) == ["inner/x", "x"] and not found.losses
