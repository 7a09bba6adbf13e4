"""Quantizing: calibration data, the methods, the layer-by-layer pipeline and the quality report.

On-disk formats live in `llmkit.checkpoint`; nothing here serves or schedules.
"""
