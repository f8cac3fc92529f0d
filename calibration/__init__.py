"""Calibration for INT8: choice of images, activation ranges, SmoothQuant and the search for sensitive layers."""
