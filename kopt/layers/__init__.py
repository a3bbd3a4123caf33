"""Regularizing layers that Keras lacks: random in training, and the same each time at inference."""

from kopt.layers.drop_block import DropBlock2D as DropBlock2D
from kopt.layers.drop_connect import DropConnectConv2D as DropConnectConv2D
from kopt.layers.drop_connect import DropConnectDense as DropConnectDense
from kopt.layers.drop_path import DropPath as DropPath
from kopt.layers.drop_path import drop_path_rates as drop_path_rates
from kopt.layers.fractional_pooling import FractionalMaxPooling2D as FractionalMaxPooling2D
