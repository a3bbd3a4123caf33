"""How a loss bends at a model's weights: the spectrum of its Hessian, which is never formed."""

from dataclasses import dataclass, field

import keras
import numpy as np
from keras import ops

from kopt import backends, checks
from kopt.objective import Objective, rows_of

MARGIN = 10  # how many times the errors of arithmetic an eigenvalue must be, to differ from 0
WELL_KNOWN = 10  # times its error an eigenvalue is, for a condition number


@dataclass(frozen=True, eq=False)
class Curvature:
    """What `curvature` has found; printed, it is a table."""

    size: int  # weights, and so eigenvalues
    largest: float
    largest_error: float  # an eigenvalue is no further than this from `largest`
    smallest: float
    smallest_error: float
    negative_share: float  # how many of the eigenvalues are below -precision
    negative_share_error: float  # the standard error over the probes
    negative_share_bounds: tuple[float, float]  # how far so many steps can be wrong, beside the standard error
    condition: float | str  # largest / smallest, or "indefinite", "singular", "unknown"
    converged: bool  # whether both extremes are known to the tolerance
    precision: float  # an eigenvalue this close to 0 counts as 0
    products: int  # Hessian-vector products that it took
    eigenvalues: np.ndarray = field(repr=False)  # the estimated spectrum, in order
    weights: np.ndarray = field(repr=False)  # the share of each in it; their sum is 1

    def __str__(self):
        condition = self.condition if isinstance(self.condition, str) else f"{self.condition:.4g}"
        low, high = self.negative_share_bounds
        between = "" if low == high else f", between {low:.3g} and {high:.3g} by the steps"
        lines = [
            f"Hessian of {self.size} weights, from {self.products} products",
            f"  largest eigenvalue   {self.largest:.4g} ± {self.largest_error:.1g}",
            f"  smallest eigenvalue  {self.smallest:.4g} ± {self.smallest_error:.1g}",
            f"  negative share       {self.negative_share:.4g} ± {self.negative_share_error:.1g}{between}",
            f"  condition number     {condition}",
        ]
        return "\n".join(lines if self.converged else [*lines, "  not converged: give more `steps`"])


