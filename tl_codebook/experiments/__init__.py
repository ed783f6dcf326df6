"""Experiments whose truth is known, on models small enough to train in minutes."""
