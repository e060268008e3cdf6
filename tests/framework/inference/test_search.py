"""Decoding against brute force, on a model whose next token depends on all tokens so far."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import tiers

from meshway.framework.inference import sampling
from meshway.framework.inference.beam_search import BeamSearch
from meshway.framework.inference.decoding import Stop
from meshway.framework.inference.sampling import Sampling

VOCAB, LENGTH, EOS = 4, 5, 1
ROWS = 3
RULES = ("t5x", "transformers")


class Tabular:
    """Logits from a table of random numbers by (row's seed, tokens so far). The cache numbers beginnings."""

    def __init__(self, vocab=VOCAB, length=LENGTH, spread=2.0):
        beginnings = sum(vocab**n for n in range(length))
        self.vocab = vocab
        self.table = spread * np.random.default_rng(0).normal(size=(ROWS, beginnings, vocab)).astype(np.float32)

    def prefill(self, params, batch, max_length):
        seed = jnp.asarray(batch["seed"])
        return (
            jnp.zeros((len(seed), 1), jnp.int32),
            jnp.zeros_like(seed),
            {"seed": seed, "beginning": -jnp.ones_like(seed)},
        )

    def decode(self, params, tokens, positions, cache):
        grown = jnp.where(positions > 0, self.number(cache["beginning"], tokens[:, 0]), 0)
        return jnp.asarray(self.table)[cache["seed"], grown], cache | {"beginning": grown}

    def number(self, beginning, token):
        return beginning * self.vocab + token + 1

    def fork(self, cache, times):
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), cache)

    def reorder(self, cache, chosen):
        rows = jnp.arange(len(chosen))[:, None]
        return jax.tree.map(lambda x: x.reshape(chosen.shape)[rows, chosen].reshape(-1), cache)


MODEL = Tabular()
BATCH = {"seed": np.arange(ROWS, dtype=np.int32)}


def run(how, model=MODEL, batch=BATCH, length=LENGTH, stop=Stop((1,)), ids=None, seed=0, forced=None):
    ids = jnp.arange(len(batch["seed"])) if ids is None else jnp.asarray(ids)
    function = jax.jit(lambda batch, ids, key, forced: how(model, {}, batch, length, stop, ids, key, forced))
    return jax.tree.map(np.asarray, function(batch, ids, jax.random.key(seed), forced))


@pytest.fixture(scope="module")
def tables():
    """For each row, {beginning: log-probabilities of the next token}, of all beginnings without an end."""

    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(MODEL.table)), np.float64)
    found = []
    for seed in range(ROWS):
        table = {}
        for n in range(LENGTH):
            for beginning in itertools.product([0, 2, 3], repeat=n):
                table[beginning] = log_probs[seed, functools.reduce(MODEL.number, beginning, 0)]
        found.append(table)
    return found


def penalty(alpha, n, rules="t5x"):
    return n**alpha if rules == "transformers" else ((5 + n) / 6) ** alpha


def all_ended(table, length, alpha):
    """Every hypothesis that ends within `length`: [(score, tokens)], best first."""
    found = []
    for n in range(length):
        for beginning in itertools.product([0, 2, 3], repeat=n):
            total = sum(table[beginning[:i]][token] for i, token in enumerate(beginning)) + table[beginning][EOS]
            found.append((total / penalty(alpha, n + 1), (*beginning, EOS)))
    return sorted(found, reverse=True)


def beam_by_hand(table, beams, alpha, rules):
    """The search over lists."""
    live, ended, theirs = [(0.0, ())], [], rules == "transformers"
    for n in range(1, LENGTH + 1):
        grown = [(total + table[b][t], (*b, t)) for total, b in live for t in range(VOCAB)]
        grown = sorted(grown, reverse=True)[: 2 * beams]
        ends = [pair[1][-1] == EOS or (theirs and n == LENGTH) for pair in grown]
        may_end = grown[:beams] if theirs else grown
        ended += [(pair[0] / penalty(alpha, n, rules), pair[1]) for pair, end in zip(may_end, ends) if end]
        ended = sorted(ended, reverse=True)[:beams]
        live = [pair for pair, end in zip(grown, ends) if not end][:beams]
        hoped = max((total for total, _ in live), default=-math.inf) / penalty(alpha, n if theirs else LENGTH, rules)
        if len(ended) == beams and hoped < ended[-1][0]:
            break
    return ended


