"""The text of an answer, as it comes: where it stops, what is thought, said and called."""
