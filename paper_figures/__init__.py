"""Figures: each reads stored results and draws; nothing is computed here.

A figure is a module with ``EXPERIMENT`` (the name of an experiment) or ``EXPERIMENTS`` (a tuple of names) and
``draw(*results)``, which takes one result for each name and returns a Matplotlib figure. Draw them with
``python -m paper_figures``.
"""

FIGURES = ("ntk_width", "ntk_depth", "ntk_linearisation", "ntk_divergence", "ntk_features", "ntk_constancy")
