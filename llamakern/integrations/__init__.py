"""llamakern inside other people's programs, one place for each of them. Nothing here is imported unless asked for."""
