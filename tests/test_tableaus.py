"""Tableaus against the order conditions, and the orders that the methods show in practice."""

import itertools
from functools import cache
from math import prod

import numpy as np
import pytest

import sensitivity as sa
from sensitivity import tableaus
from sensitivity.control import FixedStep

METHODS = {"Euler": 1, "Heun": 2, "Midpoint": 2, "EES25": 2, "EES27": 2, "RK4": 4, "BS3": 3, "Dopri5": 5,
           "Tsit5": 5, "Dopri8": 8}
EMBEDDED = {"Heun": 1, "Midpoint": 1, "EES25": 1, "EES27": 1, "BS3": 2, "Dopri5": 4, "Tsit5": 4, "Dopri8": 7}
FSAL = {"BS3", "Dopri5", "Tsit5", "Dopri8"}
DENSE = {"Euler": 1, "BS3": 3, "Dopri5": 4, "Tsit5": 4, "Dopri8": 5}


def table(name):
    return getattr(sa, name).base


# -- rooted trees -------------------------------------------------------------------------------------------------


@cache
def trees(order):
    """All rooted trees with `order` nodes, each a sorted tuple of subtrees (Hairer, Norsett, Wanner I, II.2)."""
    if order == 1:
        return ((),)
    found = set()
    for split in splits(order - 1, order - 1):
        for children in itertools.product(*(trees(n) for n in split)):
            found.add(tuple(sorted(children)))
    return tuple(sorted(found))


def splits(total, largest):
    """Partitions of `total` into parts of at most `largest`."""
    if total == 0:
        yield ()
    for n in range(min(total, largest), 0, -1):
        for rest in splits(total - n, n):
            yield (n, *rest)


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    """gamma(tree): the product of the sizes of all subtrees."""
    return size(tree) * prod(map(density, tree))


def weights(A, tree):
    """Elementary weights of the stages: the vector Phi with `b . Phi = 1 / gamma` as order condition."""
    return np.prod([A @ weights(A, child) for child in tree], axis=0) if tree else np.ones(len(A))


def matrix(tab):
    A = np.zeros((tab.stages, tab.stages))
    for i, row in enumerate(tab.a):
        A[i, : len(row)] = row
    return A


def defects(tab, b, order):
    """How far the weights `b` are from each condition of one order."""
    A = matrix(tab)
    return [float(np.dot(b, weights(A, tree)) - 1 / density(tree)) for tree in trees(order)]


def test_numbers_of_trees():
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


# The largest coefficients are about 40, so sums of products of them keep about 14 digits.
EXACT = 1e-13


@pytest.mark.parametrize(("name", "order"), METHODS.items())
def test_order_conditions(name, order):
    tab = table(name)
    assert tab.order == order
    for n in range(1, order + 1):
        np.testing.assert_allclose(defects(tab, tab.b, n), 0.0, atol=EXACT)
    assert max(map(abs, defects(tab, tab.b, order + 1))) > 1e-6


@pytest.mark.parametrize(("name", "order"), EMBEDDED.items())
def test_embedded_order(name, order):
    tab = table(name)
    embedded = np.array(tab.b) - np.array(tab.error)
    for n in range(1, order + 1):
        np.testing.assert_allclose(defects(tab, embedded, n), 0.0, atol=EXACT)
    # If the embedded weights had the full order too, the difference would say nothing about the error.
    assert max(map(abs, defects(tab, embedded, order + 1))) > 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_row_sums(name):
    tab = table(name)
    np.testing.assert_allclose(matrix(tab).sum(axis=1), tab.c, atol=EXACT)
    assert [len(row) for row in tab.a] == list(range(tab.stages))


@pytest.mark.parametrize("name", METHODS)
def test_fsal(name):
    tab = table(name)
    assert tab.fsal == (name in FSAL)
    if tab.fsal:
        np.testing.assert_array_equal(tab.a[-1], tab.b[:-1])
        assert tab.c[-1] == 1.0
        assert tab.b[-1] == 0.0


def weights_at(tab, x):
    return np.array([sum(d * x ** (k + 1) for k, d in enumerate(row)) for row in tab.dense])


