"""`meshway serve` as a user starts it: a real process, OpenAI's own client, and what `Predictor` says of the same."""

import json
import re
import signal
import socket
import time

import httpx2
import numpy as np
import openai
import pytest
from saved_runs import VOCABULARY, save_run
from served import serving

from meshway.framework.data.vocabulary import Framing
from meshway.framework.inference.beam_search import BeamSearch
from meshway.framework.inference.predictor import Predictor
from meshway.framework.inference.sampling import Sampling
from meshway.launch import cli, serve

PROMPTS = ["one", "a text of some more words, which needs several chunks of a prompt", "three", "four 4"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    run = save_run(tmp_path_factory.mktemp("runs") / "lm", "lm", framing=Framing((300,), False))
    (run / "hugging_face").mkdir()  # as a converted run keeps it
    template = "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}assistant: "
    (run / "hugging_face/chat_template.jinja").write_text(template)
    return run


@pytest.fixture(scope="module")
def served(lm):
    with serving(lm, "--slots=3", "--chunk=8", "--max_top_log_probs=3", "--beams=3", "--max_queue=64") as found:
        yield found


def predictor(run, **options):
    return Predictor(run, layout="single", max_input_length=79, max_new_tokens=16, **options)


def complete(served, prompt, **options):
    return served.client.completions.create(model="lm", prompt=prompt, **options)


@pytest.mark.slow
def test_greedy_text_is_that_of_infer_alone_together_and_streamed(served, lm):
    wanted = predictor(lm).predict(PROMPTS)
    together = complete(served, PROMPTS, temperature=0, max_tokens=16, logprobs=2)
    for choice, prediction, prompt in zip(together.choices, wanted, PROMPTS, strict=True):
        assert choice.text == prediction.text
        assert choice.logprobs.token_logprobs == pytest.approx(prediction.token_scores, abs=1e-4)
        alone = complete(served, prompt, temperature=0, max_tokens=16, logprobs=2).choices[0]
        assert (alone.text, alone.logprobs) == (choice.text, choice.logprobs)
        pieces = complete(served, prompt, temperature=0, max_tokens=16, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == choice.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 5, "repetition_penalty": 1.3}, {"presence_penalty": 1.0}],
    ids=str,
)
def test_drawn_text_is_that_of_infer_by_the_same_seed(served, lm, settings):
    drawing = Sampling(**settings, num_decodes=2)
    wanted = predictor(lm, decoder=drawing, seed=5)
    own = {name: settings[name] for name in settings.keys() & {"top_k", "repetition_penalty"}}
    theirs = {name: value for name, value in settings.items() if name not in own}
    found = complete(served, PROMPTS[0], seed=5, n=2, max_tokens=16, extra_body=own, **theirs)
    assert sorted(each.text for each in found.choices) == sorted(wanted.predict(PROMPTS[:1], ids=[0])[0].texts)


def greedy(served, **options):
    return complete(served, PROMPTS[0], temperature=0, max_tokens=12, **options).choices[0]


@pytest.mark.slow
def test_filters_that_leave_one_token_are_greedy_and_biases_choose(served):
    likeliest = greedy(served).text
    for alone in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 0.999}}):
        assert complete(served, PROMPTS[0], seed=1, max_tokens=12, **alone).choices[0].text == likeliest
    letter = VOCABULARY.encode("a")[0]
    assert greedy(served, logit_bias={str(letter): 100}).text == "a" * 12
    assert greedy(served, logit_bias={str(letter): 100}, frequency_penalty=2.0, user="me").text == "a" * 12
    one, other = (complete(served, PROMPTS[0], seed=n, max_tokens=30, temperature=2).choices[0].text for n in (1, 2))
    assert one != other and complete(served, PROMPTS[0], seed=1, max_tokens=30, temperature=2).choices[0].text == one


