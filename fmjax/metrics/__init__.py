"""Distances between sample sets, computed in float64 on the host: the last digits of a reported number are real."""
