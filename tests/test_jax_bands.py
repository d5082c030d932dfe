"""Narrow bands on JAX: any matrix, well or badly suited to elimination without row exchanges, alone and in lanes."""

import numpy as np
import pytest

import sensitivity as sa

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from sensitivity_jax import _bands, _native  # noqa: E402

pytestmark = pytest.mark.usefixtures("jax_double")

SHAPES = [(6, 0, 0), (17, 1, 1), (33, 1, 3), (40, 3, 1), (64, 2, 2)]


def dominant(rng, n, lower, upper):
    return random(rng, n, lower, upper) + 8.0 * np.diag(rng.choice([-1.0, 1.0], n))


def random(rng, n, lower, upper):
    return np.triu(np.tril(rng.standard_normal((n, n)), upper), -lower)


def hollow(rng, n, lower, upper):
    """Zeros on the diagonal, but for its ends: pairs of rows want to be exchanged, which belong to two blocks."""
    A = 0.01 * random(rng, n, lower, upper)
    np.fill_diagonal(A, 0.0)
    A[0, 0] = A[-1, -1] = 1.0
    for i in range(1, n - 1, 2):
        A[i, i + 1], A[i + 1, i] = 1.0, -2.0
    return A


def graded(rng, n, lower, upper):
    """Rows and columns of very different sizes."""
    scales = 10.0 ** rng.uniform(-6.0, 6.0, (2, n))
    return scales[0][:, None] * dominant(rng, n, lower, upper) * scales[1][None, :]


def diagonals(A, lower, upper):
    n = len(A)
    out = np.zeros((lower + upper + 1, n))
    for i in range(n):
        for j in range(max(0, i - lower), min(n, i + upper + 1)):
            out[upper + i - j, j] = A[i, j]
    return out


def unsolved(A, x, b):
    """Residuals beside the terms that they are sums of, for rows of right-hand sides."""
    return np.max(np.abs(x @ A.T - b) / (np.abs(x) @ np.abs(A).T + np.abs(b)))


KINDS = [dominant, random, hollow, graded]


def suits(kind, n, lower, upper):
    """Whether such matrices are as a rule regular, and the kind has a meaning."""
    if kind is hollow:
        return n % 2 == 0 and min(lower, upper) > 0
    return kind is not random or (n > 8 and min(lower, upper) > 0)


def solved(bands, b, lower, upper):
    solve = _bands.factorize(jnp.asarray(bands), lower, upper)
    return solve(b), solve(b, transposed=True)


