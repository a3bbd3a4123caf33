"""What happens to a gradient on its way to a rule, in this order:

1. match        a gradient for each variable, of its shape; what does not fit is refused, what is missing left out
2. unscale      in float32 or wider, divide by `loss_scale_factor`
3. reduce       sum over the replicas of a strategy, in one call
4. accumulate   add to the sum of the window; only the last of `gradient_accumulation_steps` goes on, with the mean
5. judge        `nonfinite`: a gradient that the rule cannot take ends the step here
6. clip         `clipnorm`, `clipvalue` or `global_clipnorm`
7. update       in `execution.update`, each variable in the fastest way: add `l2`, the rule, `weight_decay`,
                constraint, write
8. average      in `execution.average`, all variables, with a gradient or without: `use_ema`
9. count        one more applied update: `iterations`

The conditions of 4 and 5 are met once for all replicas, because no condition can stand within a replica; what is
written from 4 on is written on every replica's copy.
"""

import warnings
from functools import partial

import numpy as np
from keras import ops

from kopt import _keras, backends, checks, numerics
from kopt.optimizers import execution

CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")


def readings(optimizer) -> dict[str, tuple]:
    """The variables that the way itself needs: name -> shape and dtype."""
    needed = {}
    if optimizer.gradient_accumulation_steps is not None:
        needed |= {"micro_step": ((), "int32"), "met": ((len(optimizer.trained),), "int32")}
    if optimizer.nonfinite != "apply":
        needed["skipped_steps"] = (), "int32"
    if optimizer.nonfinite == "raise":
        needed |= dict.fromkeys(("nonfinite_step", "nonfinite_variable", "nonfinite_waiting"), ((), "int32"))
    if optimizer.track_gradient_norm:
        needed["gradient_norm"] = (), checks.held_dtype()
    return needed


def check(gradients, variables) -> None:
    """Refuse gradients that do not fit their variables."""
    if len({id(variable) for variable in variables}) < len(variables):
        checks.refuse("trainable_variables", "a list without repetitions", [_keras.path_of(v) for v in variables])
    if len(gradients) != len(variables):
        allowed = f"one for each of the {len(variables)} variables, None where there is none"
        checks.refuse("grads", allowed, f"a list of {len(gradients)}")
    if backends.all_fit(gradients, variables):
        return
    for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
        if gradient is not None:
            shape, dtype = backends.shape_and_dtype(gradient)
            if "float" not in dtype or not backends.may_equal(shape, variable.shape):
                allowed = f"of floats and of shape {tuple(variable.shape)}, like {_keras.path_of(variable)!r}"
                checks.refuse(f"grads[{i}]", allowed, f"{dtype} of shape {shape}")
    if all(gradient is None for gradient in gradients):
        checks.refuse("grads", "a gradient for one variable at least (does the loss depend on them?)", gradients)


def take(optimizer, gradients, variables) -> None:
    """Take the gradients of one step, which fit, to the rule."""
    missing = [variable for gradient, variable in zip(gradients, variables, strict=True) if gradient is None]
    if missing:
        names = [_keras.path_of(variable) for variable in missing]
        text = f"Gradients do not exist for variables {names} when minimizing the loss; they are left as they are."
        warnings.warn(text, stacklevel=3)
        variables = [variable for gradient, variable in zip(gradients, variables, strict=True) if gradient is not None]
        gradients = [gradient for gradient in gradients if gradient is not None]
    scale = optimizer.loss_scale_factor
    if scale is not None or optimizer.overwrites or not backends.all_of(optimizer.dtypes, gradients):
        gradients = [_unscaled(optimizer, g, v, scale) for g, v in zip(gradients, variables, strict=True)]
    looked_at = optimizer.nonfinite != "apply" or optimizer.track_gradient_norm or _limits(optimizer)
    distinct = looked_at and optimizer.gradient_accumulation_steps is None  # a sum has no rows
    backends.summed_over_replicas(gradients, partial(_accumulate, optimizer, variables, missing), distinct)


def _unscaled(optimizer, gradient, variable, scale):
    held = optimizer.held(variable)
    # What overwrites its variable is no gradient: no loss scale is in it, and the mean of the replicas is wanted.
    scale = backends.replicas() if held.overwritten else scale
    gradient = backends.cast(gradient, variable, held.dtype)
    return gradient if scale in (None, 1) else backends.mapped(lambda g: g / scale, gradient)


