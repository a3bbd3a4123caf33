"""Callbacks for `fit`: they work with every optimizer, kopt's and Keras's."""

from kopt.callbacks.backup import BackupAndRestore as BackupAndRestore
