"""Proposing candidates: the only folder that imports Optuna."""
