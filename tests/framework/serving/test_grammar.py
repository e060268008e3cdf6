"""Texts drawn at random among the tokens that a grammar allows are what it says."""

import functools
import json
import re

import jsonschema
import numpy as np
import pytest
from small_vocabularies import vocabulary

from meshway.framework.errors import UserError
from meshway.framework.serving.grammar import MAX_SIZE, Grammars

KINDS = ["bytes", "SentencePiece", "byte-level"]
PADDING = 7  # logits of no id


@functools.cache
def tokens(kind, stops=True):
    made = vocabulary(kind)
    own = made.eos_id if made.eos_id is not None else min(made.marks)
    return Grammars(made, (own,) if stops else (), made.size + PADDING)


def drawn(kind, grammar, seed, limit=600, stops=True):
    """Returns (text, whether it is over) of random tokens among those allowed."""
    rng, made, matcher, ids = np.random.default_rng(seed), vocabulary(kind), grammar.matcher(), []
    end = tokens(kind)._stop[0]
    for _ in range(limit):
        mask = matcher.mask()
        assert mask.dtype == bool and mask.shape == (made.size + PADDING,) and not mask[made.size :].any()
        assert mask[end] == (matcher.complete and stops)
        logits = np.where(mask, rng.normal(size=mask.shape), -np.inf)
        ids.append(int(logits.argmax()))
        if matcher.accept(ids[-1]):
            return made.decode([token for token in ids if token != end]), True
    return made.decode(ids), False


NODE = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
NODE |= {"required": ["next"], "additionalProperties": False}
SCHEMAS = {
    "integer": {"type": "integer"},
    "range": {"type": "integer", "minimum": -3, "maximum": 120},
    "number": {"type": "number"},
    "text": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-F]{2}-[0-9]{4}$"},
    "format": {"type": "string", "format": "date"},
    "enum": {"enum": ["red", "gr\u00fcn", 3, None, {"a": [True]}]},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"enum": ["x", "y"]}], "items": False, "minItems": 2},
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 4},
            "age": {"type": "integer"},
            "on": {"type": "boolean"},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
            "at": {"const": {"x": 1}},
        },
        "required": ["tags", "at"],
        "additionalProperties": False,
    },
    "recursive": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "either": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}, {"const": 7}]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_random_texts_are_what_a_schema_says(name, kind):
    grammar, over = tokens(kind).of_json_schema(SCHEMAS[name]), 0
    for seed in range(4):
        text, is_over = drawn(kind, grammar, seed)
        over += is_over
        if is_over:
            jsonschema.Draft202012Validator(SCHEMAS[name]).validate(json.loads(text))
    assert over > 2


REGEXES = [r"[a-c]{2,3}|\d+", r" a b?", "(?i)yes|no", "\u2603{3}x*", r"([a-zé☃]{1,3} ){2}\."]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regex", REGEXES)
def test_random_texts_match_a_regular_expression(regex, kind):
    for seed in range(4):
        text, is_over = drawn(kind, tokens(kind).of_regex(regex), seed)
        assert is_over and re.fullmatch(regex, text), text


@pytest.mark.parametrize("kind", KINDS)
def test_random_texts_are_choices(kind):
    choices = ["a", "ab", " a", "(.*)\n#", "\u2603 \u6771", "</s>"]
    found = {drawn(kind, tokens(kind).of_choices(choices), seed) for seed in range(40)}
    assert found <= {(each, True) for each in choices} and len(found) > 3


def test_any_json_object():
    grammar = tokens("bytes").of_json_object()
    found = [
        json.loads(text) for text, is_over in (drawn("bytes", grammar, seed, 4000) for seed in range(6)) if is_over
    ]
    assert found and all(isinstance(each, dict) for each in found)
    accepted(grammar, "bytes", '{"a": [1, {"b":\n    null}]}')


def accepted(grammar, kind, text):
    matcher = grammar.matcher()
    over = [matcher.accept(token) for token in vocabulary(kind).encode(text)]
    assert matcher.complete
    return over


def test_a_text_that_is_cut_off_is_not_complete():
    """Its caller says so: finish_reason length."""
    schema = {"type": "string", "minLength": 50}
    text, is_over = drawn("bytes", tokens("bytes").of_json_schema(schema), 0, limit=20)
    assert not is_over and text.startswith('"')


