"""Formulas, losses and confidence intervals: arrays in, arrays out."""
