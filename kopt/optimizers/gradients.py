"""What happens to a gradient on its way to a rule, and to the weights after it, in this order:

1. match        a gradient for each variable, of its shape; what does not fit is refused, what is missing left out
2. unscale      in float32 or wider, divide by `loss_scale_factor`
3. reduce       sum over the replicas of a strategy: one all-reduce a step
4. accumulate   add to the sum of the window; only the last of `gradient_accumulation_steps` goes on, with the mean
5. judge        `nonfinite`: a gradient that the rule cannot take ends the step here
6. clip         `clipnorm`, `clipvalue` or `global_clipnorm`
7. decay        add the coupled `l2` term
8. update       the rule, decoupled `weight_decay`, constraint, moving average: `execution.py`, variable by variable
9. count        one more applied update: `iterations`

From 4 on all runs once for all replicas of a strategy, because no condition can stand within a replica.
"""

import warnings
from functools import partial

import numpy as np
from keras import ops

from kopt import _keras, backends, checks, numerics
from kopt.optimizers import execution

CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")


def counted(optimizer) -> dict[str, str]:
    """The scalars that the way needs, and their dtypes."""
    counts = {}
    if optimizer.gradient_accumulation_steps is not None:
        counts["micro_step"] = "int32"
    if optimizer.nonfinite != "apply":
        counts["skipped_steps"] = "int32"
    if optimizer.nonfinite == "raise":
        counts |= {"nonfinite_step": "int32", "nonfinite_variable": "int32", "nonfinite_waiting": "int32"}
    if optimizer.track_gradient_norm:
        counts["gradient_norm"] = checks.held_dtype()
    return counts


def take(optimizer, gradients, variables) -> None:
    """Take the gradients of one step to the rule."""
    backends.check_strategy(optimizer.home)
    gradients, variables = _matched(optimizer, gradients, variables)
    gradients = [_unscaled(optimizer, g, v) for g, v in zip(gradients, variables, strict=True)]
    backends.summed_over_replicas(gradients, partial(_accumulate, optimizer, variables))


def _matched(optimizer, gradients, variables) -> tuple[list, list]:
    if len(gradients) != len(variables):
        checks.refuse("grads", f"as many as the variables, {len(variables)}", f"a list of {len(gradients)}")
    for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
        path = _keras.path_of(variable)
        if optimizer.index_of(variable) is None:
            known = f"among the {len(optimizer.trained)} that the optimizer was built with"
            hint = "other variables need another optimizer, and a model must be built before its optimizer"
            checks.refuse("trainable_variables", f"{known}: {hint}", path)
        if gradient is not None:
            shape, dtype = backends.shape_and_dtype(gradient)
            if "float" not in dtype or not backends.may_equal(shape, variable.shape):
                allowed = f"of floats and of shape {tuple(variable.shape)}, like {path!r}"
                checks.refuse(f"grads[{i}]", allowed, f"{dtype} of shape {shape}")
    missing = [_keras.path_of(v) for g, v in zip(gradients, variables, strict=True) if g is None]
    if len(missing) == len(variables):
        checks.refuse("grads", "a gradient for one variable at least; does the loss depend on any?", gradients)
    if missing:
        text = f"Gradients do not exist for variables {missing} when minimizing the loss; they are left as they are."
        warnings.warn(text, stacklevel=4)
    pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
    return [g for g, _ in pairs], [v for _, v in pairs]


def _unscaled(optimizer, gradient, variable):
    held = optimizer.held(variable)
    # What overwrites its variable is no gradient: no loss scale is in it, and the mean of the replicas is wanted.
    scale = backends.replicas() if held.overwritten else optimizer.loss_scale_factor
    gradient = backends.cast(gradient, variable, held.dtype)
    return gradient if scale in (None, 1) else backends.mapped(lambda g: g / scale, gradient)


def _accumulate(optimizer, variables, gradients) -> None:
    if optimizer.gradient_accumulation_steps is None:
        _judge(optimizer, variables, gradients, mean=lambda gradient, held: gradient)
        return

    micro_step = optimizer.counts["micro_step"]
    optimizer.window.update(map(optimizer.index_of, variables))
    chosen = [optimizer.trained[i] for i in sorted(optimizer.window)]  # a variable may miss some gradients of a window
    sums = [optimizer.held(variable).sum for variable in chosen]

    def mean(total, held):
        total = backends.read(total, held.dtype)
        return total if held.overwritten else total / backends.read(micro_step, held.dtype)

    def add(variable, gradient):
        held = optimizer.held(variable)
        if held.overwritten:
            optimizer.assign(held.sum, ops.maximum(backends.read(held.sum, held.dtype), gradient))
        else:
            optimizer.assign_add(held.sum, gradient)

    def close():
        _judge(optimizer, chosen, sums, mean)
        micro_step.assign(0)
        optimizer.window.clear()

    every_sum = [optimizer.held(variable).sum for variable in optimizer.trained]
    backends.clear_when(backends.read(micro_step, "int32") == 0, every_sum)
    backends.on_every_copy(add, variables, gradients)
    micro_step.assign_add(1)
    is_last = backends.read(micro_step, "int32") >= optimizer.gradient_accumulation_steps
    backends.when(is_last, close, optimizer.everything)


