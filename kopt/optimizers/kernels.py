"""Other ways to run a rule than its own few operations: ready-made kernels of TensorFlow and torch, and batches.

A kernel is called as `kernel(weights, gradients, *slots, at, **arguments)`, with a list of dense tensors or TensorFlow
variables for each; it updates weights and slots in place. tests/test_execution.py proves each equal to its rule.
"""

import functools
import itertools
import operator

import keras
import numpy as np

from kopt import backends

BACKEND = keras.backend.backend()
TILE = 2**18  # entries that a processor keeps in its cache while a rule works on them

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "torch":
    import torch


def find(name, at, arguments):
    """The kernel of this name that takes these arguments, or None."""
    if BACKEND == "torch" and arguments.get("momentum") == 0:
        return None  # torch wants no slot then, but momentum may come back
    if BACKEND == "torch" and name == "average" and arguments["nesterov"]:
        return None  # torch looks ahead by the gradient as it came
    if BACKEND == "torch" and name == "velocity" and at.learning_rate < 1e-8:
        return None  # it would get lost in `dampening`
    return _KERNELS.get(name)


def takes_decay(kernel, decay) -> bool:
    """Whether the kernel decays weights itself, and well: it multiplies them by `1 - decay` as float32 has it."""
    return kernel is _KERNELS.get("adam") and abs(1 - float(np.float32(1 - decay)) - decay) <= 0.01 * decay


# TensorFlow


def _tensorflow():
    raw = tf.raw_ops

    def sgd(weights, gradients, *, at):
        for w, g in zip(weights, gradients, strict=True):
            raw.ResourceApplyGradientDescent(var=w.handle, alpha=at.learning_rate, delta=g)

    def velocity(weights, gradients, v, *, at, momentum, nesterov):
        for w, g, s in zip(weights, gradients, v, strict=True):
            raw.ResourceApplyKerasMomentum(
                var=w.handle, accum=s.handle, lr=at.learning_rate, grad=g, momentum=momentum, use_nesterov=nesterov
            )

    def gradient(weights, gradients, v, *, at, momentum, nesterov):
        for w, g, s in zip(weights, gradients, v, strict=True):
            raw.ResourceApplyMomentum(
                var=w.handle, accum=s.handle, lr=at.learning_rate, grad=g, momentum=momentum, use_nesterov=nesterov
            )

    def adagrad(weights, gradients, c, *, at, epsilon):
        for w, g, s in zip(weights, gradients, c, strict=True):
            raw.ResourceApplyAdagradV2(var=w.handle, accum=s.handle, lr=at.learning_rate, epsilon=epsilon, grad=g)

    def adam(weights, gradients, m, v, *, at, beta_1, beta_2, epsilon, bias_correction):
        # The kernel's own correction cancels in float32, and its epsilon stands before it: powers of 0 switch it off.
        rate, zero = at.learning_rate, tf.zeros_like(at.learning_rate)
        if bias_correction:
            root = tf.sqrt(at.correction(beta_2))
            rate, epsilon = rate * at.correction(beta_1) / root, epsilon / root
        numbers = {"lr": rate, "beta1": beta_1, "beta2": beta_2, "epsilon": epsilon}
        for w, g, first, second in zip(weights, gradients, m, v, strict=True):
            raw.ResourceApplyAdam(
                var=w.handle, m=first.handle, v=second.handle, beta1_power=zero, beta2_power=zero, grad=g, **numbers
            )

    return {"sgd": sgd, "velocity": velocity, "gradient": gradient, "adagrad": adagrad, "adam": adam}


@functools.cache
def compiles() -> bool:
    """Whether XLA is there for the CPU: on some platforms TensorFlow comes without it."""
    with tf.init_scope():
        try:
            tf.function(lambda: tf.constant(1.0) + 1, jit_compile=True, autograph=False)()
        except Exception:  # what it raises differs from platform to platform
            return False
    return True


def island(update) -> None:
    """Call `update()`, compiled by XLA within a step that is not: one pass over each weight and its state."""
    tf.function(update, jit_compile=True, autograph=False)()


# torch


def _torch():
    same = {"maximize": False, "grad_scale": None, "found_inf": None}

    def steps(weights, t):
        step = torch.tensor(float(t), device=weights[0].device)
        return [step] * len(weights)

    def momentum_kernel(weights, gradients, v, l2=0.0, **arguments):
        torch._fused_sgd_(weights, gradients, v, weight_decay=l2, is_first_step=False, **arguments, **same)

    def sgd(weights, gradients, *, at, l2=0.0):
        momentum_kernel(weights, gradients, [], l2, lr=at.learning_rate, momentum=0.0, dampening=0.0, nesterov=False)

    def velocity(weights, gradients, v, *, at, momentum, nesterov, l2=0.0):
        # torch has v = momentum v + (1 - dampening) g; w -= lr v
        if nesterov and l2:
            gradients, l2 = torch._foreach_add(gradients, weights, alpha=l2), 0.0
        kernel = {"momentum": momentum, "dampening": 1 + at.learning_rate, "nesterov": False}
        momentum_kernel(weights, gradients, v, l2, lr=0.0 if nesterov else -1.0, **kernel)
        if nesterov:  # by the gradient as it came torch would look ahead
            torch._foreach_add_(weights, v, alpha=momentum)
            torch._foreach_add_(weights, gradients, alpha=-at.learning_rate)

    def gradient(weights, gradients, v, *, at, momentum, nesterov, l2=0.0):
        momentum_kernel(
            weights, gradients, v, l2, lr=at.learning_rate, momentum=momentum, dampening=0.0, nesterov=nesterov
        )

    def average(weights, gradients, v, *, at, momentum, nesterov, l2=0.0):
        momentum_kernel(
            weights, gradients, v, l2, lr=at.learning_rate, momentum=momentum, dampening=momentum, nesterov=False
        )

    def adagrad(weights, gradients, c, *, at, epsilon, l2=0.0):
        torch._fused_adagrad_(
            weights, gradients, c, steps(weights, at.t), lr=at.learning_rate, lr_decay=0.0, weight_decay=l2,
            eps=epsilon, **same,
        )  # fmt: skip

    def adam(weights, gradients, m, v, v_max=(), *, at, beta_1, beta_2, epsilon, bias_correction, l2=0.0, decay=0.0):
        fused = torch._fused_adam_
        if decay:  # already times the learning rate
            fused, l2 = torch._fused_adamw_, decay / at.learning_rate
        fused(
            weights, gradients, m, v, v_max, steps(weights, at.t if bias_correction else 1e30), lr=at.learning_rate,
            beta1=beta_1, beta2=beta_2, weight_decay=l2, eps=epsilon, amsgrad=bool(v_max), **same,
        )  # fmt: skip

    return {
        "sgd": sgd, "velocity": velocity, "gradient": gradient, "average": average, "adagrad": adagrad, "adam": adam,
        "amsgrad": adam,
    }  # fmt: skip


