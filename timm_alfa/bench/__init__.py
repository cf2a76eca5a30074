"""Measurements: what a training step costs, method by method, and what the training loop adds to a plain one."""
