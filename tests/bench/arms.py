"""What the benchmark times: kopt and its rivals, each as a function that does one step on variables of given shapes.

Only the optimizer's step is timed. The gradients are given; each arm has weights and state of its own.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import kopt

BACKEND = keras.backend.backend()
RULES = {  # rule -> arguments of kopt's class and of Keras's, and bytes that a step must move for each float32 weight
    "SGD": ("SGD", {"learning_rate": 0.01}, 12),
    "momentum": ("SGD", {"learning_rate": 0.01, "momentum": 0.9}, 20),
    "Nesterov": ("SGD", {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True}, 20),
    "Adagrad": ("Adagrad", {"learning_rate": 0.01}, 20),
    "RMSprop": ("RMSprop", {"learning_rate": 0.001}, 20),
    "Adam": ("Adam", {"learning_rate": 0.001}, 28),
    "AdamW": ("AdamW", {"learning_rate": 0.001, "weight_decay": 0.01}, 28),
    "clipnorm": ("Adam", {"clipnorm": 1.0}, 32),
    "global_clipnorm": ("Adam", {"global_clipnorm": 1.0}, 32),
}


def resnet50() -> list[tuple]:
    """The shapes of ResNet-50's 214 trainable variables."""
    shapes, into = [(7, 7, 3, 64), (64,), (64,), (64,)], 64
    for blocks, f in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            if block == 0:
                shapes += [(1, 1, into, 4 * f), *[(4 * f,)] * 3]
            shapes += [(1, 1, into, f), *[(f,)] * 3, (3, 3, f, f), *[(f,)] * 3, (1, 1, f, 4 * f), *[(4 * f,)] * 3]
            into = 4 * f
    return [*shapes, (2048, 1000), (1000,)]


SHAPES = {
    "12 large, 25 M": [(1448, 1448)] * 12,
    "ResNet-50, 214, 26 M": resnet50(),
    "80 small, 0.3 M": [(64, 64)] * 80,
    "1000 small, 1 M": [(32, 32)] * 1000,
}
SMOKE_SHAPES = {"a large one and two small": [(130, 130), (8, 8), (8,)]}


def filled(shapes, value):
    return [np.full(shape, value, "float32") for shape in shapes]


def arms(rule, shapes, xla):
    """The arms for a rule, by name; those that a backend does not have are not there."""
    name, arguments, _ = RULES[rule]
    ours, theirs = getattr(kopt, name), getattr(keras.optimizers, name)
    found = {
        "kopt": lambda: of_keras(ours(**arguments), shapes, xla),
        "kopt again": lambda: of_keras(ours(**arguments), shapes, xla),
        "Keras": lambda: of_keras(theirs(**arguments), shapes, xla),
    }
    if BACKEND == "tensorflow" and rule in KERNELS:
        arm = "TensorFlow's kernel" + " and a pass" * (rule == "AdamW")
        found[arm] = lambda: of_tensorflow(rule, shapes, xla)
    if BACKEND == "jax" and (made := of_optax(rule, arguments)) is not None:
        found["optax"] = lambda: step_of_optax(made, shapes)
    if BACKEND == "torch" and not {"clipnorm", "global_clipnorm"} & arguments.keys():
        for way in ("loop", "foreach", "fused"):
            if way != "fused" or name != "RMSprop":
                found[f"torch {way}"] = lambda way=way: of_torch(name, arguments, shapes, way)
    return found


def state_bytes(rule, shapes) -> float:
    """What kopt's optimizer keeps, in bytes for each weight."""
    name, arguments, _ = RULES[rule]
    optimizer = getattr(kopt, name)(**arguments)
    optimizer.build([keras.Variable(value) for value in filled(shapes, 1.0)])
    kept = sum(4 * int(np.prod(v.shape)) for v in optimizer.variables if len(v.shape))
    return kept / sum(int(np.prod(shape)) for shape in shapes)


def of_keras(optimizer, shapes, xla):
    variables = [keras.Variable(value) for value in filled(shapes, 1.0)]
    gradients = [keras.ops.convert_to_tensor(value) for value in filled(shapes, 0.01)]
    optimizer.build(variables)
    if BACKEND == "tensorflow":
        return in_graph(lambda: optimizer.apply(gradients, variables), variables[-1].value, xla)
    if BACKEND == "jax":
        import jax

        step = jax.jit(lambda w, state, g: optimizer.stateless_apply(state, g, w), donate_argnums=(0, 1))
        return in_turn(step, [v.value for v in variables], [v.value for v in optimizer.variables], gradients)
    return synchronized(lambda: optimizer.apply(gradients, variables))


