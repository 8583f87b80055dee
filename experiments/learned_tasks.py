r"""Four tasks learned on hierarchies: what is lost against Bayes, with few prompts, and under a shift of p.

CLIP pairs with the score of the optimal form, ln sum_s softmax(f)_s softmax(g)_s, are trained on fresh samples of
hierarchies (`_hierarchy_clip`), then denoisers and next-token decoders that see the other modality through the trained
encoder (`_task_models`). One member for each level of p, seed and kind of training:

    guided     hidden states also regress the messages of message passing
    standard   the task alone, encoder of the standard pair, frozen
    shallow    one block in place of all, in encoders and networks
    misguided  guided by the messages of other samples, which tell it nothing: a placebo
    joint      standard, but the encoder starts afresh and is trained with the network

All losses are compared with those of the Bayes answers on the same held-out samples (`hierarchy.paired_excess`).

(a) Risks against p. No trained risk lies below Bayes; as a control, the Bayes answers of another hierarchy do not pass.
The expected order is guided <= standard <= shallow; all neighbours with their intervals are in `ordering` and in the
figure. At depth 2 and 99.9% over 16 cells, supervision by messages helps in the contrastive task (by 0.005 nats) and
denoising (0.002), and one block is worse in denoising (0.005) and next tokens (0.001): these are claims, chosen after a
first run, on quotients of excesses (1.8, 1.26, 1.4 and 1.15), since excesses differ much between hierarchies. Their
control is the placebo in place of the guided or of the shallow member: what the same network gains by supervision that
tells it nothing (1.02 and 1.03, at most 1.11 and 1.05), and what a second training with all blocks loses. Another
control would be trees whose depth is useless: the preset `stars`, see below.
Supervision in zero-shot (0.0008, from 0.00003 on) and in next tokens (0.0004, both signs) is no claim. In the
contrastive task and zero-shot one block and two cannot be told apart. Of these four pairs the claim is that they are
close. Above depth 2 all eight are checked for order, from p = 0.2 on. Training encoder and network jointly, from a
fresh start and in as many steps, is worse in denoising (by 0.002) and undecided in next tokens; it is no claim.

Depth 3 and ten symbols (preset full, 12 hierarchies of p >= 0.2, quotients of excesses with 99.9% intervals): without
supervision by messages 1.7 (1.3 to 2.3) times the contrastive excess is left, 1.75 (1.1 to 2.7) in zero-shot, 1.17
(1.05 to 1.30) in denoising, 1.14 (1.08 to 1.19) in next tokens; with the placebo 1.03, 1.03, 1.00 and 1.01 times. In
zero-shot the interval does not clear the margin. One block leaves 2.0 (1.4 to 2.8) times the excess in denoising and
1.36 (1.26 to 1.47) in next tokens; in the contrastive task (1.2, 0.95 to 1.5) and zero-shot (1.2, 0.85 to 1.8) it is
still undecided. At p = 0.1 two of four standard pairs merge roots and lose 0.12 nats where the others lose 0.02; none
of the guided ones does. After these steps members are not as close to Bayes as at depth 2 (by 0.06, 0.02, 0.04 and
0.025 in the four tasks), and claims whose thresholds come from depth 2 are not all supported: near, reference, along,
average and follow.

Trees of depth 1 (preset stars, 16 hierarchies, sizes and steps of quick): no gain by supervision is seen. Without it
0.90 (0.69 to 1.19) times the contrastive excess is left, which refutes the factor of 1.2 of LT.guided there, and 0.92
(0.77 to 1.09) in denoising, which does not decide about 1.08. But one block loses in next tokens here too (1.22, 1.12
to 1.33; 1.15 at depth 2), and perhaps in denoising (1.28, 1.03 to 1.59; 1.4 at depth 2): LT.shallow shows what a
second block is worth, not that the depth of the tree is why. Nine of the 70 verdicts of this preset are not as
expected, since they state what holds at depth 2.

(b) Zero-shot classification by M prompts follows a + b/M with the b of `downstream.prompt_coefficient`. The asymptote
needs M well above v_c/g_c^2, the relative variance of e^s over the prompts of a class: at p = 0.1, where single prompts
tell the root, that is some tens, and a coefficient fitted to 8 to 128 prompts is a third above b; the claim is on
p >= 0.2. Averages of similarities lose more than averages of exponentials with many prompts, but less with two.

(c) Members trained at one p do on samples of another about what Bayes with the p of training does. That mis-specified
answer is no lower bound, trained members lie below it by many standard errors where p is shifted in both modalities
(with the image alone they do not); Bayes of the samples' own hierarchy is. Both statements are checked for all kinds of
shift together, with the other of the two Bayes answers as control, and for each kind.

(d) Along training the excess on held-out samples falls in all tasks, to 0.011 to 0.024 of the start's. On samples of
another hierarchy, the control, it rises with CLIP pairs and stays at 0.16 in denoising, where the noisy leaf itself
tells much, and at a half in next tokens.

Statements on means (near, guided, shallow, prompts, average) have cells of one seed and one p as replicates, which
share nothing; that levels differ widens the intervals. Statements on each member trained here (floor, follow) allow for
4 standard errors of its paired differences. Figures show 95% intervals over seeds.

Source: Oko, Lin, Cai, Mei (arXiv 2501.04641) for model, tasks and kinds of training; the rest is derived or measured.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _hierarchy_clip as clip
from experiments import _task_evaluation as evaluation
from experiments import _task_members as members
from experiments import _task_verdicts as judged
from experiments._side_by_side import WORKERS, kept, side_by_side_after
from experiments._task_members import VARIANTS, pairs_of
from experiments._task_verdicts import KINDS, REFERENCE, TASKS
from theorykit import results, verify
from theorykit.surrogate.hierarchy import Hierarchy


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of trees, networks and steps; levels of p, seeds, samples, and thresholds."""

    size: clip.Size = dataclasses.field(default_factory=lambda: clip.Size(learning_rate=4e-3))
    variants: tuple[str, ...] = VARIANTS
    conditional: tuple[str, ...] = ("denoising", "next_token")
    levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    shifted: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)  # of samples, for members trained at `REFERENCE`
    seeds: int = 4
    pair_steps: int = 1000
    steps: int = 700  # of denoisers and decoders
    checkpoints: tuple[int, ...] = (0, 30, 100, 300)  # of standard members, beside the end
    samples: int = 4096
    images: int = 256
    pool: int = 1024
    floor: float = results.threshold(4.0, "standard errors: on chance one member in 30,000 lies as far below Bayes")
    near: float = results.threshold(0.03, "the aim, nats or mean square, set before a first run at p = 0.2")
    gap: float = results.threshold(0.0, "any loss against Bayes beyond the noise of the cells")
    gain: float = results.threshold(
        math.log(1.2), "of a logarithm, contrastive and zero-shot; set after a first run, of which placebos reach half"
    )
    gain_denoising: float = results.threshold(math.log(1.08), "the same, where excesses have less noise")
    gain_next_token: float = results.threshold(math.log(1.03), "the same, where one block costs a seventh")
    left: float = results.threshold(0.05, "of the start's; set after a first run")
    left_denoising: float = results.threshold(
        0.03, "the same; noisy leaves tell much by any hierarchy, and the control of a first quick run reached to 0.044"
    )
    apart: float = results.threshold(0.005, "nats, a sixth of the aim; set after a first run")
    coefficient: float = results.threshold(
        0.25, "relative, set after a first run; the next term adds about v/g^2 over M, 2 over 8 and more"
    )
    average: float = results.threshold(0.2, "of a logarithm, a fifth more; set after a first run")
    follow: float = results.threshold(0.04, "nats or mean square; what is lost to a shift is threefold")

    def __post_init__(self):
        members.check_variants(self.variants)