def curvature(
    model,
    x,
    y=None,
    sample_weight=None,
    *,
    batch_size: int | None = None,
    steps: int = 64,
    tolerance: float = 1e-3,
    probes: int = 10,
    seed: int = 0,
    verbose: int = 1,
) -> Curvature:
    """The extreme eigenvalues of the Hessian of a model's loss, and how many are negative, by Lanczos's method.

    The loss is that of `evaluate`, with its penalties: Dropout is off, and `BatchNormalization` uses its moving
    statistics, so that nothing is random but the probes. The model stays as it is.

    Each probe is a random direction, from which `steps` products of Hessian and vector make a small matrix (Lanczos,
    with full orthogonalisation). The extremes are those of its eigenvalues, and the error is a bound: an eigenvalue of
    the Hessian is no further away, and that none lies beyond is as good as sure. Where there are no more weights than
    steps, the Hessian itself is made, without probes, and all is exact but for rounding.

    The share of negative eigenvalues is a mean over the probes (stochastic Lanczos quadrature), and its standard error
    says what other probes would change. More weights than steps blur the spectrum: `negative_share_bounds` is what the
    quadrature vouches for, whatever the spectrum between its nodes is. It is wide where many eigenvalues are almost 0,
    as in large networks, and more steps narrow it. An eigenvalue is negative below `-precision`, 10 times the errors of
    arithmetic: the rounding of the largest one, and what the products lack, as the asymmetry of the Hessian shows it.

    The condition number is a number where all eigenvalues are positive and the smallest is known to a tenth. Else it is
    "indefinite" if there is a negative one, "singular" if the smallest is 0 to the precision, and "unknown" if more
    steps must tell.

    It keeps `steps` vectors of the size of the weights in memory, in float64.

    Args:
        model: A model that is built and compiled with a loss, its weights all float32 or all float64.
        x: Inputs, as arrays, in any structure that the model takes.
        y: Targets, as arrays.
        sample_weight: Weights of the rows.
        batch_size: How many rows are in the memory of a product; None for all. The loss is the mean over the batches,
            weighted by their rows: the same for losses that are means over rows, but not for `reduction="sum"`.
        steps: Products for each probe, at most: fewer where the Hessian has fewer different eigenvalues.
        tolerance: `converged` if both extremes are known to this times the greatest of them.
        probes: Random directions; at least 2.
        seed: Of the probes.
        verbose: 1 for a progress bar of the products, 0 for none.

    Example:
        >>> import keras, kopt, numpy as np
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
        >>> model.compile("sgd", loss="mse")
        >>> found = kopt.curvature(model, np.array([[1.0, 0.0], [0.0, 3.0]]), np.ones((2, 1)), verbose=0)
        >>> round(found.largest, 4), round(found.smallest, 4), round(found.condition, 4), found.negative_share
        (9.0, 1.0, 9.0, 0.0)

    Reference:
        Ghorbani, Krishnan & Xiao, "An investigation into neural net optimization via Hessian eigenvalue density", ICML
        2019; Golub & Meurant, "Matrices, moments and quadrature with applications", Princeton 2010.
    """
    batch_size = checks.optional(checks.count(1))("batch_size", batch_size)
    steps, probes = checks.count(1)("steps", steps), checks.count(2)("probes", probes)
    tolerance, random = checks.inner("tolerance", tolerance), np.random.default_rng(checks.count(0)("seed", seed))
    if not isinstance(verbose, (int, np.integer)) or verbose not in (0, 1):
        checks.refuse("verbose", "0 or 1", verbose)
    objective = Objective(model, training=False)
    product = Products(objective, _batches(objective, x, y, sample_weight, batch_size))
    size, rounding = objective.size, float(np.finfo(objective.dtype).eps)
    total = size if size <= steps else probes * steps
    show = keras.utils.Progbar(total, unit_name="product").update if verbose else lambda done: None
    runs = [_whole(product, size, show)] if size <= steps else []
    while size > steps and len(runs) < probes:
        start = random.normal(size=size)
        run = _lanczos(product, start / np.linalg.norm(start), steps, rounding, show, len(runs) * steps)
        runs.append(run)
    return _result(runs, size, product.count, rounding, tolerance)


class Products:
    """Products of a vector with the Hessian of the mean loss over batches: on the host, in float64."""

    def __init__(self, objective, batches):
        self.objective, self.batches, self.count = objective, batches, 0
        self.vector, self.rows = objective.vector(), sum(rows for rows, _ in batches)
        run_eagerly = getattr(objective.model, "run_eagerly", False)
        self.run = objective.hessian_product if run_eagerly else backends.compiled(objective.hessian_product)

    def __call__(self, direction):
        direction, total = ops.convert_to_tensor(direction.astype(self.objective.dtype)), 0.0
        for rows, data in self.batches:
            part = self.run(self.vector, direction, self.objective.tensors(*data[:3]))
            total = total + rows / self.rows * ops.convert_to_numpy(part).astype("float64")
        if not np.isfinite(total).all():
            checks.refuse(
                "model", "one whose loss on the data has finite second derivatives", self.objective.model.name
            )
        self.count += 1
        return total


def _batches(objective, x, y, sample_weight, batch_size) -> list:
    """`(rows, (x, y, sample_weight))` of each batch; a single one is on the device from now on."""
    rows = rows_of(x, y, sample_weight)
    data = keras.tree.map_structure(
        lambda part: part if part is None or ops.is_tensor(part) else np.asarray(part), (x, y, sample_weight)
    )
    if batch_size is None or batch_size >= rows:
        return [(rows, objective.tensors(*data))]
    batches = []
    for start in range(0, rows, batch_size):
        part = slice(start, min(start + batch_size, rows))
        batch = keras.tree.map_structure(lambda one, part=part: None if one is None else one[part], data)
        batches.append((part.stop - start, batch))
    return batches


