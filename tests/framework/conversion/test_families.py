"""config.json as bindings and back, in the words of transformers 4 and 5; what is not computed is refused."""

import json
from pathlib import Path

import pytest

from meshway.framework.conversion.family import KINDS, read_config
from meshway.framework.conversion.hugging_face import FAMILIES, detect
from meshway.framework.conversion.rules import check_tensors, pieces_of
from meshway.framework.conversion.settings import Reference
from meshway.framework.errors import UserError

GOLDENS = Path(__file__).parents[2] / "goldens" / "hugging_face"
LOCAL, GLOBAL = (Reference(f"{scope}blocks.SelfAttentionBlock", evaluate=False) for scope in ("local/", ""))
SLIDING, FULL = "sliding_attention", "full_attention"


def read(family, own_output=True, **config):
    return FAMILIES[family].read(config, own_output)


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_bindings_come_back_as_a_config_that_says_the_same(path):
    config = json.loads(path.read_text())
    family = detect(config)
    scaled = family.name == "t5" and config.get("tie_word_embeddings", True)  # refused with a layer of its own
    for own_output in (False,) if scaled else (False, True):
        bindings = family.read(config, own_output)
        made = family.write(defaults_of(family) | bindings, "float32")
        assert detect(made) is family
        assert family.read(made, own_output) == bindings


def defaults_of(family):
    """What a shipped recipe binds and config.json need not say."""
    blocks = {"gemma2": [LOCAL, GLOBAL], "gemma3": [LOCAL] * 5 + [GLOBAL]}.get(family.name, [GLOBAL])
    return {"PATTERN": blocks}


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
    ],
)
def test_rotary_positions_old_and_new(config):
    found = read("llama", **config)
    assert found["ROPE_BASE"] == 5e5
    assert (found["ROPE_SCALING"], found["rotary.Linear.factor"]) == (Reference("rotary.Linear"), 4.0)


def test_yarn_takes_lengths_from_where_transformers_does():
    yarn = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}
    found = read("qwen3", rope_scaling=yarn, max_position_embeddings=2048)
    assert (found["rotary.YaRN.factor"], found["rotary.YaRN.original_length"]) == (4.0, 512)
    found = read("qwen3", rope_scaling={"rope_type": "yarn", "factor": 2.0}, max_position_embeddings=2048)
    assert found["rotary.YaRN.original_length"] == 2048


def test_layer_types_old_and_new():
    old = read("gemma3", sliding_window_pattern=2, num_hidden_layers=5)
    new = read("gemma3", layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING], num_hidden_layers=5)
    assert old == new and old["PATTERN"] == [LOCAL, GLOBAL]
    assert "PATTERN" not in read("gemma3", num_hidden_layers=8)  # the family's own
    late = read("qwen2_5", use_sliding_window=True, max_window_layers=2, num_hidden_layers=4, sliding_window=9)
    assert late["PATTERN"] == [GLOBAL, GLOBAL, LOCAL, LOCAL] and late["local/attention.Attention.window"] == 9
    assert "PATTERN" not in read("qwen2_5", use_sliding_window=False, max_window_layers=2, num_hidden_layers=4)


def test_how_t5_ties():
    assert read("t5", False)["TIED_LOGITS"] and "t5.T5.scale_tied_logits" not in read("t5", False)
    assert read("t5", False, tie_word_embeddings=False)["t5.T5.scale_tied_logits"] is False
    assert read("t5", False, scale_decoder_outputs=False)["t5.T5.scale_tied_logits"] is False
    assert read("t5", True, tie_word_embeddings=False)["TIED_LOGITS"] is False
    assert read("mt5", False)["t5.T5.scale_tied_logits"] is False


