"""Which values the fields of config.json may have: what is no number, or out of range, is named before it is used."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from meshway.framework.errors import UserError

_MOST = 2**31 - 1  # of a size or an id


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field's value must be.

    Attributes:
      words: the same, for people.
      fits: whether a value is one.
      or_null: whether null is one too.
    """

    words: str
    fits: Callable[[Any], bool]
    or_null: bool = False

    def or_nothing(self) -> "Kind":
        """Returns the kind of values that may be null too."""
        return dataclasses.replace(self, or_null=True)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_id(value: Any) -> bool:
    return _is_whole(value) and value >= -1  # Llama 1 has a pad_token_id of -1, for none


def _are_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and all(_is_id(each) for each in value))


COUNT = Kind("a whole number of at least 1", lambda value: _is_whole(value) and value >= 1)
PLACE = Kind("a whole number of at least 0", lambda value: _is_whole(value) and value >= 0)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
NOT_NEGATIVE = Kind("a number of at least 0", lambda value: _is_number(value) and value >= 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
OBJECT = Kind("an object, {...}", lambda value: isinstance(value, dict))
NAMES = Kind("a list of strings", _is_list_of_names)
TOKEN = Kind("a token id", _is_id)
TOKENS = Kind("a token id or a list of them", _are_ids)
# The fields of all families, and with '?' those that may be null.
_FIELDS: tuple[tuple[Kind, str], ...] = (
    (COUNT, """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads?
        head_dim? max_position_embeddings? num_local_experts num_experts_per_tok sliding_window?
        sliding_window_pattern? _sliding_window_pattern? n_embd n_inner? n_layer n_head n_positions d_model d_ff d_kv
        num_heads num_layers num_decoder_layers? relative_attention_num_buckets relative_attention_max_distance"""),
    (PLACE, "max_window_layers"),
    (POSITIVE, """rope_theta? rope_local_base_freq? partial_rotary_factor? query_pre_attn_scalar
        attn_logit_softcapping? final_logit_softcapping?"""),
    (NOT_NEGATIVE, "rms_norm_eps layer_norm_epsilon router_jitter_noise?"),
    (FLAG, """attention_bias mlp_bias tie_word_embeddings use_sliding_window? scale_decoder_outputs is_gated_act
        scale_attn_weights scale_attn_by_inverse_layer_idx? use_bidirectional_attention? use_mrope?"""),
    (TEXT, "hidden_act hidden_activation activation_function feed_forward_proj dense_act_fn"),
    (OBJECT, "rope_scaling? rope_parameters?"),
    (NAMES, "layer_types? architectures?"),
    (TOKEN, "bos_token_id? pad_token_id? decoder_start_token_id?"),
    (TOKENS, "eos_token_id?"),
)  # fmt: skip
KINDS: Mapping[str, Kind] = {
    name.removesuffix("?"): kind.or_nothing() if name.endswith("?") else kind
    for kind, names in _FIELDS
    for name in names.split()
}


def check_fields(
    config: Mapping[str, Any],
    kinds: Mapping[str, Kind] = KINDS,
    within: str = "",
    but: Iterable[str] = (),
    file: str = "config.json",
) -> None:
    """Compares fields with what they must be; those that `kinds` does not name may be anything.

    Args:
      config: config.json, or an object in it.
      kinds: field -> what it must be.
      within: the field that holds the object, for messages.
      but: fields that are not looked at.
      file: what holds them, for messages.

    Raises:
      UserError: the first that is none.
    """
    skipped = frozenset(but)
    for field, value in config.items():
        kind = kinds.get(field)
        if kind is None or field in skipped or (value is None and kind.or_null) or kind.fits(value):
            continue
        name = f"{within}.{field}" if within else field
        shown = "null" if value is None else short(value)
        raise UserError(f"{file}: {name} = {shown} is not {kind.words}{' or null' if kind.or_null else ''}")


def short(value: Any) -> str:
    """Returns a value in at most sixty letters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
