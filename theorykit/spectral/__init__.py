"""Predictions of learned representations in closed form: PCA, CCA, contrastive optima, their dynamics, and comparison.

Encoders are not unique: (P f, P^-T g) gives the same scores for every invertible P. So pairs of encoders are compared
by scores, subspaces and best linear maps, never coordinate by coordinate; Gram matrices are determined only where one
encoder serves both views.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["cca", "collapse", "compare", "contrastive", "eigenmaps", "gaussian", "pca", "stepwise", "stiefel"],
)
