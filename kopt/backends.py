"""What TensorFlow, JAX and torch do each in their own way: conditions, compiled loops, replicas, gradients of rows."""

import contextlib
import functools
import operator
import sys
import weakref

import keras
import numpy as np
from keras import ops

from kopt import checks

BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "torch":
    import torch
elif BACKEND == "jax":
    import jax


def wide(dtype: str) -> str:
    """The dtype in which kopt computes and keeps state for `dtype`: float64 for float64, else float32."""
    return "float64" if dtype == "float64" else "float32"


def read(x, dtype):
    """The value of a variable or tensor as a plain tensor: Keras's operators on its variables are other ones."""
    if BACKEND == "tensorflow":  # the rows of `tf.IndexedSlices` are summed
        return tf.cast(tf.convert_to_tensor(x), dtype)
    return ops.convert_to_tensor(x, dtype)


def number(variable, dtype):
    """The value of a scalar variable or tensor for arithmetic; on torch a Python number, without asking the device.

    torch counts the writes to a tensor, so a number is read from the device only after another write than `count_up`.
    What goes past that count, as a write through `.data` does, is not seen.
    """
    if BACKEND != "torch":
        return read(variable, dtype)
    if isinstance(variable, (int, float)):
        return variable
    tensor = variable.value if isinstance(variable, keras.Variable) else ops.convert_to_tensor(variable)
    if tensor.is_inference():  # its writes are not counted
        return tensor.tolist()
    known = _numbers.get(id(tensor))
    if known is None or known[0]() is not tensor or known[1] != tensor._version:
        return _note(tensor, tensor.tolist())
    return known[2]


def numbers(variable, dtype) -> list:
    """The same for the entries of a vector."""
    value = number(variable, dtype)
    return value if BACKEND == "torch" else [value[i] for i in range(value.shape[0])]


def set_number(variable, value, memory=None) -> None:
    """Assign to a scalar variable; on torch the number is known from then on, without asking the device.

    `memory` is torch's tensor in the variable, where it may be written to: that takes a tenth of the time.
    """
    if memory is None:
        variable.assign(value)
    else:
        with torch.no_grad():
            memory.fill_(value)
    dtype = keras.backend.standardize_dtype(variable.dtype)
    if BACKEND == "torch" and dtype in ("float32", "float64", "int32") and not variable.value.is_inference():
        _note(variable.value, np.asarray(value, dtype).item())


def apart(values, inputs) -> list:
    """The values, those copied that lie in the memory of an input: torch assigns in place, one after the other."""
    if BACKEND != "torch":
        return list(values)
    taken = {start(tensor) for tensor in inputs}
    return [value.clone() if torch.is_tensor(value) and start(value) in taken else value for value in values]


def start(tensor) -> int:
    """Where the memory begins that a torch tensor lies in."""
    return tensor.untyped_storage().data_ptr()


def cast_number(number, dtype):
    return number if BACKEND == "torch" else ops.cast(number, dtype)


def count_up(variable) -> None:
    """Add one to a scalar variable."""
    if BACKEND == "torch":
        value = number(variable, variable.dtype)
        variable.assign_add(1)
        if not variable.value.is_inference():
            _note(variable.value, value + 1)
    else:
        variable.assign_add(1)


_numbers: dict[int, tuple] = {}  # id of a tensor -> the tensor, the count of writes to it, its value


def _note(tensor, value):
    key = id(tensor)
    _numbers[key] = weakref.ref(tensor, lambda _: _numbers.pop(key, None)), tensor._version, value
    return value


def copied(variable):
    """The value of a variable in memory of its own: JAX must not be given one array for two variables."""
    return ops.copy(read(variable, variable.dtype))


def eagerly():
    """A context that leaves the TensorFlow function being traced, so that variables hold their values at once."""
    return tf.init_scope() if BACKEND == "tensorflow" else contextlib.nullcontext()


def detached(x):
    """The value of a variable or tensor; on torch in memory of its own, and without the graph that made it."""
    x = x.value if isinstance(x, keras.Variable) else x
    return x.detach().clone() if BACKEND == "torch" else ops.convert_to_tensor(x)


