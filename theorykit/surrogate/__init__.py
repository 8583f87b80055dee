"""The surrogate S between contrastive pre-training loss and downstream losses, exactly on finite joint distributions.

For a joint P(x, y) with density ratio r = P / (p q), a score s and its model w = e^s / E_q e^s, the sufficiency is

    S(s) = E_p KL( P(.|x) || q w(x, .) ),

and the contrastive risk R_K with K candidates satisfies R_K(s) - R_K(ln r) <= S(s), with equality as K grows, and
S <= (1 + (2B - 1)/(K - 1)) (R_K(s) - R_K(ln r)) where r, w <= B. `hierarchy` is a model of images and texts whose Bayes
answers message passing gives; `mutual_information` has the bounds of I(X; Y) that critics give.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "bounds",
        "denoisers",
        "downstream",
        "hierarchy",
        "information_loss",
        "joint",
        "mutual_information",
        "pair_hierarchy",
        "risk",
    ],
    submod_attrs={
        "risk": ["contrastive_risk", "excess_risk", "minimal_risk", "optimal_score"],
        "bounds": ["Chain", "ceiling_factor", "chain"],
        "hierarchy": ["Hierarchy"],
        "information_loss": ["encoder_sufficiency", "limiting_risk", "sufficiency"],
    },
)
