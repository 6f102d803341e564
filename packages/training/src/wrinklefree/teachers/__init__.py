"""Where a teacher's distributions and hidden states come from."""