def _accumulate(optimizer, variables, missing, gradients) -> None:
    if optimizer.gradient_accumulation_steps is None:
        _judge(optimizer, variables, gradients)
        return

    micro_step, met = optimizer.readings["micro_step"], optimizer.readings["met"]
    given = np.zeros(met.shape, "int32")
    given[[optimizer.index_of(variable) for variable in variables]] = 1
    backends.clear_when(_int(micro_step) == 0, [met, *(optimizer.held(v).sum for v in optimizer.trained)])
    backends.on_every_copy(partial(_add, optimizer), variables, gradients)
    met.assign(ops.maximum(_int(met), given))
    micro_step.assign_add(1)

    def close():
        # A copy, since torch assigns in place; and no constant, since a state may come from a window of another length.
        count = _int(micro_step) + 0
        micro_step.assign(0)
        chosen = [*variables, *missing]
        _judge(optimizer, chosen, [optimizer.held(v).sum for v in chosen], count, doubtful=missing)

    is_last = _int(micro_step) >= optimizer.gradient_accumulation_steps
    backends.when(is_last, close, optimizer.everything)


def _add(optimizer, variable, gradient) -> None:
    held = optimizer.held(variable)
    if held.overwritten:
        largest = backends.read(held.sum, held.dtype)
        optimizer.assign(held.sum, ops.where((largest >= gradient) | ops.isnan(largest), largest, gradient))
    else:
        optimizer.assign_add(held.sum, gradient)


def _mean(held, total, count):
    """The mean of a window from its sum; without accumulation, what came."""
    if count is None:
        return total
    total = backends.read(total, held.dtype)
    return ops.copy(total) if held.overwritten else total / ops.cast(count, held.dtype)


def _judge(optimizer, variables, gradients, count=None, doubtful=()) -> None:
    update = partial(_update, optimizer, variables, gradients, count, doubtful)
    if optimizer.nonfinite == "apply":
        update()
        return
    verdicts = []
    for variable, gradient in zip(variables, gradients, strict=True):
        held = optimizer.held(variable)
        largest = np.finfo(held.dtype).max
        if optimizer.squares and not held.overwritten:
            largest = np.sqrt(largest, dtype=held.dtype)
        gradient = backends.entries(_mean(held, backends.first_copy(gradient), count))
        verdicts.append(ops.all(ops.abs(gradient) <= float(largest)))  # NaN is not
    verdicts = ops.stack(verdicts)
    if optimizer.nonfinite == "skip":
        goes_on = ops.all(verdicts)
        optimizer.readings["skipped_steps"].assign_add(ops.cast(~goes_on, "int32"))
    else:
        goes_on = _goes_on_or_raises(optimizer, variables, verdicts)
    backends.when(goes_on, update, optimizer.everything)


def _goes_on_or_raises(optimizer, variables, verdicts):
    """Whether the step may go on; what is bad is written down, and raised where that can be done at once.

    Where it cannot, because the step is compiled or because it would lose what it has to return, no step goes on any
    more until `raise_waiting` has raised it.
    """
    readings, at_once = optimizer.readings, not optimizer.stateless and not backends.is_symbolic(verdicts)
    if at_once:
        raise_waiting(optimizer)
    waiting, all_fine = ops.cast(_int(readings["nonfinite_waiting"]), "bool"), ops.all(verdicts)
    bad = ~all_fine & ~waiting
    indices = ops.convert_to_tensor([optimizer.index_of(variable) for variable in variables], "int32")
    first = ops.take(indices, ops.argmin(ops.cast(verdicts, "int32")))
    for name, value in (("nonfinite_step", _int(optimizer.iterations) + 1), ("nonfinite_variable", first)):
        readings[name].assign(ops.where(bad, value, _int(readings[name])))
    readings["skipped_steps"].assign_add(ops.cast(bad, "int32"))
    if at_once:
        if bad:
            raise FloatingPointError(_complaint(optimizer))
        return all_fine
    complaints = [_complaint(optimizer, variable) for variable in variables]
    written = [_int(reading) for name, reading in readings.items() if name not in ("met", "gradient_norm")]
    with backends.demanded(verdicts, complaints, after=written):
        readings["nonfinite_waiting"].assign(ops.cast(waiting | bad, "int32"))
    return all_fine & ~waiting


