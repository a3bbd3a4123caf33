"""Torch's ways to run a rule: kernels and programs on lists of tensors, and numbers that are kept on the host."""

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from kopt.optimizers import kernels, lists
from tests.catalog import OPTIMIZERS
from tests.conftest import BACKEND
from tests.training import STREAM, equal, every_class, every_row, numpy, train
from tests.ways import close, plainly, stream, variables

pytestmark = pytest.mark.skipif(BACKEND != "torch", reason="what is looked at is torch's")


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


@every_row
def test_a_gradient_that_is_the_weight_itself(row):
    (mine,), (theirs,) = variables()[:1], variables()[:1]
    one, other = row.make(), row.make()
    for _ in range(3):
        one.apply([mine.value], [mine])
        other.apply([ops.copy(theirs.value)], [theirs])
    close([mine], [theirs])


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


def test_a_gradient_that_lies_otherwise_in_memory(monkeypatch):
    for row in OPTIMIZERS:
        mine, theirs = [keras.Variable(STREAM[0])], [keras.Variable(STREAM[0])]
        g = ops.convert_to_tensor(STREAM[1])
        row.make().apply([g], mine)
        row.make().apply([ops.transpose(ops.convert_to_tensor(np.ascontiguousarray(STREAM[1].T)))], theirs)
        assert equal(mine, theirs)
