"""The first-call check: what it says about each mistake, what it lets pass, and what it costs."""

import functools
import gc
import importlib
import sys
import timeit
import types
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import sensitivity as sa
from sensitivity import probe
from sensitivity.registry import registry
from sensitivity.userfunction import unwrapped

MISTAKES, VALID = [], []


class Framework:
    """One backend, its array module, and how to make arrays."""

    def __init__(self, name):
        self.name = name
        self.be = registry().backend(name)
        self.xp = importlib.import_module({"numpy": "numpy", "torch": "torch", "jax": "jax.numpy"}[name])
        self.dtype = self.xp.float32 if name == "jax" else self.xp.float64

    def array(self, x, grad=False, dtype=None):
        if self.name == "torch":
            return self.xp.tensor(x, dtype=dtype or self.dtype, requires_grad=grad)
        return self.xp.asarray(x, dtype=dtype or self.dtype)


@pytest.fixture(params=["numpy", "torch", "jax"])
def fw(request):
    pytest.importorskip(request.param)
    if request.param not in registry().backends:
        pytest.skip(f"no {request.param} backend")
    probe._passed.clear()
    return Framework(request.param)


def check(fw, f, u0=None, p=None, wrt=None, mode="raise"):
    """The check as `prepare` calls it."""
    u0 = fw.array([1.0, 2.0]) if u0 is None else u0
    prob = sa.ODEProblem(f, u0, (0.0, 1.0), p)
    probe.check(fw.be, prob, 0.0, u0, p, mode, wrt)


@contextmanager
def counted(f):
    """How often the Python code of `f` starts to run."""
    code = unwrapped(f).__code__
    calls = []
    sys.setprofile(lambda frame, event, arg: calls.append(1) if event == "call" and frame.f_code is code else None)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def mistake(error, what, why, fix, on=("numpy", "torch", "jax"), grad=False):
    def add(make):
        MISTAKES.append(pytest.param(make, error, (what, why, fix), on, grad, id=make.__name__))
        return make

    return add


def valid(make):
    VALID.append(pytest.param(make, id=make.__name__))
    return make


# -- mistakes ---------------------------------------------------------------------------------------------------------


@mistake(sa.SignatureError, "f(t, u) cannot be called as f(t, u, p)", "parameters", "def field(t, u, p)")
def without_parameters(fw):
    def field(t, u):
        return -u

    return field


@mistake(sa.SignatureError, "f(y, t) cannot be called", "time, state and parameters", "(t, u, p)")
def odeint_order_without_parameters(fw):
    def field(y, t):
        return -y

    return field


@mistake(sa.SignatureError, "f(du, u, p, t) cannot be called", "time, state", "def field(t, u, p)")
def in_place_form(fw):
    def field(du, u, p, t):
        du[:] = -u

    return field


@mistake(sa.SignatureError, "cannot be called", "time, state", "lambda t, u, p")
def short_lambda(fw):
    return lambda t, u: -u


@mistake(sa.SignatureError, "*, scale) cannot be called", "time, state", "def field(t, u, p)")
def keyword_only(fw):
    def field(t, u, p, *, scale):
        return scale * u

    return field


@mistake(sa.SignatureError, "(t, u) cannot be called", "time, state", "(t, u, p)")
def method_without_parameters(fw):
    class Model:
        def rate(self, t, u):
            return -u

    return Model().rate


@mistake(sa.OutputError, "f takes (y, t, p)", "time is not first", "def f(t, u, p)")
def odeint_order(fw):
    def field(y, t, p):
        return -y

    return field


@mistake(sa.OutputError, "f takes (u, p, t)", "time is not first", "def f(t, u, p)")
def sciml_order(fw):
    def field(u, p, t):
        return -u

    return field


@mistake(sa.OutputError, "shape ()", "time seems to come second", "reorder", on=("numpy", "torch"))
def order_seen_by_shape(fw):
    def field(a, b, p):
        return -1.0 * a if fw.name == "torch" else np.asarray(-1.0 * a)

    return field


@mistake(sa.OutputError, "a list of 2, u is one array of shape (2,)", "structure of u", "([...])")
def list_of_entries(fw):
    def field(t, u, p):
        return [u[1], -u[0]]

    return field


@mistake(sa.OutputError, "a tuple of 2, u is one array", "structure of u", "([...])")
def tuple_of_entries(fw):
    def field(t, u, p):
        return u[1], -u[0]

    return field


