"""Figures of the code's layout, and proof that a change of form left the results bit-equal."""
