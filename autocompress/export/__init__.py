"""From a torch model to an artifact."""
