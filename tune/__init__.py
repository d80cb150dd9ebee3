"""Searching for the encoder whose single threshold holds: Ray Tune and Optuna."""
