"""Faults, and what must hold under them: a simulator of whole federations, drills on real ones, one set of checkers."""
