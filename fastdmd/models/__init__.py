"""Network families. Only here are diffusers and transformers imported."""
