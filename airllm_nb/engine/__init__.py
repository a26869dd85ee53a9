"""The layered engine: knows torch, transformers and safetensors, and nothing of notebooks."""
