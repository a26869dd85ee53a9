"""Everything that depends on the version of transformers, and nothing else does."""
