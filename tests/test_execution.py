"""The fast ways to run a rule against the plain one: the same numbers, fewer operations, no more memory."""

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from kopt.optimizers import execution, kernels, lists, slabs
from tests.catalog import CLASSES, OPTIMIZERS
from tests.conftest import BACKEND
from tests.training import MODES, STREAM, equal, every_class, every_row, numpy, same, train

TENSORFLOW = pytest.mark.skipif(BACKEND != "tensorflow", reason="what is looked at is TensorFlow's")
JAX = pytest.mark.skipif(BACKEND != "jax", reason="what is looked at is JAX's")
TORCH = pytest.mark.skipif(BACKEND != "torch", reason="what is looked at is torch's")
IN_PLACE = pytest.mark.skipif(BACKEND == "jax", reason="JAX has no kernels: XLA makes one of each rule")

SHAPES = {"large": (130, 131), "a": (2, 3), "b": (5,), "larger": (65, 262), "c": ()}  # large: more than slabs.SMALL
CONDITIONS = {
    "alone": {},
    "with decay": {"weight_decay": 0.1, "l2": 0.1, "exclude_from_decay": ["b$", "larger"]},
    "with a clip, skipping": {"global_clipnorm": 3.0, "nonfinite": "skip"},
}


def variables():
    rng = np.random.default_rng(0)
    return [keras.Variable(rng.normal(size=shape).astype("float32"), name=name) for name, shape in SHAPES.items()]


def stream(steps=20, spoilt=False):
    rng = np.random.default_rng(1)
    gradients = [[rng.normal(size=shape).astype("float32") for shape in SHAPES.values()] for _ in range(steps)]
    if spoilt:
        gradients[3][0][1, 1] = np.nan
        gradients[7][1][0, 0] = np.inf
    return gradients


def spied(monkeypatch):
    """The names of the ways that are taken."""
    taken, ways, step = set(), execution._way, lists.Group.update

    def way(*arguments):
        chosen, key = ways(*arguments)
        taken.add(chosen.__name__)
        return chosen, key

    monkeypatch.setattr(execution, "_way", way)
    monkeypatch.setattr(lists.Group, "update", lambda *arguments: (taken.add("lists"), step(*arguments)))
    return taken


def plainly(monkeypatch):
    """From here on every variable has slots of its own and is updated in the plain way."""
    monkeypatch.setattr(execution, "_way", lambda *_: (execution.plain, None))
    monkeypatch.setattr(
        lists, "update", lambda _, variables, gradients, shared: list(zip(variables, gradients, strict=True))
    )
    monkeypatch.setattr(slabs, "layout", lambda *_: [])


def close(ours, theirs, tolerance=2e-6):
    """A few units in the last place, after 20 steps of which each may differ by one."""
    for a, b in zip(numpy(ours), numpy(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * 0.5)


@every_row
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("xla", "stateless")])
def test_every_way_equals_the_plain_one(row, condition, mode, monkeypatch):
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


@TORCH  # the others call a rule with the tensors themselves
def test_a_rule_that_is_no_elementwise_one_is_refused():
    def peeking(g, w, *, at):
        return (at.learning_rate * g if ops.max(g) > 0 else g,)

    def noisy(g, w, *, at):
        return (at.learning_rate * g + keras.random.normal(ops.shape(g)),)

    def writing(g, w, *, at):
        g[0] = 0
        return (at.learning_rate * g,)

    for rule, error, message in (
        (writing, TypeError, "^A rule that is declared `elementwise` must not write into a tensor$"),
        (peeking, TypeError, "^A rule that is declared `elementwise` must not look at values: `__bool__`$"),
        (noisy, ValueError, "^A rule that is declared `elementwise` must not make tensors of entries that differ$"),
    ):
        own = type("Own", (kopt.Optimizer,), {"rule": staticmethod(kopt.elementwise()(rule))})
        with pytest.raises(error, match=message):
            own(0.1).apply([ops.ones((2, 3))], [keras.Variable(np.ones((2, 3)))])


def test_declarations_are_checked():
    with pytest.raises(ValueError, match="^`kernel` must be one of 'sgd', .*. Received: kernel='adamm'$"):
        kopt.elementwise(kernel="adamm")
    with pytest.raises(ValueError, match="^`rule` must be a function that is not declared yet."):
        kopt.elementwise()(kopt.SGD().rule)


@TORCH  # JAX has nothing to change in place, and on TensorFlow Keras's optimizers have no stateless form
@every_class
def test_nothing_is_changed_within_a_stateless_scope(row):
    for mapping in (lambda o, v: None, lambda o, v: [(x, x.value) for x in [*v, *o.variables]]):
        mine, optimizer = variables(), row.make()
        optimizer.build(mine)
        before = [numpy(mine), numpy(optimizer.variables)]
        with keras.StatelessScope(mapping(optimizer, mine)) as scope:
            optimizer.apply([ops.convert_to_tensor(g) for g in stream(1)[0]], mine)
        assert equal(mine, before[0])
        assert equal(optimizer.variables, before[1])
        assert not equal([scope.get_current_value(v) for v in mine], mine)


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


