"""Experiments: each computes arrays once, from which come its figure and its verdicts.

An experiment is a module with ``Config``, ``PRESETS``, ``run(config)`` and ``verdicts(config, arrays)``; see
`theorykit.results`. Run them with ``python -m experiments``.
"""

# Cheapest first, so that the first figure is there soon.
ORDER = (
    "surrogate_identity",
    "surrogate_bound",
    "prompts",
    "spectral_optima",
    "ntk_extrapolation",
    "spectral_dynamics",
    "spectral_gaussian",
    "mi_bounds",
    "surrogate_downstream",
    "ntk_width",
    "hierarchy_bayes",
    "ntk_linearisation",
    "ntk_divergence",
    "ntk_features",
    "ntk_prediction",
    "ntk_constancy",
    "spectral_clip",
    "spectral_identifiability",
    "spectral_sources",
    "spectral_subspace",
    "search_scaling",
    "search_embeddings",
    "message_probes",
    "digits_chain",
    "surrogate_learning",
    "ntk_depth",
    "sample_efficiency",
    "learned_tasks",
)
