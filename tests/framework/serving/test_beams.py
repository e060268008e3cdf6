"""Beam searches that come and go in a pool find what each finds alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiers import tiers
from tiny import program

from meshway.framework.data.vocabularies import Opaque
from meshway.framework.errors import UserError
from meshway.framework.inference.beam_search import BeamSearch, best_first
from meshway.framework.inference.predictor import Session
from meshway.framework.inference.rows import RowFormat, Text
from meshway.framework.serving.beams import BeamPool
from meshway.framework.serving.generation import Generation
from meshway.framework.telemetry.profiler import Compilations

SLOTS, BEAMS, NEW, PROMPT = 3, 4, 6, 20
ENDS = tuple(range(1, 24))  # so many that predictions end early
FAMILIES = {"lm": ("NUM_KV_HEADS=2", "WINDOW=3"), "t5_1_1": ()}


def session(family, layout="single", *bindings):
    made = program(family, *FAMILIES.get(family, ()), *bindings, layout=layout)
    sharded = made.sharded.by_layer()
    ids = Opaque("ids", 256)
    start = (0,) if family == "t5_1_1" else ()
    params = jax.tree.map(lambda leaf: leaf * 2.0, made.init().params)  # logits that differ well
    text, row_format = Text(ids, ids, start, ENDS), RowFormat.of(made.model, start)
    return Session(sharded, sharded.split(params), text, row_format, None, 0)


@functools.cache
def opened(family, layout="single"):
    """(a session, a warm pool)"""
    one = session(family, layout)
    pool = BeamPool(one, SLOTS if layout == "single" else 4, BEAMS, NEW, PROMPT)
    pool.warm_up()
    return one, pool


@functools.cache
def engine(family, num_beams, alpha):
    return opened(family)[0].engine(BeamSearch(num_beams, alpha), 1)


def alone(family, generation):
    """[(tokens, log-probabilities, score)] of `BeamSearch` for one request, the best first."""
    one, solo = opened(family)[0], engine(family, generation.num_beams, generation.alpha)
    length = one.row_format.room(PROMPT, NEW, False)["inputs"]
    begun = [generation.forced] if generation.forced else ()
    found = solo.predict([generation.prompt], [0], length, generation.max_tokens, begun)
    found = jax.tree.map(lambda x: np.asarray(x)[0], found)
    return [
        (found.tokens[n, :count].tolist(), found.log_probs[n, :count], found.scores[n])
        for n in best_first(found.scores)
        for count in [found.lengths[n]]
    ]


def drive(pool, requests, rng, drop=0.0):
    """Runs requests as they come, in random slots, one step ahead, as a scheduler does; returns hypotheses by request,
    None of those that were freed before they were over."""
    waiting, slots, found, before = list(range(len(requests))), {}, {}, None
    for _ in range(2000):
        if not waiting and not slots:
            return found
        free = [slot for slot in range(pool.num_slots) if slot not in slots]
        rng.shuffle(free)
        for slot in free[: rng.integers(0, len(free) + 1)]:
            if waiting:
                slots[slot] = waiting.pop(0)
                pool.start(slot, requests[slots[slot]])
                assert pool.prefill(slot)
        step = pool.step()
        made = {} if before is None else pool.read(before)
        for slot, each in made.items():
            assert not each.tokens and not each.log_probs
            if each.hypotheses is not None:
                found[slots.pop(slot)] = each.hypotheses
                pool.free(slot)
            elif rng.random() < drop:
                found[slots.pop(slot)] = None
                pool.free(slot)
        before = step
    raise AssertionError("the pool does not come to an end")


def random_request(rng, **fields):
    forced = tuple(rng.integers(30, 250, rng.integers(1, 3)).tolist()) if rng.random() < 0.2 else ()
    asked = {
        "prompt": tuple(rng.integers(30, 250, rng.integers(1, PROMPT + 1)).tolist()),
        "max_tokens": int(rng.integers(1, NEW + 1)),
        "num_beams": int(rng.integers(1, BEAMS + 1)),
        "alpha": float(rng.choice([0.0, 0.6, 2.3])),
        "forced": forced,
    }
    return Generation(**asked | fields)


def assert_same(found, wanted, atol=2e-5):
    """Programs of other shapes sum in another order; the logits of doubled parameters are some tens."""
    assert [list(each.tokens) for each in found] == [tokens for tokens, _, _ in wanted]
    for each, (_, log_probs, score) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(each.log_probs, log_probs, rtol=1e-5, atol=atol)
        np.testing.assert_allclose(each.score, score, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("family", tiers(FAMILIES, quick=["lm"], slow=["t5_1_1"]))
def test_searches_that_come_and_go_find_what_each_finds_alone(family):
    _, pool = opened(family)
    rng = np.random.default_rng(0)
    sizes = {2: PROMPT, 4: 7}  # of prompts, by beams; two programs each
    requests = [
        random_request(
            rng, max_tokens=NEW, num_beams=beams, prompt=tuple(rng.integers(30, 250, size).tolist()), forced=()
        )
        for _ in range(3)
        for beams, size in sizes.items()
    ]
    requests = [dataclasses.replace(each, alpha=0.6) for each in requests]
    wanted = [alone(family, each) for each in requests]
    many = requests * 4
    with Compilations() as compilations:
        found = drive(pool, many, rng, drop=0.05)
    assert compilations.count == 0
    over = {number: each for number, each in found.items() if each is not None}
    assert len(found) == len(many) and len(over) > len(requests)
    for number, each in over.items():
        assert_same(each, wanted[number % len(requests)])
    assert len({len(each.tokens) for hypotheses in over.values() for each in hypotheses}) > 2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_any_beams_penalties_lengths_and_beginnings_are_those_alone(family):
    _, pool = opened(family)
    rng = np.random.default_rng(1)
    searches = [(1, 0.0, NEW), (2, 2.3, NEW - 2), (3, 0.6, 1), (4, 0.6, NEW)]
    requests = [
        random_request(rng, num_beams=beams, alpha=alpha, max_tokens=length)
        for _ in range(10)
        for beams, alpha, length in searches
    ]
    found = drive(pool, requests, rng)
    for number, request in enumerate(requests):
        assert_same(found[number], alone(family, request))


@pytest.mark.parametrize("family", ["lm", pytest.param("t5_1_1", marks=pytest.mark.slow)])
def test_a_search_is_bit_for_bit_the_same_in_any_company_and_slot(family):
    _, pool = opened(family)
    rng = np.random.default_rng(2)
    request = random_request(rng, max_tokens=NEW, num_beams=3)
    lonely = drive(pool, [request], rng)[0]
    found = drive(pool, [each for _ in range(8) for each in (request, random_request(rng))], rng, drop=0.05)
    again = [found[number] for number in range(0, 16, 2) if found[number] is not None]
    assert len(again) > 4 and all(each == lonely for each in again)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["data", "fsdp_model", "model_sequence"])
def test_on_a_mesh_searches_find_what_they_find_on_one_device(family, layout):
    rng = np.random.default_rng(3)
    one = session(family, layout)
    rows = one.sharded.partitioner.mesh.size
    pool = BeamPool(one, rows, BEAMS, NEW, PROMPT)
    pool.warm_up()
    requests = [random_request(rng, num_beams=int(rng.integers(2, 4)), alpha=0.6, max_tokens=NEW) for _ in range(6)]
    with Compilations() as compilations:
        found = drive(pool, requests, rng)
    assert compilations.count == 0
    for number, request in enumerate(requests):
        assert_same(found[number], alone(family, request))


def test_the_cache_of_a_pool_stays_where_it_is():
    _, pool = opened("lm")

    def pointers(searches):
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(searches.cache)]

    memory = pointers(pool._searches)
    pool.start(1, Generation((40, 41, 42), NEW, num_beams=2))
    pool.prefill(1)
    for _ in range(3):
        pool.read(pool.step())
        assert pointers(pool._searches) == memory
    pool.free(1)
    assert pool.step() is None


REFUSED = [
    ({"prompt": (9,) * (PROMPT + 1)}, "the prompt has 21 tokens, and a beam search has room for 1 to 20"),
    ({"prompt": ()}, "the prompt has 0 tokens"),
    ({"max_tokens": NEW + 1}, "7 tokens are asked for, and a beam search makes 1 to 6"),
    ({"num_beams": BEAMS + 1}, "5 beams are asked for, and a search has 1 to 4"),
    ({"alpha": -0.1}, "must be 0 or more, not -0.1"),
    ({"alpha": float("nan")}, "must be 0 or more, not nan"),
    ({"top_p": 0.9, "temperature": 0.3}, "cannot honour top_p, temperature"),
    ({"logit_bias": {3: 1.0}}, "cannot honour logit_bias"),
    ({"top_log_probs": 1}, "does not tell the likeliest"),
    ({"grammar": object()}, "cannot follow a grammar"),
]


@pytest.mark.parametrize("fields, message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_a_pool_cannot_serve_is_refused(fields, message):
    _, pool = opened("lm")
    plain = Generation((40, 41), NEW, num_beams=2)
    assert pool.refusal(plain) is None and pool.refusal(dataclasses.replace(plain, temperature=0.0)) is None
    assert message in pool.refusal(dataclasses.replace(plain, **fields))


def test_a_pool_that_cannot_be_is_refused():
    one = opened("lm")[0]
    with pytest.raises(UserError, match="max_beams must be at least 1, not 0"):
        BeamPool(one, SLOTS, 0, NEW, PROMPT)
    with pytest.raises(UserError, match="beams: 300 are more than the 256 tokens"):
        BeamPool(one, SLOTS, 300, NEW, PROMPT)
    positions = session("gpt2", "single", "NUM_POSITIONS=8")
    with pytest.raises(UserError, match="are longer than the 8 positions"):
        BeamPool(positions, SLOTS, 2, NEW, PROMPT).warm_up()