_KERNELS = {"tensorflow": _tensorflow, "torch": _torch}.get(BACKEND, dict)()


def tiles(*lists):
    """Parts of tensors, taken from several lists alike, so many at a time as stay in the cache of a processor."""
    size = TILE if lists[0][0].device.type == "cpu" else None
    tile, filled = [], 0
    for tensors in zip(*lists, strict=True):
        n = tensors[0].numel()
        parts = [tensors]
        if size and n > size:
            parts = zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
        for part in parts:
            n = part[0].numel()
            if size and tile and filled + n > size:
                yield [list(column) for column in zip(*tile, strict=True)]
                tile, filled = [], 0
            tile.append(part)
            filled += n
    yield [list(column) for column in zip(*tile, strict=True)]


def tiled(rule, weights, gradients, slots, l2, decay, at, arguments, kernel) -> None:
    """Update weights and slots tile by tile: by the rule, or with decay beside it by the kernel."""
    for w, g, *s in tiles(weights, gradients, *slots):
        if kernel:  # its step, and the decay, come together before they are rounded to the precision of the weight
            moved = [torch.zeros_like(part) for part in w]
            if l2:
                g = torch._foreach_add(g, w, alpha=l2)
            kernel(moved, g, *s, at=at, **arguments)
            torch._foreach_add_(moved, w, alpha=-decay)
            torch._foreach_add_(w, moved)
            continue
        batch = Batch if len(w) > 1 else operator.itemgetter(0)
        weight, gradient, *slots_ = (batch(parts) for parts in (w, g, *s))
        step, *values = rule(gradient + l2 * weight if l2 else gradient, weight, *slots_, at=at, **arguments)
        step, *values = ([x] if len(w) == 1 else x.parts for x in (step + decay * weight if decay else step, *values))
        values = [backends.apart(parts, [*w, *itertools.chain(*s)]) for parts in values]
        torch._foreach_sub_(w, step)
        for slot, parts in zip(s, values, strict=True):
            torch._foreach_copy_(slot, parts)


if BACKEND == "torch":

    class Batch(torch.Tensor):
        """Several tensors that go through arithmetic as one, by torch's operations on lists where it has them.

        A rule is called with batches as with tensors; an operation that torch has for single tensors only is done on
        one after the other.
        """

        lists = {
            "add": torch._foreach_add,
            "sub": torch._foreach_sub,
            "mul": torch._foreach_mul,
            "div": torch._foreach_div,
            "lerp": torch._foreach_lerp,
            "sqrt": torch._foreach_sqrt,
            "neg": torch._foreach_neg,
            "square": lambda x: torch._foreach_mul(x, x),
            "__rsub__": lambda x, y: torch._foreach_sub(y, x) if isinstance(y, list) else _negative_plus(x, y),
        }

        @staticmethod
        def __new__(cls, parts):
            n = sum(part.numel() for part in parts)
            batch = torch.Tensor._make_wrapper_subclass(cls, (n,), dtype=parts[0].dtype, device=parts[0].device)
            batch.parts = parts
            return batch

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            name = function.__name__
            if name == "__get__":  # device, dtype
                with torch._C.DisableTorchFunctionSubclass():
                    return function(*args)
            if name == "to" and args[1:] == (str(args[0].device),) and not kwargs:
                return args[0]
            if name in cls.lists and not kwargs and all(isinstance(x, (Batch, float, int)) for x in args):
                return Batch(list(cls.lists[name](*(x.parts if isinstance(x, Batch) else x for x in args))))
            leaves, form = torch.utils._pytree.tree_flatten((args, kwargs or {}), lambda x: isinstance(x, Batch))
            parts = []
            for i in range(len(next(x for x in leaves if isinstance(x, Batch)).parts)):
                own = [x.parts[i] if isinstance(x, Batch) else x for x in leaves]
                args, kwargs = torch.utils._pytree.tree_unflatten(own, form)
                parts.append(function(*args, **kwargs))
            return Batch(parts)

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError(f"{function} on a batch")

    def _negative_plus(x, y):
        negative = torch._foreach_neg(x)
        torch._foreach_add_(negative, y)
        return negative