@mistake(sa.OutputError, "a list of 2", "structure of u", "([...])")
def list_of_numbers(fw):
    def field(t, u, p):
        return [1.0, 0.0]

    return field


@mistake(sa.OutputError, "f returned None", "returns du/dt", "return dudt")
def forgotten_return(fw):
    def field(t, u, p):
        -u  # noqa: B018

    return field


@mistake(sa.OutputError, "shape (), u has shape (2,)", "one entry for each", "return an array of shape (2,)")
def summed(fw):
    def field(t, u, p):
        return u.sum()

    return field


@mistake(sa.OutputError, "shape (2, 1), u has shape (2,)", "one entry for each", "dudt.reshape((2,))")
def column(fw):
    def field(t, u, p):
        return u[:, None]

    return field


@mistake(sa.OutputError, "a dict with keys 'x'", "structure of u", "return one array")
def dict_output(fw):
    def field(t, u, p):
        return {"x": u}

    return field


@mistake(sa.OutputError, "number 0.0 where u has an array of shape (2,)", "structure of u", "full_like",
         on=("torch",))
def number(fw):
    def field(t, u, p):
        return 0.0

    return field


@mistake(sa.OutputError, "a str", "structure of u", "return shape (2,)")
def text_output(fw):
    def field(t, u, p):
        return "du"

    return field


@mistake(sa.OutputError, "dtype int", "floating-point", "1.0 instead of 1")
def whole_numbers(fw):
    dtype = {"numpy": np.int64}.get(fw.name) or fw.xp.int32

    def field(t, u, p):
        return fw.array([1, 0], dtype=dtype)

    return field


@mistake(sa.OutputError, "dtype bool", "floating-point", "1.0 instead of 1")
def comparison(fw):
    def field(t, u, p):
        return u > 1.5

    return field


@mistake(sa.OutputError, "dtype complex", "imaginary part", "u0 complex")
def complex_out_of_real(fw):
    def field(t, u, p):
        return u * 1j

    return field


@mistake(sa.OutputError, "dtype object", "NumPy makes", "stack", on=("numpy",))
def object_array(fw):
    def field(t, u, p):
        return np.array([None, None])

    return field


@mistake(sa.OutputError, "array of numpy where u is an array of torch", "one framework", "torch operations",
         on=("torch",))
def numpy_output(fw):
    def field(t, u, p):
        return np.zeros(2)

    return field


@mistake(sa.ImpureFunctionError, "in place, at field", "answer would be wrong", "u * a instead of u *= a",
         on=("numpy", "torch"))
def scaled_in_place(fw):
    def field(t, u, p):
        u *= 2.0
        return u

    return field


@mistake(sa.ImpureFunctionError, "in place, at field", "answer would be wrong", "new array")
def entry_in_place(fw):
    def field(t, u, p):
        u[0] = 0.0
        return -u

    return field


@mistake(sa.ImpureFunctionError, "in place, at field", "answer would be wrong", "u.clone()", on=("torch",), grad=True)
def entry_in_place_recorded(fw):
    return entry_in_place(fw)


@mistake(sa.ImpureFunctionError, "two answers for one input", "random numbers or state", "in p", on=("numpy", "torch"))
def noise(fw):
    rng = np.random.default_rng(0)

    def field(t, u, p):
        return -u + rng.normal()

    return field


@mistake(sa.ImpureFunctionError, "two answers", "random numbers or state", "in p", on=("torch",), grad=True)
def noise_recorded(fw):
    return noise(fw)


@mistake(sa.ImpureFunctionError, "two answers for one input", "state kept inside f", "in p", on=("numpy", "torch"))
def counter(fw):
    calls = []

    def field(t, u, p):
        calls.append(t)
        return -u * len(calls)

    return field