def _judge(optimizer, variables, gradients, mean) -> None:
    update = partial(_update, optimizer, variables, gradients, mean)
    if optimizer.nonfinite == "apply":
        update()
        return
    fine = []
    for variable, gradient in zip(variables, gradients, strict=True):
        held = optimizer.held(variable)
        largest = np.finfo(held.dtype).max
        largest = np.sqrt(largest, dtype=held.dtype) if optimizer.squares else largest
        gradient = backends.entries(mean(backends.first_copy(gradient), held))
        fine.append(ops.all(ops.abs(gradient) <= float(largest)))  # NaN is not
    fine = ops.stack(fine)
    if optimizer.nonfinite == "skip":
        all_fine = ops.all(fine)
        optimizer.counts["skipped_steps"].assign_add(ops.cast(~all_fine, "int32"))
    else:
        all_fine = _recorded(optimizer, variables, fine)
    backends.when(all_fine, update, optimizer.everything)


def _recorded(optimizer, variables, fine):
    """Whether the step may go on; what is bad is written down, and raised where that can be done at once.

    Where it cannot, because the step is compiled or because it would lose what it has to return, no step goes on any
    more until `complain` has raised it.
    """
    counts = optimizer.counts
    waiting = ops.cast(backends.read(counts["nonfinite_waiting"], "int32"), "bool")
    all_fine = ops.all(fine)
    bad = ~all_fine & ~waiting
    indices = ops.convert_to_tensor([optimizer.index_of(variable) for variable in variables], "int32")
    first = ops.take(indices, ops.argmin(ops.cast(fine, "int32")))
    step = backends.read(optimizer.iterations, "int32") + 1
    for name, value in (("nonfinite_step", step), ("nonfinite_variable", first)):
        counts[name].assign(ops.where(bad, value, backends.read(counts[name], "int32")))
    counts["skipped_steps"].assign_add(ops.cast(bad, "int32"))
    if not optimizer.stateless and not backends.is_symbolic(bad):
        if bad:
            raise FloatingPointError(_complaint(optimizer))
        return all_fine
    complaints = [_complaint(optimizer, variable) for variable in variables]
    with backends.demanded(fine, complaints):
        counts["nonfinite_waiting"].assign(ops.cast(waiting | bad, "int32"))
    return all_fine & ~waiting


def complain(optimizer) -> None:
    """Raise what a compiled step under `nonfinite="raise"` has left to be raised, once."""
    if optimizer.nonfinite == "raise" and optimizer.built and _keras.to_numpy(optimizer.counts["nonfinite_waiting"]):
        optimizer.counts["nonfinite_waiting"].assign(0)
        raise FloatingPointError(_complaint(optimizer))


def _complaint(optimizer, variable=None) -> str:
    """What is wrong with the gradient of a variable; by default of the one, and at the update, that is written down."""
    at = ""
    if variable is None:
        step, index = (_keras.to_numpy(optimizer.counts[f"nonfinite_{of}"]) for of in ("step", "variable"))
        at, variable = f" at update {step}", optimizer.trained[index]
    what = "or its square is" if optimizer.squares else "is"
    return f"The gradient of `{_keras.path_of(variable)}` {what} not finite{at}; the weights are those before it."


def _update(optimizer, variables, gradients, mean) -> None:
    shared = execution.scalars(optimizer, optimizer.learning_rate)
    norm = None
    if optimizer.global_clipnorm is not None or optimizer.track_gradient_norm:
        held = map(optimizer.held, variables)
        firsts = [mean(backends.first_copy(g), h) for g, h in zip(gradients, held, strict=True) if not h.overwritten]
        norm = numerics.norm([backends.entries(g) for g in firsts])
        if optimizer.track_gradient_norm:
            optimizer.counts["gradient_norm"].assign(norm)

    def update(variable, gradient):
        held = optimizer.held(variable)
        gradient = mean(gradient, held)
        if held.overwritten:
            optimizer.assign(variable, gradient)
        else:
            optimizer.update_step(_clipped(optimizer, gradient, norm, held.dtype), variable, shared)

    backends.on_every_copy(update, variables, gradients)
    optimizer.iterations.assign_add(1)


def _clipped(optimizer, gradient, global_norm, dtype):
    limit = {name: backends.read(v, dtype) for name, v in optimizer.hyper_variables.items() if name in CLIPS}
    if "global_clipnorm" in limit:
        return _scaled_down(gradient, global_norm, limit["global_clipnorm"])
    if not limit:
        return gradient
    gradient = backends.distinct_rows(gradient)
    if "clipnorm" in limit:
        return _scaled_down(gradient, numerics.norm([backends.entries(gradient)]), limit["clipnorm"])
    return backends.mapped(lambda g: ops.clip(g, -limit["clipvalue"], limit["clipvalue"]), gradient)


def _scaled_down(gradient, norm, limit):
    norm = ops.cast(norm, limit.dtype)
    factor = ops.where(norm > limit, limit / norm, ops.ones_like(limit))
    return backends.mapped(lambda g: g * factor, gradient)
