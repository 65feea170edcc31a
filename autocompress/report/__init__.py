"""Tables and pictures of a front."""
