"""Makes `tests/goldens/special_ids/`: small tokenizers of six published kinds, and what transformers makes of them.

Needs transformers 5 and tokenizers, no torch; run `python tests/goldens/make_special_ids.py` from the repository's
root. No test imports it.

Each folder holds what lies beside published weights: `tokenizer.json`, `tokenizer_config.json`,
`special_tokens_map.json`, `generation_config.json` and of `config.json` the fields that name tokens (tests take the
others from the folder of `tests/goldens/hugging_face/` that `expected.json` names as `model`). `expected.json` holds
what transformers' own tokenizer for that directory says:

- `bos`, `eos`, `pad`: its ids, null for none; `stop`: the ids at which `generate` ends, in order;
- `texts`: of each the ids with and without `add_special_tokens`, and the decoded text with and without
  `skip_special_tokens`, of the ids with special tokens; `file`, where transformers 5 builds a class of its own (Llama
  2's) that cuts otherwise than tokenizer.json: what that file says, and transformers 4;
- `pairs`: a prompt, a completion, and the ids of both: the prompt with special tokens, the completion without;
- `predictions`: ids as a model may make them, with stop ids among them, and the text before the first of them, with and
  without `skip_special_tokens`.
"""

import copy
import dataclasses
import json
import pydoc_data.topics
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

