"""Sensitivity algorithms, one module each."""
