"""Scores and vectors of a server: what `meshway infer --mode=score` says, whatever else is in the batch."""

import numpy as np
import pytest
from saved_runs import save_run

from meshway.framework.inference.predictor import Predictor
from meshway.framework.serving.scorer import Scorer
from meshway.framework.telemetry.profiler import Compilations


@pytest.fixture(scope="module", params=["llama", pytest.param("t5_1_1", marks=pytest.mark.slow)])
def scorer(request, tmp_path_factory):
    run = save_run(tmp_path_factory.mktemp(request.param) / "run", request.param)
    predictor = Predictor(run, layout="single", batch_size=2)
    made = Scorer(predictor._session, 32, 16, batch_size=2, max_top_log_probs=4)
    made.warm_up()
    return predictor, made


def test_scores_are_those_of_a_predictor_and_nothing_is_compiled(scorer):
    predictor, made = scorer
    inputs, targets = ["hello", "a", "how now"], ["world", "bcd", "brown cow"]
    text = predictor._session.text
    known, new = [text.read_inputs(each) for each in inputs], [text.read_targets(each) for each in targets]
    with Compilations() as compilations:
        alone = [made.score(*each) for each in zip(known, new)]
        together = made.scored(known, new, top_log_probs=4)
        made.embed(known[0])
    assert compilations.count == 0
    assert [list(each.log_probs) for each in together] == alone
    for found, wanted in zip(together, predictor.score(inputs, targets), strict=True):
        np.testing.assert_allclose(found.log_probs, wanted.token_scores, rtol=1e-4, atol=1e-4)
        for token, log_prob, top in zip(found.tokens, found.log_probs, found.top, strict=True):
            values = [value for _, value in top]
            assert len(top) == 4 and values == sorted(values, reverse=True) and log_prob <= values[0]
            assert dict(top).get(token, log_prob) == log_prob


def test_vectors_are_of_length_one_and_their_own(scorer):
    _, made = scorer
    texts = [[5, 6, 7], [5, 6, 8], [9], list(range(3, 15))]
    vectors = made.embedded(texts)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_array_equal(vector, made.embed(text))
        np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-5)
    assert vectors[0].ndim == 1 and len({vector.tobytes() for vector in vectors}) == 4


def test_what_can_never_be_scored_is_refused(scorer):
    predictor, made = scorer
    assert made.refusal([5], [6]) is None and made.refusal([5]) is None
    assert "there is room for 32" in made.refusal([5], [6] * 40)
    assert "no token" in made.refusal([5], [])
    with pytest.raises(ValueError, match="room for 32"):
        made.score([5], [6] * 40)
