"""Brownian paths: the generator, the tree, its law, and that all backends see one path."""

import math

import numpy as np
import pytest

import sensitivity as sa
from sensitivity.noise import normals, words
from sensitivity.registry import registry
from sensitivity.threefry import threefry

T = (0.5, 2.5)


def path(lab, key, ts, tol=2.0**-6, m=1):
    return lab.numpy(sa.VirtualBrownianTree(key, T, tol)(lab.array(ts), m))


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers_of_threefry(lab, key, counter, expected):
    """The known-answer test of the Random123 distribution (Salmon et al. 2011), for threefry2x32 with 20 rounds."""
    be = lab.be
    k, x = (be.asarray([[v] for v in pair], dtype=be.word()) for pair in (key, counter))
    for generator in (threefry, be.threefry):
        out = generator(k[0], k[1], x[0], x[1])
        assert tuple(int(lab.numpy(v)[0]) for v in out) == expected


def test_normal_numbers():
    """Moments, independence of the two, and the distribution function, of 2^17 numbers."""
    from scipy.stats import kstest

    be = registry().backend("numpy")
    n = 2**17
    a, b = normals(be, words(be, 7), np.arange(n // 2, dtype=np.uint32), np.arange(2, dtype=np.uint32), np.float64)
    a, b = a.ravel(), b.ravel()
    for x in (a, b):
        # Bounds of 5 standard errors: 1, 2 and 96 are the variances of x, x^2 and x^4.
        for power, mean, var in ((1, 0.0, 1.0), (2, 1.0, 2.0), (4, 3.0, 96.0)):
            assert abs(np.mean(x**power) - mean) < 5 * math.sqrt(var / n)
        assert kstest(x, "norm").pvalue > 1e-4
    assert abs(np.mean(a * b)) < 5 / math.sqrt(n)
    assert abs(np.mean(a[1:] * a[:-1])) < 5 / math.sqrt(n)


def test_backends_agree(lab):
    """The same key is the same path everywhere, to round-off."""
    ts = np.array([0.5, 0.9, 1.0 / 3.0 + 0.5, 2.5, 1.7])
    got = path(lab, 2024, ts, tol=2.0**-12, m=3)
    here = sa.VirtualBrownianTree(2024, T, 2.0**-12)(ts, 3)
    np.testing.assert_allclose(got, here, rtol=0, atol=1e-13)
    assert np.all(here[0] == 0.0)


def test_paths_stay_what_they_are():
    """The numbers of one key, written down: a key means the same path in every run and in every release."""
    W = sa.VirtualBrownianTree(2024, (0.0, 1.0), 2.0**-12)(np.array([0.25, 1.0 / 3.0, 1.0]), 2)
    expected = [[0.06338839, 0.18717388], [-0.23764517, 0.42503083], [-0.75276675, 1.09334029]]
    np.testing.assert_allclose(W, expected, rtol=0, atol=1e-8)


def test_order_and_company_do_not_matter(lab):
    """A time gives one value: alone, among others, in any order; dyadic times also whatever the tolerance."""
    ts = np.linspace(T[0], T[1], 9)
    rng = np.random.default_rng(0)
    together = path(lab, 3, ts)
    order = rng.permutation(9)
    # Sums over the tree are taken in another order, hence round-off.
    np.testing.assert_allclose(path(lab, 3, ts[order]), together[order], rtol=0, atol=1e-14)
    for t, value in zip(ts, together, strict=True):
        np.testing.assert_allclose(path(lab, 3, [t])[0], value, rtol=0, atol=1e-14)
    np.testing.assert_allclose(path(lab, 3, ts, tol=2.0**-10), together, rtol=0, atol=1e-14)
    many = path(lab, 3, np.concatenate([ts, rng.uniform(*T, 40)]))
    np.testing.assert_allclose(many[:9], together, rtol=0, atol=1e-14)


def test_keys():
    ts = np.array([1.0])

    def at(key):
        return float(sa.VirtualBrownianTree(key, T, 0.1)(ts)[0, 0])

    assert at(5) == at(np.array([5, 0])) == at(np.array([5]))
    assert at((1 << 32) + 5) == at(np.array([5, 1]))
    assert len({at(k) for k in range(20)}) == 20
    for bad in (1.5, "a", np.array([1, 2, 3]), np.array([0.5])):
        with pytest.raises(sa.InputError, match="key"):
            at(bad)


MESHES = {"dyadic": np.array([0.0, 0.25, 0.5, 1.0]), "other": np.array([0.0, 0.1, 0.37, 0.61, 0.95, 1.0])}


@pytest.mark.parametrize("levels", [4, 9])
@pytest.mark.parametrize("mesh", MESHES)
def test_second_moments(mesh, levels):
    """Increments and Levy areas over a mesh are independent with variances h and h/12, over 20000 channels.

    Each entry of the sample covariance, scaled to unit variances, has standard error sqrt(2/N) on the diagonal and
    sqrt(1/N) beside it; 5 of them are allowed.
    """
    N, s = 20_000, MESHES[mesh]
    be = registry().backend("numpy")
    tree = sa.VirtualBrownianTree(11, (0.0, 1.0), 2.0**-levels)
    W, A = tree.law(be, tree.arrays(be, s), N, s)
    h = np.diff(s)[:, None]
    dW = np.diff(W, axis=0)
    H = np.diff(A, axis=0) / h - W[:-1] - 0.5 * dW
    x = np.concatenate([dW / np.sqrt(h), H / np.sqrt(h / 12.0)])
    np.testing.assert_allclose(x @ x.T / N, np.eye(len(x)), rtol=0, atol=5 * math.sqrt(2.0 / N))
    np.testing.assert_allclose(np.mean(x, axis=1), 0.0, rtol=0, atol=5 / math.sqrt(N))


def test_area_is_the_integral():
    """`int W dr` of one path agrees with the trapezoidal rule on a fine grid."""
    be = registry().backend("numpy")
    tree = sa.VirtualBrownianTree(4, (0.0, 1.0), 2.0**-14)
    s = np.linspace(0.0, 1.0, 2**14 + 1)
    W, A = tree.law(be, tree.arrays(be, s), 1, s)
    rule = np.concatenate([[0.0], np.cumsum(0.5 * (W[1:, 0] + W[:-1, 0])) * 2.0**-14])
    # The rule is wrong by the areas H of the 2^14 intervals, each with standard deviation h^1.5 / sqrt(12).
    assert np.max(np.abs(A[:, 0] - rule)) < 5 * math.sqrt(2.0**14 / 12.0) * 2.0 ** (-14 * 1.5)


def test_tabulated(lab):
    ts, W = np.array([0.0, 0.25, 1.0]), np.array([[1.0, 0.0], [1.5, -1.0], [0.5, 2.0]])
    p = sa.TabulatedPath(lab.array(ts), lab.array(W))
    s = np.array([0.0, 0.1, 0.25, 0.5, 1.0])
    expected = np.stack([np.interp(s, ts, W[:, j]) - W[0, j] for j in range(2)], axis=1)
    np.testing.assert_allclose(lab.numpy(p(lab.array(s))), expected, rtol=0, atol=1e-15)
    be = lab.be
    s = np.linspace(0.0, 1.0, 4001)
    value, area = (lab.numpy(v) for v in p.law(be, p.arrays(be, lab.array(s)), 2, lab.array(s)))
    rule = np.cumsum(0.5 * (value[1:] + value[:-1]), axis=0) / 4000.0
    np.testing.assert_allclose(area[1:], rule, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sa.VirtualBrownianTree(0, (1.0, 0.0), 0.1),
        lambda: sa.VirtualBrownianTree(0, (0.0, 1.0), 0.0),
        lambda: sa.VirtualBrownianTree(0, (0.0, 1.0), 1e-12),
        lambda: sa.VirtualBrownianTree(0, 1.0, 0.1),
        lambda: sa.TabulatedPath(np.array([0.0]), np.zeros((1, 1))),
        lambda: sa.TabulatedPath(np.array([0.0, 1.0]), np.zeros((3, 1))),
        lambda: sa.TabulatedPath(np.array([1.0, 0.0]), np.zeros((2, 1)))(np.array([0.5])),
    ],
)
def test_wrong_paths_are_refused(make):
    with pytest.raises(sa.InputError):
        make()
