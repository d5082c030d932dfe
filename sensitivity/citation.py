"""What to cite for a computation: the papers behind its method and its sensitivity algorithm."""

from __future__ import annotations

from typing import Any

from .choose import auto

REFERENCES = {
    "bogacki1989":
        "P. Bogacki, L. F. Shampine: A 3(2) pair of Runge-Kutta formulas. Appl. Math. Lett. 2 (1989) 321-325.",
    "cao2003":
        "Y. Cao, S. Li, L. Petzold, R. Serban: Adjoint sensitivity analysis for differential-algebraic equations: "
        "the adjoint DAE system and its numerical solution. SIAM J. Sci. Comput. 24 (2003) 1076-1089.",
    "chen2018":
        "R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud: Neural ordinary differential equations. "
        "Advances in Neural Information Processing Systems 31 (2018).",
    "christianson1994":
        "B. Christianson: Reverse accumulation and attractive fixed points. Optim. Methods Softw. 3 (1994) "
        "311-326.",
    "dennis1983":
        "J. E. Dennis, R. B. Schnabel: Numerical Methods for Unconstrained Optimization and Nonlinear Equations. "
        "Prentice-Hall, 1983.",
    "deuflhard2004":
        "P. Deuflhard: Newton Methods for Nonlinear Problems. Springer, 2004.",
    "dormand1980":
        "J. R. Dormand, P. J. Prince: A family of embedded Runge-Kutta formulae. J. Comput. Appl. Math. 6 (1980) "
        "19-26.",
    "foster2023":
        "J. Foster, G. dos Reis, C. Strange: High order splitting methods for SDEs satisfying a commutativity "
        "condition. arXiv:2210.17543 (2023).",
    "gaines1997":
        "J. G. Gaines, T. J. Lyons: Variable step size control in the numerical solution of stochastic differential "
        "equations. SIAM J. Appl. Math. 57 (1997) 1455-1484.",
    "griewank2000":
        "A. Griewank, A. Walther: Algorithm 799: revolve, an implementation of checkpointing for the reverse or "
        "adjoint mode of computational differentiation. ACM Trans. Math. Softw. 26 (2000) 19-45.",
    "hager2000":
        "W. W. Hager: Runge-Kutta methods in optimal control and the transformed adjoint system. Numer. Math. 87 "
        "(2000) 247-282.",
    "hairer1993":
        "E. Hairer, S. P. Norsett, G. Wanner: Solving Ordinary Differential Equations I, 2nd ed. Springer, 1993.",
    "kelley1995":
        "C. T. Kelley: Iterative Methods for Linear and Nonlinear Equations. SIAM, 1995.",
    "kelley1998":
        "C. T. Kelley, D. E. Keyes: Convergence analysis of pseudo-transient continuation. SIAM J. Numer. Anal. "
        "35 (1998) 508-523.",
    "kidger2021":
        "P. Kidger, R. T. Q. Chen, T. Lyons: \"Hey, that's not an ODE\": faster ODE adjoints via seminorms. "
        "International Conference on Machine Learning (2021).",
    "kidger2021sde":
        "P. Kidger, J. Foster, X. Li, T. Lyons: Efficient and accurate gradients for neural SDEs. Advances in Neural "
        "Information Processing Systems 34 (2021).",
    "kim2021":
        "S. Kim, W. Ji, S. Deng, Y. Ma, C. Rackauckas: Stiff neural ordinary differential equations. Chaos 31 "
        "(2021) 093122.",
    "kloeden1992":
        "P. E. Kloeden, E. Platen: Numerical Solution of Stochastic Differential Equations. Springer, 1992.",
    "kutta1901":
        "W. Kutta: Beitrag zur naeherungsweisen Integration totaler Differentialgleichungen. Z. Math. Phys. 46 "
        "(1901) 435-453.",
    "li2020":
        "X. Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud: Scalable gradients for stochastic differential equations. "
        "Artificial Intelligence and Statistics (2020).",
    "mccallum2024":
        "S. McCallum, J. Foster: Efficient, accurate and stable gradients for neural ODEs. arXiv:2410.11648 "
        "(2024).",
    "ni2017":
        "A. Ni, Q. Wang: Sensitivity analysis on chaotic dynamical systems by non-intrusive least squares shadowing "
        "(NILSS). J. Comput. Phys. 347 (2017) 56-77.",
    "ni2019":
        "A. Ni, C. Talnikar: Adjoint sensitivity analysis on chaotic dynamical systems by non-intrusive least squares "
        "adjoint shadowing (NILSAS). J. Comput. Phys. 395 (2019) 690-709.",
    "norcliffe2023":
        "A. Norcliffe, M. P. Deisenroth: Faster training of neural ODEs using Gauss-Legendre quadrature. Trans. "
        "Mach. Learn. Res. (2023).",
    "ozyurt2005":
        "D. B. Ozyurt, P. I. Barton: Cheap second order directional derivatives of stiff ODE embedded "
        "functionals. SIAM J. Sci. Comput. 26 (2005) 1725-1743.",
    "piessens1983":
        "R. Piessens, E. de Doncker-Kapenga, C. W. Ueberhuber, D. K. Kahaner: QUADPACK. Springer, 1983.",
    "prince1981":
        "P. J. Prince, J. R. Dormand: High order embedded Runge-Kutta formulae. J. Comput. Appl. Math. 7 (1981) "
        "67-75.",
    "rackauckas2020":
        "C. Rackauckas et al.: Universal differential equations for scientific machine learning. arXiv:2001.04385 "
        "(2020).",
    "rumelin1982":
        "W. Rumelin: Numerical treatment of stochastic differential equations. SIAM J. Numer. Anal. 19 (1982) "
        "604-613.",
    "sanzserna2016":
        "J. M. Sanz-Serna: Symplectic Runge-Kutta schemes for adjoint equations, automatic differentiation, "
        "optimal control, and more. SIAM Rev. 58 (2016) 3-33.",
    "tsitouras2011":
        "Ch. Tsitouras: Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption. "
        "Comput. Math. Appl. 62 (2011) 770-775.",
    "virtanen2020":
        "P. Virtanen et al.: SciPy 1.0: fundamental algorithms for scientific computing in Python. Nat. Methods "
        "17 (2020) 261-272.",
    "wang2009":
        "Q. Wang, P. Moin, G. Iaccarino: Minimal repetition dynamic checkpointing algorithm for unsteady adjoint "
        "calculation. SIAM J. Sci. Comput. 31 (2009) 2549-2567.",
    "wang2014":
        "Q. Wang, R. Hu, P. Blonigan: Least squares shadowing sensitivity analysis of chaotic limit cycle "
        "oscillations. J. Comput. Phys. 267 (2014) 210-224.",
}


def citation(prob: Any, alg: Any = None, sensealg: Any = auto, **options: Any) -> str:
    """The references of a computation, as text.

    Parameters
    ----------
    prob, alg, sensealg, options
        As for `solve`; what is left open is chosen as `solve` would. Nothing is solved.

    Returns
    -------
    str
        One line for the method, one for the sensitivity algorithm, each followed by its references.

    Raises
    ------
    InputError, UnsupportedCombination
        As `solve`.
    """
    from . import __version__
    from .choose import choose
    from .ensemble import EnsembleProblem
    from .probe import through_ad
    from .solve import checked, prepare_options

    if isinstance(prob, EnsembleProblem):
        prob = prob.member(0)
    run, x = prepare_options(prob, alg, options, through_ad(prob, sensealg))
    algorithm, _ = choose(run, x, checked(sensealg))
    lines = [f"Computed with sensealg {__version__}."]
    for what, used in (("Method", run.method), ("Derivatives", algorithm)):
        lines.append(f"{what}: {used.name}")
        lines += [f"  {text}" for text in references(used)]
    return "\n".join(lines)


def references(used: Any) -> list[str]:
    """The references of a method or an algorithm; a plugin may give text in place of a key."""
    return [REFERENCES.get(key, key) for key in used.references]
