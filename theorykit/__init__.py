"""theorykit: check deep-learning theory by measurement.

Submodules are loaded on first use, so that ``import theorykit`` costs next to nothing and a notebook pays only for
what it touches::

    import theorykit as tk
    kernel = tk.ntk.empirical_ntk(encoder.apply, params, x)
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "data",
        "encoders",
        "evaluate",
        "losses",
        "ntk",
        "results",
        "search",
        "similarity",
        "spectral",
        "surrogate",
        "training",
        "verify",
    ],
)
