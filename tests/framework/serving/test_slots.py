"""Slots: what a request gets is what it gets alone, and what `meshway infer` draws by the same numbers."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from bigram_table import sharded
from saved_runs import save_run
from tiers import tiers

from meshway.framework.errors import UserError
from meshway.framework.inference.predictor import Predictor, Session
from meshway.framework.inference.rows import RowFormat
from meshway.framework.inference.sampling import Sampling
from meshway.framework.serving.generation import Generation
from meshway.framework.serving.slots import KeptPrompts, Lookup, SlotPool
from meshway.framework.telemetry.profiler import Compilations

SLOTS, LENGTH, INPUTS, CHUNK, VOCAB = 4, 40, 24, 8, 384
MODELS = {  # family, layout, bindings of the recipe and of the layout
    "llama": ("mistral", "single", ("WINDOW = 5",), ()),  # grouped heads, and layers that see a window
    "t5": ("t5_1_1", "single", (), ()),
    "llama-model": ("mistral", "model_1d", ("WINDOW = 5",), ("mesh.MeshShape.ici={'data': 2, 'model': 2}",)),
    "t5-model": ("t5_1_1", "model_1d", (), ("mesh.MeshShape.ici={'data': 1, 'model': 4}",)),
    "llama-int8": ("llama", "single", ("attention.Attention.cache_dtype = 'int8'",), ()),
    "prefix": ("lm", "single", ("objectives.DecoderOnly.prefix = True",), ()),
}


def opened(tmp_path_factory, name, **options):
    family, layout, recipe, bindings = MODELS[name]
    run = save_run(tmp_path_factory.mktemp(name) / "run", family, *recipe)
    return Predictor(run, layout=layout, bindings=bindings, batch_size=2, **options)


@pytest.fixture(scope="module", params=tiers(MODELS, ("llama", "t5"), ("llama-model", "t5-model", "prefix")))
def served(request, tmp_path_factory):
    """A predictor that samples, and a pool over its model, ready."""
    how = {"decoder": Sampling(temperature=0.8, top_k=50, top_p=0.95), "max_new_tokens": 12, "seed": 5}
    predictor = opened(tmp_path_factory, request.param, **how)
    pool = SlotPool(predictor._session, SLOTS, LENGTH, INPUTS, CHUNK, max_top_log_probs=3)
    pool.warm_up()
    return predictor, pool


class EveryThird:
    """A grammar: each token is, modulo 3, one more than the token before it."""

    def __init__(self):
        self.last = 0

    def matcher(self):
        return EveryThird()

    def mask(self):
        return np.arange(VOCAB) % 3 == (self.last + 1) % 3

    def accept(self, token):
        assert self.mask()[token]
        self.last = token
        return False


def requests(count, seed, longest=22):
    """Random requests, of all kinds."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        ids = rng.integers(0, VOCAB, 3).tolist()
        kinds = [
            {"temperature": 0.0},
            {"temperature": 0.0, "repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2},
            {"temperature": float(rng.uniform(0.3, 1.5))},
            {"temperature": 0.9, "top_k": int(rng.integers(1, 30)), "top_p": float(rng.uniform(0.4, 1.0))},
            {"min_p": 0.05, "logit_bias": {ids[0]: 5.0, ids[1]: -100.0}, "top_log_probs": 3},
            {"temperature": 0.7, "grammar": EveryThird(), "forced": ()},
            {"temperature": 0.0, "forced": tuple(ids), "top_log_probs": 2},
        ]
        prompt = tuple(rng.integers(3, VOCAB, int(rng.integers(1, longest))).tolist())
        numbers = {"seed": int(rng.integers(2**40)), "decode": int(rng.integers(3))}
        yield Generation(prompt, int(rng.integers(1, 13)), **kinds[rng.integers(len(kinds))], **numbers)


def record(found, made):
    for tokens, log_probs, top in zip(made.tokens, made.log_probs, made.top, strict=True):
        found.append((tokens, log_probs, tuple(top)))


def alone(pool, generation, slot=0):
    """What a request gets with no neighbour, each step read before the next."""
    pool.start(slot, generation)
    while not pool.prefill(slot):
        pass
    found = []
    while len(found) < generation.max_tokens:
        record(found, pool.read(pool.step())[slot])
    assert len(found) == generation.max_tokens
    assert pool.step() is None
    pool.free(slot)
    return found


def together(pool, generations, rng, frees=0.0):
    """What requests get that come and go at random, read one step late; of those that are freed early, a part."""
    waiting, slots, reading, found, before = list(enumerate(generations)), {}, [], {}, None
    while waiting or slots:
        for slot in rng.permutation([each for each in range(pool.num_slots) if each not in slots]).tolist():
            if waiting and rng.random() < 0.5:
                index, generation = waiting.pop(0)
                pool.start(slot, generation)
                slots[slot], found[index] = (index, generation), []
                reading.append(slot)
        if reading:
            slot = reading.pop(0)
            if not pool.prefill(slot):
                reading.append(slot)
        step = pool.step()
        for slot, made in ({} if before is None else pool.read(before)).items():
            record(found[slots[slot][0]], made)
        before = step
        for slot, (index, generation) in list(slots.items()):
            if len(found[index]) == generation.max_tokens or rng.random() < frees:
                pool.free(slot)
                slots.pop(slot)
                reading = [each for each in reading if each != slot]
    return [found[index] for index in range(len(generations))]


def test_a_request_gets_what_it_gets_alone(served):
    """Tokens, log-probabilities and the likeliest, bit for bit: in any slot, whoever comes and goes beside it."""
    _, pool = served
    asked = list(requests(40, seed=1))
    rng = np.random.default_rng(2)
    with Compilations() as compilations:
        wanted = [alone(pool, each, slot=int(rng.integers(SLOTS))) for each in asked]
        assert together(pool, asked, rng) == wanted
        for found, whole in zip(together(pool, asked, rng, frees=0.1), wanted, strict=True):
            assert found == whole[: len(found)]
    assert compilations.count == 0
    assert all(len(each) == generation.max_tokens for each, generation in zip(wanted, asked, strict=True))


def test_what_begins_alike_is_read_once_and_changes_nothing(served):
    _, pool = served
    if pool._arrays.buckets is not None:
        pytest.skip("prompts that are read in one piece share nothing")
    rng = np.random.default_rng(3)
    begun = [tuple(rng.integers(3, VOCAB, 20).tolist()) for _ in range(3)]
    asked = [
        dataclasses.replace(each, prompt=begun[index % 3][:keep] + each.prompt)
        for index, (each, keep) in enumerate(zip(requests(30, seed=4, longest=7), [20, 16, 9, 15, 8, 3] * 5))
    ]
    pool._kept, wanted = KeptPrompts(CHUNK, 0), []
    for each in asked:
        wanted.append(alone(pool, each))
    pool._kept, pool.prefix_hits, pool.reused_tokens = KeptPrompts(CHUNK, 4), 0, 0
    assert together(pool, asked, rng) == wanted
    assert pool.prefix_hits > 10 and pool.reused_tokens >= CHUNK * pool.prefix_hits


def test_prompts_used_last_are_kept():
    kept = KeptPrompts(2, 2)
    for name, prompt in {"a": [1, 2, 3, 4, 5], "b": [1, 2, 9, 9], "c": [7, 7]}.items():
        assert kept.wants(prompt)
        kept.keep(prompt, name)
    assert kept.find([1, 2, 3, 4]) == (2, "b") and kept.find([7]) == (0, None)  # "a" went, used longest ago
    assert not kept.wants([1, 2, 9, 9, 5]) and not kept.wants([1]) and kept.wants([1, 2, 9, 9, 5, 6])
    kept.keep([7, 7, 7, 8], "d")  # goes on from "c"
    assert kept.find([7, 7, 7, 8, 9]) == (4, "d") and kept.find([1, 2, 9, 9]) == (4, "b")


def test_it_is_what_infer_draws(served):
    predictor, pool = served
    texts = ["hello world", "x", "how now", "to be"]
    how = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 5}
    read = predictor._session.text.read_inputs
    found = together(pool, [Generation(tuple(read(text)), 12, **how) for text in texts], np.random.default_rng(0))
    for text, made in zip(texts, found, strict=True):
        (wanted,) = predictor.predict([text], ids=[0])
        made = made[: len(wanted.tokens)]
        assert [token for token, *_ in made] == wanted.tokens
        np.testing.assert_allclose([log_prob for _, log_prob, _ in made], wanted.token_scores, atol=2e-4)