@dataclass(frozen=True)
class Run:
    """What Lanczos's method says from one direction: a quadrature, and how far its nodes are from eigenvalues."""

    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    noise: float  # the length of the error of a product

    def share_below(self, bound: float, precision: float) -> tuple[float, float, float]:
        """How much of the spectrum is below a bound, and the least and the most that it can be.

        By Chebyshev, Markov and Stieltjes only the weights of the nodes to both sides of the bound are in doubt, and
        not even they where the node is an eigenvalue. In between, the share is taken to be linear.
        """
        place = int(np.sum(self.nodes < bound))
        share = float(self.weights[:place].sum())
        doubts = np.pad(np.where(self.residuals > precision, self.weights, 0.0), 1)
        low, high = share - doubts[place], share + doubts[place + 1]
        if 0 < place < len(self.nodes):
            sides = share - doubts[place] / 2, share + doubts[place + 1] / 2
            share = float(np.interp(bound, self.nodes[place - 1 : place + 1], sides))
        return share, low, high


def _whole(product, size, show) -> Run:
    """The eigenvalues of the Hessian itself."""
    columns = np.empty((size, size))
    for place, direction in enumerate(np.eye(size)):
        columns[place] = product(direction)
        show(place + 1)
    noise = np.linalg.norm(columns - columns.T) / np.sqrt(2 * size)
    nodes = np.linalg.eigvalsh((columns + columns.T) / 2)
    return Run(nodes, np.full(size, 1 / size), np.zeros(size), float(noise))


def _lanczos(product, vector, steps, rounding, show, before) -> Run:
    basis, diagonal, beside, off = np.empty((steps, vector.size)), [], [], []
    for step in range(steps):
        basis[step] = vector
        known, image = basis[: step + 1], product(vector)
        along = known @ image
        diagonal.append(along[-1])
        off.extend(along[:-2])  # 0 of a symmetric matrix
        image = image - along @ known
        image -= (known @ image) @ known  # twice is enough
        beside.append(np.linalg.norm(image))
        is_all = beside[-1] <= MARGIN * rounding * np.max(np.abs([*diagonal, *beside]))  # that the direction leads to
        show(before + (steps if is_all else step + 1))
        if is_all:
            break
        vector = image / beside[-1]
    inner = beside[:-1]
    nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(inner, 1) + np.diag(inner, -1))
    noise = np.sqrt(np.mean(np.square(off)) * vector.size) if off else 0.0
    return Run(nodes, vectors[0] ** 2, beside[-1] * np.abs(vectors[-1]), float(noise))


def _result(runs, size, products, rounding, tolerance) -> Curvature:
    top = max(runs, key=lambda run: run.nodes[-1])  # no node is beyond the extreme eigenvalues
    bottom = min(runs, key=lambda run: run.nodes[0])
    largest, smallest = float(top.nodes[-1]), float(bottom.nodes[0])
    scale = max(abs(largest), abs(smallest))
    precision = MARGIN * (rounding * scale + float(np.sqrt(np.mean([run.noise**2 for run in runs]))))
    off, off_smallest = float(top.residuals[-1]), float(bottom.residuals[0])
    shares = np.array([run.share_below(-precision, precision) for run in runs])
    share, low, high = shares.mean(0).tolist()
    nodes, weights = (np.concatenate([getattr(run, name) for run in runs]) for name in ("nodes", "weights"))
    order = np.argsort(nodes)
    if smallest > WELL_KNOWN * (off_smallest + precision):
        condition = largest / smallest
    elif smallest < -off_smallest - precision:
        condition = "indefinite"
    else:
        is_singular = off_smallest <= precision and smallest <= off_smallest + precision
        condition = "singular" if is_singular else "unknown"
    return Curvature(
        size=size,
        largest=largest,
        largest_error=off + precision,
        smallest=smallest,
        smallest_error=off_smallest + precision,
        negative_share=share,
        negative_share_error=float(shares[:, 0].std(ddof=1) / np.sqrt(len(runs))) if len(runs) > 1 else 0.0,
        negative_share_bounds=(low, high),
        condition=condition,
        converged=max(off, off_smallest) <= tolerance * scale,
        precision=precision,
        products=products,
        eigenvalues=nodes[order],
        weights=weights[order] / len(runs),
    )
