"""The surrogate S between contrastive pre-training loss and downstream losses, exactly on finite joint distributions.

For a joint P(x, y) with density ratio r = P / (p q), a score s and its model w = e^s / E_q e^s, the sufficiency is

    S(s) = E_p KL( P(.|x) || q w(x, .) ),

and the contrastive risk R_K with K candidates satisfies R_K(s) - R_K(ln r) <= S(s), with equality as K grows.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["bounds", "denoisers", "downstream", "information_loss", "joint", "risk"],
    submod_attrs={
        "risk": ["contrastive_risk", "excess_risk", "minimal_risk", "optimal_score"],
        "bounds": ["Chain", "chain"],
        "information_loss": ["encoder_sufficiency", "limiting_risk", "sufficiency"],
    },
)