FOLDER = Path(__file__).parent / "special_ids"
PIECES = 60  # merges of a tokenizer
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# How Llama 3's and Qwen's files split text before its bytes are merged: contractions, words, numbers, signs, blanks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEXTS = (
    "The statement is executed in the local namespace.",
    "",
    " leading and trailing ",
    "  two  blanks\tand\n\nnew lines\n",
    "na\u00efve caf\u00e9, e\u0301 as two code points",
    "\u6771\u4eac \u2603 \U0001f600 \u0645\u0631\u062d\u0628\u0627",
    "12345 + 0.5 = x[i]; don't!",
)
PAIRS = (("What is a class?", " A definition."), ("Say nothing:", ""), ("Text\n", "\nmore text "), ("", "Only this"))


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden.

    Attributes:
      model: the folder of `hugging_face/` with its network.
      model_type: as config.json has it.
      tokenizer_class: as tokenizer_config.json has it.
      kind: 'bytes' (byte-level BPE as GPT-2's), or 'pieces' (BPE of characters, bytes where there is none).
      first: tokens with the lowest ids.
      added: tokens with the highest ids.
      bos, eos, pad, unk: tokenizer_config.json's.
      template: tokens before a text.
      config: fields of config.json, and
      generation: of generation_config.json: tokens, which become ids.
      normalizer, splits: what 'bytes' does to text first, and how it splits it.
      prefix: whether 'pieces' puts a blank before a text.
    """

    model: str
    model_type: str
    tokenizer_class: str
    kind: str
    eos: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    first: Sequence[str] = ()
    added: Sequence[str] = ()
    bos: str | None = None
    pad: str | None = None
    unk: str | None = None
    template: Sequence[str] = ()
    normalizer: Any = None
    splits: str | None = None
    prefix: bool = False


_LLAMA3 = Case(
    model="llama3",
    model_type="llama",
    tokenizer_class="PreTrainedTokenizerFast",
    kind="bytes",
    added=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
    ),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
    template=("<|begin_of_text|>",),
    config={"bos_token_id": "<|begin_of_text|>", "eos_token_id": "<|end_of_text|>"},
    generation={"bos_token_id": "<|begin_of_text|>", "eos_token_id": ["<|end_of_text|>", "<|eot_id|>"]},
    splits=_WORDS % "{1,3}",
)
_STOPS = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
CASES: Mapping[str, Case] = {
    "llama2": Case(
        model="llama2",
        model_type="llama",
        tokenizer_class="LlamaTokenizer",
        kind="pieces",
        first=("<unk>", "<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        unk="<unk>",
        template=("<s>",),
        config={"bos_token_id": "<s>", "eos_token_id": "</s>"},
        generation={"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<unk>"},
        prefix=True,
    ),
    "llama3": _LLAMA3,
    # The tokenizer ends texts with another token than the first at which predictions end.
    "llama3_instruct": dataclasses.replace(
        _LLAMA3,
        eos="<|eot_id|>",
        config={"bos_token_id": "<|begin_of_text|>", "eos_token_id": _STOPS},
        generation={"bos_token_id": "<|begin_of_text|>", "eos_token_id": _STOPS},
    ),
    "gpt2": Case(
        model="gpt2",
        model_type="gpt2",
        tokenizer_class="GPT2Tokenizer",
        kind="bytes",
        added=("<|endoftext|>",),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        unk="<|endoftext|>",
        config={"bos_token_id": "<|endoftext|>", "eos_token_id": "<|endoftext|>"},
        generation={"bos_token_id": "<|endoftext|>", "eos_token_id": "<|endoftext|>"},
    ),
    "qwen3": Case(
        model="qwen3",
        model_type="qwen3",
        tokenizer_class="Qwen2Tokenizer",
        kind="bytes",
        added=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        config={"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"},
        generation={
            "bos_token_id": "<|endoftext|>",
            "eos_token_id": ["<|im_end|>", "<|endoftext|>"],
            "pad_token_id": "<|endoftext|>",
        },
        normalizer=normalizers.NFC(),
        splits=_WORDS % "",
    ),
    "gemma3": Case(
        model="gemma3",
        model_type="gemma3_text",
        tokenizer_class="GemmaTokenizer",
        kind="pieces",
        first=("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        template=("<bos>",),
        config={"bos_token_id": "<bos>", "eos_token_id": ["<eos>", "<end_of_turn>"], "pad_token_id": "<pad>"},
        generation={"bos_token_id": "<bos>", "eos_token_id": ["<eos>", "<end_of_turn>"], "pad_token_id": "<pad>"},
    ),
}
PLAIN = ("<tool_call>", "</tool_call>", "<think>", "</think>")  # of Qwen 3: added, and not special


def corpus() -> list[str]:
    """Returns the pages of Python's help."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())][:40]


def tokenizer_of(case: Case) -> Tokenizer:
    """Returns the tokenizer of a case, trained."""
    made = _bytes(case) if case.kind == "bytes" else _pieces(case)
    named = (*case.first, *case.added) if case.kind == "pieces" else case.added
    made.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in named if token not in PLAIN]
    )
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in named if token in PLAIN])
    ids = {token: made.token_to_id(token) for token in case.template}
    if case.template:
        before = " ".join(case.template)
        template = processors.TemplateProcessing(
            single=f"{before} $A", pair=f"{before} $A {before}:1 $B:1", special_tokens=list(ids.items())
        )
        own = [made.post_processor] if case.kind == "bytes" else []
        made.post_processor = processors.Sequence([*own, template]) if own else template
    return made


def _bytes(case: Case) -> Tokenizer:
    made = Tokenizer(models.BPE())
    blank = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=case.splits is None)
    if case.splits is None:
        made.pre_tokenizer = blank
    else:
        split = pre_tokenizers.Split(Regex(case.splits), behavior="isolated", invert=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, blank])
    if case.normalizer is not None:
        made.normalizer = case.normalizer
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=256 + PIECES, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def _pieces(case: Case) -> Tokenizer:
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    letters = [letter for text in corpus() for letter in text if letter.isascii() and letter.isprintable()]
    size = len(set(letters)) + PIECES
    plain = ["".join(letter for letter in text if letter.isascii() and letter.isprintable()) for text in corpus()]
    learned.train_from_iterator(plain, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    vocabulary = {token: place for place, token in enumerate((*case.first, *BYTES, *tokens))}
    made = Tokenizer(
        models.BPE(
            vocabulary,
            [tuple(pair) for pair in model["merges"]],
            unk_token=case.unk,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blank = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if case.prefix:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank])
        made.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1)])
    else:
        made.normalizer = blank
        made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous", invert=False)
        made.decoder = decoders.Sequence(parts)
    return made


