"""Special tokens that texts spell out: '</s>' in what a user wrote becomes the id that ends an example.

Only a Hugging Face tokenizer reads them so, and only where `literal` does not say otherwise. Where an example keeps its
text, as seqio's tokenize does in `targets_pretokenized`, that tells what was spelled out; else the ids do, but for EOS
at the end of a feature and for sentinels, which preprocessors put there.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from meshway.framework.data.hugging_face_vocabulary import HuggingFace
from meshway.framework.data.inspection.decoded_rows import visible
from meshway.framework.data.rows.examples import Examples
from meshway.framework.data.vocabulary import Vocabulary

SAMPLED = 10_000  # examples of a source that are looked at, evenly spread
_AT_ONCE = 500
_SHOWN = 5  # tokens that are named


@dataclasses.dataclass
class Written:
    """What was found in some examples.

    Attributes:
      examples: how many were looked at.
      holding: how many hold a special token.
      tokens: how often each was found, by its text.
    """

    examples: int = 0
    holding: int = 0
    tokens: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, examples: Iterable[Mapping[str, Any]], vocabularies: Mapping[str, Vocabulary]) -> None:
        """Counts examples in: token ids by feature, and maybe the text of each."""
        special = {name: each.special_tokens for name, each in vocabularies.items() if isinstance(each, HuggingFace)}
        ids = {name: np.fromiter(tokens, np.int64) for name, tokens in special.items()}
        for example in examples:
            found: collections.Counter[str] = collections.Counter()
            for name in special:
                tokens = np.asarray(example.get(name, ()))
                if np.isin(tokens, ids[name]).any():
                    found += _of_feature(tokens, example.get(f"{name}_pretokenized"), special[name], vocabularies[name])
            self.examples += 1
            self.holding += bool(found)
            self.tokens += found

    def __str__(self) -> str:
        counts = self.tokens.most_common()
        named = [f"`{visible(token)}` {_times(count)}" for token, count in counts[:_SHOWN]]
        named += [f"{len(counts) - _SHOWN} more"] if counts[_SHOWN:] else []
        hold = "holds" if self.holding == 1 else "hold"
        found = f"{self.holding:,} of {self.examples:,} examples {hold} special tokens written in their text"
        return f"{found} ({', '.join(named)})" if named else found


def sentence(found: Mapping[str, Written]) -> str:
    """Returns what was found, by source, in words."""
    holding = {name: written for name, written in found.items() if written.holding}
    if not holding:
        return str(Written(sum(written.examples for written in found.values())))
    parts = [f"{name}: {written}" if len(found) > 1 else str(written) for name, written in holding.items()]
    return "; ".join([*parts, "HuggingFaceVocabulary(literal=True) takes them as text"])


def reads_special_tokens(vocabularies: Mapping[str, Vocabulary]) -> bool:
    """Whether one of the vocabularies takes what a text spells out for a special token."""
    return any(isinstance(each, HuggingFace) and bool(each.special_tokens) for each in vocabularies.values())


def sampled(examples: Examples) -> Iterator[Mapping[str, Any]]:
    """Yields all examples, or `SAMPLED` of them."""
    count = len(examples)
    places = np.linspace(0, count - 1, min(count, SAMPLED)).astype(np.int64)
    for begin in range(0, len(places), _AT_ONCE):
        yield from examples.read(places[begin : begin + _AT_ONCE])


def segments(rows: Mapping[str, np.ndarray]) -> Iterator[Mapping[str, np.ndarray]]:
    """Yields the token ids of each item in rows of a batch, features [rows, length], by the feature they are of."""
    for side, name, feature in (
        ("encoder", "encoder_input_tokens", "inputs"),
        ("decoder", "decoder_target_tokens", "targets"),
    ):
        if name not in rows:
            continue
        for tokens, of in zip(rows[name], rows[f"{side}_segment_ids"], strict=True):
            for segment in range(1, int(of.max(initial=0)) + 1):
                yield {feature: tokens[of == segment]}


def _of_feature(
    tokens: np.ndarray, text: Any, special: Mapping[int, str], vocabulary: Vocabulary
) -> "collections.Counter[str]":
    if isinstance(text, bytes | str):
        spelled = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return +collections.Counter({token: spelled.count(token) for token in special.values()})
    kept = tokens[:-1] if tokens[-1] == vocabulary.eos_id else tokens
    sentinels = vocabulary.info.sentinel_ids
    return collections.Counter(special[token] for token in kept.tolist() if token in special and token not in sentinels)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
