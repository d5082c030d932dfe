# %% [markdown]
# # Fit a model to data
#
# For twenty years the Hudson's Bay Company wrote down how many pelts of snowshoe hare and of Canadian lynx it
# bought. The two numbers go up and down together, one a few years behind the other, and the oldest explanation
# is the predator-prey model of Lotka and Volterra:
#
# ```text
# hare' = a hare - b hare lynx
# lynx' = d hare lynx - c lynx
# ```
#
# We look for the four rates and the two initial numbers that follow the record best. The record comes with the
# package.

# %%
from importlib.resources import files

import autograd.numpy as np
import matplotlib.pyplot as plt
from scipy.optimize import minimize

import sensitivity as sa

table = np.loadtxt(files("sensitivity") / "data" / "lynx_hare.csv", delimiter=",", skiprows=2)
years, data = table[:, 0], table[:, 1:]
print("   year   hare   lynx")
print(table[:4])

# %% [markdown]
# ## The model
#
# Nothing here knows about gradients: `f(t, u, p)` returns the derivative of the state. It uses `autograd.numpy`,
# a drop-in for `numpy` that can be differentiated. With plain `numpy` the same lines work, and the derivatives of
# `f` are taken by differences.


# %%
def predator_prey(t, u, p):
    hare, lynx = u[0], u[1]
    a, b, c, d = p
    return np.stack([a * hare - b * hare * lynx, d * hare * lynx - c * lynx])


start_p = np.array([0.5, 0.02, 0.8, 0.02])
start_u0 = np.array([30.0, 4.0])
prob = sa.ODEProblem(predator_prey, start_u0, (years[0], years[-1]), start_p)

# %% [markdown]
# ## The loss and its gradient
#
# Counts are positive and their errors are proportional to their size, so we compare logarithms, and let the
# optimiser work on the logarithms of the unknowns. `sa.gradient` returns the loss together with its derivatives;
# the chain rule through `exp` is one multiplication.


# %%
def loss(sol):
    return ((np.log(sol.u) - np.log(data)) ** 2).mean()


def value_and_grad(x):
    u0, p = np.exp(x[:2]), np.exp(x[2:])
    r = sa.gradient(prob.remake(u0=u0, p=p), sa.Tsit5(), loss=loss, saveat=years, wrt=("u0", "p"))
    return r.value, np.concatenate([r.u0 * u0, r.p * p])


x0 = np.log(np.concatenate([start_u0, start_p]))
value, grad = value_and_grad(x0)
print(f"loss at the start {value:.4f}")
print("gradient", np.round(grad, 4))

# %% [markdown]
# A gradient that is used for hours should be checked for a minute. The loss along one direction, by central
# differences, against the derivative above:

# %%
direction = np.array([0.3, -0.5, 0.2, 0.7, -0.1, 0.4])
step = 1e-4
difference = (value_and_grad(x0 + step * direction)[0] - value_and_grad(x0 - step * direction)[0]) / (2 * step)
print(f"differences {difference:.6f}, gradient {grad @ direction:.6f}")

# %% [markdown]
# ## The fit

# %%
fit = minimize(value_and_grad, x0, jac=True, method="L-BFGS-B")
u0, p = np.exp(fit.x[:2]), np.exp(fit.x[2:])
print(f"loss {fit.fun:.4f} after {fit.nfev} gradients")
for name, number in zip(("hare in 1900", "lynx in 1900", "a", "b", "c", "d"), (*u0, *p), strict=True):
    print(f"{name:>13} {number:8.4f}")

# %%
fine = np.linspace(years[0], years[-1], 400)
sol = sa.solve(prob.remake(u0=u0, p=p), sa.Tsit5(), saveat=fine)
figure, axes = plt.subplots(figsize=(7, 3.5))
for column, (name, colour) in enumerate((("hare", "tab:blue"), ("lynx", "tab:orange"))):
    axes.plot(sol.t, sol.u[:, column], color=colour, label=name)
    axes.plot(years, data[:, column], "o", color=colour)
axes.set(xlabel="year", ylabel="pelts, thousands", xticks=range(1900, 1921, 5))
_ = axes.legend()

# %% [markdown]
# ## Which algorithm computed the gradient?
#
# None was asked for, so one was chosen. Any other gives the same numbers, up to the tolerance of the solve, at
# another price; [Which algorithm?](../choosing.md) says when to take which.

# %%
settings = {"loss": loss, "saveat": years, "wrt": "p", "rtol": 1e-8, "atol": 1e-8}
for sensealg in (sa.RecursiveCheckpointAdjoint(), sa.InterpolatingAdjoint(), sa.ForwardSensitivity()):
    r = sa.gradient(prob, sa.Tsit5(), sensealg=sensealg, **settings)
    print(f"{type(sensealg).__name__:>26}", np.round(r.p, 6))