@TORCH
@every_row
def test_torch_asks_no_device_and_calls_few_operations(row):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found.append(function.__name__.split(".")[0])
            return function(*args, **(kwargs or {}))

    counts = []
    for count in (4, 40):
        mine = [keras.Variable(np.ones((9, 9), "float32")) for _ in range(count)]
        given = [ops.ones((9, 9)) for _ in range(count)]
        rate = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5) if count == 40 else 0.1
        optimizer, found = row.make(learning_rate=rate), []
        for _ in range(2):
            optimizer.apply(given, mine)
        with Counted():
            optimizer.apply(given, mine)
        assert any("_fused_" in name for name in found) == (BACKEND in row.kernels), found
        counts.append(len([name for name in found if name.startswith(("_fused", "_foreach"))]))
        if count == 4:
            assert "_local_scalar_dense" not in found  # `item`, which waits for the device
    assert counts[0] == counts[1] <= 25


@TORCH
def test_numbers_on_torch_are_those_of_the_variables():
    from kopt import backends

    variable = keras.Variable(0.5)
    assert backends.number(variable, "float32") == 0.5
    variable.assign(0.25)
    assert backends.number(variable, "float32") == 0.25
    with np.testing.assert_raises(AssertionError):
        assert backends.number(variable, "float32") == 0.5
    backends.count_up(variable)
    assert backends.number(variable, "float32") == float(numpy([variable])[0]) == 1.25
    del variable
    assert len(backends._numbers) < 1000


@TORCH
def test_a_decay_too_small_for_torchs_kernel_is_not_rounded_away():
    """torch multiplies by 1 - 2e-8, which is 1 in float32: weights do not decay at all."""
    mine, optimizer = [keras.Variable(np.full(1000, 1.0, "float32"))], kopt.AdamW(2e-6, weight_decay=0.01)
    other, undecayed = [keras.Variable(np.full(1000, 1.0, "float32"))], kopt.AdamW(2e-6, weight_decay=0.0)
    rng = np.random.default_rng(0)
    for _ in range(400):
        g = [ops.convert_to_tensor(rng.normal(size=1000).astype("float32"))]
        optimizer.apply(g, mine)
        undecayed.apply(g, other)
    decayed = numpy(other)[0].mean(dtype="float64") - numpy(mine)[0].mean(dtype="float64")
    assert decayed == pytest.approx(400 * 2e-8, rel=0.2)


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


@TORCH
@every_row
@pytest.mark.parametrize("rate", [0.1, 1e-7])  # at which AdamW's decay is too small for torch's kernel
@pytest.mark.parametrize("by", ["the rule", "the kernel"])
def test_lists_as_on_an_accelerator(row, rate, by, monkeypatch):
    """There a group is not cut, but goes through operations on lists."""
    more = {"learning_rate": rate, "weight_decay": 0.1, "l2": 0.1, "exclude_from_decay": "b$"}
    slow, theirs = variables(), row.make(**more)
    with monkeypatch.context() as patch:
        plainly(patch)
        train("eager", theirs, slow, stream())
    whole = lambda group: [lists.Tile(range(len(group.weights)), group.weights, group.slots, listed=True)]  # noqa: E731
    monkeypatch.setattr(lists.Group, "_cut", whole)
    if by == "the rule":
        monkeypatch.setattr(kernels, "find", lambda *_: None)
    fast, ours = variables(), row.make(**more)
    train("eager", ours, fast, stream())
    close(fast, slow)


@TORCH
@every_row
def test_variables_in_another_order_than_at_build(row):
    """Those that share a slab keep each its own slots."""
    fast, slow = variables(), variables()
    ours, theirs = row.make(), row.make()
    ours.build(fast)
    theirs.build(slow)
    for i, gradients in enumerate(stream(4)):
        gradients, order = [ops.convert_to_tensor(g) for g in gradients], [4, 2, 0, 1, 3] if i % 2 else range(5)
        ours.apply([gradients[j] for j in order], [fast[j] for j in order])
        theirs.apply(gradients, slow)
    close(fast, slow)
    close([part for part in ours.parts if len(part.shape)], [part for part in theirs.parts if len(part.shape)])


@TORCH
@every_class
@pytest.mark.parametrize("change", ["the weight past the count of writes", "the master", "the state"])
def test_a_weight_of_16_bits_wins_over_its_master(row, change, monkeypatch):
    def trained():
        mine, optimizer, state = [keras.Variable(STREAM[0], dtype="bfloat16")], row.make(), {}
        for i, g in enumerate(STREAM):
            if i == 2:
                optimizer.save_own_variables(state)
            if i == 4 and change == "the state":
                optimizer.load_own_variables(state)
            if i == 4 and change == "the master":
                optimizer.all_held[0].master.assign(ops.ones(STREAM[0].shape))
            if i == 4 and "writes" in change:
                mine[0].value.data.clamp_(-0.1, 0.1)
            optimizer.apply([ops.convert_to_tensor(g, "bfloat16")], mine)
        return optimizer.all_held[0].master

    with monkeypatch.context() as patch:
        plainly(patch)
        slow = trained()
    close([trained()], [slow])