@mistake(sa.ImpureFunctionError, "two answers", "random numbers", "f.eval()", on=("torch",))
def dropout(fw):
    class Net(fw.xp.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = fw.xp.nn.Sequential(fw.xp.nn.Linear(2, 50).double(), fw.xp.nn.Dropout(0.5),
                                           fw.xp.nn.Linear(50, 2).double())

        def forward(self, t, u, p):
            return self.net(u)

    return Net()


@mistake(sa.ImpureFunctionError, "two answers", "random numbers", "in p", on=("torch",))
def noise_beside_captured_parameters(fw):
    net = fw.xp.nn.Linear(2, 2).double()

    def field(t, u, p):
        return net(u) + fw.xp.rand(())

    return field


@mistake(sa.BrokenGradientError, "no dependence on u", ".detach()", "torch operations", on=("torch",), grad=True)
def detached(fw):
    def field(t, u, p):
        return -u.detach() * p

    return field


@mistake(sa.BrokenGradientError, "no dependence on u", "silently", "FiniteDifferenceVJP", on=("torch",), grad=True)
def through_item(fw):
    def field(t, u, p):
        return p * fw.xp.tensor([u[1].item(), u[0].item()])

    return field


@mistake(sa.BrokenGradientError, "no dependence on u", "no_grad", "torch operations", on=("torch",))
def detached_with_captured_parameters(fw):
    net = fw.xp.nn.Linear(2, 2).double()

    def field(t, u, p):
        return net(u.detach())

    return field


@mistake(sa.BrokenGradientError, "no dependence on u", "no_grad", "torch operations", on=("torch",))
def detached_in_module(fw):
    class Net(fw.xp.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = fw.xp.nn.Linear(2, 2).double()

        def forward(self, t, u, p):
            return self.net(u.detach())

    return Net()


@mistake(sa.BrokenGradientError, "no dependence on u", "no_grad", "torch operations", on=("torch",), grad=True)
def without_recording(fw):
    @fw.xp.no_grad()
    def field(t, u, p):
        return -p * u

    return field


@mistake(sa.BrokenGradientError, "no dependence on p", "lack df/dp", "from p to the result", on=("torch",), grad=True)
def parameter_through_item(fw):
    def field(t, u, p):
        return -u * p[0].item()

    return field


@mistake(sa.BrokenGradientError, "to NumPy, at field", "records nothing", "the torch function of the same name",
         on=("torch",), grad=True)
def numpy_of_recorded(fw):
    def field(t, u, p):
        return fw.xp.from_numpy(np.sin(u.numpy()))

    return field


@mistake(sa.TracingError, "Python control flow (if, while, and, or, min, max), at field", "unknown while f is traced",
         "jnp.where", on=("jax",))
def branch(fw):
    def field(t, u, p):
        if u[0] > 0:
            return -u
        return u

    return field


@mistake(sa.TracingError, "asks for the value of a traced array (float", "unknown while", "keep it an array",
         on=("jax",))
def as_float(fw):
    def field(t, u, p):
        return u * float(u[0])

    return field


@mistake(sa.TracingError, "asks for the value", "unknown while", "keep it an array", on=("jax",))
def as_item(fw):
    def field(t, u, p):
        return u * u[0].item()

    return field


@mistake(sa.TracingError, "to NumPy", "unknown while", "jax.numpy function", on=("jax",))
def numpy_function(fw):
    def field(t, u, p):
        return np.sin(u)

    return field


@mistake(sa.TracingError, "index or a count", "unknown while", "jnp.take", on=("jax",))
def traced_count(fw):
    def field(t, u, p):
        for _ in range(u[0].astype(int)):
            u = -u
        return u

    return field


@mistake(sa.TracingError, "selects entries", "unknown while", "jnp.where", on=("jax",))
def selection(fw):
    def field(t, u, p):
        return u[u > 0]

    return field


@pytest.mark.parametrize(("make", "error", "words", "on", "grad"), MISTAKES)
def test_mistake_is_named(fw, make, error, words, on, grad):
    if fw.name not in on:
        pytest.skip("not a mistake there, or it cannot be made")
    f = make(fw)
    p = fw.array([0.5, 0.25], grad=grad)
    with counted(f) as calls, pytest.raises(error) as caught:
        check(fw, f, p=p)
    e = caught.value
    assert type(e) is error
    for word, part in zip(words, e.args, strict=True):
        assert word in part
    assert str(e).startswith(f"[{error.code}] ")
    assert "why: " in str(e)
    assert "detach" not in e.args[2]
    assert "test_probe.py:" in e.args[0]
    assert unwrapped(f).__name__ in e.args[0] or error is sa.SignatureError
    assert len(calls) <= (3 if make is parameter_through_item else 2)
    with pytest.warns(sa.ProbeWarning) as seen:
        check(fw, make(fw), p=p, mode="warn")
    assert str(seen[0].message) == str(e) or make is counter
    assert seen[0].filename == __file__


def test_mistakes_are_chained_and_point_to_the_line(fw):
    def field(t, u):
        return -u

    with pytest.raises(sa.SignatureError) as caught:
        check(fw, field)
    assert isinstance(caught.value.__cause__, TypeError)
    assert f"(test_probe.py:{field.__code__.co_firstlineno})" in str(caught.value)


def test_the_offending_line_is_quoted(fw):
    if fw.name != "jax":
        pytest.skip("only tracing finds lines")

    def helper(x):
        return -x if x[0] > 0 else x  # the line to name

    def field(t, u, p):
        return helper(u)

    with pytest.raises(sa.TracingError, match=r"helper \(test_probe.py:\d+\): return -x if x\[0\] > 0 else x"):
        check(fw, field)


@pytest.mark.parametrize("error", [TypeError("unsupported argument inside"), ValueError("x"), KeyError("k"),
                                   AttributeError("a"), ZeroDivisionError("z")])
def test_errors_of_the_user_propagate_unchanged(fw, error):
    def field(t, u, p):
        raise error

    for mode in ("raise", "warn"):
        with pytest.raises(type(error)) as caught:
            check(fw, field, mode=mode)
        assert caught.value is error
        assert caught.value.__cause__ is None


def test_wrong_call_inside_f_is_the_users_own(fw):
    def inner(a):
        return a

    def field(t, u, p):
        return inner(t, u)

    with pytest.raises(TypeError, match="inner") as caught:
        check(fw, field)
    assert not isinstance(caught.value, sa.SensitivityError)


def test_without_a_signature_the_call_itself_decides(fw):
    class Opaque:
        __signature__ = "none"

        def __call__(self, t, u):
            return -u

    with pytest.raises(sa.SignatureError):
        check(fw, Opaque())


# -- structures -------------------------------------------------------------------------------------------------------


def test_container_states_are_compared(fw):
    u0 = {"x": fw.array([1.0, 2.0]), "v": fw.array([0.0])}

    def wrong_keys(t, u, p):
        return {"x": u["x"], "w": u["v"]}

    def array_instead(t, u, p):
        return u["x"]

    def wrong_leaf(t, u, p):
        return {"x": u["x"], "v": u["x"]}

    def number_leaf(t, u, p):
        return {"x": u["x"], "v": 0.0}

    def changed(t, u, p):
        u["x"] = u["x"] * 2.0
        return dict(u)

    for f, error, word in ((wrong_keys, sa.OutputError, "keys 'x', 'w'"),
                           (array_instead, sa.OutputError, "one array of shape (2,)"),
                           (wrong_leaf, sa.OutputError, "shape (2,), u has shape (1,)"),
                           (number_leaf, sa.OutputError, "the number 0.0"),
                           (changed, sa.ImpureFunctionError, "changes u in place")):
        with pytest.raises(error) as caught:
            check(fw, f, u0)
        assert word in str(caught.value)


def test_list_state_and_array_output(fw):
    u0 = [fw.array(1.0), fw.array(0.0)]

    def field(t, u, p):
        return fw.xp.stack([u[1], -u[0]])

    with pytest.raises(sa.OutputError, match="make u0 one array"):
        check(fw, field, u0)
    check(fw, lambda t, u, p: [u[1], -u[0]], u0)


def test_parameters_changed_in_place(fw):
    def container(t, u, p):
        p["a"] = p["a"] * 2.0
        return -u

    def value(t, u, p):
        p["a"] *= 2.0
        return -u

    for f in (container, value):
        with pytest.raises(sa.ImpureFunctionError, match=r"changes (p|an array) in place"):
            check(fw, f, p={"a": fw.array([1.0, 1.0])})


# -- what passes ------------------------------------------------------------------------------------------------------


@valid
def linear(fw):
    return lambda t, u, p: -p * u


@valid
def constant(fw):
    return lambda t, u, p: p


@valid
def zero(fw):
    return lambda t, u, p: fw.xp.zeros_like(u)


@valid
def zero_product(fw):
    return lambda t, u, p: 0.0 * u


@valid
def ignores_parameters(fw):
    return lambda t, u, p: u * u


@valid
def the_state_itself(fw):
    return lambda t, u, p: u


@valid
def not_finite(fw):
    return lambda t, u, p: u * float("nan")


@valid
def infinite(fw):
    return lambda t, u, p: u / 0.0 if fw.name != "numpy" else u * np.inf


@valid
def round_off(fw):
    calls = []

    def field(t, u, p):
        calls.append(1)
        return -u * (1.0 + (len(calls) % 2) * fw.xp.finfo(fw.dtype).eps)

    return field


@valid
def own_buffer(fw):
    if fw.name == "jax":
        return linear(fw)
    buffer = fw.array([0.0, 0.0])

    def field(t, u, p):
        buffer[0] = float(u[1])
        buffer[1] = float(-u[0])
        return buffer

    return field


@valid
def counts_without_effect(fw):
    calls = []

    def field(t, u, p):
        calls.append(1)
        return -u

    return field


@valid
def partial(fw):
    def field(scale, t, u, p):
        return scale * u

    return functools.partial(field, 2.0)


@valid
def partial_keyword(fw):
    def field(t, u, p, scale):
        return scale * u

    return functools.partial(field, scale=2.0)


@valid
def star(fw):
    return lambda *args: -args[1]


@valid
def default(fw):
    return lambda t, u, p=None, scale=2.0: scale * u


@valid
def other_names(fw):
    return lambda time, t, p: -t


@valid
def method(fw):
    class Model:
        def rate(self, t, u, p):
            return -u

    return Model().rate


@valid
def callable_object(fw):
    class Model:
        __slots__ = ()  # no weak references

        def __call__(self, t, u, p):
            return -u

    return Model()


@valid
def wrapped(fw):
    def inner(t, u):
        return -u

    @functools.wraps(inner)
    def outer(t, u, p):
        return inner(t, u)

    return outer


@valid
def module_or_compiled(fw):
    if fw.name == "torch":
        class Net(fw.xp.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = fw.xp.nn.Linear(2, 2).double()

            def forward(self, t, u, p):
                return self.net(u)

        return Net()
    if fw.name == "jax":
        import jax

        return jax.jit(lambda t, u, p: -u)
    return np.vectorize(lambda t, u, p: -u, otypes=[float])


USES_P = ("linear", "constant", "zero")


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("make", VALID)
def test_valid_fields_pass_silently_and_are_not_asked_again(fw, make, grad):
    if grad and fw.name != "torch":
        pytest.skip("only torch arrays ask for gradients")
    if make is own_buffer and grad:
        pytest.skip("that one does hide from AD")
    f, u0, p = make(fw), fw.array([1.0, 2.0], grad=grad), fw.array([0.5, 0.5], grad=grad)
    code = getattr(unwrapped(f), "__code__", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if code is None:
            check(fw, f, u0, p)
            return
        with counted(f) as calls:
            check(fw, f, u0, p)
        ignored = grad and make.__name__ not in USES_P
        assert 1 <= len(calls) <= (3 if ignored else 2)
        with counted(f) as calls:
            check(fw, f, u0, p)
        assert not calls


@pytest.mark.parametrize("state", [1.0, [[1.0, 2.0], [3.0, 4.0]], []], ids=["number", "matrix", "empty"])
def test_shapes_of_state(fw, state):
    check(fw, lambda t, u, p: -2.0 * u, fw.array(state))


def test_kinds_of_state(fw):
    check(fw, lambda t, u, p: {"x": u["v"], "v": -u["x"]}, {"x": fw.array([1.0]), "v": fw.array([0.0])})
    check(fw, lambda t, u, p: (u[1], -u[0]), (fw.array([1.0]), fw.array([0.0])))
    kind = fw.xp.complex64 if fw.name == "jax" else fw.xp.complex128
    check(fw, lambda t, u, p: 1j * u, fw.array([1.0, 2.0], dtype=kind))
    if fw.name == "jax":
        check(fw, lambda t, u, p: u.real, fw.array([1.0, 2.0], dtype=kind))
        check(fw, lambda t, u, p: np.array([1.0, 2.0], np.float32))
    else:
        with pytest.raises(sa.OutputError, match="dudt"):
            check(fw, lambda t, u, p: u.real, fw.array([1.0, 2.0], dtype=kind))
    check(fw, lambda t, u, p: u * p["k"] * len(p["name"]) * p["n"], p={"k": fw.array(1.0), "name": "ab", "n": 3})
    check(fw, lambda t, u, p: sum((u for _ in range(p)), 0.0 * u), p=3)


def test_precision_is_a_warning_once(fw):
    half = fw.xp.float16

    def field(t, u, p):
        return fw.be.xp.astype(u, half) if fw.name == "torch" else u.astype(half)

    with pytest.warns(sa.ProbeWarning, match="dtype float16, u has float") as seen:
        check(fw, field)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(fw, field)


# -- gradients asked for ----------------------------------------------------------------------------------------------


def test_a_black_box_may_be_solved_without_gradients():
    torch = pytest.importorskip("torch")
    fw = Framework("torch")

    def black_box(t, u, p):
        return torch.from_numpy(-u.numpy() * p.numpy())

    check(fw, black_box, p=fw.array([1.0, 2.0]))
    p = fw.array([1.0, 2.0], grad=True)
    with torch.no_grad():
        check(fw, lambda t, u, p: -u.detach() * p, p=p)
    check(fw, lambda t, u, p: -u.detach() * p, p=p, wrt=())
    check(fw, lambda t, u, p: -u.detach() * p, p=p.detach())
    for wrt in (("u0",), ("u0", "p")):
        with pytest.raises(sa.BrokenGradientError):
            check(fw, black_box, p=fw.array([1.0, 2.0]), wrt=wrt)
    check(fw, lambda t, u, p: -u * p[0].item(), p=fw.array([1.0]), wrt=("u0",))
    with pytest.raises(sa.BrokenGradientError, match="no dependence on p"):
        check(fw, lambda t, u, p: -u * p[0].item(), p=fw.array([1.0]), wrt=("p",))


def test_difference_products_ask_for_no_ad():
    prob = sa.ODEProblem(lambda t, u, p: -u, np.ones(2), (0.0, 1.0))
    numeric = sa.RecursiveCheckpointAdjoint(vjp=sa.FiniteDifferenceVJP())
    assert probe.through_ad(prob, numeric, ("p",)) == ()
    assert probe.through_ad(prob, sa.RecursiveCheckpointAdjoint(vjp=sa.ReverseVJP()), ("p",)) == ("p",)
    assert probe.through_ad(prob, sa.auto, ("p",)) == ("p",)
    assert probe.through_ad(prob, sa.auto) is None
    assert probe.through_ad(prob.remake(vjp=lambda *a: a), sa.auto, ("p",)) == ()
    assert probe.through_ad(prob, sa.DirectAdjoint(vjp=sa.FiniteDifferenceVJP()), ("p",)) == ("p",)


def test_third_evaluation_only_where_a_wanted_parameter_is_ignored():
    pytest.importorskip("torch")
    fw, seen = Framework("torch"), {}
    fields = {"used": lambda t, u, p: -p * u, "ignored": lambda t, u, p: -u, "constant": lambda t, u, p: p}
    for name, f in fields.items():
        with counted(f) as calls:
            check(fw, f, p=fw.array([1.0, 2.0], grad=True))
        seen[name] = len(calls)
    assert seen == {"used": 2, "ignored": 3, "constant": 2}


# -- remembering ------------------------------------------------------------------------------------------------------


def test_a_new_shape_or_dtype_is_checked_again(fw):
    def field(t, u, p):
        return -u

    for u0 in (fw.array([1.0]), fw.array([1.0, 2.0]), fw.array(1.0), fw.array([1.0], dtype=fw.xp.float16)):
        with counted(field) as calls:
            check(fw, field, u0)
            check(fw, field, u0)
        assert len(calls) == (1 if fw.name == "jax" else 2)


def test_what_was_only_warned_about_still_raises(fw):
    def field(t, u, p):
        return [u[0], u[1]]

    with pytest.warns(sa.ProbeWarning):
        check(fw, field, mode="warn")
    for _ in range(2):
        with pytest.raises(sa.OutputError):
            check(fw, field)


def test_a_lambda_in_a_loop_is_checked_once_and_a_closure_each_time():
    fw, calls = Framework("numpy"), []
    probe._passed.clear()
    for _ in range(3):
        f = lambda t, u, p: -u  # noqa: E731
        with counted(f) as seen:
            check(fw, f)
        calls.append(len(seen))
    assert calls == [2, 0, 0]
    for scale in (1.0, "a"):
        f = lambda t, u, p: scale * u  # noqa: B023, E731
        if scale == 1.0:
            check(fw, f)
        else:
            with pytest.raises(Exception, match="type"):
                check(fw, f)


def test_a_function_at_the_address_of_a_freed_one_is_checked():
    fw = Framework("numpy")
    kept = {}

    def make(scale):
        return lambda t, u, p: scale * u

    for i in range(200):
        f = make(1.0)
        with counted(f) as calls:
            check(fw, f)
        assert len(calls) == 2
        kept.setdefault(id(f), []).append(i)
        del f
    assert any(len(v) > 1 for v in kept.values())  # addresses were used again
    gc.collect()


def test_memory_is_bounded():
    fw = Framework("numpy")
    for i in range(probe.CAPACITY + 50):
        check(fw, functools.partial(lambda s, t, u, p: s * u, float(i)))
    assert len(probe._passed) <= probe.CAPACITY


def test_callable_pytrees_are_known_by_structure():
    eqx = pytest.importorskip("equinox")
    fw = Framework("jax")
    calls = []

    class Net(eqx.Module):
        w: object

        def __call__(self, t, u, p):
            calls.append(1)
            return self.w * u

    for i in range(3):
        check(fw, Net(fw.array([1.0, 1.0]) * i))
    assert len(calls) == 1


# -- through the interface --------------------------------------------------------------------------------------------


def test_solve_checks_by_default(fw):
    prob = sa.ODEProblem(lambda t, u, p: [u[1], -u[0]], fw.array([1.0, 0.0]), (0.0, 0.1))
    with pytest.raises(sa.OutputError):
        sa.solve(prob, sa.Tsit5())
    with pytest.raises(sa.InputError, match="probe="):
        sa.solve(prob, sa.Tsit5(), probe=True)
    with pytest.raises(sa.OutputError):
        sa.gradient(prob, sa.Tsit5(), loss=lambda sol: sol.u.sum(), wrt="u0")


def test_probe_off_leaves_f_alone():
    def field(t, u, p):
        field.calls += 1
        return -u

    prob = sa.ODEProblem(field, np.ones(2), (0.0, 0.1))
    used = {}
    for mode in ("off", "raise"):
        probe._passed.clear()
        field.calls = 0
        sa.solve(prob, sa.Euler(), dt=0.1, probe=mode)
        used[mode] = field.calls
    assert used["raise"] == used["off"] + 2


def test_autograd_boxes_do_not_reach_f():
    grad = pytest.importorskip("autograd").grad
    if "autograd" not in registry().backends:
        pytest.skip("no autograd plugin")
    seen = []

    def field(t, u, p):
        seen.append(type(p))
        return -p * u

    prob = sa.ODEProblem(field, np.ones(2), (0.0, 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grad(lambda p: sa.solve(prob.remake(p=p)).u.sum())(np.ones(2))
    assert seen[:2] == [np.ndarray, np.ndarray]


def test_import_of_the_check_needs_no_framework():
    source = Path(probe.__file__).read_text()
    assert "import torch" not in source
    assert "import jax" not in source


@pytest.mark.timing
def test_the_check_is_cheap():
    fw, u0, p = Framework("numpy"), np.ones(2), np.ones(2)

    def field(t, u, p):
        return -p * u

    prob = sa.ODEProblem(field, u0, (0.0, 1.0), p)

    def first():
        probe._passed.clear()
        probe.check(fw.be, prob, 0.0, u0, p, "raise")

    def twice():
        field(0.0, u0, p)
        field(0.0, u0, p)

    spent = min(timeit.repeat(first, number=1000, repeat=20)) / 1000
    alone = min(timeit.repeat(twice, number=1000, repeat=20)) / 1000
    assert spent - alone < 100e-6  # 23 microseconds on an idle core
    again = min(timeit.repeat(lambda: probe.check(fw.be, prob, 0.0, u0, p, "raise"), number=1000, repeat=20)) / 1000
    assert again < 25e-6


def test_types_of_anchor():
    """Identity by code only where nothing else can change what a function does."""
    fw = Framework("numpy")

    def plain(t, u, p):
        return u

    def with_default(t, u, p, a=1.0):
        return a * u

    assert isinstance(probe.identity(fw.be, plain)[0], types.CodeType)
    assert probe.identity(fw.be, with_default)[0] is with_default
