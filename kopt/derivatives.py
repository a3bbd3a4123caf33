"""Derivatives of a function of one vector, each as a function again, on each backend."""

import functools

from kopt.backends import BACKEND

AT_ONCE = 64  # rows or columns of a Jacobian: all of them would need the memory of as many evaluations
if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "torch":
    import torch
elif BACKEND == "jax":
    import jax


def value_and_gradient(function):
    """`x -> (function(x), its gradient)`."""
    if BACKEND == "jax":
        return jax.value_and_grad(function)

    def both(x):
        if BACKEND == "tensorflow":
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = function(x)
            return value, tape.gradient(value, x, unconnected_gradients="zero")
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = function(x)
            return value.detach(), _torch_gradient(value, x)

    return both


def hessian_product(function):
    """`(x, v) -> the Hessian of the function at x, times v`."""
    if BACKEND == "jax":
        return lambda x, v: jax.jvp(jax.grad(function), (x,), (v,))[1]

    def product(x, v):
        if BACKEND == "tensorflow":
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    value = function(x)
                gradient = inner.gradient(value, x, unconnected_gradients="zero")
            return outer.gradient(gradient, x, output_gradients=v, unconnected_gradients="zero")
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            gradient = _torch_gradient(function(x), x, create_graph=True)
            return _torch_gradient(gradient, x, v) if gradient.requires_grad else torch.zeros_like(v)

    return product


def hessian(function):
    """`x -> the Hessian of the function at x`, a matrix."""
    if BACKEND == "jax":
        return jax.jacfwd(jax.grad(function))
    if BACKEND == "tensorflow":
        product = hessian_product(function)
        return lambda x: tf.vectorized_map(functools.partial(product, x), tf.eye(x.shape[0], dtype=x.dtype))

    def matrix(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            gradient = _torch_gradient(function(x), x, create_graph=True)
            return _torch_rows(gradient, x)

    return matrix


def value_and_jacobian(function):
    """`x -> (function(x), its Jacobian)` of a function whose value is a vector."""
    if BACKEND == "jax":

        def both(x):
            value, pull = jax.vjp(function, x)
            if value.shape[0] <= x.shape[0]:
                return value, _jax_mapped(lambda row: pull(row)[0], value)
            return value, _jax_mapped(lambda v: jax.jvp(function, (x,), (v,))[1], x).T

        return both
    if BACKEND == "tensorflow":

        def both(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = function(x)
            if value.shape[0] <= x.shape[0]:
                return value, tape.jacobian(value, x, unconnected_gradients="zero")

            def column(v):
                with tf.autodiff.ForwardAccumulator(x, v) as forward:
                    found = function(x)
                return forward.jvp(found, unconnected_gradients="zero")

            return value, tf.transpose(tf.map_fn(column, tf.eye(x.shape[0], dtype=x.dtype)))

        return both

    def both(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = function(x)
            if value.shape[0] <= x.shape[0]:
                return value.detach(), _torch_rows(value, x)
            ones = torch.ones_like(value, requires_grad=True)  # a gradient is linear in what it is multiplied by
            pulled = _torch_gradient(value, x, ones, create_graph=True)
            return value.detach(), _torch_rows(pulled, ones).T

    return both


def _torch_gradient(value, x, of=None, create_graph=False):
    found = torch.autograd.grad(value, x, grad_outputs=of, create_graph=create_graph, allow_unused=True)[0]
    return torch.zeros_like(x) if found is None else found


def _torch_rows(value, x):
    """The Jacobian of a value that was computed from x, all rows at once."""
    if not value.requires_grad:
        return x.new_zeros((value.shape[0], x.shape[0]))
    found = []
    for rows in torch.eye(value.shape[0], dtype=value.dtype, device=value.device).split(AT_ONCE):
        part = torch.autograd.grad(
            value, x, grad_outputs=rows, is_grads_batched=True, retain_graph=True, allow_unused=True
        )[0]
        found.append(x.new_zeros((len(rows), x.shape[0])) if part is None else part)
    return torch.cat(found)


def _jax_mapped(function, like):
    """A linear function of vectors like one, of all unit vectors."""
    return jax.lax.map(function, jax.numpy.eye(like.shape[0], dtype=like.dtype), batch_size=AT_ONCE)
