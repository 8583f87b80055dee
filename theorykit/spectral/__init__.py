"""Predictions of learned representations in closed form: PCA, CCA, contrastive optima, their dynamics, and comparison.

Encoders are not unique: (P f, P^-T g) gives the same scores for every invertible P. So representations are compared
by subspaces, Gram matrices and best linear maps, never coordinate by coordinate.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["cca", "collapse", "compare", "contrastive", "eigenmaps", "gaussian", "pca", "stepwise", "stiefel"],
)
