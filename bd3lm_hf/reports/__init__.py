"""Plots, report pages, speed and quality measurements."""
