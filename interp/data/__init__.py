"""Prompt sets: files of prompts, and generators of the field's standard ones."""

from interp.data.prompts import Prompt, indirect_objects, read_prompts, repeated_tokens

__all__ = ["Prompt", "indirect_objects", "read_prompts", "repeated_tokens"]