def unrecorded():
    """A context in which torch keeps no graph for differentiation; the other backends need none."""
    return torch.no_grad() if BACKEND == "torch" else contextlib.nullcontext()


def as_written(function):
    """The function as it is: AutoGraph takes longer to rewrite it than to trace it, `torch.compile` cannot follow."""
    if BACKEND == "tensorflow":
        return tf.autograph.experimental.do_not_convert(function)
    return torch.compiler.disable(function) if BACKEND == "torch" else function


def compiled(function):
    """The function, compiled where the backend compiles."""
    if BACKEND == "tensorflow":
        function = functools.partial(function)  # TensorFlow counts, and complains about, the functions made of one code
        return tf.function(function, autograph=False, reduce_retracing=True)
    return jax.jit(function) if BACKEND == "jax" else function


def compiled_loop(goes_on, body):
    """`(state, limit, data) -> state`: `state = body(state, data)` as long as `goes_on(state, limit)`, compiled.

    On TensorFlow by XLA, and without it where XLA cannot.
    """
    if BACKEND == "jax":
        while_loop = jax.lax.while_loop
        return jax.jit(
            lambda state, limit, data: while_loop(lambda s: goes_on(s, limit), lambda s: body(s, data), state)
        )

    def loop(state, limit, data):
        return tf.while_loop(lambda s: goes_on(s, limit), lambda s: (body(s, data),), [state])[0]

    by_xla, plain = (tf.function(functools.partial(loop), autograph=False, jit_compile=xla) for xla in (True, False))
    chosen = [by_xla]

    def run(*arguments):
        try:
            return chosen[0](*arguments)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.NotFoundError):
            if chosen[0] is plain:
                raise
            chosen[0] = plain
            return plain(*arguments)

    return run


def repeated(step, variables, times):
    """A function that calls `step()` so many times, in one compiled loop, and returns what each returned, stacked.

    `step` reads and assigns to none but `variables`, and returns a tensor of their dtype. torch compiles nothing.
    """
    if BACKEND == "torch":
        return lambda: torch.stack([step() for _ in range(times)])
    if BACKEND == "tensorflow":

        def turn(i, found):
            return i + 1, found.write(i, step())

        def loop():
            begin = [0, tf.TensorArray(variables[0].dtype, times)]
            return tf.while_loop(lambda i, _: i < times, turn, begin)[1].stack()

        return tf.function(functools.partial(loop), autograph=False)

    def scanned_turn(values, _):
        with keras.StatelessScope(list(zip(variables, values, strict=True))) as scope:
            found = step()
        return [scope.get_current_value(variable) for variable in variables], found

    scanned = jax.jit(lambda values: jax.lax.scan(scanned_turn, values, length=times))

    def run():
        values, found = scanned([variable.value for variable in variables])
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        return found

    return run


def both(one, other):
    """Whether both hold, of truth values and tensors, as `when` takes it."""
    if is_symbolic(one) or is_symbolic(other):
        return ops.logical_and(one, other)
    return bool(one) and bool(other)


# Conditions


def is_symbolic(value) -> bool:
    """Whether this is a tensor of a step that is being traced, which has no value yet."""
    if BACKEND == "tensorflow":
        return tf.is_tensor(value) and not hasattr(value, "numpy")
    return BACKEND == "jax" and isinstance(value, jax.core.Tracer)


def when(condition, update, variables) -> None:
    """Call `update()`, which reads and assigns to none but `variables`, if `condition` holds.

    In a compiled step this is a loop of no turn or one: XLA runs it in place, whereas the two ways out of a branch cost
    it copies of all that the branch may change. CONTRIBUTING.md has the figures.
    """
    if not is_symbolic(condition):
        if condition:
            update()
    elif BACKEND == "tensorflow":
        tf.while_loop(lambda go: go, lambda go: (update(), tf.constant(False))[1], [condition])
    else:

        def turn(carry):
            with keras.StatelessScope(list(zip(variables, carry[1], strict=True))) as scope:
                update()
            return ops.zeros_like(carry[0]), [scope.get_current_value(variable) for variable in variables]

        values = [variable.value for variable in variables]
        _, values = jax.lax.while_loop(lambda carry: carry[0], turn, (condition, values))
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


