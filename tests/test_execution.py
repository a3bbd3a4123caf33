"""The fast ways to run a rule against the plain one: the same numbers, fewer operations, no more memory."""

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from kopt.optimizers import execution, kernels, slabs
from tests.catalog import CLASSES, OPTIMIZERS
from tests.conftest import BACKEND
from tests.training import MODES, equal, every_class, every_row, every_row_in, numpy, same, train
from tests.ways import SHAPES, close, plainly, spied, stream, variables

TENSORFLOW = pytest.mark.skipif(BACKEND != "tensorflow", reason="what is looked at is TensorFlow's")
JAX = pytest.mark.skipif(BACKEND != "jax", reason="what is looked at is JAX's")
IN_PLACE = pytest.mark.skipif(BACKEND == "jax", reason="JAX has no kernels: XLA makes one of each rule")


CONDITIONS = {
    "alone": {},
    "with decay": {"weight_decay": 0.1, "l2": 0.1, "exclude_from_decay": ["b$", "larger"]},
    "with a clip, skipping": {"global_clipnorm": 3.0, "nonfinite": "skip"},
}


@every_row_in("case", [(mode, name) for name in CONDITIONS for mode in MODES if mode not in ("xla", "stateless")])
def test_every_way_equals_the_plain_one(row, case, monkeypatch):
    mode, condition = case
    equals_the_plain_way(row, mode, CONDITIONS[condition], monkeypatch)


@pytest.mark.skipif("xla" not in MODES, reason="JAX always has XLA, torch never")
@every_class
def test_every_way_equals_the_plain_one_under_xla(row, monkeypatch):
    equals_the_plain_way(row, "xla", CONDITIONS["with decay"], monkeypatch)
    equals_the_plain_way(row, "xla", {}, monkeypatch)


def equals_the_plain_way(row, mode, more, monkeypatch):
    given = stream(spoilt="nonfinite" in more)
    with monkeypatch.context() as patch:
        taken, fast, ours = spied(patch), variables(), row.make(**more)
        train(mode, ours, fast, given)
    with monkeypatch.context() as patch:
        plainly(patch)
        slow, theirs = variables(), row.make(**more)
        train(mode, theirs, slow, given)
    fast_ways = {"tensorflow": {"kernel" if "kernel" in taken else "island"}, "jax": set(), "torch": {"lists"}}[BACKEND]
    slabbed = {"flat"} if row.slots and BACKEND != "torch" else set()
    assert taken - {"plain"} >= fast_ways | slabbed
    close(fast, slow)
    close([part for part in ours.parts if len(part.shape)], [part for part in theirs.parts if len(part.shape)])


@IN_PLACE
@every_row
def test_kernels_are_used_where_there_are_any(row):
    optimizer = row.make()
    optimizer.build([keras.Variable(np.ones(3, "float32"))])
    shared = execution.scalars(optimizer, optimizer.learning_rate)["float32"]
    found = kernels.find(optimizer.traits.kernel, shared.at, shared.arguments, "cpu")
    beside = shared.decay is not None and BACKEND == "tensorflow"  # decay is not for TensorFlow's kernels
    assert (found is not None and not beside) == (BACKEND in row.kernels)


@pytest.mark.parametrize(
    ("row", "mode"),
    [(row, "eager") for row in OPTIMIZERS] + [(row, mode) for row in CLASSES for mode in MODES if mode != "eager"],
    ids=str,
)
def test_a_slab_without_some_of_its_variables(row, mode, monkeypatch):
    """Those without a gradient stay as they are, to the bit, and the others go on as if alone."""
    more = {"weight_decay": 0.1, "exclude_from_decay": "a$"}
    given = [[g[0], g[1], None, g[3], g[4]] for g in stream(3)] if mode != "stateless" else stream(3)
    given = [stream(1)[0], *given]
    fast, ours = variables(), row.make(**more)
    plain, theirs = variables(), row.make(**more)
    with pytest.warns(UserWarning, match="Gradients do not exist") if mode != "stateless" else _nothing():
        train(mode, ours, fast, given)
        with monkeypatch.context() as patch:
            plainly(patch)
            train(mode, theirs, plain, given)
    close(fast, plain)
    if mode != "stateless":
        alone, first = variables(), row.make(**more)
        train(mode, first, alone, given[:1])
        assert equal([fast[2]], [alone[2]])
        of_b = [[p for p in o.parts if o.named.get(id(p), ("", ""))[1].endswith("b")] for o in (ours, first)]
        assert len(of_b[0]) == len(row.slots)
        assert equal(*of_b)


class _nothing:  # noqa: N801
    def __enter__(self): ...
    def __exit__(self, *_): ...


@every_class
def test_update_step_works_by_itself(row):
    optimizer, other, ones, others = row.make(), row.make(), variables(), variables()
    optimizer.build(ones)
    for gradients in stream(3):
        gradients = [ops.convert_to_tensor(g) for g in gradients]
        other.apply(gradients, others)
        for gradient, variable in zip(gradients, ones, strict=True):
            optimizer.update_step(gradient, variable, optimizer.learning_rate)
        optimizer.iterations.assign_add(1)
    close(ones, others)