ALPHAS = (0.0, 0.6, 2.0)
QUICK = [
    (1, 0.0, "t5x"),
    (3, 0.6, "t5x"),
    (3, 2.0, "t5x"),
    (16, 0.6, "t5x"),
    (2, 0.6, "transformers"),
    (4, 2.0, "transformers"),
]


# Few, some and many beams with every alpha; the numbers between with alphas in turn, a factor of scores alone.
CASES = [
    (beams, alpha, rules)
    for beams in range(1, 17)
    for alpha in (ALPHAS if beams in (1, 2, 3, 4, 5, 16) else ALPHAS[beams % 3 : beams % 3 + 1])
    for rules in RULES
]
SLOW = [case for case in CASES if case[0] in (1, 2, 3, 5, 16) and case not in QUICK and case[1] != 0.6]


@pytest.mark.parametrize("beams, alpha, rules", tiers(CASES, QUICK, SLOW))
def test_beam_search_is_the_search_over_lists(tables, beams, alpha, rules):
    found, compared = run(BeamSearch(beams, alpha, rules=rules)), 0
    for row, table in enumerate(tables):
        expected = beam_by_hand(table, beams, alpha, rules)
        if not expected:
            continue
        compared += 1
        assert len(expected) == beams or found.scores[row, 0] < -1e6
        for place, (score, tokens) in enumerate(expected):
            decode = beams - 1 - place  # the best is the last
            np.testing.assert_allclose(found.scores[row, decode], score, rtol=1e-5)
            assert tuple(found.tokens[row, decode, : len(tokens)]) == tokens
            assert found.lengths[row, decode] == len(tokens)
            assert not found.tokens[row, decode, len(tokens) :].any()
            total = score * penalty(alpha, len(tokens), rules)
            np.testing.assert_allclose(found.log_probs[row, decode].sum(), total, rtol=1e-4)
    assert compared


COVERS = [
    (3, 18, 0.6),
    *(
        pytest.param(*case, alpha, marks=pytest.mark.slow)
        for case in [(2, 6), (2, 16), (5, 162)]
        for alpha in (0.0, 0.6, 2.0)
    ),
]


@pytest.mark.parametrize("length, beams, alpha", COVERS)
def test_beams_that_cover_all_find_the_best_of_all(tables, length, beams, alpha):
    """Twice 3^(length - 1) beginnings: no continuation of any is left out."""
    found = run(BeamSearch(beams, alpha), length=length)
    for row, table in enumerate(tables):
        best = all_ended(table, length, alpha)[:beams]
        np.testing.assert_allclose(found.scores[row, ::-1][: len(best)], [score for score, _ in best], rtol=1e-5)
        for place, (_, tokens) in enumerate(best):
            assert tuple(found.tokens[row, beams - 1 - place, : len(tokens)]) == tokens


def test_forced_beams_that_cover_find_the_best_that_begins_so(tables):
    forced = np.array([[2, -1, -1, -1], [-1, 3, -1, -1], [0, 2, -1, 1]], np.int32)  # -1 is free
    found = run(BeamSearch(54, 0.6), length=4, forced=forced)
    for row, table in enumerate(tables):
        score, tokens = next(
            (score, tokens)
            for score, tokens in all_ended(table, 4, 0.6)
            if all(want in (-1, token) for want, token in zip(forced[row], (*tokens, 0, 0, 0)))
        )
        np.testing.assert_allclose(found.scores[row, -1], score, rtol=1e-5)
        assert tuple(found.tokens[row, -1, : len(tokens)]) == tokens


