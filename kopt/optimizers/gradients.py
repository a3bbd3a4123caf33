"""What happens to a gradient on its way to a rule, in this order:

1. unscale     divide by the loss scale                     (Keras, `apply`)
2. accumulate  average over `gradient_accumulation_steps`   (Keras, `_backend_apply_gradients`)
3. clip        `clipnorm`, `global_clipnorm`, `clipvalue`   (Keras, `_clip_gradients`)
4. reduce      sum over the replicas of a strategy          (Keras, `_backend_update_step`)
5. decay       add the coupled `l2` term                    (here)

Decoupled `weight_decay` does not touch the gradient: it shrinks the weight beside the rule (`execution.py`).
"""


def coupled_decay(gradient, weight, l2):
    """The gradient of the loss plus `l2 / 2 * sum(weight**2)`; None means no such term."""
    return gradient if l2 is None else gradient + l2 * weight