def test_a_rule_of_ones_own_runs_plainly_unless_it_says_more(monkeypatch):
    def by_norm(g, w, *, at):
        return (at.learning_rate * g / ops.norm(ops.reshape(g, (-1,))),)

    class ByNorm(kopt.Optimizer):
        rule = staticmethod(by_norm)

    class Signs(kopt.Optimizer):
        rule = staticmethod(kopt.elementwise()(lambda g, w, *, at: (at.learning_rate * ops.sign(g),)))

    for cls, step in ((ByNorm, lambda g: g / np.linalg.norm(g)), (Signs, np.sign)):
        mine, before = variables(), numpy(variables())
        train(MODES[-1] if BACKEND != "torch" else "eager", cls(0.1), mine, stream(1))
        for w, start, g in zip(numpy(mine), before, stream(1)[0], strict=True):
            np.testing.assert_allclose(w, start - 0.1 * step(g), rtol=1e-5, atol=1e-6)

    with pytest.raises(TypeError, match="^`Own` must give a `rule` and `slots` instead of `update_step`$"):
        type("Own", (kopt.Optimizer,), {"update_step": lambda *_: None})


def delayed(g, w, p, q, *, at):
    return q * 1.0, g * 1.0, p  # hands a slot on as it is


def kept(g, w, p, q, *, at):
    return at.learning_rate * (g + 0.1 * (w - p)), w, q  # keeps the weight itself


def stacked(g, w, p, q, *, at):
    return at.learning_rate * ops.max(ops.stack([g, p]), axis=0), ops.maximum(g, p), q


def constant(g, w, p, q, *, at):
    return at.learning_rate, g + 2 * ops.ones(ops.shape(g)), q - at.learning_rate


def changed_in_place(g, w, p, q, *, at):
    x = g + p
    x += q
    x -= g
    x *= 2
    x /= 4
    return at.learning_rate * x, x, g


def written(g, w, p, q, *, at):
    return at.learning_rate * g, 2 * g, w + 1  # never reads a slot


def looked_at_again(g, w, p, q, *, at):  # a view of p, q and w, read after what could take their room
    flat = p[...]
    p = g + q
    q = 1.0 - (g * g) * (p - g)
    return at.learning_rate * (flat + q), p, q


EXPECTED = {  # rule -> step, p, q
    "delayed": lambda g, w, p, q: (q, g, p),
    "kept": lambda g, w, p, q: (np.float32(0.1) * (g + np.float32(0.1) * (w - p)), w, q),
    "stacked": lambda g, w, p, q: (np.float32(0.1) * np.maximum(g, p), np.maximum(g, p), q),
    "constant": lambda g, w, p, q: (np.float32(0.1), g + 2, q - np.float32(0.1)),
    "changed_in_place": lambda g, w, p, q: (np.float32(0.1) * (p + q) / 2, (p + q) / 2, g),
    "written": lambda g, w, p, q: (np.float32(0.1) * g, 2 * g, w + 1),
    "looked_at_again": lambda g, w, p, q: (np.float32(0.1) * (p + 1 - g * g * q), g + q, 1 - g * g * q),
}


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("rule", [delayed, kept, stacked, constant, changed_in_place, written, looked_at_again])
def test_a_rule_may_hand_on_what_it_was_given(rule, declared):
    class Own(kopt.Optimizer):
        slots = kopt.Slot("p", "a slot"), kopt.Slot("q", "a slot")

    Own.rule = staticmethod(kopt.elementwise()(rule) if declared else rule)
    mine, optimizer = variables(), Own(0.1)
    expected = [(w, np.zeros_like(w), np.zeros_like(w)) for w in numpy(mine)]
    optimizer.build(mine)
    for step, gradients in enumerate(stream(4)):
        chosen = gradients[: len(mine) - step % 2]  # at times one of the slab is missing
        optimizer.apply([ops.convert_to_tensor(g) for g in chosen], mine[: len(chosen)])
        for i, g in enumerate(chosen):
            w, *slots = expected[i]
            step, *slots = EXPECTED[rule.__name__](g, w, *slots)
            expected[i] = w - step, *slots
    rule.__dict__.pop("traits", None)
    close(mine, [w for w, _, _ in expected], tolerance=1e-5)


def test_declarations_are_checked():
    with pytest.raises(ValueError, match="^`kernel` must be one of 'sgd', .*. Received: kernel='adamm'$"):
        kopt.elementwise(kernel="adamm")
    with pytest.raises(ValueError, match="^`rule` must be a function that is not declared yet."):
        kopt.elementwise()(kopt.SGD().rule)


# State


@every_row
def test_state_is_what_the_slots_declare(row):
    optimizer = row.make()
    optimizer.build(variables())
    weights = sum(int(np.prod(shape)) for shape in SHAPES.values())
    arrays = [v for v in optimizer.variables if len(v.shape)]
    assert sum(int(np.prod(v.shape)) for v in arrays) == weights * len(row.slots)
    assert len(arrays) == 3 * len(row.slots)  # two large variables, and a slab for the three small


