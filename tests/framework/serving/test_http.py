"""OpenAI's own client against a real server on the loopback, over slots of plain Python: no device computes here."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx2
import openai
import pytest
import uvicorn
from fake_pool import EOS, TEXT, FakePool, FakeScorer, alone

from meshway.framework.inference.rows import RowFormat
from meshway.framework.serving.generation import Generation
from meshway.framework.serving.http import Api
from meshway.framework.serving.metrics import Metrics
from meshway.framework.serving.openai_requests import ServedModel
from meshway.framework.serving.scheduler import Scheduler

MODEL = ServedModel("tiny", TEXT, RowFormat(False, start=()), 1000, 900, 5, 4, 64)
PROMPT = "the prompt"


class Slow(FakePool):
    """Takes `seconds` a step."""

    seconds = 0.0

    def read(self, step):
        time.sleep(self.seconds)
        return super().read(step)


@contextlib.contextmanager
def serving(max_queue=256, tokens=(), chat=None, grammars=None, **options):
    pool = Slow(num_slots=4)
    scheduler = Scheduler(TEXT, pool, FakePool(num_slots=1, searches=True), max_queue)
    metrics = Metrics({"slots_used": ("Slots in use", lambda: scheduler.slots_used)}, {})
    model = ServedModel(*(getattr(MODEL, name) for name in MODEL.__dataclass_fields__))
    object.__setattr__(model, "chat", chat)
    object.__setattr__(model, "grammars", grammars)
    api = Api(model, scheduler, FakeScorer(), metrics, {"layout": "one device"}, tokens, **options)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(api.app(), log_config=None, lifespan="off", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    scheduler.start()
    thread.start()
    while not server.started:
        time.sleep(0.005)
    api.is_ready = True
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with httpx2.Client(base_url=url, timeout=20) as http:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            yield SimpleNamespace(url=url, http=http, client=client, pool=pool, scheduler=scheduler, api=api)
    finally:
        server.should_exit = True
        thread.join(10)
        scheduler.stop()


@pytest.fixture(scope="module")
def served():
    with serving(max_body_bytes=100_000) as found:
        yield found


def expected(prompt=PROMPT, **options):
    generation = Generation(tuple(TEXT.read_inputs(prompt)), **{"max_tokens": 16, "temperature": 1.0, **options})
    tokens = alone(generation)
    return tokens, TEXT.write(tokens)


def complete(served, prompt=PROMPT, **options):
    return served.client.completions.create(model="tiny", prompt=prompt, **options)


def test_a_completion_has_the_text_of_its_prompt_and_seed(served):
    found = complete(served, seed=3, max_tokens=40)
    tokens, text = expected(seed=3, max_tokens=40)
    assert found.choices[0].text == text and found.object == "text_completion" and found.model == "tiny"
    assert found.choices[0].finish_reason == ("stop" if tokens[-1] == EOS else "length")
    size = len(PROMPT.encode())
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (size, len(tokens))
    assert found.usage.total_tokens == size + len(tokens)
    assert found.choices[0].logprobs is None
    assert complete(served, max_tokens=60).choices[0].text != complete(served, max_tokens=60).choices[0].text


@pytest.mark.parametrize("form", [lambda text: text, TEXT.read_inputs], ids=["text", "ids"])
def test_prompts_are_texts_or_ids_alone_or_several(served, form):
    prompts = [form("one"), form("two words")]
    found = complete(served, prompts, seed=1, n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    wanted = [expected(text, seed=1, decode=n)[1] for text in ("one", "two words") for n in range(2)]
    assert [choice.text for choice in found.choices] == wanted
    assert complete(served, prompts[0], seed=1).choices[0].text == wanted[0]


def test_the_best_of_several_are_those_of_the_highest_mean_log_probability(served):
    every = complete(served, n=6, seed=5, logprobs=0).choices
    means = {each.text: sum(each.logprobs.token_logprobs) / len(each.logprobs.token_logprobs) for each in every}
    best = complete(served, n=2, best_of=6, seed=5).choices
    assert [each.text for each in best] == sorted(means, key=means.get, reverse=True)[:2]


def test_log_probabilities_come_with_tokens_and_offsets(served):
    found = complete(served, seed=1, temperature=0, logprobs=1).choices[0]
    tokens, text = expected(seed=1, temperature=0.0)
    assert "".join(found.logprobs.tokens) == text and found.logprobs.text_offset == list(range(len(text)))
    assert [list(top.items()) for top in found.logprobs.top_logprobs] == [
        [pair] for pair in zip(found.logprobs.tokens, found.logprobs.token_logprobs)
    ]
    assert complete(served, temperature=0, logprobs=0).choices[0].logprobs.top_logprobs is None


def test_an_echoed_prompt_is_scored_as_evaluation_harnesses_ask(served):
    ids = TEXT.read_inputs("one two")
    found = complete(served, [ids], max_tokens=1, temperature=0, logprobs=1, echo=True).choices[0]
    assert found.text == "one two" + expected("one two", max_tokens=1, temperature=0.0)[1]
    scores = found.logprobs
    assert scores.token_logprobs[:-1] == [None, *FakeScorer().score([], ids[1:])]
    assert scores.top_logprobs[0] is None and max(scores.top_logprobs[1].values()) == scores.token_logprobs[1]
    assert scores.text_offset == list(range(8)) and len(scores.tokens) == 8
    only = complete(served, "one two", max_tokens=0, logprobs=1, echo=True).choices[0]
    assert only.text == "one two" and only.finish_reason == "length"
    assert only.logprobs.token_logprobs == scores.token_logprobs[:-1]
    body = {"targets": "ab"}
    scored = complete(served, "one", max_tokens=0, logprobs=0, echo=True, extra_body=body).choices[0]
    assert scored.text == "ab" and scored.logprobs.token_logprobs == FakeScorer().score([], TEXT.read_begun("ab"))
    assert complete(served, "one", echo=True, seed=1).choices[0].text == "one" + expected("one", seed=1)[1]


def test_stops_end_a_text_before_them(served):
    whole = complete(served, seed=2, max_tokens=200, temperature=0).choices[0].text
    stop = whole[20:23]
    cut = whole[: whole.find(stop)]
    for given in (stop, [stop, "never"]):
        found = complete(served, seed=2, max_tokens=200, temperature=0, stop=given).choices[0]
        assert found.text == cut and found.finish_reason == "stop"
    with_stop = complete(
        served, seed=2, max_tokens=200, temperature=0, stop=stop, extra_body={"include_stop_str_in_output": True}
    )
    assert with_stop.choices[0].text == cut + stop


@pytest.mark.parametrize("options", [{}, {"n": 3, "logprobs": 1}, {"echo": True}, {"stop": ["ab", "c"]}], ids=str)
def test_a_stream_joins_to_the_text_that_comes_whole(served, options):
    whole = complete(served, seed=7, max_tokens=50, temperature=0, **options)
    usage = {"include_usage": True}
    pieces = list(complete(served, seed=7, max_tokens=50, temperature=0, stream=True, stream_options=usage, **options))
    for choice in whole.choices:
        of = [each for piece in pieces for each in piece.choices if each.index == choice.index]
        assert "".join(each.text for each in of) == choice.text
        assert [each.finish_reason for each in of] == [None] * (len(of) - 1) + [choice.finish_reason]
        if choice.logprobs is not None:
            joined = [score for each in of for score in each.logprobs.token_logprobs]
            assert joined == choice.logprobs.token_logprobs
    assert pieces[-1].choices == [] and pieces[-1].usage == whole.usage
    assert {piece.id for piece in pieces} == {pieces[0].id} and all(piece.usage is None for piece in pieces[:-1])


def test_many_clients_stream_at_once(served):
    client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

    async def one(seed: int) -> str:
        stream = await client.completions.create(model="tiny", prompt=PROMPT, seed=seed, max_tokens=30, stream=True)
        return "".join([piece.choices[0].text async for piece in stream])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(one(seed) for seed in range(40)))

    assert asyncio.run(all_of_them()) == [expected(seed=seed, max_tokens=30)[1] for seed in range(40)]


def test_searches_return_their_hypotheses(served):
    body = {"num_beams": 3, "length_penalty": 0.7}
    found = complete(served, n=2, extra_body=body)
    tokens = alone(Generation(tuple(TEXT.read_inputs(PROMPT)), 16, num_beams=3))
    assert [each.text for each in found.choices] == [TEXT.write(tokens)] * 2
    assert found.usage.completion_tokens == 3 * len(tokens)
    pieces = list(complete(served, n=2, stream=True, extra_body=body))
    assert [piece.choices[0].text for piece in pieces] == [each.text for each in found.choices]


class Template:
    def render(self, messages):
        if any("role" not in message for message in messages):
            raise ValueError("a message has no role")
        return TEXT.read_inputs("".join(f"{each['role']}: {each['content']}\n" for each in messages))


def test_a_chat_goes_through_the_template_whole_and_streamed():
    with serving(chat=Template()) as served:
        messages = [{"role": "user", "content": "hello"}]
        options = dict(model="tiny", messages=messages, seed=1, max_tokens=20, logprobs=True, top_logprobs=1)
        found = served.client.chat.completions.create(**options)
        text = expected("user: hello\n", seed=1, max_tokens=20)[1]
        assert found.choices[0].message.content == text and found.object == "chat.completion"
        assert len(found.choices[0].logprobs.content) == found.usage.completion_tokens
        assert found.choices[0].logprobs.content[0].top_logprobs[0].token == found.choices[0].logprobs.content[0].token
        pieces = list(served.client.chat.completions.create(stream=True, **options))
        assert pieces[0].choices[0].delta.role == "assistant"
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
        whole = served.client.chat.completions.create(model="tiny", messages=messages, seed=1, max_completion_tokens=20)
        assert whole.choices[0].message.content == text
        with pytest.raises(openai.BadRequestError, match="a message has no role"):
            served.client.chat.completions.create(model="tiny", messages=[{"content": "x"}])


def test_scores_embeddings_tokens_and_models(served):
    found = served.http.post("/v1/score", json={"inputs": ["a", "b"], "targets": ["xy", "z"]}).json()
    scores = FakeScorer().score([], TEXT.read_targets("xy"))
    assert found["data"][0] == {"object": "score", "index": 0, "score": sum(scores), "token_scores": scores}
    vectors = served.client.embeddings.create(model="tiny", input=["ab", "c"])  # in base64
    plain = served.client.embeddings.create(model="tiny", input="ab", encoding_format="float")
    assert vectors.data[0].embedding == plain.data[0].embedding == [2.0, TEXT.read_inputs("a")[0], 0.5]
    tokens = served.http.post("/v1/tokenize", json={"text": "aé"}).json()
    assert tokens["tokens"] == TEXT.read_inputs("aé") and tokens["count"] == 3 and tokens["pieces"][0] == "a"
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").id == "tiny"


BAD = [
    (b"", None, "the body is not JSON"),
    (b"{", None, "the body is not JSON"),
    (b"[" * 100_000, None, "nested too deep"),
    (b"\xff\xfe", None, "the body is not JSON"),
    ([], None, "must be a JSON object"),
    ({}, "prompt", "prompt is missing"),
    ({"prompt": {}}, "prompt", "not a text"),
    ({"prompt": []}, "prompt", "not a text"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": 1.5}, "prompt", "not a text"),
    ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ({"prompt": [100000]}, "prompt", "not in the vocabulary"),
    ({"prompt": [-1]}, "prompt", "not in the vocabulary"),
    ({"prompt": [[1], "a", None]}, "prompt", "neither text"),
    ({"prompt": ["a"] * 65}, "prompt", "more than 64"),
    ({"prompt": "a" * 999}, "prompt", "tokens"),
    ({"max_tokens": -1}, "max_tokens", "whole number"),
    ({"max_tokens": 1.5}, "max_tokens", "whole number"),
    ({"max_tokens": True}, "max_tokens", "whole number"),
    ({"max_tokens": 0}, "max_tokens", "echo"),
    ({"max_tokens": 1001}, "prompt", "slot"),
    ({"prompt": "a" * 901, "max_tokens": 1}, "prompt", "901 tokens, and there is room for 900"),
    ({"temperature": "hot"}, "temperature", "a number"),
    ({"temperature": -0.1}, "temperature", "a number"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_p": 1.1}, "top_p", "at most 1"),
    ({"top_k": -1}, "top_k", "whole number"),
    ({"min_p": 1}, "min_p", "a number"),
    ({"n": 0}, "n", "whole number"),
    ({"n": 65}, "n", "more than 64"),
    ({"n": 3, "best_of": 2}, "best_of", "fewer than"),
    ({"n": 1, "best_of": 2, "stream": True}, "best_of", "stream"),
    ({"logprobs": 6}, "logprobs", "at most 5"),
    ({"stop": [""]}, "stop", "none empty"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"seed": -1}, "seed", "whole number"),
    ({"seed": 2**31}, "seed", "whole number"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "by token id"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "a number"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "no token 99999"),
    ({"presence_penalty": 3}, "presence_penalty", "a number"),
    ({"frequency_penalty": None, "repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ({"stream": 1}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options", "include_usage"),
    ({"tempreature": 1}, "tempreature", "did you mean 'temperature'"),
    ({"suffix": "x"}, "suffix", "not served"),
    ({"num_beams": 5}, "num_beams", "at most 4"),
    ({"num_beams": 2, "n": 3}, "n", "beams"),
    ({"num_beams": 2, "temperature": 0.5}, "temperature", "no effect"),
    ({"num_beams": 2, "stop": "x"}, "stop", "search"),
    ({"length_penalty": 1}, "length_penalty", "no effect"),
    ({"regex": "a+"}, "regex", "not served"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
    ({"targets": "x"}, "targets", "echo"),
    ({"echo": "yes"}, "echo", "true or false"),
]


@pytest.mark.parametrize("body, param, says", BAD, ids=[str(n) for n in range(len(BAD))])
def test_what_is_wrong_is_said_with_its_parameter(served, body, param, says):
    if isinstance(body, dict) and body and "prompt" not in body:
        body = {"prompt": "a", **body}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = served.http.post("/v1/completions", content=content)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["param"] == param and says in error["message"], error
    assert error["type"] == "invalid_request_error" and error["code"]


def test_other_refusals_have_their_status(served):
    post = served.http.post
    answers = {
        404: [
            post("/v1/completions", json={"prompt": "a", "model": "other"}),
            served.http.get("/v1/models/other"),
            served.http.get("/v1/nothing"),
        ],
        405: [served.http.get("/v1/completions")],
        413: [
            post("/v1/completions", content=b"x" * 100_001),
            post("/v1/completions", content=iter([b"x" * 60_000] * 2)),
        ],
        400: [
            post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]}),
            post("/v1/embeddings", json={"input": "a", "encoding_format": "hex"}),
            post("/v1/embeddings", json={"input": [""]}),
            post("/v1/embeddings", json={"input": "a", "dimensions": 3}),
            post("/v1/score", json={"inputs": "a", "targets": ["b", "c"]}),
            post("/v1/tokenize", json={"text": 1}),
        ],
    }
    for status, found in answers.items():
        for each in found:
            assert each.status_code == status, each.text
            assert set(each.json()["error"]) == {"message", "type", "param", "code"}
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        served.client.completions.create(model="other", prompt="a")


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.01)


def test_clients_that_go_away_free_their_slots_whether_they_stream_or_wait(served):
    served.pool.seconds = 0.01
    try:
        body = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0, "n": 2}
        with served.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            next(answer.iter_lines())
            assert served.scheduler.slots_used == 2
        wait_for(lambda: served.scheduler.is_drained)
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{served.url}/v1/completions", json=body, timeout=0.3)
        wait_for(lambda: served.scheduler.is_drained)
    finally:
        served.pool.seconds = 0.0


def test_a_reader_that_stands_still_holds_up_nobody(served):
    body = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0, "n": 4, "logprobs": 1, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        for seed in range(5):
            assert complete(served, seed=seed).choices[0].text == expected(seed=seed)[1]
        wait_for(lambda: served.scheduler.is_drained)
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(each["text"] for piece in rest for each in piece["choices"] if each["index"] == 3)
    assert text == expected(max_tokens=900, temperature=0.0, decode=3)[1]


def test_a_full_queue_answers_429_and_the_client_comes_again():
    with serving(max_queue=4) as served:
        served.pool.seconds = 0.02
        body = {"prompt": PROMPT, "max_tokens": 10, "temperature": 0}
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=10)
        plain = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

        async def many(client, count):
            asked = (client.completions.create(model="tiny", **body) for _ in range(count))
            return await asyncio.gather(*asked, return_exceptions=True)

        found = asyncio.run(many(plain, 30))
        refused = [each for each in found if isinstance(each, openai.RateLimitError)]
        assert refused and len(refused) + sum(hasattr(each, "choices") for each in found) == 30
        assert refused[0].response.headers["retry-after"] == "1" and refused[0].code == "queue_full"
        assert all(hasattr(each, "choices") for each in asyncio.run(many(client, 12)))
        assert served.http.get("/metrics").text.count('meshway_rejected_total{reason="queue_full"}') == 1


def test_tokens_are_asked_for_everywhere_but_where_health_is():
    with serving(tokens=[b"first", b"second"]) as served:
        for given in ("", "Bearer wrong", "first", "Basic first"):
            headers = {"authorization": given}
            found = served.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
            assert served.http.get("/metrics", headers=headers).status_code == 401
        assert [served.http.get(path).status_code for path in ("/health", "/ready", "/")] == [200] * 3
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="second", max_retries=0)
        assert client.completions.create(model="tiny", prompt="a", seed=1).choices[0].text == expected("a", seed=1)[1]
        with pytest.raises(openai.AuthenticationError):
            complete(served)


def test_a_request_may_take_so_long(served):
    with serving(request_seconds=0.2) as served:
        served.pool.seconds = 0.02
        body = {"prompt": "a", "max_tokens": 900, "temperature": 0}
        found = served.http.post("/v1/completions", json=body)
        assert found.status_code == 503 and found.json()["error"]["code"] == "timeout"
        assert found.json()["error"]["type"] == "server_error"
        with served.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert '"code":"timeout"' in lines[-1] and not any("[DONE]" in line for line in lines)


def test_an_engine_that_fails_is_told_and_nothing_hangs(capfd):
    with serving() as served:
        served.pool.fails_at = 5
        found = served.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 900, "temperature": 0})
        assert found.status_code == 500 and found.json()["error"]["code"] == "engine_failed"
        assert served.http.post("/v1/completions", json={"prompt": "a"}).status_code == 500
        assert served.http.post("/v1/score", json={"inputs": "a", "targets": "b"}).status_code == 500
        health = served.http.get("/health")
        assert health.status_code == 500 and "the device is gone" in health.json()["reason"]
        assert served.http.get("/ready").status_code == 503
        assert "the device is gone" in capfd.readouterr().err


def test_an_engine_that_stands_still_is_not_healthy():
    with serving(stalled_seconds=0.1) as served:
        served.pool.seconds = 0.6
        thread = threading.Thread(target=complete, args=(served,), kwargs={"max_tokens": 2, "temperature": 0})
        thread.start()
        wait_for(lambda: served.http.get("/health").status_code == 500)
        assert served.http.get("/health").json()["status"] == "stalled"
        served.pool.seconds = 0.0
        thread.join(10)
        wait_for(lambda: served.http.get("/health").status_code == 200)


def test_a_request_that_cannot_go_on_ends_alone(served):
    served.pool.stuck = tuple(TEXT.read_inputs("stuck"))
    found = served.http.post("/v1/completions", json={"prompt": ["fine", "stuck"], "temperature": 0})
    assert found.status_code == 422 and found.json()["error"]["message"] == "the grammar became too complex"
    assert complete(served, "fine", seed=1).choices[0].text == expected("fine", seed=1)[1]
    wait_for(lambda: served.scheduler.is_drained)


def test_metrics_status_and_page_tell_what_happened(served):
    before = served.http.get("/status").json()["generated_tokens"]
    complete(served, seed=1, temperature=0, max_tokens=7)
    state = served.http.get("/status").json()
    assert state["generated_tokens"] == before + 7 and state["ready"] and state["facts"] == {"layout": "one device"}
    text = served.http.get("/metrics").text
    answered = 'requests_total{endpoint="/v1/completions",status="200"}'
    for name in (answered, "first_token_seconds_bucket", "slots_used"):
        assert f"meshway_{name}" in text
    page = served.http.get("/")
    assert "connect-src 'self'" in page.headers["content-security-policy"] and "src=" not in page.text
    assert served.http.get("/health").json() == {"status": "ok"} and served.http.get("/ready").status_code == 200


def test_a_batch_asks_by_another_way(served):
    async def ask():
        body = {"prompt": PROMPT, "seed": 1}
        url = "/v1/completions"
        return [
            await served.api.answer(url, body),
            await served.api.answer(url, body | {"stream": True}),
            await served.api.answer("/v1/files", body),
            await served.api.answer("/v1/embeddings", {"input": "a"}),
        ]

    found = asyncio.run(ask())
    assert found[0][0] == 200 and found[0][1]["choices"][0]["text"] == expected(seed=1)[1]
    assert [status for status, _ in found] == [200, 400, 404, 200]