def write(name: str, case: Case, folder: Path) -> None:
    """Writes the files of a case that lie beside weights."""
    tokenizer = tokenizer_of(case)
    named = {f"{kind}_token": token for kind in ("bos", "eos", "pad", "unk") if (token := getattr(case, kind))}
    with tempfile.TemporaryDirectory() as scratch:
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=131072, **named
        ).save_pretrained(scratch)
        described = json.loads((Path(scratch) / "tokenizer_config.json").read_text())
        shutil.copy(Path(scratch) / "tokenizer.json", folder)
    described |= {"tokenizer_class": case.tokenizer_class}
    described.pop("backend", None)
    _write(folder / "tokenizer_config.json", described)
    _write(folder / "special_tokens_map.json", named)

    def ids(value: Any) -> Any:
        return [ids(each) for each in value] if isinstance(value, list) else tokenizer.token_to_id(value)

    fields = {field: ids(value) for field, value in case.config.items()}
    _write(folder / "config.json", {"model_type": case.model_type, "vocab_size": tokenizer.get_vocab_size()} | fields)
    generation = {field: ids(value) for field, value in case.generation.items()}
    _write(folder / "generation_config.json", {"_from_model_config": False, "do_sample": True} | generation)


def expected(case: Case, folder: Path) -> dict[str, Any]:
    """Returns what transformers says of a directory."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    generation = transformers.GenerationConfig.from_pretrained(str(folder))
    stop = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    controls = [token for token in (*case.first, *case.added) if token != "<unk>"]
    file = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    last = controls[-1]
    written = [f"a{last}b {case.eos}", f"{case.bos or case.eos}Once", f"{controls[0]} in between {last}\n"]

    def text(given: str) -> dict[str, Any]:
        whole, read = tokenizer(given)["input_ids"], file(given)["input_ids"]
        return {
            "text": given,
            "ids": whole,
            "plain": tokenizer(given, add_special_tokens=False)["input_ids"],
            "decoded": tokenizer.decode(whole),
            "shown": tokenizer.decode(whole, skip_special_tokens=True),
            **({"file": read} if read != whole else {}),
        }

    def pair(prompt: str, completion: str) -> dict[str, Any]:
        whole, read = (
            [cut(prompt)["input_ids"], cut(completion, add_special_tokens=False)["input_ids"]]
            for cut in (tokenizer, file)
        )
        found = {"prompt": prompt, "completion": completion, "ids": whole}
        return found | ({"file": read} if read != whole else {})

    def prediction(ids: list[int]) -> dict[str, Any]:
        before = ids[: next((place for place, token in enumerate(ids) if token in stop), len(ids))]
        return {
            "ids": ids,
            "decoded": tokenizer.decode(before),
            "shown": tokenizer.decode(before, skip_special_tokens=True),
        }

    said = tokenizer(" It is so. \U0001f600", add_special_tokens=False)["input_ids"]
    ended = [[*said, end, *said[:2]] for end in stop]
    return {
        "model": case.model,
        "transformers": transformers.__version__,
        **{kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")},
        "stop": stop,
        "texts": [text(each) for each in (*TEXTS, *written)],
        "pairs": [pair(*each) for each in PAIRS],
        "predictions": [prediction(ids) for ids in (said, said[:-1], [stop[0]], *ended)],
    }


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _compact(content: Mapping[str, Any]) -> str:
    """Returns JSON with an entry of each list in a line."""
    lines = []
    for name, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = "[\n  " + ",\n  ".join(json.dumps(each, ensure_ascii=False) for each in value) + "\n ]"
        else:
            value = json.dumps(value, ensure_ascii=False)
        lines.append(f" {json.dumps(name)}: {value}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    for name, case in CASES.items():
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(name, copy.deepcopy(case), folder)
        (folder / "expected.json").write_text(_compact(expected(case, folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
