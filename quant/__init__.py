"""Quantizing: calibration data, the methods, the run layer by layer, and the quality report.

Start reading at `quantize_checkpoint.py`. On-disk formats are in `llmkit.checkpoint`; nothing here
serves or schedules.
"""