@pytest.mark.parametrize("name", METHODS)
def test_dense_weights(name):
    """At the end the dense output is the step, inside it fulfils its order conditions, and it starts with slope k_1."""
    tab = table(name).with_endpoint() if table(name).dense is None else table(name)
    np.testing.assert_allclose(weights_at(tab, 1.0), tab.b, atol=1e-12)
    assert tab.dense_order == DENSE.get(name, min(METHODS[name], 3))
    A = matrix(tab)
    for order in range(1, tab.dense_order + 1):
        for tree in trees(order):
            for x in (0.2, 0.55, 0.9):
                value = np.dot(weights_at(tab, x), weights(A, tree))
                assert value == pytest.approx(x**order / density(tree), abs=1e-12)
    if name != "Euler":
        first = np.array([row[0] for row in tab.dense])
        np.testing.assert_allclose(first, np.eye(tab.stages)[0], atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_with_endpoint_keeps_the_method(name):
    tab, more = table(name), table(name).with_endpoint()
    assert more.fsal
    assert more.order == tab.order
    for n in range(1, tab.order + 1):
        np.testing.assert_allclose(defects(more, more.b, n), 0.0, atol=EXACT)
    if tab.fsal:
        assert more is tab


def test_every_tableau_has_a_method():
    found = {id(getattr(sa, name).base) for name in METHODS}
    assert found == {id(v) for v in vars(tableaus).values() if isinstance(v, tableaus.Tableau)}


# -- orders in practice -------------------------------------------------------------------------------------------


def field(t, u, p):
    """Nonlinear, with time in it: a logistic curve in warped time, and `exp(sin t)`, coupled off the solution."""
    y, z = u
    warped = np.exp(-(t - 0.5 * np.cos(t)))
    return np.stack([y * (1.0 - y) * (1.0 + 0.5 * np.sin(t)), z * np.cos(t) * y * (1.0 + 3.0 * warped)])


def exact(t):
    return np.stack([1.0 / (1.0 + 3.0 * np.exp(-(t - 0.5 * np.cos(t)))), np.exp(np.sin(t))], axis=-1)


SPAN = (0.5, 3.0)
# Step counts where the error is far above round-off and the next term of its expansion is already small.
COUNTS = {"Euler": (400, 800), "Heun": (200, 400), "Midpoint": (200, 400), "EES25": (200, 400), "EES27": (200, 400),
          "RK4": (40, 80), "BS3": (80, 160), "Dopri5": (64, 128), "Tsit5": (64, 128), "Dopri8": (14, 28)}
COUNTS_DENSE = COUNTS | {"Dopri8": (20, 40)}


def errors(name, tspan, dense):
    found = []
    for count in (COUNTS_DENSE if dense else COUNTS)[name]:
        dt = (SPAN[1] - SPAN[0]) / count
        ts = "steps"
        if dense:  # seven points in every step, none of them on a node
            ts = tspan[0] + (np.arange(8 * count)[np.arange(8 * count) % 8 != 0] / (8 * count)) * (tspan[1] - tspan[0])
        prob = sa.ODEProblem(field, exact(np.array(tspan[0])), tspan)
        sol = sa.solve(prob, getattr(sa, name)(), controller=FixedStep(), dt=dt, saveat=ts)
        assert sol.stats.naccept == count
        found.append(np.max(np.abs(sol.u - exact(np.asarray(sol.t)))))
    return found


@pytest.mark.parametrize("tspan", [SPAN, SPAN[::-1]], ids=["forwards", "backwards"])
@pytest.mark.parametrize(("name", "order"), METHODS.items())
def test_measured_order(name, order, tspan):
    coarse, fine = errors(name, tspan, dense=False)
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("tspan", [SPAN, SPAN[::-1]], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", METHODS)
def test_measured_order_of_dense_output(name, tspan):
    """An interpolant of order q is wrong by h^(q+1) inside a step, the nodes by h^p: the larger error shows."""
    coarse, fine = errors(name, tspan, dense=True)
    expected = min(METHODS[name], DENSE.get(name, min(METHODS[name], 3)) + 1)
    assert np.log2(coarse / fine) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("name", METHODS)
def test_single_precision(name):
    prob = sa.ODEProblem(lambda t, u, p: -u * np.float32(0.5), np.ones(3, dtype=np.float32), (0.0, 1.0))
    options = {"dt": 1e-3} if table(name).error is None else {"rtol": 1e-4}
    sol = sa.solve(prob, getattr(sa, name)(), saveat=[0.5, 1.0], **options)
    assert sol.u.dtype == np.float32
    # The tolerance, or the error of 1000 steps of Euler.
    np.testing.assert_allclose(sol.u, np.exp([[-0.25] * 3, [-0.5] * 3]), rtol=5e-4)
