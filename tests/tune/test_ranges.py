"""The words that say what a setting is searched over."""

import math

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune.ranges import Choice, Range, parse


@pytest.mark.parametrize(
    ("word", "name", "values"),
    [
        ("optim.lr=log(1e-5,1e-3)", "optim.lr", Range("log", 1e-5, 1e-3)),
        ("loss.temperature = uniform( .01 , 0.1 )", "loss.temperature", Range("uniform", 0.01, 0.1)),
        ("batch.classes=int(16,64)", "batch.classes", Range("int", 16, 64)),
        ("encoder.dim=[128,512]", "encoder.dim", Choice((128, 512))),
        ("x=[ 1, 1.5, -2e3, true, None, resnet50 ]", "x", Choice((1, 1.5, -2e3, True, None, "resnet50"))),
        ("x=[1,true]", "x", Choice((1, True))),
        ("x=[sgd]", "x", Choice(("sgd",))),
    ],
)
def test_words_are_read(word: str, name: str, values: Range | Choice) -> None:
    assert parse(word) == (name, values)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr", "--space 'optim.lr': write name=range, e.g. optim.lr=log(1e-5,1e-3)"),
        ("=log(1,2)", "write name=range"),
        ("optim.lr=", "write name=range"),
        ("optim.lr=0.1", "is none of uniform(low,high), log(low,high), int(low,high), [a,b,c]"),
        ("optim.lr=lgo(1,2)", "unknown range 'lgo'; valid: log, "),
        ("optim.lr=log(1)", "log(1) needs two numbers, log(low,high)"),
        ("optim.lr=log(1,2,3)", "needs two numbers"),
        ("optim.lr=log(a,b)", "needs two numbers"),
        ("optim.lr=uniform(nan,1)", "needs two numbers"),
        ("optim.lr=uniform(0,1e999)", "beyond what a number holds"),
        ("optim.lr=uniform(2,1)", "needs low < high, got 2 and 1"),
        ("optim.lr=uniform(1,1)", "needs low < high, got 1 and 1"),
        ("optim.lr=log(0,1)", "--space optim.lr: log(0,1) needs low > 0, got 0: a log scale has no 0"),
        ("optim.lr=log(-1,1)", "needs low > 0"),
        ("batch.classes=int(1.5,4)", "int(1.5,4) needs whole numbers"),
        ("encoder.dim=[128", "has no closing bracket"),
        ("encoder.dim=[]", "has an empty place"),
        ("encoder.dim=[128,,512]", "has an empty place"),
        ("encoder.dim=[128,128.0]", "names 128.0 twice"),
        ("x=uniform(__import__('os').system('true'),1)", "needs two numbers"),
    ],
)
def test_what_is_wrong_is_said(word: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(word)
    assert message in str(error.value)


def ranges() -> st.SearchStrategy[Range | Choice]:
    ends = st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)).filter(lambda pair: pair[0] < pair[1])
    positive = st.tuples(st.floats(1e-9, 1e6), st.floats(1e-9, 1e6)).filter(lambda pair: pair[0] < pair[1])
    whole = st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000)).filter(lambda pair: pair[0] < pair[1])
    words = st.lists(st.sampled_from([3, 2.5, True, False, None, "adam", "sgd"]), min_size=1, unique_by=repr)
    return st.one_of(
        ends.map(lambda pair: Range("uniform", *pair)),
        positive.map(lambda pair: Range("log", *pair)),
        whole.map(lambda pair: Range("int", *pair)),
        words.map(lambda values: Choice(tuple(values))),
    )


@given(ranges(), st.integers(1, 6), st.floats(-1e7, 1e7))
def test_all_that_a_range_gives_lies_in_it(values: Range | Choice, points: int, anywhere: float) -> None:
    for value in (*values.grid(points), *values.samples(), values.nearest(anywhere)):
        assert values.holds(value), value
    assert len({*values.grid(points)}) == len(values.grid(points))


@given(ranges())
def test_optuna_stays_within_a_range(values: Range | Choice) -> None:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    assert values.holds(values.suggest(trial, "x"))


def test_a_grid_is_even_on_its_own_scale() -> None:
    assert Range("uniform", 0, 1).grid(3) == (0, 0.5, 1)
    assert Range("log", 1e-4, 1e-2).grid(3) == pytest.approx((1e-4, 1e-3, 1e-2))
    assert Range("int", 1, 3).grid(10) == (1, 2, 3)
    assert Range("log", 1, 100).grid(1) == (pytest.approx(10),)
    assert Choice(("a", "b")).grid(1) == ("a", "b")


def test_true_is_not_one() -> None:
    assert not Choice((1, 2)).holds(True)
    assert not Range("int", 0, 2).holds(True)
    assert not Range("int", 0, 2).holds(0.5)
    assert not Range("uniform", 0, 2).holds(math.nan)
