"""Ready-made kernels of TensorFlow and torch that do what a rule says, and XLA for the rules that have none.

A kernel is called as `kernel(weights, gradients, *slots, at, **arguments)`, with a list of dense tensors or TensorFlow
variables for each; it updates weights and slots in place. tests/test_execution.py proves each equal to its rule.
"""

import functools

import keras
import numpy as np

BACKEND = keras.backend.backend()

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "torch":
    import torch


def find(name, at, arguments, device=None):
    """The kernel of this name that takes these arguments, on torch on this kind of device, or None."""
    if BACKEND == "torch" and name and not (_takes(name, at, arguments) and _is_on(name, device)):
        return None
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


def _takes(name, at, arguments) -> bool:
    if arguments.get("momentum") == 0:
        return False  # torch wants no slot then, but momentum may come back
    if name == "average":
        return not arguments["nesterov"]  # torch looks ahead by the gradient as it came
    return name != "velocity" or at.learning_rate >= 1e-8  # it would get lost in `dampening`


@functools.cache
def _is_on(name, device) -> bool:
    """Whether this torch has the kernel for this kind of device."""
    kernel = {"adagrad": "adagrad", "adam": "adam", "amsgrad": "adam"}.get(name, "sgd")
    key = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}.get(device)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::_fused_{kernel}_", key)


def _torch():
    same = {"maximize": False, "grad_scale": None, "found_inf": None}

    def steps(weights, t):  # as the kernels take them; where Adam corrects nothing, one so large that 1 - beta**t is 1
        step = torch.tensor(float(t), device=weights[0].device)
        return [step] * len(weights)

    def momentum_kernel(weights, gradients, v, l2=0.0, **arguments):
        torch._fused_sgd_(weights, gradients, v, weight_decay=l2, is_first_step=False, **arguments, **same)

    def sgd(weights, gradients, *, at, l2=0.0):
        momentum_kernel(weights, gradients, [], l2, lr=at.learning_rate, momentum=0.0, dampening=0.0, nesterov=False)

    def velocity(weights, gradients, v, *, at, momentum, nesterov, l2=0.0):
        # torch has v = momentum v + (1 - dampening) g; w -= lr v: here 1 - dampening is -rate, and lr is -1
        if nesterov and l2:
            gradients, l2 = torch._foreach_add(gradients, weights, alpha=l2), 0.0
        if nesterov:  # by the gradient as it came torch would look ahead
            both = zip(gradients, weights, strict=True)
            gradients = [g.clone() if g.data_ptr() == w.data_ptr() else g for g, w in both]
            sgd(weights, gradients, at=at)
        kernel = {"momentum": momentum, "dampening": 1 + at.learning_rate, "nesterov": False}
        momentum_kernel(weights, gradients, v, l2, lr=-momentum if nesterov else -1.0, **kernel)

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
        if decay:  # this one decays by its `weight_decay` times the rate, which `decay` has in it already
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