@pytest.mark.parametrize(
    "family, config, words",
    [
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["'dynamic'", "rotary.NTK"]),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["'longrope'", "'linear', 'llama3'"]),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "offset": 3}}, ["rope_scaling.offset = 3"]),
        ("mistral", {"auto_map": {"AutoModelForCausalLM": "own.Mine"}}, ["auto_map", "own.Mine", "--ignore_fields"]),
        ("gemma2", {"sliding_window": None}, ["sliding_window = None"]),
        ("gemma2", {"sliding_window_pattern": 3}, ["'sliding_window_pattern'", "not known"]),
        ("gemma3", {"sliding_window_pattern": 3, "_sliding_window_pattern": 6}, ["differ: [3, 6]"]),
        ("gemma3", {"layer_types": []}, ["layer_types = []"]),
        ("qwen3", {"layer_types": [SLIDING] * 32}, ["layer_types", "use_sliding_window"]),
        ("t5", {"dense_act_fn": "xielu"}, ["dense_act_fn = 'xielu'"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        ("llama", {"hidden_act": "xielu"}, ["hidden_act = 'xielu'", "'silu'"]),
        ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config = {'bits': 4}"]),
        ("llama", {"hiden_act": "gelu"}, ["'hiden_act'", "did you mean 'hidden_act'", "--ignore_fields=hiden_act"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention = True"]),
        ("gemma3", {"layer_types": ["chunked_attention"] * 26}, ["layer_types", "chunked_attention"]),
        ("mistral", {"layer_types": [FULL] * 32}, ["layer_types"]),
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise = 0.1"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx = True"]),
        ("gpt2", {"add_cross_attention": True}, ["add_cross_attention = True"]),
        ("t5", {"feed_forward_proj": "gated-xielu"}, ["feed_forward_proj"]),
        ("t5", {"dense_act_fn": "gelu"}, ["dense_act_fn = 'gelu'"]),
        ("t5", {"tie_word_embeddings": True}, ["output layer of its own"]),
    ],
)
def test_what_is_not_computed_is_refused(family, config, words):
    with pytest.raises(UserError) as error:
        read(family, **config)
    assert all(word in str(error.value) for word in words), str(error.value)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPES = ("rope_scaling", "rope_parameters")


@pytest.mark.parametrize("field", ROPES)
@pytest.mark.parametrize(
    "scaling, words",
    [
        ({"rope_type": "linear"}, ["type 'linear' has no factor"]),
        ({"rope_type": "yarn"}, ["type 'yarn' has no factor"]),
        ({"type": "yarn", "original_max_position_embeddings": 64, "beta_fast": 32}, ["type 'yarn' has no factor"]),
        ({"rope_type": "llama3", "factor": 8.0}, ["no low_freq_factor, high_freq_factor, original_max_position_emb"]),
        *[({"rope_type": "llama3"} | {key: LLAMA3[key] for key in LLAMA3 if key != lost}, [f"has no {lost}: "])
          for lost in LLAMA3],
        ({"rope_type": "linear", "factor": None}, [".factor = null is not a number above 0"]),
        ({"rope_type": "linear", "factor": "2"}, [".factor = '2' is not a number"]),
        ({"rope_type": "yarn", "factor": -2.0}, [".factor = -2.0 is not a number above 0 or null"]),
        ({"rope_type": "yarn", "factor": float("nan")}, [".factor = nan"]),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": "no"}, [".truncate = 'no' is not true or false"]),
        ({"rope_type": "llama3"} | LLAMA3 | {"original_max_position_embeddings": 64.5}, ["64.5 is not a whole number"]),
        ({"factor": 2.0}, ["has factor and no rope_type"]),
        ({"rope_type": 3}, [".rope_type = 3 is not a string"]),
        ({"rope_type": "yarn", "type": "linear", "factor": 2.0}, ["rope_type 'yarn' and the type 'linear'"]),
        ({"rope_type": "default", "mrope_section": [2, 3, 3]}, [".mrope_section = [2, 3, 3]"]),
        ({"rope_type": "linear", "factor": 2.0, "mscale": 1.0}, [".mscale = 1.0"]),
    ],
)  # fmt: skip
def test_a_scaling_is_whole_or_refused(field, scaling, words):
    """As transformers refuses it: nothing is put in for what is missing."""
    with pytest.raises(UserError) as error:
        read("llama", **{field: scaling})
    assert all(word in str(error.value) for word in (field, *words)), str(error.value)