@pytest.mark.parametrize("rules", RULES)
def test_beams_of_an_example_do_not_depend_on_its_neighbours(rules):
    how = BeamSearch(3, 1.0, rules=rules)
    alone, together = run(how, batch={"seed": BATCH["seed"][1:2]}), run(how)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])
    np.testing.assert_array_equal(alone.scores[0], together.scores[1])


def test_a_search_in_which_nothing_ends_returns_its_beginnings_with_their_sums(tables):
    found = run(BeamSearch(2), stop=Stop(tokens=(77,)), length=3)
    assert (found.lengths == 3).all()
    np.testing.assert_allclose(found.scores, found.log_probs.sum(-1), rtol=1e-5)
    assert (np.diff(found.scores, axis=1) >= 0).all()


def test_one_beam_without_an_end_is_greedy_search():
    stop = Stop(tokens=(77,))
    greedy, beam = run(Sampling(temperature=0.0), stop=stop), run(BeamSearch(1), stop=stop)
    np.testing.assert_array_equal(greedy.tokens, beam.tokens)
    np.testing.assert_allclose(greedy.scores, beam.scores, rtol=1e-5)


def test_one_beam_is_greedy_search_where_its_prediction_is_likelier_than_not():
    """Then no other can be as likely; where it is not, one beam may leave the greedy path for an earlier end."""
    sure = Tabular()
    index = np.random.default_rng(1).integers(VOCAB, size=sure.table.shape[:2])
    sure.table = sure.table * 0.1 + 5.0 * (np.arange(VOCAB) == index[..., None]).astype(np.float32)
    greedy, beam = run(Sampling(temperature=0.0), sure), run(BeamSearch(1, 0.0), sure)
    assert (greedy.scores > np.log(0.5)).all() and len(np.unique(greedy.lengths)) > 1
    ended = greedy.lengths[:, 0] < LENGTH
    np.testing.assert_array_equal(greedy.tokens[ended], beam.tokens[ended])
    np.testing.assert_allclose(greedy.scores[ended], beam.scores[ended], rtol=1e-5)


def test_greedy_takes_the_likeliest_and_says_how_likely(tables):
    found = run(Sampling(temperature=0.0))
    for row, table in enumerate(tables):
        tokens, log_probs = (), []
        while len(tokens) < LENGTH and EOS not in tokens:
            log_probs.append(table[tokens].max())
            tokens = (*tokens, int(table[tokens].argmax()))
        assert tuple(found.tokens[row, 0, : len(tokens)]) == tokens
        assert found.lengths[row, 0] == len(tokens)
        np.testing.assert_allclose(found.log_probs[row, 0, : len(tokens)], log_probs, rtol=1e-4, atol=1e-6)


WIDE = 8
DRAWS = 100_000
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_drawn_frequencies_match_the_filtered_distribution(name):
    """Chi-square of 100,000 first tokens, each of its own example."""
    settings, model = SETTINGS[name], Tabular(WIDE, length=1, spread=1.0)
    batch = {"seed": np.zeros(DRAWS, np.int32)}
    found = run(Sampling(**settings), model, batch, length=1).tokens[:, 0, 0]
    logits = np.asarray(model.table[0, 0], np.float64) / settings.get("temperature", 1.0)
    assert_drawn_from(filtered(logits, settings), np.bincount(found, minlength=WIDE))


def assert_drawn_from(expected, counts):
    """Chi-square of counts against probabilities, both [outcomes]."""
    assert not counts[expected == 0].any()
    possible, mean = expected > 0, counts.sum() * expected
    chi_square = np.sum((counts - mean)[possible] ** 2 / mean[possible])
    # Far in the tail: mean is degrees of freedom, standard deviation the root of twice that.
    freedom = possible.sum() - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 1


PENALTIES = {"repetition_penalty": 1.7, "presence_penalty": 0.8, "frequency_penalty": 0.6}