def test_the_likeliest_are_in_order_and_the_greedy_choice_is_first(served):
    _, pool = served
    for token, log_prob, top in alone(pool, Generation((7, 8, 9), 6, temperature=0.0, top_log_probs=3)):
        assert top[0] == (token, log_prob) and len(top) == 3
        assert sorted((each for _, each in top), reverse=True) == [each for _, each in top]


def test_forced_tokens_come_first_and_a_grammar_is_kept(served):
    _, pool = served
    forced = alone(pool, Generation((7, 8), 5, temperature=0.0, forced=(11, 12)))
    assert [token for token, *_ in forced[:2]] == [11, 12]
    kept = [token for token, *_ in alone(pool, Generation((7, 8), 9, grammar=EveryThird(), seed=3))]
    assert [token % 3 for token in kept] == [1, 2, 0] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_guesses_change_nothing_but_the_number_of_steps(name, tmp_path_factory):
    session = opened(tmp_path_factory, name)._session
    plain, guessing = (SlotPool(session, SLOTS, LENGTH, INPUTS, CHUNK, 3, guesses=guesses) for guesses in (0, 3))
    plain.warm_up()
    guessing.warm_up()
    again = tuple([11, 12, 13, 14] * 5)
    repeats = [Generation(again, 12, temperature=0.0, forced=again[: 3 * n], seed=n) for n in range(4)]
    asked, rng = [*requests(48, seed=6), *repeats], np.random.default_rng(7)
    wanted = [alone(plain, each) for each in asked]
    with Compilations() as compilations:
        by_one = [alone(guessing, each, slot=int(rng.integers(SLOTS))) for each in asked]
        assert together(guessing, asked, rng) == by_one
    assert compilations.count == 0
    for found, other in zip(by_one, wanted, strict=True):
        assert [token for token, *_ in found] == [token for token, *_ in other]
        np.testing.assert_allclose([each for _, each, _ in found], [each for _, each, _ in other], atol=2e-4)
    guessing.start(0, repeats[3])
    while not guessing.prefill(0):
        pass
    made = [guessing.read(guessing.step())[0].tokens for _ in range(3)]
    assert [len(each) for each in made[:2]] == [4, 4] and sum(made, [])[:9] == list(again[:9])
    guessing.free(0)


