"""What a run takes, before it starts: memory, work and time, from a step on the meta device."""
