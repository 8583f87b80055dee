r"""The joint generative hierarchical model: images and texts as leaves of two random trees with a common root.

The root s has a law P(s); in each tree the child of rank i of a node a in layer l is b with probability M_{l,i}[a, b],
and image x and text y are the leaves. Given the root they are independent, so the root posteriors are all that one says
of the other:

    P(x, y) = sum_s P(s) P(x|s) P(y|s),       s*(x, y) = ln P(x, y) / (P(x) P(y)) = ln sum_s P(s|x) P(s|y) / P(s)

Message passing computes them, and the Bayes answers of all downstream tasks, exactly and in time proportional to the
number of leaves. It runs in log space, in the dtype of the kernels, and kernels may hold zeros. Against enumeration in
float64 its probabilities are right to about 1e-14.

    model        Hierarchy, random_hierarchy, sample, enumerate_joint, all_leaves, check_hierarchy
    answers      root_posterior, beliefs, similarity, similarities, denoise, leaf_posterior, next_token,
                 zero_shot
    prompts      sample_prompts
    Bayes risks  bayes_risks over any number of samples, bayes_losses of given ones, paired_excess of a trained model

Source: Oko, Lin, Cai, Mei (arXiv 2501.04641), Mei (arXiv 2404.18444).
"""

from theorykit.surrogate._bayes import Losses, Risks, bayes_losses, bayes_risks, paired_excess
from theorykit.surrogate._beliefs import beliefs
from theorykit.surrogate._hierarchy_enumeration import all_leaves, enumerate_joint
from theorykit.surrogate._hierarchy_inference import (
    denoise,
    leaf_posterior,
    next_token,
    root_posterior,
    similarities,
    similarity,
)
from theorykit.surrogate._hierarchy_model import (
    Hierarchy,
    Sample,
    check_hierarchy,
    random_hierarchy,
    sample,
)
from theorykit.surrogate._zero_shot import sample_prompts, zero_shot

__all__ = [
    "Hierarchy",
    "Losses",
    "Risks",
    "Sample",
    "all_leaves",
    "bayes_losses",
    "bayes_risks",
    "beliefs",
    "check_hierarchy",
    "denoise",
    "enumerate_joint",
    "leaf_posterior",
    "next_token",
    "paired_excess",
    "random_hierarchy",
    "root_posterior",
    "sample",
    "sample_prompts",
    "similarities",
    "similarity",
    "zero_shot",
]
