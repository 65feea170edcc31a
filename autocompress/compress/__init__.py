"""From a candidate to a compressed torch model."""
