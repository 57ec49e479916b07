"""Weights & Biases behind one small interface."""
