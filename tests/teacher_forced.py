"""What a tiny program's model makes of given targets: through its cache, under its layout, and at once."""

import jax
import numpy as np

from meshway.launch.testing import TeacherForced


def case(made, prefix=False):
    """Returns rows of random tokens; see `TeacherForced.of`."""
    return TeacherForced.of(made.synthetic_batch(), prefix)


def log_probs_at_once(made, params, case):
    """Returns the log-probability of every token at each target's place, float32 [rows, steps, vocab]."""
    logits = jax.jit(lambda params, batch: made.model.logits(params, batch, None))(params, case.batch)
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), case.places[..., None], axis=1)


def assert_same(made, params, case, wanted):
    """Compares what comes through the cache, under the program's layout, with what comes at once, at every place."""
    with made.partitioner.activate():
        placed = jax.device_put(params, made.state_shardings.params)
        found = case.through_cache(made.model, placed, made.shard_batch(case.prompt))
    assert wanted.std() > 0.1
    np.testing.assert_allclose(found[case.real], wanted[case.real], rtol=0, atol=1e-5)
