"""Vector fields of other tools give the gradients of our own form, in every framework."""

import numpy as np
import pytest

import sensitivity as sa

P = [1.5, 1.0, 3.0, 1.0]
ALL = ("from_scipy", "from_odeint", "from_torchdiffeq", "from_sciml")


def solved(prob):
    return sa.gradient(prob, sa.Tsit5(), lambda sol: (sol.u**2).sum(), saveat=3, rtol=1e-6)


@pytest.fixture(scope="module")
def own(lab):
    """Gradient of the problem as it is written here."""
    return solved(lab.lotka_volterra(2.0))


def check(lab, f, own, p=None):
    prob = lab.lotka_volterra(2.0)
    r = solved(prob.remake(f=f, p=prob.p if p is None else p))
    np.testing.assert_allclose(lab.numpy(r.value), lab.numpy(own.value), rtol=1e-14)
    np.testing.assert_allclose(lab.numpy(r.u0), lab.numpy(own.u0), rtol=1e-12)
    got = np.array([float(v) for v in r.p]) if isinstance(r.p, tuple) else lab.numpy(r.p)
    np.testing.assert_allclose(got, lab.numpy(own.p), rtol=1e-12)


def test_scipy_spreads_arguments(lab, own):
    def f(t, y, a, b, c, d):
        return [a * y[0] - b * y[0] * y[1], -c * y[1] + d * y[0] * y[1]]

    check(lab, sa.from_scipy(f), own)
    check(lab, sa.from_scipy(f), own, tuple(lab.array(v) for v in P))
    check(lab, sa.from_scipy(lambda t, y, *args: f(t, y, *args)), own, tuple(lab.array(v) for v in P))


def test_odeint_and_one_argument(lab, own):
    def f(y, t, p):
        return lab.xp.stack([p[0] * y[0] - p[1] * y[0] * y[1], -p[2] * y[1] + p[3] * y[0] * y[1]])

    check(lab, sa.from_odeint(f), own)


def test_sciml(lab, own):
    def f(u, p, t):
        return lab.xp.stack([p[0] * u[0] - p[1] * u[0] * u[1], -p[2] * u[1] + p[3] * u[0] * u[1]])

    check(lab, sa.from_sciml(f), own)


def filling(du, u, p, t):
    du[0] = p[0] * u[0] - p[1] * u[0] * u[1]
    du[1] = -p[2] * u[1] + p[3] * u[0] * u[1]


def test_sciml_in_place(lab, own):
    """PyTorch sees through it, JAX cannot, and NumPy says that it takes differences."""
    if lab.name == "jax":
        with pytest.raises(sa.ImpureFunctionError, match="in place"):
            check(lab, sa.from_sciml(filling), own)
    elif lab.name == "torch":
        check(lab, sa.from_sciml(filling), own)
    else:
        with pytest.warns(sa.NumericalDerivativeWarning):
            r = solved(lab.lotka_volterra(2.0).remake(f=sa.from_sciml(filling)))
        np.testing.assert_allclose(r.p, own.p, rtol=1e-7)


def test_torchdiffeq(lab):
    """No parameters: what `f` closes over, and modules, work as with any `f`."""
    a = lab.array(0.5)
    f = sa.from_torchdiffeq(lambda t, y: -a * y)
    sol = sa.solve(sa.ODEProblem(f, lab.array([1.0]), (0.0, 2.0)), sa.Tsit5(), rtol=1e-8)
    assert float(sol.u[0, 0]) == pytest.approx(np.exp(-1.0), rel=1e-7)
    if lab.name == "torch":
        import torch

        class Layer(torch.nn.Linear):
            def forward(self, t, y):
                return super().forward(y)

        layer = Layer(1, 1, bias=False, dtype=torch.float64)
        sol = sa.solve(sa.ODEProblem(sa.from_torchdiffeq(layer), lab.array([1.0]), (0.0, 2.0)), sa.Tsit5(), rtol=1e-8)
        sol.u.sum().backward()
        assert layer.weight.grad.item() == pytest.approx(2.0 * sol.u.item(), rel=1e-6)


def test_equal_functions_make_equal_fields():
    """So that a compiled solve is found again."""
    assert sa.from_sciml(filling) == sa.from_sciml(filling)
    assert hash(sa.from_sciml(filling)) == hash(sa.from_sciml(filling))


@pytest.mark.parametrize("name", ALL)
def test_what_cannot_be_adapted(name):
    adapt = getattr(sa, name)
    for f in (3, lambda t: t):
        with pytest.raises(sa.SignatureError, match=name):
            adapt(f)


def test_wrong_numbers_of_arguments():
    with pytest.raises(sa.SignatureError, match="from_scipy"):
        sa.from_torchdiffeq(lambda t, y, p: y)
    with pytest.raises(sa.SignatureError, match="2 arguments"):
        sa.from_sciml(lambda u, t: u)


def test_messages_name_the_adapter(numpy_lab):
    """Where the first-call check sees a foreign order of arguments it says what to wrap `f` with."""
    prob = numpy_lab.lotka_volterra()
    for f, name in ((lambda u, t: -u, "from_odeint"), (lambda t, y: -y, "from_scipy"),
                    (lambda du, u, p, t: None, "from_sciml")):
        with pytest.raises(sa.SensitivityError) as e:
            sa.solve(prob.remake(f=f), sa.Tsit5())
        assert f"sa.{name}(f)" in str(e.value)