def test_a_lookup_goes_on_as_the_text_did():
    lookup = Lookup([1, 2, 3, 4, 5, 2, 3])
    assert lookup.guess(2) == [4, 5] and lookup.guess(9) == [4, 5, 2, 3]
    lookup.add([9, 1, 2, 3])
    assert lookup.guess(3) == [4, 5, 2]  # by three tokens, rather than by the last two of them
    lookup.add([8])
    assert lookup.guess(3) == []


class Breaks(EveryThird):
    """A grammar that can be followed for two tokens."""

    def matcher(self):
        return Breaks()

    def mask(self):
        if self.last % 3 == 2:
            raise UserError("the grammar became too complex")
        return super().mask()


def test_a_grammar_that_breaks_ends_its_own_request_alone(served):
    _, pool = served
    neighbour = Generation((5, 6, 7), 8, seed=2)
    wanted, found, ended = alone(pool, neighbour), [], None
    for slot, generation in enumerate([neighbour, Generation((7, 8), 8, grammar=Breaks())]):
        pool.start(slot, generation)
        while not pool.prefill(slot):
            pass
    while len(found) < 8:
        made = pool.read(pool.step())
        record(found, made[0])
        if 1 in made and made[1].error:
            ended = made[1].error
            pool.free(1)
    pool.free(0)
    assert found == wanted and "too complex" in ended


