"""Weights and tokenizers in and out: from the hub, a folder or a GGUF file, and back in Hugging Face's
layout.
"""