def clear_when(condition, variables) -> None:
    """Set the variables to zero if `condition` holds; JAX makes that part of what is done with them next."""
    if BACKEND == "jax" and is_symbolic(condition):
        for variable in variables:
            variable.assign(ops.where(condition, 0, variable.value))
    else:

        def clear(variable, value):
            variable.assign(ops.zeros(value.shape, value.dtype))

        when(condition, lambda: on_every_copy(clear, variables, variables), variables)


def demanded(conditions, complaints, after):
    """A context for what is done only if all conditions hold: a TensorFlow graph raises otherwise, after `after`.

    XLA and JAX raise nothing: there it is done always.
    """
    if BACKEND != "tensorflow":
        return contextlib.nullcontext()
    with tf.control_dependencies(after):
        asserts = [tf.debugging.Assert(c, [m]) for c, m in zip(tf.unstack(conditions), complaints, strict=True)]
    return tf.control_dependencies(asserts)


def after(gradients):
    """A context for what TensorFlow does only once there are gradients.

    Where data end without having said so, Keras learns it from a last step that breaks off: what in it does not hang on
    the data is done all the same.
    """
    known = [gradient for gradient in gradients if gradient is not None]
    if BACKEND != "tensorflow" or tf.executing_eagerly() or not known:
        return contextlib.nullcontext()
    return tf.control_dependencies([entries(known[0])])


# Where a variable is


def place(variable):
    """Where a variable is, or None if it is spread over devices."""
    if BACKEND != "jax":
        return native(variable).device
    if getattr(variable, "_layout", None) is not None or len(native(variable).devices()) > 1:
        return None
    return next(iter(native(variable).devices()))


def is_on_cpu(variable) -> bool:
    """Whether a TensorFlow variable is on a CPU."""
    return "CPU" in native(variable).device


def is_eager() -> bool:
    """Whether TensorFlow runs now, rather than building a graph."""
    return tf.executing_eagerly()


def subtract(variable, step) -> None:
    """Take `step` off a variable, in one operation where the backend has it."""
    if BACKEND == "tensorflow" and hasattr(native(variable), "assign_sub"):
        native(variable).assign_sub(step)
    else:
        variable.assign(read(variable, step.dtype) - step)


def cast_all(tensors, dtypes) -> list:
    """torch's tensors in these dtypes."""
    wanted = [getattr(torch, dtype) for dtype in dtypes]
    return [one if one.dtype is dtype else one.to(dtype) for one, dtype in zip(tensors, wanted, strict=True)]


def lerp_in_place(starts, ends, weight) -> None:
    """Move torch's tensors so far towards others of the same dtypes, all in one operation."""
    with torch.no_grad():
        torch._foreach_lerp_(list(starts), ends, weight)


def spread(x, like):
    """A number or scalar tensor as a tensor of one shape with another; a tensor of that shape as it is."""
    if len(getattr(x, "shape", ())) == len(like.shape):
        return x
    return ops.broadcast_to(ops.convert_to_tensor(x, keras.backend.standardize_dtype(like.dtype)), like.shape)


def norms(arrays, order=2):
    """The norm of each of some torch tensors, as one tensor."""
    return torch.stack(torch._foreach_norm(arrays, order))


def split(flat, sizes) -> list:
    """A flat tensor in parts of these sizes."""
    if len(sizes) == 1:
        return [flat]
    if BACKEND == "tensorflow":
        return tf.split(flat, sizes)
    return ops.split(flat, np.cumsum(sizes)[:-1].tolist())


# Replicas of a TensorFlow strategy


STRATEGIES = "MirroredStrategy", "OneDeviceStrategy", "TPUStrategy"


def strategy():
    """The `tf.distribute` strategy in whose scope this runs, or None."""
    return tf.distribute.get_strategy() if BACKEND == "tensorflow" and tf.distribute.has_strategy() else None