def test_the_cache_is_changed_in_place(served):
    _, pool = served

    def places():
        leaves = jax.tree.leaves(pool._arrays._cache)
        return [[shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards] for leaf in leaves]

    before, held = places(), pool._arrays._cache
    own = sum(shard.data.nbytes for leaf in jax.tree.leaves(held) for shard in leaf.addressable_shards[:1])
    memory = pool._arrays.memory()
    assert memory.alias_size_in_bytes >= own and memory.temp_size_in_bytes < 2 * own
    alone(pool, Generation(tuple(range(3, 20)), 3), slot=2)
    assert places() == before
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(held))


def table_session(data=1):
    model = sharded(data)
    params = jax.jit(model.model.init, out_shardings=model.param_shardings)(jax.random.key(3))
    params = jax.tree.map(lambda leaf: 2 * leaf, params)
    text = SimpleNamespace(stop=(), stops=())
    return Session(model, params, text, RowFormat.of(model.model), Path(), 0)


@pytest.mark.parametrize("data", tiers([1, 2], quick=[1], slow=[2]))
def test_slots_draw_what_sampling_draws(data):
    """By random numbers, of a model that reads prompts in one piece and knows nothing of slots."""
    session, rng = table_session(data), np.random.default_rng(data)
    pool = SlotPool(session, SLOTS, 24, chunk=CHUNK)
    pool.warm_up()
    for _ in range(5):
        some = rng.random(6) < 0.5
        how = {
            "temperature": float(rng.choice([0.0, rng.uniform(0.2, 2.0)], p=[0.2, 0.8])),
            "top_k": int(some[0] * rng.integers(1, 14)),
            "top_p": float(rng.uniform(0.3, 1.0)) if some[1] else 1.0,
            "min_p": float(some[2] * rng.uniform(0.0, 0.5)),
            "repetition_penalty": float(rng.uniform(0.7, 2.0)) if some[3] else 1.0,
            "presence_penalty": float(some[4] * rng.uniform(-1, 1)),
            "frequency_penalty": float(some[5] * rng.uniform(-1, 1)),
        }
        seed, prompt = int(rng.integers(2**31)), rng.integers(0, 12, 5).tolist()
        engine = session.engine(Sampling(**how, num_decodes=2), 2, seed)
        wanted = engine.predict([prompt], [0], 8, 10)
        asked = [Generation(tuple(prompt), 10, **how, seed=seed, decode=decode) for decode in range(2)]
        for decode, made in enumerate(together(pool, asked, rng)):
            assert [token for token, *_ in made] == np.asarray(wanted.tokens)[0, decode].tolist(), how
            log_probs = np.asarray(wanted.log_probs)[0, decode]
            np.testing.assert_allclose([log_prob for _, log_prob, _ in made], log_probs, atol=1e-5)


def test_what_can_never_be_served_is_refused():
    pool = SlotPool(table_session(), SLOTS, 24, max_top_log_probs=5)
    fits = Generation((2,) * 20, 4)
    assert pool.refusal(fits) is None
    for problem, words in [
        ({"max_tokens": 5}, "21 tokens to begin with and 5 new ones need 25 places, and a slot has 24"),
        ({"prompt": (2,) * 40}, "the prompt has 41 tokens, and there is room for 23"),
        ({"num_beams": 2}, "num_beams must be 1"),
        ({"top_log_probs": 6}, "at most 5 of the likeliest"),
        ({"logit_bias": {12: 1.0}}, "id 12 is none of the 12 tokens"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ]:
        assert words in pool.refusal(dataclasses.replace(fits, **problem))
    assert pool.refusal(dataclasses.replace(fits, top_log_probs=5)) is None
    with pytest.raises(UserError, match="slots must be at least 1"):
        SlotPool(table_session(), 0, 24)
    with pytest.raises(UserError, match="not divisible"):
        SlotPool(table_session(2), 3, 24)
