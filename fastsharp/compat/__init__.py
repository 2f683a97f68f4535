"""Calls of other libraries, served by fastsharp: `compat.pyhessian`, `compat.hessian_eigenthings`. Scripts change an import."""