def is_strategy(home) -> bool:
    """Whether this is a strategy that Keras trains under, and not TensorFlow's stand-in for none."""
    return home is not None and isinstance(home, tuple(getattr(tf.distribute, name) for name in STRATEGIES))


def check_strategy(home=None) -> None:
    """Refuse a strategy that Keras 3 does not train under, and one that an optimizer was not made for."""
    current = strategy()
    if current is None:
        return
    if not is_strategy(current):
        allowed = f"one of those that Keras 3 trains under: {', '.join(STRATEGIES)}"
        checks.refuse("strategy", allowed, type(current).__name__)
    if home is not None and current is not home:
        checks.refuse("strategy", "the one in whose scope the optimizer was made", type(current).__name__)


def _replica_context():
    return tf.distribute.get_replica_context() if strategy() else None


def replicas() -> int:
    """How many replicas `summed_over_replicas` sums over, here and now."""
    context = _replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def once_for_all_replicas(function) -> None:
    """Call `function` where it can assign to variables: under a strategy, outside its replicas."""
    context = _replica_context()
    if context is None:
        function()
    else:
        merge = tf.__internal__.distribute.interim.maybe_merge_call
        merge(lambda _: function(), context.strategy)


def summed_over_replicas(gradients, then, distinct) -> None:
    """Call `then` once for all replicas, with the gradients summed over them, and if `distinct` the rows of each.

    The replicas are merged before any condition is met: within one, `tf.distribute` cannot merge them any more.
    """
    context = _replica_context()
    if replicas() > 1:
        gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
    if distinct:
        gradients = [distinct_rows(gradient) for gradient in gradients]
    if context is None:
        then(gradients)
        return
    merge = tf.__internal__.distribute.interim.maybe_merge_call
    merge(lambda _, gradients: then(gradients), context.strategy, gradients)


def on_every_copy(function, variables, gradients) -> None:
    """Call `function(variable, gradient)` for each pair, under a strategy for the copies of each replica."""
    current = strategy()
    for variable, gradient in zip(variables, gradients, strict=True):
        if current is None:
            function(variable, gradient)
        else:
            current.extended.update(native(variable), function, args=(native(gradient),), group=False)


def first_copy(x):
    """What the first replica holds of a gradient or variable that all replicas have alike."""
    current = strategy()
    return x if current is None else current.experimental_local_results(native(x))[0]


def native(x):
    """A variable of the backend's own."""
    return x.value if isinstance(x, keras.Variable) else x


# Gradients of rows: only TensorFlow has them


def has_rows(gradient) -> bool:
    return BACKEND == "tensorflow" and isinstance(gradient, tf.IndexedSlices)


def mapped(function, gradient):
    """The function of a gradient, or of the rows of `tf.IndexedSlices`."""
    if has_rows(gradient):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return function(gradient)


def distinct_rows(gradient):
    """The gradient with the rows summed that stand for the same row of the variable.

    There are as many rows as before, so that XLA knows their number: zeros fill up, as a gradient of the first row.
    """
    if not has_rows(gradient):
        return gradient
    indices, place, totals = _summed_rows(gradient)
    first, rows = tf.reduce_min(indices), tf.math.unsorted_segment_max(indices, place, tf.shape(indices)[0])
    return tf.IndexedSlices(totals, tf.maximum(rows, first), gradient.dense_shape)


def repeated_sums(gradient):
    """The gradient with the sum of a row in place of each of its gradients.

    There are as many rows as before, some of them repeated: whichever is written last, the same is written.
    """
    indices, place, totals = _summed_rows(gradient)
    return tf.IndexedSlices(tf.gather(totals, place), indices, gradient.dense_shape)


def _summed_rows(gradient):
    """The indices in order, for each the place of its row among the distinct ones, and the sums of these."""
    order = tf.argsort(gradient.indices)
    indices = tf.gather(gradient.indices, order)
    is_new = tf.concat([tf.ones_like(indices[:1], "bool"), indices[1:] != indices[:-1]], 0)
    place = tf.cumsum(tf.cast(is_new, "int32")) - 1
    return indices, place, tf.math.unsorted_segment_sum(tf.gather(gradient.values, order), place, tf.shape(indices)[0])


