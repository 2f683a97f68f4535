"""The R-operator: a tape of ATen calls, one rule per call, tangents of b vectors at once."""