def raise_waiting(optimizer) -> None:
    """Raise, once, what a step under `nonfinite="raise"` could not raise itself."""
    waiting = optimizer.readings.get("nonfinite_waiting")
    if waiting is not None and _keras.to_numpy(waiting):
        waiting.assign(0)
        raise FloatingPointError(_complaint(optimizer))


def _complaint(optimizer, variable=None) -> str:
    """What is wrong with the gradient of a variable; by default of the one, and at the update, that is written down."""
    at = ""
    if variable is None:
        step, index = (_keras.to_numpy(optimizer.readings[f"nonfinite_{of}"]) for of in ("step", "variable"))
        at, variable = f" at update {step}", optimizer.trained[index]
    what = "or its square is" if optimizer.squares else "is"
    return f"The gradient of `{_keras.path_of(variable)}` {what} not finite{at}; the weights are those before it."


def _update(optimizer, variables, gradients, count, doubtful) -> None:
    shared = execution.scalars(optimizer, optimizer.rate_now())
    norm = None
    if optimizer.global_clipnorm is not None or optimizer.track_gradient_norm:
        pairs = [(optimizer.held(v), g) for v, g in zip(variables, gradients, strict=True)]
        firsts = [_mean(held, backends.first_copy(g), count) for held, g in pairs if not held.overwritten]
        norm = numerics.norm([backends.entries(g) for g in firsts])
        if optimizer.track_gradient_norm:
            optimizer.readings["gradient_norm"].assign(norm[0] * norm[1])

    limits = _limits(optimizer)

    def update(variables, gradients, shared=shared):
        if count is None and not limits and not optimizer.overwrites:
            execution.update(optimizer, variables, gradients, shared)
            return
        rule, means = [], {dtype: [] for dtype in optimizer.dtypes}
        for variable, gradient in zip(variables, gradients, strict=True):
            held = optimizer.held(variable)
            gradient = _mean(held, gradient, count)
            if held.overwritten:
                optimizer.assign(variable, gradient)
            else:
                rule.append(variable)
                means[held.dtype].append(gradient)
        means = {dtype: iter(_clipped(limits, of_dtype, norm, dtype)) for dtype, of_dtype in means.items()}
        execution.update(optimizer, rule, [next(means[optimizer.held(v).dtype]) for v in rule], shared)

    sure = len(variables) - len(doubtful)  # those last ones had no gradient now, but may have had one in the window
    for variable, gradient in zip(variables[sure:], gradients[sure:], strict=True):
        met = _int(optimizer.readings["met"])[optimizer.index_of(variable)]
        own = {dtype: execution.afresh(of_dtype) for dtype, of_dtype in shared.items()}
        one = partial(backends.on_every_copy, lambda v, g, own=own: update([v], [g], own), [variable], [gradient])
        backends.when(met > 0, one, optimizer.everything)
    if backends.strategy() is None:
        update(variables[:sure], gradients[:sure])
    else:
        backends.on_every_copy(lambda v, g: update([v], [g]), variables[:sure], gradients[:sure])
    if optimizer.use_ema:
        move = partial(execution.average, optimizer, shared)
        backends.on_every_copy(move, optimizer.trained, optimizer.trained)
    backends.count_up(optimizer.iterations)


def _limits(optimizer) -> dict:
    """The variables of the clips that are in use: none or one."""
    return {name: variable for name, variable in optimizer.hyper_variables.items() if name in CLIPS}


def _clipped(limits, gradients, global_norm, dtype) -> list:
    if not limits or not gradients:
        return gradients
    ((kind, variable),) = limits.items()
    limit = backends.read(variable, dtype)
    if kind == "clipvalue":
        return [backends.mapped(lambda g: ops.clip(g, -limit, limit), gradient) for gradient in gradients]
    if kind == "global_clipnorm":
        factors = [numerics.shrinking(global_norm, limit)] * len(gradients)
    else:
        factors = numerics.shrinkings([backends.entries(gradient) for gradient in gradients], limit)
    return [backends.mapped(lambda g, f=f: g * f, g) for g, f in zip(gradients, factors, strict=True)]


def _int(variable):
    return backends.read(variable, "int32")
