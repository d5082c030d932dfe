"""Loops of small systems as one native function.

XLA runs a loop on a CPU kernel by kernel, and for a small system it takes longer to call the kernels than to do what
they do. A call with the attribute `xla_cpu_small_call` is compiled to one function instead. XLA does not check what it
can compile so, and may even abort; hence only loops of operations that our tests have compiled, on as few numbers, and
only with the versions of XLA that they ran with. Products with a vector are among them, as in a network at one state;
products of matrices are not, because XLA leaves those to a library. Every other loop is an ordinary one: in lanes, on
other devices, and where it is differentiated.
"""

import math
import platform
from functools import partial

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxlib.mlir import ir

TESTED = jaxlib.version.__version__ in ("0.10.2",) and platform.machine() in ("x86_64", "AMD64")
ONE_FUNCTION = {"xla_cpu_small_call": "true", "inlineable": "false"}
SUMS = 2048  # XLA gives larger sums to a library, which such a function cannot call
NUMBERS = 2**16  # for more it matters little what a call of a kernel takes
OPERATIONS = 750  # of one body; XLA took minutes to compile some with more
ELEMENTS = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp concatenate convert_element_type copy
    cos cosh div eq erf erfc exp exp2 expm1 floor ge gt integer_pow iota is_finite le le_to log log1p logistic lt lt_to
    max min mul ne neg not or pad pow rem reshape rev round rsqrt select_n sign sin sinh split sqrt square squeeze stack
    stop_gradient sub tan tanh transpose unstack xor""".split())
TOTALS = frozenset("cumsum reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum".split())
AROUND = frozenset("""broadcast_in_dim cond custom_jvp_call custom_linear_solve custom_vjp_call custom_vmap_call
    dynamic_slice dynamic_update_slice jit optimization_barrier scan sensitivity_native slice while""".split())
BODIES = frozenset("cond scan sensitivity_native while".split())

native_p = Primitive("sensitivity_native")
native_p.multiple_results = True


def native(loop):
    """`loop()`, as one function where that is known to work."""
    if not TESTED:
        return loop()
    closed, shape = jax.make_jaxpr(loop, return_shape=True)()
    given = [isinstance(c, jax.core.Tracer) for c in closed.consts]

    def call(*args):
        rest = iter(args)
        consts = [next(rest) if on else c for c, on in zip(closed.consts, given, strict=True)]
        return jax.core.eval_jaxpr(closed.jaxpr, consts)

    args = [c for c, on in zip(closed.consts, given, strict=True) if on]
    return jax.tree.unflatten(jax.tree.structure(shape), native_p.bind(*args, jaxpr=jax.make_jaxpr(call)(*args)))


def possible(field, size):
    """Whether loops around this vector field, with states of this size, will be one function here."""
    return TESTED and jax.default_backend() == "cpu" and size <= SUMS and known(field)


def longest(jaxpr):
    """The number of operations in the longest body of a loop, or outside of all."""
    return max(_lengths(jaxpr))


def _lengths(jaxpr):
    here, inside = len(jaxpr.eqns), 0
    for eqn in jaxpr.eqns:
        for p in filter(_closed, jax.tree.leaves(eqn.params, is_leaf=_closed)):
            length, deeper = _lengths(p.jaxpr)
            inside = max(inside, deeper, length * (eqn.primitive.name in BODIES))
            here += length * (eqn.primitive.name not in BODIES)
    return here, inside


def _closed(p):
    return isinstance(p, ClosedJaxpr)


def known(jaxpr):
    """Whether there is nothing but known operations on few numbers, other than what is computed in vain."""
    return _needed(jaxpr) is not None


def _needed(jaxpr):
    """The variables that results are made from; None where an unknown operation makes one."""
    used = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if used.isdisjoint(eqn.outvars) and not eqn.effects:
            continue
        if not _known(eqn):
            return None
        atoms = eqn.invars
        if eqn.primitive.name in ("jit", "scan"):
            inner = eqn.params["jaxpr"].jaxpr
            needed = _needed(inner)
            atoms = [v for v, own in zip(atoms, inner.invars, strict=True) if own in needed]
        used.update(v for v in atoms if not isinstance(v, Literal))
    return used


def _known(eqn):
    name = eqn.primitive.name
    if name in AROUND:
        return all(known(p.jaxpr) for p in jax.tree.leaves(eqn.params, is_leaf=_closed) if _closed(p))
    numbers = max(v.aval.size for v in (*eqn.invars, *eqn.outvars))
    if name in TOTALS:
        return numbers <= SUMS
    return numbers <= NUMBERS and (name in ELEMENTS or _by_vector(eqn) or _from_vector(eqn))


def _by_vector(eqn):
    """Whether this is a product with a vector, which needs no library; that of two vectors becomes a sum."""
    if eqn.primitive.name != "dot_general":
        return False
    (summed, _), batched = eqn.params["dimension_numbers"]
    factors = [v.aval for v in eqn.invars]
    return (not any(batched) and math.prod(factors[0].shape[i] for i in summed) <= SUMS
            and any(max(x.shape, default=1) == x.size for x in factors)
            and {v.aval.dtype for v in (*eqn.invars, *eqn.outvars)} in ({jnp.dtype("float32")}, {jnp.dtype("float64")}))


def _from_vector(eqn):
    """Whether this gathers entries of a vector."""
    return eqn.primitive.name == "gather" and eqn.invars[0].aval.ndim == 1


def _plain(*args, jaxpr):
    return jaxpr_as_fun(jaxpr)(*args)


def _one_function(*args, jaxpr):
    def call(*args):
        return *_plain(*args, jaxpr=jaxpr), *(jnp.reshape(x.ravel()[:1], ()) for x in args)

    # XLA aborts over a parameter that the call does not use, or no longer uses once it is known to be a constant:
    # so something of each is a result, and constants are hidden.
    return jax.jit(call)(*lax.optimization_barrier(args))


def _lower(ctx, *args, jaxpr):
    sizes = [v.size for v in jaxpr.in_avals]
    if 0 in sizes or longest(jaxpr.jaxpr) > OPERATIONS or not known(jaxpr.jaxpr):
        return mlir.lower_fun(_plain, multiple_results=True)(ctx, *args, jaxpr=jaxpr)
    results = mlir.lower_fun(_one_function, multiple_results=True)(ctx, *args, jaxpr=jaxpr)
    attributes = {name: ir.StringAttr.get(value) for name, value in ONE_FUNCTION.items()}
    call = next(r.owner for r in results if getattr(r.owner, "name", None) == "func.call")
    call.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(attributes)
    return results[:len(jaxpr.out_avals)]


@partial(jax.jit, static_argnames="jaxpr")
def _run(*args, jaxpr):
    return native_p.bind(*args, jaxpr=jaxpr)


def _jvp(primals, tangents, *, jaxpr):
    dots = [ad.instantiate_zeros(t) if jnp.issubdtype(p.dtype, jnp.inexact) else np.zeros(p.shape, jax.dtypes.float0)
            for p, t in zip(primals, tangents, strict=True)]
    return jax.jvp(partial(_plain, jaxpr=jaxpr), primals, tuple(dots))


def _batch(axis, args, dims, *, jaxpr):
    from jax._src.interpreters.batching import batch_jaxpr2  # elsewhere in other versions

    lanes, mapped = batch_jaxpr2(jaxpr, axis, tuple(dims))
    return _plain(*args, jaxpr=lanes), mapped


native_p.def_impl(_run)
native_p.def_abstract_eval(lambda *_, jaxpr: jaxpr.out_avals)
mlir.register_lowering(native_p, mlir.lower_fun(_plain, multiple_results=True))
mlir.register_lowering(native_p, _lower, platform="cpu")
ad.primitive_jvps[native_p] = _jvp
batching.fancy_primitive_batchers[native_p] = _batch