@every_class
def test_a_file_knows_nothing_of_slabs(row, monkeypatch):
    fast, ours, file = variables(), row.make(), {}
    train("eager", ours, fast, stream(2))
    ours.save_own_variables(file)
    names = [name.split(":", 1)[1] for name in file]
    assert [name for name in names if ":" in name] == [f"{slot}:{v}" for v in SHAPES for slot in row.slots]
    assert all(tuple(file[key].shape) == SHAPES[key.split(":")[2]] for key in file if key.count(":") == 2)
    for slabbed in (True, False):
        with monkeypatch.context() as patch:
            if not slabbed:
                plainly(patch)
            again, theirs, back = variables(), row.make(), {}
            for variable, value in zip(again, fast, strict=True):
                variable.assign(value)
            theirs.build(again)
            theirs.load_own_variables(file)
            theirs.save_own_variables(back)
        assert same({k: np.asarray(v) for k, v in file.items()}, {k: np.asarray(v) for k, v in back.items()})


def test_slabs_follow_sizes_alone():
    def shapes(*sizes):
        return [keras.Variable(np.zeros(size, "float32")) for size in sizes]

    assert slabs.layout(shapes(3, slabs.SMALL, 4, slabs.SMALL + 1, 0), None) == [[0, 1, 2]]
    assert [len(group) for group in slabs.layout(shapes(*[2] * 130), None)] == [64, 64, 2]
    assert slabs.layout(shapes(3, slabs.SMALL + 1), None) == []  # nobody to share with
    mixed = [*shapes(3, 4), *(keras.Variable(np.zeros(2), dtype="float16") for _ in range(2))]
    assert slabs.layout(mixed, None) == [[0, 1, 2, 3]]  # the slots of all are float32


# What a step costs, in numbers that are the same every day


def nodes(row, count, shape, **more):
    """The operations in the graph of a step, those of the functions that it calls included."""
    import tensorflow as tf

    mine = [keras.Variable(np.ones(shape, "float32")) for _ in range(count)]
    given, optimizer = [tf.ones(shape)] * count, row.make(**more)
    optimizer.build(mine)
    step = tf.function(lambda: optimizer.apply(given, mine), autograph=False).get_concrete_function()
    definition = step.graph.as_graph_def()
    found = [node.op for node in definition.node]
    called = {node.attr["f"].func.name for node in definition.node if node.op.endswith("PartitionedCall")}
    found += [node.op for f in definition.library.function if f.signature.name in called for node in f.node_def]
    return found


@TENSORFLOW
@every_row
def test_nodes_for_each_variable_of_a_tensorflow_graph(row):
    few, many = (nodes(row, count, (130, 130)) for count in (2, 4))
    kernel = [op for op in many if op.startswith("ResourceApply")]
    assert len(kernel) == (4 if BACKEND in row.kernels else 0)
    assert sum(op.endswith("PartitionedCall") for op in many) == (BACKEND not in row.kernels)  # one island for all
    if BACKEND in row.kernels:
        assert (len(many) - len(few)) / 2 <= 1 + 1 + len(row.slots)  # the kernel, and the handles that are captured
    if row.slots:
        few, many = (nodes(row, count, (3,)) for count in (2, 10))
        assert (len(many) - len(few)) / 8 <= 12


@JAX
@every_class
def test_jax_updates_weights_and_state_in_place(row):
    import jax

    mine, optimizer = variables(), row.make()
    optimizer.build(mine)
    step = jax.jit(lambda w, state, g: optimizer.stateless_apply(state, g, w), donate_argnums=(0, 1))
    held = [v.value for v in mine], [v.value for v in optimizer.variables]
    memory = step.lower(*held, stream(1)[0]).compile().memory_analysis()
    weights = 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert memory.alias_size_in_bytes >= weights * (1 + len(row.slots))
    assert memory.temp_size_in_bytes <= 0.2 * weights


@every_class
def test_weights_of_16_bits_and_constraints(row, monkeypatch):
    def trained():
        mine = [keras.Variable(v.value, dtype="bfloat16" if i % 2 else "float32") for i, v in enumerate(variables())]
        mine[0].constraint = mine[1].constraint = keras.constraints.NonNeg()
        optimizer = row.make(weight_decay=0.1, exclude_from_decay=mine[2])
        for i, gradients in enumerate(stream(6)):
            if i == 3:
                mine[1].assign(mine[1].value * 3)  # the master has to follow
            optimizer.apply([ops.convert_to_tensor(g, v.dtype) for g, v in zip(gradients, mine, strict=True)], mine)
        masters = [held.master for held in optimizer.all_held if held.master is not None]
        return [ops.cast(v.value, "float32") for v in mine], masters

    with monkeypatch.context() as patch:
        plainly(patch)
        slow, theirs = trained()
    fast, ours = trained()
    close(ours, theirs)
    for a, b in zip(numpy(fast), numpy(slow), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2)  # the last bit of bfloat16
    assert all((weight >= 0).all() for weight in numpy(fast)[:2])
