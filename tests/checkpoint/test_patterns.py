"""Patterns: names, globs, regular expressions, and thousands of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.checkpoint.patterns import Patterns
from lowbit.checkpoint.rules import Selection, decide
from lowbit.errors import InputError
from lowbit.scheme import get_scheme

INT8 = get_scheme("int8")
BIG = (256, 256)


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head.weight", "lm_head", True),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("*.down_proj", "model.layers.1.mlp.down_proj", True),
        ("*.down_proj", "model.layers.1.mlp.down_proj.lora", False),
        ("*.down_proj.weight", "model.layers.1.mlp.down_proj", True),
        ("model.layers.[01].*", "model.layers.1.mlp.up_proj", True),
        ("model.layers.?.mlp.*", "model.layers.12.mlp.up_proj", False),
        ("re:.*mlp", "model.layers.1.mlp.up_proj", True),
        ("re:mlp", "model.layers.1.mlp.up_proj", False),
        ("up_proj", "model.layers.1.mlp.up_proj", False),
        ("MODEL.*", "model.x", False),
    ],
)
def test_patterns(pattern, module, expected):
    assert Patterns([pattern]).matching(module) == [pattern] * expected


@given(st.text(max_size=12), st.text(max_size=12))
def test_any_pattern_is_either_refused_or_answered(pattern, module):
    for text in (pattern, "re:" + pattern, "*" + pattern):
        try:
            found = Patterns([text]).matching(module)
        except InputError:
            continue
        assert found in ([], [text])


def test_a_broken_pattern_is_named():
    with pytest.raises(InputError, match=r"pattern 're:\(': expected a regular expression after 're:'"):
        decide({"a": BIG}, INT8, Selection(keep=("re:(",)))


def test_unmatched_patterns():
    selection = Selection(ignore=("a", "typo"), keep=("b*",), overrides={"re:c": "fp8", "d": "fp8"})
    assert selection.unmatched(["a.x", "bb", "c"]) == ["typo", "d"]


def test_all_that_mean_a_module_in_the_order_given():
    matching = ["re:.*proj", "model.layers.1", "*.up_proj", "model.layers.1.mlp.up_proj"]
    others = [f"other.{i}" for i in range(7)]
    patterns = Patterns([others[0], matching[0], *others[1:], *matching[1:], "model.layers.2"])
    assert patterns.matching("model.layers.1.mlp.up_proj") == matching
    both = patterns.matching("model.layers.2.mlp.up_proj", "model.layers.1.x")
    assert both == [*matching[:3], "model.layers.2"]


def test_the_first_override_decides_whatever_its_kind():
    module = "model.layers.1.mlp.up_proj"
    names = {module: "fp8", "*.up_proj": "mxfp8", "re:.*": "float"}
    for first in names:
        overrides = {first: names[first], **names}
        assert decide({module: BIG}, INT8, Selection(overrides=overrides))[module].reason == (
            f"override {first}" + (": float" if first == "re:.*" else "")
        )


def test_names_are_looked_up_and_not_tried():
    """A recipe for a trillion parameters has a name for each of tens of thousands of experts."""

    class Counted(str):
        compared = 0

        def __eq__(self, other):
            Counted.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

        def removesuffix(self, suffix):
            return self

    names = [Counted(f"model.layers.{i}.mlp.down_proj") for i in range(1000)]
    shapes = dict.fromkeys(map(str, names), BIG)
    decisions = decide(shapes, INT8, Selection(overrides=dict.fromkeys(names, "fp8")))
    assert {d.scheme.name for d in decisions.values()} == {"fp8"}
    assert Counted.compared < 20 * len(names)
