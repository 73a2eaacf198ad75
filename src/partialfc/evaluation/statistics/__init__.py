"""Figures of scores: metrics, intervals, calibration, groups, quality and thresholds, whatever protocol made them."""