both = jax.jit(solved, static_argnums=(2, 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bands_of_all_kinds(shape):
    """Backward errors, entry by entry, of systems with the matrix and with its transpose."""
    n, lower, upper = shape
    rng = np.random.default_rng(n)
    for kind in (kind for kind in KINDS if suits(kind, *shape)):
        A = kind(rng, n, lower, upper)
        b = np.concatenate([np.ones((1, n)), rng.standard_normal((2, n))])
        x, y = both(diagonals(A, lower, upper), b, lower, upper)
        assert unsolved(A, np.asarray(x), b) <= 1e-13, kind.__name__
        assert unsolved(A.T, np.asarray(y), b) <= 1e-13, kind.__name__


def refinements(A, lower, upper):
    """How many refinements answers get, and whether rows are exchanged instead."""
    system = _bands._blocks(jnp.asarray(diagonals(A, lower, upper)), lower, upper)
    count, fails = _bands._probed(system, _bands._reduce(system))
    return int(count), bool(fails)


def test_what_is_refined_and_what_is_pivoted():
    rng = np.random.default_rng(2)
    assert refinements(dominant(rng, 16, 1, 1), 1, 1) == (0, False)
    nearly = dominant(rng, 16, 1, 1)
    nearly[4, 4] = 1e-7  # a pivot that costs seven digits
    assert refinements(nearly, 1, 1) == (1, False)
    assert refinements(hollow(rng, 16, 1, 1), 1, 1)[1]


def test_lanes_of_which_one_is_pivoted():
    rng = np.random.default_rng(3)
    several = [kind(rng, 16, 1, 1) for kind in (dominant, hollow, random)]
    b = rng.standard_normal((3, 16))
    lanes = jax.jit(jax.vmap(lambda bands, b: solved(bands, b, 1, 1)))
    found = np.asarray(lanes(np.stack([diagonals(A, 1, 1) for A in several]), b))
    for A, right, x, y in zip(several, b, *found, strict=True):
        assert max(unsolved(A, x[None], right[None]), unsolved(A.T, y[None], right[None])) <= 1e-13


@pytest.mark.parametrize("kind", [dominant, hollow])
def test_derivatives(kind):
    """`dx = A^-1 (db - dA x)` forward, and its transpose, where rows are exchanged too."""
    rng = np.random.default_rng(4)
    A, move, b, db, w = kind(rng, 16, 1, 1), random(rng, 16, 1, 1), *rng.standard_normal((3, 16))
    bands, d = diagonals(A, 1, 1), diagonals(move, 1, 1)

    @jax.jit
    def derivatives(bands, b):
        forward = jax.jvp(lambda B, b: solved(B, b, 1, 1), (bands, b), (d, db))[1]
        return forward, jax.grad(lambda B, b: w @ solved(B, b, 1, 1)[0], (0, 1))(bands, b)

    (dx, dy), (bands_bar, b_bar) = derivatives(bands, b)
    x, y, back = np.linalg.solve(A, b), np.linalg.solve(A.T, b), np.linalg.solve(A.T, w)
    np.testing.assert_allclose(dx, np.linalg.solve(A, db - move @ x), rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(dy, np.linalg.solve(A.T, db - move.T @ y), rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(b_bar, back, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(bands_bar, diagonals(-np.outer(back, x), 1, 1), rtol=1e-10, atol=1e-11)


def test_singular_and_single_precision():
    rng = np.random.default_rng(5)
    A, b = graded(rng, 16, 1, 1) * (rng.uniform(size=16) < 0.5), rng.standard_normal((1, 16))
    assert not any(np.isfinite(x).all() for x in both(diagonals(A, 1, 1), b, 1, 1))
    for kind in (dominant, hollow):
        A = kind(rng, 16, 1, 1).astype(np.float32)
        x, y = both(diagonals(A, 1, 1).astype(np.float32), b.astype(np.float32), 1, 1)
        assert x.dtype == np.float32
        assert max(unsolved(A, np.asarray(x), b), unsolved(A.T, np.asarray(y), b)) <= 1e-5


def chain(t, u, p):
    """Diffusion of three species along a line, with a reaction among them, one of them slow to follow."""
    u = u.reshape(-1, 3)
    spread = jnp.concatenate([u[1:], u[-1:]]) + jnp.concatenate([u[:1], u[:-1]]) - 2.0 * u
    v, w, z = u.T
    return (p[0] * spread + jnp.stack([1.0 - v * w * p[1], v * w * p[1] - w * z, 100.0 * (w - z)]).T).reshape(-1)


def gradient(pattern, method, monkeypatch=None):
    u0 = jnp.asarray(1.0 + 0.2 * np.sin(np.arange(30.0)))

    def loss(p):
        prob = sa.ODEProblem(chain, u0, (0.0, 0.5), p, jac_sparsity=pattern)
        return jnp.sum(sa.solve(prob, method, sensealg=sa.RecursiveCheckpointAdjoint(), rtol=1e-5, atol=1e-7).u[-1]**2)

    lowered = jax.jit(jax.value_and_grad(loss)).lower(jnp.array([30.0, 2.0]))
    value, slope = lowered.compile()(jnp.array([30.0, 2.0]))
    return np.append(slope, value), lowered.as_text().count("xla_cpu_small_call")


def test_a_chain_of_three_species():
    """A band of three diagonals on either side is one function, forward and in reverse, with the numbers of arrays."""
    near = np.abs(np.subtract.outer(np.arange(30), np.arange(30))) <= 3
    banded, loops = gradient(near, sa.Rodas5P())
    full, _ = gradient(None, sa.Rodas5P())
    assert loops == (2 if _native.TESTED else 0)
    np.testing.assert_allclose(banded, full, rtol=1e-10)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_small_matrices(n):
    """Row exchanges, the transpose, rows of right-hand sides, lanes, and derivatives."""
    rng = np.random.default_rng(n)
    A, b, w = rng.standard_normal((4, n, n)), rng.standard_normal((3, n)), rng.standard_normal(n)
    A[1] = np.eye(n)[::-1] + 0.01 * np.tri(n, n, -2)  # no pivot where it is looked for first

    @jax.jit
    def several(A):
        return jax.vmap(lambda A: (_bands.pivoted(A)(b), _bands.pivoted(A)(b[0], transposed=True)))(A)

    for M, x, y in zip(A, *map(np.asarray, several(A)), strict=True):
        np.testing.assert_allclose(x, np.linalg.solve(M, b.T).T, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(y, np.linalg.solve(M.T, b[0]), rtol=1e-10, atol=1e-12)
    got = jax.jit(jax.grad(lambda A: w @ _bands.pivoted(A)(b[0])))(A[0])
    want = -np.outer(np.linalg.solve(A[0].T, w), np.linalg.solve(A[0], b[0]))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)
    assert not np.isfinite(_bands.pivoted(jnp.zeros((n, n)))(b[0])).any()


def robertson(t, u, p):
    a, c = p[0] * u[0], p[1] * u[1] * u[2]
    return jnp.stack([c - a, a - c - p[2] * u[1] ** 2, p[2] * u[1] ** 2])


@pytest.mark.skipif(not _native.TESTED, reason="loops are ordinary ones with this jaxlib or processor")
@pytest.mark.parametrize("method", [sa.Kvaerno5(), sa.Rodas5P()], ids=lambda m: m.name)
def test_small_stiff_systems_are_one_function(method, monkeypatch):
    def run(f):
        def loss(p):
            prob = sa.ODEProblem(f, jnp.array([1.0, 0.0, 0.0]), (0.0, 10.0), p)
            return sa.solve(prob, method, rtol=1e-6, atol=1e-10, sensealg=sa.RecursiveCheckpointAdjoint()).u[-1, 0]

        rates = jnp.array([0.04, 1e4, 3e7])
        lowered = jax.jit(jax.grad(loss)).lower(rates)
        return np.asarray(lowered.compile()(rates)), lowered.as_text().count("xla_cpu_small_call")

    native, loops = run(robertson)
    assert loops >= 1  # the transpose of Rodas5P has a product of matrices
    monkeypatch.setattr(_native, "TESTED", False)
    plain, loops = run(lambda t, u, p: robertson(t, u, p))
    assert loops == 0
    np.testing.assert_allclose(native, plain, rtol=1e-9)