@pytest.mark.parametrize(
    "names",
    [tuple(PENALTIES), *(pytest.param((name,), marks=pytest.mark.slow) for name in PENALTIES)],
    ids="-".join,
)
def test_drawn_frequencies_match_the_penalized_distribution(names):
    """Of the token after (2, 2, 3), from a prompt that holds 0, 5 and 3."""
    settings, model = {name: PENALTIES[name] for name in names}, Tabular(WIDE, length=4, spread=1.0)
    batch = {
        "seed": np.zeros(DRAWS, np.int32),
        "decoder_input_tokens": np.tile(np.array([[0, 5, 3, 6]], np.int32), (DRAWS, 1)),
        "decoder_segment_ids": np.tile(np.array([[1, 1, 1, 0]], np.int32), (DRAWS, 1)),  # 6 is padding
    }
    forced = np.tile(np.array([[2, 2, 3]], np.int32), (DRAWS, 1))
    found = run(Sampling(**settings), model, batch, length=4, forced=forced).tokens[:, 0, 3]
    logits = np.asarray(model.table[0, functools.reduce(model.number, (2, 2, 3), 0)], np.float64)
    for token, times in {0: 0, 2: 2, 3: 1, 5: 0}.items():  # 0 is a token like any other
        by = settings.get("repetition_penalty", 1.0)
        logits[token] = logits[token] / by if logits[token] > 0 else logits[token] * by
        if times:
            logits[token] -= settings.get("presence_penalty", 0.0) + times * settings.get("frequency_penalty", 0.0)
    assert_drawn_from(filtered(logits, {}), np.bincount(found, minlength=WIDE))


@pytest.mark.parametrize("settings", [{"temperature": 0.5, "top_k": 3}, {"top_p": 0.7}, {"temperature": 0.0}], ids=str)
def test_rescaled_log_probs_are_those_of_what_is_drawn_from(settings):
    """As T5X's temperature_sample has them: top-k 1 and temperature 0 say 0. The tokens are the same."""
    model, batch = Tabular(WIDE, length=1, spread=1.0), {"seed": np.zeros(50, np.int32)}
    plain = run(Sampling(**settings), model, batch, length=1)
    found = run(Sampling(**settings, rescale_log_probs=True), model, batch, length=1)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    logits, temperature = model.table[0, 0].astype(np.float64), settings.get("temperature", 1.0)
    shares = filtered(logits / temperature, settings) if temperature else np.eye(WIDE)[logits.argmax()]
    for token, log_prob in zip(found.tokens[:, 0, 0], found.log_probs[:, 0, 0], strict=True):
        assert log_prob == pytest.approx(math.log(shares[token]), rel=1e-4, abs=1e-6)
    forced = np.full((50, 1), int(logits.argmin()))
    assert not run(Sampling(**settings, rescale_log_probs=True), model, batch, length=1, forced=forced).scores.any()


