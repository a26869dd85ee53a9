"""Measures what this machine can expect of the engine, side by side with its peers: ``python -m airllm_nb.bench``."""
