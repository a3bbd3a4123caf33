"""How callbacks get into the compiled step when `fit` begins, and out of it when it ends."""

from kopt import _keras, checks
from kopt._keras import stepping


class Installation:
    """What the callbacks have in the training of one model; it stands in place of its `make_train_function`.

    That is the first thing that only a training calls: there the announced come in, and what a `fit` that raised has
    left goes out. Such is left if `model.history` is another than it was, since each `fit` makes one anew, or if no
    `fit` is running any more. It goes out before a `compile`, too: the weights may be others that are trainable then.
    """

    def __init__(self, model):
        self.model, self.make = model, model.make_train_function
        self.compile = model.compile
        self.undo_stand_ins = [
            stepping.stand_in(model, "make_train_function", self),
            stepping.stand_in(model, "compile", self.clear_and_compile),
        ]
        self.announced: list[tuple] = []  # pairs of a part and the history at the time
        self.parts, self.steps, self.history, self.in_fit = [], [], None, False
        self.undo = []  # what takes back what was put into the optimizer, beside the steps

    @classmethod
    def of(cls, model) -> "Installation":
        return _in(model) or cls(model)

    def __call__(self, force=False):
        for part, history in self.announced:
            if history is not self.history_now():  # of an `evaluate` that raised before it began
                self.withdraw(part)
        if self.announced:
            self.begin()
        elif self.history is not self.history_now() or (self.in_fit and not _keras.fits_of(self.model)):
            self.clear()
        return self.make(force)

    def clear_left(self) -> None:
        if not _keras.fits_of(self.model):
            self.clear()

    def clear_and_compile(self, *arguments, **named):
        self.clear_left()
        return self.compile(*arguments, **named)

    def history_now(self):
        return getattr(self.model, "history", None)

    def announce(self, part) -> None:
        if part._announced:
            part._announced.withdraw(part)
        part._announced = self
        self.announced.append((part, self.history_now()))

    def withdraw(self, part) -> None:
        self.announced = [pair for pair in self.announced if pair[0] is not part]
        part._announced = None
        self.go_if_idle()

    def begin_late(self, *parts) -> None:
        """Begin where a train function may have been made already."""
        made = getattr(self.model, "train_function", None)
        self.join(parts) if parts else self.begin()
        if made is not None:
            self.make()

    def begin(self) -> None:
        """Install those who are announced; what any other has left in the optimizer goes."""
        parts = [part for part, _ in self.announced]
        optimizer = getattr(self.model, "optimizer", None)
        if not callable(getattr(optimizer, "apply", None)):
            self.announced = []
            names = ", ".join(part.name for part in parts)
            checks.refuse("optimizer", f"one of Keras or kopt in `compile`, for {names}", optimizer)
        left = [part for step in map(stepping.Step.of, stepping.updating(optimizer)) if step for part in step.parts]
        for part in [*self.parts, *left, *parts]:
            if part._training:
                part._training.remove(part)
        self.announced = []
        self.join(parts)

    def join(self, parts) -> None:
        self.history, self.in_fit = self.history_now(), _keras.fits_of(self.model) > 0
        for part in parts:
            part._announced, part._training, part._begun = None, self, False
        self.parts += parts
        self.model.train_function = None  # one that was compiled before knows nothing of the parts
        try:
            for part in parts:
                part.prepare(self.model)
            self.settle()
        except BaseException:
            self.clear()
            raise

    def settle(self) -> None:
        """Install the parts, once the optimizer can be built."""
        model, optimizer = self.model, self.model.optimizer
        if not optimizer.built and not stepping.has_all_weights(model):
            if not self.undo:
                self.undo = [stepping.before_first_step(optimizer, model, self.settle)]
            return
        if not optimizer.built:
            with stepping.where_made(optimizer):
                optimizer.build(model.trainable_variables)
        self.take_back()
        self.steps = [stepping.Step.of(one) or stepping.Step(one) for one in stepping.updating(optimizer)]
        self.undo = [stepping.hide_in_files(optimizer, self.steps)]
        for part in self.parts:
            for step in self.steps:
                if not any(part is other for other in step.parts):
                    step.install(part)
        for part in self.parts:
            for step in self.steps:
                with stepping.where_made(step.optimizer):
                    part.installed(step.optimizer)

    def take_back(self) -> None:
        for undo in self.undo:
            undo()
        self.undo = []

    def remove(self, part) -> None:
        for step in self.steps:
            step.remove(part)
        self.parts = [other for other in self.parts if other is not part]
        part._training = None
        part.let_go()
        self.model.train_function = None
        if _keras.fits_of(self.model) > 1:  # the one around this one needs a train function
            self.make()
        if not self.parts:
            self.take_back()
            self.steps = []
        self.go_if_idle()

    def clear(self) -> None:
        for part in self.parts:
            self.remove(part)

    def go_if_idle(self) -> None:
        if not self.parts and not self.announced:
            for undo in self.undo_stand_ins:
                undo()


def clear_left(model) -> None:
    """Take out of a model what a `fit` that raised has left in it."""
    if found := _in(model):
        found.clear_left()


def settle(model) -> None:
    """Install what waits for the model's weights. For who makes them in a `fit` before TensorFlow does, at step one."""
    if found := _in(model):
        found.settle()


def _in(model):
    """The installation in a model, or None."""
    found = vars(model).get("make_train_function")
    return found if isinstance(found, Installation) else None
