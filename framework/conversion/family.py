"""A family of Hugging Face models as data, and its config.json read field by field."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshway.framework.conversion.rules import Rule
from meshway.framework.conversion.settings import Bindings, Config, Setting
from meshway.framework.errors import UserError, did_you_mean

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
        num_heads num_layers num_decoder_layers? relative_attention_num_buckets relative_attention_max_distance
        local_radius"""),
    (PLACE, "max_window_layers"),
    (POSITIVE, """rope_theta? rope_local_base_freq? partial_rotary_factor? query_pre_attn_scalar
        attn_logit_softcapping? final_logit_softcapping?"""),
    (NOT_NEGATIVE, "rms_norm_eps layer_norm_epsilon router_jitter_noise?"),
    (FLAG, """attention_bias mlp_bias tie_word_embeddings use_sliding_window? scale_decoder_outputs is_gated_act
        scale_attn_weights scale_attn_by_inverse_layer_idx? use_bidirectional_attention? use_mrope?"""),
    (TEXT, "hidden_act hidden_activation activation_function feed_forward_proj dense_act_fn encoder_attention_type"),
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


OWN_OUTPUT = "(an output layer of its own)"  # as if it were a field: what settings are told of the tensors

# Fields that any config.json may have and that change nothing of what a text model computes at inference.
_SILENT = """_name_or_path _attn_implementation_autoset architectures attention_dropout attn_implementation
    bad_words_ids begin_suppress_tokens bos_token_id cache_implementation classifier_dropout decoder_start_token_id
    diversity_penalty do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    id2label initializer_range label2id length_penalty max_length max_position_embeddings min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_past output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    transformers.js_config typical_p unk_token_id use_bfloat16 use_cache"""
SILENT = frozenset(_SILENT.split())
_CODE = "auto_map"
# Fields that any config.json may have, and the values with which they change nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "chunk_size_feed_forward": (0, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False, None),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What one kind of model is on both sides.

    Attributes:
      name: as --family takes it.
      model_types: what config.json may call it; the first is written.
      architecture: the class of transformers that loads it.
      defaults: what transformers takes for fields that config.json leaves out.
      settings: all fields that matter.
      rules: where the tensors' values lie.
      bases: prefixes of the tensors' names; the first is written.
      copies: tensors that may repeat another one ({base} is filled in): name -> the other. They are compared.
      ignored: patterns of tensors that hold nothing learned.
      silent: fields that change nothing, beside `SILENT`.
      written: fields that are written as they stand here.
      tied_by_tensors: whether the output layer is told by the tensors that are there, not by tie_word_embeddings.
      folder: which of gin/models/ its recipes begin with, from config.json; None for the one called `name`.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str
    defaults: Mapping[str, Any]
    settings: Sequence[Setting]
    rules: Sequence[Rule]
    bases: tuple[str, ...] = ("",)
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: Sequence[str] = ()
    silent: frozenset[str] = frozenset()
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tied_by_tensors: bool = False
    folder: Callable[[Config], str] | None = None

    def include(self, config: Config) -> str:
        """Returns the gin file that the recipe of a config.json begins with."""
        folder = self.folder({**self.defaults, **config}) if self.folder else self.name
        return f"models/{folder}/common.gin"

    def read(self, config: Config, own_output: bool = False, ignoring: Sequence[str] = ()) -> Bindings:
        """Returns the bindings that say what config.json does.

        Args:
          config: config.json.
          own_output: whether the files hold an output layer other than the embeddings.
          ignoring: fields that the user says change nothing.

        Raises:
          UserError: a field that is not known, is not of its kind, or has a value with which meshway would compute
            something else.
        """
        check_fields(config, but=[*self.silent, *ignoring])
        full = {**self.defaults, **config, OWN_OUTPUT: own_output}
        _check_code(config.get(_CODE), ignoring)
        known = {field for setting in self.settings for field in setting.fields}
        for field, value in config.items():
            if field in known or field == _CODE or field in SILENT or field in self.silent or field in ignoring:
                continue
            if field in NEUTRAL:
                if value not in NEUTRAL[field]:
                    raise UserError(
                        f"config.json: {field} = {short(value)} is not something that meshway computes; it reads "
                        f"models without it"
                    )
            elif value is not None:
                near = did_you_mean(field, known, limit=1)
                raise UserError(
                    f"config.json: field {field!r} (= {short(value)}) is not known for family {self.name}{near}; if "
                    f"it changes nothing of what the model computes, give --ignore_fields={field}"
                )
        bindings: Bindings = {}
        for setting in self.settings:
            bindings |= setting.read(full)
        return bindings

    def write(self, bindings: Mapping[str, Any], dtype: str) -> dict[str, Any]:
        """Returns config.json for a recipe's bindings and weights of `dtype`.

        Raises:
          UserError: a binding that config.json cannot say, or one that is missing.
        """
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_types[0]}
        config |= self.written
        for setting in self.settings:
            config |= setting.write(bindings)
        return config | {"torch_dtype": dtype}

    def speaks_of(self, field: str) -> bool:
        """Whether a setting reads or writes this field of config.json."""
        return any(field in setting.fields for setting in self.settings)

    def base_of(self, tensors: Sequence[str]) -> str:
        """Returns the first prefix that one of these tensors' names has."""
        return next((base for base in self.bases if any(name.startswith(base) for name in tensors)), self.bases[0])


def read_config(directory: Path) -> dict[str, Any]:
    """Returns config.json of a directory; raises UserError where there is none or it does not parse."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{directory} has no config.json: it is not a Hugging Face model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not the configuration of a model: it holds {short(config)}, not an object {{...}}")
    check_fields(config, {"model_type": TEXT, "architectures": KINDS["architectures"]})
    return config


def _check_code(named: Any, ignoring: Sequence[str]) -> None:
    """Raises UserError where config.json names code of the directory's own that computes the model."""
    classes = named if isinstance(named, dict) else {}
    own = next((classes[name] for name in classes if name.startswith("AutoModel")), None)
    if own is not None and _CODE not in ignoring:
        raise UserError(
            f"config.json: {_CODE} names code of its own ({own}), which may compute something else than meshway; if it "
            f"does not, give --ignore_fields={_CODE}"
        )
