"""lm-evaluation-harness's `local-completions` on a real server says what `meshway infer --mode=score` does.

It runs where the harness is installed: `pip install 'lm-eval[api]'`, which needs no PyTorch.
"""

import json
import os

import pytest
from saved_runs import VOCABULARY, save_run
from served import serving

from meshway.framework.data.vocabulary import Framing
from meshway.framework.inference.predictor import Predictor

pytestmark = pytest.mark.proofs
lm_eval = pytest.importorskip("lm_eval")
DOCS = [
    {"question": f"{n} and {m} are", "choices": [f" {n + m}", f" {n * m}", " none"], "answer": 0}
    for n in range(4)
    for m in (2, 5)
]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def byte_tokens(monkeypatch):
    """The run's own vocabulary as the harness knows vocabularies: tiktoken's, of single bytes."""
    import tiktoken

    ids = {bytes([byte]): VOCABULARY.encode("a")[0] - ord("a") + byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"[\s\S]+", mergeable_ranks=ids, special_tokens={"<|endoftext|>": 1})
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: encoding)


def test_the_harness_scores_as_infer_does(tmp_path, monkeypatch, byte_tokens):
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setitem(os.environ, "HF_DATASETS_OFFLINE", "1")
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCS)))
    (tmp_path / "sums.yaml").write_text(TASK.format(data=data))
    run = save_run(tmp_path / "lm", "lm", framing=Framing((300,), False))
    with serving(run, "--slots=4", "--max_top_log_probs=1", "--name=lm") as served:
        found = harness(served.url, tmp_path)
    scorer = Predictor(run, layout="single", max_input_length=79, max_new_tokens=16)
    pairs = [(doc["question"], choice) for doc in DOCS for choice in doc["choices"]]
    wanted = scorer.score([question for question, _ in pairs], [choice for _, choice in pairs])
    sums = [sum(each.token_scores[: len(choice)]) for each, (_, choice) in zip(wanted, pairs, strict=True)]
    told = [float(score) for sample in found["samples"]["sums"] for ((score, _),) in sample["resps"]]
    assert told == pytest.approx(sums, abs=1e-3)
    best = [sums[3 * n : 3 * n + 3].index(max(sums[3 * n : 3 * n + 3])) for n in range(len(DOCS))]
    assert found["results"]["sums"]["acc,none"] == best.count(0) / len(DOCS)


def harness(url: str, folder) -> dict:
    """Runs the task of a folder on a server."""
    settings = {"base_url": f"{url}/v1/completions", "model": "lm", "tokenizer_backend": "tiktoken", "max_length": 79}
    return lm_eval.simple_evaluate(
        model="local-completions",
        model_args=settings | {"num_concurrent": 2, "max_retries": 1},
        tasks=["sums"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=1,
        log_samples=True,
        bootstrap_iters=0,
    )
