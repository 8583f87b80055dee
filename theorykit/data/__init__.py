"""Paired data: digits, Gaussian pairs, latent clusters, and sets read from files. Nothing is downloaded.

Contrastive learning sees pairs (a_i, b_i) that share what matters: two augmentations of one image, two modalities of
one object, two noisy readings of one latent. Every source here returns them as ``Pairs(a, b, labels)`` with rows as
examples, so that experiments can exchange one source for another.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "digits": ["augment", "digit_halves", "digit_views", "digits"],
        "files": ["DataError", "load", "read_cifar_batch", "read_idx", "source_files"],
        "latents": [
            "Generator",
            "generate",
            "smooth_generator",
            "sphere_pairs",
            "uniform_on_sphere",
            "von_mises_fisher",
        ],
        "normalise": ["Labelled", "Pairs", "to_sphere"],
        "sources": ["Segmented", "autocorrelated_sources", "independent_sources", "modulated_sources"],
        "synthetic": ["cross_from_correlations", "gaussian_pairs", "latent_clusters"],
    },
)
