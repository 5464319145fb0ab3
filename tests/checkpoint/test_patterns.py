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


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        ("*.self_attn", "'*.self_attn.*' does, such as model.layers.0.self_attn.o_proj"),
        ("*.self_attn.weight", "'*.self_attn.*' does, such as model.layers.0.self_attn.o_proj"),
        ("*.layers.?", "'*.layers.?.*' does, such as model.layers.0.mlp.up_proj"),
        ("self_attn", "'*.self_attn.*' does, such as model.layers.0.self_attn.o_proj"),
        ("layers.1", "'*.layers.1.*' does, such as model.layers.1.mlp.up_proj"),
        ("o_proj", "'*.o_proj' does, such as model.layers.0.self_attn.o_proj"),
        ("re:layers.1", "'re:.*layers.1' does, such as model.layers.1.mlp.up_proj"),
        (r"re:.*\.mlp$", r"'re:.*\\.mlp' does, such as model.layers.0.mlp.up_proj"),
        ("*.q_prj", ""),
        ("re:.*q_prj", ""),
    ],
)
@pytest.mark.parametrize("kind", ["ignore", "keep", "overrides"])
def test_what_to_write_for_a_pattern_that_means_nothing(pattern, instead, kind):
    """A glob that names a parent means none of its modules, and nothing said how to."""
    names = [
        f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.o_proj", "mlp.up_proj", "mlp_norm")
    ]
    given = {pattern: "fp8"} if kind == "overrides" else [pattern]
    (said,) = Selection.of(**{kind: given}).warnings(names)
    begin = f"pattern {pattern!r} matches no module" + (f"; {instead}" if instead else "")
    assert said == f"{begin}; `lowbit plan` lists their names"
    decisions = decide(dict.fromkeys(names, BIG), INT8, Selection.of(**{kind: given}))
    assert all(d.scheme is INT8 for n, d in decisions.items() if "norm" not in n), "nothing is widened"


def test_patterns_of_another_model_are_counted():
    """A recipe of a mixture has tens of thousands, and each had a line."""
    selection = Selection(overrides={f"model.layers.{i}.mlp.experts": "fp8" for i in range(100, 30000)})
    said = selection.warnings([f"model.layers.{i}.mlp.up_proj" for i in range(10000)])
    assert len(said) == 11 and said[0].startswith("pattern 'model.layers.100.mlp.experts' matches no module;")
    assert said[-1] == "29890 more patterns match no module, of 29900 in all; are they for this model?"


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
