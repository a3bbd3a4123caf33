"""Transfer."""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import ops
from scipy.stats import wilcoxon
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

import kopt
from kopt.callbacks import StagedUnfreeze

LABELS, ASIDE, SOURCE, TUNING_SEEDS = [10, 20, 50], 297, 1000, range(6)
EPOCHS, PASSES = 13, 12  # of each training: those that kopt.fine_tune has; times that an epoch sees all labels
RATES, PENALTIES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2], [0.01, 0.1, 1.0, 10.0, 100.0]  # of Adam; C of scikit-learn
LOGISTIC, SVM, SANITY = "pixels, logistic", "pixels, SVM", "features, logistic"
SCRATCH, ONE_RATE, FINE_TUNE = "scratch", "one-rate", "fine-tune"
PLANS = {ONE_RATE: "#E69F00", "probe": "#CC79A7", FINE_TUNE: "#D55E00", "staged": "#0072B2", "layer-decay": "#009E73"}
COLORS = {LOGISTIC: "#BBBBBB", SVM: "#777777", SCRATCH: "#000000", **PLANS, SANITY: "#56B4E9"}  # all methods
TASKS = {"loop": "has the digit a closed loop?", "new-classes": "5 to 9, after 0 to 4"}


def digits(task, seeds, tuning):
    """Source, labeled and test images (row, seed, 8, 8, 9), and labels. Images to tune on are in no other test."""
    images, digit = load_digits(return_X_y=True)
    padded = np.pad(images.reshape(-1, 8, 8).astype("float32") / 16, ((0, 0), (1, 1), (1, 1)))
    around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2)).reshape(-1, 8, 8, 9)
    order, parts = np.random.default_rng(0).permutation(len(digit)), []
    loop = task == "loop"
    label = np.isin(digit, [0, 6, 8, 9]).astype(int) if loop else digit - 5
    target = order if loop else order[digit[order] > 4]
    for seed in seeds:
        others = (draw := np.random.default_rng([seed, 1])).permutation(target[ASIDE:])
        source, others = (others[:SOURCE], others[SOURCE:]) if loop else (order[digit[order] < 5], others)
        others = draw.permutation(target[:ASIDE]) if tuning else others
        classes = np.unique(label[target])
        of = [others[label[others] == one][: LABELS[-1] // len(classes)] for one in classes]
        labeled = np.stack(of, 1).ravel()  # so that the first 10, 20, ... are balanced
        parts.append((source, labeled, others[~np.isin(others, labeled)]))
    source, labeled, test = (np.stack(part, 1) for part in zip(*parts, strict=True))
    return (around[source], digit[source]), (around[labeled], label[labeled]), (around[test], label[test])


def network(seeds, classes, body=None):
    """A network for each seed, side by side: convolutions of 3 x 3 and 2 x 2, a layer of 64, and a head."""
    keras.utils.clear_session()
    layers, shape, model = keras.layers, (len(seeds),), keras.Sequential
    inner = [
        layers.EinsumDense("bsxyi,sio->bsxyo", (*shape, 8, 8, 16), activation="relu", name="conv1"),
        layers.Reshape((*shape, 4, 2, 4, 2, 16)),
        layers.EinsumDense("bsxiyjc,sijco->bsxyo", (*shape, 4, 4, 32), activation="relu", name="conv2"),
        layers.Reshape((*shape, 512)),
        layers.EinsumDense("bsi,sio->bso", (*shape, 64), activation="relu", name="dense"),
    ]
    base = model([keras.Input((*shape, 8, 8, 9)), *inner], name="base")
    model = model([base, layers.EinsumDense("bsi,sio->bso", (*shape, classes), name="head")])
    for place, kernel in enumerate(model.weights):
        draws = [np.random.default_rng([seed, 2, place]) for seed in seeds]
        scale = (2 / np.prod(kernel.shape[1:-1])) ** 0.5
        kernel.assign(np.stack([draw.normal(0, scale, kernel.shape[1:]) for draw in draws]))
    if body is not None:
        base.set_weights(body)
    return model, base


def loss(y, logits):
    return ops.sum(keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True), -1)


def accuracy(model, data):
    """Percent of the images, for each seed."""
    return 100 * (ops.convert_to_numpy(model(data[0])).argmax(-1) == data[1]).mean(0)


def pretrain(seeds, data, epochs):
    model, base = network(seeds, 10)
    model.compile(kopt.Adam(3e-3), loss=loss)
    keras.utils.set_random_seed(0)
    model.fit(*data, batch_size=50, epochs=epochs, callbacks=[kopt.callbacks.CosineDecay()], verbose=0)
    return base


def train(method, rate, seeds, body, data, test):
    """The accuracy of each seed. All have the same steps, with all labels in each."""
    x, y = data
    model, base = network(seeds, y.max() + 1, None if method == SCRATCH else body)
    base.trainable = method != "probe"
    decay = kopt.layer_decay(model, 1 / 2.6) if method == "layer-decay" else None
    model.compile(kopt.Adam(rate, multipliers=decay), loss=loss)
    x, y = (np.concatenate([part] * PASSES) for part in data)
    how = {"batch_size": len(data[0]), "shuffle": False, "verbose": 0}
    if method == FINE_TUNE:
        kopt.fine_tune(model, base, x, y, **how)  # as it comes: 3 epochs of the head, 10 of all, the body at 0.1
    else:
        top = {at: {base.get_layer(name): 0.1} for at, name in ((3, "dense"), (6, "conv2"), (9, "conv1"))}
        staged = [StagedUnfreeze({0: {base: 0.0}, **top})] * (method == "staged")
        model.fit(x, y, epochs=EPOCHS, callbacks=staged, **how)
    return accuracy(model, test)


def classic(method, penalty, features, data, test):
    """The accuracy of each seed, of a method without a network."""
    found, kind = [], SVC(C=penalty) if method == SVM else LogisticRegression(C=penalty, max_iter=2000)
    for (x, y), (x_test, y_test) in zip(*(zip(*(np.moveaxis(a, 1, 0) for a in of), strict=True) for of in (data, test))):
        found.append(100 * kind.fit(x.reshape(len(x), -1), y).score(x_test.reshape(len(x_test), -1), y_test))
    return np.array(found)