@pytest.mark.parametrize(
    "family, config, words",
    [
        ("llama", {"rope_scaling": "linear"}, ["rope_scaling = 'linear' is not an object"]),
        ("llama", {"rope_parameters": [1]}, ["rope_parameters = [1] is not an object"]),
        ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, ["rope_theta is 10000.0", "500000.0"]),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0},
                   "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, ["rope_parameters.factor is 4.0"]),
        ("llama", {"rope_theta": 0}, ["rope_theta = 0 is not a number above 0"]),
        ("llama", {"partial_rotary_factor": 0.0}, ["partial_rotary_factor = 0.0 is not"]),
        ("gemma3", {"rope_parameters": {FULL: {"rope_theta": 1e6}}}, ["says nothing of sliding_attention"]),
        ("gemma3", {"rope_parameters": {FULL: {}, SLIDING: {}, "chunked": {}}}, ["rope_parameters.chunked"]),
        ("gemma3", {"rope_parameters": {FULL: {}, SLIDING: {"factor": 2.0}}}, ["sliding_attention has factor"]),
        ("gemma3", {"rope_parameters": {FULL: {}, SLIDING: {"rope_theta": 7.0}}, "rope_local_base_freq": 8.0},
         ["rope_local_base_freq is 8.0", "7.0"]),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": None},
         ["needs max_position_embeddings"]),
    ],
)  # fmt: skip
def test_positions_told_twice_or_in_another_shape(family, config, words):
    with pytest.raises(UserError) as error:
        read(family, **config)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_is_read_has_a_kind(family):
    """What is of no kind that a field can have, or null where it must not be, is answered with the field's name."""
    for field in (field for setting in FAMILIES[family].settings for field in setting.fields):
        kind = KINDS[field]
        for value in ("32", 2.5, True, -3, 0, None, float("nan"), float("inf"), [], {}, [None], 10**400):
            if kind.fits(value) or (value is None and kind.or_null):
                continue
            with pytest.raises(UserError, match=rf"config.json: {field} = "):
                FAMILIES[family].read({field: value}, False)


@pytest.mark.parametrize(
    "field, value", [("hidden_size", "32"), ("num_hidden_layers", 2.0), ("vocab_size", True), ("rms_norm_eps", "1e-5"),
                     ("eos_token_id", "2"), ("eos_token_id", [2, "3"]), ("bos_token_id", 1.0)]
)  # fmt: skip
def test_numbers_are_numbers(field, value):
    with pytest.raises(UserError, match=f"config.json: {field} = "):
        read("llama", **{field: value})


@pytest.mark.parametrize(
    "content, words",
    [
        ("[1]", "holds [1], not an object"),
        ("null", "holds None, not an object"),
        ('{"model_type": "llama"', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"model_type": ["llama"]}', "model_type = ['llama'] is not a string"),
        ('{"architectures": "LlamaForCausalLM"}', "architectures = 'LlamaForCausalLM' is not a list"),
    ],
)
def test_a_file_that_is_no_configuration(content, words, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    assert words in str(error.value)


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "config.json").write_text("\ufeff{}", encoding="utf-8")
    assert read_config(tmp_path) == {}


def test_a_field_may_be_ignored_by_name():
    assert FAMILIES["llama"].read({"mystery": 1}, True, ["mystery"]) == read("llama")


@pytest.mark.parametrize(
    "config, family, words",
    [
        ({"model_type": "t5"}, "llama", ["--family=llama", "'t5'", "of family t5"]),
        ({"model_type": "lama"}, None, ["'lama'", "did you mean 'llama'"]),
        ({"model_type": "llama"}, "lama", ["--family=lama", "did you mean 'llama'"]),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, None, ["LlamaForCausalLM"]),
    ],
)
def test_which_family_it_is(config, family, words):
    with pytest.raises(UserError) as error:
        detect(config, family)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_layers_of_a_pattern_are_counted_through():
    """Layer n is entry n // 2 of block n % 2, and the last period may be a part."""
    shapes = {"decoder/block_0/attention_norm/scale": (3, 4), "decoder/block_1/attention_norm/scale": (2, 4)}
    pieces = pieces_of(FAMILIES["llama"].rules, "model.", shapes)
    found = {piece.theirs: (piece.ours[0], piece.index) for piece in pieces}
    assert found["model.layers.4.input_layernorm.weight"] == ("decoder/block_0/attention_norm/scale", (2,))
    assert found["model.layers.3.input_layernorm.weight"] == ("decoder/block_1/attention_norm/scale", (1,))
    assert len(found) == 5


def test_all_that_does_not_fit_is_listed():
    with pytest.raises(UserError, match=r"2 parameters .* place in this family: decoder/memory, decoder_norm/bias"):
        pieces_of(FAMILIES["llama"].rules, "", {"decoder/memory": (2,), "decoder_norm/bias": (3,)})
    pieces = pieces_of(FAMILIES["llama"].rules, "model.", {"decoder_norm/scale": (4,), "logits/kernel": (4, 9)})
    with pytest.raises(UserError) as error:
        check_tensors(
            pieces, {"lm_head.weight": (8, 4), "model.nrm.weight": (4,), "x.inv_freq": (2,)}, (r".*inv_freq",)
        )
    message = str(error.value)
    assert "1 tensor is missing: model.norm.weight (nearest there: model.nrm.weight)" in message
    assert "1 tensor has no place in the model: model.nrm.weight" in message and "inv_freq" not in message
    assert "lm_head.weight is [8, 4], not [9, 4]" in message
