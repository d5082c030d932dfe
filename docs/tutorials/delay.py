# %% [markdown]
# # Fit a delay
#
# A population grows to its limit, but what limits it is its size some time ago: Hutchinson's equation
#
# $$u'(t) = r\,u(t)\left(1 - \frac{u(t - \tau)}{K}\right).$$
#
# It lived at equilibrium until, at $t = 0$, a catastrophe left a fifth of it. We count it for a while, and want
# $r$, $K$ and above all the delay $\tau$.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize

import sensitivity as sa

jax.config.update("jax_enable_x64", True)


def hutchinson(t, u, h, p):
    return p["r"] * u * (1.0 - h(t - p["tau"]) / p["K"])


prob = sa.DDEProblem(
    hutchinson,
    u0=jnp.array([0.2]),
    history=lambda t, p: jnp.array([1.0]),
    tspan=(0.0, 12.0),
    p={"r": 1.4, "K": 1.0, "tau": 1.1},
    lags=lambda p: [p["tau"]],
)

# %% [markdown]
# `h(s)` is the state at an earlier time, `history` what it was before the start, and `lags` says at which delays `f`
# asks. The state at the start need not be where the history ends, as here.
#
# Data: the truth with noise, at times of our choice.

# %%
times = np.linspace(0.35, 11.85, 40)
truth = sa.solve(prob, saveat=times)
data = truth.u + 0.03 * np.random.default_rng(1).normal(size=truth.u.shape)


def loss(p, lags=prob.lags):
    sol = sa.solve(prob.remake(p=p, lags=lags), saveat=times, rtol=1e-6, atol=1e-8)
    return jnp.mean((sol.u - data) ** 2)


# %% [markdown]
# ## The gradient of a delay
#
# The solution has a kink at $t = \tau$: until then the equation sees the history, and after it, suddenly, the
# catastrophe. When $\tau$ changes, this point moves. A derivative that forgets so is wrong, however small the steps:
# differentiating the code of a solver forgets it, because its steps are constants.
#
# A lag given as a number is such a constant, while `f` still depends on `tau`; so we can look at the wrong gradient
# too, and let differences of the loss decide.

# %%
start = {"r": 1.0, "K": 0.8, "tau": 0.8}
moving = jax.grad(loss)(start)["tau"]
frozen = jax.grad(lambda p: loss(p, lags=[0.8]))(start)["tau"]
e = 1e-4
difference = (loss({**start, "tau": 0.8 + e}) - loss({**start, "tau": 0.8 - e})) / (2 * e)
print(f"lags=lambda p: [p['tau']]  {moving:.5f}")
print(f"lags=[0.8]                 {frozen:.5f}")
print(f"difference of the loss     {difference:.5f}")
assert abs(moving / difference - 1) < 1e-3
assert abs(frozen / difference - 1) > 0.05

# %% [markdown]
# ## The fit

# %%
names = ["r", "K", "tau"]
value_and_grad = jax.jit(jax.value_and_grad(lambda q: loss(dict(zip(names, jnp.exp(q), strict=True)))))
fit = minimize(lambda q: tuple(np.asarray(v) for v in value_and_grad(q)), np.log(list(start.values())), jac=True,
               method="BFGS", options={"gtol": 1e-6})
found = dict(zip(names, np.exp(fit.x).tolist(), strict=True))
print({k: round(v, 3) for k, v in found.items()}, "after", fit.nfev, "gradients")
assert abs(found["tau"] - 1.1) < 0.05

# %%
ts = np.linspace(0.0, 12.0, 400)
for p, label in ((start, "first guess"), (found, "fit")):
    plt.plot(ts, sa.solve(prob.remake(p=p), saveat=ts).u[:, 0], label=label)
plt.plot(times, data[:, 0], ".", color="gray", label="data")
plt.xlabel("time")
plt.ylabel("population")
plt.legend()
plt.show()