def in_graph(step, last, xla):
    """A compiled step of TensorFlow; it captures its gradients, since Python takes long over many arguments."""
    import tensorflow as tf

    function = tf.function(step, jit_compile=xla, autograph=False)
    return lambda: (function(), tf.reshape(last, [-1])[0].numpy())


def in_turn(step, weights, state, gradients):
    import jax

    held = [weights, state]

    def run():
        held[:] = jax.block_until_ready(step(*held, gradients))

    return run


def synchronized(step):
    import torch

    return lambda: (step(), torch.cuda.synchronize() if torch.cuda.is_available() else None)


# TensorFlow's own kernels, with a state of their own

KERNELS = {"SGD": 0, "momentum": 1, "Nesterov": 1, "Adagrad": 1, "Adam": 2, "AdamW": 2}  # rule -> slots


def of_tensorflow(rule, shapes, xla):
    import tensorflow as tf

    raw, slots = tf.raw_ops, KERNELS[rule]
    variables = [tf.Variable(value) for value in filled(shapes, 1.0)]
    gradients = [tf.constant(value) for value in filled(shapes, 0.01)]
    states = [[tf.Variable(value) for value in filled(shapes, 0.0)] for _ in range(slots)]
    rate, zero = tf.Variable(0.001), tf.constant(0.0)

    def one(w, g, *s):
        if rule == "SGD":
            raw.ResourceApplyGradientDescent(var=w.handle, alpha=rate, delta=g)
        elif rule == "Adagrad":
            raw.ResourceApplyAdagradV2(var=w.handle, accum=s[0].handle, lr=rate, epsilon=1e-7, grad=g)
        elif rule in ("Adam", "AdamW"):
            raw.ResourceApplyAdam(
                var=w.handle, m=s[0].handle, v=s[1].handle, beta1_power=zero, beta2_power=zero, lr=rate, beta1=0.9,
                beta2=0.999, epsilon=1e-7, grad=g,
            )  # fmt: skip
            if rule == "AdamW":  # not its decay, which no kernel does, but what one more pass over the weight takes
                raw.ResourceApplyGradientDescent(var=w.handle, alpha=rate, delta=g)
        else:
            raw.ResourceApplyKerasMomentum(
                var=w.handle, accum=s[0].handle, lr=rate, grad=g, momentum=0.9, use_nesterov=rule == "Nesterov"
            )

    def step():
        for w, g, *s in zip(variables, gradients, *states, strict=True):
            one(w, g, *s)

    return in_graph(step, variables[-1], xla)


# optax


def of_optax(rule, arguments):
    import optax

    return {
        "SGD": lambda: optax.sgd(0.01),
        "momentum": lambda: optax.sgd(0.01, momentum=0.9),
        "Nesterov": lambda: optax.sgd(0.01, momentum=0.9, nesterov=True),
        "RMSprop": lambda: optax.rmsprop(0.001, eps_in_sqrt=False),
        "Adam": lambda: optax.adam(0.001),
        "AdamW": lambda: optax.adamw(0.001, weight_decay=0.01),
        "global_clipnorm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.001)),
    }.get(rule)


def step_of_optax(make, shapes):
    import jax
    import jax.numpy as jnp
    import optax

    transformation = make()

    def step(weights, state, gradients):
        updates, state = transformation.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    weights = [jnp.asarray(value) for value in filled(shapes, 1.0)]
    gradients = [jnp.asarray(value) for value in filled(shapes, 0.01)]
    return in_turn(jax.jit(step, donate_argnums=(0, 1)), weights, transformation.init(weights), gradients)


# torch.optim


def of_torch(name, arguments, shapes, way):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = [torch.nn.Parameter(torch.as_tensor(value, device=device)) for value in filled(shapes, 1.0)]
    for parameter, value in zip(parameters, filled(shapes, 0.01), strict=True):
        parameter.grad = torch.as_tensor(value, device=device)
    arguments = {{"learning_rate": "lr"}.get(key, key): value for key, value in arguments.items()}
    ways = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    return synchronized(getattr(torch.optim, name)(parameters, **arguments, **ways[way]).step)
