"""Matrices and models whose answers are known without fastsharp."""