def read_rows(indices, variable, dtype):
    """Rows of a variable, without reading the others."""
    return tf.cast(tf.gather(native(variable), indices), dtype)


def with_rows(indices, tensor, values):
    """A tensor with some of its rows replaced."""
    return tf.tensor_scatter_nd_update(tensor, indices[:, None], values)


def assign_rows(indices, variable, values) -> None:
    """Assign to rows of a variable."""
    variable, values = native(variable), tf.cast(values, variable.dtype)
    variable.scatter_update(tf.IndexedSlices(values, indices))


def shape_and_dtype(gradient) -> tuple[tuple | None, str]:
    """The shape, with None where it is not known yet, and the dtype."""
    if not has_rows(gradient) and not hasattr(gradient, "dtype"):
        gradient = ops.convert_to_tensor(gradient)
    shape = gradient.values.shape if has_rows(gradient) else gradient.shape
    shape = None if getattr(shape, "rank", 0) is None else tuple(shape)
    shape = (None, *shape[1:]) if has_rows(gradient) and shape else shape
    return shape, keras.backend.standardize_dtype(gradient.dtype)


def all_fit(gradients, variables) -> bool:
    """Whether all gradients are torch tensors of floats and of the variables' shapes; the short way to say yes."""
    return (
        BACKEND == "torch"
        and all(map(torch.is_tensor, gradients))
        and list(map(_shape, gradients)) == list(map(_shape, variables))
        and all(map(torch.is_floating_point, gradients))
    )


def all_of(dtypes, gradients) -> bool:
    """Whether all gradients are torch tensors of one dtype, the only one in `dtypes`; the short way to say yes."""
    if BACKEND != "torch" or len(dtypes) != 1:
        return False
    return set(map(_dtype, gradients)) == {getattr(torch, dtypes[0])}


_shape, _dtype = operator.attrgetter("shape"), operator.attrgetter("dtype")


def may_equal(shape, other) -> bool:
    """Whether two shapes are the same, as far as the first is known."""
    return shape is None or (
        len(shape) == len(other) and all(a in (None, b) for a, b in zip(shape, other, strict=True))
    )


def cast(gradient, variable, dtype):
    """The gradient of a variable in another dtype; from then on its shape is known."""
    shape = tuple(variable.shape)
    if has_rows(gradient):
        values = tf.ensure_shape(tf.cast(gradient.values, dtype), (None, *shape[1:]))
        return tf.IndexedSlices(values, gradient.indices, tf.constant(shape, "int64"))
    if BACKEND == "torch" and torch.is_tensor(gradient) and gradient.dtype is getattr(torch, dtype):
        return gradient
    gradient = ops.cast(gradient, dtype)
    return tf.ensure_shape(gradient, shape) if is_symbolic(gradient) and BACKEND == "tensorflow" else gradient


def entries(gradient):
    """A tensor of all entries of a gradient that may differ from zero; of rows, if they are distinct."""
    return gradient.values if has_rows(gradient) else gradient


def is_dataset(data) -> bool:
    """Whether it is a `tf.data.Dataset`, which every backend takes, without importing TensorFlow to see."""
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(data, tensorflow.data.Dataset)


def random_state() -> dict:
    """The random state that the backend keeps by itself, as arrays."""
    if BACKEND == "tensorflow":
        return {"generator": tf.random.get_global_generator().state.numpy()}
    if BACKEND == "torch":
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"cpu": torch.get_rng_state().numpy(), "cuda": [state.numpy() for state in devices]}
    return {}


def set_random_state(state: dict) -> None:
    if BACKEND == "tensorflow":
        tf.random.get_global_generator().state.assign(state["generator"])
    elif BACKEND == "torch":
        torch.set_rng_state(torch.from_numpy(state["cpu"]))
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all([torch.from_numpy(each) for each in state["cuda"]])


def seed_random_state(seed: int) -> None:
    """Let it follow from a seed, where Keras's layers draw from it: on torch."""
    if BACKEND == "torch":
        torch.manual_seed(seed)