def test_matchers_of_a_grammar_know_nothing_of_each_other():
    grammar = tokens("bytes").of_choices(["left", "right"])
    first, second = grammar.matcher(), grammar.matcher()
    first.accept(vocabulary("bytes").encode("l")[0])
    assert first.mask().sum() == 1 and second.mask().sum() == 2
    with pytest.raises(ValueError, match="does not allow token"):
        second.accept(vocabulary("bytes").encode("x")[0])
    assert second.mask().sum() == 2  # as it was


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_token_that_ends_it_a_text_is_over_when_nothing_can_follow(kind):
    grammar = tokens(kind, stops=False).of_regex("a{2}b?")
    assert drawn(kind, grammar, 0, stops=False) == ("aab", True)


@pytest.mark.parametrize("stops", [True, False])
def test_after_the_end_of_a_text_nothing_counts(stops):
    """A step may be under way when the end is read."""
    matcher = tokens("bytes", stops).of_regex("ab?").matcher()
    for token, over in zip(vocabulary("bytes").encode("ab"), (False, True), strict=True):
        assert matcher.accept(token) == over
    assert matcher.mask().sum() == (1 if stops else vocabulary("bytes").size + PADDING)
    assert matcher.accept(1) and matcher.accept(77) and matcher.complete


@pytest.mark.parametrize(
    "make, given, message",
    [
        ("json_schema", {"not": {"type": "string"}}, r"json_schema: Unimplemented keys: \[\"not\"\]"),
        ("json_schema", {"enum": []}, "json_schema: Unsatisfiable schema"),
        ("json_schema", False, "json_schema: Unsatisfiable schema"),
        (
            "json_schema",
            {"type": "integer", "minimum": 5, "maximum": 3},
            r"minimum \(5\) is greater than maximum \(3\)",
        ),
        ("json_schema", {"$ref": "http://localhost/x.json"}, "not present in a registry"),
        ("json_schema", {"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}, "json_schema: no text fits"),
        ("json_schema", {"type": "string", "pattern": "a("}, "unclosed group"),
        ("json_schema", ["no"], "a schema is an object"),
        ("json_schema", {"const": float("nan")}, "not JSON"),
        ("json_schema", {"enum": ["x" * MAX_SIZE]}, "more than the 131,072 that are compiled"),
        ("regex", "a(", "regex: unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "[a&&b]", "regex: no text fits"),
        ("regex", 7, "must be a text, not 7"),
        ("regex", "\ud800", "regex: not a text: surrogates not allowed"),
        ("json_schema", {"x-guidance": [1]}, "x-guidance must be an object"),
        ("json_schema", {"const": "\ud800"}, "json_schema: "),
        ("choices", [], "give a list of texts"),
        ("choices", "ab", "give a list of texts"),
        ("choices", ["a", ""], "none empty"),
    ],
)
def test_what_cannot_be_asked_for_is_said(make, given, message):
    with pytest.raises(UserError, match=message):
        getattr(tokens("bytes"), f"of_{make}")(given)


def deep(depth):
    return functools.reduce(lambda inner, _: {"type": "array", "items": inner}, range(depth), {"type": "null"})


@pytest.mark.parametrize(
    "make, given",
    [
        ("json_schema", deep(200)),
        ("json_schema", deep(900)),
        ("json_schema", {"properties": {f"p{n}": {"type": "string"} for n in range(1000)}}),
        ("json_schema", {"allOf": [{"anyOf": [{"required": [f"{n}{m}"]} for m in "ab"]} for n in range(20)]}),
        ("json_schema", {"type": "string", "minLength": 5000, "pattern": "^(a|b)*a(a|b)*$"}),
        ("regex", "(" * 20000 + "a" + ")" * 20000),
        ("regex", "((a{1,1000}){1,1000}){1,1000}"),
        ("regex", ".*a.{1000}"),
        ("choices", [f"value {n}" for n in range(5000)]),
    ],
    ids=["deep", "deeper", "wide", "both", "long", "parentheses", "repeats", "states", "choices"],
)
def test_large_and_deep_grammars_are_compiled_or_refused_and_never_end_the_process(make, given):
    try:
        matcher = getattr(tokens("bytes"), f"of_{make}")(given).matcher()
        for _ in range(20):
            if matcher.accept(int(matcher.mask().argmax())):
                break
    except UserError as error:
        assert 10 < len(str(error)) < 400 and "\n" not in str(error)


def test_a_vocabulary_that_cannot_say_it_is_told():
    with pytest.raises(UserError, match="json_object: no text fits"):  # it has no brace
        Grammars(vocabulary("WordPiece"), ()).of_json_object()
    with pytest.raises(UserError, match="cannot follow a grammar: the text of an id depends on those around it"):
        Grammars(vocabulary("suffix"), ())
