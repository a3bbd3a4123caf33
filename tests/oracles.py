"""Update rules in NumPy float64, written from the papers; this file shares no code with kopt.

Each takes the weight `w`, the gradient `g`, a dictionary `s` of state (empty at first) and the number `t` of the step,
and returns what to add to the weight. Hyperparameters may differ from step to step.
"""

import numpy as np


def decayed(rule):
    """The rule with coupled decay (L2: the gradient gets `l2 w`) and decoupled decay (Loshchilov & Hutter, 2019)."""

    def step(w, g, s, t, *, weight_decay=0.0, l2=0.0, **hypers):
        return rule(w, g + l2 * w, s, t, **hypers) - hypers["learning_rate"] * weight_decay * w

    return step


@decayed
def sgd(w, g, s, t, *, learning_rate, momentum=0.0, nesterov=False, form="velocity"):
    """Polyak, 1964; Sutskever et al., 2013, with the look-ahead point x̃ = x + (what momentum adds next) stored."""
    v = s.get("v", np.zeros_like(w))
    if form == "velocity":
        s["v"] = momentum * v - learning_rate * g
        return (1 + momentum) * s["v"] - momentum * v if nesterov else s["v"]
    s["v"] = momentum * v + (g if form == "gradient" else (1 - momentum) * g)
    ahead = momentum * (s["v"] - v) if nesterov else 0.0
    return -learning_rate * (s["v"] + ahead)


@decayed
def adagrad(w, g, s, t, *, learning_rate, initial_accumulator_value=0.0, epsilon=1e-7):
    """Duchi, Hazan & Singer, 2011, the diagonal form."""
    s["c"] = s.get("c", np.full_like(w, initial_accumulator_value)) + g**2
    return -learning_rate * g / (np.sqrt(s["c"]) + epsilon)


@decayed
def rmsprop(w, g, s, t, *, learning_rate, rho=0.9, momentum=0.0, centered=False, epsilon=1e-7):
    """Tieleman & Hinton, 2012; centered: Graves, 2013, equations 38 to 41, with epsilon outside the root."""
    s["c"] = rho * s.get("c", 0.0) + (1 - rho) * g**2
    s["mean"] = rho * s.get("mean", 0.0) + (1 - rho) * g
    second = np.maximum(s["c"] - s["mean"] ** 2, 0.0) if centered else s["c"]
    s["v"] = momentum * s.get("v", 0.0) + learning_rate * g / (np.sqrt(second) + epsilon)
    return -s["v"]


@decayed
def adam(w, g, s, t, *, learning_rate, beta_1=0.9, beta_2=0.999, epsilon=1e-7, bias_correction=True, amsgrad=False):
    """Kingma & Ba, 2015, algorithm 1; AMSGrad: Reddi, Kale & Kumar, 2018, algorithm 2, with the corrections."""
    s["m"] = beta_1 * s.get("m", 0.0) + (1 - beta_1) * g
    s["v"] = beta_2 * s.get("v", 0.0) + (1 - beta_2) * g**2
    s["largest"] = np.maximum(s.get("largest", 0.0), s["v"])
    m, v = s["m"], s["largest"] if amsgrad else s["v"]
    if bias_correction:
        m, v = m / (1 - beta_1**t), v / (1 - beta_2**t)
    return -learning_rate * m / (np.sqrt(v) + epsilon)


def run(rule, w, gradients, **hypers):
    """What each step adds to the weight."""
    state, changes = {}, []
    for t, g in enumerate(gradients, start=1):
        changes.append(rule(w, np.asarray(g, "float64"), state, t, **hypers))
        w = w + changes[-1]
    return changes
