"""The neural tangent kernel of encoders: empirical, infinitely wide, along training, and the flow it predicts.

For an encoder f with parameters theta and z outputs the kernel is matrix valued,

    K(x, x')[o, p] = sum_theta  d f_o(x) / d theta * d f_p(x') / d theta,

and every full kernel here keeps the output axes: shape (n1, n2, z, z). Tracing them away gives wrong dynamics at
finite width, where K is not a multiple of the identity.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["drift", "empirical", "gradient_flow", "growth_rate", "infinite", "jacobian", "structured"],
    submod_attrs={
        "drift": ["relative_change", "kernel_drift"],
        "empirical": ["empirical_ntk", "ntk_vector_product", "two_view"],
        "gradient_flow": ["Flow", "StackedFlow", "flow", "flow_stacked"],
        "growth_rate": ["Growth", "growth"],
        "infinite": ["infinite_ntk", "infinite_nngp"],
    },
)
