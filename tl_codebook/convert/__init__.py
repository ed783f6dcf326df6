"""Bring models in: from Hugging Face folders, objects and hub names."""
