"""Where batches come from: the built-in world, prompt files, or folders of encoded latents."""
