"""Prove the project: scores, baselines, calibration, the attribute reader and studies."""
