"""Values only: stdlib and numpy, no torch, no Optuna, no runtime."""
