"""Experiments: each computes arrays once, from which come its figure and its verdicts.

An experiment is a module with ``Config``, ``PRESETS``, ``run(config)`` and ``verdicts(config, arrays)``; see
`theorykit.results`. Run them with ``python -m experiments``.
"""

# Cheapest first, so that the first figure is there soon.
ORDER = ("ntk_width", "ntk_depth", "ntk_linearisation", "ntk_divergence", "ntk_features", "ntk_constancy")
