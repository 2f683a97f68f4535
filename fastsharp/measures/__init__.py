"""Measures of sharpness and of the function learned; they take objectives and operators, and know nothing of how products are made."""
