# %% [markdown]
# # A latent stochastic model
#
# Twenty years of hares and lynx ([the record of the first tutorial](fit.md)) are not a clean cycle: weather, disease
# and trappers had their part. Here that part is noise. The logarithms `z` of the two numbers follow
#
# ```text
# dz = (prior(z)) dt + s dW          prior(z) = (a - b exp(z2), d exp(z1) - c)
# ```
#
# and the question is which paths the record leaves likely. A posterior path follows `prior(z) + s control(t, z)`, where
# the control is a small neural network. What it costs to steer is the Kullback-Leibler divergence from the prior,
# `1/2 int |control|^2 dt` ([Li, Wong, Chen, Duvenaud 2020](https://arxiv.org/abs/2001.01328)), and we look for the
# network, the rates and the strength of the noise that make misfit plus cost smallest.

# %%
from importlib.resources import files

import autograd.numpy as np
import matplotlib.pyplot as plt
from scipy.optimize import minimize

import sensitivity as sa

table = np.loadtxt(files("sensitivity") / "data" / "lynx_hare.csv", delimiter=",", skiprows=2)
years, data = table[:, 0] - 1900.0, np.log(table[:, 1:])

# %% [markdown]
# ## Drift and diffusion
#
# A batch is an array: `u` has one row per member, and with diagonal noise each entry has a noise of its own. The third
# column adds up the cost of the control and has no noise.


# %%
def prior(z, p):
    a, b, c, d = np.exp(p["rates"])
    return np.stack([a - b * np.exp(z[:, 1]), d * np.exp(z[:, 0]) - c], axis=1)


def control(t, z, p):
    bumps = np.exp(-0.5 * ((t - np.linspace(0.0, 20.0, 11)) / 1.5) ** 2)
    hidden = np.tanh((z - 3.0) @ p["A"] + bumps @ p["B"])
    return hidden @ p["C"]


def drift(t, u, p):
    z = u[:, :2]
    steer = control(t, z, p)
    cost = 0.5 * np.sum(steer**2, axis=1)
    return np.concatenate([prior(z, p) + np.exp(p["noise"]) * steer, cost[:, None]], axis=1)


def diffusion(t, u, p):
    s = np.exp(p["noise"])
    return np.stack([s[0] + 0.0 * u[:, 0], s[1] + 0.0 * u[:, 1], 0.0 * u[:, 2]], axis=1)


rng = np.random.default_rng(0)
start = {
    "rates": np.log([0.55, 0.028, 0.80, 0.024]),
    "noise": np.log([0.2, 0.2]),
    "A": 0.1 * rng.normal(size=(2, 8)),
    "B": 0.5 * rng.normal(size=(11, 8)),
    "C": 0.1 * rng.normal(size=(8, 2)),
}
members = 8
u0 = np.tile(np.append(data[0], 0.0), (members, 1))
prob = sa.SDEProblem(drift, diffusion, u0, (0.0, 20.0), start, noise="additive", key=1)

# %% [markdown]
# `noise="additive"` says that the diffusion does not depend on the state, so the method picked is one of strong order
# 3/2. Its steps ask the path for increments; the path is a function of the key, so every solve below sees the same
# eight paths, the loss is an ordinary function of the parameters, and any optimiser will do.


# %%
def loss(sol):
    misfit = (sol.u[:, :, :2] - data[:, None, :]) / 0.15
    return 0.5 * np.sum(np.mean(misfit**2, axis=1)) + np.mean(sol.u[-1, :, 2])


r = sa.gradient(prob, loss=loss, saveat=years, dt=0.5)
print(f"{r.value:.1f}", r.solution.alg, r.sensealg.name)
print("derivative with respect to the noise:", r.p["noise"].round(2))

# %% [markdown]
# That gradient is the exact derivative of the number printed before it, so a difference of the loss along any direction
# shows it again.

# %%
e = 1e-5
moved = [prob.remake(p={**start, "noise": start["noise"] + s * e}) for s in (1, -1)]
ends = [loss(sa.solve(prob, saveat=years, dt=0.5)) for prob in moved]
print("by a difference:", round((ends[0] - ends[1]) / (2 * e), 2), "by the adjoint:", round(np.sum(r.p["noise"]), 2))

# %% [markdown]
# ## Fit

# %%
names = list(start)
sizes = [start[k].size for k in names]


def unpack(x):
    parts = np.split(x, np.cumsum(sizes)[:-1])
    return {k: v.reshape(start[k].shape) for k, v in zip(names, parts, strict=True)}


def objective(x):
    r = sa.gradient(prob.remake(p=unpack(x)), loss=loss, saveat=years, dt=0.5, wrt="p")
    return r.value, np.concatenate([r.p[k].ravel() for k in names])


x0 = np.concatenate([start[k].ravel() for k in names])
fit = minimize(objective, x0, jac=True, method="L-BFGS-B", options={"maxiter": 40})
best = unpack(fit.x)
print(f"loss {r.value:.0f} -> {fit.fun:.0f} in {fit.nfev} gradients")
print("rates", np.exp(best["rates"]).round(3), "noise", np.exp(best["noise"]).round(2))

# %% [markdown]
# ## What the record leaves likely
#
# Fresh members, with another key, show how far the posterior holds beyond the eight paths that it was fitted on. The
# band is that of the numbers themselves; the record is taken to be 15% beside them.

# %%
many = np.tile(u0[:1], (200, 1))
sol = sa.solve(prob.remake(p=best, u0=many, key=2), saveat=41, dt=0.5)
numbers = np.exp(sol.u[:, :, :2])
low, middle, high = np.quantile(numbers, [0.05, 0.5, 0.95], axis=1)
fig, axes = plt.subplots(2, 1, sharex=True, figsize=(7, 5))
for i, (name, axis) in enumerate(zip(("hare", "lynx"), axes, strict=True)):
    axis.fill_between(1900.0 + sol.t, low[:, i], high[:, i], alpha=0.3)
    axis.plot(1900.0 + sol.t, middle[:, i])
    axis.plot(1900.0 + years, np.exp(data[:, i]), "k.")
    axis.set_ylabel(f"{name}, thousands")
inside = (low[::2] < np.exp(data)) & (np.exp(data) < high[::2])
print(f"{inside[1:].mean():.0%} of the record lies in the band from 5% to 95%")