@pytest.mark.parametrize("decodes", [pytest.param(1, marks=pytest.mark.slow), 1000])
def test_whole_predictions_are_drawn_as_likely_as_they_are(tables, decodes):
    """Of 100,000 examples, or of 1000 decodes of each of 100: every token is drawn anew, and no draw is of two."""
    length, batch = 3, {"seed": np.zeros(DRAWS // decodes, np.int32)}
    found = run(Sampling(num_decodes=decodes), batch=batch, length=length).tokens.reshape(DRAWS, length)
    expected = np.zeros((VOCAB,) * length)
    for beginning in itertools.product([0, 2, 3], repeat=length):
        expected[beginning] = math.exp(sum(tables[0][beginning[:n]][token] for n, token in enumerate(beginning)))
    for score, tokens in all_ended(tables[0], length, 0.0):
        expected[(*tokens, 0, 0)[:length]] = math.exp(score)
    assert_drawn_from(
        expected.reshape(-1), np.bincount(found @ VOCAB ** np.arange(length)[::-1], minlength=expected.size)
    )


def filtered(logits, settings):
    """The definition, by sets."""
    order = np.argsort(-logits)
    keep = list(order[: settings.get("top_k") or len(order)])
    for name in ("top_p", "min_p"):
        p = np.exp(logits[keep]) / np.exp(logits[keep]).sum()
        if name == "top_p" and name in settings:
            keep = keep[: int(np.searchsorted(np.cumsum(p), settings[name])) + 1]
        elif name in settings:
            keep = [token for token, share in zip(keep, p, strict=True) if share >= settings[name] * p.max()]
    expected = np.zeros(len(logits))
    expected[keep] = np.exp(logits[keep]) / np.exp(logits[keep]).sum()
    return expected


def test_what_is_drawn_depends_on_the_example_and_not_on_its_neighbours():
    how = Sampling(num_decodes=3)
    found = run(how, ids=[5, 6, 7])
    turned = run(how, batch={"seed": BATCH["seed"][::-1]}, ids=[7, 6, 5])
    np.testing.assert_array_equal(found.tokens, turned.tokens[::-1])
    alone = run(how, batch={"seed": BATCH["seed"][1:2]}, ids=[6])
    np.testing.assert_array_equal(found.tokens[1], alone.tokens[0])
    assert len({tuple(tokens) for tokens in found.tokens[0]}) > 1
    assert (run(how, ids=[5, 6, 7], seed=1).tokens != found.tokens).any()


def test_penalties_are_those_of_the_papers():
    logits = jnp.array([[2.0, -1.0, 0.5, 0.0]])
    generated, prompted = jnp.array([[2, 0, 1, 0]]), jnp.array([[False, True, False, False]])
    found = sampling.penalize(logits, generated, prompted, repetition=2.0, presence=0.1, frequency=0.01)
    np.testing.assert_allclose(found, [[2 / 2 - 0.1 - 0.02, -1 * 2, 0.5 / 2 - 0.1 - 0.01, 0.0]], rtol=1e-6)


def test_presence_penalty_keeps_tokens_apart():
    found = run(Sampling(temperature=0.0, presence_penalty=100.0), length=VOCAB, stop=Stop(tokens=(77,)))
    assert all(sorted(row[0]) == list(range(VOCAB)) for row in found.tokens)


def test_stop_sequences_end_a_prediction():
    free = run(Sampling(temperature=0.0), stop=Stop(tokens=(77,)))
    sequence = tuple(int(token) for token in free.tokens[0, 0, 1:3])
    found = run(Sampling(temperature=0.0), stop=Stop(tokens=(), sequences=[sequence, (9,) * 20]))
    for before, after, length in zip(free.tokens[:, 0], found.tokens[:, 0], found.lengths[:, 0], strict=True):
        ends = [i + 2 for i in range(LENGTH - 1) if tuple(before[i : i + 2]) == sequence]
        assert length == (ends[0] if ends else LENGTH)
        np.testing.assert_array_equal(after[:length], before[:length])


@pytest.mark.parametrize("how", [Sampling(temperature=0.0, num_decodes=2), BeamSearch(2)])
def test_forced_tokens_come_first(how):
    forced = jnp.array([[2, 3], [0, -1], [-1, -1]], jnp.int32)
    found, free = run(how, forced=forced), run(how)
    assert (found.tokens[0, :, :2] == [2, 3]).all()
    assert (free.tokens[1, :, 0] != 0).any() and (found.tokens[1, :, 0] == 0).all()  # id 0 is a token like any other
    np.testing.assert_array_equal(found.tokens[2], free.tokens[2])


@pytest.mark.parametrize("how", [Sampling(temperature=0.0, callbacks=[lambda x, progress: x.at[:, 2].set(-jnp.inf)]),
                                 BeamSearch(2, callbacks=[lambda x, progress: x.at[:, 2].set(-jnp.inf)])])  # fmt: skip
def test_callbacks_change_logits(how):
    assert not (run(how).tokens == 2).any()


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 1}, {"top_k": -1}, {"num_decodes": 0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)


@pytest.mark.parametrize("settings", [{"num_beams": 0}, {"alpha": -0.1}, {"rules": "t5"}])
def test_settings_of_beams_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        BeamSearch(**settings)