@TORCH
def test_operations_of_several_results_and_dropped_ones(monkeypatch):
    import torch

    def median(g, w, p, q, *, at):
        return at.learning_rate * ops.sort(ops.stack([g, p, q]), axis=0)[1], g, p * 1

    def largest(g, w, p, q, *, at):
        return at.learning_rate * torch.max(torch.stack([g, p]), dim=0).values, g, ops.unstack(ops.stack([g, w]))[0]

    def dropped(g, w, p, q, *, at):
        same = p
        same.mul_(0.9).add_(g)
        return at.learning_rate * p, p, q

    for rule in (median, largest, dropped):
        slots = kopt.Slot("p", "a slot"), kopt.Slot("q", "a slot")
        own = type("Own", (kopt.Optimizer,), {"rule": staticmethod(kopt.elementwise()(rule)), "slots": slots})
        fast, slow, ours, theirs = variables(), variables(), own(0.1), own(0.1)
        train("eager", ours, fast, stream(4))
        with monkeypatch.context() as patch:
            plainly(patch)
            train("eager", theirs, slow, stream(4))
        close(fast, slow)


@TORCH
@every_class
def test_gradients_of_each_others_dtypes_and_inference_mode(row):
    import torch

    mine = [keras.Variable(STREAM[0], dtype=dtype) for dtype in ("float32", "float64", "float32")]
    theirs = [keras.Variable(STREAM[0], dtype=dtype) for dtype in ("float32", "float64", "float32")]
    one, other = row.make(), row.make()
    one.build(mine)
    other.build(theirs)
    for i, g in enumerate(STREAM[:4]):
        with torch.inference_mode(i == 0):
            one.apply([ops.convert_to_tensor(g, dtype) for dtype in ("float64", "float32", "float32")], mine)
        other.apply([ops.convert_to_tensor(g, v.dtype) for v in theirs], theirs)
    close(mine, theirs)


@TORCH
@every_row
def test_a_gradient_that_is_the_weight_itself(row):
    (mine,), (theirs,) = variables()[:1], variables()[:1]
    one, other = row.make(), row.make()
    for _ in range(3):
        one.apply([mine.value], [mine])
        other.apply([ops.copy(theirs.value)], [theirs])
    close([mine], [theirs])


@TORCH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_work_on_torch_grows_no_faster_than_the_variables(dtype):
    """Though they share slabs, and whether there are constraints or weights of 16 bits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Moved(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            entries.append(getattr(result, "nbytes", 0))
            return result

    work = []
    for count in (8, 64):
        mine = [keras.Variable(np.ones((9, 9)), dtype=dtype) for _ in range(count)]
        mine[0].constraint = mine[1].constraint = keras.constraints.NonNeg()
        given, optimizer, entries = [ops.ones((9, 9), dtype) for _ in range(count)], kopt.Adam(), []
        optimizer.apply(given, mine)
        with Moved():
            optimizer.apply(given, mine)
        work.append(sum(entries))
    assert work[1] <= 10 * work[0]


@TORCH
@every_class
def test_variables_that_move_are_found_again(row):
    """The lists of tensors that are kept must not outlive what they are of."""
    mine, theirs, ours, other = variables(), variables(), row.make(), row.make()
    for i, gradients in enumerate(stream(5)):
        gradients = [ops.convert_to_tensor(g) for g in gradients]
        if i == 1:
            mine[0]._value.data = mine[0]._value.data.clone()  # as `module.to` does
        if i == 2:
            for slot in {id(p): p for p in (getattr(p, "whole", p) for p in ours.parts)}.values():
                slot._value.data = slot._value.data.clone()
        if i == 3:
            mine[0]._value.data = mine[0]._value.data.T.contiguous().T
        if i == 4:
            mine[1].constraint = theirs[1].constraint = keras.constraints.NonNeg()
        chosen = slice(None) if i else slice(0, 3)
        ours.build(mine)
        other.build(theirs)
        ours.apply(gradients[chosen], mine[chosen])
        with pytest.MonkeyPatch.context() as patch:
            plainly(patch)
            other.apply(gradients[chosen], theirs[chosen])
        close(mine, theirs)
    assert (numpy(mine)[1] >= 0).all()


@TORCH
def test_a_gradient_that_lies_otherwise_in_memory(monkeypatch):
    for row in OPTIMIZERS:
        mine, theirs = [keras.Variable(STREAM[0])], [keras.Variable(STREAM[0])]
        g = ops.convert_to_tensor(STREAM[1])
        row.make().apply([g], mine)
        row.make().apply([ops.transpose(ops.convert_to_tensor(np.ascontiguousarray(STREAM[1].T)))], theirs)
        assert equal(mine, theirs)
