"""Tokens of converted models against transformers' `generate`: greedy, penalized, and four beams.

`tests/goldens/make_generations.py` made what is expected, in prompts of nine tokens to one, and chose ends so that
predictions are of many lengths.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from converted import model_of, params_of

from meshway.framework.inference.beam_search import BeamSearch
from meshway.framework.inference.decoding import Stop
from meshway.framework.inference.sampling import Sampling
from meshway.launch.convert import convert

FOLDER = Path(__file__).parents[2] / "goldens" / "hugging_face"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/generated.npz"))
DECODERS = {
    "greedy": Sampling(temperature=0.0),
    "penalized": Sampling(temperature=0.0, repetition_penalty=1.5),
    **{f"beams_{alpha}": BeamSearch(4, alpha, rules="transformers") for alpha in (0, 1, 2)},
}


def aligned(tokens, mask):
    """Moves what `generate` wants at the right end of a row to its left end, where a prefill reads it."""
    order = np.argsort(1 - mask, axis=1, kind="stable")
    return np.take_along_axis(tokens, order, axis=1), np.take_along_axis(mask, order, axis=1)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """name -> (what transformers made, what a decoder makes of the converted model)."""

    @functools.cache
    def of(name):
        run = tmp_path_factory.mktemp(name) / "run"
        convert(str(FOLDER / name), str(run))
        expected, model = dict(np.load(FOLDER / name / "generated.npz")), model_of(run)
        params, side = params_of(run, model), "encoder" if name.startswith("t5") else "decoder"
        tokens, mask = aligned(expected["input_ids"], expected["attention_mask"])
        batch = {f"{side}_input_tokens": tokens, f"{side}_segment_ids": mask}
        ids, key = np.arange(len(tokens)), jax.random.key(0)
        stop = Stop((int(expected["end"]),))

        @functools.partial(jax.jit, static_argnums=0)
        def decode(decoder, params, batch):
            return decoder(model, params, batch, expected["greedy"].shape[1], stop, ids, key)

        return expected, lambda decoder: decode(decoder, params, batch)

    return of


QUICK = [("t5_1_1", "beams_1"), ("llama3", "greedy")]
CASES = [
    pytest.param(name, how, marks=() if (name, how) in QUICK else pytest.mark.slow)
    for name in NAMES
    for how in DECODERS
]


@pytest.mark.parametrize("name, how", CASES)
def test_tokens_are_those_of_generate(generated, name, how):
    expected, decode = generated(name)
    found = decode(DECODERS[how])
    if how.startswith("beams"):  # the best comes last here, and first there
        np.testing.assert_array_equal(found.tokens[:, ::-1], expected[how])
        np.testing.assert_allclose(found.scores[:, ::-1], expected[how.replace("beams", "scores")], rtol=1e-4)
    else:
        np.testing.assert_array_equal(found.tokens[:, 0], expected[how])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rules_of_t5x_find_other_beams(generated, name):
    expected, decode = generated(name)
    assert (decode(BeamSearch(4, 1.0)).tokens[:, ::-1] != expected["beams_1"]).any()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_expected_tells(name):
    """Predictions are of many lengths and tokens, and are not the same ones for every decoder."""
    expected = np.load(FOLDER / name / "generated.npz")
    assert sorted(set(expected["attention_mask"].sum(axis=1))) == [1, 2, 4, 6, 8, 9]
    for how in ("greedy", "beams_0", "beams_1"):
        lengths = np.count_nonzero(expected[how], axis=-1)
        assert len(np.unique(lengths)) > 2 and len(np.unique(expected[how])) > 10, how
    best = [expected[how] for how in ("greedy", "penalized")] + [expected[f"beams_{n}"][:, 0] for n in (0, 1)]
    assert all((one != other).any() for i, one in enumerate(best) for other in best[:i])
