"""Modules that run on quantized weights, and what puts them into a model."""

from __future__ import annotations

from lowbit.nn.experts import QuantExperts
from lowbit.nn.linear import QuantLinear
from lowbit.nn.load import load
from lowbit.nn.stored import float_activations
from lowbit.nn.swap import SwapReport, quantize_model

__all__ = ["QuantExperts", "QuantLinear", "SwapReport", "float_activations", "load", "quantize_model"]
