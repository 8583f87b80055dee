"""Figures: each reads stored results and draws; nothing is computed here.

A figure is a module with ``EXPERIMENT`` (the name of an experiment) or ``EXPERIMENTS`` (a tuple of names) and
``draw(*results)``, which takes one result for each name and returns a Matplotlib figure. Draw them with
``python -m paper_figures``.
"""

FIGURES = (
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
    "spectral_subspace",
    "spectral_components",
    "search_scaling",
    "search_embeddings",
    "message_probes",
    "digits_chain",
    "surrogate_learning",
    "ntk_depth",
    "sample_efficiency",
    "learned_tasks",
    "learned_prompts",
    "learned_shift",
)
