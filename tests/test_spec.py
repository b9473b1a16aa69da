from __future__ import annotations

from dataclasses import dataclass, field, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxlrd import FxlrdError, Pipeline, spec
from fxlrd.passes import PASSES, Decompose, Merge, Snap


def test_parse_and_print_are_inverse():
    for text in [
        "decompose",
        "decompose{ratio=3},snap",
        "decompose{ranks=32}",
        "decompose{ranks=32x24}",
        "decompose{ranks=32x-}",
        "decompose{ratio=2.5,skip=fc|layer1.*},snap{search=algorithm1,compile=true}",
    ]:
        assert str(Pipeline.parse(text)) == text
    assert Pipeline.parse(" decompose { ratio = 2 } , snap ").passes == (Decompose(), Snap())
    assert Pipeline.parse("snap{compile=false}").passes == (Snap(compile=False),)


@given(st.floats(1.01, 100), st.sampled_from(["grid", "algorithm1"]), st.floats(0.01, 1))
def test_any_options_survive_the_text_form(ratio, search, floor):
    pipeline = Pipeline([Decompose(ratio=ratio), Snap(search=search, floor=floor)])
    again = Pipeline.parse(str(pipeline)).passes
    assert again == pipeline.passes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decompos", "unknown pass 'decompos': did you mean decompose"),
        ("decompose{ratoi=2}", "unknown option of decompose 'ratoi': did you mean ratio"),
        ("decompose{ratio=two}", "ratio=two is not a value"),
        ("decompose{ratio}", "has no value"),
        ("decompose{ranks=1.5}", "ranks=1.5 is not a value"),
        ("snap{compile=maybe}", "compile=maybe is not a value"),
        ("snap{search=gird}", "did you mean grid"),
        ("decompose{ratio=0}", "finite number above 1"),
        ("decompose,", "cannot read the passes"),
        ("decompose{ratio=2", "cannot read the passes"),
        ("", "cannot read the passes"),
        ("decompose snap", "cannot read the passes"),
    ],
)
def test_invalid_text(text, message):
    with pytest.raises(FxlrdError, match=message) as caught:
        Pipeline.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("allocate", "give one of params, flops, latency or layers"),
        ("allocate{params=0.5,flops=0.5}", "got params and flops"),
        ("allocate{latency=1}", "latency=1.0 is not a fraction"),
        ("allocate{latency=-1}", "latency=-1.0 is not a fraction"),
        ("allocate{latency=nan}", "latency=nan is not a fraction"),
        ("allocate{latency=half}", "latency=half is not a value"),
        ("allocate{latecny=0.5}", "did you mean latency"),
        ("refit{calibration=x}", "unknown option of refit 'calibration'"),
        ("recalibrate{guard=maybe}", "guard=maybe is not a value"),
    ],
)
def test_invalid_budgets_in_text_form(text, message):
    with pytest.raises(FxlrdError, match=message) as caught:
        Pipeline.parse(text)
    assert "\n" not in str(caught.value)


EVERY_OPTION = [
    "calibrate{outputs=false,patches=3,effects=4,metric=softmax,holdout=true}",
    "allocate{params=0.5}",
    "allocate{flops=0.5}",
    "allocate{layers=0.5}",
    "allocate{latency=0.25,skip=a|b.*,merge=false,compile=true,measured=8,seconds=2.5,cache=false}",
    "decompose{ratio=3.5,ranks=32x-,skip=a|b.*,beta=0.5,sweeps=2,fit=false}",
    "snap{search=algorithm1,floor=0.5,trade=1,compile=true,seconds=2.5,cache=false}",
    "merge{ratio=3.5,ranks=32,skip=a,snap=true,floor=0.5,compile=true,seconds=2.5}",
    "merge{mode=exact,skip=a|b,norms=true}",
    "merge{mode=relocate,ratio=3.5,ranks=32,skip=a}",
    "branch{groups=8,timed=true,rotate=false,skip=a,steps=3,compile=true}",
    "refit{inputs=64,guard=false}",
    "recalibrate{guard=false}",
    "freeze{schedule=sequential,epoch=3}",
]


def test_every_option_of_every_pass_survives_the_text_form():
    steps = [step for text in EVERY_OPTION for step in spec.parse(text)]
    assert [spec.text(step) for step in steps] == EVERY_OPTION
    kinds = {"bool": bool, "int": int, "float": float, "str": str, "tuple[str, ...]": tuple}
    read = set()
    for step in steps:
        for option in fields(step):
            if option.repr and getattr(step, option.name) != option.default:
                value = getattr(step, option.name)
                assert type(value) is kinds.get(option.type, type(value))
                read.add((type(step), option.name))
    assert read == {(cls, option.name) for cls in PASSES.values() for option in fields(cls) if option.repr}


def test_a_pass_of_the_users_own_is_printed_by_its_class():
    @dataclass(frozen=True)
    class Own:
        share: float = 1.0
        data: object = field(default=None, repr=False)

    assert spec.options(Own()) == {"share": 1.0, "data": None}
    assert spec.text(Own(share=0.5, data=object())) == "Own{share=0.5}"


def test_options_are_those_that_a_pass_reads():
    assert list(spec.options(Snap())) == [f.name for f in fields(Snap)]
    assert list(spec.options(Merge(mode="exact", skip="a"))) == ["mode", "skip", "norms"]
    assert spec.options(Merge(mode="exact", skip="a"))["skip"] == ("a",)