_FULL = Config(
    # In short trainings at a rate of 2e-3 a standard pair (p = 0.4) hardly learned; at 1e-3 and at 5e-4 all four did.
    size=clip.Size(alphabet=10, depth=3, width=64, blocks=3, batch=64, learning_rate=1e-3),
    shifted=(0.05, 0.1, 0.2, 0.3, 0.4),
    pair_steps=6000,
    steps=3000,
    checkpoints=(0, 100, 300, 1000, 3000),
    samples=8192,
    gain_denoising=math.log(1.03),  # as in next tokens: at depth 3 placebos reach 1.02
)
PRESETS = {
    # One training program, and no time for a second: denoisers and decoders are trained from quick on.
    "smoke": Config(
        variants=("standard",),
        conditional=(),
        checkpoints=(0,),
        levels=(0.2,),
        shifted=(0.05, 0.2),
        seeds=7,
        pair_steps=450,
        follow=0.06,  # trained for half as long, members lose more
    ),
    "quick": Config(),
    # Trees of one layer with as many leaves: what one block loses here, it does not lose for want of a second layer's
    # messages. An edge keeps its symbol as often as two edges in a tree of `quick`: 1 - p is (1 - p')^2.
    "stars": Config(size=clip.Size(depth=1, arity=4, learning_rate=4e-3), levels=(0.2, 0.36, 0.51, 0.64)),
    "full": _FULL,
    # For an accelerator.
    "paper": dataclasses.replace(
        _FULL,
        size=clip.Size(alphabet=10, depth=4, arity=3, width=128, blocks=4, heads=8, batch=128, learning_rate=1e-3),
        levels=(0.05, 0.1, 0.2, 0.4),  # sixteen pairs and twenty networks, for two to four devices
        shifted=(0.05, 0.1, 0.2, 0.4),
        seeds=2,
        pair_steps=30000,
        steps=30000,
        samples=2048,
    ),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """Train all members and measure; arrays have a leading axis of seeds.

    bayes/<task>, bayes/<task>/error (seeds, levels): risks and their standard errors. excess/<task>/value, .../error
    (seeds, variants, levels). other/<task>/...: against the Bayes answers of another hierarchy. mixed/<task> (seeds,
    levels): of standard members told of another sample. along/<task>/value, .../error (seeds, checkpoints, levels):
    excesses of standard members while they train; along/<task>/foreign: on samples of another hierarchy.
    prompts/<what> (seeds, levels, variants, ...), see `_task_prompts.curves`. shift/<kind>/bayes/<task>, .../error,
    shift/<kind>/train/<task>/value, .../error (seeds, shifted): what Bayes with the p of training loses;
    shift/<kind>/excess/<task>/..., shift/<kind>/over/<task>/..., shift/<kind>/other/<task>/... (seeds, variants,
    shifted): what members lose against Bayes with the p of the samples, with that of training, and of another
    hierarchy; shift/<kind>/mixed/<task> (seeds, shifted): against that of training, told of another sample.
    """
    members.check_memory(config)
    tasks, seeds = config.conditional, range(config.seeds)
    pairs = {f"pairs-{seed}": (partial(members.train_pairs, config, seed), ()) for seed in seeds}
    cells = {}
    for seed in seeds:
        for task in tasks:
            cells[f"{task}-{seed}"] = (partial(_network, config, seed, task), (f"pairs-{seed}",))
    for seed in seeds:
        trained = [f"{what}-{seed}" for what in ("pairs", *tasks)]
        cells[f"measured-{seed}"] = (partial(_of_trained, _measured, "rows", config, seed), trained)
        cells[f"along-{seed}"] = (partial(_of_trained, _along, "along", config, seed), trained)
    cells = {label: (kept(label, function), needed) for label, (function, needed) in (pairs | cells).items()}
    # While the first pairs train, the programs of the other tasks and that of the measurements are compiled.
    compiled = {f"compile {task}": (partial(members.train_network, config, 0, task, None), ()) for task in tasks}
    for function, form in ((_measured, "rows"), (_along, "along")):
        compiled[f"compile {form}"] = (partial(function, config, 0, *members.blank(config, form)), ())
    workers = WORKERS if len(jax.devices()) == 1 else 1  # several devices are all taken by one training
    found = side_by_side_after({"pairs-0": cells["pairs-0"]} | compiled | cells, workers)
    of_seeds = [found[f"measured-{seed}"] | found[f"along-{seed}"] for seed in seeds]
    return {name: np.stack([arrays[name] for arrays in of_seeds]) for name in of_seeds[0]}


def _network(config, seed, task, pairs):
    return members.train_network(config, seed, task, jnp.asarray(pairs["rows"]))


def _of_trained(measure, form, config, seed, pairs, *networks):
    networks = {task: jnp.asarray(trained[form]) for task, trained in zip(config.conditional, networks, strict=True)}
    return measure(config, seed, jnp.asarray(pairs[form]), networks)


# Measurements ---------------------------------------------------------------------------------------------------------


def _measured(config, seed, pairs, networks):
    size, levels, tests = config.size, len(config.levels), len(config.shifted)
    hs, reference = members.hierarchies(config, seed), config.levels.index(REFERENCE)
    shifted = clip.hierarchies(size, members.keys_of(seed, levels, 0)[reference], jnp.asarray(config.shifted))
    home = jax.tree.map(lambda a: jnp.broadcast_to(a[reference], (tests, *a.shape[1:])), hs)
    moved = [
        Hierarchy(*(getattr(shifted if side in sides else home, side) for side in Hierarchy._fields[:2]))
        for sides in KINDS.values()
    ]
    level = np.concatenate([np.arange(levels), np.full(len(KINDS) * tests, reference)])
    train = jax.tree.map(lambda a: a[level], hs)
    other = clip.hierarchies(size, members.keys_of(seed, levels, 2), config.levels)

    def of_cells(rows):
        """(variants x levels, numbers) -> (cells, variants, numbers)"""
        return jnp.swapaxes(rows.reshape(-1, levels, rows.shape[1])[:, level], 0, 1)

    test = jax.tree.map(lambda *parts: jnp.concatenate(parts), hs, *moved)
    keys = jax.random.key_data(members.keys_of(seed, level.size, 3))
    gates = {"pairs": members.gates_of(config, pairs_of(config))}
    gates |= {task: members.gates_of(config, config.variants) for task in networks}
    cells = evaluation.Cell(
        test,
        train,
        jax.tree.map(lambda a: a[level], other),
        of_cells(pairs),
        {task: of_cells(rows) for task, rows in networks.items()},
        keys,
    )
    found = evaluation.measure(size, cells, gates, config.samples, config.images, config.pool)
    tasks = [task for task in TASKS if task in found]
    arrays = _at_home(jax.tree.map(lambda a: a[:levels], found), tasks)
    for i, kind in enumerate(KINDS):
        cut = slice(levels + i * tests, levels + (i + 1) * tests)
        arrays |= _away(jax.tree.map(lambda a, cut=cut: a[cut], found), tasks, kind)
    return arrays


def _at_home(found, tasks):
    """Without shift: Bayes risks, excesses, and what the controls see."""
    arrays = {name: np.asarray(value) for name, value in found.items() if name.startswith("prompts/")}
    for name, value in evaluation.differences(found, tasks).items():
        arrays[f"excess/{name}"] = np.moveaxis(value, -1, -2)
    for task in tasks:
        arrays |= _mean(f"bayes/{task}", found[f"bayes/{task}"])
        against = np.asarray(found[task]) - np.asarray(found[f"other/{task}"])[:, None]
        arrays[f"other/{task}/value"] = against.mean(axis=2).T
        arrays[f"other/{task}/error"] = against.std(axis=2, ddof=1).T / math.sqrt(against.shape[2])
        arrays[f"mixed/{task}"] = np.mean(np.asarray(found[f"mixed/{task}"] - found[f"bayes/{task}"]), axis=1)
    return arrays


def _away(found, tasks, kind):
    """With samples of another p."""
    arrays = {}
    for name, value in evaluation.differences(found, tasks).items():
        arrays[f"shift/{kind}/excess/{name}"] = value.T
    for task in tasks:
        bayes, train, other = (np.asarray(found[f"{who}/{task}"]) for who in ("bayes", "train", "other"))
        trained = np.asarray(found[task])
        arrays[f"shift/{kind}/mixed/{task}"] = (np.asarray(found[f"mixed/{task}"]) - train).mean(axis=1)
        arrays |= _mean(f"shift/{kind}/bayes/{task}", bayes)
        sides = {"train": train - bayes, "over": trained - train[:, None], "other": trained - other[:, None]}
        for name, difference in sides.items():
            error = difference.std(axis=-1, ddof=1) / math.sqrt(difference.shape[-1])
            arrays[f"shift/{kind}/{name}/{task}/value"] = difference.mean(axis=-1).T
            arrays[f"shift/{kind}/{name}/{task}/error"] = error.T
    return arrays


def _mean(name, losses):
    """Mean of losses (cells, n), and its standard error."""
    losses = np.asarray(losses)
    return {name: losses.mean(axis=1), f"{name}/error": losses.std(axis=1, ddof=1) / math.sqrt(losses.shape[1])}


def _along(config, seed, pairs, networks):
    """Standard members (checkpoints, levels, numbers), on samples of their own hierarchy and of another."""
    levels = len(config.levels)
    hs, other = (
        members.hierarchies(config, seed),
        clip.hierarchies(config.size, members.keys_of(seed, levels, 2), config.levels),
    )
    twice = lambda *both: jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *both)  # noqa: E731
    rows = jax.tree.map(lambda a: jnp.tile(jnp.swapaxes(a, 0, 1), (2, 1, 1)), (pairs, networks))
    keys = jax.random.key_data(members.keys_of(seed, 2 * levels, 3))
    found = evaluation.along(
        config.size, twice(hs, other), twice(hs, hs), *rows, keys, config.samples // 2, config.pool
    )
    arrays = {}
    for task, losses in found.items():
        losses = np.swapaxes(np.asarray(losses), 0, 1)  # (checkpoints, cells, n)
        value, error = losses.mean(axis=2), losses.std(axis=2, ddof=1) / math.sqrt(losses.shape[2])
        arrays[f"along/{task}/value"], arrays[f"along/{task}/foreign"] = np.split(value, 2, axis=1)
        arrays[f"along/{task}/error"] = error[:, :levels]
    return arrays


# Verdicts -------------------------------------------------------------------------------------------------------------


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """What the four tasks, their training, the prompts and the shift show, each claim with its control."""
    parts = (judged.risks, judged.order, judged.along, judged.of_prompts, judged.shift)
    return [verdict for part in parts for verdict in part(config, arrays)]