@pytest.mark.slow
def test_texts_have_the_form_that_is_asked_for(served):
    for seed in range(3):
        options = {"seed": seed, "max_tokens": 60, "temperature": 1.5}
        chosen = complete(served, "x", extra_body={"choice": ["red", "green", "blue"]}, **options).choices[0]
        assert chosen.text in ("red", "green", "blue") and chosen.finish_reason == "stop"
        matched = complete(served, "x", extra_body={"regex": "[ab]{3}-[0-9]{2}"}, **options).choices[0]
        assert re.fullmatch("[ab]{3}-[0-9]{2}", matched.text)
        schema = {
            "type": "object",
            "properties": {"n": {"enum": [1, 22]}},
            "required": ["n"],
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        found = complete(served, "x", extra_body={"response_format": form}, **options).choices[0]
        assert json.loads(found.text)["n"] in (1, 22)
    pieces = complete(served, "x", extra_body={"choice": ["red"]}, max_tokens=9, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "red"
    for wrong in ({"regex": "("}, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}):
        with pytest.raises(openai.UnprocessableEntityError):
            complete(served, "x", extra_body=wrong)


@pytest.mark.slow
def test_a_chat_is_a_completion_of_what_the_template_makes(served):
    messages = [{"role": "user", "content": "hi"}]
    chat = served.client.chat.completions.create(model="lm", messages=messages, temperature=0, max_tokens=9)
    plain = complete(served, "user: hi\nassistant: ", temperature=0, max_tokens=9)
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens


@pytest.mark.slow
def test_searches_are_those_of_infer(served, lm):
    for num_beams, alpha in ((3, 0.6), (2, 1.0)):
        wanted = predictor(lm, decoder=BeamSearch(num_beams, alpha)).predict(PROMPTS)
        body = {"num_beams": num_beams, "length_penalty": alpha}
        for prompt, prediction in zip(PROMPTS, wanted, strict=True):
            found = complete(served, prompt, max_tokens=16, n=num_beams, extra_body=body)
            assert [each.text for each in found.choices] == prediction.texts


@pytest.mark.slow
def test_scores_are_those_of_infer_by_each_way(served, lm):
    wanted = predictor(lm).score(PROMPTS[:2], ["targets", "of two"])
    body = {"inputs": PROMPTS[:2], "targets": ["targets", "of two"]}
    found = served.http.post("/v1/score", json=body).json()["data"]
    for each, scored in zip(found, wanted, strict=True):
        assert each["token_scores"] == pytest.approx(scored.token_scores, abs=1e-4)
    echoed = complete(served, "one", echo=True, max_tokens=0, logprobs=1, extra_body={"targets": "targets"}).choices[0]
    assert echoed.logprobs.token_logprobs == pytest.approx(wanted[0].token_scores[:-1], abs=1e-4)
    ids = VOCABULARY.encode("onetargets")
    harness = complete(served, [ids], echo=True, max_tokens=1, logprobs=1, temperature=0).choices[0].logprobs
    assert harness.token_logprobs[len("one") : -1] == pytest.approx(wanted[0].token_scores[:-1], abs=1e-4)
    assert [max(top.values()) >= score for top, score in zip(harness.top_logprobs, harness.token_logprobs)]


@pytest.mark.slow
def test_vectors_have_length_one_and_differ(served):
    found = served.client.embeddings.create(model="lm", input=PROMPTS).data
    vectors = [np.array(each.embedding) for each in found]
    assert all(np.linalg.norm(each) == pytest.approx(1, abs=1e-5) for each in vectors)
    assert not np.allclose(vectors[0], vectors[2])


@pytest.mark.slow
def test_a_client_that_goes_away_gives_its_slot_back(served):
    body = {"prompt": "a", "max_tokens": 70, "temperature": 0, "stream": True, "n": 3}
    for _ in range(5):
        with served.http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    end = time.monotonic() + 20
    while served.http.get("/status").json()["slots_used"]:
        assert time.monotonic() < end
    assert greedy(served).text


@pytest.mark.slow
def test_an_encoder_decoder_is_served_too(tmp_path):
    run = save_run(tmp_path / "t5")
    with serving(run, "--slots=2", "--beams=2", "--name=mine", "--max_input_length=80") as served:
        wanted = predictor(run).predict(PROMPTS[:3])
        found = served.client.completions.create(model="mine", prompt=PROMPTS[:3], temperature=0, max_tokens=16)
        assert [each.text for each in found.choices] == [each.text for each in wanted]
        scored = predictor(run).score(["one"], ["ab"])[0].token_scores
        body = {"targets": "ab"}
        echoed = served.client.completions.create(
            model="mine", prompt="one", max_tokens=0, echo=True, logprobs=0, extra_body=body
        )
        assert echoed.choices[0].logprobs.token_logprobs == pytest.approx(scored[:-1], abs=1e-4)
        searched = served.client.completions.create(
            model="mine", prompt="one", max_tokens=16, extra_body={"num_beams": 2}
        )
        beams = predictor(run, decoder=BeamSearch(2)).predict(["one"])[0]
        assert searched.choices[0].text == beams.text
        body = {"prompt": "one", "max_tokens": 16, "n": 60, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
            served.process.send_signal(signal.SIGTERM)
            while not any("a second signal" in line for line in served.said):
                time.sleep(0.001)
            served.process.send_signal(signal.SIGTERM)  # at once, whatever has begun
            assert served.process.wait(20) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_under_a_layout_chosen_by_cost_texts_are_those_of_one_device(lm):
    chosen = ("--layout=auto", "--topology=v4:2x2x1", "--simulated_devices=4")
    with serving(lm, *chosen, "--slots=4", "--max_length=96", "--kept_prompts=0") as served:
        assert "--gin.LAYOUT=inference/" in "".join(served.said)
        wanted = predictor(lm).predict(PROMPTS)
        found = complete(served, PROMPTS, temperature=0, max_tokens=16)
        assert [each.text for each in found.choices] == [each.text for each in wanted]


@pytest.mark.slow
def test_nothing_is_compiled_after_the_port_is_open(served):
    complete(served, "x" * 50, temperature=0.5, top_p=0.5, logit_bias={"70": 5}, logprobs=3, max_tokens=4)
    assert "meshway_compilations_after_warm_up 0.0" in served.http.get("/metrics").text


@pytest.mark.slow
def test_a_run_that_ends_finishes_what_has_begun_and_says_that_it_is_not_ready(lm):
    with serving(lm, "--slots=2", "--max_length=400", "--drain_seconds=60") as served:
        body = {"prompt": "go on", "temperature": 0, "max_tokens": 300, "stream": True}
        texts = []
        with served.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            end = time.monotonic() + 20
            while httpx2.get(f"{served.url}/ready").status_code != 503:
                assert time.monotonic() < end
            refused = httpx2.post(f"{served.url}/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            texts = [line for line in lines if line.startswith("data: ")]
        assert texts[-1] == "data: [DONE]" and '"finish_reason":"' in texts[-2]
        assert served.process.wait(60) == 0
        served.reader.join(20)
        assert "Traceback" not in "".join(served.said)


def test_what_cannot_be_served_is_said_in_one_message_before_anything_is_read(lm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serve, "open_session", lambda *args, **options: pytest.fail("a checkpoint is read"))
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = {
            f"--port={port}": f"--host=127.0.0.1 --port={port}: Address already in use; --port=0 takes a free one",
            f"--token_file={tmp_path}/none": "none: No such file or directory",
            f"--token_file={tmp_path}/empty": "holds no token: write one a line",
            "--host=no.such.host.invalid": "--host=no.such.host.invalid",
            f"--batch_dir={tmp_path}/a/b": "a/b",
            "--port=99999": "--port=99999 is not a number from 0 to 65535",
            "--topology=v4:2x2x1": "--topology has no effect without --layout=auto: leave it out",
            "--gin.serve.Room.slot=3": "slots",
        }
        for flag, says in cases.items():
            words = ["serve", f"--model_dir={lm}", "--gin.LAYOUT=single", flag]
            assert cli.main(words) == 2, flag
            said = capsys.readouterr().err
            assert says in said and said.count("meshway: error: ") == 1 and "Traceback" not in said, said
